"""Images: arrays of any usual form as pixels, and pixels as a PNG file.

Pillow is not needed: PNG is compressed rows of bytes.
"""

from __future__ import annotations

import math
import struct
import zlib
from collections.abc import Sequence
from typing import Any, Final

import numpy as np

from tracking.artifacts.arrays import Array, as_array
from tracking.errors import warn
from tracking.schema import is_tensor

MAX_GRID: Final = 64
"""Images of a batch that a grid shows."""

MAX_PIXELS: Final = 1 << 24
_GAP: Final = 2
"""Pixels between the images of a grid."""

_CHANNELS: Final = (1, 3, 4)
_COLOUR_TYPES: Final = {1: 0, 3: 2, 4: 6}  # grey, RGB, RGBA


def make_pixels(image: Any, place: str) -> Array:
    """Turn an image, or a batch of images, into the pixels of one picture.

    Parameters
    ----------
    image
        Array or tensor (H, W), (H, W, C), (C, H, W) or with a batch dimension before
        those, where C is 1, 3 or 4; an image of Pillow; or a list of any of these. Bools,
        integers from 0 to 255, or floats from 0 to 1. Other floats are scaled so that the
        lowest is black and the highest is white.

    Returns
    -------
    uint8, (H, W, 1), (H, W, 3) or (H, W, 4). A batch is a grid of its first 64 images.

    Warns
    -----
    TrackingWarning
        If values are NaN or infinite. They are drawn black.
    """
    if _is_pillow(image):
        image = [image]
    if isinstance(image, list | tuple) and any(map(_is_image, image)):
        parts = [
            part for item in image[:MAX_GRID] for part in _split_batch(item, place)
        ]
    else:
        parts = _split_batch(image, place)
    parts = parts[:MAX_GRID]
    if not parts or not all(part.size for part in parts):
        raise ValueError(
            f"{place}: expected an image of at least one pixel, got none. "
            "Pass an array (H, W), (H, W, C) or (C, H, W)."
        )
    num_pixels = sum(part.shape[0] * part.shape[1] for part in parts)
    if num_pixels > MAX_PIXELS:
        raise ValueError(
            f"{place}: expected at most {MAX_PIXELS} pixels, got {num_pixels}. "
            "Make the image smaller."
        )
    parts = _scale(parts, place)
    return parts[0] if len(parts) == 1 else _make_grid(parts)


def encode_png(pixels: Array) -> bytes:
    """Return pixels of ``make_pixels`` as a PNG file.

    References
    ----------
    W3C, Portable Network Graphics, third edition, sections 5 and 9.
    """
    height, width, channels = pixels.shape
    rows = np.zeros((height, 1 + width * channels), np.uint8)  # 0: a row without filter
    rows[:, 1:] = pixels.reshape(height, -1)
    colour = _COLOUR_TYPES[channels]
    header = struct.pack(">IIBBBBB", width, height, 8, colour, 0, 0, 0)
    chunks = {b"IHDR": header, b"IDAT": zlib.compress(rows.tobytes(), 4), b"IEND": b""}
    png = [b"\x89PNG\r\n\x1a\n"]
    for kind, data in chunks.items():
        check = struct.pack(">I", zlib.crc32(kind + data))
        png += [struct.pack(">I", len(data)), kind, data, check]
    return b"".join(png)


def is_picture(value: Any) -> bool:
    """Whether a table shows a cell as a picture: one of Pillow, or (H, W, C) bytes."""
    if _is_pillow(value):
        return True
    return str(getattr(value, "dtype", "")) in ("uint8", "torch.uint8") and (
        len(value.shape) == 3
    )


def _is_pillow(value: Any) -> bool:
    return all(hasattr(value, name) for name in ("mode", "convert", "getbands"))


def _is_image(value: Any) -> bool:
    return _is_pillow(value) or len(getattr(value, "shape", ())) >= 2


def _split_batch(image: Any, place: str) -> list[Array]:
    """Return the images of a batch, or the only one, each as (H, W, C)."""
    if _is_pillow(image):
        # Palettes and rarer modes have no pixels of their own.
        mode = {"1": "L", "L": "L", "RGB": "RGB"}.get(image.mode, "RGBA")
        image = np.asarray(image.convert(mode))
    array = as_array(image, place)
    if array.ndim == 2:
        return [array[..., None]]
    first, last = (array.shape[at : at + 1 or None] for at in (-3, -1))
    is_first, is_last = (bool(set(size) & {*_CHANNELS}) for size in (first, last))
    if array.ndim not in (3, 4) or not (is_first or is_last):
        raise ValueError(
            f"{place}: expected an image (H, W), (H, W, C) or (C, H, W) with 1, 3 or 4 "
            f"channels, or a batch of those, got the shape {array.shape}. "
            "For a batch (N, H, W) pass list(images)."
        )
    # Where both may be meant, a tensor is as torch has images, an array as NumPy has.
    if is_first and (is_tensor(image) or not is_last):
        array = np.moveaxis(array, -3, -1)
    return list(array) if array.ndim == 4 else [array]


def _scale(parts: list[Array], place: str) -> list[Array]:
    """Turn values into bytes; floats of a batch share one scale."""
    floats = [part for part in parts if part.dtype.kind == "f"]
    finite = [part[np.isfinite(part)] for part in floats]
    num_bad = sum(part.size for part in floats) - sum(part.size for part in finite)
    if num_bad:
        warn(
            f"{place}: expected finite values, got {num_bad} that are NaN or infinite. "
            "They are drawn black."
        )
    limits = [float(edge) for part in finite if part.size for edge in _limits(part)]
    low, high = min(limits, default=0.0), max(limits, default=1.0)
    if low >= 0.0 and high <= 1.0:
        low, high = 0.0, 1.0
    return [_to_bytes(part, low, high, place) for part in parts]


def _limits(part: Array) -> tuple[Any, Any]:
    return part.min(), part.max()


def _to_bytes(part: Array, low: float, high: float, place: str) -> Array:
    if part.dtype.kind == "b":
        return part.astype(np.uint8) * np.uint8(255)
    if part.dtype.kind == "f":
        finite = np.where(np.isfinite(part), part, low).astype(np.float64)
        span = high / 2 - low / 2  # halves, because the whole may overflow
        scaled = (finite / 2 - low / 2) / (span or 1.0)
        return np.asarray((scaled * 255).round(), np.uint8)
    least, most = _limits(part)
    if least < 0 or most > 255:
        raise ValueError(
            f"{place}: expected integers from 0 to 255, got {least} to {most}. "
            "Scale them, or pass floats."
        )
    return part.astype(np.uint8)


def _make_grid(parts: Sequence[Array]) -> Array:
    """Lay images out in a square of equal cells, row by row."""
    channels = max(part.shape[2] for part in parts)
    across = math.ceil(math.sqrt(len(parts)))
    down = -(-len(parts) // across)
    height = max(part.shape[0] for part in parts) + _GAP
    width = max(part.shape[1] for part in parts) + _GAP
    shape = (down * height - _GAP, across * width - _GAP, channels)
    grid = np.zeros(shape, np.uint8)
    for number, part in enumerate(parts):
        top, left = number // across * height, number % across * width
        cell = grid[top : top + part.shape[0], left : left + part.shape[1]]
        cell[..., : min(channels, 3)] = part[..., :3]
        if channels == 4:
            cell[..., 3] = part[..., 3] if part.shape[2] == 4 else 255
    return grid
