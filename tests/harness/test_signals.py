"""Handlers of signals; tests/harness/callbacks/test_interrupt.py has them in fits."""

from __future__ import annotations

import faulthandler
import signal

import pytest

from harness.signals import SignalHandlers, has_handler

NUMBER = signal.SIGUSR2


@pytest.fixture
def stacks(tmp_path):
    """A file for the stacks that a handler in C writes, if a test installs it."""
    with (tmp_path / "stacks").open("w") as file:
        yield file
        faulthandler.unregister(NUMBER)
        signal.signal(NUMBER, signal.SIG_DFL)


def count_bytes(stacks):
    """Size of the file after the signal."""
    signal.raise_signal(NUMBER)
    return stacks.seek(0, 2)


def test_handler_in_c_is_seen_and_put_back(stacks):
    faulthandler.register(NUMBER, stacks)
    assert signal.getsignal(NUMBER) == signal.SIG_DFL
    assert has_handler(NUMBER)
    got, handlers = [], SignalHandlers()
    handlers.take(NUMBER, lambda *_: got.append(NUMBER))
    assert count_bytes(stacks) == 0
    assert got == [NUMBER]
    handlers.restore()
    assert count_bytes(stacks) > 0
    assert got == [NUMBER]


def test_handler_that_c_installed_meanwhile_stays(stacks):
    handlers = SignalHandlers()
    handlers.take(NUMBER, lambda *_: None)
    faulthandler.register(NUMBER, stacks)
    handlers.restore()
    assert count_bytes(stacks) > 0


def test_signal_without_a_handler_is_told_from_others():
    assert not has_handler(NUMBER)
    before = signal.signal(NUMBER, signal.SIG_IGN)
    try:
        assert has_handler(NUMBER)
    finally:
        signal.signal(NUMBER, before)
