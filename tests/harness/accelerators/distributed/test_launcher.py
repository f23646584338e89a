"""The command that starts ranks, and the end of their processes."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import time
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest

from harness.accelerators.distributed.launcher import (
    build_launch_command,
    check_hosts,
    choose_hosts,
    launch,
    read_hostfile,
)

pytestmark = pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")


def test_hostfile_is_read(tmp_path: Path) -> None:
    path = tmp_path / "hosts"
    path.write_text("# ours\nnode0 slots=4\n\nnode1   slots=2 # slow\n")
    assert read_hostfile(path) == {"node0": 4, "node1": 2}


@pytest.mark.parametrize(
    ("text", "match"),
    [
        (
            None,
            r"hosts'\): expected a file of lines 'name slots=N', got a path that does not",
        ),
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


@pytest.mark.parametrize(
    "content",
    [
        "node0 slots=4\n".encode("utf-8-sig"),
        "node0 slots=4\n".encode("utf-16"),
        "node\xe4 slots=4\n".encode("latin-1"),
    ],
)
def test_hostfile_that_is_no_plain_utf8_is_refused(
    content: bytes, tmp_path: Path
) -> None:
    path = tmp_path / "hosts"
    path.write_bytes(content)
    with pytest.raises(
        ValueError, match=r"expected plain UTF-8, got .* Save it as UTF-8"
    ):
        read_hostfile(path)


HOSTS = "node0 slots=4\nnode1 slots=2\nnode2 slots=2\n"


@pytest.mark.parametrize(
    ("options", "hosts"),
    [
        ({}, ["node0", "node1", "node2"]),
        ({"num_nodes": 2}, ["node0", "node1"]),
        ({"include": "node2@node0:1,3"}, ["node0", "node2"]),
        ({"exclude": "node0"}, ["node1", "node2"]),
        ({"exclude": "node0:0@node1"}, ["node0", "node2"]),
        ({"num_nodes": 4}, r"launch\(num_nodes\): expected at most 3 machines, got 4"),
        ({"include": "node3"}, r"expected one of node0, node1, node2, got 'node3'"),
        ({"include": "node1:2"}, r"a slot in 0..1 of 'node1', got 2"),
        ({"include": "node0:a"}, r"expected NAME or NAME:SLOT,SLOT, joined by '@'"),
        ({"exclude": "0,1"}, r"expected NAME or NAME:SLOT,SLOT.*got '0,1'"),
        ({"include": "node0", "exclude": "node1"}, r"expected one, got 'node0' and"),
        ({"include": "node0", "num_gpus": 2}, r"expected no num_gpus or num_nodes"),
    ],
)
def test_machines_are_chosen_as_deepspeed_does(
    options: dict[str, object], hosts: list[str] | str, tmp_path: Path
) -> None:
    path = tmp_path / "hosts"
    path.write_text(HOSTS)
    if isinstance(hosts, str):
        with pytest.raises(ValueError, match=hosts):
            build_launch_command(["train.py"], hostfile=path, **options)
    else:
        assert choose_hosts(path, **options) == hosts


def test_machines_without_a_hostfile_are_this_one() -> None:
    assert choose_hosts(None, include="localhost:0,1") == ["localhost"]
    with pytest.raises(ValueError, match=r"expected one of localhost, got 'node0'"):
        build_launch_command(["train.py"], include="node0")
    with pytest.raises(ValueError, match=r"expected at most 1 machines, got 2"):
        build_launch_command(["train.py"], num_nodes=2)


def test_machine_that_does_not_answer_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("ssh", "pdsh"):
        script = tmp_path / name
        script.write_text(
            '#!/bin/sh\ncase "$*" in *" -p 7 "*) exit 0;; *bad*) '
            "echo Warning: a key was added >&2; "
            "echo ssh: Could not resolve hostname bad >&2; exit 255;; esac\n"
        )
        script.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    check_hosts(["good", "better"])
    check_hosts(["bad"], ssh_port=7)
    with pytest.raises(
        ValueError,
        match=r"launch: expected 'bad' to answer by ssh, got 'ssh: Could not resolve",
    ):
        check_hosts(["good", "bad"])
    (tmp_path / "pdsh").unlink()
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(
        ValueError, match=r"expected 'pdsh' for ranks on a, b, found no"
    ):
        check_hosts(["a", "b"])


def test_port_that_does_not_exist_is_refused() -> None:
    for port in (0, 65536, 99999):
        with pytest.raises(ValueError, match=rf"expected 1..65535, got {port}"):
            build_launch_command(["train.py"], master_port=port)


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


@pytest.mark.parametrize(
    ("words", "visible", "program"),
    [
        ([], "", "launch"),
        (["--enable_each_rank_log=logs", "--bind_cores_to_rank"], "", "launch"),
        ([], "2,3", "runner"),
        (["--force_multi"], "", "runner"),
        (["--no_ssh", "--node_rank=0"], "", "runner"),
    ],
)
def test_ranks_of_one_machine_are_started_without_the_runner(
    words: list[str], visible: str, program: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    found = build_launch_command(
        ["-m", "own", "--quiet"],
        num_gpus=2,
        master_port=7,
        launcher_options=words,
        verbose=True,
    )
    assert f"deepspeed.launcher.{program}" in found
    if program == "launch":
        # As DeepSpeed 0.19.8 writes {"localhost": [0, 1]}.
        assert found[4:] == [
            "--world_info=eyJsb2NhbGhvc3QiOiBbMCwgMV19",
            *words,
            "--no_local_rank",
            "--master_port=7",
            "--module",
            "own",
            "--quiet",
        ]
    # Only the runner knows how many devices there are.
    assert "deepspeed.launcher.runner" in build_launch_command(["x.py"])


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


def fork_launch(command: list[str], **options: float) -> BaseProcess:
    """A process that launches a command; it is forked, as its imports take seconds."""
    process = multiprocessing.get_context("fork").Process(
        target=lambda: os._exit(launch(command, **options))
    )
    process.start()
    return process


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
    caller = fork_launch([sys.executable, "-c", starting], grace_s=0)
    caller.join(60)
    assert caller.exitcode == 4
    assert not Path(f"/proc/{note.read_text()}").exists()


def test_signal_reaches_each_rank_once_and_not_the_launchers(tmp_path: Path) -> None:
    # Two ranks below an inner launcher, which would fail at a signal.
    rank = (
        "import os, signal, sys, time\n"
        "got = []\n"
        "signal.signal(signal.SIGTERM, lambda number, _: got.append(number))\n"
        f"path = {str(tmp_path)!r} + '/rank-' + sys.argv[1]\n"
        "open(path, 'w').close()\n"
        "while not got: time.sleep(0.01)\n"
        "time.sleep(0.3)\n"
        "open(path, 'w').write(str(len(got)))\n"
        "sys.exit(7)"
    )
    inner = (
        "import subprocess, sys\n"
        f"ranks = [subprocess.Popen([sys.executable, '-c', {rank!r}, n]) for n in '01']\n"
        "sys.exit(max([rank.wait() for rank in ranks]))"
    )
    caller = fork_launch([sys.executable, "-c", inner, "deepspeed.launcher.launch"])
    paths = [tmp_path / f"rank-{rank}" for rank in "01"]
    while not all(path.exists() for path in paths):
        assert caller.is_alive()
        time.sleep(0.05)
    caller.terminate()
    caller.join(60)
    assert caller.exitcode == 128 + signal.SIGTERM
    assert [path.read_text() for path in paths] == ["1", "1"]
