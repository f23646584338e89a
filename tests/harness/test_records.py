from __future__ import annotations

import copy
import inspect
import json
import pickle
import tracemalloc

import pytest
import torch

import harness
import tracking
from harness import callbacks
from harness.pytree import flatten, restore
from harness.records import (
    MAX_GAP,
    NullRun,
    RecordBook,
    SparseList,
    format_metrics,
    iter_filled,
    metrics_frame,
    pack_records,
    unpack_records,
)
from tests.harness.fakes import At, Line


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
    assert result == {"position": -1, "begin_fit": 1, "wait": True}.get(name)


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


# --- sparse series

FAR = 10**8


def far_book():
    """A book with metrics of epochs 1 and ``FAR``."""
    book = RecordBook()
    book.add("metrics", "train", {"loss": torch.tensor(2.0)}, 1, append=True)
    book.add("metrics", "train", {"loss": torch.tensor(1.5)}, FAR, append=True)
    return book


@pytest.mark.parametrize("step", [FAR, 10**6, MAX_GAP + 1])
def test_index_far_beyond_the_end_takes_no_memory(step):
    book = RecordBook()
    tracemalloc.start()
    for n in range(1, 6):
        book.add("notes", "train", float(n), n * step, append=True)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 20_000
    assert book.count()["notes"] == {"train": 5 * step}
    assert [book.get("notes", "train", n * step) for n in (1, 4)] == [1.0, 4.0]
    assert book.get("notes", "train") == 5.0
    assert book.get("notes", "train", step + 1) is None
    assert book.get("notes", "train", 5 * step + 1) is None
    assert book.check_index("notes", "train", None) == 5 * step + 1


def test_tensor_that_was_logged_before_a_gap_is_read_as_a_number():
    book = RecordBook()
    book.add("notes", "train", torch.tensor(2.0), 1, append=True)
    book.add("notes", "train", 1.5, FAR, append=True)
    assert type(book.read()["notes"]["train"][0]) is float


def test_sparse_series_is_read_as_a_list():
    book = far_book()
    assert isinstance(book.get_series("metrics", "train")[0]["loss"], torch.Tensor)
    series = book.read()["metrics"]["train"]
    assert len(series) == FAR
    assert (series[0], series[1], series[-1]) == ({"loss": 2.0}, None, {"loss": 1.5})
    assert series[:3] == [{"loss": 2.0}, None, None]
    assert list(series[FAR - 2 :]) == [None, {"loss": 1.5}]
    assert list(series[::-1][:1]) == [{"loss": 1.5}]
    assert series != [{"loss": 2.0}]
    assert series == copy.deepcopy(series)
    with pytest.raises(IndexError):
        series[FAR]


def test_sparse_series_is_filled_and_lengthened_as_a_list():
    book = far_book()
    book.add("metrics", "train", {"accuracy": 1.0}, FAR, append=True)
    book.add("metrics", "train", {"loss": 7.0}, 2, append=False)
    book.add("metrics", "train", {"loss": 3.0}, FAR + 2, append=True)
    assert metrics_frame(book.read()).to_numpy().tolist() == [
        ["train", "loss", 1, 2.0],
        ["train", "loss", 2, 7.0],
        ["train", "loss", FAR, 1.5],
        ["train", "accuracy", FAR, 1.0],
        ["train", "loss", FAR + 2, 3.0],
    ]


def test_series_with_small_gaps_stays_a_list():
    book = RecordBook()
    for index in (MAX_GAP, 1, 2 * MAX_GAP):
        book.add("notes", "train", index, index, append=True)
    series = book.read()["notes"]["train"]
    assert type(series) is list
    assert series == [1, *[None] * 998, 1000, *[None] * 999, 2000]


@pytest.mark.parametrize("is_json", [False, True], ids=["checkpoint", "fitted.json"])
def test_sparse_series_comes_back_from_files(is_json):
    records = far_book().read()
    packed = pack_records(records)
    found = json.loads(json.dumps(packed)) if is_json else restore(*flatten(packed))
    assert unpack_records(found) == records
    assert isinstance(unpack_records(found)["metrics"]["train"], SparseList)
    assert pickle.loads(pickle.dumps(records)) == records


@pytest.mark.parametrize(
    "series", [3, "text", {}, {"length": 1}, {"length": 2, "items": 3}]
)
def test_series_of_another_form_is_refused(series):
    with pytest.raises(TypeError, match=r"records/notes/train|not iterable"):
        unpack_records({"notes": {"train": series}})


def test_index_far_beyond_the_end_outlives_saves_and_a_resume(tmp_path):
    def log_far(ctx):
        if ctx.epoch == 1:
            ctx.log("notes", "train", "far", index=FAR)
        ctx.log("notes", "valid", "near")

    def fit(epochs, *others):
        model = harness.setup(Line, loss=torch.nn.MSELoss(), optimizer=torch.optim.Adam)
        data = (torch.ones(4, 1), torch.ones(4, 1))
        given = [At("on_epoch_end", log_far), *others]
        return model.fit(data, epochs, callbacks=given, valid_data=data, verbose=False)

    saver = callbacks.ModelCheckpoint(tmp_path / "checkpoints")
    fit(1, saver)
    fitted = fit(2, callbacks.ResumeFromCheckpoint(tmp_path / "checkpoints"))
    fitted.save(tmp_path / "saved")
    loaded = harness.load(tmp_path / "saved", module=Line)
    for result in (fitted, loaded):
        assert result.records["notes"]["train"][FAR - 1] == "far"
        assert result.records["notes"]["valid"] == ["near", "near"]
        assert len(result.records["metrics"]["train"]) == 2


def test_iter_filled_of_a_range_is_a_part_of_the_whole():
    sparse = SparseList({0: "a", 5_000: "b", 9_000: None, 9_999: "c"}, 10_000)
    plain = [None] * 10_000
    plain[0], plain[5_000], plain[9_999] = "a", "b", "c"  # type: ignore[call-overload]
    for first, last in (
        (1, None),
        (0, 5_000),
        (2, 5_001),
        (5_001, 5_001),
        (10_000, 10**6),
    ):
        expected = [
            pair
            for pair in ((1, "a"), (5_001, "b"), (10_000, "c"))
            if first <= pair[0] <= (last or 10_000)
        ]
        assert list(iter_filled(sparse, first, last)) == expected
        assert list(iter_filled(plain, first, last)) == expected
