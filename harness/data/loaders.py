"""From what the user calls data to loaders of batches ``(input, target)``."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    Subset,
    TensorDataset,
    WeightedRandomSampler,
)
from torch.utils.data import default_collate as torch_collate

from harness.events import nearest

BATCH_SIZE = 32
"""Rows in a batch where ``dataloader_options`` names no ``batch_size``."""


class TensorLoader(DataLoader[Any]):
    """A ``DataLoader`` that fetches a whole batch of tensors by one indexing.

    Order of the rows, values of the batches and random numbers drawn are those of torch's
    ``DataLoader`` with the same arguments and seed, which takes over wherever worker
    processes, a hand-made sampler or a collate function are asked for.

    References
    ----------
    torch 2.13, ``_BaseDataLoaderIter.__init__`` draws the base seed when the iterator is
    made, ``RandomSampler.__iter__`` its own at the first batch.
    """

    def __iter__(self) -> Any:
        tensors = whole_tensors(self.dataset)
        known = RandomSampler | SequentialSampler | WeightedRandomSampler
        if (
            tensors is None
            or self.num_workers
            or self.pin_memory
            or self.batch_size is None
            or type(self.batch_sampler) is not BatchSampler
            or not isinstance(self.sampler, known)
            or self.collate_fn is not torch_collate
        ):
            return super().__iter__()
        torch.empty((), dtype=torch.int64).random_(generator=self.generator)
        return self._batches(*tensors)

    def _batches(
        self, tensors: Sequence[Tensor], rows: Tensor | None
    ) -> Iterator[list[Tensor]]:
        """Batches in the sampler's order, always copies: a model may change its input."""
        size, count = self.batch_size or 1, len(self)
        if rows is None and isinstance(self.sampler, SequentialSampler):
            for start in range(0, count * size, size):
                yield [tensor[start : start + size].clone() for tensor in tensors]
            return
        order = torch.tensor(list(self.sampler))
        if rows is not None:
            order = rows[order]
        for chosen in torch.split(order, size)[:count]:
            yield [tensor[chosen] for tensor in tensors]


def whole_tensors(
    dataset: Dataset[Any],
) -> tuple[tuple[Tensor, ...], Tensor | None] | None:
    """Tensors behind a data set and the rows taken of them (None: all); None if it has none."""
    rows: Tensor | None = None
    while type(dataset) is Subset:
        inner = torch.as_tensor(dataset.indices)
        rows = inner if rows is None else inner[rows]
        dataset = dataset.dataset
    if type(dataset) is TensorDataset and all(
        type(t) is Tensor for t in dataset.tensors
    ):
        return dataset.tensors, rows
    return None


def as_tensor(value: Any, place: str) -> Tensor:
    """A tensor of the value; float64 arrays take torch's default float type.

    Raises
    ------
    TypeError
        If the value is no array of numbers.
    """
    if isinstance(value, Tensor):
        return value
    if not hasattr(value, "__array__"):
        kind = type(value).__name__
        msg = f"{place}: expected a tensor or array, got {kind}."
        raise TypeError(f"{msg} Give a DataLoader, Dataset, tensors or arrays.")
    array = value.__array__()
    if array.dtype.kind not in "biufc":
        msg = f"{place}: expected numbers, got an array of {array.dtype}."
        raise TypeError(f"{msg} Turn categories into numbers first.")
    with warnings.catch_warnings():
        # A read-only array, as pandas and np.load(mmap_mode="r") give, is shared too:
        # batches are copies, so that nothing writes to it.
        warnings.filterwarnings("ignore", "The given NumPy array is not writable")
        tensor = torch.as_tensor(array)
    is_double = tensor.dtype == torch.float64
    return tensor.to(torch.get_default_dtype()) if is_double else tensor


def as_dataset(data: Any, place: str = "data") -> Dataset[Any]:
    """A data set of a Dataset, one tensor or array, or several with equal lengths.

    Raises
    ------
    TypeError
        If `data` is none of those.
    ValueError
        If lengths differ, or there is no row.
    """
    if isinstance(data, Dataset):
        dataset = data
    else:
        items = data if isinstance(data, tuple | list) else (data,)
        tensors = [as_tensor(item, f"{place}[{n}]") for n, item in enumerate(items)]
        if not tensors:
            raise ValueError(f"{place}: expected at least one tensor, got {data!r}.")
        lengths = [len(tensor) if tensor.dim() else 0 for tensor in tensors]
        if len(set(lengths)) > 1:
            msg = f"{place}: expected tensors of equal length, got lengths {lengths}."
            raise ValueError(f"{msg} Each needs one row for each sample.")
        if lengths[0] == 0:
            raise no_rows(place)
        dataset = TensorDataset(*tensors)
    if not isinstance(dataset, IterableDataset) and len(dataset) == 0:  # type: ignore[arg-type]
        raise no_rows(place)
    return dataset


def no_rows(place: str) -> ValueError:
    """Error for data without a row."""
    msg = f"{place}: expected at least one row, got none."
    return ValueError(f"{msg} Check how the data was loaded or filtered.")


LOADER_OPTIONS = tuple(
    name
    for name in inspect.signature(DataLoader.__init__).parameters
    if name not in {"self", "dataset"}
)
"""Names that ``dataloader_options`` may hold: the arguments of torch's ``DataLoader``."""


def check_options(options: Mapping[str, Any] | None) -> dict[str, Any]:
    """The options as a dict.

    Raises
    ------
    ValueError
        If one is no argument of torch's ``DataLoader``.
    """
    for name in options or {}:
        if name not in LOADER_OPTIONS:
            msg = f"dataloader_options: expected arguments of DataLoader, got {name!r}."
            raise ValueError(f"{msg}{nearest(name, LOADER_OPTIONS)}")
    return dict(options or {})


