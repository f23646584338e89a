from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import pytest

from harness.accelerators.single import SingleDevice
from harness.callbacks import AutoResume, ModelCheckpoint, Requeue
from harness.checkpoint.format import list_checkpoints
from tests.harness.exact import Stop
from tests.harness.fakes import Tape, line_learner, slope

SCONTROL = """#!/bin/sh
ls "{saved}" > "{folder}/saved.txt"
echo "$@" >> "{folder}/called.txt"
echo "slurm_requeue error: not allowed" >&2
exit {code}
"""


@pytest.fixture
def called(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Put a program ``scontrol`` on the path; returns what it was called with."""

    def install(code: int = 0) -> Path:
        program = tmp_path / "scontrol"
        saved = tmp_path / "saved"
        program.write_text(SCONTROL.format(folder=tmp_path, saved=saved, code=code))
        program.chmod(0o755)
        monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
        monkeypatch.setenv("SLURM_JOB_ID", "77")
        return tmp_path / "called.txt"

    return install


def fit(tmp_path: Path, signum: int | None, epochs: int = 3) -> Any:
    stop = [Stop("on_train_batch_end", 2, signum)] if signum else []
    return line_learner().fit(
        slope(8),
        epochs,
        callbacks=[Requeue(), AutoResume(tmp_path / "saved"), *stop],
        accelerator=SingleDevice("cpu"),
        dataloader_options={"batch_size": 2},
        tracker=False,
        verbose=False,
        seed=1,
    )


def test_requeue_puts_the_job_back_when_the_checkpoint_is_written(tmp_path, called):
    path = called()
    fitted = fit(tmp_path, signal.SIGUSR1)
    assert fitted.signum == signal.SIGUSR1
    assert path.read_text() == "requeue 77\n"
    assert "batch-2" in (tmp_path / "saved.txt").read_text()
    resumed = fit(tmp_path, None)
    assert path.read_text() == "requeue 77\n"
    assert len(resumed.records["metrics"]["train"]) == 3
    assert list_checkpoints(tmp_path / "saved") == []


def test_requeue_of_an_array_job_names_the_task(tmp_path, called, monkeypatch):
    path = called()
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "70")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "3")
    fit(tmp_path, signal.SIGUSR1)
    assert path.read_text() == "requeue 70_3\n"


def test_requeue_leaves_other_signals_and_other_machines_alone(
    tmp_path, called, monkeypatch
):
    path = called()
    fit(tmp_path / "one", signal.SIGINT)
    monkeypatch.delenv("SLURM_JOB_ID")
    fit(tmp_path / "two", signal.SIGUSR1)
    assert not path.exists()


def test_requeue_that_slurm_refuses_is_told(tmp_path, called):
    called(code=1)
    with pytest.warns(
        UserWarning, match="'scontrol requeue 77' to succeed, got: slurm_"
    ):
        fit(tmp_path, signal.SIGUSR1)


def test_requeue_of_a_program_that_handles_the_signal_is_refused(tmp_path, called):
    called()
    before = signal.signal(signal.SIGUSR1, lambda *_: None)
    try:
        with pytest.raises(ValueError, match="Requeue: expected SIGUSR1 without a han"):
            fit(tmp_path, None)
    finally:
        signal.signal(signal.SIGUSR1, before)


@pytest.mark.parametrize(
    ("others", "missing"), [([], "AutoResume"), ([ModelCheckpoint("x")], "AutoResume")]
)
def test_requeue_without_a_way_to_continue_is_refused(others, missing):
    tape = Tape()
    with pytest.raises(ValueError, match=f"Requeue: expected callbacks.*no {missing}"):
        line_learner().fit(
            slope(4), 1, callbacks=[Requeue(), *others, tape], tracker=False
        )
    assert tape.events == []
