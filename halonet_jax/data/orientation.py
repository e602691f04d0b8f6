"""The EXIF orientation of an image file. Phones store a photograph as the sensor read it, and this tag says how to turn it."""

import cv2
import numpy as np

_TAG = 0x0112
_PREFIX = b"Exif\0\0"
# What brings the stored pixels upright, by the tag's value (Exif 2.32, section 4.6.5). 1 is upright already.
_TURNS = {
    2: lambda image: cv2.flip(image, 1),
    3: lambda image: cv2.rotate(image, cv2.ROTATE_180),
    4: lambda image: cv2.flip(image, 0),
    5: cv2.transpose,
    6: lambda image: cv2.rotate(image, cv2.ROTATE_90_CLOCKWISE),
    7: lambda image: cv2.rotate(cv2.transpose(image), cv2.ROTATE_180),
    8: lambda image: cv2.rotate(image, cv2.ROTATE_90_COUNTERCLOCKWISE),
}


def read(encoded: bytes) -> int:
    """Returns the orientation that a file states, 1 to 8; 1 (upright) where it states none, or its EXIF data are damaged.

    Args:
        encoded: a JPEG, PNG or WebP file. The image itself is not decoded.
    """
    exif = _exif(encoded).removeprefix(_PREFIX)
    order = {b"II*\0": "little", b"MM\0*": "big"}.get(exif[:4])
    if order is None:
        return 1
    # The first directory of TIFF 6.0, section 2. A slice past the end is empty and reads as 0, so that damage does no harm.
    number = lambda at, size: int.from_bytes(exif[at : at + size], order)
    first = number(4, 4)
    for entry in range(first + 2, min(first + 2 + 12 * number(first, 2), len(exif)), 12):
        if number(entry, 2) == _TAG:
            value = number(entry + 8, 2)
            return value if value in _TURNS else 1
    return 1


def turn(image: np.ndarray, orientation: int) -> np.ndarray:
    """Brings pixels upright; an image that is upright comes back as it is.

    Args:
        image: [h, w, 3], as stored.
        orientation: 1 to 8, as `read` gives it.

    Returns:
        [h, w, 3], or [w, h, 3] where the orientation is 5 or more.
    """
    return _TURNS[orientation](image) if orientation in _TURNS else image


def _exif(encoded):
    if encoded.startswith(b"\xff\xd8"):
        return _of_jpeg(encoded)
    if encoded.startswith(b"\x89PNG"):
        return _of_chunks(encoded, 8, b"eXIf", "big", name_first=False)
    if encoded.startswith(b"RIFF") and encoded[12:16] == b"VP8X":  # the other kinds of WebP hold pixels alone
        return _of_chunks(encoded, 12, b"EXIF", "little", name_first=True)
    return b""


def _of_jpeg(encoded):
    """The EXIF segment, which stands before the first table of the image, among the application segments and comments."""
    at = 2
    while encoded[at : at + 1] == b"\xff" and (0xE0 <= (marker := encoded[at + 1]) <= 0xEF or marker == 0xFE):
        end = at + 2 + int.from_bytes(encoded[at + 2 : at + 4])
        if marker == 0xE1 and encoded.startswith(_PREFIX, at + 4):
            return encoded[at + 4 : end]
        at = end
    return b""


def _of_chunks(encoded, at, wanted, order, name_first):
    while at + 8 <= len(encoded):
        first, second = encoded[at : at + 4], encoded[at + 4 : at + 8]
        name, size = (first, second) if name_first else (second, first)
        size = int.from_bytes(size, order)
        if name == wanted:
            return encoded[at + 8 : at + 8 + size]
        at += 8 + size + (size % 2 if name_first else 4)  # RIFF pads to even sizes, PNG ends in a checksum
    return b""
