"""Which files of an image folder count.

An image counts once, under the class folder that holds it. Links are followed: to a file, or to a folder elsewhere. A
link is passed over where it leads to a folder that contains it, or to what the split holds by itself, so loops end and
no image counts twice. Two links to one file outside of the split are two images: stores that keep equal files once
(DVC, git-annex, the Hugging Face cache) depend on that. A link to nothing counts, so that reading it names it.
"""

import heapq
import os

from halonet_jax.errors import DataError

IMAGE_EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".bmp")

# Folders that file managers, archives and network storage leave behind, in lower case; hidden ones need no entry.
_TOOL_FOLDERS = {
    "__macosx", "__pycache__", "@eadir", "@tmp", "@recycle", "@__thumb", "#recycle", "#snapshot", "$recycle.bin",
    "system volume information", "lost+found",
}  # fmt: skip
_MAX_LINKS = 40  # in a row, as on Linux


def subfolders(folder: str) -> list[str]:
    """Returns the sorted names of the folders in `folder`, without those of tools and hidden ones.

    Args:
        folder: path.

    Raises:
        DataError: if it cannot be read.
    """
    return sorted(e.name for e in _entries(folder) if not _is_tool(e.name) and _is_folder(e))


def class_folders(split_folder: str) -> list[str]:
    """As `subfolders`, without links to the split's folder itself or to a folder above it.

    Args:
        split_folder: path of the folder of one split.
    """
    above = _above(split_folder)
    names = subfolders(split_folder)
    return [n for n in names if _identity(os.path.join(split_folder, n)) not in above]


def has_images(folder: str) -> bool:
    """Whether image files lie in `folder` itself.

    Args:
        folder: path.
    """
    return any(_is_image(e.name) and not _is_folder(e) for e in _entries(folder))


class Walk:
    """Finds the images of a split.

    Args:
        split_folder: path of the folder of one split.
        classes: names of its class folders.

    Attributes:
        files: sorted paths by class, relative to `split_folder`.
        passed_over: paths of links that were not followed.

    Raises:
        DataError: if a folder cannot be read, or if two class folders are the same folder.
    """

    def __init__(self, split_folder: str, classes: list[str]):
        self.files: dict[str, list[str]] = {name: [] for name in classes}
        self.passed_over: list[str] = []
        self._root = split_folder
        self._above, self._entered = _above(split_folder), set()
        self._folder_links: list[tuple[str, str]] = []  # (path relative to the split's folder, class), a heap
        self._file_links: list[tuple[str, str]] = []
        self._identities: dict[str, tuple[int, int] | None] = {}
        self._check_distinct(classes)
        # What the class folders hold by themselves comes first: links to that are passed over, whatever the order of names.
        for name in classes:
            self._enter(name, name)
        while self._folder_links:
            path, name = heapq.heappop(self._folder_links)
            if not self._enter(path, name):
                self.passed_over.append(path)
        for path, name in self._file_links:
            if self._is_counted(os.path.join(split_folder, path)):
                self.passed_over.append(path)
            else:
                self.files[name].append(path)
        for found in self.files.values():
            found.sort()

    def _check_distinct(self, classes):
        folders = {}
        for name in classes:
            other = folders.setdefault(_identity(os.path.join(self._root, name)), name)
            if other != name:
                raise DataError(
                    f"the class folders {other} and {name} of {self._root} are one folder by a link, so its images would have"
                    " two labels; remove the link"
                )

    def _enter(self, path, name):
        """Collects the images in and below a folder; False for one that was entered before or contains the split."""
        identity = _identity(os.path.join(self._root, path))
        if identity in self._entered or identity in self._above:
            return False
        waiting = [(path, identity)]
        while waiting:
            path, identity = waiting.pop()
            if identity in self._entered:  # by a link from elsewhere into this tree
                continue
            self._entered.add(identity)
            for entry in _entries(os.path.join(self._root, path)):
                inner = os.path.join(path, entry.name)
                if _is_tool(entry.name):
                    continue
                if _is_folder(entry):
                    if entry.is_symlink():
                        heapq.heappush(self._folder_links, (inner, name))
                    else:
                        waiting.append((inner, _identity(os.path.join(self._root, inner))))
                elif _is_image(entry.name):
                    if entry.is_symlink():
                        self._file_links.append((inner, name))
                    else:
                        self.files[name].append(inner)
        return True

    def _is_counted(self, path):
        """Whether a link to a file leads, directly or by other links, to an image of a folder that was entered."""
        if not os.path.exists(path):
            return False
        for _ in range(_MAX_LINKS):
            path = os.path.join(os.path.dirname(path), os.readlink(path))
            folder = os.path.dirname(path)
            if folder not in self._identities:
                self._identities[folder] = _identity(folder)
            if self._identities[folder] in self._entered and _is_image(os.path.basename(path)):
                return True
            if not os.path.islink(path):
                break
        return False


def _entries(folder):
    try:
        with os.scandir(folder) as entries:
            return list(entries)
    except OSError as error:
        raise DataError(f"{folder} cannot be read ({error.strerror}); mend its permissions or the storage") from None


def _is_tool(name):
    return name.startswith(".") or name.lower() in _TOOL_FOLDERS


def _is_image(name):
    # ".name": what some systems leave beside each copied file under the image's own extension.
    return name.lower().endswith(IMAGE_EXTENSIONS) and not name.startswith(".")


def _is_folder(entry):
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def _identity(folder):
    try:
        found = os.stat(folder)
    except OSError:
        return None
    return found.st_dev, found.st_ino


def _above(folder):
    """Identities of a folder and of all those that contain it."""
    path, found = os.path.realpath(folder), set()
    while True:
        found.add(_identity(path))
        path, previous = os.path.dirname(path), path
        if path == previous:
            return found
