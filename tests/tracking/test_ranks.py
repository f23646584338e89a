"""One run for the ranks of a launch."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import tracking
from tracking.ranks import announce_run, wait_for_run
from tracking.settings import read_rank
from tracking.store import get_rank_dir, list_rank_dirs

TORCHRUN = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_PORT": "1234"}
SRUN = {"SLURM_PROCID": "3", "SLURM_STEP_NUM_TASKS": "4", "SLURM_JOB_ID": "7"}

SCRIPT = """
import sys, time, tracking
for name in ("first", "second"):
    if "late" in sys.argv:
        time.sleep(0.2)
    with tracking.start(name=name, runs_dir="runs", delivery=False) as run:
        run.log_metric("rank", run.rank, set=name, index=1, all_ranks=True)
    print(run.id)
"""


@pytest.mark.parametrize(
    ("environment", "rank"),
    [
        ({}, None),
        (TORCHRUN, 1),
        (SRUN, 3),
        ({"OMPI_COMM_WORLD_RANK": "2", "OMPI_COMM_WORLD_SIZE": "3"}, 2),
        ({"RANK": "0", "WORLD_SIZE": "1"}, None),
        ({"RANK": "gold", "WORLD_SIZE": "2"}, None),
        ({"WORLD_SIZE": "4"} | SRUN, 3),
        ({"SLURM_PROCID": "0"}, None),  # a batch script
    ],
)
def test_rank_is_read_from_the_launcher(environment, rank):
    found = read_rank(environment)
    assert (found and found.rank) == rank


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (TORCHRUN, TORCHRUN | {"MASTER_PORT": "1235"}),
        (TORCHRUN, TORCHRUN | {"TORCHELASTIC_RESTART_COUNT": "1"}),
        (SRUN, SRUN | {"SLURM_STEP_ID": "1"}),
    ],
)
def test_key_belongs_to_the_launch(one, other):
    name = "RANK" if "RANK" in one else "SLURM_PROCID"
    assert read_rank(one).key == read_rank(one | {name: "0"}).key
    assert read_rank(one).key != read_rank(other).key


def start_ranks(folder: Path, port: int, *words: str) -> list[subprocess.Popen[str]]:
    """Two ranks as a launcher starts them; `words` go to rank 0."""
    names = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_PORT": str(port)}
    names["PYTHONPATH"] = str(Path(tracking.__file__).parents[1])
    return [
        subprocess.Popen(
            [sys.executable, "-c", SCRIPT, *(words if rank == 0 else ())],
            cwd=folder,
            env=os.environ | names | {"RANK": str(rank)},
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in (0, 1)
    ]


def test_ranks_of_a_launch_record_into_one_run_each_time(tmp_path):
    seen = []
    for words in (("late",), ()):  # the second launch has the names of the first
        ranks = start_ranks(tmp_path, 1234, *words)
        said = [rank.communicate(timeout=120)[0].split() for rank in ranks]
        assert said[0] == said[1]
        seen += said[0]
    assert len(set(seen)) == 4
    runs = tracking.list_runs(runs_dir=tmp_path / "runs")
    assert sorted(run.id for run in runs) == sorted(seen)
    for run in runs:
        assert list(list_rank_dirs(run.path)) == [0, 1]
        assert sorted(run.records()["value"].to_pylist()) == [0.0, 1.0]
        assert run.status == "finished"


def test_rank_that_waits_in_vain_says_what_to_do(tmp_path):
    path = tmp_path / ".launches" / "key-1.json"
    with pytest.raises(TimeoutError, match=r"rank 0 to start a run in .* on rank 1"):
        wait_for_run(path, 1, timeout_s=0.0)


def test_announcement_of_a_rank_that_ended_before_is_not_taken(tmp_path):
    path = tmp_path / ".launches" / "key-1.json"
    announce_run(path, "mine")
    assert wait_for_run(path, 1, timeout_s=0.0) == "mine"
    with subprocess.Popen([sys.executable, "-c", "pass"]) as ended:
        ended.wait()
    text = path.read_text().replace(str(os.getpid()), str(ended.pid))
    began = text.rpartition('"began": ')[2].rstrip("}")
    path.write_text(text.replace(began, str(int(began) - 1000)))
    with pytest.raises(TimeoutError):
        wait_for_run(path, 1, timeout_s=0.0)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"host": 1, "run": 2}'])
def test_announcement_that_is_no_such_thing_is_not_taken(tmp_path, text):
    path = tmp_path / "key-1.json"
    path.write_text(text)
    with pytest.raises(TimeoutError):
        wait_for_run(path, 1, timeout_s=0.0)


def test_rank_0_gives_a_run_of_its_own(tmp_path, monkeypatch):
    for name, text in TORCHRUN.items():
        monkeypatch.setenv(name, text)
    with tracking.start(runs_dir=tmp_path, delivery=False, rank=0) as run:
        assert run.rank == 0
    assert [path.name for path in tmp_path.iterdir()] == [run.id]


MANY = """
import sys, time, tracking
with tracking.start(runs_dir="runs", delivery=False, params={"lr": 0.1}) as run:
    for step in range(1000):
        run.log_step({"loss": 0.5}, step=step)
    run.log_metric("loss", 0.5, index=1)
    run.log_text("text", "note.txt")
    if run.rank == 3:
        run.log_metric("temperature", 71.0, index=1, all_ranks=True)
        run.log_metric("loss", 0.7, index=2)
    print(run.path, flush=True)
    sys.stdin.readline()
    if run.rank == 5:
        raise ValueError("boom")
