"""Finds the cause of a failed read or write, and the remedy. Paths with characters that a pattern may have."""

import errno
import fnmatch
import re
from collections.abc import Iterator

from etils.epath import gpath

# Error numbers, and words of the same meaning in messages of libraries that pass no number on.
_CAUSES = (
    (
        (errno.ENOSPC, errno.EDQUOT, errno.EFBIG),
        "no space left|quota exceeded|file too large|resource_exhausted|ENOSPC|EDQUOT|EFBIG",
        "make room",
    ),
    (
        (errno.EACCES, errno.EPERM, errno.EROFS),
        "permission.denied|not permitted|read-only file system|unauthenticated|forbidden",
        "give this user permission to write there",
    ),
    ((errno.ENAMETOOLONG,), "name too long", "give a workdir with a shorter path"),
    ((errno.EISDIR, errno.ENOTDIR), "is a directory|not a directory", "move away what is in its place"),
    (
        (errno.ENOENT, errno.EEXIST, errno.ENOTEMPTY, errno.ESTALE),
        "no such file|not.found|already exists|not empty|stale file",
        "see that no other process moves, deletes or writes files there",
    ),
)


def remedy(error: BaseException) -> str:
    """Returns what to do about a file that cannot be written, such as "make room".

    Args:
        error: what the write raised, of any type. The error that caused it counts too.
    """
    chain = list(_chain(error))
    numbers = {e.errno for e in chain if isinstance(e, OSError) and e.errno}
    text = " ".join(map(str, chain))
    for known, words, advice in _CAUSES:
        if numbers & set(known) or not numbers and re.search(words, text, re.IGNORECASE):
            return advice
    return "see that the storage works"


def reason(error: BaseException) -> str:
    """Returns an error's message as one line of at most about 400 characters, without TensorStore's appendices.

    Args:
        error: of any type.
    """
    text = " ".join(str(error).split()) or type(error).__name__
    text = re.split(r" \[(?:tensorstore_spec|os_error_code|source locations)=", text)[0]
    return text if len(text) < 400 else f"{text[:150]} … {text[-250:]}"  # the cause comes last


class LiteralPath(gpath.PosixGPath):
    """An `epath.Path` that `glob` takes literally.

    Orbax lists the parts of a checkpoint with `path.glob("…*")`. The standard `epath.Path` would also read `[0.1]` or `*` in the
    folder's own path as a pattern. Then it finds no parts, or those of another folder.
    """

    def glob(self, pattern: str) -> Iterator["LiteralPath"]:
        """Yields the files and folders below this path that match `pattern`.

        Args:
            pattern: relative, with `*`, `?` and `[…]` in any of its parts; `**` is not supported.
        """
        found = [self]
        for part in pattern.split("/"):
            found = [
                child for path in found if path.is_dir() for child in path.iterdir() if fnmatch.fnmatchcase(child.name, part)
            ]
        return iter(found)


def _chain(error):
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
