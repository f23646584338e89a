from __future__ import annotations

import subprocess
import sys

import pytest

import tracking
from tracking.api import start
from tracking.errors import RunClosedError, RunNotFoundError
from tracking.read import PastRun, list_runs
from tracking.run import Run
from tracking.store import get_rank_dir


@pytest.fixture
def run(tmp_path):
    with start(
        experiment="digits", name="a run", runs_dir=tmp_path, delivery=False
    ) as r:
        yield r


def rows(table, *columns):
    return [tuple(row[c] for c in columns) for row in table.to_pylist()]


def test_records_are_filtered_by_what_set_and_name(run):
    run.log("metrics", "train", {"loss": 1.0, "acc": 2.0}, index=1)
    run.log("metrics", "valid", {"loss": 3.0}, index=1)
    run.log("other", "train", {"loss": 4.0}, index=1)
    past = PastRun(run.path)
    whole = past.records()
    assert [v for v in whole["value"].to_pylist() if v] == [1, 2, 3, 4]
    assert past.records(what="metrics")["value"].to_pylist() == [1, 2, 3]
    assert past.records(what="metrics", set="train")["value"].to_pylist() == [1, 2]
    assert past.records("metrics", "train", "acc")["value"].to_pylist() == [2]
    assert past.records(name="loss")["value"].to_pylist() == [1, 3, 4]
    assert past.records(what="nothing").num_rows == 0
    assert past.records(what="nothing").schema == whole.schema


def test_records_overwritten_are_hidden_and_kept(run):
    run.log("metrics", "train", {"loss": 1.0, "acc": 0.1}, index=1)
    run.log("metrics", "train", {"loss": 2.0}, index=2)
    run.log("metrics", "valid", {"loss": 9.0}, index=1)
    run.log("metrics", "train", {"loss": 1.5}, index=1, append=False)
    run.log("metrics", "train", {"acc": 0.2}, index=1)
    past = PastRun(run.path)
    assert rows(past.records("metrics", "train"), "name", "index", "value") == [
        ("loss", 2, 2.0),
        ("loss", 1, 1.5),
        ("acc", 1, 0.2),
    ]
    shown = past.records("metrics", "train", superseded=True)
    assert rows(shown, "kind", "index", "value", "superseded") == [
        ("float", 1, 1.0, True),
        ("float", 1, 0.1, True),
        ("float", 2, 2.0, False),
        ("overwrite", 1, None, False),
        ("float", 1, 1.5, False),
        ("float", 1, 0.2, False),
    ]


def test_records_rewound_are_hidden_and_overwrites_with_them_undone(run):
    run.log("metrics", "train", 1.0, index=1)
    here = run.position()
    run.log("metrics", "train", 2.0, index=1, append=False)
    run.log("metrics", "train", 3.0, index=2)
    run.rewind(here)
    run.log("metrics", "train", 4.0)
    past = PastRun(run.path)
    table = past.records("metrics")
    assert rows(table, "index", "value") == [(1, 1.0), (2, 4.0)]
    shown = past.records(superseded=True, what="metrics")
    assert rows(shown, "value", "superseded") == [
        (1.0, False),
        (None, False),
        (2.0, True),
        (3.0, True),
        (4.0, False),
    ]


def test_records_of_all_ranks_are_joined(run, tmp_path):
    run.log("metrics", "train", 1.0, index=1)
    with start(run_id=run.id, rank=2, runs_dir=tmp_path) as other:
        other.log("metrics", "train", 2.0, index=1)
    past = PastRun(run.path)
    assert rows(past.records("metrics"), "rank", "value") == [(0, 1.0), (2, 2.0)]
    assert past.records("metrics", rank=2)["value"].to_pylist() == [2.0]
    assert past.wide().to_pylist() == [{"index": 1, "train": 1.0}]


def test_wide_has_a_row_per_index_and_a_column_per_metric(run):
    run.log("metrics", "train", {"loss": 1.0, "acc": True}, index=1)
    run.log("metrics", "valid", {"loss": 3.0, "text": "not numeric"}, index=2)
    run.log("metrics", "train", {"loss": 5.0}, index=2)
    run.log("metrics", "train", {"loss": 6.0}, index=2)
    run.log("metrics", "", {"lr": 0.1}, index=2)
    assert PastRun(run.path).wide().to_pylist() == [
        {
            "index": 1,
            "train/loss": 1.0,
            "train/acc": 1.0,
            "valid/loss": None,
            "lr": None,
        },
        {
            "index": 2,
            "train/loss": 6.0,
            "train/acc": None,
            "valid/loss": 3.0,
            "lr": 0.1,
        },
    ]


