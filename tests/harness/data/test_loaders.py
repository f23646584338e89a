from __future__ import annotations

import os
import signal
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    Subset,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
)
from torch.utils.data._utils.collate import default_collate_fn_map

from harness.checks.hints import find_loader_hint
from harness.data import loaders
from harness.data.batch import num_rows
from harness.data.loaders import (
    describe_data,
    get_device_options,
    make_eval_loader,
    make_train_loader,
    num_batches,
    without_order,
)
from harness.data.pace import limit_loader
from harness.data.tensors import TensorLoader, count_from_start, take_rows
from harness.data.workers import iter_batches

ROWS = 23


def dataset(rows=ROWS):
    x = torch.arange(rows * 2.0).view(rows, 2)
    return TensorDataset(x, torch.arange(rows), x.to(torch.uint8)[:, :1])


class Squares(Dataset):
    """A map-style data set of another class."""

    def __len__(self):
        return 7

    def __getitem__(self, place):
        return torch.tensor(float(place)), torch.tensor(float(place) ** 2)


class Mixed(Dataset):
    """Rows of a form: each holds tensors, numbers, text, an array and a nested pair."""

    def __init__(self, form=tuple):
        self.form = form

    def __len__(self):
        return 7

    def __getitem__(self, place):
        number = torch.randn(())  # drawn while rows are read
        items = (number, place, f"row {place}", np.float32(place), (number, 1.5))
        return {"a": items} if self.form is dict else self.form(items)


class Fetched(Squares):
    """Rows by whole batches."""

    def __getitems__(self, places):
        return [(torch.tensor(float(place)), -place) for place in places]


class Table(Squares):
    """Rows of an array, by whole batches."""

    def __getitems__(self, places):
        return np.arange(2.0 * ROWS).reshape(ROWS, 2)[places]


class Stream(IterableDataset):
    def __iter__(self):
        return ((torch.tensor(float(n)), torch.tensor(float(n))) for n in range(5))


# --- TensorLoader against torch's DataLoader


def nested(data):
    return Subset(Subset(data, range(20, 0, -1)), [3, 1, 19, -2, 3, 7, 8, 0])


def weighted():
    return WeightedRandomSampler([float(n) for n in range(1, ROWS + 1)], 31)


PICTURES = torch.randn(ROWS, 3, 4, 5).to(memory_format=torch.channels_last)

