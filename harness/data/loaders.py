"""Loaders of batches, made from the data that the user passes."""

from __future__ import annotations

import inspect
import os
import sys
import warnings
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    IterableDataset,
    Subset,
    TensorDataset,
    default_convert,
)
from torch.utils.data import default_collate as torch_collate

from harness.checks.arguments import explain_loader_errors
from harness.checks.calls import warn_user
from harness.checks.values import check_count
from harness.data.datasets import (
    Batches,
    NestedDataset,
    Rows,
    gives_batches,
    has_rows,
    is_samples,
    list_leaves,
)
from harness.data.tensors import (
    UPFRONT_SAMPLERS,
    TensorLoader,
    get_form,
    unwrap_tensors,
)
from harness.events import nearest
from harness.pytree import Options

Loader = DataLoader[Any]
"""Loader of batches of any form."""

Data = object
"""What ``fit`` takes: a loader, rows, or tensors; see ``as_dataset``."""

BATCH_SIZE = 32
"""Rows in a batch unless ``dataloader_options`` has a ``batch_size``."""


def get_device_options(device: torch.device) -> Options:
    """Options of the loaders that feed a device, where the user does not say otherwise."""
    return {"pin_memory": True} if device.type == "cuda" else {}


def as_tensor(value: object, place: str) -> Tensor:
    """The value as a tensor; float64 arrays become torch's default float dtype."""
    if isinstance(value, Tensor):
        return value
    if not hasattr(value, "__array__"):
        kind = type(value).__name__
        advice = "Give a DataLoader, data set, list of samples, tensors or arrays."
        if isinstance(value, type):
            kind = f"the class {value.__name__}"
            advice = f"Write {value.__name__}(...)."
        elif isinstance(value, str | os.PathLike):
            kind = f"{kind} {str(value)!r:.100}"
            advice = "Read files first, and convert texts to numbers."
        elif isinstance(value, DataLoader | Dataset):
            advice = (
                "Pass one as data, and others as valid_data, several by name in a dict."
            )
        elif isinstance(value, int | float) and place[-2:-1].isdigit():
            advice = "Make a tensor of the list of numbers: torch.tensor(...)."
        msg = f"{place}: expected a tensor or array, got {kind}."
        raise TypeError(f"{msg} {advice}")
    array = _as_array(value)
    if array.dtype.kind not in "biufc":
        msg = f"{place}: expected numbers, got an array of {array.dtype}."
        raise TypeError(f"{msg} Convert categories to numbers first.")
    with warnings.catch_warnings():
        # Read-only arrays (pandas, np.load(mmap_mode="r")) are shared as well: batches
        # are copies, so nothing writes to the array.
        warnings.filterwarnings("ignore", "The given NumPy array is not writable")
        tensor = torch.as_tensor(array)
    is_double = tensor.dtype == torch.float64
    return tensor.to(torch.get_default_dtype()) if is_double else tensor


def _as_array(value: Any) -> np.ndarray[Any, Any]:
    """The value as an array that torch can read."""
    array: np.ndarray[Any, Any] = value.__array__()
    is_frame = array.dtype.kind == "O" and hasattr(value, "columns")
    if is_frame and {dtype.kind for dtype in value.dtypes} <= set("biuf"):
        array = value.to_numpy(dtype=np.float64, na_value=np.nan)
    if not array.dtype.isnative:
        array = array.astype(array.dtype.newbyteorder("="))
    # Of a copy, because torch has no negative strides: x[::-1] is such a view.
    return array.copy() if min(array.strides, default=0) < 0 else array


def as_dataset(data: object, place: str = "data") -> Dataset[Any]:
    """`data` as a data set of rows.

    Parameters
    ----------
    data
        A Dataset; an object with ``__len__`` and ``__getitem__``; a list of samples, which
        are anything but tensors, arrays, numbers or data sets; a tensor or array, or nested tuples,
        lists and mappings of those, with equal lengths.
    """
    if isinstance(data, Dataset):
        dataset = data
    elif _is_table(data):
        msg = f"{place}: expected a tensor or array, got a list of lists of numbers."
        raise TypeError(f"{msg} Make a tensor of it: torch.tensor(...).")
    elif is_samples(data) or (has_rows(data) and not hasattr(data, "__array__")):
        dataset = Rows(data)
    else:
        dataset = _zip_tensors(data, place)
    if not isinstance(dataset, IterableDataset):
        check_rows_by_index(dataset, place)
        if len(dataset) == 0:  # type: ignore[arg-type]
            raise empty_data_error(place)
    return dataset


