"""The files of one checkpoint: its arrays, its record, its score.

    <step>/state/…             arrays, written by Orbax
    <step>/position/metadata   JSON: the record, a checksum of every array, and a checksum of both
    <step>/score.json          written later, where the checkpoint was evaluated

Earlier versions wrote `{**record, "checksums": …}` in `position/metadata` and the score as
`{"top1": …}` in `metrics/metrics`. Their checkpoints are read too.
"""

import json
import math
import re
import zlib
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from absl import logging
from etils import epath

STATE, RECORD = "state", "position"  # names of Orbax's items, which are names of folders


class StepNames(ocp.path.step.NameFormat):
    """Finds the finished checkpoints of a folder, named by their step, while another process may add and delete some."""

    def build_name(self, step: int) -> str:
        """Returns the name of a step's folder."""
        return str(step)

    def find_all(self, base_path: epath.PathLike) -> list[ocp.path.step.Metadata]:
        """Returns step and path of each finished checkpoint, by step; none where the folder does not exist."""
        try:
            paths = [path for path in epath.Path(base_path).iterdir() if re.fullmatch("0|[1-9][0-9]*", path.name)]
        except FileNotFoundError:
            return []
        paths = [path for path in paths if is_finished(path)]
        return sorted((ocp.path.step.Metadata(int(path.name), path) for path in paths), key=lambda found: found.step)

    def find_step(self, base_path: epath.PathLike, step: int) -> ocp.path.step.Metadata:
        """Returns step and path of one checkpoint; raises ValueError where it is not there."""
        path = epath.Path(base_path) / str(step)
        if not is_finished(path):
            raise ValueError(f"no checkpoint {path}")
        return ocp.path.step.Metadata(step, path)


def is_finished(path: epath.Path) -> bool:
    """Returns whether a checkpoint is there, and whole: not one that is being written or deleted.

    Args:
        path: a step's folder.
    """
    try:
        return path.is_dir() and ocp.path.step.is_checkpoint_finalized(path)
    except (FileNotFoundError, NotADirectoryError):
        return False


def delete_unfinished(directory: epath.Path) -> None:
    """Deletes what saves left behind that were interrupted. Must not run beside another process that saves.

    Args:
        directory: folder of the checkpoints.
    """
    for name in ocp.path.step.tmp_checkpoints(directory):
        try:
            (directory / name).rmtree()
        except OSError as error:
            logging.warning("An unfinished checkpoint cannot be deleted: %s", error)


# --- arrays


def names(tree: Any) -> list[str]:
    """Returns the name of each leaf, such as "params/Dense_0/kernel", in the order of `jax.tree.leaves`.

    Args:
        tree: a state, or its metadata in a checkpoint.
    """
    return [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in jax.tree_util.tree_leaves_with_path(tree)]


def describe_arrays(path: epath.Path) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns shape and type of each array of a checkpoint, by name.

    Args:
        path: a step's folder.

    Raises:
        Exception: of many types, where the metadata is damaged.
    """
    tree = _metadata(path)
    return {name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in zip(names(tree), jax.tree.leaves(tree))}


def read_arrays(path: epath.Path, wanted: Mapping[str, jax.ShapeDtypeStruct]) -> dict[str, Any]:
    """Reads some arrays of a checkpoint. It waits for no other process.

    Args:
        path: a step's folder.
        wanted: by name: shape and type as saved, and the sharding that the array shall have; without one, a NumPy array.

    Returns:
        The arrays by name, in the order of `wanted`.

    Raises:
        Exception: of many types, by what is damaged.
    """
    tree = _metadata(path)
    treedef, saved = jax.tree.structure(tree), names(tree)

    def how(name):
        if getattr(wanted.get(name), "sharding", None) is None:
            return ocp.RestoreArgs(restore_type=np.ndarray)
        array = wanted[name]
        return ocp.ArrayRestoreArgs(sharding=array.sharding, global_shape=array.shape, dtype=array.dtype)

    items = treedef.unflatten([wanted.get(name, ocp.PLACEHOLDER) for name in saved])
    arguments = ocp.args.PyTreeRestore(items, restore_args=treedef.unflatten([how(name) for name in saved]))
    restored = ocp.PyTreeCheckpointHandler().restore(path / STATE, args=arguments)
    arrays = dict(zip(saved, treedef.flatten_up_to(restored)))
    return {name: arrays[name] for name in wanted}


def _metadata(path):
    tree = ocp.PyTreeCheckpointHandler().metadata(path / STATE).tree
    if tree is None:
        raise ValueError("its metadata is missing")
    return tree


# --- record and score


def pack_record(record: Mapping[str, Any], sums: Mapping[str, int]) -> dict[str, Any]:
    """Returns what is saved as a checkpoint's record: a deep copy of it with checksums.

    Args:
        record: JSON values by name.
        sums: checksum of each array, by name.

    Raises:
        TypeError: `record` holds something that JSON has no form for.
    """
    content = json.loads(json.dumps({"record": record, "arrays": sums}))
    return content | {"checksum": _checksum(content)}


def read_record(path: epath.Path) -> tuple[dict[str, Any], dict[str, int]]:
    """Returns a checkpoint's record and the checksum of each of its arrays, by name.

    Args:
        path: a step's folder.

    Raises:
        ValueError: the file is torn, or is not what was saved.
        OSError: it cannot be read.
    """
    content = _read_object(path / RECORD / "metadata")
    if set(content) == {"record", "arrays", "checksum"}:
        if content.pop("checksum") != _checksum(content):
            raise ValueError("checksum of its record is wrong")
        return content["record"], content["arrays"]
    sums = content.pop("checksums", None)
    if not isinstance(sums, dict) or set(content) & {"record", "arrays", "checksum"}:
        raise ValueError("its record lacks the checksums")
    return content, sums


def write_score(path: epath.Path, score: float) -> None:
    """Writes a checkpoint's score; a kill leaves none, or the whole of it.

    Args:
        path: a step's folder.
        score: finite; the higher, the better.

    Raises:
        OSError: it cannot be written.
    """
    content = {"step": int(path.name), "score": score}
    temporary = path / "score.json.tmp"
    temporary.write_text(json.dumps(content | {"checksum": _checksum(content)}))
    temporary.replace(path / "score.json")


def read_score(path: epath.Path) -> float | None:
    """Returns a checkpoint's score; None where it was not evaluated, or where the file is damaged, with a warning.

    Args:
        path: a step's folder.
    """
    try:
        if (path / "score.json").exists():
            content = _read_object(path / "score.json")
            if content.pop("checksum", None) != _checksum(content) or content["step"] != int(path.name):
                raise ValueError("its checksum is wrong")
            score = content["score"]
        elif (path / "metrics" / "metrics").exists():
            score = _read_object(path / "metrics" / "metrics").get("top1")
        else:
            score = None
        if score is not None and (type(score) not in (int, float) or not math.isfinite(score)):
            raise ValueError(f"the score is {score!r:.50}")
    except Exception as error:  # of many types: whatever JSON a damaged file may hold
        if path.exists():  # else another process has deleted the checkpoint
            message = "The score of checkpoint %s cannot be read (%s); it counts as not evaluated"
            logging.warning(message, path, " ".join(str(error).split()))
        return None
    return None if score is None else float(score)


def _read_object(path):
    try:
        content = json.loads(path.read_bytes())
    except RecursionError:
        raise ValueError(f"{path.name} is nested too deeply") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path.name} is no JSON object")
    return content


def _checksum(content):
    return zlib.crc32(json.dumps(content, sort_keys=True).encode())
