"""The index of a list: it saves reading, and never tells anything else than the runs do."""

from __future__ import annotations

import itertools
import json
import math
import os
import re
import shutil
import zlib
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import tracking
from tracking.cli.describe import summarize_run
from tracking.cli.run_index import INDEX, RunIndex, _make_head
from tracking.delivery.state import DeliveryState
from tracking.errors import TrackingError
from tracking.fork import fork
from tracking.store import run_paths, write_failure


def list_all(runs, summarize):
    """What a list shows of each run; the duration of one that runs goes on."""
    found = []
    for path in run_paths(runs):
        try:
            summary = summarize(path)
        except (TrackingError, OSError, ValueError) as error:
            found.append((path.name, type(error).__name__))
            continue
        if summary["status"] == "running":
            del summary["duration_s"]
        found.append(repr(summary))  # in which NaN equals itself, and 1 is not 1.0
    return found


def list_indexed(runs, settled_s=0.0):
    """The list, and how many runs were read for it."""
    index = RunIndex(runs, run_paths(runs), settled_s)
    found = list_all(runs, index.summarize)
    index.save()
    return found, index.num_read


def list_plainly(runs):
    return list_all(runs, lambda path: summarize_run(tracking.PastRun(path)))


class World:
    """A folder of runs in which something happens."""

    def __init__(self, runs: Path) -> None:
        self.runs = runs
        self.live: dict[Path, tracking.Run] = {}
        self.numbers = itertools.count()
        self.old_index = b""

    def start(self, _: Path | None) -> None:
        run = tracking.start(
            name=f"run {next(self.numbers)}",
            runs_dir=self.runs,
            delivery=False,
            save_diff=False,
            params={"lr": 0.1, "depth": 3, "words": ["a"]},
            tags={"what": "odd"},
        )
        self.live[run.path] = run
        self.log(run.path)

    def log(self, path: Path) -> None:
        run = self.live.get(path)
        if run is not None:
            number = next(self.numbers)
            run.log_metric("loss", math.nan if number % 5 == 0 else 1 / number)
            run.log("metrics", "valid", {"loss": number, "n": 2**70}, index=1)

    def end(self, path: Path) -> None:
        if path in self.live:
            self.live.pop(path).finish()

    def kill(self, path: Path) -> None:
        """Leave a folder as a process does that is killed."""
        copy = path.with_name(f"20200101-00000{next(self.numbers) % 10}-{path.name}")
        if not copy.exists():
            # The lease names this process, which lives.
            shutil.copytree(path, copy, ignore=shutil.ignore_patterns("*.lease"))

    def resume(self, path: Path) -> None:
        if path not in self.live:
            run = tracking.start(runs_dir=self.runs, run_id=path.name, delivery=False)
            self.live[path] = run
            self.log(path)

    def fork(self, path: Path) -> None:
        if path not in self.live:
            fork(tracking.PastRun(path), {0: 1}, {})

    def rename(self, path: Path) -> None:
        self.change(path, name=f"renamed {next(self.numbers)}")

    def note(self, path: Path) -> None:
        self.change(path, experiment=f"other {next(self.numbers)}")

    def change(self, path: Path, **fields: str) -> None:
        manifest = tracking.PastRun(path).manifest
        vars(manifest).update(fields)
        manifest.write(path)

    def move(self, path: Path) -> None:
        if path not in self.live:
            path.rename(path.with_name(f"{path.name[:15]}-{next(self.numbers)}"))

    def delete(self, path: Path) -> None:
        if path not in self.live:
            shutil.rmtree(path)

    def deliver(self, path: Path) -> None:
        number = next(self.numbers)
        DeliveryState(delivered=number, behind=number % 3).write(path)

    def fail(self, path: Path) -> None:
        write_failure(path / "records" / "0", ValueError("no"), "2026-01-01T00:00:00Z")

    def flip(self, path: Path) -> None:
        """Change a byte of a sealed block, in its place."""
        for segment in (path / "records" / "0").glob("*.arrow"):
            with segment.open("r+b") as file:
                file.seek(-60, os.SEEK_END)
                byte = file.read(1)[0]
                file.seek(-1, os.SEEK_CUR)
                file.write(bytes([byte ^ 1]))

    def spoil(self, path: Path) -> None:
        (path / "run.json").write_text("{")

    def spoil_index(self, path: Path) -> None:
        index = self.runs / INDEX
        data = (index.is_file() and index.read_bytes()) or b"\x00"
        place = zlib.crc32(path.name.encode()) % len(data)
        texts = (
            data[:place],
            data[:place] + b"\xff" + data[place + 1 :],
            self.old_index,
        )
        index.write_bytes(texts[next(self.numbers) % 3])
        self.old_index = data


ACTS = [name for name in vars(World) if not name.startswith("_") and name != "change"]