def _is_table(data: object) -> bool:
    """Whether `data` is a list of rows of numbers, and not of pairs of input and target."""
    first = data[0] if isinstance(data, list) and data else None
    if not isinstance(first, list) or len(first) == 2:
        return False
    return all(isinstance(item, int | float) for item in first)


def check_rows_by_index(dataset: Dataset[Any], place: str) -> None:
    """Check that a data set has a length, and rows by index."""
    kind = type(dataset)
    is_read = (
        hasattr(kind, "__getitems__") or kind.__getitem__ is not Dataset.__getitem__
    )
    missing = "__len__" if not hasattr(kind, "__len__") else ""
    missing = missing or ("" if is_read else "__getitem__")
    if missing:
        msg = f"{place}: expected a data set with {missing}, got {kind.__name__}."
        advice = (
            f"Define {missing}, or derive it from IterableDataset if it is a stream."
        )
        raise TypeError(f"{msg} {advice}")


def _zip_tensors(data: object, place: str) -> Dataset[Any]:
    """Rows of tensors of equal length, in the form that holds them."""
    tree = data if isinstance(data, tuple | list | Mapping) else (data,)
    leaves = [(place, data)] if tree is not data else list_leaves(tree, place)
    tensors = [as_tensor(leaf, where) for where, leaf in leaves]
    if not tensors:
        raise ValueError(f"{place}: expected at least one tensor, got {data!r}.")
    lengths = [len(tensor) if tensor.dim() else 0 for tensor in tensors]
    if len(set(lengths)) > 1:
        more = ", ..." if len(lengths) > 10 else ""
        given = f"{', '.join(map(str, lengths[:10]))}{more}"
        msg = f"{place}: expected tensors of equal length, got lengths [{given}]."
        raise ValueError(f"{msg} Each needs one row for each sample.")
    if lengths[0] == 0:
        raise empty_data_error(place)
    if type(tree) in (tuple, list) and len(leaves) == len(tree):
        return TensorDataset(*tensors)
    return NestedDataset(tree, *tensors)


def empty_data_error(place: str) -> ValueError:
    """Error for data without a row."""
    msg = f"{place}: expected at least one row, got none."
    return ValueError(f"{msg} Check how the data was loaded or filtered.")


LOADER_OPTIONS = tuple(
    name
    for name in inspect.signature(DataLoader.__init__).parameters
    if name not in {"self", "dataset"}
)
"""Options that ``dataloader_options`` may have: the arguments of torch's ``DataLoader``."""


def check_options(options: Mapping[str, object] | None) -> Options:
    """The options as a dict."""
    if options is not None and not isinstance(options, Mapping):
        msg = f"dataloader_options: expected a dict, got {options!r}."
        raise TypeError(f"{msg} Pass arguments of torch's DataLoader by name.")
    if (options or {}).get("batch_size") is not None:
        advice = "Leave it out for 32 rows."
        size = (options or {})["batch_size"]
        check_count("dataloader_options(batch_size)", size, 1, advice)
    for name in options or {}:
        if name not in LOADER_OPTIONS:
            msg = f"dataloader_options: expected arguments of DataLoader, got {name!r}."
            raise ValueError(f"{msg}{nearest(name, LOADER_OPTIONS)}")
    return dict(options or {})


