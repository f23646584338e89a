"""What is read from the variables of each launcher."""

from __future__ import annotations

import pytest

from harness.accelerators.distributed.environment import (
    Launch,
    has_agent_store,
    read_launch,
    set_environment,
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
def test_incomplete_or_wrong_variables_are_refused(
    env: dict[str, str], match: str
) -> None:
    with pytest.raises(ValueError, match=match):
        read_launch(env)


def test_environment_is_restored(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "False")
    with set_environment(TORCHELASTIC_USE_AGENT_STORE="True", HARNESS_TEST="1"):
        assert has_agent_store()
    assert not has_agent_store()
