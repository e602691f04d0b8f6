"""Checkpoints: written in the background by Orbax, checked when they are read; the newest few and the best are kept."""

import contextlib
import dataclasses
import itertools
import math
import os
from collections.abc import Callable, Iterator
from typing import Any

import jax
import orbax.checkpoint as ocp
from absl import logging
from etils import epath
from orbax.checkpoint.checkpoint_managers import preservation_policy

from halonet_jax.errors import CheckpointError, ConfigError, NonFiniteLoss, SaveError, StorageError
from halonet_jax.runtime import distributed, storage
from halonet_jax.training import carry_over
from halonet_jax.training import checkpoint_files as files
from halonet_jax.training.state import TrainState, fingerprint

# In messages of TensorStore and the operating system: storage that cannot be reached, rather than a damaged checkpoint.
_UNREACHABLE = ("PERMISSION_DENIED", "UNAUTHENTICATED", "UNAVAILABLE", "DEADLINE_EXCEEDED", "RESOURCE_EXHAUSTED")


class Checkpointer:
    """Saves and restores under `directory/<step>`. A checkpoint appears there whole, or not at all.

    A checkpoint is a state and a record: JSON values that the owner of the run chooses. Both have checksums, which are compared
    when they are read. After a save the checkpoint is read back in part. All processes of a run make the same calls.

    Args:
        directory: local or `gs://`. Any characters will do, apart from a backslash.
        keep: how many of the newest checkpoints stay. The one with the highest score stays too.
        read_only: nothing is created or deleted, and another process may save meanwhile.

    Raises:
        ConfigError: `directory` is a file, or a link to nothing.
        StorageError: it cannot be opened.
    """

    def __init__(self, directory: str | epath.Path, keep: int = 2, read_only: bool = False):
        self.directory = storage.LiteralPath(directory)
        _check_is_folder(self.directory)
        self._keep = keep
        self._names = files.StepNames()
        # The step that is being written, the newest that was read back and waited for, and whether this process read it back.
        self._pending = self._verified = self._read_back = self._manager = None
        try:
            if not read_only:
                self._manager = self._open()
            self._list()
        except OSError as error:
            raise StorageError(
                f"{self.directory} cannot be opened ({storage.reason(error)}); {storage.remedy(error)}, then give the command again"
            ) from None

    def _open(self):
        self.directory.mkdir(parents=True, exist_ok=True)
        if jax.process_index() == 0:
            files.delete_unfinished(self.directory)
        options = ocp.CheckpointManagerOptions(
            preservation_policy=_Preserve(self._kept), step_name_format=self._names,
            lightweight_initialize=True,  # else Orbax reads files whose damage would end the start
        )  # fmt: skip
        handlers = {files.STATE: ocp.PyTreeCheckpointHandler(), files.RECORD: ocp.JsonCheckpointHandler()}
        return ocp.CheckpointManager(self.directory, options=options, item_handlers=handlers)

    def _list(self):
        self._steps = [found.step for found in self._names.find_all(self.directory)]
        scores = [files.read_score(self._path(step)) for step in self.all_steps()]
        if self._manager and jax.process_count() > 1 and scores:  # all must keep the same checkpoints
            scores = [None if math.isnan(x) else x for x in distributed.gather([math.nan if x is None else x for x in scores])]
        self._scores = {step: score for step, score in zip(self.all_steps(), scores) if score is not None}

    def _path(self, step):
        return self.directory / str(step)

    # --- what there is

    def all_steps(self) -> list[int]:
        """Returns the steps of the checkpoints, the oldest first."""
        return sorted(self._manager.all_steps() if self._manager else self._steps)

    def latest_step(self) -> int | None:
        """Returns the step of the newest checkpoint; None where there is none."""
        return max(self.all_steps(), default=None)

    def best_step(self) -> int | None:
        """Returns the step of the checkpoint with the highest score, the newest of several; None where none has a score."""
        return self._best(self.all_steps())

    def _best(self, steps):
        return max((step for step in steps if step in self._scores), key=lambda step: (self._scores[step], step), default=None)

    def _kept(self, steps):
        """The steps that stay: the newest, the best, and the newest that was read back."""
        return {*sorted(steps)[-self._keep :], self._best(steps), self._verified}

    # --- saving

    def save(self, state: TrainState, record: dict[str, Any]) -> None:
        """Copies the state off the device and returns; writing goes on in the background.

        Nothing happens where this step has a checkpoint already.

        Args:
            state: its `step` names the checkpoint.
            record: JSON values saved beside the state. It may be changed after the call.

        Raises:
            NonFiniteLoss: an array is not finite (one bad update may follow a good loss); nothing is saved.
            SaveError: this checkpoint, or the one before it, cannot be written.
        """
        step = int(state.step)
        if step in self.all_steps():
            return
        leaves = jax.tree.leaves(state)
        finite, sums = jax.device_get(fingerprint(leaves))
        if not finite:
            raise NonFiniteLoss(step, "the update made weights or statistics that are not finite")
        record = files.pack_record(record, dict(zip(files.names(state), map(int, sums))))
        self.wait()
        self._pending = step
        args = {files.STATE: ocp.args.PyTreeSave(state), files.RECORD: ocp.args.JsonSave(record)}
        with self._writing():
            self._manager.save(step, force=True, args=ocp.args.Composite(**args))

    def set_score(self, step: int, score: float) -> None:
        """Says how good a checkpoint is. It waits until that checkpoint is on disk.

        Args:
            step: of a checkpoint.
            score: the higher, the better. One that is not finite counts as none.

        Raises:
            ValueError: there is no checkpoint of this step.
            SaveError: the checkpoint or its score cannot be written.
        """
        if step not in self.all_steps():
            raise ValueError(f"no checkpoint of step {step} to give a score; there are: {self._known()}")
        self.wait()
        if math.isfinite(score):
            with self._writing():
                if jax.process_index() == 0:
                    files.write_score(self._path(step), float(score))
            self._scores[step] = float(score)
            self._delete_old()

    def check(self) -> None:
        """Raises SaveError where a checkpoint in the background could not be written, or cannot be read back."""
        with self._writing():
            if self._manager:
                self._manager.check_for_errors()
                if not self._manager.is_saving_in_progress():
                    self._verify()

    def wait(self) -> None:
        """Blocks until what was saved is on disk and was read back. Then deletes checkpoints that need not be kept.

        Raises:
            SaveError: it could not be written, or cannot be read back.
        """
        if self._pending is None:
            return
        with self._writing():
            self._manager.wait_until_finished()
            self._verify()
        self._verified, self._pending = self._pending, None
        self._delete_old()

    def close(self) -> None:
        """Blocks as `wait` does, then ends the background threads.

        Raises:
            SaveError: as `wait`. The threads are ended then too.
        """
        if self._manager is None:
            return
        try:
            self.wait()
        except SaveError:
            with contextlib.suppress(Exception):  # it may report the same again
                self._manager.close()
            raise
        with self._writing():
            self._manager.close()

    def _verify(self):
        """Reads back what takes little time: whether the checkpoint is listed, its record, metadata and smallest array."""
        step = self._pending
        if step is None or self._read_back == step or jax.process_index() > 0:
            return
        path = self._names.find_step(self.directory, step).path
        files.read_record(path)
        saved = files.read_arrays(path, {"step": files.describe_arrays(path)["step"]})["step"]
        if saved != step:
            raise ValueError(f"checkpoint {step} holds step {saved} when it is read back")
        self._read_back = step

    def _delete_old(self):
        with self._writing():
            for step in sorted(set(self.all_steps()) - self._kept(self.all_steps())):
                self._manager.delete(step)

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except jax.errors.JaxRuntimeError:
            raise  # another process is lost, without which none can save
        except Exception as error:  # of many types, by what is in the way
            steps = []
            with contextlib.suppress(OSError):
                steps = [found.step for found in self._names.find_all(self.directory) if found.step != self._pending]
            self._pending = None  # so that closing does not fail anew, with a message that hides this one
            last = f"The last good one is {self._path(max(steps))}" if steps else "There is none before it"
            raise SaveError(
                f"a checkpoint could not be written to {self.directory}: {storage.reason(error)}. {last}; "
                f"{storage.remedy(error)}, then the same command resumes"
            ) from error

    # --- restoring

    def restore(
        self, abstract_state: TrainState, create: Callable[[], TrainState] | None = None
    ) -> tuple[TrainState, dict[str, Any]]:
        """Reads state and record of the newest checkpoint. A damaged one is set aside, with a warning, for the one before.

        Args:
            abstract_state: `ShapeDtypeStruct`s with the shardings that the state shall have.
            create: makes a new state like `abstract_state`. Arrays that the checkpoint lacks, as where an EMA was switched on,
                come from it, and those that it has besides are left out, with a warning each. Without it, all must be there.

        Returns:
            The state and the record.

        Raises:
            CheckpointError: no checkpoint can be used, storage cannot be reached, or the arrays are not those of
                `abstract_state`.
        """
        wanted = dict(zip(files.names(abstract_state), jax.tree.leaves(abstract_state)))
        while True:
            step, read, damage = self._find(None), None, None
            with distributed.together(f"reading checkpoint {step}"):
                try:
                    fields = [field.name for field in dataclasses.fields(abstract_state)]
                    read = self._read(step, wanted, ("step", "params", "model_state") if create else fields)
                except CheckpointError:
                    raise
                except Exception as error:  # of many types, by what is damaged
                    damage = self._damage(step, error)
            if not distributed.gather(damage is not None).any():  # then all read it, and can compute together
                saved, arrays, record, sums = read
                damage = _wrong_sums(arrays, sums)
            if not distributed.gather(damage is not None).any():
                break
            self._set_aside(step, damage or "another process could not read it")
        arrays = {name: arrays[theirs] for name, theirs in saved.items()}
        if len(arrays) == len(wanted) == len(sums):
            leaves = [arrays[name] for name in wanted]
            return jax.tree.unflatten(jax.tree.structure(abstract_state), leaves), record
        for message, lost in (
            ("New in the state, since checkpoint %d has none: %s", [name for name in wanted if name not in saved]),
            ("Left out of checkpoint %d, since the state has none: %s", [name for name in sums if name not in saved.values()]),
        ):
            if lost:
                logging.warning(message, step, carry_over.summarize(lost))
        return carry_over.complete(abstract_state, list(wanted), arrays, create), record

    def _read(self, step, wanted, parts):
        """What continues as what, the arrays, the record, the checksums. Arrays of `parts` must be the same on both sides."""
        path = self._path(step)
        record, sums = files.read_record(path)
        described = files.describe_arrays(path)
        if set(described) != set(sums):
            raise ValueError("it has other arrays than checksums")
        saved = carry_over.match(described, wanted)
        self._check_shapes(step, described, wanted, saved, parts)
        placed = lambda array, wanted: jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=wanted.sharding)
        arrays = {theirs: placed(described[theirs], wanted[name]) for name, theirs in saved.items()}
        return saved, files.read_arrays(path, arrays), record, sums

    def _check_shapes(self, step, described, wanted, saved, parts):
        both = described | wanted
        wrong = sorted(name for name in both if name.split("/")[0] in parts and saved.get(name) != name)
        if wrong:
            show = lambda arrays: f"{x.dtype}{list(x.shape)}" if (x := arrays.get(wrong[0])) else "absent"
            raise CheckpointError(
                f"{self._path(step)} does not fit the config: {wrong[0]} is {show(described)} there and {show(wanted)} by the "
                f"config ({len(wrong)} arrays differ); use the config that wrote it, or another workdir"
            )

    def _damage(self, step, error):
        reason = storage.reason(error)
        if isinstance(error, (PermissionError, MemoryError)) or any(word in reason for word in _UNREACHABLE):
            raise CheckpointError(
                f"{self._path(step)} cannot be read: {reason}; see that this user may read it and that the storage works"
            ) from None
        return reason

    def _set_aside(self, step, damage):
        aside = self.directory.parent / "damaged_checkpoints"
        with distributed.together("setting a damaged checkpoint aside"):
            if jax.process_index() == 0:
                try:
                    aside.mkdir(exist_ok=True)
                    taken = {path.name for path in aside.iterdir()}
                    name = next(name for n in itertools.count() if (name := f"{step}.{n}" if n else str(step)) not in taken)
                    self._path(step).rename(aside / name)
                except OSError as error:
                    in_the_way = os.path.lexists(aside) and not aside.is_dir()
                    advice = "move that file or link away" if in_the_way else storage.remedy(error)
                    raise CheckpointError(
                        f"checkpoint {step} is damaged ({damage}) and cannot be set aside in {aside} ({error}); {advice}, then "
                        "the same command goes back to the checkpoint before"
                    ) from None
        self._manager.reload()
        self._list()
        older = self.latest_step()
        logging.warning("Checkpoint %d is damaged (%s); set aside in %s", step, damage, aside)
        if older is None:
            raise CheckpointError(
                f"checkpoint {step} is damaged, and there is none before it; it was set aside in {aside}. The same command now "
                "starts from the beginning"
            )
        logging.warning("Going back to checkpoint %d", older)

    def restore_weights(
        self, abstract: tuple[Any, Any], step: int | None = None, ema: bool = False
    ) -> tuple[int, tuple[Any, Any]]:
        """Reads parameters and batch statistics alone, raw or averaged.

        Args:
            abstract: `(params, model_state)` as `ShapeDtypeStruct`s with the shardings that they shall have.
            step: of the checkpoint; None: the newest.
            ema: whether to read the moving averages.

        Returns:
            The step and `(params, model_state)`.

        Raises:
            CheckpointError: there is no such checkpoint, it is damaged, its arrays are not those of `abstract`, or `ema` is
                asked for and was not kept.
        """
        parts = ("ema_params", "ema_model_state") if ema else ("params", "model_state")
        tree = dict(zip(parts, abstract))
        wanted = dict(zip(files.names(tree), jax.tree.leaves(tree)))

        def read(step):
            if ema and not any(name.startswith("ema_params/") for name in files.describe_arrays(self._path(step))):
                raise CheckpointError(f"{self._path(step)} has no EMA (it was trained with ema_decay=0); leave out --ema")
            _, arrays, _, sums = self._read(step, wanted, parts)
            if damage := _wrong_sums(arrays, sums):
                raise ValueError(damage)
            return jax.tree.unflatten(jax.tree.structure(tree), [arrays[name] for name in wanted])

        step, restored = self._retry(step, read)
        return step, tuple(restored[part] for part in parts)

    def read_record(self, step: int | None = None) -> dict[str, Any]:
        """Returns the record that was saved with a checkpoint.

        Args:
            step: of the checkpoint; None: the newest.

        Raises:
            CheckpointError: there is no such checkpoint, or it is damaged.
        """
        return self._retry(step, lambda step: files.read_record(self._path(step))[0])[1]

    def _retry(self, wanted_step, read):
        """`read` of a step; of a newer one where another process has deleted it meanwhile."""
        while True:
            step = self._find(wanted_step)
            try:
                return step, read(step)
            except CheckpointError:
                raise
            except Exception as error:  # of many types, by what is damaged
                if not self._manager and not files.is_finished(self._path(step)):
                    self._list()
                    continue
                others = ", ".join(str(s) for s in self.all_steps() if s != step) or "no other"
                raise CheckpointError(
                    f"{self._path(step)} is damaged ({self._damage(step, error)}); give another --step: {others}"
                ) from None

    def _find(self, step):
        if self._manager:
            self.wait()
        step = self.latest_step() if step is None else step
        if step is None or step not in self.all_steps():
            which = "" if step is None else f"of step {step} "
            raise CheckpointError(f"no checkpoint {which}in {self.directory}; there are: {self._known()}")
        return step

    def _known(self):
        return ", ".join(map(str, self.all_steps())) or "none"


class _Preserve(preservation_policy.PreservationPolicy):
    """Orbax's question which checkpoints stay, answered by `kept`: steps -> steps that stay."""

    def __init__(self, kept):
        self._kept = kept

    def should_preserve(self, checkpoints, *, context):
        kept = self._kept([checkpoint.step for checkpoint in checkpoints])
        return [checkpoint.step in kept for checkpoint in checkpoints]


def _check_is_folder(directory):
    if os.path.islink(directory) and not directory.exists():
        raise ConfigError(
            f"{directory} is a link to {os.readlink(directory)}, which is not there; make that folder, or delete the link"
        )
    if directory.exists() and not directory.is_dir():
        raise ConfigError(f"{directory} is a file, and must be a folder of checkpoints; move it away, or give another --workdir")


def _wrong_sums(arrays, expected):
    _, sums = jax.device_get(fingerprint(list(arrays.values())))
    wrong = [name for name, x in zip(arrays, sums) if expected[name] != x]
    if not wrong:
        return None
    return f"checksum of {wrong[0]} is wrong ({len(wrong)} arrays differ from what was saved)"
