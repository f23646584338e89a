"""What a batch is: its input and target, its rows, and how it is moved and joined."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence, Sized
from operator import itemgetter
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from harness.checks.context import check_rows
from harness.pytree import items_of, iter_tensors, map_tensors, with_items

Batch = Any
"""What a loader yields: usually ``(input, target)``, but it may be any object."""


def _is_tuple(batch: object) -> bool:
    """Whether a batch is a tuple or list of its parts; a ``PackedSequence`` is an input."""
    kind = type(batch)
    if kind is list or kind is tuple:
        return True
    return isinstance(batch, tuple | list) and not isinstance(batch, PackedSequence)


def input_of(batch: Any) -> Any:
    """The first item of a tuple or list; any other batch is itself the input."""
    return batch[0] if _is_tuple(batch) and batch else batch


def target_of(batch: Any) -> Any:
    """The second item of a tuple or list, or ``labels`` of a mapping; else None."""
    if _is_tuple(batch):
        return batch[1] if len(batch) > 1 else None
    # Of Hugging Face's collators. Its models take the labels as an argument too.
    return batch.get("labels") if isinstance(batch, Mapping) else None


def with_input(batch: Batch, new: object) -> Batch:
    """The batch with another input."""
    if _is_tuple(batch):
        return [new, *batch[1:]]
    target = target_of(batch)
    return new if target is None else [new, target]


def with_target(batch: Any, new: object) -> list[object]:
    """The batch with another target, as a list."""
    rest = batch[2:] if _is_tuple(batch) else ()
    return [input_of(batch), new, *rest]


_SURE, _BY_LENGTH, _GUESS = range(3)
"""How far a number of rows can be trusted."""

_PLAIN = frozenset({str, bytes, int, float, bool, type(None)})


def num_rows(input: object, target: object = None, pred: object = None) -> int | None:
    """Number of rows of a batch; None if it cannot be known.

    Parameters
    ----------
    pred
        Output of the model, if there is one.

    Returns
    -------
    The first dim of the first tensor or array in target, input or prediction. If there is
    none: the length of the first list or other sized object that is not text.

    Notes
    -----
    Some collate functions return a list with one item for each row, for example images of
    different sizes or dicts of boxes. Such a list counts by its length. A list of tensors
    with the same dtype and the same first dim may be either rows or several inputs of one
    batch, so it is used only if nothing else tells.
    """
    if type(target) is Tensor and target.dim():
        return target.size(0)
    found = [pair for value in (target, input, pred) for pair in _find_rows(value)]
    return min(found, key=itemgetter(0))[1] if found else None


def warn_unknown_rows(batch: object) -> None:
    """Warn that the rows of a batch cannot be known, and count as one."""
    kind = type(batch).__name__
    msg = f"ctx.rows: expected tensors or lists in the batch, got {kind}."
    advice = "Each batch counts as one row. Set ctx.rows in a step or callback."
    warnings.warn(f"{msg} {advice}", stacklevel=3)


def _find_rows(value: Any) -> Iterator[tuple[int, int]]:
    """Possible numbers of rows, each after how far it can be trusted."""
    items = items_of(value)
    if isinstance(value, PackedSequence):
        yield _SURE, int(value.batch_sizes[0])
    elif _is_array(value):
        if value.ndim:
            yield _SURE, _first_dim(value)
    elif items is None:
        if isinstance(value, Sized) and not isinstance(value, str | bytes | type):
            yield _BY_LENGTH, len(value)
    elif found := _rows_of_list(value):
        yield found
    else:
        for item in items:
            yield from _find_rows(item)


def _rows_of_list(value: object) -> tuple[int, int] | None:
    """Rows of a list as a whole; None to look at its items, or if it is not a list."""
    if not value or not isinstance(value, tuple | list) or hasattr(value, "_fields"):
        return None
    if _PLAIN.issuperset(map(type, value)):
        return _BY_LENGTH, len(value)
    if all(map(_is_array, value)):
        if len({(getattr(item, "dtype", None), item.ndim) for item in value}) > 1:
            return None
        dims = {_first_dim(item) for item in value}
        is_one_batch = value[0].ndim > 0 and len(dims) == 1
        return (_GUESS, dims.pop()) if is_one_batch else (_SURE, len(value))
    names = {_names_of(item) for item in value}
    if len(names) == 1 and names != {None}:
        return _SURE, len(value)
    if any(True for _ in iter_tensors(value)):
        return None
    return _BY_LENGTH, len(value)


def _names_of(value: object) -> tuple[Any, ...] | None:
    """Keys of a mapping, or names of the fields of a named tuple or dataclass."""
    if isinstance(value, Mapping):
        return tuple(value)
    if dataclasses.is_dataclass(value):
        return tuple(field.name for field in dataclasses.fields(value))
    return getattr(value, "_fields", None)


def _is_array(value: object) -> bool:
    if isinstance(value, Tensor):
        return True
    # The attributes of a mapping may be its keys.
    return items_of(value) is None and isinstance(getattr(value, "shape", None), tuple)


def _first_dim(array: Any) -> int:
    if not array.ndim:
        return 0
    # Of a nested tensor only the first size is known.
    return int(array.size(0) if isinstance(array, Tensor) else array.shape[0])


def move(batch: Batch, device: torch.device) -> Batch:
    """The batch with its tensors on `device`, in the same form.

    An object with a method ``to`` is moved by ``to(device)``; other objects are kept as
    they are.
    """
    kind = type(batch)
    if kind is list or kind is tuple:
        for item in batch:
            if type(item) is not Tensor or item.device != device:
                break
        else:  # the common batch, there already
            return [*batch] if kind is list else batch
    if isinstance(batch, Tensor):
        if batch.device == device:
            return batch
        # Only CUDA keeps the source until it is copied, and waits before it is used. The CPU
        # may read its copy too early, and on MPS the batch may be freed first.
        return batch.to(device, non_blocking=device.type == "cuda")
    if kind not in _WITHOUT_TO and _has_own_move(batch):
        return batch.to(device)
    items = items_of(batch)
    if items is None:
        return batch
    return with_items(batch, [move(item, device) for item in items])


def _has_own_move(batch: object) -> bool:
    if isinstance(batch, type):
        return False
    # The attributes of a mapping may be its keys.
    owner = type(batch) if isinstance(batch, Mapping) else batch
    return callable(getattr(owner, "to", None))


_WITHOUT_TO = frozenset({tuple, list, dict, str, int, float, bool, type(None)})
"""Common types without a method ``to``, known without looking for it."""


def detach(value: object) -> Any:
    """The value with its tensors detached from the graph, in the same form."""
    return map_tensors(value, Tensor.detach)


def copy_by_value(
    value: object, clone: Callable[[Tensor], Tensor] = Tensor.clone
) -> Any:
    """A detached copy, which later changes of the original do not reach.

    Whatever outlives its batch is held as a copy, because models, loaders and callbacks may
    reuse their tensors.
    """
    if isinstance(value, Tensor):
        # detach() costs a third of the copy of a small tensor.
        has_graph = value.requires_grad and torch.is_grad_enabled()
        return clone(value.detach() if has_graph else value)
    if isinstance(value, np.ndarray):
        return value.copy()
    items = items_of(value)
    if items is None:
        return value
    return with_items(value, [copy_by_value(item, clone) for item in items])


def clone_to_cpu(tensor: Tensor) -> Tensor:
    """A copy of a tensor on the CPU, without one on its device first."""
    return tensor.clone() if tensor.is_cpu else tensor.detach().cpu()


def describe(value: object) -> str:
    """Shapes and dtypes of the tensors in a value, for messages."""
    if isinstance(value, Tensor | np.ndarray):
        return f"{str(value.dtype).removeprefix('torch.')} {tuple(value.shape)}"
    items = items_of(value)
    if items is None:
        return "None" if value is None else type(value).__name__
    found = ", ".join(map(describe, items[:_MAX_ITEMS]))
    more = ", ..." if len(items) > _MAX_ITEMS else ""
    return f"{type(value).__name__} of ({found}{more})"


_MAX_ITEMS = 8
"""Items of a batch that a message describes."""


def missing_target_error(place: str) -> TypeError:
    """Error of a loss or metric that needs the target of a batch without one."""
    msg = f"{place}: expected a target, got a batch without one."
    advice = "Pass data as (input, target), or setup(batch=...)."
    return TypeError(f"{msg} {advice}")


def as_scalar(loss: object, place: str) -> Tensor:
    """A loss as a 0-d tensor.

    Raises
    ------
    TypeError
        If it is not a tensor of real numbers.
    ValueError
        If it has more than one element, or none.
    """
    if not isinstance(loss, Tensor):
        got = describe(loss) if items_of(loss) else f"{loss!r:.100}"
        msg = f"{place}: expected a tensor with one element, got {got}."
        advice = "Return the mean over the batch, or a dict of parts."
        raise TypeError(f"{msg} {advice}")
    if loss.is_complex():
        msg = f"{place}: expected a real number, got {loss.dtype}."
        raise TypeError(f"{msg} Use its absolute value, or its real part.")
    if loss.dim() == 0:
        return loss
    if loss.numel() != 1:
        msg = f"{place}: expected a tensor with one element"
        got = f"shape {tuple(loss.shape)}"
        raise ValueError(f"{msg}, got {got}. Use the mean over the batch.")
    return loss.reshape(())


def keep_number(value: object, place: str) -> float | Tensor:
    """A number or a tensor with one element, to be kept for later.

    Returns
    -------
    A float, of the same value; a detached copy of what is on a device, which is not read.
    """
    if isinstance(value, int | float | np.number | np.bool_):
        return float(value)
    if not isinstance(value, Tensor) and callable(getattr(value, "compute", None)):
        msg = f"{place}: expected a number, got the metric {type(value).__name__}."
        raise TypeError(f"{msg} Pass it to setup(metrics=...), or log its compute().")
    number = as_scalar(value, place)
    return float(number.item()) if number.is_cpu else copy_by_value(number)


def keep_numbers(value: object, place: str) -> dict[str, float | Tensor]:
    """As ``keep_number`` of a number, or of each in a dict of them by optimizer name.

    A single number gets the name ``""``.
    """
    items = value if isinstance(value, Mapping) else {"": value}
    return {name: keep_number(item, place) for name, item in items.items()}


def join(outputs: Sequence[Any], rows: Sequence[int | None] = ()) -> Any:
    """Outputs of several batches as one, in the same form, on the CPU.

    Tensors are concatenated, also in tuples and mappings. Tensors of other widths, and
    outputs of any other kind or of several forms, become a list with one item a batch.

    Parameters
    ----------
    rows
        Rows of each batch. Tensors that have them in their second dim, as the hidden state
        of a recurrent layer has, are concatenated there.
    """
    first = outputs[0] if outputs else None
    dim = 1 if _has_rows_second(outputs, rows) else 0
    if len({_form_of(output, dim) for output in outputs}) > 1:
        return list(outputs)
    if isinstance(first, Tensor) and first.dim():
        return torch.cat([output.cpu() for output in outputs], dim)
    if isinstance(first, Mapping):
        items = [join([output[name] for output in outputs], rows) for name in first]
        return with_items(first, items)
    if isinstance(first, tuple) and not isinstance(first, PackedSequence):
        columns = zip(*outputs, strict=True)
        return with_items(first, [join(column, rows) for column in columns])
    return list(outputs)


def _has_rows_second(outputs: Sequence[Any], rows: Sequence[int | None]) -> bool:
    """Whether all outputs have the rows of their batches in the second dim, not the first."""
    shapes = [
        (*output.shape[:2], num)
        for output, num in zip(outputs, rows, strict=False)
        if isinstance(output, Tensor) and output.dim() > 1 and not output.is_nested
    ]
    is_second = len(shapes) == len(outputs) and all(n == num for _, n, num in shapes)
    firsts = {n for n, _, _ in shapes}
    return is_second and len(firsts) == 1 and firsts != {num for _, _, num in shapes}


def _form_of(output: object, dim: int) -> object:
    """What outputs must have in common to be joined along a dim."""
    if isinstance(output, Tensor):
        if output.is_nested or not output.dim():
            return Tensor, output.layout, output.dim(), output.is_nested
        widths = output.shape[:dim] + output.shape[dim + 1 :]
        return Tensor, output.layout, widths, output.dim(), False
    if isinstance(output, Mapping):
        return type(output), frozenset(output)
    return type(output), len(output) if isinstance(output, tuple) else None


class BatchFields:
    """The batch of a context, as its parts.

    Attributes
    ----------
    pred
        Last prediction of the model.
    """

    __slots__ = ("_batch", "_has_warned_of_rows", "_rows")
    pred: Any
    _batch: Batch
    _rows: int | None
    _has_warned_of_rows: bool

    @property
    def batch(self) -> Batch:
        """Current batch, ``(input, target)``, on the device."""
        return self._batch

    @batch.setter
    def batch(self, new: Batch) -> None:
        self._batch, self._rows = new, None

    @property
    def rows(self) -> int:
        """Rows that the batch counts for in averages; set it to count tokens, for example."""
        if self._rows is not None:
            return self._rows
        target = self.target
        if type(target) is Tensor and target.dim():  # as num_rows, without a call
            return target.size(0)
        rows = num_rows(self.input, target, self.pred)
        if rows is None and not self._has_warned_of_rows:
            self._has_warned_of_rows = True
            warn_unknown_rows(self._batch)
        return 1 if rows is None else rows

    @rows.setter
    def rows(self, new: int) -> None:
        self._rows = check_rows(new)

    @property
    def input(self) -> Any:
        """Input of the batch: a tensor, tuple or mapping; the batch itself if it is not a pair."""
        return input_of(self._batch)

    @input.setter
    def input(self, new: object) -> None:
        self._batch = with_input(self._batch, new)

    @property
    def target(self) -> Any:
        """Target of the batch; None if there is none."""
        return target_of(self._batch)

    @target.setter
    def target(self, new: object) -> None:
        self._batch = with_target(self._batch, new)
