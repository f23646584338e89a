"""What `data` may be, besides loaders, data sets of torch's and tensors side by side."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset

import harness
from harness.callbacks import AutoResume
from harness.data.loaders import (
    as_dataset,
    as_tensor,
    describe_data,
    make_eval_loader,
    make_train_loader,
    num_items,
)
from tests.harness.fakes import points

X = torch.arange(14.0).view(7, 2)
Y = torch.arange(7)


class Both(nn.Module):
    """A linear model of two inputs, by position or by name."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 3)

    def forward(self, a: Tensor, b: Tensor, labels: Tensor | None = None) -> Tensor:
        return self.fc(torch.cat([a, b], dim=1))


@dataclass
class Sample:
    a: Tensor
    b: Tensor


class Pair(NamedTuple):
    a: Tensor
    b: Tensor


class Table:
    """Rows without torch, as Hugging Face's data sets have them."""

    def __init__(self, rows: list[Any]) -> None:
        self.rows, self.calls = rows, 0

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Any:
        return self.rows[index]


class Whole(Table):
    def __getitems__(self, indices: list[int]) -> list[Any]:
        self.calls += 1
        return [self.rows[index] for index in indices]


class Stream:
    """Batches of another library."""

    def __init__(self, batches: list[Any]) -> None:
        self.batches = batches

    def __iter__(self) -> Any:
        return iter(self.batches)


def rows_of(a: Tensor, b: Tensor, y: Tensor) -> list[tuple[Any, ...]]:
    return list(zip(a, b, y.tolist(), strict=True))


def forms(a: Tensor, y: Tensor) -> dict[str, Any]:
    """The same data in every form."""
    b = a + 1
    rows = rows_of(a, b, y)
    dicts = [{"a": one, "b": two, "labels": label} for one, two, label in rows]
    return {
        "tuple": ((a, b), y),
        "arrays": ((a.numpy(), b.numpy()), y.numpy()),
        "named": ({"a": a, "b": b}, y),
        "labels": {"a": a, "b": b, "labels": y},
        "samples": [((one, two), label) for one, two, label in rows],
        "dicts": dicts,
        "table": Table(dicts),
        "whole": Whole(dicts),
        "batches": Stream(
            [((a[n : n + 8], b[n : n + 8]), y[n : n + 8]) for n in (0, 8)]
        ),
    }


FORMS = forms(*points(16))


@pytest.fixture(scope="module")
def expected() -> harness.Fitted:
    return fit(DataLoader(as_dataset(FORMS["tuple"]), batch_size=8))


def fit(data: Any, **options: Any) -> harness.Fitted:
    learner = harness.setup(
        Both, loss=nn.CrossEntropyLoss(), optimizer=torch.optim.SGD
    ).set_opt_hparams(lr=0.1)
    return learner.fit(data, 2, seed=1, tracker=False, **options)


@pytest.mark.parametrize("name", FORMS)
def test_fit_takes_any_form(name, expected):
    data = FORMS[name]
    options = None if name == "batches" else {"batch_size": 8, "shuffle": False}
    fitted = fit(data, dataloader_options=options)
    assert fitted.records["metrics"] == expected.records["metrics"]
    pred = fitted.predict(data)
    assert torch.equal(pred, expected.predict(FORMS["tuple"]))


class Random:
    """Other batches in each pass, of arrays, and a length that nobody knows."""

    def __iter__(self) -> Any:
        for _ in range(3):
            x = torch.randn(4, 2).numpy()
            yield {"a": x, "b": x, "labels": torch.randint(3, (4,))}


class Fail(harness.Callback):
    """Raises once, in the middle of the second epoch."""

    has_failed = False

    def on_train_batch_end(self) -> None:
        if (self.ctx.epoch, self.ctx.iter, self.has_failed) == (2, 2, False):
            self.has_failed = True
            raise ArithmeticError


@pytest.mark.parametrize("name", ["named", "dicts", "whole", "random"])
def test_fit_of_any_form_resumes_exactly(name, tmp_path):
    data = {**FORMS, "random": Random()}[name]
    options = None if name == "random" else {"batch_size": 4}
    whole = fit(data, dataloader_options=options)
    callbacks = [AutoResume(tmp_path, every_n_steps=1), Fail()]
    with pytest.raises(ArithmeticError):
        fit(data, dataloader_options=options, callbacks=callbacks)
    resumed = fit(data, dataloader_options=options, callbacks=callbacks)
    assert resumed.records["metrics"] == whole.records["metrics"]
    assert torch.equal(resumed.model.fc.weight, whole.model.fc.weight)


@pytest.mark.parametrize("name", ["tuple", "named", "labels", "samples", "table"])
def test_every_form_is_drawn_in_the_order_of_tensors(name):
    torch.manual_seed(3)
    order = [batch[1] for batch in make_train_loader((FORMS["tuple"][1],) * 2)]
    torch.manual_seed(3)
    found = list(make_train_loader(FORMS[name]))
    targets = [b["labels"] if isinstance(b, dict) else b[1] for b in found]
    assert torch.equal(torch.cat(targets), torch.cat(order))