LOADERS = {
    "in order": lambda kind, size: kind(dataset(), batch_size=size),
    "in order, whole batches": lambda kind, size: kind(
        dataset(), batch_size=size, drop_last=True
    ),
    "shuffled": lambda kind, size: kind(dataset(), batch_size=size, shuffle=True),
    "shuffled, whole batches": lambda kind, size: kind(
        dataset(), batch_size=size, shuffle=True, drop_last=True
    ),
    "shuffled, own generator": lambda kind, size: kind(
        dataset(),
        batch_size=size,
        shuffle=True,
        generator=torch.Generator().manual_seed(5),
    ),
    "subset": lambda kind, size: kind(
        Subset(dataset(), [4, 2, 20, 2, -1]), batch_size=size, shuffle=True
    ),
    "nested subset in order": lambda kind, size: kind(
        nested(dataset()), batch_size=size
    ),
    "weighted": lambda kind, size: kind(dataset(), batch_size=size, sampler=weighted()),
    "with replacement": lambda kind, size: kind(
        dataset(),
        batch_size=size,
        sampler=RandomSampler(dataset(), replacement=True, num_samples=40),
    ),
    "fewer than all": lambda kind, size: kind(
        dataset(), batch_size=size, sampler=RandomSampler(dataset(), num_samples=9)
    ),
    "more than all": lambda kind, size: kind(
        dataset(), batch_size=size, sampler=RandomSampler(dataset(), num_samples=60)
    ),
    "channels last": lambda kind, size: kind(
        TensorDataset(PICTURES), batch_size=size, shuffle=True
    ),
    "channels last, in order": lambda kind, size: kind(
        TensorDataset(PICTURES), batch_size=size
    ),
    "transposed": lambda kind, size: kind(
        TensorDataset(torch.randn(5, ROWS).T), batch_size=size
    ),
    "subset sampler": lambda kind, size: kind(
        dataset(), batch_size=size, sampler=SubsetRandomSampler([3, 8, -1, 0])
    ),
    "hand-made sampler": lambda kind, size: kind(
        dataset(), batch_size=size, sampler=[5, 3, 3, 9]
    ),
    "hand-made batches": lambda kind, size: kind(
        dataset(),
        batch_sampler=BatchSampler(SequentialSampler(dataset()), size, drop_last=False),
    ),
    "no batches": lambda kind, size: kind(dataset(), batch_size=None),
    "own collate": lambda kind, size: kind(dataset(), batch_size=size, collate_fn=len),
    "own data set": lambda kind, size: kind(Squares(), batch_size=size, shuffle=True),
    "stream": lambda kind, size: kind(Stream(), batch_size=size),
    "tuples": lambda kind, size: kind(Mixed(), batch_size=size, shuffle=True),
    "lists": lambda kind, size: kind(Mixed(list), batch_size=size),
    "mappings": lambda kind, size: kind(Mixed(dict), batch_size=size),
    "whole batches of rows": lambda kind, size: kind(
        Fetched(), batch_size=size, shuffle=True
    ),
    "rows of an array": lambda kind, size: kind(Table(), batch_size=size),
    "rows, weighted": lambda kind, size: kind(
        Squares(), batch_size=size, sampler=RandomSampler(Squares(), num_samples=9)
    ),
    "rows, own batches": lambda kind, size: kind(
        Squares(), batch_sampler=[[0, 1], [6], [2, 2, 5]]
    ),
    "rows of one tensor": lambda kind, size: kind(list(torch.eye(7)), batch_size=size),
}


def iterate_twice(make, kind, size, begin=iter):
    """Batches of two passes and the state of the global generator after each batch."""
    torch.manual_seed(11)
    loader = make(kind, size)
    found = []
    for _ in range(2):
        batches = begin(loader)
        found.append(torch.get_rng_state())
        for batch in batches:
            found += [batch, torch.get_rng_state()]
    return found


def same(a, b):
    if isinstance(a, torch.Tensor):
        return (
            isinstance(b, torch.Tensor)
            and (a.dtype, a.stride()) == (b.dtype, b.stride())
            and torch.equal(a, b)
        )
    if isinstance(a, dict):
        return type(a) is type(b) and same([*a.items()], [*b.items()])
    if isinstance(a, list | tuple):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    return a == b


@pytest.mark.parametrize("name", LOADERS)
def test_tensor_loader_equals_torchs_loader_in_batches_and_draws(name):
    make = LOADERS[name]
    for size in (1, 4, 23, 50):
        expected = iterate_twice(make, DataLoader, size)
        assert same(iterate_twice(make, TensorLoader, size), expected), size
        assert same(iterate_twice(make, DataLoader, size, iter_batches), expected), size


@pytest.mark.parametrize(
    "rows",
    [
        [(torch.zeros(2), 1), (torch.zeros(3), 1)],
        [(torch.zeros(2), 1), (torch.zeros(2),)],
        [(torch.zeros(2), 1), None],
        [(torch.zeros(2).to_sparse(), 1)] * 2,
        [(object(), 1)] * 2,
    ],
)
def test_rows_that_torch_cannot_join_are_refused_as_by_torch(rows):
    errors = []
    for begin in (iter, iter_batches):
        with pytest.raises((TypeError, RuntimeError)) as caught:
            next(begin(DataLoader(rows, batch_size=2)))
        errors.append((type(caught.value), str(caught.value)))
    assert errors[0] == errors[1]
    assert find_loader_hint(caught.value).startswith("Rows of a batch are stacked")