"""


@pytest.mark.slow
def test_sixteen_ranks_make_the_files_of_one_and_of_what_is_their_own(tmp_path):
    names = {"WORLD_SIZE": "16", "LOCAL_WORLD_SIZE": "16", "MASTER_PORT": "1299"}
    names["PYTHONPATH"] = str(Path(tracking.__file__).parents[1])
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", MANY],
            cwd=tmp_path,
            env=os.environ | names | {"RANK": str(rank)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        for rank in range(16)
    ]
    (path,) = {Path(rank.stdout.readline().strip()) for rank in ranks}
    assert list(list_rank_dirs(path)) == [0, 3]  # while all of them run
    for rank in ranks[1:]:
        rank.communicate("\n", timeout=120)
    ranks[0].communicate("\n", timeout=120)
    assert [rank.returncode for rank in ranks] == [0] * 5 + [1] + [0] * 10
    dirs = list_rank_dirs(path)
    assert list(dirs) == [0, 3, 5]
    assert [file.name for file in dirs[5].iterdir()] == ["failure.json"]
    past = tracking.open(path)
    assert past.records(rank=3).select(["name", "value"]).to_pylist() == [
        {"name": "temperature", "value": 71.0}
    ]
    assert past.records("steps").num_rows == 1000
    files = [file for file in path.rglob("*") if file.is_file()]
    # Besides the parts of ranks 0 and 3: run.json, environment.json, note.txt, failure.json.
    assert len(files) <= 3 * 2 + 4
    assert sum(file.stat().st_size for file in files) < 1 << 20


def test_rank_that_has_nothing_of_its_own_checks_values_and_makes_no_file(tmp_path):
    with tracking.start(runs_dir=tmp_path, delivery=False) as run:
        options = {"runs_dir": tmp_path, "run_id": run.id, "rank": 1}
        with tracking.start(**options, all_ranks=False, params={"a": 1}) as other:
            other.log_metric("loss", 0.5, index=1)
            other.log("notes", "train", {"text": "x", "list": [1.0]})
            other.log_step({"loss": 0.5}, step=1)
            other.log_table("errors", {"a": [1]})
            assert other.begin_fit(2) == other.fit == 2
            assert other.position() == -1
            other.rewind(-1)
            assert other.get_indices() is None
            for call in (
                lambda: other.log("notes", "train", object()),
                lambda: other.log_metric("loss", {"x": object()}),
                lambda: other.log_params(3),
                lambda: other.log_metric("loss", 0.5, index="one"),
            ):
                with pytest.raises(TypeError):
                    call()
            assert not get_rank_dir(run.path, 1).exists()
            other.log_metric("own", 1.0, index=1, all_ranks=True)  # of the second fit
            other.log_metric("loss", 0.5, index=2)
        with pytest.raises(tracking.RunClosedError):
            other.log_metric("loss", 0.5)
        with pytest.raises(tracking.RunClosedError):
            other.log_metric("loss", 0.5, all_ranks=True)
    rows = tracking.open(run.path).records(rank=1)
    assert rows.select(["name", "fit", "index"]).to_pylist() == [
        {"name": "own", "fit": 2, "index": 1}
    ]


def test_part_of_a_rank_is_continued_and_rewound(tmp_path):
    with tracking.start(runs_dir=tmp_path, delivery=False) as run:
        options = {"runs_dir": tmp_path, "run_id": run.id, "rank": 1}
        with tracking.start(**options, all_ranks=True) as other:
            other.log("notes", "own", 1.0)
            position = other.position()
            other.log("notes", "own", 2.0)
        for _ in range(2):  # rewound once; the second time there is nothing behind it
            with tracking.start(**options, all_ranks=False) as other:
                other.rewind(position)
        with tracking.start(**options, all_ranks=False) as other:
            assert other.position() > position
            other.log("notes", "own", 3.0, all_ranks=True)
    rows = tracking.open(run.path).records(rank=1)
    assert list(
        zip(*(rows[n].to_pylist() for n in ("value", "index")), strict=True)
    ) == [(1.0, 1), (3.0, 2)]
