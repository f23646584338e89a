"""Delivery of runs to a real MLflow database."""

from __future__ import annotations

import fcntl
import itertools
import json
import math
import os
import shutil
import sqlite3
import subprocess
import sys
import threading
from contextlib import closing
from datetime import datetime
from pathlib import Path

import pytest

import tracking
from tracking.delivery.options import check_options
from tracking.delivery.process import delivery_command, wait_for_delivery
from tracking.delivery.retry import GaveUpError
from tracking.delivery.state import DeliveryState
from tracking.mlflow_store.runs import RunResolver
from tracking.mlflow_store.uris import resolve_uri
from tracking.settings import Settings

CURVE = 30


def run_of(client, store, state):
    return client(store).get_run(state.mlflow_run_id)


def all_runs(client, store):
    return client(store).search_runs(
        [e.experiment_id for e in client(store).search_experiments()]
    )


def change(store, statement):
    with closing(sqlite3.connect(store.removeprefix("sqlite:///"))) as db, db:
        return db.execute(statement).fetchall()


# ------------------------------------------------------------------ rows and points


def test_every_row_arrives_once_with_its_own_time(
    record, deliver, store, in_mlflow, in_journal
):
    run = record()
    run.log_curve(2500)
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
        "profile/fit/epoch_s",
        "valid/ok",
        "valid/n",
    }
    assert made.num_sent == len(points) == 5004
    assert made.state.phase == "done"
    assert made.state.behind == 0


def test_values_that_mlflow_cannot_hold_are_flagged(
    record, deliver, store, in_mlflow, client
):
    run = record()
    values = {"pos": math.inf, "neg": -math.inf, "nan": math.nan, "big": 2**53 + 1}
    run.run.log("metrics", "train", values, index=1)
    run.run.log("metrics", "train", {"huge": 10**400, "zero": -0.0}, index=1)
    run.run.finish()
    made = deliver(run.path, store)
    found = {k: v for k, _, v, _ in in_mlflow(store, made.state.mlflow_run_id)}
    assert found["train/pos"] == sys.float_info.max
    assert found["train/neg"] == -sys.float_info.max
    assert math.isnan(found["train/nan"])
    assert found["train/big"] == 2.0**53
    assert found["train/huge"] == sys.float_info.max
    flags = json.loads(run_of(client, store, made.state).data.tags["luz.flags"])
    assert flags["infinite"] == {"train/pos": 1, "train/neg": 1, "train/huge": 1}
    assert flags["large_int"] == {"train/big": 1, "train/huge": 1}
    assert made.state.flags == flags


def test_equal_values_of_one_instant_are_all_kept(record, deliver, store, in_mlflow):
    run = record()
    for _ in range(50):
        run.run.log_metric("loss", 0.5, set="train", index=1)
        run.run.log_metric("nan", math.nan, set="train", index=1)
    run.run.finish()
    made = deliver(run.path, store)
    points = in_mlflow(store, made.state.mlflow_run_id)
    assert len(points) == 100
    again = deliver(run.path, store, is_sync=True)
    assert again.num_sent == 0
    assert len(in_mlflow(store, made.state.mlflow_run_id)) == 100


def test_names_that_mlflow_refuses_are_mapped_and_the_mapping_kept(
    record, deliver, store, in_mlflow, client
):
    run = record()
    names = [
        "a#b",
        "a%b",
        "",
        "x" * 300,
        "../up",
        "/abs",
        "a//b",
        "ü",
        ".",
        "two\nlines",
    ]
    for number, name in enumerate(names):
        run.run.log("metrics", "train", {name: float(number)}, index=1)
    run.run.log("metrics", "train/a", {"b": 100.0}, index=1)
    run.run.log("metrics", "train", {"a/b": 101.0}, index=1)
    run.run.log("metrics", "", {"": 102.0}, index=1)
    run.run.finish()
    made = deliver(run.path, store)
    keys = {v: k for k, _, v, _ in in_mlflow(store, made.state.mlflow_run_id)}
    assert len(keys) == len(names) + 3
    assert keys[7.0] == "train/ü"
    assert keys[100.0] == "train/a/b"
    assert keys[101.0].startswith("train/a/b-")
    told = json.loads(run_of(client, store, made.state).data.tags["luz.names"])
    assert told[keys[0.0]] == ["metrics", "train", "a#b"]
    assert told[keys[101.0]] == ["metrics", "train", "a/b"]
    assert set(told) == set(made.state.names)
    assert keys[7.0] not in told


