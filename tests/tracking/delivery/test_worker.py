"""Delivery of runs to a real MLflow database."""

from __future__ import annotations

import itertools
import shutil
from datetime import datetime

import pytest

from tests.tracking.stores import execute_sql, get_run
from tracking.delivery.state import DeliveryState
from tracking.errors import TrackingError
from tracking.store import results_path

CURVE = 30


def test_every_row_arrives_once_with_its_own_time(
    record, deliver, store, in_mlflow, in_journal
):
    run = record()
    run.log_curve(600)
    run.run.log_step({"loss": 0.5}, step=7)
    run.run.log("profile", "fit", {"epoch_s": 1.5}, index=1)
    run.run.log("metrics", "valid", {"ok": True, "n": 3}, index=2)
    run.run.log("metrics", "valid", "a word", index=2)
    run.run.finish()
    made = deliver(run.path, store)
    points = in_mlflow(store, made.state.mlflow_run_id)
    assert points == in_journal(run.path)
    keys = {key for key, *_ in points}
    assert keys == {
        "train/loss",
        "train/accuracy",
        "train/loss_step",
        "system/fit_epoch_s",
        "valid/ok",
        "valid/n",
    }
    assert made.num_sent == len(points) == 1204
    assert made.state.phase == "done"
    assert made.state.behind == 0


def test_run_of_an_earlier_version_keeps_its_names(record, deliver, store, in_mlflow):
    run = record()
    run.run.log("profile", "fit", {"epoch_s": 1.5}, index=1)
    run.run.manifest.keys = 1  # as read from a file without the field
    run.run.save_manifest()
    run.run.finish()
    made = deliver(run.path, store)
    points = in_mlflow(store, made.state.mlflow_run_id)
    assert [key for key, *_ in points] == ["profile/fit/epoch_s"]


@pytest.mark.parametrize(
    ("status", "wanted"),
    [("finished", "FINISHED"), ("failed", "FAILED"), ("killed", "KILLED")],
)
def test_status_and_end_are_those_of_the_run(
    record, deliver, store, client, status, wanted
):
    run = record()
    run.log_curve(3)
    run.run.finish(status, ValueError("too deep") if status == "failed" else None)
    made = deliver(run.path, store)
    found = get_run(client, store, made.state)
    ended = datetime.fromisoformat(run.run.manifest.ended)
    assert found.info.status == wanted
    assert found.info.end_time == round(ended.timestamp() * 1000)
    error = found.data.tags.get("luz.error")
    assert error == ("ValueError: too deep" if status == "failed" else None)


def test_run_whose_trainer_vanished_is_killed_at_its_last_row(
    record, deliver, store, client, in_mlflow
):
    run = record()
    run.log_curve(3)
    run.run.finish()
    manifest = run.run.manifest
    manifest.status, manifest.ended = "running", None
    manifest.write(run.path)
    made = deliver(run.path, store)
    found = get_run(client, store, made.state)
    assert found.info.status == "KILLED"
    last_ms = max(t for *_, t in in_mlflow(store, made.state.mlflow_run_id))
    assert found.info.end_time == last_ms


def test_resumed_run_continues_in_the_same_mlflow_run(
    record, deliver, store, in_mlflow, in_journal, client
):
    run = record()
    run.log_curve(CURVE)
    run.run.finish("killed")
    first = deliver(run.path, store)
    again = record(run_id=run.run.id)
    again.log_curve(CURVE, first=CURVE)
    again.run.finish()
    second = deliver(run.path, store)
    assert second.state.mlflow_run_id == first.state.mlflow_run_id
    assert second.num_sent == 2 * CURVE
    assert in_mlflow(store, second.state.mlflow_run_id) == in_journal(run.path)
    found = get_run(client, store, second.state)
    assert found.info.status == "FINISHED"
    assert "resumed on" in found.data.tags["mlflow.note.content"]


