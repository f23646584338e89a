"""Arrays of any library as NumPy arrays."""

from __future__ import annotations

from typing import Any

import numpy as np

from tracking.schema import is_tensor

Array = np.ndarray[Any, np.dtype[Any]]


def as_array(value: Any, place: str) -> Array:
    """Return a tensor, array or nested list as an array of bools, integers or floats.

    A tensor on a device is copied to the CPU, which waits for the device.
    """
    try:
        array = _read_tensor(value) if is_tensor(value) else np.asarray(value)
    except Exception as error:  # such as of a sparse tensor or a ragged list
        raise _type_error(value, place) from error
    if array.dtype.kind not in "biuf":
        raise _type_error(value, place)
    return array


def _read_tensor(tensor: Any) -> Array:
    tensor = tensor.detach().cpu()
    if tensor.is_floating_point():
        size_bytes = tensor.element_size()
        tensor = tensor.double() if size_bytes == 8 else tensor.float()  # of bfloat16
    return np.asarray(tensor.numpy())


def _type_error(value: object, place: str) -> TypeError:
    kind = type(value).__name__
    dtype = getattr(value, "dtype", None)
    got = f"{kind} of {dtype}" if dtype is not None else kind
    return TypeError(
        f"{place}: expected a tensor or array of bools, integers or floats, got {got}. "
        "Convert it first."
    )
