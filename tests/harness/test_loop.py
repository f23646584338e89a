from __future__ import annotations

import signal

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset
from torchmetrics.regression import MeanSquaredError

import harness
from harness.accelerators.single import SingleDevice
from harness.callbacks import GradientClip, StepMetrics
from harness.errors import EarlyStop, SkipEpoch
from harness.loop import EvaluateContext, PredictContext
from harness.records import NullRun
from tests.harness.event_lists import (
    ACCUMULATED_BATCH,
    BATCH,
    ONE_EPOCH_FIT,
    STEP,
    VALID_BATCH,
    VALID_STEP,
    epoch,
    train_part,
    valid_part,
    whole_fit,
)
from tests.harness.exact import Stop
from tests.harness.fakes import At, Line, Tape, fit_context, line_learner, slope


def fit(learner, data, epochs=1, *callbacks, **options):
    """Fit untracked on the CPU in batches of 2, and tell the events."""
    tape = Tape()
    options = {"dataloader_options": {"batch_size": 2}} | options
    options = {"accelerator": SingleDevice("cpu"), "verbose": False} | options
    fitted = learner.fit(
        data, epochs, callbacks=[tape, *callbacks], tracker=False, **options
    )
    return fitted, tape.events


# --- the literal list of events


def test_fit_with_validation_fires_these_events():
    _, events = fit(line_learner(), slope(2), 1, valid_data=slope(2))
    assert events == ONE_EPOCH_FIT


def test_fit_without_validation_fires_the_training_events():
    _, events = fit(line_learner(), slope(4), 2)
    one = epoch(train_part(BATCH, BATCH))
    assert events == whole_fit(one, one)


def test_fit_with_several_batches_repeats_the_batch_events():
    _, events = fit(line_learner(), slope(2), 2, valid_data=slope(3))
    one = epoch(train_part(BATCH), valid_part(VALID_BATCH, VALID_BATCH))
    assert events == whole_fit(one, one)


class Pair(nn.Module):
    """Two named optimizers, one for each half."""

    def __init__(self):
        super().__init__()
        self.a, self.b = Line(), Line()

    def forward(self, x):
        return self.a(x) + self.b(x)

    def loss(self, pred, target):
        return (pred - target).square().mean()

    def set_optimizers(self, lr=0.01):
        sgd = torch.optim.SGD
        return {"a": sgd(self.a.parameters(), lr), "b": sgd(self.b.parameters(), lr)}


def test_fit_with_named_optimizers_fires_the_step_events_for_each():
    seen = []
    spies = [
        At(event, lambda ctx, event=event: seen.append((event, ctx.opt_name)))
        for event in (
            "on_train_batch_after_loss",
            "on_train_batch_after_step",
            "on_valid_batch_after_loss",
        )
    ]
    learner = harness.setup(Pair)
    _, events = fit(learner, slope(2), 1, *spies, valid_data=slope(2))
    train = [BATCH[0], *STEP, *STEP, BATCH[-1]]
    valid = [VALID_BATCH[0], *VALID_STEP, *VALID_STEP, VALID_BATCH[-1]]
    assert events == whole_fit(epoch(train_part(train), valid_part(valid)))
    assert seen == [
        ("on_train_batch_after_loss", "a"),
        ("on_train_batch_after_step", "a"),
        ("on_train_batch_after_loss", "b"),
        ("on_train_batch_after_step", "b"),
        ("on_valid_batch_after_loss", "a"),
        ("on_valid_batch_after_loss", "b"),
    ]


def test_evaluate_fires_the_validation_events():
    fitted, _ = fit(line_learner(), slope(2))
    tape = Tape()
    fitted.evaluate(slope(3), callbacks=[tape], dataloader_options={"batch_size": 2})
    assert tape.events == valid_part(VALID_BATCH, VALID_BATCH)


