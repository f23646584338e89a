"""How a run ended, on any of its ranks."""

from __future__ import annotations

import pytest

import tracking
from tracking.cli.describe import describe_run
from tracking.store import FAILURE, Manifest, get_first_error, get_rank_dir, get_status


@pytest.fixture
def ranks(tmp_path):
    """Runs of ranks 0 and 1 of one run."""
    first = tracking.start(runs_dir=tmp_path, delivery=False)
    second = tracking.start(runs_dir=tmp_path, rank=1, run_id=first.id, delivery=False)
    yield first, second
    second.finish()
    first.finish()


def test_status_of_a_run_nobody_writes_is_killed(tmp_path):
    manifest = Manifest(id="x", name="x")
    manifest.write(tmp_path)
    assert get_status(tmp_path, manifest) == "killed"
    finished = Manifest(id="x", name="x", status="finished")
    assert get_status(tmp_path, finished) == "finished"
    # It finished after the caller had read its manifest.
    finished.write(tmp_path)
    assert get_status(tmp_path, manifest) == "finished"


def test_rank_that_failed_tells_why_where_rank_0_could_not(ranks):
    first, second = ranks
    second.finish("failed", ValueError("boom"))
    first._journal.close()  # as a kill leaves it: no word in the manifest
    past = tracking.open(first.path)
    assert past.status == "failed"
    assert describe_run(past)["error"] == {
        "type": "ValueError",
        "message": "boom (rank 1)",
    }


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_error_is_the_first_of_all_ranks(ranks, order):
    kinds = [RuntimeError("connection closed"), ValueError("boom")]
    for rank in order:
        ranks[rank].finish("failed", kinds[rank])
    found = get_first_error(ranks[0].path, Manifest.read(ranks[0].path))
    assert found is not None
    assert found["type"] == type(kinds[order[0]]).__name__


def test_killed_rank_is_no_failure(ranks):
    first, second = ranks
    second.finish("killed")
    first._journal.close()
    assert tracking.open(first.path).status == "killed"


def test_resumed_run_removes_failures(ranks, tmp_path):
    first, second = ranks
    second.finish("failed", ValueError("boom"))
    first._journal.close()
    with tracking.start(runs_dir=tmp_path, run_id=first.id, delivery=False):
        pass
    past = tracking.open(first.path)
    assert past.status == "finished"
    assert describe_run(past)["error"] is None
    assert past.manifest.resumed[0]["status"] == "failed"


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"message": "torn'])
def test_invalid_failure_file_is_ignored(ranks, text):
    first, second = ranks
    (get_rank_dir(second.path, 1) / FAILURE).write_text(text)
    first._journal.close()
    assert tracking.open(first.path).status == "killed"


class Broken(Exception):
    def __str__(self):
        raise RuntimeError("no text")


def test_exception_without_a_text_ends_the_run_and_reaches_the_caller(tmp_path):
    with (
        pytest.raises(Broken),
        tracking.start(runs_dir=tmp_path, delivery=False) as run,
    ):
        raise Broken
    past = tracking.open(run.path)
    assert past.status == "failed"
    assert past.manifest.error is not None
    assert past.manifest.error["type"] == "Broken"