def test_summary_has_last_least_and_greatest(run):
    for index, value in enumerate((3.0, 1.0, 2.0), start=1):
        run.log_metric("loss", value, set="valid", index=index)
    assert PastRun(run.path).summary() == {
        "valid/loss": {"last": 2.0, "min": 1.0, "max": 3.0, "count": 3}
    }


def log_two_fits(run):
    """Two epochs of one fit, one of another, and values beside them."""
    run.log_params({"lr": 0.1, "depth": 2})
    assert run.begin_fit() == 1
    for epoch, loss in ((1, 0.5), (2, 0.25)):
        run.log("metrics", "train", {"loss": loss}, epoch, epoch=epoch, step=epoch)
    run.log_step({"loss": 0.3}, step=1)
    run.end_fit()
    run.log_metric("fold", 1.0, set="", index=1)
    assert run.begin_fit() == 2
    run.log_params({"lr": 0.5, "depth": 2, "width": 8})
    run.log("metrics", "train", {"loss": 9.0}, 1, epoch=1, step=1)
    run.log("metrics", "train", {"loss": 8.0}, 1, append=False, epoch=1, step=1)
    run.log_step({"loss": 8.5}, step=1)
    run.end_fit()
    run.log_metric("fold", 2.0, set="", index=2)


def test_fits_of_one_run_have_rows_of_their_own(run):
    log_two_fits(run)
    past = PastRun(run.path)
    assert past.wide().to_pylist() == [
        {"fit": 1, "index": 1, "train/loss": 0.5, "fold": 1.0, "train/loss_step": 0.3},
        {"fit": 1, "index": 2, "train/loss": 0.25, "fold": 2, "train/loss_step": None},
        {"fit": 2, "index": 1, "train/loss": 8, "fold": None, "train/loss_step": 8.5},
    ]
    found = {key: (one["last"], one["count"]) for key, one in past.summary().items()}
    assert found == {
        "train/loss": (0.25, 2),
        "fold": (2.0, 2),
        "train/loss_step": (0.3, 1),
        "train/loss_fit2": (8.0, 1),
        "train/loss_step_fit2": (8.5, 1),
    }
    assert rows(past.records("metrics", "train"), "fit", "epoch", "value") == [
        (1, 1, 0.5),
        (1, 2, 0.25),
        (2, 1, 8.0),
    ]
    at = past.records().column_names.index("fit")
    assert past.records().column_names[at + 1] == "epoch"


def test_params_that_differ_in_a_later_fit_are_named_after_it(run):
    log_two_fits(run)
    params = {"lr": 0.1, "depth": 2, "lr_fit2": 0.5, "width_fit2": 8}
    assert PastRun(run.path).params == params


def test_fits_that_a_rewind_superseded_leave_no_trace(run):
    position = run.position()
    log_two_fits(run)
    run.rewind(position)
    run.log("metrics", "train", {"loss": 1.0}, epoch=1)
    past = PastRun(run.path)
    assert past.wide().to_pylist() == [{"index": 1, "train/loss": 1.0}]
    assert "fit" not in past.records().column_names
    shown = past.records("metrics", "train", superseded=True)
    assert set(shown["fit"].to_pylist()) == {1, 2}


def test_fit_goes_on_after_a_rewind_into_it_and_in_another_process(run, tmp_path):
    run.log("metrics", "train", {"loss": 1.0}, epoch=1)
    assert run.begin_fit() == 2
    run.log("metrics", "train", {"loss": 2.0}, epoch=1)
    inside = run.position()
    run.log("metrics", "train", {"loss": 3.0}, epoch=2)
    run.end_fit()
    run.finish()
    with start(run_id=run.id, runs_dir=tmp_path, delivery=False) as again:
        again.rewind(inside)
        assert again.fit == 2
        again.log("metrics", "train", {"loss": 4.0}, epoch=2)
        assert again.begin_fit() == 3
        assert again.begin_fit() == 3  # the first one logged nothing
        again.log_metric("loss", 5.0)
    table = PastRun(run.path).records("metrics")
    assert rows(table, "fit", "index", "value") == [
        (1, 1, 1.0),
        (2, 1, 2.0),
        (2, 2, 4.0),
        (3, 1, 5.0),
    ]


