"""A run that was delivered, one that was exported, and ways to change what is compared."""

from __future__ import annotations

import math
import sqlite3
from contextlib import closing

import pytest

import tracking


@pytest.fixture
def change(store):
    """Changes the MLflow database of a test."""

    def run(statement):
        with closing(sqlite3.connect(store.removeprefix("sqlite:///"))) as db, db:
            assert db.execute(statement).rowcount >= 1

    return run


@pytest.fixture
def finished(record, deliver, store):
    """A run that was delivered whole."""
    run = record(params={"lr": 0.1}, tags={"a": "b"})
    run.log_curve(50)
    values = {"nan": math.nan, "zero": -0.0, "tiny": 5e-324, "yes": True, "n": 3}
    run.run.log("metrics", "valid", values, index=1)
    run.run.log_text("hello", "notes/a.txt")
    run.run.finish()
    deliver(run.path, store)
    return run.path


@pytest.fixture
def exported(record, tmp_path):
    """A run with an export of it, and of another in the same file."""
    other = record()
    other.log_curve(3)
    run = record(params={"lr": 0.1})
    run.log_curve(4)
    special = {"nan": math.nan, "zero": -0.0, "none": None, "text": "ü", "big": 2**70}
    run.run.log("metrics", "valid", special, index=1)
    run.run.finish()
    other.run.finish()
    file = tmp_path / "both.parquet"
    tracking.export([run.path, other.path], file)
    return tracking.open(run.path), file
