"""What to tell a user whose data set is not laid out as the config says.

Each function returns a message with the value, the rule and a remedy that works when it is followed.
"""

import glob
import os
import re
from collections.abc import Callable

_ORDER = {"train_split": ("train2017", "train"), "eval_split": ("val2017", "val", "valid", "validation", "test")}


def no_root(root: str, flag: Callable[[str], str]) -> str:
    """For a root that is no folder.

    Args:
        root: as given, "~" expanded.
        flag: spells the flag of a config key; "" where there is none.
    """
    kind = "a file, not a folder; unpack it if it is an archive, and" if os.path.exists(root) else "no folder;"
    return f"data.dir {root!r} is {kind} {_set(flag, 'data.dir')} to the folder that holds annotations and images"


def no_file(root: str, split: str, annotations: str, role: str, flag: Callable[[str], str]) -> str:
    """For a split whose JSON file does not exist.

    Args:
        root: an existing folder.
        split: the name.
        annotations: the config's pattern of the file.
        role: "train_split" or "eval_split".
        flag: spells the flag of a config key; "" where there is none.
    """
    begin = f"{os.path.join(root, annotations.replace('{split}', split))} does not exist"
    if splits := _splits(root, annotations):
        return f"{begin}; the splits are {', '.join(splits[:5])}: {_set(flag, f'data.{role}')}={_choose(splits, role)}"
    around = [os.path.dirname(os.path.abspath(root)), *(p for p in sorted(glob.glob(_in(root, "*"))) if os.path.isdir(p))]
    if elsewhere := next((p for p in around if "{split}" in annotations and _splits(p, annotations)), None):
        return f"{begin}, but {elsewhere} has files of this kind; {_set(flag, 'data.dir')}={elsewhere}"
    found = [os.path.relpath(path, root) for deep in ("*.json", "*/*.json") for path in sorted(glob.glob(_in(root, deep)))]
    if found:
        likely = next((path for path in found if split and split in path), found[0])
        pattern = likely.replace(split, "{split}") if split else likely
        return f"{begin}; {root} has {', '.join(found[:3])}: {_set(flag, 'data.annotations')}={pattern}"
    return (
        f"{begin}, nor any other JSON file in {root}; {_set(flag, 'data.dir')} to the folder that holds annotations and images"
    )


def no_images(root: str, folder: str, files: list[str], split: str, flag: Callable[[str], str]) -> str:
    """For a folder of images that holds none of the files that the annotations name.

    Args:
        root: an existing folder.
        folder: of images, as configured.
        files: some of the names.
        split: the split's name.
        flag: spells the flag of a config key; "" where there is none.
    """
    begin = f"{folder} {'has none of the images' if os.path.isdir(folder) else 'does not exist, for images'} such as {files[0]}"
    for candidate in (split, f"images/{split}", "images", ".", *_folders(root)):
        if any(os.path.isfile(os.path.join(root, candidate, file)) for file in files):
            pattern = candidate.replace(split, "{split}") if split else candidate
            return f"{begin}, but {os.path.normpath(os.path.join(root, candidate))} has; {_set(flag, 'data.images')}={pattern}"
    return f"{begin}; put them there, or {_set(flag, 'data.images')} to their folder, from {root} on"


def _folders(root):
    return [
        os.path.relpath(path, root)
        for deep in ("*", "*/*")
        for path in sorted(glob.glob(_in(root, deep)))
        if os.path.isdir(path)
    ]


def _splits(root, annotations):
    """The splits of which there is a file."""
    if "{split}" not in annotations:
        return []
    before, _, after = annotations.partition("{split}")
    after = after.replace("{split}", "*")
    shape = re.compile(re.escape(before) + "([^/]+)" + ".*".join(map(re.escape, after.split("*"))))
    paths = (os.path.relpath(path, root) for path in sorted(glob.glob(_in(root, glob.escape(before) + "*" + after))))
    found = [match[1] for path in paths if (match := shape.fullmatch(path))]
    return [split for split in found if os.path.isfile(os.path.join(root, annotations.replace("{split}", split)))]


def _choose(splits, role):
    first = [name for name in _ORDER[role] if name in splits]
    others = [name for name in splits if not any(name in names for key, names in _ORDER.items() if key != role)]
    return (first or others or splits)[0]


def _in(root, pattern):
    return os.path.join(glob.escape(root), pattern)


def _set(flag, key):
    return f"set {flag(key) or key}"
