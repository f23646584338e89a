from __future__ import annotations

import inspect

import pytest
import torch

import tracking
from harness.records import NullRun, RecordBook, format_metrics, metrics_frame


@pytest.mark.parametrize(
    "name",
    [
        name
        for name, thing in vars(tracking.Run).items()
        if callable(thing) and name[0] != "_"
    ],
)
def test_null_run_takes_every_call_of_a_run(name):
    parameters = inspect.signature(getattr(tracking.Run, name)).parameters
    arguments = {
        name: 0
        for name, parameter in parameters.items()
        if parameter.default is parameter.empty and name not in {"self", "description"}
    }
    result = getattr(NullRun(), name)(**arguments)
    assert result == (-1 if name == "position" else None)


@pytest.mark.parametrize("name", ["id", "path", "mlflow_run_id"])
def test_null_run_has_no_identity(name):
    assert getattr(NullRun(), name) is None


def test_record_book_keeps_tensors_unread_until_records_are_read():
    book = RecordBook()
    book.add("notes", "train", {"a": [torch.tensor(1.5)]}, 2, append=True)
    assert isinstance(book.get_series("notes", "train")[1]["a"][0], torch.Tensor)
    assert book.read()["notes"]["train"] == [None, {"a": [1.5]}]


def test_record_book_counts_without_reading_a_device():
    book = RecordBook()
    book.add("notes", "train", torch.ones((), device="meta"), 3, append=True)
    assert book.count() == {"metrics": {"train": 0, "valid": 0}, "notes": {"train": 3}}


def test_format_metrics_joins_nested_names():
    assert format_metrics({"loss": {"gen": 0.123456}, "note": "x"}) == {
        "loss/gen": "0.1235",
        "note": "x",
    }


def test_metrics_frame_skips_values_without_names():
    frame = metrics_frame({"metrics": {"train": [None, {"loss": 1.0}, 3.0]}})
    assert frame.to_dict("records") == [
        {"set": "train", "metric": "loss", "epoch": 2, "value": 1.0}
    ]