def make_train_loader(
    data: object,
    options: Mapping[str, object] | None = None,
    ranks: int = 1,
    like: Mapping[str, object] | None = None,
) -> Loader:
    """Make the training loader: shuffled batches of 32, without a short last batch.

    Parameters
    ----------
    data
        DataLoader or another iterable of batches, used as it is; or what ``as_dataset`` takes.
    options
        Arguments of torch's ``DataLoader`` that replace the defaults.
    ranks : >= 1
        Number of ranks, each of which takes a batch at a time.
    like
        Defaults of `options`, from ``get_device_options``.

    References
    ----------
    luz 0.5.0, ``apply_dataloader_options``. Differs from luz: data shorter than one batch
    (of each rank) keeps its short batch unless ``drop_last`` is given.
    """
    options = check_options(options)
    data = as_loader(data)
    if isinstance(data, DataLoader):
        if options:
            msg = (
                f"dataloader_options: expected none with a DataLoader, got {options!r}."
            )
            raise ValueError(f"{msg} Set them where you make the DataLoader.")
        return check_batches(data, "data")
    dataset = as_dataset(data)
    if not isinstance(dataset, IterableDataset) and not _has_own_order(options):
        size: Any = options.get("batch_size", BATCH_SIZE)
        long = len(dataset) >= size * ranks  # type: ignore[arg-type]
        options = {"shuffle": "sampler" not in options, "drop_last": long} | options
    return check_batches(_make_loader(dataset, options, like), "data")


def as_loader(data: object) -> object:
    """Return a loader of batches that are given; anything else as it is."""
    return GivenBatches(data) if gives_batches(data) else data


class GivenBatches(DataLoader[Any]):
    """Loader of an object that gives batches; arrays in them become tensors.

    Notes
    -----
    torch 2.13: ``DataLoader`` draws a random number for its workers in each pass. This one has
    none and draws nothing, as a loop over the object.
    """

    def __init__(self, data: object) -> None:
        super().__init__(Batches(data), batch_size=None)

    def __iter__(self) -> Any:
        return map(default_convert, iter(self.dataset))


def num_items(loader: Loader) -> int:
    """Items of a batch, if its data are tensors; else as many as anybody needs."""
    dataset: Any = getattr(loader, "dataset", None)
    found = unwrap_tensors(dataset)
    if found is None:
        return sys.maxsize
    own = getattr(get_form(dataset), "__self__", None)
    return own.num_items if isinstance(own, NestedDataset) else len(found[0])


def get_batch_options(loader: Loader) -> Options:
    """How a loader makes batches of rows: their size, and a collate function of the user's."""
    if getattr(loader, "batch_size", None) is None:
        return {}
    found: Options = {"batch_size": loader.batch_size}
    if loader.collate_fn is not torch_collate:
        found["collate_fn"] = loader.collate_fn
    return found


def make_eval_loader(
    data: object,
    options: Mapping[str, object] | None = None,
    place: str = "valid_data",
    like: Mapping[str, object] | None = None,
) -> Loader:
    """Make a validation or prediction loader: batches of 32, all rows, in order.

    Parameters
    ----------
    options
        As in ``make_train_loader``. Rows keep their order: what would change it is ignored,
        with a warning. With a DataLoader all options are ignored, with a warning.
    like
        Defaults of `options`, from ``get_batch_options`` and ``get_device_options``. A
        collate function is for data sets, and not for tensors.
    """
    options = check_options(options)
    data = as_loader(data)
    if isinstance(data, DataLoader):
        if options:
            msg = f"{place} is a DataLoader: dataloader_options do not apply to it."
            warn_user(msg)
        return check_batches(data, place)
    ignored = [name for name in ORDER_OPTIONS if options.pop(name, None)]
    options.pop("generator", None)  # nothing is drawn
    if ignored:
        msg = f"{place}: expected no options about the order of rows, got {ignored}."
        warn_user(f"{msg} The rows keep their order.")
    dataset = as_dataset(data, place)
    defaults = dict(like or {})
    if unwrap_tensors(dataset) is not None:
        defaults.pop("collate_fn", None)
    return check_batches(_make_loader(dataset, options, defaults), place)


ORDER_OPTIONS = ("shuffle", "sampler", "batch_sampler")
"""Options of a ``DataLoader`` that decide the order of rows."""