def test_predict_fires_its_own_events():
    fitted, _ = fit(line_learner(), slope(2))
    tape = Tape()
    options = {"callbacks": [tape], "dataloader_options": {"batch_size": 2}}
    fitted.predict(slope(3)[0], **options)
    batch = ["on_predict_batch_begin", "on_predict_batch_end"]
    assert tape.events == ["on_predict_begin", *batch, *batch, "on_predict_end"]


@pytest.mark.filterwarnings("ignore:.*step. expected the events of a step")
def test_fit_with_a_step_of_the_models_own_fires_what_is_around_it():
    class Own(Line):
        def step(self):
            ctx = self.ctx
            ctx.pred = self(ctx.input)
            loss = (ctx.pred - ctx.target).square().mean()
            if ctx.training:
                loss.backward()
                ctx.opt.step()
                ctx.opt.zero_grad()
            ctx.loss = loss.detach()

    learner = harness.setup(Own, optimizer=torch.optim.SGD).set_opt_hparams(lr=0.01)
    fitted, events = fit(learner, slope(4), 1, valid_data=slope(2))
    around = ["on_train_batch_begin", "on_train_batch_end"]
    valid = ["on_valid_batch_begin", "on_valid_batch_end"]
    assert events == [
        "on_fit_begin",
        *epoch(train_part(around, around), valid_part(valid)),
        "on_fit_end",
    ]
    assert set(fitted.records["metrics"]["valid"][0]) == {"loss"}


# --- accumulation


class Stream(IterableDataset):
    """Rows without a length."""

    def __init__(self, rows):
        self.rows = rows

    def __iter__(self):
        return iter(zip(*slope(self.rows), strict=True))


@pytest.mark.parametrize(
    "data", [pytest.param(slope(5), id="sized"), pytest.param(Stream(5), id="unsized")]
)
def test_accumulation_steps_once_a_window_and_a_short_one_at_the_end(data):
    windows, steps = [], []
    note = At("on_train_batch_end", lambda ctx: windows.append(ctx.accelerator.window))
    count = At("on_train_batch_end", lambda ctx: steps.append(ctx.step))
    _, events = fit(
        line_learner(),
        data,
        1,
        note,
        count,
        accelerator=SingleDevice("cpu", accumulate=2),
        dataloader_options={"batch_size": 1},
    )
    batches = [ACCUMULATED_BATCH, BATCH, ACCUMULATED_BATCH, BATCH, BATCH]
    assert events == ["on_fit_begin", *epoch(train_part(*batches)), "on_fit_end"]
    assert windows == [2, 2, 2, 2, 1]
    assert steps == [0, 1, 1, 2, 3]


@pytest.mark.parametrize("sized", [True, False])
def test_accumulation_averages_gradients_over_its_window(sized):
    # Batches (x, 2x) of one row for x = 0, 1, 2 from w = b = 0, squared error, lr 0.01.
    # d loss / dw = 2 x (w x + b - 2 x), d loss / db = 2 (w x + b - 2 x).
    # Window of 0 and 1: dw = (0 - 4) / 2 = -2, db = (0 - 4) / 2 = -2; w = b = 0.02.
    # Window of 2 alone: w x + b - 2 x = 0.06 - 4 = -3.94; dw = -15.76, db = -7.88.
    # w = 0.02 + 0.1576 = 0.1776, b = 0.02 + 0.0788 = 0.0988.
    options = {"batch_size": 1, "shuffle": False} if sized else {"batch_size": 1}
    fitted, _ = fit(
        line_learner(),
        slope(3) if sized else Stream(3),
        accelerator=SingleDevice("cpu", accumulate=2),
        dataloader_options=options,
    )
    assert fitted.model.w.item() == pytest.approx(0.1776, abs=1e-6)
    assert fitted.model.b.item() == pytest.approx(0.0988, abs=1e-6)


def at_iter(event, place, error):
    """Raises at one batch of each epoch."""

    def act(ctx):
        if ctx.iter == place:
            raise error

    return At(event, act)


