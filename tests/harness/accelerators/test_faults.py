"""Ranks end together, by real launchers (torchrun, DeepSpeed's own, ``launch``) and alone."""

from __future__ import annotations

import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import tracking
from harness.accelerators.distributed.launcher import build_launch_command
from harness.checkpoint.format import list_checkpoints
from tests.harness.accelerators import refusals
from tests.harness.accelerators.launches import (
    ROOT,
    ForkedProgram,
    Launches,
    free_port,
    started,
)
from tests.harness.checkpoint.newest import find_newest
from tests.harness.fakes import is_running
from tracking.cli.describe import describe_run

FAULTY = Path(__file__).with_name("faulty.py")

PATIENCE_S = 200
"""Seconds after which something is taken for hung."""

pytestmark = pytest.mark.distributed


def environment() -> dict[str, str]:
    """As a shell would have it, with the project importable and one thread a rank."""
    unset = {"RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}
    kept = {name: value for name, value in os.environ.items() if name not in unset}
    return kept | {
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "DS_ACCELERATOR": "cpu",
    }


def torchrun(folder: Path, how: str) -> list[str]:
    """Two ranks by torchrun."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2"]
    command += ["--master-addr=127.0.0.1", f"--master-port={free_port()}"]
    return [*command, str(FAULTY), str(folder), how]


def by_deepspeed(folder: Path, how: str) -> list[str]:
    """Two ranks by DeepSpeed's launcher."""
    script = [str(FAULTY), str(folder), how]
    return build_launch_command(script, num_gpus=2, master_port=free_port())


def by_harness(folder: Path, how: str) -> list[str]:
    """Two ranks by ``launch``, in a process of its own."""
    text = "import sys; from harness.accelerators.distributed import launcher as starting; "
    text += "sys.exit(starting.launch(sys.argv[1:]))"
    return [sys.executable, "-c", text, *by_deepspeed(folder, how)]


def forked(folder: Path, how: str) -> ForkedProgram:
    """Two ranks that no launcher ends, started in less than a second."""
    return ForkedProgram(folder, FAULTY, how)


class Started:
    """A launch under way."""

    def __init__(self, folder: Path, process: Any) -> None:
        self.folder, self.process = folder, process

    def text(self) -> str:
        """What was said so far."""
        return (self.folder / "log").read_text()

    def pids(self) -> list[int]:
        """Process ids of both ranks, once both are training."""
        self.wait_for(
            lambda: all((self.folder / f"steps-{r}").exists() for r in (0, 1))
        )
        return [int((self.folder / f"pid-{r}").read_text()) for r in (0, 1)]

    def wait_for(self, done: object) -> None:
        """Wait until it is so."""
        assert callable(done)
        until = time.monotonic() + PATIENCE_S
        while not done():
            assert time.monotonic() < until, self.text()
            time.sleep(0.1)

    def code(self) -> int:
        """The exit code."""
        return self.process.wait(PATIENCE_S)

    def check_nothing_left(self) -> None:
        """Both ranks are gone."""
        pids = [int(path.read_text()) for path in self.folder.glob("pid-*")]
        self.wait_for(lambda: not any(is_running(pid) for pid in pids))


@pytest.fixture
def start(tmp_path: Path) -> Iterator[object]:
    """Starts launches and ends what a failed test leaves."""
    begun: list[Started] = []

    def starting(launcher: object, how: str) -> Started:
        assert callable(launcher)
        found = launcher(tmp_path, how)
        if isinstance(found, list):
            found = started(found, environment(), tmp_path / "log")
        begun.append(Started(tmp_path, found))
        return begun[-1]

    yield starting
    for one in begun:
        one.process.kill()
        one.process.wait(PATIENCE_S)
        for path in one.folder.glob("pid-*"):
            if is_running(int(path.read_text())):
                os.kill(int(path.read_text()), signal.SIGKILL)


def check_traceback_comes_first(text: str) -> None:
    """The failure that started it comes first, and no traceback beside it."""
    assert "boom()" in text.partition("Traceback (most recent call last)")[2], text
    assert text.count("Traceback (most recent call last)") == 1, text
    assert text.lstrip().startswith(("Traceback", "[rank1]: Traceback")), text


def test_one_rank_raises_under_torchrun(start: object) -> None:
    assert callable(start)
    run = start(torchrun, "raise")
    assert run.code() != 0
    run.check_nothing_left()
    # torchrun adds a report of its own.
    check_traceback_comes_first(run.text().partition("torch/distributed/elastic")[0])


def test_ranks_that_torchrun_restarts_resume_as_if_nothing_had_happened(
    start: object,
) -> None:
    def restarting(folder: Path, how: str) -> list[str]:
        command = torchrun(folder, how)
        return [*command[:4], "--max-restarts=1", *command[4:]]

    assert callable(start)
    run = start(restarting, "restart")
    assert run.code() == 0, run.text()
    run.check_nothing_left()
    assert run.text().count("boom()") == 1, run.text()
    (found,) = re.findall("weights .*", run.text())
    (one,) = tracking.list_runs(run.folder / "runs")
    assert one.status == "finished"
    whole = start(forked, "finish")
    assert whole.code() == 0, whole.text()
    assert re.findall("weights .*", whole.text()) == [found]


@pytest.mark.slow
def test_rank_that_is_stopped_ends_the_others_and_one_that_is_busy_does_not(
    start: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HARNESS_LOST_AFTER_S", "10")
    assert callable(start)
    run = start(by_harness, "stop")
    run.wait_for(lambda: "it is lost" in run.text())
    assert (run.folder / "batch-1").read_text() == "5"
    pid, host = (run.folder / "pid-1").read_text(), socket.gethostname()
    text = f"rank 0: ended because rank 1 failed: it is lost: its process {pid} on {host!r}"
    assert f"{text} is stopped; not heard of for 1" in run.text()
    assert run.code() != 0
    run.check_nothing_left()


def test_one_rank_raises_in_a_fit_and_the_run_is_failed(start: object) -> None:
    assert callable(start)
    run = start(forked, "fit")
    assert run.code() != 0
    run.check_nothing_left()
    check_traceback_comes_first(run.text())
    (folder,) = (run.folder / "runs").iterdir()
    past = tracking.open(folder)
    error = {"type": "ValueError", "message": "boom on purpose (rank 1)"}
    assert (past.status, describe_run(past)["error"]) == ("failed", error)


def test_one_rank_that_cannot_gather_the_weights_leaves_the_checkpoints(
    start: object,
) -> None:
    assert callable(start)
    run = start(forked, "gather")
    assert run.code() != 0
    run.check_nothing_left()
    check_traceback_comes_first(run.text())
    place, faults = find_newest(run.folder / "saved")
    assert place is not None
    assert faults == []
    again = start(forked, "finish")
    assert again.code() == 0, again.text()
    assert list_checkpoints(run.folder / "saved") == []


@pytest.mark.parametrize(
    ("how", "does", "place"),
    [
        (
            "skip",
            "SkipEpoch in epoch 1, batch 3: .* got it on rank 1",
            "rank 0 waits in",
        ),
        ("evaluate", "an accelerator, .* got it on rank 0", "rank 1 waits in alone"),
    ],
)
def test_what_one_rank_does_alone_is_told(
    how: str, does: str, place: str, start: object
) -> None:
    assert callable(start)
    run = start(forked, how)
    assert run.code() != 0
    run.check_nothing_left()
    told = re.search(r"RuntimeError: (.*)", run.text())
    assert told is not None, run.text()
    assert re.match(f"{does}, while {place}", told[1]), run.text()


def test_rank_that_gloo_aborts_tells_the_line(start: object) -> None:
    assert callable(start)
    run = start(forked, "sizes")
    assert run.code() != 0
    run.check_nothing_left()
    assert re.search('File ".*faulty.py", line \\d+ in alone', run.text()), run.text()


@pytest.mark.slow
def test_ranks_that_wait_for_one_another_end_and_tell_where(
    start: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HARNESS_LOST_AFTER_S", "10")
    assert callable(start)
    run = start(torchrun, "branch")
    assert run.code() != 0
    run.check_nothing_left()
    told = re.search("ended because rank 0 failed: (.*)", run.text())
    assert told is not None, run.text()
    text = "rank 0 in alone .*, all_reduce; rank 1 in alone .*, all_gather"
    assert re.search(text, told[1]), told[1]


def test_one_rank_raises_under_launch(start: object) -> None:
    assert callable(start)
    run = start(by_harness, "raise")
    assert run.code() != 0
    run.check_nothing_left()
    check_traceback_comes_first(run.text())


@pytest.mark.slow
def test_one_rank_dies_under_launch(start: object) -> None:
    assert callable(start)
    run = start(by_harness, "die")
    assert run.code() != 0
    run.check_nothing_left()
    pid, host = (run.folder / "pid-1").read_text(), socket.gethostname()
    text = f"rank 1 failed: it is lost: its process {pid} on {host!r} has ended"
    assert text in run.text()
    assert "Traceback" not in run.text()


@pytest.mark.slow
def test_wrong_config_is_one_error(start: object) -> None:
    assert callable(start)
    run = start(by_harness, "config")
    assert run.code() != 0
    run.check_nothing_left()
    assert run.text().count("stage in 0..3, got 7") == 1, run.text()
    assert run.text().count("Traceback") == 1, run.text()


@pytest.mark.parametrize(
    "launcher",
    [
        torchrun,
        pytest.param(by_deepspeed, marks=pytest.mark.slow),
        pytest.param(by_harness, marks=pytest.mark.slow),
    ],
)
def test_launcher_that_is_killed_takes_the_ranks_along(
    launcher: object, start: object
) -> None:
    assert callable(start)
    run = start(launcher, "wait")
    run.pids()
    run.process.kill()
    run.process.wait()
    run.check_nothing_left()


def test_a_good_run_is_quiet_and_ends_well(start: object) -> None:
    assert callable(start)

    def with_few_files(folder: Path, how: str) -> list[str]:
        words = shlex.join(torchrun(folder, how))
        return ["bash", "-c", f"ulimit -Sn 100; exec {words}"]  # it is raised

    said = []
    for launcher in (with_few_files, by_harness):
        run = start(launcher, "well")
        assert run.code() == 0, run.text()
        run.check_nothing_left()
        said.append(run.text().splitlines())
    assert said[0] == said[1]
    assert len(said[0]) == 1
    assert said[0][0].startswith("sum ")


@pytest.mark.slow
def test_too_few_open_files_are_refused_with_their_number(start: object) -> None:
    def with_few_files(folder: Path, how: str) -> list[str]:
        return [
            "bash",
            "-c",
            f"ulimit -n 200; exec {shlex.join(torchrun(folder, how))}",
        ]

    assert callable(start)
    run = start(with_few_files, "well")
    assert run.code() != 0
    text = (
        r"expected a limit of at least (\d+) open files for the connections of 2 ranks"
    )
    told = re.search(
        rf"ValueError: launch: {text}, got 200 \(hard limit 200\)", run.text()
    )
    assert told is not None, run.text()
    assert 256 < int(told[1]) < 400


@pytest.mark.slow
def test_example_gives_the_same_by_deepspeed_and_by_launch(tmp_path: Path) -> None:
    script = str(ROOT / "scripts" / "examples" / "train_deepspeed.py")
    # As `deepspeed --num_gpus 2 ...` does, with the --local_rank that it adds.
    plainly = [sys.executable, "-m", "deepspeed.launcher.runner", "--num_gpus=2"]
    plainly += ["--quiet", f"--master_port={free_port()}", script, "--epochs=1"]
    port = free_port()
    launched = build_launch_command(
        [script, "--epochs=1"], num_gpus=2, master_port=port
    )
    said = []
    for command in (plainly, launched):
        done = subprocess.run(
            command,
            env=environment() | {"HARNESS_RUNS": str(tmp_path / "runs")},
            capture_output=True,
            text=True,
            check=True,
            cwd=tmp_path,
            timeout=300,
        )
        lines = done.stdout.splitlines()
        said.append(
            [line for line in lines if line.startswith(("ranks", "validation"))]
        )
    assert said[0] == said[1]
    assert said[0][0] == "ranks: 2, ZeRO: 2"


@pytest.mark.slow
def test_ctrl_c_reaches_every_rank_once(start: object) -> None:
    assert callable(start)
    run = start(by_harness, "wait")
    run.pids()
    run.process.send_signal(signal.SIGINT)
    assert run.code() == 130
    run.check_nothing_left()


@pytest.fixture(scope="module")
def on_ranks(tmp_path_factory: pytest.TempPathFactory) -> Launches:
    """Runs all refusals in one launch."""
    module = "tests.harness.accelerators.refusals"
    return Launches(tmp_path_factory.mktemp("refusals"), module)


@pytest.mark.parametrize("name", refusals.CASES)
def test_refusal_on_one_rank(name: str, on_ranks: Launches) -> None:
    said = on_ranks.said(2, [1], list(refusals.CASES), name, 1)
    assert said == "ok", said
