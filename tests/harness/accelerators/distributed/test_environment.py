"""What is read from the variables of each launcher."""

from __future__ import annotations

import pytest

from harness.accelerators.distributed.environment import (
    Agent,
    Launch,
    first_host,
    read_agent,
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


PMI = {"PMI_RANK": "5", "PMI_SIZE": "8"}
POD = {"KUBERNETES_SERVICE_HOST": "10.0.0.1", "MASTER_ADDR": "job-master-0"}
TWO_NODES = SRUN | {"SLURM_STEP_TASKS_PER_NODE": "4,3,1", "SLURM_NODEID": "1"}


@pytest.mark.parametrize(
    ("env", "place"),
    [
        pytest.param(SRUN | PMI, (5, 1, 8, 4, "gpu03"), id="srun with PMI"),
        pytest.param(
            SRUN | {"RANK": "5", "WORLD_SIZE": "8"},
            (5, 1, 8, 4, "gpu03"),
            id="srun with exported ranks",
        ),
        pytest.param(
            SRUN | {"WORLD_SIZE": "8", "MASTER_ADDR": "head"},
            (5, 1, 8, 4, "head"),
            id="srun with an exported world size",
        ),
        pytest.param(TWO_NODES, (5, 1, 8, 3, "gpu03"), id="srun on uneven nodes"),
        pytest.param(
            {name: text for name, text in SRUN.items() if "NODELIST" not in name}
            | {"SLURM_JOB_NODELIST": "n[7-8]"},
            (5, 1, 8, 4, "n7"),
            id="srun with the nodes of the job",
        ),
        pytest.param(
            SRUN
            | PMI
            | {"PMI_RANK": "2", "PMI_SIZE": "16", "MPI_LOCALRANKID": "2"}
            | {"MPI_LOCALNRANKS": "8", "MASTER_ADDR": "head"},
            (2, 2, 16, 8, "head"),
            id="mpirun through srun",
        ),
        pytest.param(
            PMI | {"PMI_LOCAL_RANK": "1", "PMI_LOCAL_SIZE": "4", "MASTER_ADDR": "x1"},
            (5, 1, 8, 4, "x1"),
            id="Cray",
        ),
        pytest.param(
            PMI | {"PALS_LOCAL_RANKID": "1", "PALS_RANKID": "5", "MASTER_ADDR": "x1"},
            (5, 1, 8, 8, "x1"),
            id="Cray without a local size",
        ),
        pytest.param(
            {
                "MV2_COMM_WORLD_RANK": "1",
                "MV2_COMM_WORLD_SIZE": "2",
                "MV2_COMM_WORLD_LOCAL_RANK": "1",
                "MV2_COMM_WORLD_LOCAL_SIZE": "2",
            },
            (1, 1, 2, 2, "127.0.0.1"),
            id="MVAPICH2",
        ),
        pytest.param(
            {
                "FLUX_TASK_RANK": "3",
                "FLUX_JOB_SIZE": "4",
                "FLUX_TASK_LOCAL_ID": "1",
                "MASTER_ADDR": "f0",
            },
            (3, 1, 4, 4, "f0"),
            id="Flux",
        ),
        pytest.param(
            POD | {"RANK": "2", "WORLD_SIZE": "3"},
            (2, 0, 3, 1, "job-master-0"),
            id="Kubernetes",
        ),
    ],
)
def test_place_is_read_from_what_the_launcher_sets(
    env: dict[str, str], place: tuple[object, ...]
) -> None:
    found = read_launch(env)
    sizes = found.rank, found.local_rank, found.world_size, found.local_world_size
    assert (*sizes, found.address) == place


@pytest.mark.parametrize(
    ("nodes", "host"),
    [
        ("gpu[03-06,9]", "gpu03"),
        ("gpu[01-02]-ib", "gpu01-ib"),
        ("rack[1-2]n[4-5]", "rack1n4"),
        ("login,gpu[03-06]", "login"),
        ("a[2,4-5]-x[10,12],b3", "a2-x10"),
        ("node7", "node7"),
        ("n-1.cluster.org,n-2.cluster.org", "n-1.cluster.org"),
    ],
)
def test_first_host_of_a_node_list(nodes: str, host: str) -> None:
    assert first_host(nodes) == host


@pytest.mark.parametrize(
    ("env", "match"),
    [
        (
            {"RANK": "1", "WORLD_SIZE": "2"},
            r"expected LOCAL_RANK with RANK and WORLD_SIZE",
        ),
        (TORCHRUN | {"WORLD_SIZE": "x"}, r"expected a number in WORLD_SIZE, got 'x'"),
        (TORCHRUN | {"RANK": "4"}, r"expected a rank in 0..3, got 4"),
        (
            MPIRUN | {"OMPI_COMM_WORLD_SIZE": "4"},
            r"expected MASTER_ADDR for 4 ranks, got none",
        ),
        (
            PMI | {"MASTER_ADDR": "a"},
            r"expected MPI_LOCALRANKID or PMI_LOCAL_RANK or PALS_LOCAL_RANKID with PMI_RANK and",
        ),
        (
            PMI | {"PMI_LOCAL_RANK": "1"},  # perhaps on several machines
            r"expected MASTER_ADDR for 8 ranks, got none",
        ),
        ({"RANK": "0"}, r"expected WORLD_SIZE with RANK='0', got none.*unset RANK"),
        ({"WORLD_SIZE": "2"}, r"expected RANK with WORLD_SIZE='2', got none"),
        ({"PMI_RANK": "0"}, r"expected PMI_SIZE with PMI_RANK='0', got none"),
        (
            {"MV2_COMM_WORLD_SIZE": "4"},
            r"expected MV2_COMM_WORLD_RANK with MV2_COMM_WORLD_SIZE='4'",
        ),
        (
            {"SLURM_PROCID": "3", "SLURM_NTASKS": "8"},
            r"expected SLURM_STEP_NUM_TASKS with SLURM_PROCID='3'",
        ),
        ({"PMIX_RANK": "1"}, r"expected the number of ranks with PMIX_RANK='1'"),
        (
            TORCHRUN | {"MASTER_PORT": "99999"},
            r"expected MASTER_PORT in 1..65535, got 99999",
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
        assert read_agent().has_store
    assert not read_agent().has_store


def test_agent_tells_which_attempt_this_is() -> None:
    env = {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "2"}
    assert read_agent(env) == Agent(has_store=True, attempt=2)
    assert read_agent({}) == Agent()


def test_ranks_of_launch_know_its_options() -> None:
    env = TORCHRUN | {"HARNESS_LAUNCH_OPTIONS": '{"num_gpus": 2}'}
    assert read_launch(env).options == {"num_gpus": 2}
    assert read_launch(TORCHRUN).options is None
