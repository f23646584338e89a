from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch

import harness
from harness.callbacks import TensorBoard
from tests.harness.checkpoint.test_resume import check_exact
from tests.harness.exact import VALID, Case, TwoParts, X, Y, adam
from tests.harness.fakes import Tape, line_learner, slope

OFF: dict[str, Any] = {"tracker": False, "verbose": False}


class Writer:
    """Keeps what a ``SummaryWriter`` would write."""

    def __init__(self) -> None:
        self.scalars: dict[str, list[tuple[int, float]]] = {}
        self.histograms: dict[tuple[str, int], torch.Tensor] = {}
        self.hparams: list[Any] = []
        self.flushed = 0

    def add_scalar(self, name: str, value: float, step: int) -> None:
        self.scalars.setdefault(name, []).append((step, value))

    def add_histogram(self, name: str, values: torch.Tensor, step: int) -> None:
        self.histograms[name, step] = values.clone()

    def add_hparams(self, *given: Any, **options: Any) -> None:
        self.hparams.append((*given, options))

    def flush(self) -> None:
        self.flushed += 1


def test_tensorboard_gets_each_metric_of_each_epoch():
    writer = Writer()
    fitted = adam().fit((X, Y), 2, VALID, callbacks=[TensorBoard(writer=writer)], **OFF)
    for split in ("train", "valid"):
        for name in ("loss", "accuracy", "auroc", "top"):
            values = [row[name] for row in fitted.records["metrics"][split]]
            assert writer.scalars[f"{split}/{name}"] == list(enumerate(values, start=1))
    assert writer.histograms == {}
    params, last, options = writer.hparams[0]
    assert params == {"opt.lr": 0.01}
    loss = fitted.records["metrics"]["valid"][-1]["loss"]
    assert last["last/valid/loss"] == loss
    assert options == {"run_name": "."}
    assert writer.flushed == 3


def test_tensorboard_gets_histograms_of_weights_and_gradients():
    writer = Writer()
    options = {"batch_size": 4}
    # x = 0..3, y = 2x, w = b = 0: gradients -2 mean(xy) = -14 and -2 mean(y) = -6.
    fitted = line_learner().fit(
        slope(4),
        4,
        callbacks=[TensorBoard(writer=writer, histograms=2)],
        dataloader_options=options,
        **OFF,
    )
    assert {epoch for _, epoch in writer.histograms} == {2, 4}
    assert torch.equal(writer.histograms["weights/w", 4], fitted.model.w.detach())
    first = Writer()
    line_learner().fit(
        slope(4),
        1,
        callbacks=[TensorBoard(writer=first, histograms=1)],
        dataloader_options=options,
        **OFF,
    )
    assert first.histograms["gradients/w", 1].item() == pytest.approx(-14)
    assert first.histograms["gradients/b", 1].item() == pytest.approx(-6)


def test_tensorboard_gets_the_losses_of_named_optimizers_by_name():
    writer = Writer()
    learner = harness.setup(TwoParts, loss=torch.nn.CrossEntropyLoss())
    learner.fit((X, Y), 1, callbacks=[TensorBoard(writer=writer)], **OFF)
    assert set(writer.scalars) == {"train/loss/body", "train/loss/head"}


def test_tensorboard_of_a_resumed_fit_writes_each_epoch_once(tmp_path):
    writer = Writer()
    case = Case(
        learner=adam,
        accumulate=2,
        callbacks=lambda folder: [
            TensorBoard(writer=Writer() if folder.name == "unbroken" else writer)
        ],
    )
    check_exact(case, tmp_path, [("on_train_batch_end", 8)])
    assert [step for step, _ in writer.scalars["train/loss"]] == [1, 2]


def test_tensorboard_writes_files_that_its_own_reader_reads(tmp_path):
    accumulator = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator"
    )
    fitted = line_learner().fit(
        slope(4), 2, callbacks=[TensorBoard(tmp_path, histograms=1)], **OFF
    )
    events = accumulator.EventAccumulator(str(tmp_path)).Reload()
    found = [event.value for event in events.Scalars("train/loss")]
    losses = [row["loss"] for row in fitted.records["metrics"]["train"]]
    assert found == pytest.approx(losses)
    assert "weights/w" in events.Tags()["histograms"]


def test_tensorboard_that_cannot_work_is_refused_before_training():
    tape = Tape()
    match = (
        r"TensorBoard\(folder\): expected a folder|the package 'tensorboard', got none"
    )
    with pytest.raises((ValueError, ImportError), match=match):
        line_learner().fit(slope(4), 1, callbacks=[TensorBoard(), tape], **OFF)
    assert tape.events == []
    with pytest.raises(
        ValueError, match=r"TensorBoard\(histograms\): expected at least 0"
    ):
        TensorBoard(histograms=-1)


@pytest.mark.slow
def test_tensorboard_is_only_imported_when_it_is_used():
    program = """
import sys, harness.callbacks
harness.callbacks.TensorBoard("x")
print([name for name in ("tensorboard", "psutil", "pynvml") if name in sys.modules])
"""
    run = [sys.executable, "-c", program]
    done = subprocess.run(run, capture_output=True, text=True, check=True)
    assert "tensorboard" not in done.stdout
    assert "pynvml" not in done.stdout