def test_borrowed_run_takes_the_rows_and_stays_the_callers(
    record, deliver, store, in_mlflow, in_journal, client
):
    setup = record()
    setup.run.finish()
    deliver(setup.path, store)
    own = client(store).create_run("0", run_name="mine")
    made = []
    for _ in range(2):  # two of ours in the one of theirs
        run = record()
        manifest = run.run.manifest
        manifest.mlflow = {"run_id": own.info.run_id, "borrowed": True}
        manifest.write(run.path)
        run.log_curve(CURVE)
        run.run.finish()
        made.append((run, deliver(run.path, store)))
    wanted = sorted(in_journal(made[0][0].path) + in_journal(made[1][0].path))
    assert in_mlflow(store, own.info.run_id) == wanted
    found = client(store).get_run(own.info.run_id)
    assert found.info.status == "RUNNING"
    assert found.info.run_name == "mine"
    assert "mlflow.note.content" not in found.data.tags


def test_delivery_continues_where_mlflow_says_it_ended(
    record, make_worker, store, in_mlflow, in_journal, deliver
):
    run = record()
    run.log_curve(1000)
    run.run.finish()
    deliver(run.path, store)
    (run.path / "delivery" / "state.json").unlink()
    again = record(run_id=run.run.id)
    again.log_curve(10, first=1000)
    again.run.finish()
    made = deliver(run.path, store)
    assert made.num_sent == 20
    assert in_mlflow(store, made.state.mlflow_run_id) == in_journal(run.path)


def test_batch_with_a_lost_watermark_makes_no_duplicates(
    record, deliver, store, in_mlflow, in_journal
):
    run = record()
    run.log_curve(700)
    run.run.finish()
    made = deliver(run.path, store)
    execute_sql(store, "UPDATE tags SET value = '699' WHERE key = 'luz.delivered'")
    again = deliver(run.path, store)
    assert again.num_sent == 700
    assert in_mlflow(store, made.state.mlflow_run_id) == in_journal(run.path)


def test_thinned_series_keeps_its_ends_and_never_exceeds_the_limit(
    record, deliver, store, in_mlflow, in_journal
):
    run = record(delivery={"per_key": 100})
    run.log_curve(1500)
    run.run.log_metric("loss", 1.0, set="valid", index=1)
    run.run.finish()
    made = deliver(run.path, store)
    found = in_mlflow(store, made.state.mlflow_run_id)
    wanted = in_journal(run.path)
    assert set(found) < set(wanted)
    for key in ("train/loss", "train/accuracy"):
        steps = [step for k, step, *_ in found if k == key]
        assert steps[0] == 0
        assert steps[-1] == 1499
        assert 50 <= len(steps) <= 100
        assert max(b - a for a, b in itertools.pairwise(steps)) <= 64
    assert sum(key == "valid/loss" for key, *_ in found) == 1
    again = deliver(run.path, store, is_sync=True)
    assert again.num_sent == 0


def test_series_shorter_than_the_limit_is_sent_whole(
    record, deliver, store, in_mlflow, in_journal
):
    run = record(delivery={"per_key": 100})
    run.log_curve(100)
    run.run.finish()
    made = deliver(run.path, store)
    assert in_mlflow(store, made.state.mlflow_run_id) == in_journal(run.path)


def test_run_that_was_deleted_does_not_come_back(record, deliver, store):
    run = record()
    run.run.finish()
    made = deliver(run.path, store)
    shutil.rmtree(run.path)
    made.state.write(run.path)
    assert not run.path.exists()


@pytest.mark.parametrize(("lookahead_rows", "num_superseded"), [(1, 1), (1 << 20, 0)])
def test_rewind_beyond_the_rows_read_ahead_gives_the_same_history(
    record, deliver, store, in_mlflow, in_journal, lookahead_rows, num_superseded
):
    run = record()
    run.log_curve(50)
    position = run.run.position()
    run.log_curve(20, first=50)
    for _ in range(17):  # more than a block, which is read at once
        run.run.log("notes", "", dict.fromkeys(map(str, range(1000)), "a word"))
    run.run.rewind(position)
    run.log_curve(20, first=50, scale=2.0)
    run.run.finish()
    made = deliver(run.path, store, lookahead_rows=lookahead_rows)
    assert in_mlflow(store, made.state.mlflow_run_id) == in_journal(run.path)
    assert len(made.state.superseded) == num_superseded


