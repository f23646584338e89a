from __future__ import annotations

import signal
import threading
from typing import Any

import pytest

from tests.harness.fakes import At, Tape, line_learner, slope

OFF: dict[str, Any] = {"tracker": False, "verbose": False}
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


def handlers():
    return [signal.getsignal(number) for number in SIGNALS]


def raising(*numbers, event="on_train_batch_begin", epoch=2):
    def act(ctx):
        if ctx.epoch == epoch:
            for number in numbers:
                signal.raise_signal(number)

    return At(event, act)


def fit(*callbacks, epochs=3):
    return line_learner().fit(slope(4), epochs, callbacks=callbacks, **OFF)


@pytest.mark.parametrize("number", SIGNALS)
def test_signal_ends_the_fit_in_order_and_is_told(number):
    before = handlers()
    fitted = fit(raising(number))
    assert fitted.signum == number
    assert fitted.is_interrupted
    assert len(fitted.records["metrics"]["train"]) == 1
    assert handlers() == before


def test_signals_are_given_back_after_a_whole_fit():
    before = handlers()
    during = []
    fitted = fit(At("on_train_batch_end", lambda _: during.append(handlers())))
    assert handlers() == before
    assert all(seen[0] != before[0] for seen in during)
    assert fitted.signum is None
    assert not fitted.is_interrupted


def test_signals_are_given_back_after_an_error_before_the_first_epoch():
    before = handlers()
    with pytest.raises(ZeroDivisionError):
        fit(At("on_fit_begin", lambda _: 1 / 0, weight=float("inf")))
    assert handlers() == before


def test_second_signal_leaves_at_once():
    before = handlers()
    tape = Tape()
    with pytest.raises(KeyboardInterrupt):
        fit(raising(signal.SIGINT, signal.SIGINT), tape)
    assert tape.events[-2:] == ["on_train_batch_begin", "on_exception"]
    assert handlers() == before


def test_fit_after_one_that_was_left_is_clean():
    with pytest.raises(KeyboardInterrupt):
        fit(raising(signal.SIGINT, signal.SIGINT))
    fitted = fit()
    assert len(fitted.records["metrics"]["train"]) == 3
    assert fitted.signum is None


def test_signal_after_the_last_batch_of_the_fit_changes_nothing():
    fitted = fit(raising(signal.SIGINT, event="on_epoch_end", epoch=3))
    assert len(fitted.records["metrics"]["train"]) == 3
    assert fitted.signum is None


def test_fit_in_a_thread_leaves_the_signals_alone():
    before = handlers()
    found: list[Any] = []

    def work():
        during = At("on_train_batch_end", lambda _: found.append(handlers() == before))
        found.append(fit(during).signum)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [True, True, True, None]
