"""Several sets of validation data, by name."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

RESERVED = frozenset({"train", "epoch", "fit", "system"})
"""Sets that records and MLflow use for something else."""

_NAME = re.compile(r"\w[\w.-]*")


def name_sets(data: object, place: str, like: object = None) -> dict[str, Any]:
    """Return the sets of validation or test data by name; a single one is ``valid``.

    A dict names sets if each of its values is data by itself: a data set, a loader, or a
    tuple, list or dict of tensors. A dict with bare tensors is one data set with named
    columns, and so is a dict with the names of the training data. Beside training data of
    another form, bare tensors could be either, and are refused.

    Parameters
    ----------
    like
        Training data of a fit; None: not known.
    """
    if data is None:
        return {}
    if not isinstance(data, Mapping):
        return {"valid": data}
    has_columns = isinstance(like, Mapping)
    if isinstance(like, Mapping) and like.keys() == data.keys():
        return {"valid": data}
    if not data:
        msg = f"{place}: expected at least one set of data, got an empty dict."
        raise ValueError(f"{msg} Leave it out for none.")
    bare = [name for name, item in data.items() if _is_tensor(item)]
    if bare and (like is None or has_columns):
        return {"valid": data}
    if bare:
        msg = f"{place}: expected data for each set, got bare tensors for {bare}."
        advice = (
            "For several sets write {'clean': (x, y), 'noisy': (x2, y2)}, with (x,)"
        )
        one = "for data without a target; for one set write {'valid': {...}}."
        raise TypeError(f"{msg} {advice} {one}")
    for name in data:
        check_name(name, place)
    return dict(data)


def _is_tensor(item: object) -> bool:
    return isinstance(item, Tensor) or hasattr(item, "__array__")


def check_name(name: object, place: str) -> None:
    """Check the name of a set, which monitors and MLflow's charts use."""
    msg = f"{place}: expected names of sets, got {name!r}."
    if not isinstance(name, str):
        raise TypeError(f"{msg} Write them as text.")
    if name in RESERVED:
        raise ValueError(f"{msg} {name!r} is taken. Choose another name.")
    if not _NAME.fullmatch(name):
        advice = "Use letters, digits, '_', '-' and '.', such as 'clean' or 'shift-2'."
        raise ValueError(f"{msg} {advice}")