def test_row_that_mlflow_refuses_holds_up_nothing(
    record, deliver, store, in_mlflow, in_journal, client
):
    first = record()
    first.run.finish()
    deliver(first.path, store)  # makes the database
    change(
        store,
        "CREATE TRIGGER no BEFORE INSERT ON metrics WHEN NEW.key = 'train/bad' "
        "BEGIN SELECT RAISE(ABORT, 'not this one'); END",
    )
    run = record()
    run.log_curve(100)
    run.run.log_metric("bad", 1.0, set="train", index=1)
    run.log_curve(100, first=100)
    run.run.finish()
    made = deliver(run.path, store)
    wanted = [point for point in in_journal(run.path) if point[0] != "train/bad"]
    assert in_mlflow(store, made.state.mlflow_run_id) == wanted
    flags = json.loads(run_of(client, store, made.state).data.tags["luz.flags"])
    assert "not this one" in flags["refused"]["train/bad"]
    change(store, "DROP TRIGGER no")
    again = deliver(run.path, store, is_sync=True)
    assert again.state.flags == {}
    assert run_of(client, store, again.state).data.tags["luz.flags"] == "{}"
    assert in_mlflow(store, made.state.mlflow_run_id) == in_journal(run.path)


# ---------------------------------------------------------- params, tags, artifacts


def test_params_are_sent_once_and_a_change_is_flagged(record, deliver, store, client):
    run = record(params={"lr": 0.1, "layers": [1, 2], "on": True, "no": None})
    run.run.log_params({"lr": 0.2, "long": "x" * 7000, "big": 2**70, "a#b": "odd"})
    run.run.finish()
    made = deliver(run.path, store)
    data = run_of(client, store, made.state).data
    odd = next(key for key in data.params if key.startswith("a_b-"))
    assert data.params == {
        "lr": "0.1",
        "layers": "[1,2]",
        "on": "True",
        "no": "None",
        "long": "x" * 6000,
        "big": str(2**70),
        odd: "odd",
    }
    flags = json.loads(data.tags["luz.flags"])
    assert flags == {"changed_param": {"lr": 1}, "long_param": {"long": 7000}}
    assert json.loads(data.tags["luz.changed_params"]) == {"lr": "0.2"}


def test_tags_take_the_last_value_and_leave_our_own_alone(
    record, deliver, store, client
):
    run = record(tags={"a": 1, "luz.run_id": "mine", "long": "y" * 9000})
    run.run.set_tags({"a": 2})
    run.run.finish()
    made = deliver(run.path, store)
    tags = run_of(client, store, made.state).data.tags
    assert tags["a"] == "2"
    assert tags["luz.run_id"] == run.run.id
    assert "mine" in tags.values()
    assert tags["long"] == "y" * 8000
    assert json.loads(tags["luz.flags"])["long_tag"] == {"long": 9000}


def test_artifacts_lie_at_their_paths_and_a_later_one_replaces(
    record, deliver, store, client, tmp_path
):
    run = record()
    run.run.log_text("one", "notes/a.txt")
    run.run.log_text("two", "notes/a.txt")
    run.run.log_text("gone", "gone.txt")
    (run.path / "artifacts" / "gone.txt").unlink()
    run.run.finish()
    made = deliver(run.path, store)
    found = client(store)
    (item,) = found.list_artifacts(made.state.mlflow_run_id, "notes")
    local = found.download_artifacts(made.state.mlflow_run_id, item.path, str(tmp_path))
    assert Path(local).read_text() == "two"
    assert "not in the run's folder" in made.state.flags["refused"]["gone.txt"]


def test_data_set_in_two_contexts_is_shown_in_both(record, deliver, store, client):
    run = record()
    for context in ("train", "valid", "train"):
        run.run.log_input("digits", context, digest="3f2a", num_samples=1797)
    run.run.finish()
    made = deliver(run.path, store)
    inputs = run_of(client, store, made.state).inputs.dataset_inputs
    found = {i.tags[0].value: (i.dataset.name, i.dataset.profile) for i in inputs}
    assert found == dict.fromkeys(
        ("train", "valid"), ("digits", '{"num_samples": 1797}')
    )