@pytest.mark.parametrize(
    "event", ["on_train_batch_end", "on_train_batch_after_loss", "on_train_batch_begin"]
)
def test_epoch_that_is_skipped_leaves_no_window_and_no_gradient(event):
    begun, stepped = [], []
    begin = At("on_epoch_begin", lambda ctx: begun.append(ctx.model.w.grad))
    note = At(
        "on_train_batch_after_step", lambda ctx: stepped.append((ctx.epoch, ctx.iter))
    )
    _, events = fit(
        line_learner(),
        slope(8),
        3,
        begin,
        note,
        at_iter(event, 4, SkipEpoch),
        accelerator=SingleDevice("cpu", accumulate=3),
        dataloader_options={"batch_size": 1},
    )
    assert "on_train_end" not in events
    assert begun == [None] * 3
    assert stepped == [(1, 3), (2, 3), (3, 3)]


def test_epoch_that_is_skipped_leaves_no_gradient_of_an_own_step():
    class Own(Line):
        def step(self):
            (self(self.ctx.input) - self.ctx.target).square().mean().backward()

    begun = []
    begin = At("on_epoch_begin", lambda ctx: begun.append(ctx.model.w.grad))
    skip = at_iter("on_train_batch_end", 1, SkipEpoch)
    fit(harness.setup(Own, optimizer=torch.optim.SGD), slope(4), 2, begin, skip)
    assert begun == [None, None]


def test_fit_that_stops_early_leaves_no_gradient():
    left = []
    end = At("on_fit_end", lambda ctx: left.append(ctx.model.w.grad))
    stop = at_iter("on_train_batch_end", 1, EarlyStop)
    fit(
        line_learner(),
        slope(8),
        2,
        end,
        stop,
        accelerator=SingleDevice("cpu", accumulate=2),
        dataloader_options={"batch_size": 1},
    )
    assert left == [None]


@pytest.mark.filterwarnings("ignore:.*step. expected the events of a step")
def test_epoch_in_which_a_step_leaves_out_a_batch_ends_its_window():
    class Own(Line):
        def step(self):
            ctx = self.ctx
            if ctx.iter == 4:
                return
            ctx.backward((self(ctx.input) - ctx.target).square().mean())
            ctx.accelerator.step()

    stepped = []
    note = At("on_train_batch_end", lambda ctx: stepped.append((ctx.iter, ctx.step)))
    learner = harness.setup(Own, optimizer=torch.optim.SGD)
    fit(
        learner,
        slope(4),
        2,
        note,
        accelerator=SingleDevice("cpu", accumulate=2),
        dataloader_options={"batch_size": 1},
    )
    one = [(1, 0), (2, 1), (3, 1), (4, 1)]
    assert stepped == [*one, *((place, step + 1) for place, step in one)]


class Wrong(Stream):
    """Rows with a wrong length."""

    def __init__(self, rows, length):
        super().__init__(rows)
        self.length = length

    def __len__(self):
        return self.length


@pytest.mark.filterwarnings("ignore:Length of IterableDataset:UserWarning")
@pytest.mark.parametrize("length", [3, 5, 9])
def test_accumulation_sees_every_batch_whatever_the_length_says(length):
    # As for a stream without a length, above: 0 and 1, then 2 alone.
    fitted, events = fit(
        line_learner(),
        DataLoader(Wrong(3, length), batch_size=1),
        dataloader_options=None,
        accelerator=SingleDevice("cpu", accumulate=2),
    )
    assert events.count("on_train_batch_after_step") == 2
    assert fitted.model.w.item() == pytest.approx(0.1776, abs=1e-6)