def train_loader(
    data: Any, options: Mapping[str, Any] | None = None
) -> DataLoader[Any]:
    """Loader of training data: shuffled, batches of 32, a short last batch dropped.

    Parameters
    ----------
    data
        DataLoader (taken as it is), Dataset, tensor, array, or several of equal length.
    options
        Arguments of torch's ``DataLoader`` that replace the defaults.

    Raises
    ------
    ValueError
        If options are given for a ready DataLoader, are unknown, or leave no batch.

    References
    ----------
    luz 0.5.0, ``apply_dataloader_options``. Differs from luz: data shorter than one batch
    keeps its short batch, unless ``drop_last`` is given.
    """
    options = check_options(options)
    if isinstance(data, DataLoader):
        if options:
            msg = (
                f"dataloader_options: expected none with a DataLoader, got {options!r}."
            )
            raise ValueError(f"{msg} Set them where you make the DataLoader.")
        return check_batches(data, "data")
    dataset = as_dataset(data)
    if not isinstance(dataset, IterableDataset) and not _own_order(options):
        long = len(dataset) >= options.get("batch_size", BATCH_SIZE)  # type: ignore[arg-type]
        options = {"shuffle": "sampler" not in options, "drop_last": long} | options
    return check_batches(_loader(dataset, options), "data")


def eval_loader(
    data: Any, options: Mapping[str, Any] | None = None, place: str = "valid_data"
) -> DataLoader[Any]:
    """Loader of validation or prediction data: in order, whole, batches of 32.

    Parameters
    ----------
    data
        As in ``train_loader``.
    options
        As in ``train_loader``; what concerns order (``shuffle``, samplers, ``drop_last``)
        is left out. A ready DataLoader ignores them with a warning.
    place
        Name of the argument, for messages.
    """
    options = check_options(options)
    if isinstance(data, DataLoader):
        if options:
            msg = f"{place} is a DataLoader: dataloader_options do not apply to it."
            warnings.warn(msg, stacklevel=4)
        return check_batches(data, place)
    order = {"shuffle", "sampler", "batch_sampler", "drop_last", "generator"}
    options = {name: value for name, value in options.items() if name not in order}
    return check_batches(_loader(as_dataset(data, place), options), place)


def _own_order(options: Mapping[str, Any]) -> bool:
    """True if the user decides how rows go into batches."""
    return "batch_sampler" in options or options.get("batch_size", 1) is None


def _loader(dataset: Dataset[Any], options: dict[str, Any]) -> DataLoader[Any]:
    """The loader, in batches of 32 unless told otherwise."""
    if not _own_order(options):
        options = {"batch_size": BATCH_SIZE} | options
    return TensorLoader(dataset, **options)


def check_batches(loader: DataLoader[Any], place: str) -> DataLoader[Any]:
    """The loader, if it has at least one batch or cannot tell.

    Raises
    ------
    ValueError
        If it knows that it has none.
    """
    if num_batches(loader) == 0:
        msg = f"{place}: expected at least one batch, got none."
        raise ValueError(f"{msg} Make batch_size smaller or set drop_last=False.")
    return loader


def num_batches(loader: Any) -> int | None:
    """Batches in a loader; None where it cannot tell."""
    try:
        return len(loader)
    except TypeError:
        return None


def split_data(data: Any, valid_frac: float) -> tuple[Dataset[Any], Dataset[Any]]:
    """Training and validation part of `data`, drawn at random with torch's global generator.

    Parameters
    ----------
    data
        Dataset with a length, tensor, array, or several of equal length.
    valid_frac : in (0, 1)
        Share of the rows that goes to validation.

    Raises
    ------
    ValueError
        If the share is out of range or leaves a part empty, or `data` is a DataLoader or
        has no length.

    References
    ----------
    luz 0.5.0, ``create_valid_data``.
    """
    if not 0 < valid_frac < 1:
        msg = f"valid_data: expected a fraction in (0, 1), got {valid_frac!r}."
        raise ValueError(f"{msg} Give for example 0.2, or the validation data itself.")
    if isinstance(data, DataLoader | IterableDataset):
        kind = "DataLoader" if isinstance(data, DataLoader) else "IterableDataset"
        msg = f"valid_data: expected data that can be split, got a {kind}."
        raise ValueError(f"{msg} Give the validation data itself.")
    dataset = as_dataset(data)
    total = len(dataset)  # type: ignore[arg-type]
    held = int(total * valid_frac)
    if held in {0, total}:
        msg = (
            f"valid_data: expected rows on both sides, got {held} of {total} held out."
        )
        raise ValueError(f"{msg} Change the fraction.")
    rows = torch.randperm(total).tolist()
    return Subset(dataset, sorted(rows[held:])), Subset(dataset, sorted(rows[:held]))


def describe(loader: DataLoader[Any]) -> dict[str, Any]:
    """What a run records of its data: class, rows, shapes, types and batches."""
    dataset = loader.dataset
    about: dict[str, Any] = {"dataset": type(dataset).__name__}
    found = whole_tensors(dataset)
    if found is not None:
        tensors, rows = found
        about["rows"] = len(tensors[0]) if rows is None else len(rows)
        about["shapes"] = [list(tensor.shape[1:]) for tensor in tensors]
        about["dtypes"] = [str(tensor.dtype) for tensor in tensors]
    elif not isinstance(dataset, IterableDataset):
        about["rows"] = len(dataset)  # type: ignore[arg-type]
    about["batches"] = num_batches(loader)
    about["batch_size"] = loader.batch_size
    return about
