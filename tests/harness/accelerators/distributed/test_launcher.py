"""The command that starts ranks, and the end of their processes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from harness.accelerators.distributed.launcher import (
    build_launch_command,
    launch,
    read_hostfile,
)


def test_hostfile_is_read(tmp_path: Path) -> None:
    path = tmp_path / "hosts"
    path.write_text("# ours\nnode0 slots=4\n\nnode1   slots=2 # slow\n")
    assert read_hostfile(path) == {"node0": 4, "node1": 2}


@pytest.mark.parametrize(
    ("text", "match"),
    [
        (None, r"hosts'\): expected a file of lines 'name slots=N', got no such file"),
        ("node0\n", r"expected 'name slots=N' on line 1, got 'node0'"),
        ("a slots=1\nb slots=none\n", r"on line 2, got 'b slots=none'"),
        ("a slots=0\n", r"on line 1, got 'a slots=0'"),
        ("a slots=1\na slots=2\n", r"expected each host once, got 'a' again on line 2"),
        ("# nothing\n", r"expected at least one host, got none"),
    ],
)
def test_hostfile_that_is_wrong_is_refused(
    text: str | None, match: str, tmp_path: Path
) -> None:
    path = tmp_path / "hosts"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ValueError, match=match):
        build_launch_command(["train.py"], hostfile=path)


def test_command_runs_deepspeeds_launcher(tmp_path: Path) -> None:
    hosts = tmp_path / "hosts"
    hosts.write_text("node0 slots=4\n")
    found = build_launch_command(
        ["-m", "harness", "fit", "x.py:e"],
        num_gpus=2,
        num_nodes=1,
        hostfile=hosts,
        master_port=1,
        launcher_options=["--launcher=slurm"],
    )
    assert found[:3] == [sys.executable, "-m", "deepspeed.launcher.runner"]
    assert found[3:] == [
        f"--hostfile={hosts}",
        "--quiet",
        "--launcher=slurm",
        "--no_local_rank",
        "--num_gpus=2",
        "--num_nodes=1",
        "--master_port=1",
        "--module",
        "harness",
        "fit",
        "x.py:e",
    ]
    assert "--quiet" not in build_launch_command(["x.py"], verbose=True)


def test_empty_command_is_refused() -> None:
    with pytest.raises(ValueError, match=r"expected a script or -m module, got \[\]"):
        build_launch_command([])
    with pytest.raises(
        ValueError, match=r"launch\(num_gpus\): expected at least 1, got 0"
    ):
        build_launch_command(["x.py"], num_gpus=0)


@pytest.mark.parametrize(("code", "wanted"), [("0", 0), ("3", 3), ("kill", 137)])
def test_launch_returns_the_exit_code(code: str, wanted: int, tmp_path: Path) -> None:
    ending = "os.kill(os.getpid(), 9)" if code == "kill" else f"sys.exit({code})"
    command = [sys.executable, "-c", f"import os, sys; {ending}"]
    assert launch(command) == wanted


def test_launch_leaves_no_process_behind(tmp_path: Path) -> None:
    # The command starts a process that outlives it, as DeepSpeed's runner does.
    note = tmp_path / "pid"
    lasting = f"import os, time; open({str(note)!r}, 'w').write(str(os.getpid())); time.sleep(60)"
    starting = (
        "import subprocess, sys, time, os\n"
        f"subprocess.Popen([sys.executable, '-c', {lasting!r}])\n"
        f"while not os.path.exists({str(note)!r}): time.sleep(0.05)\n"
        "sys.exit(4)"
    )
    caller = (
        "import sys; from harness.accelerators.distributed import launcher as l\n"
        f"sys.exit(l.launch([sys.executable, '-c', {starting!r}], grace_s=0))"
    )
    done = subprocess.run([sys.executable, "-c", caller], timeout=60, check=False)
    assert done.returncode == 4
    assert not Path(f"/proc/{note.read_text()}").exists()