def test_values_logged_without_an_epoch_are_no_fit(run):
    run.log_metric("rows", 100, index=1)
    assert run.begin_fit() == 1
    assert run.begin_fit() == 1
    run.log_metric("loss", 0.5)
    assert run.begin_fit() == 2


def test_tensor_belongs_to_the_fit_that_logged_it(run):
    import torch  # noqa: PLC0415

    run.log("metrics", "train", {"loss": 0.5}, epoch=1)
    run.begin_fit()
    run.log("metrics", "train", {"loss": torch.tensor(0.25)}, epoch=1)
    run.end_fit()
    run.flush()
    table = PastRun(run.path).records("metrics")
    assert rows(table, "fit", "value") == [(1, 0.5), (2, 0.25)]


def test_series_beside_the_fits_continue_after_an_empty_fit(run):
    run.log_metric("rows", 100, index=5)
    run.begin_fit(3)
    assert run.begin_fit() == 1  # no row has an epoch
    run.log_metric("rows", 200)
    assert rows(PastRun(run.path).records("metrics"), "index") == [(5,), (6,)]


@pytest.mark.parametrize(
    ("number", "match"),
    [(0, "from 1, got 0"), ("2", "an integer .*, got '2'")],
)
def test_wrong_number_of_a_fit_is_refused(run, number, match):
    refused = pytest.raises((TypeError, ValueError), match=rf"_fit: expected .*{match}")
    with refused:
        run.begin_fit(number)
    with refused:
        run.end_fit(number)
    assert run.fit == 1


def test_fit_in_a_finished_run_is_refused(run):
    run.finish()
    with pytest.raises(RunClosedError):
        run.begin_fit()


def test_metric_with_the_name_of_a_later_fit_is_numbered(run):
    run.log("metrics", "", {"a_fit2": 1.0, "a": 2.0}, epoch=1)
    run.begin_fit()
    run.log("metrics", "", {"a": 3.0}, epoch=1)
    found = {key: one["last"] for key, one in PastRun(run.path).summary().items()}
    assert found == {"a_fit2": 1.0, "a": 2.0, "a_fit2#2": 3.0}


def test_run_that_was_killed_in_a_later_fit_continues_beside_it(run, tmp_path):
    run.log("metrics", "train", {"loss": 1.0}, epoch=1)
    run.begin_fit()
    run.log("metrics", "train", {"loss": 2.0}, epoch=1)
    inside = run.position()
    run.finish("killed")
    with start(run_id=run.id, runs_dir=tmp_path, delivery=False) as again:
        assert again.fit == 1
        again.rewind(inside)
        assert again.fit == 2


def test_metric_called_fit_is_a_column(run):
    run.log_metric("fit", 1.0, set="")
    past = PastRun(run.path)
    assert past.wide().to_pylist() == [{"index": 1, "fit": 1.0}]
    assert past.summary()["fit"]["last"] == 1.0
    run.begin_fit(2)
    run.log_metric("fit", 3.0, set="")
    assert past.wide().to_pylist()[1] == {"fit": 2, "index": 1, "fit#2": 3.0}
    assert past.summary()["fit#2_fit2"]["last"] == 3.0


def test_params_and_tags_are_the_last_of_each(run):
    run.log_params({"lr": 0.1, "net": {"layers": [1, 2]}, "big": 2**70, "none": None})
    run.log_params({"lr": 0.2})
    run.set_tags({"stage": "first"})
    run.set_tags({"stage": "second", "n": 1})
    past = PastRun(run.path)
    assert past.params == {"lr": 0.2, "net/layers": [1, 2], "big": 2**70, "none": None}
    assert past.tags == {"stage": "second", "n": 1}


def test_empty_run_reads_as_empty(tmp_path):
    Run(tmp_path / "x", None).finish()
    past = PastRun(tmp_path / "x")
    assert past.records().num_rows == 0
    assert past.records(superseded=True).column_names[-1] == "superseded"
    assert past.wide().num_rows == 0
    assert (past.summary(), past.params, past.damage) == ({}, {}, [])