def test_accumulation_starts_a_new_window_each_epoch():
    _, events = fit(
        line_learner(),
        slope(3),
        2,
        accelerator=SingleDevice("cpu", accumulate=4),
        dataloader_options={"batch_size": 1},
    )
    part = epoch(train_part(ACCUMULATED_BATCH, ACCUMULATED_BATCH, BATCH))
    assert events == ["on_fit_begin", *part, *part, "on_fit_end"]


# --- leaving early


def test_early_stop_at_an_epoch_end_ends_the_fit_quietly():
    def stop(ctx):
        if ctx.epoch == 2:
            raise harness.EarlyStop

    fitted, events = fit(line_learner(), slope(2), 5, At("on_epoch_end", stop))
    part = epoch(train_part(BATCH))
    assert events == ["on_fit_begin", *part, *part, "on_early_stopping", "on_fit_end"]
    assert len(fitted.records["metrics"]["train"]) == 2
    assert not fitted.is_interrupted


def test_early_stop_in_a_batch_ends_the_fit_there():
    def stop(ctx):
        if ctx.iter == 2:
            raise harness.EarlyStop

    _, events = fit(line_learner(), slope(6), 5, At("on_train_batch_after_loss", stop))
    assert events == [
        "on_fit_begin",
        "on_epoch_begin",
        "on_train_begin",
        *BATCH,
        "on_train_batch_begin",
        "on_train_batch_after_pred",
        "on_train_batch_after_loss",
        "on_early_stopping",
        "on_fit_end",
    ]


def test_skip_epoch_goes_on_with_the_next():
    def skip(ctx):
        if ctx.epoch == 1 and ctx.iter == 1:
            raise harness.SkipEpoch

    callback = At("on_train_batch_end", skip)
    fitted, events = fit(line_learner(), slope(4), 2, callback, valid_data=slope(2))
    assert events == [
        "on_fit_begin",
        "on_epoch_begin",
        "on_train_begin",
        *BATCH,
        *epoch(train_part(BATCH, BATCH), valid_part(VALID_BATCH)),
        "on_fit_end",
    ]
    assert fitted.records["metrics"]["train"][0] is None


def test_interrupt_by_a_signal_ends_the_fit_after_the_batch():
    def interrupt(ctx):
        if ctx.epoch == 2:
            signal.raise_signal(signal.SIGINT)

    before = signal.getsignal(signal.SIGINT)
    callback = At("on_train_batch_begin", interrupt)
    fitted, events = fit(line_learner(), slope(4), 5, callback)
    assert events == [
        "on_fit_begin",
        *epoch(train_part(BATCH, BATCH)),
        "on_epoch_begin",
        "on_train_begin",
        *BATCH,
        "on_interrupt",
        "on_fit_end",
    ]
    assert fitted.is_interrupted
    assert fitted.signum == signal.SIGINT
    assert len(fitted.records["metrics"]["train"]) == 1
    assert signal.getsignal(signal.SIGINT) is before


def test_interrupt_in_validation_ends_the_fit_after_the_batch():
    callback = At("on_valid_batch_begin", lambda _: signal.raise_signal(signal.SIGTERM))
    fitted, events = fit(line_learner(), slope(2), 5, callback, valid_data=slope(4))
    assert events == [
        "on_fit_begin",
        "on_epoch_begin",
        *train_part(BATCH),
        "on_valid_begin",
        *VALID_BATCH,
        "on_interrupt",
        "on_fit_end",
    ]
    assert fitted.signum == signal.SIGTERM


# --- exceptions


class Falls(harness.Callback):
    def on_train_batch_after_loss(self):
        if self.ctx.epoch == 2 and self.ctx.iter == 2:
            raise ZeroDivisionError("mine")


def test_exception_in_a_callback_keeps_its_type_and_tells_where():
    tape = Tape()
    with pytest.raises(ZeroDivisionError, match="mine") as caught:
        fit(line_learner(), slope(4), 3, Falls(), tape)
    assert caught.value.__notes__ == [
        "in Falls.on_train_batch_after_loss, epoch 2, iter 2, training"
    ]
    assert tape.events[-3:] == [
        "on_train_batch_after_pred",
        "on_train_batch_after_loss",
        "on_exception",
    ]


