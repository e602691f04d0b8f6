"""What to tell a user whose image folder is not laid out as `root/<split>/<class>/*.jpg`.

Each function returns a message with the value, the rule and a remedy that works when it is followed.
"""

import os
import re
from collections.abc import Callable

from halonet_jax.data.folder_walk import class_folders, has_images, subfolders

_LAYOUT = "an image folder is laid out as {root}/{split}/<class>/<image>"
_TRAIN_NAMES = ("train", "training", "trainval")
_EVAL_NAMES = ("validation", "val", "valid", "dev", "test", "testing", "eval")


def no_root(root: str, flag: Callable[[str], str]) -> str:
    """For a root that is no folder.

    Args:
        root: as given, "~" expanded.
        flag: spells the flag of a config key; "" where there is none.
    """
    if not root:
        return f"data.source='folder' needs the folder that holds <split>/<class>/*.jpg; {_set(flag, 'data.dir')}=PATH"
    kind = "a file, not a folder; unpack it if it is an archive, and" if os.path.exists(root) else "no folder;"
    return f"data.dir {root!r} is {kind} {_set(flag, 'data.dir')} to the folder that holds the splits"


def no_classes(folder: str) -> str:
    """For the folder of a split that has no class folders.

    Args:
        folder: its path.
    """
    what = "has images but no class folders; move them to" if has_images(folder) else "has no class folders; put images in"
    return f"{folder} {what} {folder}/<class>/, one folder for each class"


def no_split(root: str, split: str, role: str, flag: Callable[[str], str]) -> str:
    """For a root that has no folder of the split's name.

    Args:
        root: an existing folder.
        split: the name.
        role: "train_split" or "eval_split".
        flag: spells the flag of a config key; "" where there is none.
    """
    begin = f"{root} has no split {split!r}"
    layout = _LAYOUT.format(root=root, split=split or "<split>")
    inside = subfolders(root)
    if splits := _splits(root, inside):
        return f"{begin}; its splits are {_some(splits)}: {_choose(root, split, splits, role, flag)}"
    if elsewhere := _root_elsewhere(root, split, inside):
        return f"{begin}, but {elsewhere} has; {_set(flag, 'data.dir')}={elsewhere}"
    if has_images(root):
        return (
            f"{begin} but images of its own; {layout}: if {root} is the folder of one class, {_set(flag, 'data.dir')} to the"
            f" folder two levels up; otherwise move the images to {root}/{split or '<split>'}/<class>/"
        )
    if not inside:
        return f"{begin}, nor any other folder; {layout}: put images there, or {_set(flag, 'data.dir')} to where they are"
    return (
        f"{begin}; its folders {_some(inside)} look like class folders; {layout}: move them to {root}/{split or 'train'}/,"
        f" or {_set(flag, 'data.dir')} to a folder of this layout"
    )


def _splits(root, inside):
    """Those of a root's folders that are splits by their name or by what they hold."""
    classes = {name: class_folders(os.path.join(root, name)) for name in inside}
    named = [name for name in inside if classes[name] and name.lower() in _TRAIN_NAMES + _EVAL_NAMES]
    if named:
        return [name for name in inside if name in named or _is_split(os.path.join(root, name))]
    found = [name for name in inside if _is_split(os.path.join(root, name))]
    # Splits share their classes. Folders that share nothing, such as cat/siamese and dog/poodle, are classes themselves.
    shared = len(found) < 2 or set(classes[found[0]]) & set().union(*(classes[name] for name in found[1:]))
    return found if shared else []


def _root_elsewhere(root, split, inside):
    """A neighbouring folder that has the split: the parents where root is a split or a class, or a folder inside."""
    parent = os.path.dirname(os.path.abspath(root))
    around = [os.path.join(root, name) for name in inside] + [parent, os.path.dirname(parent)]
    # A folder that has the split by name alone, such as "/home/train", is no image folder.
    return split and next((p for p in around if _is_split(os.path.join(p, split))), None)


def _is_split(folder):
    """Whether a folder has class folders, of which the first ones hold images, and no images of its own."""
    try:
        classes = class_folders(folder)
        return bool(classes) and not has_images(folder) and any(has_images(os.path.join(folder, c)) for c in classes[:20])
    except ValueError:  # missing or unreadable
        return False


def _choose(root, split, splits, role, flag):
    usual, other = (_TRAIN_NAMES, _EVAL_NAMES) if role == "train_split" else (_EVAL_NAMES, _TRAIN_NAMES)
    by_name = {name.lower(): name for name in reversed(splits)}
    plain = re.split(r"[\[+]", split)[0].strip("/").lower()  # "train[:90%]" is TFDS's way to write a part of a split
    wanted = [by_name[name] for name in (plain, *usual) if name in by_name]
    wanted += [name for name in splits if name.lower() not in other]
    if wanted:
        return f"{_set(flag, f'data.{role}')}={wanted[0]}"
    if role == "train_split":
        return f"move training images to {root}/{split or 'train'}/<class>/, or {_set(flag, 'data.train_split')}={splits[0]}"
    return (
        f"move images held out for evaluation to {root}/{split or 'val'}/<class>/, or evaluate on images seen in training:"
        f" {_set(flag, 'data.eval_split')}={splits[0]}"
    )


def _set(flag, key):
    return f"set {flag(key) or key}"


def _some(names):
    return ", ".join(names[:5]) + (", …" if len(names) > 5 else "")
