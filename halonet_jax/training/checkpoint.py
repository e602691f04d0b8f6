"""Checkpoints: Orbax, asynchronous, the state and the data position in one; the newest few and the best are kept."""

import dataclasses
from typing import Any

import jax
import orbax.checkpoint as ocp
from absl import logging
from etils import epath
from orbax.checkpoint.checkpoint_managers import preservation_policy

from halonet_jax.training.state import TrainState


class CheckpointError(ValueError):
    """No checkpoint to restore, or one of another model; the message states the remedy."""


class Checkpointer:
    """Saves and restores under `directory/<step>`. A checkpoint appears there whole, or not at all.

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
        """
        step = int(state.step)
        if step in self._manager.all_steps():
            return
        self._manager.save(
            step, metrics={} if top1 is None else {"top1": top1}, force=True,
            args=ocp.args.Composite(state=ocp.args.PyTreeSave(state), position=ocp.args.JsonSave(position)),
        )  # fmt: skip

    def restore(self, abstract_state: TrainState, step: int | None = None) -> tuple[TrainState, dict[str, Any]]:
        """Reads state and position of `step` (None: the newest).

        Args:
            abstract_state: `ShapeDtypeStruct`s with the shardings that the state shall have.

        Raises:
            CheckpointError: where there is no such checkpoint, or its arrays are not those of `abstract_state`.
        """
        step = self._find(step)
        self._check_shapes(
            step, {field.name: getattr(abstract_state, field.name) for field in dataclasses.fields(abstract_state)}
        )
        restored = self._manager.restore(
            step, args=ocp.args.Composite(state=_restore_args(abstract_state), position=ocp.args.JsonRestore())
        )
        logging.info("Restored %s/%d", self.directory, step)
        return restored["state"], restored["position"]

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
        if ema and self._manager.item_metadata(step)["state"]["ema_params"] is None:
            raise CheckpointError(f"{self.directory}/{step} has no EMA (it was trained with ema_decay=0); leave out --ema")
        wanted = dict(zip(names, abstract))
        self._check_shapes(step, {names[0]: abstract[0]})
        args = ocp.args.Composite(state=_restore_args(wanted, partial_restore=True))
        restored = self._manager.restore(step, args=args)["state"]
        return step, tuple(restored[name] for name in names)

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
        saved, wanted = _shapes({name: saved[name] for name in wanted}), _shapes(wanted)
        wrong = sorted(key for key in saved | wanted if saved.get(key) != wanted.get(key))
        if wrong:
            raise CheckpointError(
                f"{self.directory}/{step} does not fit the config: {wrong[0]} is {saved.get(wrong[0], 'absent')} there and "
                f"{wanted.get(wrong[0], 'absent')} by the config ({len(wrong)} arrays differ); use the config that wrote it, or "
                "another workdir"
            )

    def wait(self) -> None:
        """Blocks until what was saved is on disk; raises what went wrong."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits, then frees the background threads."""
        self._manager.close()


def _shapes(tree):
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): tuple(leaf.shape) for path, leaf in leaves}


def _restore_args(abstract, **options):
    return ocp.args.PyTreeRestore(abstract, restore_args=ocp.checkpoint_utils.construct_restore_args(abstract), **options)