class Killed(Squares):
    """Ends the process that reads a row, as a system without memory does."""

    def __getitem__(self, place):
        os.kill(os.getpid(), signal.SIGKILL)


def test_worker_that_was_killed_has_a_hint():
    with pytest.raises((RuntimeError, OSError, EOFError)) as caught:
        next(iter(DataLoader(Killed(), num_workers=1)))
    assert find_loader_hint(caught.value).startswith("A worker process of the loader")


def test_rows_are_joined_by_what_the_user_adds_to_torchs_table(monkeypatch):
    monkeypatch.setitem(
        default_collate_fn_map,
        torch.Tensor,
        lambda batch, *, collate_fn_map: torch.stack(batch) + 100,
    )
    first, second = next(iter_batches(DataLoader(Squares(), batch_size=2)))
    assert torch.equal(first, torch.tensor([100.0, 101.0]))
    assert torch.equal(second, torch.tensor([100.0, 101.0]))


def test_rows_are_read_by_torch_while_a_profiler_runs():
    with torch.profiler.profile() as profiler:
        list(iter_batches(DataLoader(Squares(), batch_size=4)))
    names = {event.key for event in profiler.key_averages()}
    assert any("enumerate(DataLoader)" in name for name in names)


@pytest.mark.parametrize(
    ("name", "pin_bytes"),
    [
        ("in order", 1),
        ("shuffled", 1),
        ("nested subset in order", 1),
        ("shuffled", 1 << 20),
    ],
)
def test_pinned_batches_are_those_of_torchs_loader(name, pin_bytes, monkeypatch):
    expected = iterate_twice(LOADERS[name], DataLoader, 4)
    made = []

    def allocate(shape, *, dtype, pin_memory):
        made.append(pin_memory)
        return torch.zeros(shape, dtype=dtype)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr("harness.data.tensors.torch.empty", fake_empty(allocate))
    monkeypatch.setattr("harness.data.tensors.PIN_BYTES", pin_bytes)
    kind = partial(TensorLoader, pin_memory=True)
    assert same(iterate_twice(LOADERS[name], kind, 4), expected)
    assert (len(made) > 4) is (pin_bytes == 1)
    assert all(made)


def fake_empty(allocate):
    """``torch.empty``, which asks `allocate` where pinned memory is wanted."""
    empty = torch.empty
    return lambda shape, **options: (
        allocate(shape, **options)
        if "pin_memory" in options
        else empty(shape, **options)
    )


@pytest.mark.parametrize(
    "tensor",
    [
        torch.arange(12.0).reshape(4, 3),
        torch.arange(12).reshape(3, 4).T,
        torch.arange(4.0, requires_grad=True),
        torch.complex(torch.ones(4), torch.arange(4.0)).conj(),
        torch.zeros(4, 0, dtype=torch.bool),
        torch.arange(4).to(torch.uint16),
    ],
)
@pytest.mark.parametrize("rows", [torch.tensor([2, -1, 2]), torch.tensor([-4])])
def test_taken_rows_are_indexed_rows(tensor, rows):
    chosen, expected = count_from_start(rows, tensor), tensor[rows]
    for allocate in (torch.empty, None):
        found = take_rows(tensor, chosen, allocate)
        assert same(found.resolve_conj(), expected.resolve_conj())


@pytest.mark.parametrize("row", [4, -5])
def test_rows_out_of_range_are_refused(row):
    tensor = torch.zeros(4, 2)
    rows = count_from_start(torch.tensor([row]), tensor)
    match = f"data: expected rows from -4 to 3, got {row}. Look at the sampler"
    with pytest.raises(IndexError, match=match):
        take_rows(tensor, rows, None)


