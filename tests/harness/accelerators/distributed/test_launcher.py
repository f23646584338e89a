"""What launchers tell a rank, and how ranks are started."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from harness.accelerators.distributed.environment import (
    Launch,
    has_agent_store,
    read_launch,
    set_environment,
)
from harness.accelerators.distributed.launcher import (
    build_launch_command,
    launch,
    read_hostfile,
)

TORCHRUN = {
    "RANK": "3",
    "LOCAL_RANK": "1",
    "WORLD_SIZE": "4",
    "LOCAL_WORLD_SIZE": "2",
    "MASTER_ADDR": "node0",
    "MASTER_PORT": "1234",
}
SRUN = {
    "SLURM_PROCID": "5",
    "SLURM_LOCALID": "1",
    "SLURM_STEP_NUM_TASKS": "8",
    "SLURM_STEP_TASKS_PER_NODE": "4(x2)",
    "SLURM_STEP_NODELIST": "gpu[03-06,9]",
    "SLURM_JOB_ID": "70123",
}
MPIRUN = {
    "OMPI_COMM_WORLD_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_SIZE": "2",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
}


def test_no_launcher_is_one_rank() -> None:
    assert read_launch({}) == Launch()
    # An allocation without srun has started no tasks.
    assert read_launch({"SLURM_PROCID": "0", "SLURM_NTASKS": "8"}) == Launch()


def test_torchrun_and_deepspeed_are_read() -> None:
    found = read_launch(TORCHRUN | {"HARNESS_LAUNCHER_PID": "77"})
    assert found == Launch(
        rank=3,
        local_rank=1,
        world_size=4,
        local_world_size=2,
        address="node0",
        port=1234,
        by="torchrun",
        launcher_pid=77,
    )


def test_one_rank_of_a_launcher_needs_no_port() -> None:
    found = read_launch({"RANK": "0", "WORLD_SIZE": "1"})
    assert (found.world_size, found.address) == (1, None)


def test_slurm_is_read() -> None:
    found = read_launch(SRUN)
    assert (found.rank, found.local_rank, found.world_size) == (5, 1, 8)
    assert (found.local_world_size, found.address, found.by) == (4, "gpu03", "slurm")
    assert found.port == 29500 + 123


def test_mpi_on_one_machine_needs_no_address() -> None:
    found = read_launch(MPIRUN)
    assert (found.rank, found.world_size, found.address) == (1, 2, "127.0.0.1")
    intel = {
        "PMI_RANK": "0",
        "PMI_SIZE": "2",
        "MPI_LOCALRANKID": "0",
        "MPI_LOCALNRANKS": "2",
    }
    assert read_launch(intel).by == "mpi"


@pytest.mark.parametrize(
    ("env", "match"),
    [
        (
            {"RANK": "1", "WORLD_SIZE": "2"},
            r"expected LOCAL_RANK beside RANK and WORLD_SIZE",
        ),
        (TORCHRUN | {"WORLD_SIZE": "x"}, r"expected a number in WORLD_SIZE, got 'x'"),
        (TORCHRUN | {"RANK": "4"}, r"expected a rank in 0..3, got 4"),
        (
            MPIRUN | {"OMPI_COMM_WORLD_SIZE": "4"},
            r"expected MASTER_ADDR for 4 ranks, got none",
        ),
    ],
)
def test_launcher_that_says_half_is_refused(env: dict[str, str], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        read_launch(env)


def test_environment_is_put_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "False")
    with set_environment(TORCHELASTIC_USE_AGENT_STORE="True", HARNESS_TEST="1"):
        assert has_agent_store()
    assert not has_agent_store()


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


def test_command_is_deepspeeds(tmp_path: Path) -> None:
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


def test_command_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match=r"expected a script or -m module, got \[\]"):
        build_launch_command([])
    with pytest.raises(
        ValueError, match=r"launch\(num_gpus\): expected at least 1, got 0"
    ):
        build_launch_command(["x.py"], num_gpus=0)


@pytest.mark.parametrize(("code", "wanted"), [("0", 0), ("3", 3), ("kill", 137)])
def test_launch_gives_the_exit_code(code: str, wanted: int, tmp_path: Path) -> None:
    # In a process of its own: pytest's main thread keeps its signal handlers.
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