def test_open_and_list_find_what_was_started(run, tmp_path, monkeypatch):
    monkeypatch.setenv("HARNESS_RUNS", str(tmp_path))
    past = tracking.open("a run")
    assert (past.id, past.name, past.path) == (run.id, "a run", run.path)
    assert [found.id for found in tracking.list_runs()] == [run.id]
    assert list_runs(tmp_path / "nowhere") == []
    assert run.id in repr(past)
    with pytest.raises(RunNotFoundError, match=r"Nearest: a run"):
        tracking.open("a rum")


def test_status_of_a_live_run_is_running_then_as_it_ended(tmp_path):
    run = start(runs_dir=tmp_path, delivery=False)
    past = PastRun(run.path)
    assert past.status == "running"
    run.finish("failed")
    assert past.status == "failed"


KILLED = """
import os, signal, sys
import tracking
run = tracking.start(runs_dir=sys.argv[1], delivery=False)
run.log("metrics", "train", 0.5)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_status_of_a_killed_run_is_killed(tmp_path, root):
    line = [sys.executable, "-c", KILLED, str(tmp_path)]
    assert subprocess.run(line, cwd=root, check=False).returncode == -9
    (past,) = list_runs(tmp_path)
    assert past.status == "killed"
    assert past.manifest.status == "running"
    assert past.records("metrics")["value"].to_pylist() == [0.5]


def test_damage_of_all_ranks_is_told(run):
    run.log("metrics", "train", 1.0)
    run.finish()
    path = get_rank_dir(run.path, 0) / "000000.arrow"
    path.write_bytes(path.read_bytes()[:600])  # inside the one batch
    past = PastRun(run.path)
    (damage,) = past.damage
    assert damage.file == path
    assert damage.rows_lost >= 1
    assert past.records().num_rows == 0


def test_wide_and_summary_have_a_column_for_each_of_names_that_meet(tmp_path):
    with tracking.start(runs_dir=tmp_path, delivery=False) as run:
        run.log_metric("b", 1.0, set="train/a", index=10**8)
        run.log_metric("a/b", 2.0, set="train", index=10**8)
        run.log_metric("index", 7.0, set="", index=10**8)
    past = PastRun(run.path)
    assert past.wide().to_pydict() == {
        "index": [10**8],
        "train/a/b": [1.0],
        "train/a/b#2": [2.0],
        "index#2": [7.0],
    }
    assert [one["last"] for one in past.summary().values()] == [1.0, 2.0, 7.0]


def test_wide_and_summary_have_the_values_of_steps(tmp_path):
    with start(runs_dir=tmp_path, delivery=False) as run:
        for step in (1, 2, 3, 10**8):
            run.log_step({"loss": step / 2, "a": {"b": 1}}, step=step)
        run.log_metric("loss", 7.0, index=2)
        run.log("metrics", "valid", {"now": 5.0}, step=3)
    past = PastRun(run.path)
    assert past.wide().to_pydict() == {
        "index": [1, 2, 3, 10**8],
        "train/loss": [None, 7.0, None, None],
        "valid/now_step": [None, None, 5.0, None],
        "train/loss_step": [0.5, 1.0, 1.5, 5e7],
        "train/a/b_step": [1.0, 1.0, 1.0, 1.0],
    }
    assert past.summary()["train/loss_step"] == {
        "last": 5e7,
        "min": 0.5,
        "max": 5e7,
        "count": 4,
    }


def test_snapshot_with_known_blocks_reads_only_what_is_new(tmp_path):
    options = {"runs_dir": tmp_path, "delivery": False, "save_diff": False}
    with tracking.start(**options) as run:
        run.log_metric("loss", 0.5)
    past, known = tracking.PastRun(run.path), {}
    assert past.snapshot(known).records.num_rows == 1
    (path,) = known
    with tracking.start(run_id=run.id, **options) as run:
        run.log_metric("loss", 0.25)
        assert past.snapshot(known).records.equals(past.records())
    path.write_bytes(b"")  # it is not looked at any more
    assert past.snapshot(known).records["value"].to_pylist() == [0.5, 0.25]
    assert len(known) == 2


@pytest.mark.parametrize("word", ["what", "set", "name"])
def test_records_of_something_that_is_no_name_are_refused(tmp_path, word):
    with pytest.raises(
        TypeError, match=rf"PastRun.records: expected a .* as {word}, got"
    ):
        PastRun(tmp_path).records(**{word: ["a"]})