def test_exception_in_the_model_tells_where():
    class Breaks(Line):
        def forward(self, x):
            if not self.ctx.training:
                raise LookupError("no such row")
            return super().forward(x)

    learner = harness.setup(Breaks, loss=nn.MSELoss(), optimizer=torch.optim.SGD)
    with pytest.raises(LookupError, match="no such row") as caught:
        fit(learner, slope(2), valid_data=slope(2))
    note, hint = caught.value.__notes__
    assert note.endswith("epoch 1, iter 1, validation")
    assert hint.startswith("hint: callbacks.SanityCheck()")


def test_exception_with_a_note_of_its_own_still_tells_where():
    class Breaks(Line):
        def forward(self, x):
            problem = LookupError("no such row")
            problem.add_note("ask the librarian")
            raise problem

    learner = harness.setup(Breaks, loss=nn.MSELoss(), optimizer=torch.optim.SGD)
    with pytest.raises(LookupError) as caught:
        fit(learner, slope(2))
    assert caught.value.__notes__[0] == "ask the librarian"
    assert caught.value.__notes__[1].endswith("epoch 1, iter 1, training")


def test_exception_in_the_data_tells_where():
    class Torn(Stream):
        def __iter__(self):
            yield from super().__iter__()
            raise OSError("disk gone")

    with pytest.raises(OSError, match="disk gone") as caught:
        fit(line_learner(), Torn(4))
    (note,) = caught.value.__notes__
    assert note == "in the loader of train batches, epoch 1, after batch 2"


def test_exception_in_a_metric_tells_its_name():
    def broken(pred, target):
        raise ArithmeticError("no")

    with pytest.raises(ArithmeticError) as caught:
        fit(line_learner(metrics={"wrong": broken}), slope(4))
    assert caught.value.__notes__ == [
        "in metric 'wrong'",
        "in Metrics.on_train_batch_end, epoch 1, iter 1, training",
    ]


def test_exception_leaves_the_signals_as_they_were():
    before = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
    with pytest.raises(ZeroDivisionError):
        fit(line_learner(), slope(4), 3, Falls())
    assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)] == before


def test_exception_of_a_callback_keeps_no_other_from_putting_things_back():
    before = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
    tape, worst = Tape(), At("on_exception", lambda _: [].remove(1), weight=-1000)
    with pytest.raises(ValueError, match="remove") as caught:
        fit(line_learner(), slope(4), 3, Falls(), worst, tape)
    assert isinstance(caught.value.__context__, ZeroDivisionError)
    assert caught.value.__notes__[0].startswith("in At.on_exception, epoch ")
    assert tape.events[-1] == "on_exception"
    assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)] == before


def test_exception_in_evaluate_and_predict_is_told():
    fitted, _ = fit(line_learner(), slope(2))
    for call, event in (
        (fitted.evaluate, "on_valid_batch_end"),
        (fitted.predict, "on_predict_batch_end"),
    ):
        tape = Tape()
        with pytest.raises(ZeroDivisionError) as caught:
            call(slope(2), callbacks=[tape, At(event, lambda _: 1 / 0)])
        assert ", iter 1" in caught.value.__notes__[0]
        assert tape.events[-1] == "on_exception"


# --- handlers


@pytest.mark.parametrize("assign", [True, False])
def test_handlers_end_the_fit_quietly_after_they_ran(assign):
    caught: list[Exception] = []

    def install(ctx):
        mine = {ZeroDivisionError: caught.append}
        ctx.handlers = ctx.handlers | mine if assign else ctx.handlers
        ctx.handlers.update(mine)

    _, events = fit(line_learner(), slope(4), 3, At("on_fit_begin", install), Falls())
    assert [str(exc) for exc in caught] == ["mine"]
    assert events[-2:] == ["on_train_batch_after_loss", "on_fit_end"]


