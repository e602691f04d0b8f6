"""Lists and reads checkpoints. It writes nothing, so another process may save or delete checkpoints meanwhile."""

import os
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
from etils import epath

from halonet_jax.errors import CheckpointError, ConfigError, StorageError
from halonet_jax.runtime import storage
from halonet_jax.training import carry_over
from halonet_jax.training import checkpoint_files as files
from halonet_jax.training.state import fingerprint

# Words in messages of TensorStore for storage that cannot be reached. They do not mean that a checkpoint is damaged.
_UNREACHABLE = ("PERMISSION_DENIED", "UNAUTHENTICATED", "UNAVAILABLE", "DEADLINE_EXCEEDED", "RESOURCE_EXHAUSTED")


class Saved(NamedTuple):
    """Part of a checkpoint, as `read` returns it.

    Attributes:
        names: name of each array in the checkpoint, by its name in the state.
        arrays: the arrays, by name in the checkpoint.
        record: the checkpoint's record.
        sums: the checksum of every array of the checkpoint, by name.
    """

    names: dict[str, str]
    arrays: dict[str, jax.Array]
    record: dict[str, Any]
    sums: dict[str, int]

    def wrong_sums(self) -> str | None:
        """Compares the checksums of the arrays. Returns what is wrong; None: nothing. All processes must call it."""
        _, sums = jax.device_get(fingerprint(list(self.arrays.values())))
        wrong = [name for name, x in zip(self.arrays, sums) if self.sums[name] != x]
        return f"checksum of {wrong[0]} is wrong ({len(wrong)} arrays differ from what was saved)" if wrong else None