def test_run_page_tells_what_ran_and_where_its_records_are(
    record, deliver, store, client
):
    run = record(name="first light", note="Tried **this**.")
    run.run.finish()
    made = deliver(run.path, store)
    found = run_of(client, store, made.state)
    tags = found.data.tags
    assert found.info.run_name == "first light"
    manifest = run.run.manifest
    created = datetime.fromisoformat(manifest.created)
    assert found.info.start_time == round(created.timestamp() * 1000)
    assert tags["mlflow.user"] == manifest.user
    assert tags["mlflow.source.type"] == "LOCAL"
    note = tags["mlflow.note.content"]
    assert note.startswith("Tried **this**.")
    assert str(run.path) in note
    assert f"harness runs show {run.run.id}" in note
    experiment = client(store).get_experiment(found.info.experiment_id)
    assert experiment.name == "digits"


# ------------------------------------------------------------------------- status


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
    found = run_of(client, store, made.state)
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
    found = run_of(client, store, made.state)
    assert found.info.status == "KILLED"
    last_ms = max(t for *_, t in in_mlflow(store, made.state.mlflow_run_id))
    assert found.info.end_time == last_ms


def test_run_that_is_gone_on_with_is_running_again_in_the_same_mlflow_run(
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
    found = run_of(client, store, second.state)
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


# ------------------------------------------------- going on, and what is superseded


def test_delivery_goes_on_where_mlflow_says_it_was(
    record, worker, store, in_mlflow, in_journal, deliver
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


def test_batch_whose_mark_was_lost_is_not_doubled(
    record, deliver, store, in_mlflow, in_journal
):
    run = record()
    run.log_curve(700)
    run.run.finish()
    made = deliver(run.path, store)
    change(store, "UPDATE tags SET value = '699' WHERE key = 'luz.delivered'")
    again = deliver(run.path, store)
    assert again.num_sent == 700
    assert in_mlflow(store, made.state.mlflow_run_id) == in_journal(run.path)


def test_what_is_superseded_already_is_never_sent(record, deliver, store, in_mlflow):
    run = record()
    run.run.log_metric("loss", 3.0, set="valid", index=1)
    run.run.log("metrics", "valid", {"loss": 2.0}, index=1, append=False)
    position = run.run.position()
    run.run.log_metric("loss", 9.0, set="valid", index=2)
    run.run.rewind(position)
    run.run.log_metric("loss", 1.0, set="valid", index=2)
    run.run.finish()
    made = deliver(run.path, store)
    found = in_mlflow(store, made.state.mlflow_run_id)
    assert [point[1:3] for point in found] == [(1, 2.0), (2, 1.0)]
    assert made.num_sent == 2


@pytest.mark.parametrize("is_live", [True, False])
def test_equal_replay_after_a_rewind_is_not_sent_twice(
    record, worker, deliver, store, in_mlflow, is_live
):
    run = record()
    run.log_curve(20)
    position = run.run.position()
    run.log_curve(20, first=20)
    run.run.log("profile", "fit", {"epoch_s": 1.25}, index=1)
    run.run.finish("killed")
    first = deliver(run.path, store)
    before = in_mlflow(store, first.state.mlflow_run_id)
    again = record(run_id=run.run.id)
    again.run.rewind(position)
    again.log_curve(20, first=20)
    again.run.log("profile", "fit", {"epoch_s": 1.5}, index=1)  # never the same twice
    again.log_curve(1, first=40)
    again.run.finish()
    second = deliver(run.path, store, is_sync=not is_live)
    assert second.state.mlflow_run_id == first.state.mlflow_run_id
    after = in_mlflow(store, first.state.mlflow_run_id)
    assert [p for p in after if p[1] != 40] == before
    assert len(after) == len(before) + 2


def test_differing_replay_moves_to_a_fresh_run_without_a_zigzag(
    record, deliver, store, in_mlflow, in_journal, client
):
    run = record()
    run.log_curve(20)
    position = run.run.position()
    run.log_curve(20, first=20)
    run.run.finish("killed")
    first = deliver(run.path, store)
    again = record(run_id=run.run.id)
    again.run.rewind(position)
    again.log_curve(20, first=20, scale=2.0)
    again.run.finish()
    second = deliver(run.path, store)
    fresh = second.state.mlflow_run_id
    assert fresh != first.state.mlflow_run_id
    assert in_mlflow(store, fresh) == in_journal(run.path)
    old = client(store).get_run(first.state.mlflow_run_id)
    assert old.data.tags["luz.superseded_by"] == fresh
    assert old.info.run_name == f"{run.run.name} (superseded)"
    assert second.state.superseded == [first.state.mlflow_run_id]
    assert run_of(client, store, second.state).info.status == "FINISHED"
    third = deliver(run.path, store, is_sync=True)
    assert (third.num_sent, third.state.mlflow_run_id) == (0, fresh)


def test_rewound_run_that_ends_earlier_leaves_no_stale_points(
    record, deliver, store, in_mlflow, in_journal
):
    run = record()
    run.log_curve(5)
    position = run.run.position()
    run.log_curve(10, first=5)
    run.run.finish("killed")
    deliver(run.path, store)
    again = record(run_id=run.run.id)
    again.run.rewind(position)
    again.log_curve(2, first=5)
    again.run.finish()
    made = deliver(run.path, store)
    assert in_mlflow(store, made.state.mlflow_run_id) == in_journal(run.path)


def test_run_killed_in_its_replay_keeps_its_place_until_it_is_synced(
    record, deliver, store, in_mlflow, in_journal
):
    run = record()
    run.log_curve(5)
    position = run.run.position()
    run.log_curve(10, first=5)
    run.run.finish("killed")
    first = deliver(run.path, store)
    again = record(run_id=run.run.id)
    again.run.rewind(position)
    again.log_curve(2, first=5)
    again.run.finish("killed")
    second = deliver(run.path, store)
    assert second.state.mlflow_run_id == first.state.mlflow_run_id
    synced = deliver(run.path, store, is_sync=True)
    assert synced.state.mlflow_run_id != first.state.mlflow_run_id
    assert in_mlflow(store, synced.state.mlflow_run_id) == in_journal(run.path)


@pytest.mark.parametrize(("value", "is_same_run"), [(3.0, True), (2.0, False)])
def test_overwrite_of_what_mlflow_has_ends_in_one_history(
    record, deliver, store, in_mlflow, in_journal, client, value, is_same_run
):
    run = record()
    run.run.log_metric("loss", 3.0, set="valid", index=1)
    run.run.finish("killed")
    first = deliver(run.path, store)
    again = record(run_id=run.run.id)
    again.run.log("metrics", "valid", {"loss": value}, index=1, append=False)
    again.run.log_metric("loss", 1.0, set="valid", index=2)
    again.run.finish()
    second = deliver(run.path, store)
    is_same = second.state.mlflow_run_id == first.state.mlflow_run_id
    assert is_same == is_same_run
    found = in_mlflow(store, second.state.mlflow_run_id)
    wanted = [point[1:3] for point in in_journal(run.path)]
    assert [point[1:3] for point in found] == wanted == [(1, value), (2, 1.0)]
    assert second.state.behind == 0


def test_overwrite_while_the_run_goes_on_is_settled_at_its_end(
    record, delivering, store, until, in_mlflow, in_journal
):
    run = record()
    run.run.log("metrics", "valid", {"loss": 3.0}, index=1, append=False)
    work = delivering(run.path, store)
    until(lambda: work.state.delivered >= 1)
    first = work.state.mlflow_run_id
    run.run.log("metrics", "valid", {"loss": 2.0}, index=1, append=False)
    run.run.log("metrics", "valid", {"loss": 9.0}, index=2, append=False)
    until(lambda: work.state.delivered >= run.run.position())
    assert [point[1:3] for point in in_mlflow(store, first)] == [(1, 3.0), (2, 9.0)]
    until(lambda: work.state.behind == 1)
    run.run.finish(wait_s=0)
    state = work.join()
    assert state.superseded == [first]
    assert in_mlflow(store, state.mlflow_run_id) == in_journal(run.path)


def test_rewind_while_the_run_goes_on_moves_at_the_first_difference(
    record, delivering, store, until, in_mlflow, in_journal
):
    run = record()
    run.log_curve(5)
    position = run.run.position()
    run.log_curve(5, first=5)
    work = delivering(run.path, store)
    until(lambda: work.state.delivered >= run.run.position())
    first = work.state.mlflow_run_id
    run.run.rewind(position)
    run.log_curve(2, first=5)
    until(lambda: work.state.delivered >= run.run.position())
    assert work.state.mlflow_run_id == first
    assert len(in_mlflow(store, first)) == 20
    run.log_curve(3, first=7, scale=2.0)
    until(lambda: work.state.mlflow_run_id != first)
    run.run.finish(wait_s=0)
    state = work.join()
    assert in_mlflow(store, state.mlflow_run_id) == in_journal(run.path)


def test_move_that_was_cut_short_is_finished_by_the_next_delivery(
    record, deliver, store, in_mlflow, in_journal, client
):
    run = record()
    run.log_curve(20)
    run.run.finish()
    first = deliver(run.path, store)
    made = client(store).get_run(first.state.mlflow_run_id)
    tags = {"luz.run_id": run.run.id, "luz.supersedes": made.info.run_id}
    fresh = client(store).create_run(made.info.experiment_id, tags=tags)
    (run.path / "delivery" / "state.json").unlink()
    second = deliver(run.path, store)
    assert second.state.mlflow_run_id == fresh.info.run_id
    assert in_mlflow(store, fresh.info.run_id) == in_journal(run.path)
    old = client(store).get_run(made.info.run_id)
    assert old.data.tags["luz.superseded_by"] == fresh.info.run_id


# ----------------------------------------------------------------- thinned delivery


def test_thinned_series_keeps_its_ends_and_never_exceeds_the_number(
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


def test_series_shorter_than_the_number_is_sent_whole(
    record, deliver, store, in_mlflow, in_journal
):
    run = record(delivery={"per_key": 100})
    run.log_curve(100)
    run.run.finish()
    made = deliver(run.path, store)
    assert in_mlflow(store, made.state.mlflow_run_id) == in_journal(run.path)


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"per_kay": 3}, ValueError, "expected per_key or patience_s, got 'per_kay'"),
        ({"per_key": 1}, ValueError, "a whole number of at least 2, got 1"),
        ({"per_key": 2.5}, TypeError, "a whole number of at least 2, got 2.5"),
        ({"patience_s": -1}, ValueError, "a number of at least 0, got -1"),
    ],
)
def test_wrong_options_are_refused_at_the_start(options, error, match):
    with pytest.raises(error, match=match):
        check_options(options)