@pytest.mark.parametrize(
    ("options", "expected"),
    [({}, True), ({"pin_memory": False}, False), ({"collate_fn": list}, False)],
)
def test_loaders_for_a_cuda_device_are_pinned(options, expected):
    like = get_device_options(torch.device("cuda", 0))
    data = Squares()
    assert make_train_loader(data, options, 1, like).pin_memory is expected
    assert make_eval_loader(data, options, like=like).pin_memory is expected
    assert not make_train_loader(
        data, options, 1, get_device_options(torch.device("cpu"))
    ).pin_memory


def test_tensor_loader_draws_from_its_generator_as_torchs_loader():
    states = []
    for kind in (DataLoader, TensorLoader):
        generator = torch.Generator().manual_seed(5)
        loader = kind(dataset(), batch_size=4, shuffle=True, generator=generator)
        states.append([[list(loader), generator.get_state()] for _ in range(2)])
    assert same(states[1], states[0])


def test_tensor_loader_stopped_early_draws_as_torchs_loader():
    states = []
    for kind in (DataLoader, TensorLoader):
        torch.manual_seed(1)
        loader = kind(dataset(), batch_size=4, shuffle=True)
        next(iter(loader))
        iter(loader)
        states.append(torch.get_rng_state())
    assert torch.equal(states[0], states[1])


@pytest.mark.parametrize("shuffle", [True, False])
def test_tensor_loader_batches_are_copies_of_the_data(shuffle):
    data = dataset()
    before = data.tensors[0].clone()
    for batch in TensorLoader(data, batch_size=4, shuffle=shuffle):
        batch[0].zero_()
    assert torch.equal(data.tensors[0], before)


@pytest.mark.parametrize("kind", [SequentialSampler, RandomSampler])
def test_tensor_loader_keeps_the_order_of_a_subclassed_sampler(kind):
    class Backwards(kind):  # type: ignore[misc, valid-type]
        def __iter__(self):
            return iter(range(len(self.data_source) - 1, -1, -1))

    data = TensorDataset(torch.arange(4))
    loader = TensorLoader(data, batch_size=2, sampler=Backwards(data))
    assert [batch.tolist() for (batch,) in loader] == [[3, 2], [1, 0]]


@pytest.mark.parametrize(
    ("data", "sampler"),
    [
        (TensorDataset(torch.arange(20)), SequentialSampler(range(10))),
        (Subset(TensorDataset(torch.arange(20)), range(5, 15)), None),
        (Subset(TensorDataset(torch.arange(20)), []), None),
    ],
)
@pytest.mark.parametrize("drop_last", [True, False])
def test_tensor_loader_reads_the_rows_that_torchs_loader_reads(
    data, sampler, drop_last
):
    options: Any = {"batch_size": 4, "sampler": sampler, "drop_last": drop_last}
    expected = list(DataLoader(data, **options))
    assert same(list(TensorLoader(data, **options)), expected)


def test_tensor_loader_refuses_rows_past_the_data_as_torchs_loader():
    data, sampler = TensorDataset(torch.arange(6)), SequentialSampler(range(10))
    with pytest.raises(IndexError):
        list(TensorLoader(data, batch_size=4, sampler=sampler))


def test_tensor_loader_with_workers_equals_torchs_loader():
    torch.manual_seed(3)
    expected = list(DataLoader(dataset(), batch_size=8, shuffle=True))
    torch.manual_seed(3)
    loader = TensorLoader(dataset(), batch_size=8, shuffle=True, num_workers=1)
    assert same(list(loader), expected)


# --- kinds of data


def as_dataset(data) -> Any:
    return loaders.as_dataset(data)


def split_data(data, frac) -> Any:
    return loaders.split_data(data, frac)


def test_as_dataset_of_one_tensor_has_rows_of_one():
    assert [len(row) for row in as_dataset(torch.zeros(3, 2))] == [1, 1, 1]


def test_as_dataset_of_several_zips_them():
    rows = list(as_dataset((torch.arange(2.0), torch.tensor([5, 6]))))
    assert rows == [(0.0, 5), (1.0, 6)]