def test_nested_tensors_keep_their_form():
    data = Pair(X, X), {"y": Y, "z": [Y, Y]}
    (pair, target), *_ = make_eval_loader(Subset(as_dataset(data), [1, 2]))
    assert isinstance(pair, Pair)
    assert torch.equal(pair.b, X[1:3])
    assert list(target) == ["y", "z"]
    assert torch.equal(target["z"][1], Y[1:3])
    assert num_items(make_eval_loader(data)) == 2
    assert num_items(make_eval_loader({"a": X, "b": X})) == 1


def test_samples_may_be_dataclasses():
    samples = [Sample(x, x) for x in X]
    loader = make_eval_loader(samples, {"collate_fn": list})
    assert len(loader.dataset) == 7
    assert next(iter(loader))[2] is samples[2]


def test_samples_may_be_any_objects():
    samples = [object() for _ in range(7)]
    loader = make_eval_loader(samples, {"collate_fn": list})
    assert list(loader) == [samples]
    texts = make_eval_loader(["a", "b"], {"collate_fn": "-".join})
    assert list(texts) == ["a-b"]


def test_a_run_names_the_object_that_has_the_rows():
    assert describe_data(make_eval_loader(Table(FORMS["dicts"])))["dataset"] == "Table"
    assert describe_data(make_eval_loader(FORMS["batches"]))["dataset"] == "Stream"


def test_rows_at_once_are_asked_for_at_once():
    table = Whole(FORMS["dicts"])
    list(make_eval_loader(table, {"batch_size": 4}))
    assert table.calls == 4


def test_a_share_of_any_rows_is_held_out():
    fitted = harness.setup(
        Both, loss=nn.CrossEntropyLoss(), optimizer=torch.optim.SGD
    ).fit(FORMS["dicts"], 1, valid_data=0.25, tracker=False)
    assert set(fitted.get_metrics()["set"]) == {"train", "valid"}
    with pytest.raises(ValueError, match="expected data that can be split, got a Data"):
        fit_share(FORMS["batches"])


def fit_share(data: Any) -> None:
    learner = harness.setup(Both, loss=nn.CrossEntropyLoss(), optimizer=torch.optim.SGD)
    learner.fit(data, 1, valid_data=0.25, tracker=False)


@pytest.mark.parametrize(
    ("wrong", "error", "match"),
    [
        ({"a": X, "b": Y[:3]}, ValueError, r"equal length, got lengths \[7, 3\]"),
        ({"a": X, "b": "text"}, TypeError, r"data\['b'\]: .*got str"),
        ((X, (Y, [1, 2])), TypeError, r"data\[1\]\[1\]\[0\]: .*got int"),
        ({1, 2}, TypeError, r"data: .*got set"),
        (
            iter([X]),
            TypeError,
            "data that can be read in each epoch, got list_iterator",
        ),
        ((x for x in X), TypeError, "got generator, which can be read only once"),
        (Table([]), ValueError, "expected at least one row"),
        ([], ValueError, "expected at least one tensor"),
        ([DataLoader(X)], TypeError, r"data\[0\]: .*got DataLoader"),
    ],
)
def test_other_data_are_refused(wrong, error, match):
    with pytest.raises(error, match=match):
        make_train_loader(wrong)


def test_batches_take_no_options():
    with pytest.raises(ValueError, match="expected none with a DataLoader"):
        make_train_loader(FORMS["batches"], {"batch_size": 2})


def test_frames_are_tensors_not_rows():
    pd = pytest.importorskip("pandas")
    frame = pd.DataFrame({"a": [1.0, 2.0]})
    (batch,) = make_eval_loader(frame)
    assert torch.equal(batch[0], torch.tensor([[1.0], [2.0]]))
    assert isinstance(np.asarray(frame), np.ndarray)


def test_arrays_of_any_order_and_frames_of_numbers_are_read():
    values = np.arange(6.0, dtype=np.float32).reshape(3, 2)
    frame = pd.DataFrame(values, columns=["a", "b"])
    frame["c"] = [True, False, True]
    frame["d"] = pd.array([1, None, 3], dtype="Int64")
    assert torch.equal(as_tensor(values[::-1], "x"), torch.tensor(values[::-1].copy()))
    assert torch.equal(as_tensor(values.astype(">f4"), "x"), torch.tensor(values))
    read = as_tensor(frame, "x")
    assert read.dtype == torch.float32
    assert read[:, :3].tolist() == [[0, 1, 1], [2, 3, 0], [4, 5, 1]]
    assert read[:, 3].isnan().tolist() == [False, True, False]


def test_labels_of_a_mapping_reach_only_a_model_that_takes_them():
    given = []

    class Takes(Both):
        def forward(self, a, b=None, labels=None):
            given.append(labels)
            return self.fc(torch.cat([a, a], 1))

    class Leaves(Both):
        def forward(self, a):
            return self.fc(torch.cat([a, a], 1))

    for module in (Takes, Leaves):
        learner = harness.setup(
            module, loss=nn.CrossEntropyLoss(), optimizer=torch.optim.SGD
        )
        fitted = learner.fit({"a": X, "labels": Y % 3}, 1, tracker=False)
        assert fitted.predict({"a": X, "labels": Y}).shape == (7, 3)
        assert fitted.predict({"a": X}).shape == (7, 3)
    assert [item is None for item in given] == [False, False, True]
