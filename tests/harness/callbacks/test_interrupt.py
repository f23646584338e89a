from __future__ import annotations

import faulthandler
import signal
import threading
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

import harness
from harness.accelerators.base import Agreement
from harness.accelerators.single import SingleDevice
from harness.callbacks import ModelCheckpoint, ResumeFromCheckpoint, interrupt
from harness.signals import EndOfProcess
from tests.harness.fakes import At, Tape, line_learner, slope

OFF: dict[str, Any] = {"tracker": False, "verbose": False}
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)


def handlers():
    return [signal.getsignal(number) for number in SIGNALS]


def raising(*numbers, event="on_train_batch_begin", epoch=2):
    def act(ctx):
        if ctx.epoch == epoch:
            for number in numbers:
                signal.raise_signal(number)

    return At(event, act)


def fit(*callbacks, epochs=3, **options):
    return line_learner().fit(slope(4), epochs, callbacks=callbacks, **(OFF | options))


class OtherRank(Agreement):
    """Asks for the signals of another rank, each before one of the checks."""

    def __init__(self, signals: list[int]) -> None:
        super().__init__()
        self.signals, self.num_checks = signals, 0

    def check(self):
        self.num_checks += 1
        if self.signals and (theirs := self.signals.pop(0)):
            self.ask(theirs)
        return super().check()


class OneOfTwo(SingleDevice):
    """One rank of two; the other one gets the signals."""

    def __init__(self, *signals: int) -> None:
        super().__init__("cpu")
        self.world_size = 2
        self.signals = OtherRank(list(signals))

    def agreement(self, name):
        return self.signals


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize("event", ["on_train_batch_begin", "on_epoch_end"])
def test_program_begins_no_other_fit_after_a_signal_that_ends_programs(
    number, event, capsys
):
    # In the last epoch's end, the signal comes too late to shorten the fit.
    first = fit(raising(number, event=event, epoch=3))
    assert first.signum == (number if event == "on_train_batch_begin" else None)
    first.evaluate(slope(4), verbose=False)  # what was fitted can be used, and saved
    tape = Tape()
    for begin in (
        lambda: fit(tape),
        lambda: first.fit(slope(4), 1, **OFF),
        lambda: harness.lr_finder(line_learner(), slope(4)),
    ):
        with pytest.raises(SystemExit) as ended:
            begin()
        assert ended.value.code == 128 + number
    assert tape.events == []
    told = f"harness: {number.name} asked this process to end, so no other fit starts."
    assert capsys.readouterr().err.splitlines() == [told] * 3