def test_as_dataset_of_a_dataset_is_itself():
    data = Squares()
    assert as_dataset(data) is data


def test_as_dataset_of_double_arrays_takes_the_default_float_type():
    data = as_dataset((np.zeros((2, 3)), np.arange(2), np.zeros(2, np.float32)))
    assert [t.dtype for t in data.tensors] == [
        torch.float32,
        torch.int64,
        torch.float32,
    ]


def test_as_dataset_of_double_tensors_leaves_them():
    (tensor,) = as_dataset(torch.zeros(2, dtype=torch.float64)).tensors
    assert tensor.dtype == torch.float64


def test_as_dataset_of_a_frame_and_a_series():
    frame = pd.DataFrame({"a": [1.0, 2.0], "b": [3.0, 4.0]})
    x, y = as_dataset((frame, frame["a"])).tensors
    assert x.tolist() == [[1.0, 3.0], [2.0, 4.0]]
    assert y.tolist() == [1.0, 2.0]


def test_as_dataset_of_a_file_mapped_read_only_is_shared_and_never_written(tmp_path):
    np.save(tmp_path / "x.npy", np.arange(6.0, dtype=np.float32))
    array = np.load(tmp_path / "x.npy", mmap_mode="r")
    data = as_dataset(array)
    assert data.tensors[0].data_ptr() == array.ctypes.data
    for (batch,) in TensorLoader(data, batch_size=2):
        batch.zero_()
    assert array.tolist() == [0, 1, 2, 3, 4, 5]


def test_as_dataset_unequal_lengths_are_refused():
    with pytest.raises(
        ValueError,
        match=r"data: expected tensors of equal length, got lengths \[3, 2\]",
    ):
        as_dataset((torch.zeros(3), torch.zeros(2)))


@pytest.mark.parametrize(
    ("wrong", "place"),
    [
        ("text", r"data: .*got str"),
        (None, r"data: .*got NoneType"),
        ([1, 2, 3], r"data\[0\]: .*got int"),
        ((torch.zeros(2), [1, 2]), r"data\[1\]\[0\]: .*got int"),
        (np.array(["a", "b"]), r"data: expected numbers"),
    ],
)
def test_as_dataset_of_something_else_is_refused(wrong, place):
    with pytest.raises(TypeError, match=place):
        as_dataset(wrong)


@pytest.mark.parametrize("empty", [torch.zeros(0, 2), Subset(dataset(), [])])
def test_as_dataset_without_rows_is_refused(empty):
    with pytest.raises(ValueError, match="data: expected at least one row, got none"):
        as_dataset(empty)


def test_as_dataset_without_tensors_is_refused():
    with pytest.raises(ValueError, match="data: expected at least one tensor"):
        as_dataset(())


def test_as_dataset_of_a_number_is_refused():
    with pytest.raises(ValueError, match="expected at least one row"):
        as_dataset(torch.tensor(1.0))


# --- loaders of training and of the rest


def sizes(loader):
    return [num_rows(batch) for batch in loader]


def test_make_train_loader_shuffles_and_drops_the_short_last_batch():
    torch.manual_seed(0)
    loader = make_train_loader(torch.arange(100))
    rows = torch.cat([batch[0] for batch in loader])
    assert sizes(loader) == [32, 32, 32]
    assert sorted(rows.tolist()) != rows.tolist()
    assert len(set(rows.tolist())) == 96


def test_make_train_loader_of_less_than_a_batch_keeps_it():
    assert sizes(make_train_loader(torch.arange(5))) == [5]
    options = {"batch_size": 3}
    assert sizes(make_train_loader(torch.arange(4), options)) == [3]
    assert sizes(make_train_loader(torch.arange(4), options, ranks=2)) == [3, 1]
    assert sizes(make_train_loader(torch.arange(7), options, ranks=2)) == [3, 3]


