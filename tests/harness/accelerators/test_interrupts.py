"""Signals that end ranks in order, by real launchers."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import tracking
from tests.harness.accelerators.launches import ROOT, free_port
from tests.harness.checkpoint.newest import find_newest
from tests.harness.fakes import is_running

PATIENCE_S = 300
"""Seconds after which something is taken for hung."""

PROGRAM = "tests.harness.accelerators.interrupted:experiment"
FIT = ["-m", "harness.cli", "fit", PROGRAM, "--no-deliver"]
HARNESS = [sys.executable, "-m", "harness.cli"]

pytestmark = pytest.mark.distributed


def torchrun() -> list[str]:
    """Two ranks by torchrun."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2"]
    return [*command, f"--master-port={free_port()}", *FIT]


def deepspeed() -> list[str]:
    """Two ranks by DeepSpeed's launcher."""
    command = [sys.executable, "-m", "deepspeed.launcher.runner", "--num_gpus=2"]
    command += [f"--master_port={free_port()}", "--no_local_rank", "--module"]
    return [*command, *FIT[1:]]


def harness_launch() -> list[str]:
    """Two ranks by ``harness launch``."""
    options = ["--num-gpus=2", f"--master-port={free_port()}"]
    return [*HARNESS, "launch", *options, *FIT[3:]]


Start = Callable[[list[str]], subprocess.Popen[bytes]]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Starts a command in a process group of its own; ends what a failed test leaves."""
    unset = {"RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}
    env = {name: value for name, value in os.environ.items() if name not in unset}
    env |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    begun: list[subprocess.Popen[bytes]] = []

    def starting(command: list[str]) -> subprocess.Popen[bytes]:
        with (tmp_path / "log").open("w") as log:
            begun.append(
                subprocess.Popen(
                    command,
                    cwd=tmp_path,
                    env=env,
                    stdout=log,
                    stderr=log,
                    start_new_session=True,
                )
            )
        return begun[-1]

    yield starting
    for process in begun:
        process.kill()
        process.wait()
    for path in tmp_path.glob("rank-*"):
        if is_running(int(path.read_text())):
            os.kill(int(path.read_text()), signal.SIGKILL)


def wait_for(folder: Path, done: Callable[[], bool]) -> None:
    """Wait until it is so."""
    until = time.monotonic() + PATIENCE_S
    while not done():
        assert time.monotonic() < until, (folder / "log").read_text()
        time.sleep(0.05)


def wait_for_ranks(folder: Path) -> list[int]:
    """Process ids of both ranks, once both are training."""
    paths = [folder / f"rank-{rank}-of-2" for rank in (0, 1)]
    wait_for(folder, lambda: all(p.exists() and p.read_text() for p in paths))
    return [int(path.read_text()) for path in paths]


@pytest.mark.parametrize(
    ("launcher", "number", "to_group", "code"),
    [
        pytest.param(torchrun, signal.SIGTERM, False, 1, id="torchrun-sigterm"),
        pytest.param(
            torchrun, signal.SIGINT, True, 1, id="torchrun-ctrl-c", marks=pytest.mark.slow
        ),
        pytest.param(
            deepspeed, signal.SIGINT, True, None, id="deepspeed-ctrl-c",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            deepspeed, signal.SIGTERM, False, None, id="deepspeed-sigterm",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            harness_launch, signal.SIGTERM, False, 143, id="launch-sigterm",
            marks=pytest.mark.slow,
        ),
        pytest.param(harness_launch, signal.SIGINT, True, 130, id="launch-ctrl-c"),
    ],
)  # fmt: skip
def test_signal_ends_ranks_in_order(
    launcher: Callable[[], list[str]],
    number: signal.Signals,
    to_group: bool,
    code: int | None,
    start: Start,
    tmp_path: Path,
) -> None:
    process = start(launcher())
    pids = wait_for_ranks(tmp_path)
    (os.killpg if to_group else os.kill)(process.pid, number)
    assert process.wait(PATIENCE_S) == (process.returncode if code is None else code)
    wait_for(tmp_path, lambda: not any(map(is_running, pids)))
    said = (tmp_path / "log").read_text()
    (past,) = tracking.list_runs(runs_dir=tmp_path / "runs")
    assert past.status == "killed", said
    assert said.count("interrupted in epoch ") == 1, said
    assert f"resume with: harness resume {past.id}" in said
    saved, errors = find_newest(past.path / "checkpoints")
    assert saved is not None
    assert errors == []
    if launcher is not harness_launch or number != signal.SIGINT:
        return
    # As many ranks go on, without a launcher being named.
    for path in tmp_path.glob("rank-*"):
        path.unlink()
    (tmp_path / "finish").touch()
    resumed = start([*HARNESS, "resume", past.id])
    assert resumed.wait(PATIENCE_S) == 0, (tmp_path / "log").read_text()
    assert len(list(tmp_path.glob("rank-*-of-2"))) == 2
    assert tracking.open(past.path).status == "finished"