def test_program_ends_although_the_signalled_fit_failed():
    fails = At("on_train_batch_end", lambda _: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        fit(raising(signal.SIGTERM, epoch=1), fails)
    with pytest.raises(SystemExit):
        fit()


@pytest.mark.parametrize("numbers", [SIGNALS[:1], SIGNALS[2:3]])
def test_ctrl_c_and_sigusr1_end_one_fit_of_several(numbers):
    assert fit(raising(*numbers)).is_interrupted
    assert not fit().is_interrupted


def test_ctrl_c_that_sigterm_follows_ends_the_program():
    assert fit(raising(signal.SIGINT, signal.SIGTERM)).signum == signal.SIGINT
    with pytest.raises(SystemExit) as ended:
        fit()
    assert ended.value.code == 143


def test_rank_that_alone_got_a_late_signal_ends_all_ranks():
    class Other(OneOfTwo):
        def reduce(self, tensor, op="sum"):
            assert op == "max"
            return torch.tensor(max(int(tensor), signal.SIGTERM))

    with pytest.raises(SystemExit) as ended:
        fit(accelerator=Other())
    assert ended.value.code == 143


def test_range_test_that_sigterm_ends_ends_the_program():
    with pytest.raises(SystemExit) as ended:
        harness.lr_finder(
            line_learner(), slope(4), callbacks=[raising(signal.SIGTERM, epoch=1)]
        )
    assert ended.value.code == 143


@pytest.mark.parametrize("number", SIGNALS[:2])
def test_signal_in_a_fit_within_a_fit_ends_both(number):
    inner = []
    nested = lambda ctx: inner.append(fit(raising(number)))  # noqa: E731
    outer = fit(At("on_epoch_begin", nested))
    assert [one.signum for one in (*inner, outer)] == [number, number]
    ends = pytest.raises(SystemExit) if number == signal.SIGTERM else nullcontext()
    with ends:
        fit()


def test_fit_within_a_signalled_fit_is_whole():
    def nested(ctx):
        signal.raise_signal(signal.SIGTERM)
        assert not fit().is_interrupted

    assert fit(At("on_train_batch_begin", nested)).signum == signal.SIGTERM


@pytest.mark.parametrize("number", SIGNALS[2:])
def test_signal_that_a_program_handles_stays_its_own(number, tmp_path):
    own, got = signal.getsignal(number), []
    signal.signal(number, lambda *_: got.append(number))
    try:
        assert fit(raising(number)).signum is None
        assert got == [number]
    finally:
        signal.signal(number, own)


def test_handler_in_c_stays_during_and_after_a_fit(tmp_path):
    # Python's table of handlers does not have it.
    with (tmp_path / "stacks").open("w+") as stacks:
        for number in (signal.SIGUSR1, signal.SIGTERM):
            faulthandler.register(number, stacks, all_threads=False)
        try:
            assert fit(raising(signal.SIGUSR1)).signum is None
            told = len((tmp_path / "stacks").read_text())
            assert told > 0
            assert fit(raising(signal.SIGTERM)).signum == signal.SIGTERM
            assert len((tmp_path / "stacks").read_text()) == told
            signal.raise_signal(signal.SIGTERM)
            assert len((tmp_path / "stacks").read_text()) > told
        finally:
            for number in (signal.SIGUSR1, signal.SIGTERM):
                faulthandler.unregister(number)


def test_handler_that_is_installed_during_a_fit_stays():
    before, own = signal.getsignal(signal.SIGTERM), lambda *_: None
    install = At("on_train_begin", lambda _: signal.signal(signal.SIGTERM, own))
    try:
        fit(install)
        assert signal.getsignal(signal.SIGTERM) is own
    finally:
        signal.signal(signal.SIGTERM, before)


def test_fit_outlives_its_terminal_under_nohup():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        fitted = fit(raising(signal.SIGHUP))
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)
    assert len(fitted.records["metrics"]["train"]) == 3


def test_handler_that_python_did_not_install_stays(monkeypatch):
    # As in a program that runs Python, such as R: Python cannot put it back.
    known = signal.getsignal
    of_others = signal.SIGUSR1
    monkeypatch.setattr(
        signal, "getsignal", lambda n: None if n == of_others else known(n)
    )
    found = []
    fit(At("on_train_begin", lambda ctx: found.append([*map(known, SIGNALS)])))
    is_replaced = [callable(handler) for handler in found[0]]
    assert is_replaced == [number != of_others for number in SIGNALS]


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


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_only_a_second_ctrl_c_leaves_at_once(number):
    fitted = fit(raising(number, number))
    assert fitted.signum == number
    EndOfProcess.asked_by = None
    fitted = fit(raising(signal.SIGINT, number, number))
    assert fitted.signum == signal.SIGINT


@pytest.fixture
def clean_handlers():
    before = handlers()
    yield
    for number, handler in zip(SIGNALS, before, strict=True):
        signal.signal(number, handler)


@pytest.mark.parametrize(
    "numbers",
    [
        (signal.SIGINT, signal.SIGINT),  # torchrun repeats what a terminal sent
        (signal.SIGINT, signal.SIGTERM, signal.SIGTERM),  # DeepSpeed's launcher
        (signal.SIGTERM, signal.SIGTERM),
    ],
)
def test_signal_that_a_launcher_repeats_is_one_signal(numbers, clean_handlers):
    fitted = fit(raising(*numbers), accelerator=OneOfTwo(), epochs=30)
    assert fitted.signum == numbers[0]
    for number in numbers:  # it may come after the fit as well
        signal.raise_signal(number)


class Timed(interrupt.Interrupt):
    """Reads a clock that the test sets."""

    now = 0.0

    def clock(self):
        return self.now


def test_second_ctrl_c_on_several_ranks_leaves_after_a_while():
    timed, before = Timed(), handlers()

    def act(ctx):
        signal.raise_signal(signal.SIGINT)
        timed.now += interrupt.REPEAT_S + 0.1
        signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        fit(At("on_train_batch_begin", act), timed, accelerator=OneOfTwo())
    assert handlers() == before