def test_make_train_loader_options_replace_the_defaults():
    options = {"batch_size": 3, "shuffle": False, "drop_last": False}
    loader = make_train_loader(torch.arange(7), options)
    assert [batch[0].tolist() for batch in loader] == [[0, 1, 2], [3, 4, 5], [6]]


def test_make_train_loader_with_a_sampler_takes_its_order():
    loader = make_train_loader(torch.arange(7), {"sampler": [3, 1], "batch_size": 2})
    assert [batch[0].tolist() for batch in loader] == [[3, 1]]


def test_make_train_loader_with_a_batch_sampler_takes_its_batches():
    loader = make_train_loader(torch.arange(7), {"batch_sampler": [[3, 1], [2]]})
    assert [batch[0].tolist() for batch in loader] == [[3, 1], [2]]


def test_make_train_loader_of_a_stream_takes_it_in_order():
    loader = make_train_loader(Stream(), {"batch_size": 2})
    assert [batch[0].tolist() for batch in loader] == [[0, 1], [2, 3], [4]]


def test_make_train_loader_of_given_batches_draws_no_random_number():
    class Given:
        def __iter__(self):
            yield np.ones(2), torch.rand(2)

    torch.manual_seed(1)
    expected = torch.rand(2)
    torch.manual_seed(1)
    [[array, drawn]] = make_train_loader(Given())
    assert torch.equal(array, torch.ones(2, dtype=torch.float64))
    assert torch.equal(drawn, expected)


def test_make_train_loader_of_a_loader_is_itself():
    loader = DataLoader(dataset())
    assert make_train_loader(loader) is loader


def test_make_train_loader_options_for_a_ready_loader_are_refused():
    with pytest.raises(
        ValueError, match="dataloader_options: expected none with a DataLoader, got"
    ):
        make_train_loader(DataLoader(dataset()), {"batch_size": 3})


def test_make_train_loader_unknown_option_is_refused_with_the_nearest():
    with pytest.raises(ValueError, match=r"got 'batchsize'. Did you mean 'batch_size'"):
        make_train_loader(dataset(), {"batchsize": 3})


def test_make_train_loader_without_a_whole_batch_is_refused():
    with pytest.raises(ValueError, match="data: expected at least one batch, got none"):
        make_train_loader(torch.arange(3), {"batch_size": 4, "drop_last": True})


def test_make_eval_loader_keeps_the_order_and_the_short_last_batch():
    loader = make_eval_loader(torch.arange(70))
    assert sizes(loader) == [32, 32, 6]
    assert torch.cat([batch[0] for batch in loader]).tolist() == list(range(70))


def test_make_eval_loader_warns_of_options_about_order():
    for order in ({"shuffle": True}, {"sampler": [0]}, {"batch_sampler": [[0]]}):
        with pytest.warns(
            UserWarning, match=rf"data: .* got \['{next(iter(order))}'\]"
        ):
            loader = make_eval_loader(torch.arange(7), order, "data")
        assert [batch[0].tolist() for batch in loader] == [list(range(7))]
    options = {"batch_size": 3, "drop_last": True, "shuffle": False}
    assert sizes(make_eval_loader(torch.arange(7), options)) == [3, 3]


def test_validation_data_have_the_options_of_the_training_data_in_order():
    options: dict[str, Any] = {"batch_size": 3, "shuffle": True, "drop_last": True}
    options["generator"] = torch.Generator()
    loader = make_eval_loader(torch.arange(7), without_order(options))
    assert [batch[0].tolist() for batch in loader] == [[0, 1, 2], [3, 4, 5], [6]]


def test_make_eval_loader_options_for_a_ready_loader_are_ignored_with_a_warning():
    loader = DataLoader(dataset())
    with pytest.warns(UserWarning, match="valid_data is a DataLoader"):
        assert make_eval_loader(loader, {"batch_size": 3}) is loader