@settings(max_examples=6, deadline=None)
@given(
    st.lists(
        st.tuples(st.sampled_from(ACTS), st.integers(0, 99)), min_size=6, max_size=10
    )
)
def test_list_with_index_is_the_list_without_whatever_happens(tmp_path_factory, acts):
    world = World(tmp_path_factory.mktemp("world"))
    world.start(None)
    world.start(None)
    world.end(next(iter(world.live)))
    try:
        for act, place in acts:
            paths = run_paths(world.runs)
            if not paths and act != "start":
                continue
            try:
                getattr(world, act)(paths[place % len(paths)] if paths else None)
            except TrackingError:  # of a run that was spoilt
                continue
            assert list_indexed(world.runs)[0] == list_plainly(world.runs)
        # Once nothing happens any more, nothing is read again but what runs or is spoilt.
        assert list_indexed(world.runs)[0] == list_indexed(world.runs)[0]
    finally:
        for run in world.live.values():
            run._abandon()


@pytest.fixture
def ended(tmp_path):
    """A folder with a run that ended, one that was killed, and one that failed."""
    world = World(tmp_path)
    for _ in range(3):
        world.start(None)
    first, second, third = world.live
    world.end(first)
    world.kill(second)
    world.live.pop(second).finish("failed", ValueError("no"))
    world.live.pop(third).finish()
    expected = list_plainly(tmp_path)
    assert list_indexed(tmp_path, settled_s=-1.0) == (expected, 4)
    return tmp_path


def test_runs_that_have_ended_are_read_once(ended):
    assert list_indexed(ended) == (list_plainly(ended), 0)
    assert '"killed"' in json.dumps(list_plainly(ended)).replace("'", '"')
    assert not [
        p for p in ended.iterdir() if p.name.startswith(".") and p.name != INDEX
    ]


def test_run_that_changed_is_read_again_alone(ended):
    world = World(ended)
    for act in (world.rename, world.flip, world.deliver, world.fail):
        act(run_paths(ended)[0])
        assert list_indexed(ended, settled_s=-1.0) == (list_plainly(ended), 1)
    path = run_paths(ended)[0]
    world.resume(path)
    for _ in range(2):  # it runs, so it is never kept
        assert list_indexed(ended, settled_s=-1.0)[1] == 1
    world.end(path)
    assert list_indexed(ended, settled_s=-1.0) == (list_plainly(ended), 1)
    assert list_indexed(ended)[1] == 0


def test_run_that_changed_a_moment_ago_is_not_kept(ended):
    World(ended).rename(run_paths(ended)[0])
    assert [list_indexed(ended, settled_s=60.0)[1] for _ in range(2)] == [1, 1]


def test_index_that_a_killed_list_left_unfinished_is_removed(ended):
    old, new = (ended / f".{pid}-{INDEX}" for pid in (11, 12))
    for path in (old, new):
        path.touch()
    os.utime(old, (0, 0))
    World(ended).delete(run_paths(ended)[0])
    list_indexed(ended, settled_s=60.0)
    assert not old.exists()
    assert new.exists()


def test_run_that_was_deleted_leaves_the_index(ended):
    size = (ended / INDEX).stat().st_size
    World(ended).delete(run_paths(ended)[0])
    assert list_indexed(ended)[1] == 0
    assert (ended / INDEX).stat().st_size < size
    assert list_indexed(ended) == (list_plainly(ended), 0)


@pytest.mark.parametrize(
    "spoil", ["cut", "flip", "link", "folder", "pipe", "format", "time"]
)
def test_spoilt_index_is_built_again(ended, spoil):
    index = ended / INDEX
    data = index.read_bytes()
    if spoil in ("cut", "flip", "format"):
        place = len(data) // 2 if spoil != "format" else data.index(b"format 1") + 7
        rest = b"" if spoil == "cut" else bytes([data[place] ^ 2]) + data[place + 1 :]
        index.write_bytes(data[:place] + rest)
    elif spoil == "time":  # with the right check: somebody made it
        made = re.sub(rb"\d{4}-\d\d-\d\dT", b"0000-00-00T", data.partition(b"\n")[2])
        index.write_bytes(_make_head(made) + made)
    else:
        index.unlink()
        {
            "link": lambda: index.symlink_to(ended),
            "folder": index.mkdir,
            "pipe": lambda: os.mkfifo(index),
        }[spoil]()
    assert list_indexed(ended, settled_s=-1.0) == (list_plainly(ended), 4)
    expected = 4 if spoil == "folder" else 0  # no file takes the place of a folder
    assert list_indexed(ended)[1] == expected


def test_copied_folder_of_runs_does_not_trust_the_index_of_the_original(
    ended, tmp_path
):
    copy = tmp_path / "copy"
    shutil.copytree(ended, copy, ignore=shutil.ignore_patterns("copy"))
    assert list_indexed(copy)[1] == 4
