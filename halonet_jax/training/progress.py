"""What a checkpoint holds beside the state: where the data stands, and what the next report needs."""

import dataclasses
from typing import Any

from absl import logging

from halonet_jax.errors import CheckpointError


@dataclasses.dataclass
class Progress:
    """The part of a run that is neither state nor config. One object of the loop owns it.

    Attributes:
        metadata: the task's: class names and preprocessing.
        num_examples: of the training split.
        batch_size: global.
        step_metrics: metrics of each step since the last report, so that a resumed run's next report covers the same steps.
        num_corrupt: training images replaced so far.
        skipped_batches: batches left out by roll-backs.
        rollbacks: how often the run went back to a checkpoint.
    """

    metadata: dict[str, Any]
    num_examples: int
    batch_size: int
    step_metrics: list[dict[str, float]] = dataclasses.field(default_factory=list)
    num_corrupt: int = 0
    skipped_batches: int = 0
    rollbacks: int = 0

    def to_record(self) -> dict[str, Any]:
        """JSON values, for `Checkpointer.save`."""
        return dataclasses.asdict(self)

    @classmethod
    def from_record(cls, record: dict[str, Any]) -> "Progress":
        """Reads what `to_record` wrote, also that of version 0.1.0, which kept `class_names` and no preprocessing.

        Raises:
            CheckpointError: where an entry is missing.
        """
        record = dict(record)
        record.setdefault("metadata", {"class_names": record.get("class_names", [])})
        names = {field.name for field in dataclasses.fields(cls)}
        try:
            return cls(**{key: value for key, value in record.items() if key in names})
        except TypeError as error:
            raise CheckpointError(f"the checkpoint's record is incomplete ({error}); remove that checkpoint") from None

    def continue_with(self, now: "Progress") -> "Progress":
        """This progress on the data that is there now.

        Raises:
            CheckpointError: for other classes, whose labels would mean other things.
        """
        check_classes(self.metadata, now.metadata, "the checkpoint was trained on", "or another --workdir")
        for key in ("num_examples", "batch_size"):
            before, after = getattr(self, key), getattr(now, key)
            if before != after:
                message = "%s was %d and is now %d: the batches from here on differ from those of an undisturbed run"
                logging.warning(message, key, before, after)
        return dataclasses.replace(self, metadata=now.metadata, num_examples=now.num_examples, batch_size=now.batch_size)


def check_classes(saved: dict[str, Any], now: dict[str, Any], what: str, remedy: str) -> None:
    """Compares the class names of two `Task.metadata`.

    Args:
        saved: metadata of a checkpoint.
        now: metadata of the data that is there.
        what: how the message begins.
        remedy: how it ends.

    Raises:
        CheckpointError: where the names or their order differ.
    """
    ours, theirs = list(saved.get("class_names", [])), list(now.get("class_names", []))
    if ours == theirs:
        return
    changed = sorted(set(ours) ^ set(theirs)) or ["their order"]
    raise CheckpointError(
        f"{what} {len(ours)} classes, the data has {len(theirs)}, and they differ in {', '.join(changed[:5])}; give the data "
        f"that it was trained on, {remedy}"
    )