def test_make_eval_loader_unknown_option_is_refused():
    with pytest.raises(
        ValueError, match="expected arguments of DataLoader, got 'nope'"
    ):
        make_eval_loader(dataset(), {"nope": 3})


def test_make_eval_loader_names_its_argument():
    with pytest.raises(ValueError, match="valid_data: expected at least one row"):
        make_eval_loader(torch.zeros(0))
    with pytest.raises(ValueError, match="data: expected at least one row"):
        make_eval_loader(torch.zeros(0), place="data")


# --- splits


def test_split_data_gives_every_row_to_one_side():
    torch.manual_seed(0)
    train, valid = split_data(torch.arange(10), 0.3)
    rows = [[int(row[0]) for row in part] for part in (train, valid)]
    assert [len(part) for part in rows] == [7, 3]
    assert sorted(rows[0] + rows[1]) == list(range(10))


def test_split_data_follows_torchs_seed():
    splits = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        splits.append([int(row[0]) for row in split_data(torch.arange(50), 0.5)[1]])
    assert splits[0] == splits[1] != splits[2]


def test_split_data_of_a_dataset_and_of_pairs():
    train, valid = split_data(Squares(), 0.5)
    assert (len(train), len(valid)) == (4, 3)
    train, valid = split_data((torch.zeros(4), torch.ones(4)), 0.25)
    assert valid[0] == (0.0, 1.0)


@pytest.mark.parametrize("frac", [0, 1, 1.5, -0.1, float("nan")])
def test_split_data_fraction_out_of_range_is_refused(frac):
    with pytest.raises(
        ValueError, match=r"valid_data: expected a fraction in \(0, 1\)"
    ):
        split_data(torch.arange(10), frac)


@pytest.mark.parametrize(
    ("data", "kind"),
    [(DataLoader(dataset()), "DataLoader"), (Stream(), "IterableDataset")],
)
def test_split_data_of_what_cannot_be_split_is_refused(data, kind):
    with pytest.raises(
        ValueError, match=f"valid_data: expected data that can be split, got a .*{kind}"
    ):
        split_data(data, 0.5)


@pytest.mark.parametrize("frac", [0.01, 0.001])
def test_split_data_that_leaves_a_side_empty_is_refused(frac):
    with pytest.raises(
        ValueError, match="expected training and validation rows, got 0 of 10"
    ):
        split_data(torch.arange(10), frac)


# --- rows, counts, descriptions


def test_num_batches_of_a_stream_is_unknown():
    assert num_batches(DataLoader(Stream(), batch_size=2)) is None
    assert num_batches(DataLoader(dataset(), batch_size=2)) == 12


class Divided:
    """What a rank reads of a loader, as ``ShardedLoader`` has it."""

    batch_size = 2

    def __init__(self, loader):
        self.undivided, self.dataset = loader, loader.dataset

    def __len__(self):
        return 1


def test_description_of_data_is_the_same_on_any_number_of_ranks_and_in_a_trial():
    loader = make_train_loader(dataset(), {"batch_size": 4})
    whole = describe_data(loader)
    assert describe_data(Divided(loader)) == whole
    assert describe_data(limit_loader(Divided(loader), 1, "fit")) == whole


def test_describe_data_has_class_rows_shapes_and_batches():
    assert describe_data(make_train_loader(dataset(), {"batch_size": 4})) == {
        "dataset": "TensorDataset",
        "rows": 23,
        "shapes": [[2], [], [1]],
        "dtypes": ["torch.float32", "torch.int64", "torch.uint8"],
        "batches": 5,
        "batch_size": 4,
    }
    about = describe_data(DataLoader(nested(dataset()), batch_size=3))
    assert (about["rows"], about["batches"]) == (8, 3)
    assert describe_data(DataLoader(Squares()))["rows"] == 7
    assert describe_data(DataLoader(Stream())) == {
        "dataset": "Stream",
        "batches": None,
        "batch_size": 1,
    }
