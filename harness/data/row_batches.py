"""Batches of rows read in this process, as torch reads them, with less around each batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, MapDataPipe
from torch.utils.data import default_collate as torch_collate

# torch 2.13: where users add kinds of their own; its documentation names no public place.
from torch.utils.data._utils.collate import collate_tensor_fn, default_collate_fn_map

is_profiling: Callable[[], bool] = getattr(
    torch._C._autograd, "_profiler_enabled", lambda: True
)
"""Whether a profiler of torch runs, for which its calls are marked; True if torch cannot say."""


def iter_rows(loader: DataLoader[Any]) -> RowBatches | None:
    """Return the batches of a loader of rows without workers; None for other loaders."""
    is_plain = (
        loader.num_workers == 0
        and loader.batch_sampler is not None
        and not (loader.pin_memory or loader.timeout)
        and not isinstance(loader.dataset, IterableDataset | MapDataPipe)
        and not is_profiling()  # torch's own marks each batch for it
    )
    return RowBatches(loader) if is_plain else None


class RowBatches:
    """Batches in the order of the sampler, with the random numbers and values of torch's.

    Parameters
    ----------
    loader
        It has a batch sampler, no workers, and rows by index.

    Attributes
    ----------
    indices : iterator
        The row numbers of each batch to come.

    References
    ----------
    torch 2.13, ``_SingleProcessDataLoaderIter``, which marks each batch for a profiler, and
    checks in each what does not change.
    """

    def __init__(self, loader: DataLoader[Any]) -> None:
        self.indices: Iterator[Any] = iter(loader.batch_sampler)  # type: ignore[arg-type]
        torch.empty((), dtype=torch.int64).random_(generator=loader.generator)
        self._dataset = loader.dataset
        self._fetch = getattr(loader.dataset, "__getitems__", None)
        is_torchs = loader.collate_fn is torch_collate
        self._collate = collate if is_torchs else loader.collate_fn

    def __iter__(self) -> RowBatches:
        return self

    def __next__(self) -> Any:
        chosen = next(self.indices)
        if self._fetch:
            return self._collate(self._fetch(chosen))
        dataset = self._dataset
        return self._collate([dataset[row] for row in chosen])


def collate(rows: Any) -> Any:
    """Join rows as torch's ``default_collate``, which looks more often at what they are."""
    known = default_collate_fn_map
    # A data set that reads a batch at once may return an array.
    is_list = type(rows) is list and len(rows) > 0
    is_pair = is_list and type(rows[0]) is tuple and tuple not in known
    if not is_pair or known.get(Tensor) is not collate_tensor_fn:
        return torch_collate(rows)
    try:
        columns = [*zip(*rows, strict=True)]
    except (TypeError, ValueError):
        return torch_collate(rows)  # which says what is wrong
    return [
        torch.stack(column)
        if type(column[0]) is Tensor and _can_stack(column[0])
        else torch_collate(column)  # type: ignore[arg-type]  # torch passes tuples, too
        for column in columns
    ]


def _can_stack(tensor: Tensor) -> bool:
    return tensor.layout == torch.strided and not tensor.is_nested