@pytest.mark.parametrize("event", ["on_fit_begin", "on_epoch_begin"])
def test_epoch_handlers_end_the_epoch_and_the_next_begins(event):
    caught: list[Exception] = []

    def install(ctx):
        ctx.epoch_handlers = {**ctx.epoch_handlers, ZeroDivisionError: caught.append}

    _, events = fit(line_learner(), slope(4), 3, At(event, install), Falls())
    assert [str(exc) for exc in caught] == ["mine"]
    first = ["on_train_batch_begin", *BATCH[1:3]]
    whole = epoch(train_part(BATCH, BATCH))
    assert events == [
        "on_fit_begin",
        *whole,
        "on_epoch_begin",
        "on_train_begin",
        *BATCH,
        *first,
        *whole,
        "on_fit_end",
    ]


def test_handlers_for_a_base_class_catch_what_derives_from_it():
    caught: list[Exception] = []

    def install(ctx):
        ctx.handlers[ArithmeticError] = caught.append

    fit(line_learner(), slope(4), 3, At("on_fit_begin", install), Falls())
    assert type(caught[0]) is ZeroDivisionError


def test_handlers_for_something_else_let_it_pass():
    def install(ctx):
        ctx.handlers[LookupError] = print

    with pytest.raises(ZeroDivisionError):
        fit(line_learner(), slope(4), 3, At("on_fit_begin", install), Falls())


def test_handlers_of_ones_own_replace_the_ready_made():
    caught: list[Exception] = []

    def install(ctx):
        ctx.handlers[harness.EarlyStop] = caught.append

    def stop(ctx):
        raise harness.EarlyStop

    callbacks = [At("on_fit_begin", install), At("on_epoch_end", stop)]
    _, events = fit(line_learner(), slope(2), 3, *callbacks)
    assert len(caught) == 1
    assert "on_early_stopping" not in events


def test_handlers_of_early_stop_may_look_at_it():
    caught: list[Exception] = []

    def install(ctx):
        ctx.epoch_handlers[harness.EarlyStop] = caught.append

    def stop(ctx):
        raise harness.EarlyStop("why")

    callbacks = [At("on_fit_begin", install), At("on_epoch_end", stop)]
    _, events = fit(line_learner(), slope(2), 2, *callbacks)
    assert [str(exc) for exc in caught] == ["why", "why"]
    assert events.count("on_epoch_end") == 2


# --- order and what the context holds


def test_callbacks_run_by_weight_and_ties_as_given():
    order = []

    def note(name):
        return lambda _: order.append(name)

    callbacks = [
        At("on_epoch_end", note("heavy"), weight=5000),
        At("on_epoch_end", note("first")),
        At("on_epoch_end", note("second")),
        At("on_epoch_end", note("light"), weight=-5000),
    ]
    fit(line_learner(), slope(2), 1, *callbacks)
    assert order == ["light", "first", "second", "heavy"]


def test_callbacks_at_default_weight_see_the_metrics_of_the_epoch():
    seen = []
    look = At("on_epoch_end", lambda ctx: seen.append(ctx.get_metric("loss", "train")))
    fit(line_learner(), slope(2), 2, look)
    assert len(seen) == 2
    assert all(isinstance(loss, float) for loss in seen)


def test_context_counts_epochs_iters_and_steps_as_documented():
    counts = []

    def note(ctx):
        counts.append((ctx.epoch, ctx.iter, ctx.step, ctx.training, ctx.model.training))

    spies = [At("on_train_batch_end", note), At("on_valid_batch_end", note)]
    fit(line_learner(), slope(4), 2, *spies, valid_data=slope(2))
    assert counts == [
        (1, 1, 1, True, True),
        (1, 2, 2, True, True),
        (1, 1, 2, False, False),
        (2, 1, 3, True, True),
        (2, 2, 4, True, True),
        (2, 1, 4, False, False),
    ]