def without_order(options: Mapping[str, object] | None) -> Options:
    """Return options of the training data as validation uses them: all rows, in order."""
    order = {*ORDER_OPTIONS, "drop_last"}
    return {n: value for n, value in check_options(options).items() if n not in order}


def _has_own_order(options: Mapping[str, object]) -> bool:
    """True if the user decides how rows go into batches."""
    return "batch_sampler" in options or options.get("batch_size", 1) is None


def _make_loader(
    dataset: Dataset[Any], options: Options, like: Mapping[str, object] | None
) -> Loader:
    defaults = dict(like or {})
    if "collate_fn" in defaults | options:
        defaults.pop("pin_memory", None)  # it may make what torch would pin wrongly
    options = defaults | options
    if not _has_own_order(options):
        options = {"batch_size": BATCH_SIZE} | options
    with explain_loader_errors(options):
        return TensorLoader(dataset, **options)


def check_batches(loader: Loader, place: str) -> Loader:
    """The loader, if it has at least one batch or its length is unknown."""
    if num_batches(loader) == 0:
        msg = f"{place}: expected at least one batch, got none."
        raise ValueError(f"{msg} Make batch_size smaller or set drop_last=False.")
    return loader


def num_batches(loader: Any) -> int | None:
    """Batches in a loader; None if its length is unknown."""
    try:
        return len(loader)
    except TypeError:
        return None


def _unwrap(loader: Any) -> Any:
    """Return the user's loader behind one that is limited, or divided over ranks."""
    loader = getattr(loader, "unlimited", loader)
    return getattr(loader, "undivided", loader)


def reads_rows_by_torch(loader: object) -> bool:
    """True if torch's own loader and samplers choose rows of a data set that has them by index.

    Then the order is drawn before the first batch, and the length is the number of batches.
    """
    loader = _unwrap(loader)
    if type(loader) not in {DataLoader, TensorLoader}:
        return False
    assert isinstance(loader, DataLoader)
    if isinstance(loader.dataset, IterableDataset):
        return False
    batches = loader.batch_sampler
    if batches is not None and type(batches) is not BatchSampler:
        return False
    sampler = loader.sampler if batches is None else batches.sampler
    return type(sampler) in UPFRONT_SAMPLERS


def split_data(data: object, valid_frac: float) -> tuple[Dataset[Any], Dataset[Any]]:
    """Split `data` at random into training and validation data.

    The rows are drawn with torch's global generator.

    Parameters
    ----------
    data
        Dataset with a length, tensor, array, or several of equal length.
    valid_frac : in (0, 1)
        Fraction of the rows that goes to validation.

    References
    ----------
    luz 0.5.0, ``create_valid_data``.
    """
    if not 0 < valid_frac < 1:
        msg = f"valid_data: expected a fraction in (0, 1), got {valid_frac!r}."
        raise ValueError(f"{msg} Give for example 0.2, or the validation data itself.")
    data = as_loader(data)
    if isinstance(data, DataLoader | IterableDataset):
        kind = "DataLoader" if isinstance(data, DataLoader) else "IterableDataset"
        msg = f"valid_data: expected data that can be split, got a {kind}."
        raise ValueError(f"{msg} Give the validation data itself.")
    dataset = as_dataset(data)
    total = len(dataset)  # type: ignore[arg-type]
    num_valid = int(total * valid_frac)
    if num_valid in {0, total}:
        msg = "valid_data: expected training and validation rows"
        got = f"{num_valid} of {total} rows for validation"
        raise ValueError(f"{msg}, got {got}. Change the fraction.")
    rows = torch.randperm(total).tolist()
    train, valid = rows[num_valid:], rows[:num_valid]
    return Subset(dataset, sorted(train)), Subset(dataset, sorted(valid))


def describe_data(loader: Loader) -> Options:
    """What a run records about its data: class, rows, shapes, dtypes and batches.

    It describes the loader before it is divided, so it is the same on any number of ranks.
    """
    loader = _unwrap(loader)
    dataset = loader.dataset
    own = dataset.dataset if isinstance(dataset, Rows | Batches) else dataset
    about: dict[str, object] = {"dataset": type(own).__name__}
    found = unwrap_tensors(dataset)
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