# ------------------------------------------------------------- stores and experiments


def test_runs_deleted_from_mlflow_for_good_are_made_anew(
    record, deliver, store, in_mlflow, in_journal, client
):
    run = record()
    run.log_curve(CURVE)
    run.run.finish()
    first = deliver(run.path, store)
    for table in ("metrics", "latest_metrics", "params", "tags", "runs"):
        change(store, f"DELETE FROM {table}")
    second = deliver(run.path, store)
    assert second.state.mlflow_run_id != first.state.mlflow_run_id
    assert in_mlflow(store, second.state.mlflow_run_id) == in_journal(run.path)


def test_run_in_the_bin_is_left_there_and_a_new_one_made_by_sync(
    record, deliver, store, in_mlflow, in_journal, client
):
    run = record()
    run.log_curve(CURVE)
    run.run.finish()
    first = deliver(run.path, store)
    client(store).delete_run(first.state.mlflow_run_id)
    second = deliver(run.path, store, is_sync=True)
    assert second.state.mlflow_run_id != first.state.mlflow_run_id
    assert in_mlflow(store, second.state.mlflow_run_id) == in_journal(run.path)


def test_experiment_in_the_bin_is_told(record, deliver, store, client):
    run = record()
    run.run.finish()
    made = deliver(run.path, store)
    client(store).delete_experiment(made.state.experiment_id)
    other = record()
    other.run.finish()
    with pytest.raises(GaveUpError, match="got 'digits', which is deleted"):
        deliver(other.path, store)
    assert DeliveryState.read(other.path).phase == "gave up"


