"""Random changes to the files of a run: refused by a named error, or read unchanged."""

from __future__ import annotations

import copy
import json
import random
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest

import tracking
from tracking.cli.describe import describe_run
from tracking.delivery.state import DeliveryState
from tracking.errors import TrackingError
from tracking.journal.reader import JournalReader
from tracking.read import PastRun

WRONG = [None, -1, 10**30, 1.5, "", "x", [], [None], {}, {"a": []}, True]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with a sealed block; one with an open block beside it."""
    folder = tmp_path_factory.mktemp("whole")
    with tracking.start(
        runs_dir=folder, name="sealed", params={"lr": 0.1}, delivery=False
    ) as run:
        fill(run)
    (run.path / "delivery").mkdir()
    DeliveryState(
        phase="done",
        tracking_uri="sqlite:////x/mlflow.db",
        flags={"infinite": {"train/loss": 3}},
        names={"a": ["metrics", "train", "a"]},
    ).write(run.path)
    run.path.rename(folder / "sealed")
    with tracking.start(runs_dir=folder, name="open", delivery=False) as run:
        fill(run)
        shutil.copytree(run.path, folder / "open")
    return folder


def fill(run: tracking.Run) -> None:
    for i in range(60):
        run.log("metrics", "train", {"loss": 1 / (i + 1), "n": i}, index=i + 1)
        run.log_metric("name", f"text {i}", index=i)
        if i == 30:
            run.rewind(run.position() - 6)


def flip(data: bytes, chance: random.Random) -> bytes:
    """Change bytes as a bad disk or a stranger would."""
    changed, at = bytearray(data), chance.randrange(len(data))
    action = chance.choice(["bit", "bit", "byte", "cut", "zeros", "insert", "repeat"])
    if action == "bit":
        changed[at] ^= 1 << chance.randrange(8)
    elif action == "byte":
        changed[at] = chance.randrange(256)
    elif action == "cut":
        del changed[at:]
    elif action == "zeros":
        end = min(at + 64, len(data))
        changed[at:end] = bytes(end - at)
    elif action == "insert":
        changed[at:at] = bytes(chance.randrange(256) for _ in range(9))
    else:
        changed[at:at] = changed[max(at - 64, 0) : at]
    return bytes(changed)


def change_json(data: bytes, chance: random.Random) -> bytes:
    """Change the form of one value, or the bytes."""
    if chance.random() < 0.3:
        return flip(data, chance)
    value = json.loads(data)
    owners = [one for one in nodes(value) if one]
    owner = chance.choice(owners)
    key = chance.choice(list(owner) if isinstance(owner, dict) else range(len(owner)))
    if chance.random() < 0.2:
        del owner[key]
    elif chance.random() < 0.1:
        text = "[" * 100_000 + "]" * 100_000
        owner[key] = "DEEP"
        return json.dumps(value).replace('"DEEP"', text).encode()
    else:
        owner[key] = copy.deepcopy(chance.choice(WRONG))
    return json.dumps(value).encode()


def nodes(value: Any) -> Any:
    if isinstance(value, dict | list):
        yield value
        for item in value.values() if isinstance(value, dict) else value:
            yield from nodes(item)


def read_everything(path: Path) -> None:
    """What commands and delivery read of a run."""
    run = PastRun(path)
    describe_run(run)
    _ = (run.manifest, run.params, run.tags, run.wide(), run.summary(), run.damage)
    reader = JournalReader(path / "records" / "0")
    while reader.read(1000).num_rows:
        pass
    DeliveryState.read_or_none(path)


def check_rows(path: Path, before: dict[int, Any]) -> None:
    """Rows are as they were, and what is missing is told."""
    run = PastRun(path)
    rows = {row["seq"]: row for row in run.records(superseded=True).to_pylist()}
    for seq, row in rows.items():
        ours = {name: value for name, value in row.items() if name != "superseded"}
        assert ours == before[seq]
    if len(rows) < len(before):
        assert run.damage


def check(
    name: str, kind: str, count: int, seed: int, whole: Path, folder: Path
) -> None:
    chance = random.Random(f"{name} {seed}")
    source = whole / kind
    before = {
        row["seq"]: {k: v for k, v in row.items() if k != "superseded"}
        for row in PastRun(source).records(superseded=True).to_pylist()
    }
    (file,) = [path for path in source.rglob("*") if path.match(name)]
    data = file.read_bytes()
    change = change_json if name.endswith(".json") else flip
    (folder / "good").mkdir()
    shutil.copy(source / "run.json", folder / "good")
    for number in range(count):
        path = folder / f"{number}"
        shutil.copytree(source, path)
        changed = change(data, chance)
        (path / file.relative_to(source)).write_bytes(changed)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                assert "good" in [run.path.name for run in tracking.list_runs(folder)]
                read_everything(path)
                check_rows(path, before)
        except TrackingError:
            assert name.endswith(".json")  # records are read as far as they go
        except Exception as error:
            error.add_note(f"{name}, seed {seed}, mutation {number}: {changed[:300]!r}")
            raise
        shutil.rmtree(path)


FILES = [
    ("run.json", "sealed"),
    ("state.json", "sealed"),
    ("000000.arrow", "sealed"),
    ("000000.rows", "open"),
    ("000000.text", "open"),
]


@pytest.mark.parametrize(("name", "kind"), FILES)
def test_changed_file_is_refused_or_read_unchanged(
    name: str, kind: str, whole: Path, tmp_path: Path
) -> None:
    check(name, kind, 6, 1, whole, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "kind"), FILES)
def test_files_changed_in_many_ways_are_refused_or_read_unchanged(
    name: str, kind: str, whole: Path, tmp_path: Path
) -> None:
    check(name, kind, 40, 2, whole, tmp_path)
