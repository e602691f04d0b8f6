"""Checkpoints: Orbax, asynchronous, the state and the data position in one; the newest few and the best are kept."""

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
        best = preservation_policy.BestN(get_metric_fn=lambda m: m["top1"], n=1, keep_checkpoints_without_metrics=False)
        options = ocp.CheckpointManagerOptions(
            preservation_policy=preservation_policy.AnyPreservationPolicy([newest, best]),
            cleanup_tmp_directories=not read_only, read_only=read_only, create=not read_only,
        )  # fmt: skip
        self._manager = ocp.CheckpointManager(self.directory, options=options)

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
            step, metrics=None if top1 is None else {"top1": top1}, force=True,
            args=ocp.args.Composite(state=ocp.args.StandardSave(state), position=ocp.args.JsonSave(position)),
        )  # fmt: skip

    def restore(self, abstract_state: TrainState, step: int | None = None) -> tuple[TrainState, dict[str, Any]]:
        """Reads state and position of `step` (None: the newest).

        Args:
            abstract_state: `ShapeDtypeStruct`s with the shardings that the state shall have.

        Raises:
            CheckpointError: where there is no such checkpoint, or its arrays are not those of `abstract_state`.
        """
        step = self.latest_step() if step is None else step
        if step is None or step not in self._manager.all_steps():
            known = ", ".join(map(str, sorted(self._manager.all_steps()))) or "none"
            raise CheckpointError(f"no checkpoint {'' if step is None else f'of step {step} '}in {self.directory}; there are: {known}")
        self._check_shapes(step, abstract_state)
        args = ocp.args.Composite(state=ocp.args.StandardRestore(abstract_state), position=ocp.args.JsonRestore())
        restored = self._manager.restore(step, args=args)
        logging.info("Restored %s/%d", self.directory, step)
        return restored["state"], restored["position"]

    def _check_shapes(self, step, abstract_state):
        saved = self._manager.item_metadata(step)["state"]
        saved = _shapes({"params": saved["params"], "ema_params": saved["ema_params"]})
        wanted = _shapes({"params": abstract_state.params, "ema_params": abstract_state.ema_params})
        wrong = sorted(key for key in saved | wanted if saved.get(key) != wanted.get(key))
        if wrong:
            raise CheckpointError(
                f"{self.directory}/{step} holds another model: {wrong[0]} is {saved.get(wrong[0], 'absent')} there and "
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