def test_database_of_another_version_is_left_alone_and_told(
    record, deliver, store, cache, remote_class, tmp_path
):
    remote_class(f"sqlite:///{tmp_path}/other.db", cache)
    (tmp_path / "other.db").rename(tmp_path / "mlflow.db")
    change(store, "UPDATE alembic_version SET version_num = '0123'")
    run = record()
    run.run.finish()
    with pytest.raises(GaveUpError, match="out-of-date database schema"):
        deliver(run.path, store)
    assert change(store, "SELECT version_num FROM alembic_version") == [("0123",)]


def test_artifacts_of_a_new_experiment_lie_beside_the_database(
    record, deliver, store, client, tmp_path
):
    run = record()
    run.run.finish()
    made = deliver(run.path, store)
    for id_ in ("0", made.state.experiment_id):
        found = client(store).get_experiment(id_)
        assert found.artifact_location == f"{tmp_path}/mlruns/{id_}"


# -------------------------------------------------------------------- the process

TRAINER = """
import sys, tracking
run = tracking.start(experiment="digits", runs_dir="runs")
print(run.id, flush=True)
for i in range(40):
    run.log("metrics", "train", {"loss": 1 / (i + 1)}, index=i)
mlflow_run_id = run.mlflow_run_id
run.log_metric("last", 1.0, set="train", index=40)
run.finish(wait_s=60)
assert "mlflow" not in sys.modules
print(mlflow_run_id)
"""


