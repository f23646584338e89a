"""A run that is continued: what is read of its journal, and where its series go on."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

import tracking
from tracking.journal.block import AutoIndex
from tracking.store import Manifest, get_rank_dir

BAD_INDEX = [2**63, 1.5, "3"]

CONTINUE = """
import sys
opened = []
sys.addaudithook(lambda event, given: event == "open" and opened.append(str(given[0])))
import json, tracking
run_id, runs, seq, indices = sys.argv[1:]
with tracking.start(run_id=run_id, runs_dir=runs, delivery=False) as run:
    run.log("metrics", "train", 1.0, index=9)
    run.rewind(int(seq), indices=json.loads(indices))
    run.log("metrics", "train", {"loss": 0.1}, index=3)
    run.log("notes", "own", "c")
    found = run.get_indices()
print(json.dumps([sum(name.endswith(".arrow") for name in opened), found]))
"""

BLOCKS = 3


@pytest.fixture(scope="module")
def long_run(tmp_path_factory):
    """A run of some blocks, with a position in it and the indices there."""
    runs = tmp_path_factory.mktemp("runs")
    with tracking.start(runs_dir=runs, delivery=False) as run:
        for text in ("a", "b"):
            run.log("notes", "own", text)
        for index in (1, 2):
            run.log("metrics", "train", {"loss": 0.5}, index=index)
        for step in range(BLOCKS * 8192):
            run.log_step({"loss": 0.5}, step=step)
        place = run.position(), run.get_indices()
        run.log("notes", "own", "superseded")
    return run, runs, place


def test_restart_from_a_position_and_its_indices_reads_no_journal(long_run):
    run, runs, (seq, indices) = long_run
    assert indices == {
        "fit": 1,
        "highest": [["notes", "own", 2], ["metrics", "train", 2]],
    }
    words = [run.id, str(runs), str(seq), json.dumps(indices)]
    done = subprocess.run(
        [sys.executable, "-c", CONTINUE, *words],
        env={"PYTHONPATH": str(Path(tracking.__file__).parents[1])},
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    num_read, found = json.loads(done.stdout)
    assert num_read == 0
    assert found == {
        "fit": 1,
        "highest": [["metrics", "train", 3], ["notes", "own", 3]],
    }
    notes = tracking.open(run.path).records("notes")
    assert notes["payload"].to_pylist() == ['"a"', '"b"', '"c"']
    assert notes["index"].to_pylist() == [1, 2, 3]


@pytest.mark.parametrize("is_read", [True, False])
def test_series_continue_after_what_is_on_record(tmp_path, is_read):
    with tracking.start(runs_dir=tmp_path, delivery=False) as run:
        run.log("notes", "own", 1.0)
        run.log("notes", "other", 1.0, index=7)
    options = {"run_id": run.id, "runs_dir": tmp_path, "delivery": False}
    with tracking.start(**options) as run:
        assert run.get_indices() is None
        run.log("notes", "other", 2.0, index=3)  # lower than the highest
        run.log("notes", "new", 1.0, index=5)
        if is_read:
            run.log("notes", "own", 2.0)
        position = run.position()
        run.log("notes", "own", 9.0)
        run.rewind(position, indices=None)
        run.log("notes", "own", 3.0)
        run.log("notes", "other", 3.0)
        run.log("notes", "new", 2.0)
    table = tracking.open(run.path).records("notes")
    found: dict[str, list[int]] = {}
    for row in table.to_pylist():
        found.setdefault(row["set"], []).append(row["index"])
    own = [1, 2, 3] if is_read else [1, 2]
    assert found == {"own": own, "other": [7, 3, 8], "new": [5, 6]}


@pytest.mark.parametrize("is_noted", [True, False])
def test_run_that_was_killed_in_its_second_fit_continues_behind_it(tmp_path, is_noted):
    with tracking.start(runs_dir=tmp_path, delivery=False) as run:
        run.begin_fit()
        run.log("notes", "own", 1.0)
        run.log("metrics", "train", 1.0, index=1, epoch=1)
        assert run.begin_fit() == 2
        run.log("notes", "own", 1.0)
        run._abandon()
    manifest = Manifest.read(run.path)
    assert manifest.num_fits == 2
    if not is_noted:  # as by an earlier version
        manifest.num_fits = None
        manifest.write(run.path)
    options = {"run_id": run.id, "runs_dir": tmp_path, "delivery": False}
    with tracking.start(**options) as run:
        assert run.fit == 1
        run.log("notes", "own", 2.0)
    table = tracking.open(run.path).records("notes")
    assert table["fit"].to_pylist() == [1, 2, 1]
    assert table["index"].to_pylist() == [1, 1, 2]


def test_automatic_index_tells_its_highest_without_taking_one():
    index = AutoIndex(4)
    assert index.highest == 4
    assert index.choose(None, None) == 5
    index.choose(9, None)
    assert index.highest == 9
    assert index.next() == 10
    assert index.highest == 10


def test_segments_are_read_where_an_index_is_needed(long_run):
    run, runs, _ = long_run
    assert len(list(get_rank_dir(run.path, 0).glob("*.arrow"))) > 1
    with tracking.start(run_id=run.id, runs_dir=runs, delivery=False) as again:
        again.log("notes", "own", "d")
    notes = tracking.open(run.path).records("notes")
    assert notes["index"].to_pylist()[-1] == notes.num_rows


def test_refused_index_leaves_the_automatic_index_as_it_is(tmp_path):
    with tracking.start(runs_dir=tmp_path, delivery=False) as run:
        run.log_metric("loss", 1.0)
        for index in BAD_INDEX:
            for value in (1.0, {"loss": 1.0}, {"loss": 1.0, "new": 1.0}, 1):
                with pytest.raises((TypeError, ValueError), match=r"Run\.log.* index"):
                    run.log("metrics", "train", value, index=index)
        run.log("metrics", "train", {"loss": 2.0})
        run.log_metric("loss", 3.0)
    table = tracking.PastRun(run.path).records("metrics", name="loss")
    assert table["index"].to_pylist() == [1, 2, 3]


def test_nothing_follows_the_highest_index_of_all(tmp_path):
    highest = 2**63 - 1
    with tracking.start(runs_dir=tmp_path, delivery=False) as run:
        run.log_metric("loss", 1.0, index=highest)
        with pytest.raises(ValueError, match=f"expected an index below {highest}"):
            run.log_metric("loss", 2.0)
    with tracking.start(runs_dir=tmp_path, delivery=False, run_id=run.id) as run:
        with pytest.raises(ValueError, match=f"expected an index below {highest}"):
            run.log_metric("loss", 2.0)
        run.log_metric("loss", 2.0, index=7)
