"""Saves checkpoints in the background and resumes from them. The newest few and the best one are kept."""

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

from halonet_jax.errors import CheckpointError, NonFiniteLoss, SaveError
from halonet_jax.runtime import distributed, storage
from halonet_jax.training import carry_over
from halonet_jax.training import checkpoint_files as files
from halonet_jax.training.checkpoint_reader import Reader
from halonet_jax.training.state import TrainState, fingerprint


class Checkpointer(Reader):
    """Saves and restores checkpoints under `directory/<step>`. A checkpoint appears there whole, or not at all.

    A checkpoint is a state and a record. The record holds JSON values, which the training loop chooses. Both have checksums,
    which are compared when they are read. After a save, part of the checkpoint is read back. All processes of a run must make
    the same calls.

    Args:
        directory: local or `gs://`; created if missing. Its path may hold any character but a backslash.
        keep: how many of the newest checkpoints to keep. The one with the highest score is kept too.
        read_only: whether only to read. Then nothing is created, and another process may save meanwhile.

    Attributes:
        directory: the path.

    Raises:
        ConfigError: `directory` is a file or a link to nothing, or it has a backslash.
        StorageError: `directory` cannot be created or listed.
    """

    def __init__(self, directory: str | epath.Path, keep: int = 2, read_only: bool = False):
        self._keep, self._read_only = keep, read_only
        self._orbax, self._pending = None, None  # the step that is being written
        super().__init__(directory)
        if read_only:
            return
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            if jax.process_index() == 0:
                files.delete_unfinished(self.directory)
        except OSError as error:
            raise self._cannot_open(error) from None
        handlers = {files.STATE: ocp.PyTreeCheckpointHandler(), files.RECORD: ocp.JsonCheckpointHandler()}
        # With folders created in the background, a folder that cannot be created would leave threads waiting for minutes.
        at_once = ocp.options.AsyncOptions(create_directories_asynchronously=False)
        self._orbax = ocp.AsyncCheckpointer(ocp.CompositeCheckpointHandler(**handlers), async_options=at_once)

    def _list(self):
        super()._list()
        if self._steps and not self._read_only and jax.process_count() > 1:  # all must keep the same checkpoints
            found = distributed.gather([self._scores.get(step, math.nan) for step in self._steps])
            self._scores = {step: float(score) for step, score in zip(self._steps, found) if not math.isnan(score)}

    # --- saving

    def save(self, state: TrainState, record: dict[str, Any]) -> None:
        """Copies the state off the device and returns. The files are written in the background.

        It does nothing if this step has a checkpoint.

        Args:
            state: its `step` names the checkpoint.
            record: JSON values to save beside the state. The caller may change it afterwards.

        Raises:
            NonFiniteLoss: an array is not finite, because a bad update can follow a good loss. Nothing is saved.
            SaveError: this checkpoint, or the one before it, cannot be written.
        """
        step = int(state.step)
        if step in self._steps or step == self._pending:
            return
        leaves = jax.tree.leaves(state)
        finite, sums = jax.device_get(fingerprint(leaves))
        if not finite:
            raise NonFiniteLoss(step, "the update made weights or statistics that are not finite")
        record = files.pack_record(record, dict(zip(files.names(state), map(int, sums))))
        self.wait()
        self._pending = step
        items = {files.STATE: ocp.args.PyTreeSave(state), files.RECORD: ocp.args.JsonSave(record)}
        with self._writing():
            self._orbax.save(self._path(step), ocp.args.Composite(**items), force=True)

    def set_score(self, step: int, score: float) -> None:
        """Stores how good a checkpoint is. Waits until that checkpoint is on disk.

        Args:
            step: of the checkpoint.
            score: the higher, the better. A score that is not finite counts as none.

        Raises:
            ValueError: there is no checkpoint of this step.
            SaveError: the checkpoint or its score cannot be written.
        """
        self.wait()
        if step not in self._steps:
            raise ValueError(f"no checkpoint of step {step} to score; there are {self._steps}")
        if math.isfinite(score):
            with self._writing():
                if jax.process_index() == 0:
                    files.write_score(self._path(step), float(score))
            self._scores[step] = float(score)
            self._delete_old()

    def check(self) -> None:
        """Looks for errors of the save that goes on in the background. It does not wait.

        Raises:
            SaveError: the checkpoint could not be written.
        """
        if self._orbax:
            with self._writing():
                self._orbax.check_for_errors()

    def wait(self) -> None:
        """Waits until the last checkpoint is on disk, and reads part of it back. Then deletes those that are not kept.

        Raises:
            SaveError: the checkpoint could not be written, or cannot be read back.
        """
        if self._pending is None:
            return
        with self._writing():
            self._orbax.wait_until_finished()
            if jax.process_index() == 0:
                _read_back(self._path(self._pending), self._pending)
        self._steps = sorted([*self._steps, self._pending])
        self._pending = None
        self._delete_old()

    def close(self) -> None:
        """Waits as `wait` does, and ends the background threads. The checkpoints can still be read.

        Raises:
            SaveError: as for `wait`. The threads are ended then too.
        """
        try:
            self.wait()
        finally:
            orbax, self._orbax = self._orbax, None
            if orbax:
                with contextlib.suppress(Exception):  # `wait` has reported it
                    orbax.close()

    def _delete_old(self):
        kept = {*self._steps[-self._keep :], self.best_step()}
        with self._writing():
            for step in set(self._steps) - kept:
                if jax.process_index() == 0:
                    files.delete(self._path(step))
                self._steps.remove(step)

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except jax.errors.JaxRuntimeError:
            raise  # another process is lost, and without it no process can save
        except Exception as error:  # of many types, depending on the cause
            self._pending = None  # so that `close` does not fail again with another message
            last = f"The last good one is {self._path(max(self._steps))}" if self._steps else "No checkpoint was saved before"
            raise SaveError(
                f"a checkpoint could not be written to {self.directory}: {storage.reason(error)}. {last}; "
                f"{storage.remedy(error)}, then the same command resumes"
            ) from error

    # --- resuming

    def restore(
        self, abstract_state: TrainState, create: Callable[[], TrainState] | None = None
    ) -> tuple[TrainState, dict[str, Any]]:
        """Reads state and record of the newest checkpoint. Sets a damaged one aside, with a warning, and reads the one before.

        Args:
            abstract_state: `ShapeDtypeStruct`s with the shardings that the state will have.
            create: returns a new state like `abstract_state`. If the checkpoint lacks arrays, for instance because an EMA was
                switched on, they come from this state. Arrays that only the checkpoint has are left out. Both are named in
                a warning. None: the checkpoint must have the same arrays.

        Returns:
            The state and the record.

        Raises:
            CheckpointError: no checkpoint can be used, the storage cannot be reached, or the checkpoint does not fit
                `abstract_state`.
        """
        self.wait()
        wanted = dict(zip(files.names(abstract_state), jax.tree.leaves(abstract_state)))
        fields = tuple(field.name for field in dataclasses.fields(abstract_state))
        strict = ("step", "params", "model_state") if create else fields
        while True:
            step, saved, damage = self._find(None), None, None
            with distributed.together(f"reading checkpoint {step}"):
                try:
                    saved = self.read(step, wanted, strict)
                except CheckpointError:
                    raise
                except Exception as error:  # of many types, depending on the damage
                    damage = self.damage(step, error)
            if not distributed.gather(damage is not None).any():  # only then can the processes compute together
                damage = saved.wrong_sums()
            if not distributed.gather(damage is not None).any():
                return _complete(step, abstract_state, wanted, saved, create), saved.record
            self._set_aside(step, damage or "another process could not read it")

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
                    remedy = "move that file or link away" if in_the_way else storage.remedy(error)
                    raise CheckpointError(
                        f"checkpoint {step} is damaged ({damage}) and cannot be set aside in {aside} ({storage.reason(error)}); "
                        f"{remedy}, then the same command goes back to the checkpoint before"
                    ) from None
        self._list()
        logging.warning("Checkpoint %d is damaged (%s); set aside in %s", step, damage, aside)
        if not self._steps:
            raise CheckpointError(
                f"checkpoint {step} is damaged, and there is none before it; it was set aside in {aside}. The same command now "
                "starts from the beginning"
            )
        logging.warning("Going back to checkpoint %d", self.latest_step())


def _read_back(path, step):
    """Reads what takes little time: the record, the metadata, and one number."""
    if not files.is_finished(path):
        raise ValueError(f"{path} is missing after it was saved")
    files.read_record(path)
    found = files.read_arrays(path, {"step": files.describe_arrays(path)["step"]})["step"]
    if found != step:
        raise ValueError(f"{path} holds step {found} when it is read back")


def _complete(step, abstract_state, wanted, saved, create):
    """Builds the state, with new arrays for those that the checkpoint lacks."""
    arrays = {name: saved.arrays[theirs] for name, theirs in saved.names.items()}
    if len(arrays) == len(wanted) == len(saved.sums):
        return jax.tree.unflatten(jax.tree.structure(abstract_state), [arrays[name] for name in wanted])
    for message, names in (
        ("New in the state, because checkpoint %d lacks it: %s", set(wanted) - set(arrays)),
        ("Left out of checkpoint %d, because the state lacks it: %s", set(saved.sums) - set(saved.names.values())),
    ):
        if names:
            logging.warning(message, step, carry_over.summarize(sorted(names)))
    return carry_over.complete(abstract_state, list(wanted), arrays, create)
