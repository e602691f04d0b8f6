"""Checkpoints: Orbax, asynchronous, the state and the data position in one; the newest few and the best are kept."""

import contextlib
import dataclasses
import itertools
import re
from typing import Any

import jax
import orbax.checkpoint as ocp
from absl import logging
from etils import epath
from orbax.checkpoint.checkpoint_managers import preservation_policy

from halonet_jax.errors import CheckpointError, NonFiniteLoss, SaveError
from halonet_jax.runtime import distributed
from halonet_jax.training.state import TrainState, fingerprint

# In messages of TensorStore and the operating system: storage that cannot be reached, rather than a damaged checkpoint.
_UNREACHABLE = ("PERMISSION_DENIED", "UNAUTHENTICATED", "UNAVAILABLE", "DEADLINE_EXCEEDED", "RESOURCE_EXHAUSTED")


class Checkpointer:
    """Saves and restores under `directory/<step>`. A checkpoint appears there whole, or not at all.

    It holds a checksum of every array, which is compared when it is read. All processes of a run make the same calls.

    Args:
        directory: local or `gs://`.
        keep: how many of the newest checkpoints stay; the best one by "top1" stays besides.
        read_only: for evaluation: nothing is created or deleted.
    """

    def __init__(self, directory: str | epath.Path, keep: int = 2, read_only: bool = False):
        self.directory = epath.Path(directory)
        newest = preservation_policy.LatestN(n=keep)
        top1 = lambda metrics: metrics.get("top1", -1.0)  # -1: not evaluated
        best = preservation_policy.BestN(get_metric_fn=top1, n=1, keep_checkpoints_without_metrics=False)
        options = ocp.CheckpointManagerOptions(
            preservation_policy=preservation_policy.AnyPreservationPolicy([newest, best]),
            best_fn=top1,  # makes Orbax write the metrics, so that a resumed run knows the best
            cleanup_tmp_directories=not read_only, create=not read_only,
        )  # fmt: skip
        handlers = {"state": ocp.PyTreeCheckpointHandler(), "position": ocp.JsonCheckpointHandler()}
        self._manager = ocp.CheckpointManager(self.directory, options=options, item_handlers=handlers)

    def latest_step(self) -> int | None:
        """Step of the newest checkpoint; None where there is none."""
        return self._manager.latest_step()

    def best_step(self) -> int | None:
        """Step of the checkpoint with the highest top-1 accuracy; None where none was evaluated."""
        scores = {step: (self._manager.metrics(step) or {}).get("top1") for step in self._manager.all_steps()}
        scores = {step: score for step, score in scores.items() if score is not None}
        return max(scores, key=lambda step: (scores[step], step)) if scores else None

    def save(self, state: TrainState, position: dict[str, Any], top1: float | None = None) -> None:
        """Copies the state off the device and returns; writing goes on in the background.

        Args:
            position: JSON values saved beside the state.
            top1: accuracy that ranks this checkpoint, where it was evaluated.

        Raises:
            NonFiniteLoss: where an array is not finite (one bad update may follow a good loss); nothing is saved.
            SaveError: where this checkpoint, or the one before it, cannot be written.
        """
        step = int(state.step)
        if step in self._manager.all_steps():
            return
        finite, sums = jax.device_get(fingerprint(state))
        if not finite:
            raise NonFiniteLoss(step, "the update made weights or statistics that are not finite")
        position = {**position, "checksums": dict(zip(_names(state), map(int, sums)))}
        with self._writing():
            self._manager.save(
                step, metrics={} if top1 is None else {"top1": top1}, force=True,
                args=ocp.args.Composite(state=ocp.args.PyTreeSave(state), position=ocp.args.JsonSave(position)),
            )  # fmt: skip

    def restore(self, abstract_state: TrainState) -> tuple[TrainState, dict[str, Any]]:
        """Reads state and position of the newest checkpoint. A damaged one is set aside, with a warning, for the one before.

        Args:
            abstract_state: `ShapeDtypeStruct`s with the shardings that the state shall have.

        Raises:
            CheckpointError: where no checkpoint can be used, storage cannot be reached, or the arrays are not those of
                `abstract_state`.
        """
        while True:
            step = self._find(None)
            restored = damage = None
            with distributed.together(f"reading checkpoint {step}"):
                try:
                    restored = self._restore(step, abstract_state)
                except CheckpointError:
                    raise
                except Exception as error:  # of many types, by what is damaged
                    damage = self._damage(step, error)
            if not distributed.gather(damage is not None).any():
                return restored
            self._set_aside(step, damage or "another process could not read it")

    def _restore(self, step, abstract_state):
        self._check_shapes(
            step, {field.name: getattr(abstract_state, field.name) for field in dataclasses.fields(abstract_state)}
        )
        args = ocp.args.Composite(state=_restore_args(abstract_state), position=ocp.args.JsonRestore())
        restored = self._manager.restore(step, args=args)
        self._check_sums(restored["state"], restored["position"])
        return restored["state"], restored["position"]

    def _check_sums(self, tree, position):
        _, sums = jax.device_get(fingerprint(tree))
        wrong = [name for name, x in zip(_names(tree), sums) if position["checksums"][name] != x]
        if wrong:
            raise ValueError(f"checksum of {wrong[0]} is wrong ({len(wrong)} arrays differ from what was saved)")

    def _damage(self, step, error):
        reason = _reason(error)
        if isinstance(error, (PermissionError, MemoryError)) or any(word in reason for word in _UNREACHABLE):
            raise CheckpointError(f"{self.directory}/{step} cannot be read: {reason}") from None
        return reason

    def _set_aside(self, step, damage):
        aside = self.directory.parent / "damaged_checkpoints"
        if jax.process_index() == 0:
            aside.mkdir(exist_ok=True)
            taken = {path.name for path in aside.iterdir()}
            name = next(name for n in itertools.count() if (name := f"{step}.{n}" if n else str(step)) not in taken)
            (self.directory / str(step)).rename(aside / name)
        distributed.gather(0)  # the others go on once it is moved
        self._manager.reload()
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

        Returns:
            The step and `(params, model_state)`.

        Raises:
            CheckpointError: as `restore`; also where `ema` is asked for and was not kept.
        """
        step = self._find(step)
        names = ("ema_params", "ema_model_state") if ema else ("params", "model_state")
        wanted = dict(zip(names, abstract))
        args = ocp.args.Composite(state=_restore_args(wanted, partial_restore=True), position=ocp.args.JsonRestore())
        try:
            if ema and self._manager.item_metadata(step)["state"]["ema_params"] is None:
                raise CheckpointError(f"{self.directory}/{step} has no EMA (it was trained with ema_decay=0); leave out --ema")
            self._check_shapes(step, {names[0]: abstract[0]})
            restored = self._manager.restore(step, args=args)
            self._check_sums(restored["state"], restored["position"])
        except CheckpointError:
            raise
        except Exception as error:  # of many types, by what is damaged
            others = ", ".join(str(s) for s in sorted(self._manager.all_steps()) if s != step) or "no other"
            raise CheckpointError(
                f"{self.directory}/{step} is damaged ({self._damage(step, error)}); give another --step: {others}"
            ) from None
        return step, tuple(restored["state"][name] for name in names)

    def _find(self, step):
        step = self.latest_step() if step is None else step
        if step is None or step not in self._manager.all_steps():
            known = ", ".join(map(str, sorted(self._manager.all_steps()))) or "none"
            raise CheckpointError(
                f"no checkpoint {'' if step is None else f'of step {step} '}in {self.directory}; there are: {known}"
            )
        return step

    def _check_shapes(self, step, wanted):
        saved = self._manager.item_metadata(step)["state"]
        if saved is None:
            raise ValueError("its metadata is missing")
        saved, wanted = _shapes({name: saved[name] for name in wanted}), _shapes(wanted)
        wrong = sorted(key for key in saved | wanted if saved.get(key) != wanted.get(key))
        if wrong:
            raise CheckpointError(
                f"{self.directory}/{step} does not fit the config: {wrong[0]} is {saved.get(wrong[0], 'absent')} there and "
                f"{wanted.get(wrong[0], 'absent')} by the config ({len(wrong)} arrays differ); use the config that wrote it, or "
                "another workdir"
            )

    def check(self) -> None:
        """Raises SaveError where a checkpoint in the background could not be written."""
        with self._writing():
            self._manager.check_for_errors()

    def wait(self) -> None:
        """Blocks until what was saved is on disk, or raises SaveError."""
        with self._writing():
            self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits, as `wait`, then frees the background threads."""
        with self._writing():
            self._manager.close()

    @contextlib.contextmanager
    def _writing(self):
        try:
            yield
        except jax.errors.JaxRuntimeError:
            raise  # another process is lost, without which none can save
        except Exception as error:  # of many types, by what is in the way
            steps = sorted(int(p.name) for p in self.directory.iterdir() if p.name.isdigit())
            last = f"The last good one is {self.directory}/{steps[-1]}" if steps else "There is none before it"
            raise SaveError(
                f"a checkpoint could not be written to {self.directory}: {_reason(error)}. {last}; make room, then the same "
                "command resumes"
            ) from error


def _reason(error):
    text = " ".join(str(error).split()) or type(error).__name__
    text = re.split(r" \[(?:tensorstore_spec|os_error_code|source locations)=", text)[0]
    return text if len(text) < 400 else f"{text[:150]} … {text[-250:]}"  # the cause comes last


def _shapes(tree):
    return {name: tuple(leaf.shape) for name, leaf in zip(_names(tree), jax.tree.leaves(tree))}


def _names(tree):
    return [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in jax.tree_util.tree_leaves_with_path(tree)]


def _restore_args(abstract, **options):
    return ocp.args.PyTreeRestore(abstract, restore_args=ocp.checkpoint_utils.construct_restore_args(abstract), **options)