class Reader:
    """The checkpoints of a folder, as they were when the folder was listed.

    Args:
        directory: of the checkpoints, local or `gs://`. It need not exist. Its path may hold any character but a backslash.

    Attributes:
        directory: the path.

    Raises:
        ConfigError: `directory` is a file or a link to nothing, or it has a backslash.
        StorageError: `directory` cannot be listed.
    """

    def __init__(self, directory: str | epath.Path):
        self.directory = storage.LiteralPath(directory)
        try:
            _check_path(self.directory)
            self._list()
        except OSError as error:
            raise self._cannot_open(error) from None

    def _cannot_open(self, error):
        return StorageError(
            f"{self.directory} cannot be opened ({storage.reason(error)}); {storage.remedy(error)}, then give the command again"
        )

    def _list(self):
        self._steps = files.finished_steps(self.directory)
        scores = {step: files.read_score(self._path(step)) for step in self._steps}
        self._scores = {step: score for step, score in scores.items() if score is not None}

    def _path(self, step):
        return self.directory / str(step)

    def all_steps(self) -> list[int]:
        """Returns the steps of the checkpoints on disk, the oldest first."""
        return list(self._steps)

    def latest_step(self) -> int | None:
        """Returns the step of the newest checkpoint on disk; None: there is no checkpoint."""
        return max(self._steps, default=None)

    def best_step(self) -> int | None:
        """Returns the step of the checkpoint with the highest score, of several the newest; None: none has a score."""
        return max((step for step in self._steps if step in self._scores), key=lambda s: (self._scores[s], s), default=None)

    def read_record(self, step: int | None = None) -> dict[str, Any]:
        """Returns the record that was saved with a checkpoint.

        Args:
            step: of the checkpoint; None: the newest.

        Raises:
            CheckpointError: there is no such checkpoint, or it is damaged.
        """
        return self._retry(step, lambda step: files.read_record(self._path(step))[0])[1]

    def restore_weights(
        self, abstract: tuple[Any, Any], step: int | None = None, ema: bool = False
    ) -> tuple[int, tuple[Any, Any]]:
        """Reads parameters and batch statistics, raw or averaged.

        Args:
            abstract: `(params, model_state)` as `ShapeDtypeStruct`s with the shardings that the arrays will have.
            step: of the checkpoint; None: the newest.
            ema: whether to read the moving averages.

        Returns:
            The step and `(params, model_state)`.

        Raises:
            CheckpointError: there is no such checkpoint, it is damaged, its arrays do not fit `abstract`, or it has no
                moving averages and `ema` is True.
        """
        parts = ("ema_params", "ema_model_state") if ema else ("params", "model_state")
        tree = dict(zip(parts, abstract))
        wanted = dict(zip(files.names(tree), jax.tree.leaves(tree)))

        def read(step):
            if ema and not any(name.startswith("ema_params/") for name in files.describe_arrays(self._path(step))):
                raise CheckpointError(f"{self._path(step)} has no EMA (it was trained with ema_decay=0); leave out --ema")
            saved = self.read(step, wanted, parts)
            if damage := saved.wrong_sums():
                raise ValueError(damage)
            return jax.tree.unflatten(jax.tree.structure(tree), [saved.arrays[name] for name in wanted])

        step, restored = self._retry(step, read)
        return step, tuple(restored[part] for part in parts)

    def read(self, step: int, wanted: Mapping[str, jax.ShapeDtypeStruct], strict: tuple[str, ...]) -> Saved:
        """Reads the arrays that a state can continue with.

        Args:
            step: of the checkpoint.
            wanted: shape, type and sharding of the state's arrays, by name.
            strict: parts of the state, such as "params", whose arrays must be the same in checkpoint and state.

        Raises:
            CheckpointError: arrays of a strict part differ.
            Exception: of many types, if the checkpoint is damaged.
        """
        record, sums = files.read_record(self._path(step))
        described = files.describe_arrays(self._path(step))
        if set(described) != set(sums):
            raise ValueError("its arrays are not those that have checksums")
        names = carry_over.match(described, wanted)
        wrong = sorted(name for name in described | wanted if name.split("/")[0] in strict and names.get(name) != name)
        if wrong:
            show = lambda arrays: f"{x.dtype}{list(x.shape)}" if (x := arrays.get(wrong[0])) is not None else "absent"
            raise CheckpointError(
                f"{self._path(step)} does not fit the config: {wrong[0]} is {show(described)} there and {show(wanted)} by the "
                f"config ({len(wrong)} arrays differ); use the config that wrote it, or another workdir"
            )
        placed = lambda array, wanted: jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=wanted.sharding)
        arrays = {theirs: placed(described[theirs], wanted[name]) for name, theirs in names.items()}
        return Saved(names, files.read_arrays(self._path(step), arrays), record, sums)

    def damage(self, step: int, error: Exception) -> str:
        """Returns what is wrong with a checkpoint, in a few words.

        Args:
            step: of the checkpoint.
            error: what reading it raised.

        Raises:
            CheckpointError: the checkpoint may be good, but cannot be reached now.
        """
        reason = storage.reason(error)
        if isinstance(error, (PermissionError, MemoryError)) or any(word in reason for word in _UNREACHABLE):
            raise CheckpointError(
                f"{self._path(step)} cannot be read: {reason}; check that this user may read it and that the storage works"
            ) from None
        return reason

    def _retry(self, wanted_step: int | None, read: Callable[[int], Any]) -> tuple[int, Any]:
        """Reads a step. If another process deletes the newest checkpoint meanwhile, reads the one that is newest then."""
        while True:
            step = self._find(wanted_step)
            try:
                return step, read(step)
            except CheckpointError:
                raise
            except Exception as error:  # of many types, depending on the damage
                if not files.is_finished(self._path(step)):
                    self._list()
                    continue
                others = ", ".join(str(other) for other in self._steps if other != step)
                remedy = f"give another --step: {others}" if others else "there is no other one, so train again"
                raise CheckpointError(f"{self._path(step)} is damaged ({self.damage(step, error)}); {remedy}") from None

    def _find(self, step: int | None) -> int:
        if not self._steps:
            raise CheckpointError(f"no checkpoint in {self.directory}; give the workdir of a run that has saved one")
        if step is not None and step not in self._steps:
            steps = ", ".join(map(str, self._steps))
            raise CheckpointError(f"no checkpoint of step {step} in {self.directory}; give one of: {steps}")
        return max(self._steps) if step is None else step


def _check_path(directory):
    if "\\" in str(directory):
        raise ConfigError(f"{directory} has a backslash, which checkpoints cannot have in their path; give another --workdir")
    if os.path.islink(directory) and not directory.exists():
        raise ConfigError(
            f"{directory} is a link to {os.readlink(directory)}, which does not exist; make that folder, or delete the link"
        )
    if directory.exists() and not directory.is_dir():
        raise ConfigError(f"{directory} is a file, but must be a folder; move it away, or give another --workdir")