def test_context_begins_each_epoch_alike_also_after_a_resume(tmp_path):
    def look(ctx):
        assert (ctx.training, ctx.model.training) == (True, True)
        assert {ctx.iter, ctx.batch, ctx.pred, ctx.loss, ctx.loss_grad} == {None}
        seen.append(ctx.epoch)

    seen = []
    save = harness.callbacks.ModelCheckpoint(tmp_path, every_n_epochs=2)
    resume = harness.callbacks.ResumeFromCheckpoint(tmp_path)
    for own in (save, resume):
        spy = At("on_epoch_begin", look)
        fit(line_learner(), slope(4), 3, spy, own, valid_data=slope(2))
    assert seen == [1, 2, 3, 3]


def test_context_counts_the_batches_of_an_epoch_that_is_resumed_at_its_end(tmp_path):
    seen = []
    look = At("on_train_end", lambda ctx: seen.append((ctx.epoch, ctx.iter)))
    stop = Stop("on_train_batch_end", 2)
    for callbacks in ([look, stop], [look]):
        save = harness.callbacks.AutoResume(tmp_path)
        fit(line_learner(), slope(4), 1, *callbacks, save)
    assert seen == [(1, 2)]


def test_context_holds_prediction_and_losses_of_the_batch():
    seen = []

    def note(ctx):
        loss = (ctx.pred - ctx.target).square().mean()
        seen.append(torch.equal(loss.detach(), ctx.loss["opt"]))
        seen.append(ctx.loss_grad.requires_grad)
        seen.append(ctx.loss["opt"].requires_grad)

    fit(line_learner(), slope(2), 1, At("on_train_batch_after_loss", note))
    assert seen == [True, True, False]


def test_loss_changed_before_backward_is_what_goes_back():
    # As in the hand calculation above for x = 1 alone: dw = db = -4; ten times that.
    def more(ctx):
        ctx.loss_grad = ctx.loss_grad * 10

    callback = At("on_train_batch_before_backward", more)
    fitted, _ = fit(line_learner(), (torch.ones(1), torch.full((1,), 2.0)), 1, callback)
    assert fitted.model.w.item() == pytest.approx(0.4, abs=1e-6)
    # The record holds the loss as it was computed: (0 - 2)^2.
    assert fitted.records["metrics"]["train"][0]["loss"] == 4.0


def test_step_opt_of_ones_own_is_called_with_the_optimizer():
    called = []

    def install(ctx):
        ctx.step_opt = lambda opt: called.append(opt is ctx.optimizers["opt"])

    fitted, events = fit(line_learner(), slope(4), 1, At("on_fit_begin", install))
    assert called == [True, True]
    assert fitted.model.w.item() == 0.0
    assert "on_train_batch_after_step" not in events


class Unreadable(Line):
    """On the meta device nothing can be read: any reading is an error."""

    def __init__(self):
        with torch.device("meta"):
            super().__init__()


def leave(ctx):
    """End the fit after some batches, before the metrics of the epoch are read."""
    if ctx.iter == 40:
        ctx.model.to_empty(device="cpu")
        raise harness.EarlyStop


@pytest.mark.parametrize("callbacks", [[], [StepMetrics()], [GradientClip(1.0)]])
def test_step_reads_nothing_from_the_device(callbacks):
    metrics = {"mse": MeanSquaredError(), "own": lambda pred, target: pred.mean()}
    learner = harness.setup(
        Unreadable, loss=nn.MSELoss(), optimizer=torch.optim.SGD, metrics=metrics
    )
    fitted, events = fit(
        learner,
        slope(200),
        1,
        # Tensors without data are refused by log; this run takes them unread.
        At("on_fit_begin", lambda ctx: setattr(ctx, "run", NullRun())),
        *callbacks,
        At("on_train_batch_end", leave),
        accelerator=SingleDevice("meta"),
    )
    assert events.count("on_train_batch_after_step") == 40
    assert fitted.records["metrics"]["train"] == []


