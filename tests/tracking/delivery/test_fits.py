"""Several fits of one run in MLflow."""

from __future__ import annotations

import pytest

import tracking
from tests.tracking.stores import get_run
from tracking.delivery.state import DeliveryState
from tracking.delivery.summaries import collect_charts
from tracking.verify.mlflow import compare_with_mlflow
from tracking.verify.verify import verify


def log_epochs(run, *losses, first=1):
    for epoch, loss in enumerate(losses, start=first):
        run.log("metrics", "valid", {"loss": loss}, epoch, epoch=epoch, step=epoch)


@pytest.fixture
def two_fits(record):
    """A run with a fit of three epochs, and another of two, still open."""
    run = record()
    run.run.log_params({"lr": 0.1, "depth": 2})
    log_epochs(run.run, 3.0, 2.0, 1.0)
    run.run.begin_fit()
    run.run.log_params({"lr": 0.5, "depth": 2})
    log_epochs(run.run, 9.0, 8.0)
    return run


def points_of(store, run_id, in_mlflow):
    return [point[:3] for point in in_mlflow(store, run_id)]


def test_each_fit_has_a_series_of_its_own(
    two_fits, deliver, store, in_mlflow, client, read_back
):
    run = two_fits.run
    run.log("metrics", "valid", {"loss": 7.0}, 2, append=False, epoch=2)
    run.log_metric("a?b", 1.0, index=1)
    run.end_fit()
    run.log_metric("score", 0.5, set="", index=1)
    run.finish()
    state = deliver(run.path, store).state
    found = in_mlflow(store, state.mlflow_run_id)
    assert [point[:3] for point in found if "a_b" not in point[0]] == [
        ("score", 1, 0.5),
        ("valid/loss", 1, 3.0),
        ("valid/loss", 2, 2.0),
        ("valid/loss", 3, 1.0),
        ("valid/loss_fit2", 1, 9.0),
        ("valid/loss_fit2", 2, 7.0),
    ]
    data = get_run(client, store, state).data
    assert data.params == {"lr": "0.1", "depth": "2", "lr_fit2": "0.5"}
    names = DeliveryState.read(run.path).names
    assert names["valid/loss_fit2"] == ["metrics", "valid", "loss", "2"]
    assert sorted(names.values())[0] == ["metrics", "train", "a?b", "2"]
    past = tracking.open(run.path)
    assert not compare_with_mlflow(past, read_back(past.path, store)).mismatches


@pytest.mark.slow
def test_resume_inside_the_second_fit_continues_its_series(
    record, two_fits, deliver, store, in_mlflow, read_back
):
    run = two_fits.run
    position = run.position()
    log_epochs(run, 7.0, first=3)
    run.finish("killed")
    first = deliver(run.path, store).state.mlflow_run_id
    again = record(run_id=run.id).run
    again.rewind(position)
    log_epochs(again, 7.0, 6.0, first=3)
    again.finish()
    assert deliver(run.path, store).state.mlflow_run_id == first
    assert points_of(store, first, in_mlflow)[3:] == [
        ("valid/loss_fit2", epoch, 10.0 - epoch) for epoch in (1, 2, 3, 4)
    ]
    past = tracking.open(run.path)
    assert not compare_with_mlflow(past, read_back(past.path, store)).mismatches


@pytest.mark.slow
def test_rewind_behind_the_second_fit_takes_its_series_back(
    record, deliver, store, in_mlflow
):
    run = record().run
    log_epochs(run, 3.0, 2.0)
    position = run.position()
    run.begin_fit()
    log_epochs(run, 9.0, 8.0)
    run.finish("killed")
    first = deliver(run.path, store).state.mlflow_run_id
    again = record(run_id=run.id).run
    again.rewind(position)
    log_epochs(again, 1.0, first=3)
    again.finish()
    fresh = deliver(run.path, store).state.mlflow_run_id
    assert fresh != first
    assert points_of(store, fresh, in_mlflow) == [
        ("valid/loss", epoch, 4.0 - epoch) for epoch in (1, 2, 3)
    ]
    assert not verify(tracking.open(run.path)).mismatches


@pytest.mark.slow
def test_thinning_counts_each_fit_by_itself(
    record, deliver, store, in_mlflow, read_back
):
    run = record(delivery={"per_key": 4}).run
    log_epochs(run, *map(float, range(20)))
    run.begin_fit()
    log_epochs(run, 1.0, 2.0, 3.0)
    run.finish()
    state = deliver(run.path, store).state
    keys = [point[0] for point in in_mlflow(store, state.mlflow_run_id)]
    assert keys.count("valid/loss") <= 4
    assert keys.count("valid/loss_fit2") == 3
    past = tracking.open(run.path)
    assert not compare_with_mlflow(past, read_back(past.path, store)).mismatches


def test_curves_of_fits_are_lines_of_their_own(two_fits):
    two_fits.run.finish()
    charts = collect_charts(tracking.open(two_fits.path).records())
    assert {
        name: [x.tolist() for x in line] for name, line in charts.lines["loss"].items()
    } == {"valid": [[1, 2, 3], [3.0, 2.0, 1.0]], "valid, fit 2": [[1, 2], [9.0, 8.0]]}
