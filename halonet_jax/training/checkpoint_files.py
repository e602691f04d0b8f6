"""The files of one checkpoint: its arrays, its record, its score.

    <step>/state/…             arrays, written by Orbax
    <step>/position/metadata   JSON: the record, a checksum of every array, and a checksum of both
    <step>/score.json          the score, written after the checkpoint was evaluated

Version 0.1.0 wrote `{**record, "checksums": …}` to `position/metadata`, and the score as `{"top1": …}` to `metrics/metrics`.
Its checkpoints can be read too.
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
_UNFINISHED = ocp.path.step.TMP_DIR_SUFFIX  # part of the name of a folder that is being written


def finished_steps(directory: epath.Path) -> list[int]:
    """Returns the steps of the finished checkpoints, the oldest first. Another process may add and delete some meanwhile.

    Args:
        directory: of the checkpoints. If it does not exist, there are none.

    Raises:
        OSError: the folder cannot be listed.
    """
    try:
        names = [path.name for path in directory.iterdir()]
    except FileNotFoundError:
        return []
    return sorted(int(name) for name in names if re.fullmatch("0|[1-9][0-9]*", name) and is_finished(directory / name))


def is_finished(path: epath.Path) -> bool:
    """Returns whether a checkpoint is there, and whole: not one that is being written or deleted.

    Args:
        path: a step's folder.
    """
    try:
        return path.is_dir() and ocp.path.step.is_checkpoint_finalized(path)
    except (FileNotFoundError, NotADirectoryError):
        return False


def delete(path: epath.Path) -> None:
    """Deletes a checkpoint. It is renamed first, so that no reader takes a part of it for the whole.

    Args:
        path: a step's folder.

    Raises:
        OSError: it cannot be deleted.
    """
    if "://" not in str(path):  # a bucket renames by copying
        path = path.rename(path.with_name(f"{path.name}{_UNFINISHED}-deleted"))
    path.rmtree()


def delete_unfinished(directory: epath.Path) -> None:
    """Deletes what interrupted saves and deletions left behind. No other process may save meanwhile.

    Args:
        directory: of the checkpoints.

    Raises:
        OSError: the folder cannot be listed.
    """
    for path in directory.iterdir():
        if _UNFINISHED in path.name or path.name.isdecimal() and path.is_dir() and not is_finished(path):
            try:
                path.rmtree()
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
        Exception: of many types, if the metadata is damaged.
    """
    tree = _metadata(path)
    return {name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in zip(names(tree), jax.tree.leaves(tree))}


def read_arrays(path: epath.Path, wanted: Mapping[str, jax.ShapeDtypeStruct]) -> dict[str, Any]:
    """Reads some arrays of a checkpoint. It waits for no other process.

    Args:
        path: a step's folder.
        wanted: shape and type as saved, and the sharding that the array will have, by name. An array without a sharding is
            returned as a NumPy array.

    Returns:
        The arrays by name, in the order of `wanted`.

    Raises:
        Exception: of many types, depending on the damage.
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
    """Returns a deep copy of a record together with the checksums, as it is saved.

    Args:
        record: JSON values by name.
        sums: checksum of each array, by name.

    Raises:
        TypeError: `record` holds something that JSON cannot hold.
    """
    content = json.loads(json.dumps({"record": record, "arrays": sums}))
    return content | {"checksum": _checksum(content)}


def read_record(path: epath.Path) -> tuple[dict[str, Any], dict[str, int]]:
    """Returns a checkpoint's record and the checksum of each of its arrays, by name.

    Args:
        path: a step's folder.

    Raises:
        ValueError: the file is not what was saved.
        OSError: it cannot be read.
    """
    content = _read_json(path / RECORD / "metadata")
    if not isinstance(content, dict):
        raise ValueError("its record is not a JSON object")
    if set(content) == {"record", "arrays", "checksum"}:
        if content.pop("checksum") != _checksum(content):
            raise ValueError("checksum of its record is wrong")
        return content["record"], content["arrays"]
    sums = content.pop("checksums", None)
    if not isinstance(sums, dict) or set(content) & {"record", "arrays", "checksum"}:
        raise ValueError("its record lacks the checksums")
    return content, sums


def write_score(path: epath.Path, score: float) -> None:
    """Writes a checkpoint's score. After a kill the file is whole or missing.

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
    """Returns a checkpoint's score; None: it was not evaluated, or the file is damaged. The latter is a warning.

    Args:
        path: a step's folder.
    """
    try:
        if (path / "score.json").exists():
            content = _read_json(path / "score.json")
            if content.pop("checksum") != _checksum(content) or content["step"] != int(path.name):
                raise ValueError("its checksum is wrong")
            score = content["score"]
        elif (path / "metrics" / "metrics").exists():
            score = _read_json(path / "metrics" / "metrics").get("top1")
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


def _read_json(path):
    try:
        return json.loads(path.read_bytes())
    except RecursionError:
        raise ValueError(f"{path.name} is nested too deeply") from None


def _checksum(content):
    return zlib.crc32(json.dumps(content, sort_keys=True).encode())
