"""Workers of a loader leave signals to the main process, and end with it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, Dataset, get_worker_info

import tracking
from harness.data.workers import iter_batches
from harness.pytree import iter_tensors
from tests.harness.fakes import At, is_running, line_learner

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
METHODS = [
    "fork",
    pytest.param("spawn", marks=pytest.mark.slow),
    pytest.param("forkserver", marks=pytest.mark.slow),
]


class Pids(Dataset):
    """Rows that hold the process that read them, in parts that float32 holds exactly."""

    def __len__(self) -> int:
        return 8

    def __getitem__(self, row: int) -> tuple[torch.Tensor, torch.Tensor]:
        parts = divmod(os.getpid(), 1 << 12)
        return torch.zeros(2), torch.tensor(parts, dtype=torch.float32)


def kill_worker(ctx):
    """Send every signal of a process group to the worker, and none to this process."""
    high, low = ctx.target[0].tolist()
    for number in SIGNALS * 2:
        os.kill((int(high) << 12) + int(low), number)


def make_loader(method="fork", **options):
    return DataLoader(
        Pids(), batch_size=2, num_workers=1, multiprocessing_context=method, **options
    )


@pytest.mark.parametrize("method", METHODS)
def test_signals_of_the_group_leave_workers_alive(method):
    fitted = line_learner().fit(
        make_loader(method),
        1,
        make_loader(method),
        callbacks=[
            At("on_train_batch_begin", lambda ctx: ctx.iter == 1 and kill_worker(ctx)),
            At("on_valid_batch_begin", lambda ctx: ctx.iter == 1 and kill_worker(ctx)),
        ],
        tracker=False,
        verbose=False,
    )
    assert fitted.records["profile"]["train"][0]["batches"] == 4
    assert fitted.records["profile"]["valid"][0]["batches"] == 4
    assert not fitted.is_interrupted


class Hangs(Dataset):
    def __len__(self) -> int:
        return 1

    def __getitem__(self, row: int) -> int:
        while True:
            time.sleep(0.01)


def test_worker_that_hangs_ends_by_sigterm_only_after_the_pass():
    handlers = {
        signal.SIGTERM: lambda *_: None,
        signal.SIGCHLD: signal.SIG_DFL,  # torch raises from a handler of its own
    }
    batches: Any = iter(DataLoader(Told(), num_workers=1))  # torch sets it once
    before = {number: signal.signal(number, new) for number, new in handlers.items()}
    try:
        batches = iter_batches(DataLoader(Hangs(), num_workers=1))
        (worker,) = batches._workers
        for _ in range(2):
            os.kill(worker.pid, signal.SIGTERM)
        worker.join(0.2)
        assert worker.exitcode is None
        batches._workers_done_event.set()
        worker.terminate()
        worker.join(60)
        assert worker.exitcode == 128 + signal.SIGTERM
    finally:
        del batches
        for number, old in before.items():
            signal.signal(number, old)


class Told(Dataset):
    """Rows that tell how the worker was prepared."""

    def __len__(self) -> int:
        return 2

    def __getitem__(self, row: int) -> list[bool]:
        info = get_worker_info()
        return [
            info.dataset.is_prepared,
            signal.getsignal(signal.SIGINT) == signal.SIG_IGN,
            signal.getsignal(signal.SIGTERM) == signal.SIG_DFL,
            bool(signal.pthread_sigmask(signal.SIG_BLOCK, []) & set(SIGNALS)),
        ]


def prepare(worker: int) -> None:
    get_worker_info().dataset.is_prepared = True


def test_worker_is_prepared_by_the_user_and_the_loader_stays_as_it_was():
    loader = DataLoader(Told(), None, num_workers=1, worker_init_fn=prepare)
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, [])
    rows = list(iter_batches(loader))
    # SIGTERM has no handler here, so the worker keeps the default.
    assert rows == [[True, True, True, False]] * 2
    assert loader.worker_init_fn is prepare
    assert signal.pthread_sigmask(signal.SIG_BLOCK, []) == mask
    assert not list(iter_tensors(rows))


PROGRAM = """
import os, signal, sys, threading, time
import torch, harness
from torch.utils.data import DataLoader, Dataset

class Slow(Dataset):
    def __len__(self): return 12
    def __getitem__(self, row):
        time.sleep(.1)  # so that the signal comes while the loop waits for a batch
        return torch.ones(4), torch.ones(1)

class Kill(harness.Callback):
    def on_train_batch_end(self):
        if sys.argv[3] == "train" and self.ctx.iter == 2: self.kill()
    def on_valid_batch_end(self):
        if sys.argv[3] == "valid" and self.ctx.iter == 2: self.kill()
    def kill(self):
        number = getattr(signal, sys.argv[2])
        threading.Timer(.05, lambda: os.killpg(0, number)).start()

def loader():
    return DataLoader(Slow(), 4, num_workers=1, multiprocessing_context=sys.argv[1])

if __name__ == "__main__":
    learner = harness.setup(
        torch.nn.LazyLinear, loss=torch.nn.MSELoss(), optimizer=torch.optim.SGD
    ).set_hparams(out_features=1)
    fitted = learner.fit(
        loader(), 2, loader(), verbose=False, tracker={"delivery": False},
        callbacks=[Kill(), harness.callbacks.ModelCheckpoint()],
    )
    print("in order:", fitted.signum)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "number", "split", "saved"),
    [
        ("spawn", "SIGINT", "train", "000001-epoch-1-batch-3-step-3"),
        ("spawn", "SIGTERM", "valid", "000001-epoch-1-batch-3-step-3"),
        ("forkserver", "SIGINT", "train", "000001-epoch-1-batch-3-step-3"),
    ],
)
def test_signal_to_the_group_ends_the_fit_in_order(
    method, number, split, saved, tmp_path
):
    (tmp_path / "train.py").write_text(PROGRAM)
    done = subprocess.run(
        [sys.executable, "train.py", method, number, split],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[3])},
        capture_output=True,
        text=True,
        timeout=300,
        start_new_session=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert f"in order: {getattr(signal, number)}" in done.stdout
    assert "Traceback" not in done.stderr
    (run,) = tracking.list_runs(tmp_path / "runs")
    assert run.status == "killed"
    assert [path.name for path in (run.path / "checkpoints").iterdir()] == [saved]


KILLED = """
import os, sys, time
from torch.utils.data import DataLoader, Dataset
from harness.data.workers import iter_batches

class Rows(Dataset):
    def __len__(self): return 100
    def __getitem__(self, row):
        if sys.argv[2] == "hang" and row:
            time.sleep(1000)
        return os.getpid()

if __name__ == "__main__":
    loader = DataLoader(Rows(), 1, num_workers=1, multiprocessing_context=sys.argv[1])
    print(int(next(iter_batches(loader))), flush=True)
    os.kill(os.getpid(), 9)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "how"), [("fork", "hang"), ("spawn", "hang"), ("forkserver", "idle")]
)
def test_workers_of_a_killed_process_end(method, how, tmp_path):
    (tmp_path / "train.py").write_text(KILLED)
    with (tmp_path / "log").open("w") as log:
        done = subprocess.run(
            [sys.executable, "train.py", method, how],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[3])},
            stdout=subprocess.PIPE,
            stderr=log,
            timeout=100,
            check=False,
        )
    assert done.returncode == -signal.SIGKILL
    worker, until = int(done.stdout), time.monotonic() + 60
    while is_running(worker):
        assert time.monotonic() < until
        time.sleep(0.05)
