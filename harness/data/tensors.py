"""Batches of tensors, made by one indexing of each tensor."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    DistributedSampler,
    RandomSampler,
    SequentialSampler,
    Subset,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
)
from torch.utils.data import default_collate as torch_collate

from harness.data.datasets import NestedDataset


class TensorLoader(DataLoader[Any]):
    """A ``DataLoader`` that fetches all rows of a batch by one indexing of each tensor.

    The order of the rows, the values and the random numbers drawn are those of torch's
    ``DataLoader`` with the same arguments and seed. With worker processes, a custom sampler
    or a collate function it works as torch's.

    References
    ----------
    torch 2.13: ``_BaseDataLoaderIter.__init__`` draws the base seed when the iterator is
    made, and ``RandomSampler.__iter__`` draws its own seed at the first batch.
    """

    def __iter__(self) -> Any:
        found = iter_tensors(self)
        return super().__iter__() if found is None else found


UPFRONT_SAMPLERS = frozenset(
    {
        DistributedSampler,
        RandomSampler,
        SequentialSampler,
        SubsetRandomSampler,
        WeightedRandomSampler,
    }
)
"""Samplers that draw all their random numbers before the first batch, and keep their length.

A subclass may do either differently.
"""


def iter_tensors(loader: DataLoader[Any]) -> Iterator[Any] | None:
    """Return the batches of a loader of tensors, each by one indexing; None for other loaders."""
    if (
        loader.num_workers
        or loader.batch_size is None
        or type(loader.batch_sampler) is not BatchSampler
        or type(loader.sampler) not in UPFRONT_SAMPLERS
        or loader.collate_fn is not torch_collate
    ):
        return None
    found = unwrap_tensors(loader.dataset)
    if found is None:
        return None
    torch.empty((), dtype=torch.int64).random_(generator=loader.generator)
    return _index_batches(loader, *found)


def _index_batches(
    loader: DataLoader[Any], tensors: Sequence[Tensor], rows: Tensor | None
) -> Iterator[Any]:
    """Batches in the order of the sampler; copies, because a model may change its input."""
    size, count, build = loader.batch_size or 1, len(loader), get_form(loader.dataset)
    sources = [(tensor, choose_allocation(loader, tensor)) for tensor in tensors]
    # A sampler may be of other data, such as range(100).
    most = len(loader.sampler) if type(loader.sampler) is SequentialSampler else None
    if rows is None and most is not None and most <= len(tensors[0]):
        for start in range(0, count * size, size):
            part = slice(start, min(start + size, most))
            yield build([take_rows(tensor, part, make) for tensor, make in sources])
        return
    order = torch.tensor(list(loader.sampler), dtype=torch.int64)
    if rows is not None:
        order = rows[order]
    for chosen in torch.split(count_from_start(order, tensors[0]), size)[:count]:
        yield build([take_rows(tensor, chosen, make) for tensor, make in sources])


Allocate = Callable[..., Tensor]
"""Makes the tensor of a batch: ``allocate(shape, dtype=...)``."""


PIN_BYTES = 1 << 18
"""Bytes of a batch from which pinned memory pays.

CUDA copies less than 64 KB at once; to allocate pinned memory takes longer than to stage some
more.
"""


def choose_allocation(loader: DataLoader[Any], tensor: Tensor) -> Allocate | None:
    """Return what makes the batches of a tensor for a loader; None: torch as it likes.

    Pinned memory is copied to a CUDA device beside the steps. torch gives a block of it out
    again only when the copy from it is done.
    """
    if not loader.pin_memory or not torch.cuda.is_available():
        return None
    num_bytes = tensor[:1].numel() * tensor.element_size() * (loader.batch_size or 1)
    return partial(torch.empty, pin_memory=True) if num_bytes >= PIN_BYTES else None


def count_from_start(rows: Tensor, tensor: Tensor) -> Tensor:
    """Indices of rows without negative ones, which count from the end."""
    if not len(rows) or int(rows.min()) >= 0:
        return rows
    return torch.where(rows < 0, rows + len(tensor), rows)


def take_rows(
    tensor: Tensor, rows: slice | Tensor, allocate: Allocate | None
) -> Tensor:
    """Copy rows of a tensor, contiguous as torch collates them.

    `rows` count from the start. `allocate` makes the copy, if the tensor is a plain one on the
    CPU.
    """
    is_plain = tensor.is_cpu and tensor.layout == torch.strided
    is_plain = is_plain and not (tensor.requires_grad or tensor.is_conj())
    if isinstance(rows, slice):
        found = tensor[rows]
        if allocate is None or not is_plain:
            return found.clone(memory_format=torch.contiguous_format)
        return allocate(found.shape, dtype=tensor.dtype).copy_(found)
    if not is_plain or tensor.dtype in _NOT_SELECTED:
        return tensor[rows].contiguous()
    made = None
    if allocate is not None:
        made = allocate((len(rows), *tensor.shape[1:]), dtype=tensor.dtype)
    try:  # in half the time of indexing
        return torch.index_select(tensor, 0, rows, out=made)
    except IndexError as error:
        raise _missing_row_error(rows, len(tensor)) from error


_NOT_SELECTED = frozenset({torch.uint16, torch.uint32, torch.uint64})
"""Dtypes that torch 2.13 selects in no tensor with one dim."""


def _missing_row_error(rows: Tensor, count: int) -> IndexError:
    row = int(rows[(rows < 0) | (rows >= count)][0])
    row -= count if row < 0 else 0  # as it was given
    msg = f"data: expected rows from {-count} to {count - 1}, got {row}."
    return IndexError(f"{msg} Look at the sampler, or the indices of the Subset.")


def unwrap_tensors(
    dataset: Dataset[Any],
) -> tuple[tuple[Tensor, ...], Tensor | None] | None:
    """Tensors of a ``TensorDataset``, also behind a ``Subset``, and the rows of the subset.

    Returns
    -------
    Tensors, and the indices of their rows (None: all rows); None for other data sets.
    """
    rows: Tensor | None = None
    while type(dataset) is Subset:
        inner = torch.as_tensor(dataset.indices)
        if not len(inner):
            inner = inner.to(torch.int64)  # torch makes floats of an empty list
        rows = inner if rows is None else inner[rows]
        dataset = dataset.dataset
    if (
        isinstance(dataset, TensorDataset)
        and type(dataset) in {TensorDataset, NestedDataset}
        and all(type(tensor) is Tensor for tensor in dataset.tensors)
    ):
        return dataset.tensors, rows
    return None


def get_form(dataset: Any) -> Callable[[list[Tensor]], Any]:
    """Return what makes a batch of the tensors of ``unwrap_tensors``."""
    while type(dataset) is Subset:
        dataset = dataset.dataset
    return dataset.build if isinstance(dataset, NestedDataset) else list