def start_trainer(folder: Path, **variables: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", TRAINER],
        cwd=folder,
        env={
            **os.environ,
            "PYTHONPATH": str(Path(tracking.__file__).parents[1]),
            **variables,
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_run_is_delivered_by_a_process_of_its_own(
    tmp_path, remote_class, in_mlflow, in_journal
):
    trainer = start_trainer(tmp_path)
    out, err = trainer.communicate(timeout=120)
    assert (trainer.returncode, err) == (0, "")
    run_id, mlflow_run_id = out.split()
    path = tmp_path / "runs" / run_id
    points = in_mlflow(f"sqlite:///{tmp_path}/mlflow.db", mlflow_run_id)
    assert points == in_journal(path)
    assert len(points) == 41
    names = {path.name for path in tmp_path.iterdir()}
    assert names - {"mlruns"} == {"mlflow.db", "runs"}


@pytest.mark.parametrize(
    "is_prepared", [True, pytest.param(False, marks=pytest.mark.slow)]
)
def test_four_that_make_one_fresh_store_at_once_all_succeed(
    tmp_path, remote_class, client, cache, is_prepared
):
    store = f"sqlite:///{tmp_path}/mlflow.db"
    if is_prepared:
        remote_class(f"sqlite:///{tmp_path}/other.db", cache)
    else:
        cache = tmp_path / "cache"
    children = []
    for number in range(4):
        child = os.fork()
        if child == 0:
            code = 1
            try:
                remote = remote_class(store, cache)
                experiment = remote.experiment_id("digits")
                remote.create_run(experiment, f"run {number}", 1, {})
                code = 0
            finally:
                os._exit(code)
        children.append(child)
    assert [os.waitpid(child, 0)[1] for child in children] == [0] * 4
    assert {run.info.run_name for run in all_runs(client, store)} == {
        f"run {number}" for number in range(4)
    }


def test_fresh_store_is_made_by_one_at_a_time(tmp_path, remote_class, cache):
    remote_class(f"sqlite:///{tmp_path}/other.db", cache)  # prepares one
    path = tmp_path / "mlflow.db"
    other = threading.Thread(target=remote_class, args=(f"sqlite:///{path}", cache))
    with (cache / "lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        other.start()
        other.join(1.0)
        assert other.is_alive()
        assert not path.exists()
    other.join(60)
    assert path.exists()


def test_process_leaves_at_once_when_another_delivers_the_run(record, store):
    run = record()
    run.log_curve(3)
    run.run.finish()
    (run.path / "delivery").mkdir()
    with (run.path / "delivery" / "lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        process = subprocess.run(
            delivery_command("--lock-wait", "0.1", str(run.path)),
            env={**os.environ, "MLFLOW_TRACKING_URI": store},
            check=False,
        )
    assert process.returncode == 0
    assert DeliveryState.read(run.path) is None


def test_delivery_that_goes_on_is_waited_for_but_not_for_ever(record):
    run = record()
    (run.path / "delivery").mkdir()
    assert wait_for_delivery(run.path, 0.0)
    with (run.path / "delivery" / "lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert not wait_for_delivery(run.path, 0.0)
        threading.Timer(0.2, fcntl.flock, (lock, fcntl.LOCK_UN)).start()
        assert wait_for_delivery(run.path, 60.0)


def test_run_that_was_deleted_does_not_come_back(record, deliver, store):
    run = record()
    run.run.finish()
    made = deliver(run.path, store)
    shutil.rmtree(run.path)
    made.state.write(run.path)
    assert not run.path.exists()


def test_secrets_are_in_no_file_and_no_tag(record, store, tmp_path):
    run = record()
    run.log_curve(3)
    run.run.finish()
    secrets = {"user": "u53rn4me", "password": "pa55w0rd", "token": "t0k3nt0k3n"}
    uri = f"http://{secrets['user']}:{secrets['password']}@127.0.0.1:9/"
    variables = {"MLFLOW_TRACKING_URI": uri, "MLFLOW_TRACKING_TOKEN": secrets["token"]}
    process = subprocess.run(
        delivery_command("--patience", "0", str(run.path)),
        env={**os.environ, **variables},
        capture_output=True,
        check=False,
    )
    assert process.returncode == 1
    state = DeliveryState.read(run.path)
    assert state.tracking_uri == "http://127.0.0.1:9/"
    assert "127.0.0.1" in state.error
    written = b"".join(p.read_bytes() for p in run.path.rglob("*") if p.is_file())
    for secret in secrets.values():
        assert secret.encode() not in written + process.stdout + process.stderr


def test_experiment_of_the_environment_is_used_where_the_run_names_none(
    record, store, client, cache, remote_class
):
    run = record(experiment=None)
    run.run.finish()
    settings = Settings.read({"MLFLOW_EXPERIMENT_NAME": "theirs"})
    resolver = RunResolver(
        run.path,
        store,
        lambda uri: remote_class(uri, cache),
        experiment_name=settings.experiment_name,
        experiment_id=settings.experiment_id,
    )
    writer = resolver.connect()
    assert client(store).get_experiment(writer.experiment_id).name == "theirs"


def test_settings_come_from_the_environment():
    found = Settings.read(
        {
            "MLFLOW_TRACKING_URI": "http://u:p@host",
            "MLFLOW_EXPERIMENT_ID": "7",
            "XDG_CACHE_HOME": "/c",
            "MLFLOW_TRACKING_TOKEN": "t0k3nt0k3n",
            "SHORT_TOKEN": "abc",
        }
    )
    assert found.tracking_uri == "http://u:p@host"
    assert (found.experiment_name, found.experiment_id) == (None, "7")
    assert found.cache == Path("/c/luz-harness")
    assert found.redact("http://u:p@host t0k3nt0k3n abc") == "http://host *** abc"


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        (None, "sqlite:////w/a b/mlflow.db"),
        ("sqlite:///x.db", "sqlite:////w/a b/x.db"),
        ("sqlite:///x.db?timeout=5", "sqlite:////w/a b/x.db?timeout=5"),
        ("sqlite:////abs/x.db", "sqlite:////abs/x.db"),
        ("http://host:5000", "http://host:5000"),
        ("postgresql://u:p@h/db", "postgresql://u:p@h/db"),
        ("databricks", "databricks"),
        ("mlruns", "file:///w/a%20b/mlruns"),
    ],
)
def test_store_is_found_as_mlflow_finds_it(given, wanted):
    assert resolve_uri(Path("/w/a b"), given) == wanted


def test_folder_of_files_that_mlflow_still_uses_is_its_default(tmp_path):
    (tmp_path / "mlruns" / "0").mkdir(parents=True)
    (tmp_path / "mlruns" / "0" / "meta.yaml").touch()
    assert resolve_uri(tmp_path, None) == (tmp_path / "mlruns").as_uri()