def test_signal_long_after_an_interrupted_fit_of_several_ranks_has_its_effect(
    clean_handlers,
):
    timed, before = Timed(), handlers()
    fit(raising(signal.SIGTERM), timed, accelerator=OneOfTwo(), epochs=30)
    timed.now += interrupt.LAUNCHER_S - 1
    signal.raise_signal(signal.SIGTERM)
    assert handlers() != before
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)
    assert handlers() == before


def test_signal_of_another_rank_ends_the_fit_after_the_batch(clean_handlers):
    accelerator = OneOfTwo(0, 0, signal.SIGTERM)
    seen: list[int] = []
    fitted = line_learner().fit(
        slope(4),
        20,
        slope(4),
        callbacks=[At("on_train_batch_end", lambda ctx: seen.append(ctx.iter))],
        accelerator=accelerator,
        dataloader_options={"batch_size": 4},
        **OFF,
    )
    assert fitted.signum == signal.SIGTERM
    assert accelerator.signals.num_checks == 3  # validation is checked, too
    assert len(seen) == 2


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


class Reader(DataLoader):
    """Fails after some batches, as where a signal has ended the process that it reads from."""

    fails_after = 99
    number: int | None = signal.SIGINT

    def __iter__(self):
        for place, batch in enumerate(super().__iter__()):
            if place == self.fails_after:
                if self.number is not None:
                    signal.raise_signal(self.number)
                raise OSError("the reader is gone")
            yield batch


def make_reader(fails_after=99):
    loader = Reader(TensorDataset(*slope(12)), batch_size=2)
    loader.fails_after = fails_after
    return loader


@pytest.mark.parametrize(("accumulate", "fails_after"), [(1, 3), (2, 2), (2, 3)])
def test_loader_that_fails_after_a_signal_ends_the_fit_in_order(
    accumulate, fails_after, tmp_path
):
    def fit(loader, *callbacks):
        return line_learner().fit(
            loader,
            2,
            callbacks=callbacks,
            accelerator=harness.accelerator(accumulate=accumulate),
            **OFF,
        )

    whole = fit(make_reader()).model.state_dict()
    fitted = fit(make_reader(fails_after), ModelCheckpoint(tmp_path))
    assert fitted.signum == signal.SIGINT
    # What belongs to a window that is not complete is read again.
    batch = fails_after // accumulate * accumulate
    (saved,) = tmp_path.iterdir()
    assert f"epoch-1-batch-{batch}-" in saved.name
    resumed = fit(make_reader(), ResumeFromCheckpoint(tmp_path)).model.state_dict()
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_validation_loader_that_fails_after_a_signal_ends_the_fit_in_order():
    fitted = line_learner().fit(slope(4), 2, make_reader(1), **OFF)
    assert fitted.signum == signal.SIGINT


def test_loader_that_fails_without_a_signal_is_an_error():
    loader = make_reader(1)
    loader.number = None
    with pytest.raises(OSError, match="the reader is gone"):
        line_learner().fit(loader, 1, **OFF)


class Leave(At):
    """Ends the epoch or the fit."""


@pytest.mark.parametrize("kind", [harness.SkipEpoch, harness.EarlyStop])
@pytest.mark.parametrize("event", ["on_train_batch_end", "on_valid_batch_end"])
def test_signal_gives_way_to_a_callback_that_ends_the_epoch_at_the_same_batch(
    kind, event, tmp_path
):
    def leave(ctx):
        if ctx.epoch == 2:
            raise kind

    def fit_with(*callbacks):
        own = (Leave(event, leave), *callbacks)
        options = {"valid_data": slope(2), "dataloader_options": {"batch_size": 2}}
        fitted = fit(*own, seed=1, **options)
        return fitted, fitted.records["metrics"], fitted.model.w.item()

    _, *whole = fit_with()
    save = harness.callbacks.AutoResume(tmp_path)
    stopped, *found = fit_with(save, raising(signal.SIGINT, event=event))
    if kind is harness.SkipEpoch:
        assert stopped.signum == signal.SIGINT  # after the first batch of epoch 3
        resumed, *found = fit_with(save)
        assert resumed.signum is None
    else:
        assert stopped.signum is None
    assert found == whole


@pytest.mark.parametrize("seconds", [0, -1.0, float("nan"), "60"])
def test_time_within_which_a_process_is_killed_is_checked(seconds):
    with pytest.raises((ValueError, TypeError), match=r"Interrupt\(stop_within\): exp"):
        interrupt.Interrupt(stop_within=seconds)