def test_step_that_reads_from_the_device_would_be_noticed():
    learner = harness.setup(Unreadable, loss=nn.MSELoss(), optimizer=torch.optim.SGD)
    read = At("on_train_batch_after_step", lambda ctx: float(ctx.loss["opt"]))
    with pytest.raises(RuntimeError, match="meta"):
        fit(learner, slope(200), 1, read, accelerator=SingleDevice("meta"))


def test_validation_keeps_no_graph():
    seen = []
    note = At(
        "on_valid_batch_end", lambda ctx: seen.append(ctx.loss_grad.requires_grad)
    )
    fit(line_learner(), slope(2), 1, note, valid_data=slope(2))
    assert seen == [False]


def test_epoch_is_told_to_samplers_and_data_sets_from_zero():
    class Told(Stream):
        told: list[int]

        def set_epoch(self, epoch):
            self.told.append(epoch)

    data = Told(2)
    data.told = []
    fit(line_learner(), DataLoader(data, batch_size=2), 3, dataloader_options=None)
    assert data.told == [0, 1, 2]


# --- the contexts of fit, evaluate and predict


def test_fit_context_is_whole():
    loader = DataLoader(TensorDataset(*slope(4)), batch_size=2)
    valid = DataLoader(TensorDataset(*slope(2)))
    model = Line()
    opt = torch.optim.SGD(model.parameters(), lr=0.1)
    ctx = fit_context(model=model, optimizers=opt, data=loader, valid_data=valid)
    assert ctx.model is model
    assert model.ctx is ctx
    assert ctx.optimizers == {"opt": opt}
    assert (ctx.hparams, ctx.opt_hparams) == ({"w": 0.0}, {"lr": 0.1})
    assert (ctx.data, ctx.train_data, ctx.valid_data) == (loader, loader, valid)
    assert isinstance(ctx.loss_fn, nn.MSELoss)
    assert (ctx.min_epochs, ctx.max_epochs) == (0, 3)
    assert (ctx.training, ctx.step) == (True, 0)
    assert ctx.device == torch.device("cpu")


def test_fit_context_takes_a_pair_of_epochs():
    ctx = fit_context(epochs=(2, 5))
    assert (ctx.min_epochs, ctx.max_epochs) == (2, 5)


def test_fit_context_counts_steps_of_the_optimizer_itself():
    ctx = fit_context()
    ctx.opt.step()
    ctx.opt.step()
    assert (ctx.step, ctx.steps) == (2, {"opt": 2})


def test_fit_context_takes_a_step_of_ones_own():
    def own(opt):
        opt.step()

    assert fit_context(step_opt=own).step_opt is own


def predict_options():
    return {
        "model": Line(),
        "newdata": DataLoader(TensorDataset(*slope(4))),
        "accelerator": SingleDevice("cpu"),
        "verbose": False,
    }


def test_predict_context_holds_model_and_data():
    options = predict_options()
    ctx = PredictContext(**options)
    assert ctx.model is options["model"]
    assert ctx.model.ctx is ctx
    assert ctx.data is options["newdata"]
    assert (ctx.training, ctx.epoch) == (False, None)


def test_evaluate_context_is_epoch_one_with_losses_and_names():
    options = predict_options()
    opt = torch.optim.SGD(options["model"].parameters(), lr=0.1)
    ctx = EvaluateContext(
        **options, optimizers=opt, loss_fn=torch.sum, opt_hparams={"lr": 0.1}
    )
    assert ctx.epoch == 1
    assert ctx.opt_name == "opt"
    assert ctx.loss_fn is torch.sum
    assert ctx.opt_hparams == {"lr": 0.1}
    assert ctx.valid_data is ctx.data is options["newdata"]
    assert ctx.training is False
