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
from tracking.store import list_rank_dirs

TORCHRUN = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_PORT": "1234"}
SRUN = {"SLURM_PROCID": "3", "SLURM_STEP_NUM_TASKS": "4", "SLURM_JOB_ID": "7"}

SCRIPT = """
import sys, time, tracking
for name in ("first", "second"):
    if "late" in sys.argv:
        time.sleep(0.2)
    with tracking.start(name=name, runs_dir="runs", delivery=False) as run:
        run.log_metric("rank", run.rank, set=name, index=1)
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


def test_rank_0_gives_a_run_of_its_own(tmp_path, monkeypatch):
    for name, text in TORCHRUN.items():
        monkeypatch.setenv(name, text)
    with tracking.start(runs_dir=tmp_path, delivery=False, rank=0) as run:
        assert run.rank == 0
    assert [path.name for path in tmp_path.iterdir()] == [run.id]
