"""Data sets of what else `data` may be: nested tensors, lists of samples, batches."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sized
from typing import Any

from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

from harness.pytree import items_of, with_items

_NO_DATA = (str, bytes, set, frozenset, type)
_KNOWN = (DataLoader, Dataset, Tensor, Mapping, tuple, list)


class NestedDataset(TensorDataset):
    """Rows of nested tuples, lists and mappings of tensors; each row has the same form.

    Parameters
    ----------
    tree
        Nested tensors of equal length.
    """

    def __init__(self, tree: object, *tensors: Tensor) -> None:
        super().__init__(*tensors)
        self.tree = tree

    def __getitem__(self, index: Any) -> Any:
        return self.build([tensor[index] for tensor in self.tensors])

    def build(self, tensors: list[Tensor]) -> Any:
        """Put tensors in the places of the data set's own ones."""
        return _fill(self.tree, iter(tensors))

    @property
    def num_items(self) -> int:
        """Items of a batch: those of a tuple or list; a mapping is one input."""
        return len(self.tree) if isinstance(self.tree, tuple | list) else 1


def _fill(tree: Any, tensors: Iterator[Tensor]) -> Any:
    items = items_of(tree)
    if items is None:
        return next(tensors)
    return with_items(tree, [_fill(item, tensors) for item in items])


def list_leaves(tree: object, place: str) -> list[tuple[str, object]]:
    """Return the leaves of nested containers, each with its place such as ``data[0]['x']``."""
    items = items_of(tree)
    if items is None:
        return [(place, tree)]
    names = list(tree) if isinstance(tree, Mapping) else range(len(items))
    return [
        leaf
        for name, item in zip(names, items, strict=True)
        for leaf in list_leaves(item, f"{place}[{name!r}]")
    ]


class Rows(Dataset[Any]):
    """Rows of an object that has ``__len__`` and ``__getitem__``, such as a list of samples."""

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset
        if hasattr(dataset, "__getitems__"):  # a batch at once, as torch asks for it
            self.__getitems__ = dataset.__getitems__

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Any:
        return self.dataset[index]


class Batches(IterableDataset[Any]):
    """Batches of an object that gives them anew in each pass, such as another library's loader."""

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __iter__(self) -> Iterator[Any]:
        return iter(self.dataset)

    def __len__(self) -> int:
        return len(self.dataset)  # TypeError where it has none


def is_samples(data: object) -> bool:
    """Whether `data` is a list of samples: not of tensors, arrays, numbers or data sets."""
    columns = (Tensor, DataLoader, Dataset, int, float, type(None))
    return (
        isinstance(data, list)
        and bool(data)
        and not any(
            isinstance(item, columns) or hasattr(item, "__array__") for item in data
        )
    )


def has_rows(data: object) -> bool:
    """Whether `data` has rows by index without being a data set of torch's."""
    return (
        isinstance(data, Sized)
        and hasattr(data, "__getitem__")
        and not isinstance(data, (*_NO_DATA, tuple, list, Mapping))
    )


def gives_batches(data: object) -> bool:
    """Whether `data` is no data set, but gives batches."""
    is_other = isinstance(data, (*_NO_DATA, *_KNOWN))
    if is_other or hasattr(data, "__array__") or has_rows(data):
        return False
    if not callable(getattr(data, "__iter__", None)):
        return False
    if isinstance(data, Iterator):
        msg = "data: expected data that can be read in each epoch"
        advice = "Pass a list of samples, or an object with its own __iter__."
        raise TypeError(
            f"{msg}, got {type(data).__name__}, which can be read only once. {advice}"
        )
    return True