@pytest.mark.parametrize("content", [b"", b'{"delivered": "all"}'])
def test_invalid_state_is_logged_and_counts_as_none(
    record, deliver, store, in_mlflow, in_journal, caplog, content
):
    run = record()
    run.log_curve(CURVE)
    run.run.finish()
    first = deliver(run.path, store)
    (run.path / "delivery" / "state.json").write_bytes(content)
    again = deliver(run.path, store)
    assert "state.json: expected" in caplog.text
    assert again.num_sent == 0
    assert again.state.mlflow_run_id == first.state.mlflow_run_id
    assert in_mlflow(store, again.state.mlflow_run_id) == in_journal(run.path)
    assert DeliveryState.read(run.path) == again.state


def test_short_run_takes_one_call_for_params_tags_and_points(
    record, make_worker, store, client, in_mlflow, in_journal
):
    warm = record()
    warm.run.finish()
    make_worker(warm.path, store).deliver()  # makes the database
    run = record(params={"lr": 0.5}, tags={"team": "a"})
    run.run.log_input("train", "training", digest="d", num_rows=3)
    run.log_curve(CURVE)
    run.run.finish()
    made = make_worker(run.path, store)
    seen = spy_on(made)
    made.deliver()
    assert seen == ["create_run", "log_batch", "log_inputs", "set_terminated"]
    assert in_mlflow(store, made.state.mlflow_run_id) == in_journal(run.path)
    found = get_run(client, store, made.state)
    assert found.data.params == {"lr": "0.5"}
    assert found.data.tags["team"] == "a"
    assert [one.dataset.digest for one in found.inputs.dataset_inputs] == ["d"]
    assert found.info.status == "FINISHED"
    again = make_worker(run.path, store)
    seen = spy_on(again)
    again.deliver()  # MLflow has all of it
    assert (again.num_sent, seen) == (0, ["log_inputs", "set_terminated"])


def spy_on(worker):
    """Names of the calls by which a worker writes to MLflow from now on."""
    calls = []
    open_client = worker._resolver._open_client

    class Spy:
        def __init__(self, client):
            self.client = client

        def __getattr__(self, name):
            if not name.startswith(("get_", "search_")):
                calls.append(name)
            return getattr(self.client, name)

    def open_spied(uri):
        found = open_client(uri)
        found._client = Spy(found._client)
        return found

    worker._resolver._open_client = open_spied
    return calls


def test_mlflow_run_that_is_gone_before_its_summaries_stays_away(
    record, make_worker, store, client, tmp_path
):
    run = record()
    run.log_curve(5)
    run.run.finish()

    def write_summaries(path):
        results_path(path).write_text("loss 0.5")
        (tmp_path / "curves.png").write_bytes(b"x")
        return [tmp_path / "curves.png"]

    made = make_worker(run.path, store, write_summaries=write_summaries)
    made.deliver()
    client(store).delete_run(made.state.mlflow_run_id)
    made.send_summaries()
    assert made.state.phase == "done"


def test_summaries_of_a_run_that_goes_on_are_left_out(record, make_worker, store):
    run = record()
    run.log_curve(5)
    run.run.finish("killed")
    written = []
    made = make_worker(run.path, store, write_summaries=lambda path: written)
    made.deliver()
    again = record(run_id=run.run.id)
    made.send_summaries()
    again.log_curve(5, first=5)
    again.run.finish()
    made._write_summaries = lambda path: pytest.fail("the run has new rows")
    made.send_summaries()
    assert made.state.phase == "done"


def test_rows_of_a_store_that_cannot_be_read_again_are_not_counted_as_missing(
    record, deliver, make_worker, store, tmp_path
):
    run = record()
    for i in range(9):
        run.run.log("metrics", "train", {"loss": 0.1 * i}, index=i)
    run.run.finish()
    deliver(run.path, store)
    (tmp_path / "mlflow.db").write_bytes(b"this is no database" * 100)
    with pytest.raises(TrackingError, match="not a database"):
        make_worker(run.path, store, is_sync=True).deliver()
    assert DeliveryState.read(run.path).behind == 0
