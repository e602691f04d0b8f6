"""Unlabelled images: files, and folders of files, as a user names them."""

import os
from collections.abc import Iterable
from typing import Any

from absl import logging

from halonet_jax.data.folder_walk import IMAGE_EXTENSIONS, Walk
from halonet_jax.errors import CorruptImage, DataError


class FileSource:
    """Image files without labels; they are read when asked for. Every record has label 0, and its number as `index`.

    A folder gives its files and those below it, sorted by path. Links, hidden files and what tools leave behind are treated
    as in an image folder for training (see `folder_walk`). A file that is named itself counts whatever its extension is.

    Args:
        paths: files and folders, in the order of the result, or a single one; "~" is expanded.

    Attributes:
        class_names: empty.

    Raises:
        DataError: a path does not exist or is neither a file nor a folder, a folder holds no image, or there is no path.
    """

    class_names: tuple[str, ...] = ()

    def __init__(self, paths: Iterable[str | os.PathLike] | str | os.PathLike):
        self._files: list[str] = []
        paths = [paths] if isinstance(paths, (str, os.PathLike)) else paths  # a string is not one path a letter
        for path in map(os.path.expanduser, map(os.fspath, paths)):
            if os.path.isdir(path):
                self._files += _files_below(path)
            elif os.path.isfile(path):
                self._files.append(path)
            elif os.path.exists(path):
                raise DataError(f"{path!r} is neither a file nor a folder; give image files or folders")
            else:
                raise DataError(f"{path!r} does not exist; give image files or folders")
        if not self._files:
            raise DataError("no image was given; give image files or folders")

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, index: int) -> dict[str, Any]:
        path = self._files[index]
        try:
            with open(path, "rb") as f:
                return {"image": f.read(), "label": 0, "index": index}
        except OSError as error:
            raise CorruptImage(f"it cannot be read ({error.strerror})") from None

    def name(self, index: int) -> str:
        """Returns the path of an image's file.

        Args:
            index: number of the image.
        """
        return self._files[index]


def _files_below(folder):
    parent, name = os.path.split(os.path.abspath(folder))
    walk = Walk(parent, [name])
    if walk.passed_over:
        logging.warning("Passed over links in %s to what is counted already: %s", folder, ", ".join(walk.passed_over[:5]))
    if not walk.files[name]:
        raise DataError(f"{folder!r} holds no image ({', '.join(IMAGE_EXTENSIONS)}); give another folder")
    return [os.path.join(folder, os.path.relpath(path, name)) for path in walk.files[name]]
