from __future__ import annotations

import fcntl
import os
import pty
import re
import struct
import termios
import time
from contextlib import redirect_stderr
from typing import Any

import pytest

import harness
from harness.accelerators.single import SingleDevice
from harness.callbacks import EarlyStopping, Progress
from harness.callbacks.progress import REDRAW_S
from tests.harness.fakes import At, line_learner, slope

TIME = re.compile(r" +\d+\.\d\d s")


class Second(SingleDevice):
    """Another rank, as far as display goes."""

    is_main = False


def lines(capsys, *callbacks, epochs: Any = 2, **options):
    """What a fit writes where nobody watches."""
    options = {"verbose": True, "tracker": False} | options
    learner = line_learner().set_opt_hparams(lr=0.0)
    learner.fit(slope(2), epochs, slope(3), callbacks=callbacks, **options)
    written = capsys.readouterr()
    assert written.out == ""
    return [TIME.sub(" T s", line) for line in written.err.splitlines()]


def test_progress_without_a_terminal_writes_a_line_an_epoch(capsys):
    # x = 0, 1 at w = b = 0: (0 + 4) / 2; with 2: (0 + 4 + 16) / 3
    assert lines(capsys) == [
        "epoch 1/2 T s  train: loss 2      | valid: loss 6.667",
        "epoch 2/2 T s  train: loss 2      | valid: loss 6.667",
    ]


def test_progress_is_silent_unless_verbose(capsys):
    assert lines(capsys, verbose=False) == []


def test_progress_where_nobody_watches_is_silent_by_default(capsys):
    assert lines(capsys, verbose=None) == []


def test_progress_of_other_ranks_is_silent(capsys):
    assert lines(capsys, accelerator=Second("cpu")) == []


def test_progress_tells_of_an_early_stop(capsys):
    # The losses stay as they are: the second epoch is no better.
    found = lines(capsys, EarlyStopping(), epochs=10)
    assert [line.split()[:2] for line in found[:2]] == [
        ["epoch", "1/10"],
        ["epoch", "2/10"],
    ]
    assert found[2:] == ["stopped early after epoch 2"]


def on_a_terminal(*callbacks: Any, epochs: int = 2) -> str:
    """What a fit writes to a terminal."""
    main, side = pty.openpty()
    fcntl.ioctl(side, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    text = ""
    with os.fdopen(side, "w") as terminal, redirect_stderr(terminal):
        line_learner().fit(
            slope(2), epochs, slope(2), callbacks=callbacks, verbose=None, tracker=False
        )
        terminal.flush()
        os.set_blocking(main, False)
        while True:
            try:
                text += os.read(main, 65536).decode()
            except BlockingIOError:
                break
    os.close(main)
    return text


def screen(text: str) -> list[str]:
    """Lines that are left to see when every carriage return has overwritten its line."""
    shown = []
    for line in text.replace("\x1b[A", "").split("\n"):
        cells: list[str] = []
        for part in line.split("\r"):
            cells[: len(part)] = list(part)
        shown.append("".join(cells).rstrip())
    return [line for line in shown if line]


def test_progress_on_a_terminal_draws_bars_and_wipes_them():
    text = on_a_terminal()
    for bar in ("epoch 1/2 train", "epoch 1/2 valid", "epoch 2/2 train"):
        assert bar in text
    left = screen(text)
    assert [line.split()[:2] for line in left] == [["epoch", "1/2"], ["epoch", "2/2"]]
    assert all("train: loss" in line and "%" not in line for line in left)


def skip(ctx: Any) -> None:
    if ctx.epoch == 1:
        raise harness.SkipEpoch


def test_progress_of_a_skipped_epoch_leaves_no_bar_behind():
    left = screen(on_a_terminal(At("on_train_batch_end", skip)))
    assert [line.split()[:2] for line in left] == [["epoch", "2/2"]]


def test_progress_of_a_fit_that_fails_leaves_the_terminal_usable():
    progress: list[Any] = []

    def fail(ctx: Any) -> None:
        progress.extend(cb for cb in ctx.callbacks if isinstance(cb, Progress))
        raise ArithmeticError

    with pytest.raises(ArithmeticError):
        on_a_terminal(At("on_train_batch_end", fail))
    assert progress[0]._bar is None


def test_progress_on_a_terminal_moves_its_bar_and_shows_the_loss():
    def wait(_: Any) -> None:
        time.sleep(REDRAW_S)  # so that a redraw is due at the end of the batch

    text = on_a_terminal(At("on_train_batch_begin", wait), epochs=1)
    assert re.search(r"epoch 1/1 train +100% .* 1/1 .*loss 2\b", text)
