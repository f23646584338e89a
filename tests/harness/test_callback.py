from __future__ import annotations

from typing import Any

import pytest
import torch

import harness
from harness.events import EVENTS
from tests.harness.fakes import At, Tape, line_learner, slope

OFF: dict[str, Any] = {"tracker": False, "verbose": False}


def test_callback_method_that_is_no_event_is_refused_when_defined() -> None:
    with pytest.raises(ValueError, match="class Wrong: expected an event") as caught:
        type("Wrong", (harness.Callback,), {"on_epoch_finish": lambda self: None})
    assert "'on_epoch_finish'" in str(caught.value)
    assert "harness.events.EVENTS" in str(caught.value)


def test_callback_with_a_misspelt_event_is_offered_the_nearest() -> None:
    with pytest.raises(ValueError, match="Did you mean 'on_train_batch_end'"):
        type("Wrong", (harness.Callback,), {"on_train_batch_ends": lambda self: None})


def test_callback_may_listen_to_each_event() -> None:
    kind = type("Right", (harness.Callback,), dict.fromkeys(EVENTS, lambda self: None))
    assert all(callable(getattr(kind(), event)) for event in EVENTS)


def test_callback_other_methods_may_have_any_name() -> None:
    kind = type("Right", (harness.Callback,), {"only": 1, "state": 2, "_on_x": 3})
    assert kind().weight == 0


def test_callback_derived_twice_is_checked_again() -> None:
    base = type("Base", (harness.Callback,), {"on_fit_end": lambda self: None})
    with pytest.raises(ValueError, match="class Below"):
        type("Below", (base,), {"on_fit_over": lambda self: None})


def test_callback_has_no_state_unless_it_says_so() -> None:
    callback = harness.Callback()
    assert callback.state_dict() == {}
    callback.load_state_dict({"anything": 1})
    assert callback.state_dict() == {}


class Checks(Tape):
    """Notes the context of its check among the events."""

    def check(self, ctx: harness.Context) -> None:
        assert ctx.optimizers
        assert ctx.train_data is not None
        assert (ctx.epoch, ctx.max_epochs) == (None, 2)
        self.events.append("check")


class Refuses(harness.Callback):
    def check(self, ctx: harness.Context) -> None:
        if ctx.valid_data is None:
            raise ValueError("Refuses: expected validation data, got none.")


def test_check_runs_once_before_the_first_event_of_a_fit() -> None:
    tape = Checks()
    line_learner().fit(slope(2), 2, callbacks=[tape], **OFF)
    assert tape.events[:2] == ["check", "on_fit_begin"]
    assert tape.events.count("check") == 1


def test_check_that_raises_ends_the_fit_before_any_event() -> None:
    tape = Tape()
    with pytest.raises(ValueError, match="expected validation data") as caught:
        line_learner().fit(slope(2), 1, callbacks=[tape, Refuses()], **OFF)
    assert tape.events == []
    assert caught.value.__notes__ == ["in Refuses.check, before the first epoch"]
    line_learner().fit(slope(2), 1, slope(2), callbacks=[Refuses()], **OFF)


def test_check_is_not_part_of_an_evaluation() -> None:
    fitted = line_learner().fit(slope(2), 1, **OFF)
    fitted.evaluate(slope(2), callbacks=[Refuses()], verbose=False)


class Grads(harness.Callback):
    """Notes in which events a new result has a graph."""

    def __init__(self) -> None:
        self.with_graph: set[str] = set()


def _noter(event: str) -> Any:
    def note(self: Grads) -> None:
        if (self.ctx.model.w * 2).requires_grad:
            self.with_graph.add(event)

    return note


for _event in EVENTS:
    setattr(Grads, _event, _noter(_event))


def test_callbacks_run_without_gradients_except_between_forward_and_backward() -> None:
    grads = Grads()
    fitted = line_learner().fit(slope(64), 1, slope(8), callbacks=[grads], **OFF)
    assert grads.with_graph == {
        "on_train_batch_after_pred",
        "on_train_batch_after_loss",
        "on_train_batch_before_backward",
    }
    grads.with_graph = set()
    fitted.evaluate(slope(8), callbacks=[grads])
    fitted.predict(slope(8), callbacks=[grads])
    assert grads.with_graph == set()


class WeightPenalty(harness.Callback):
    def on_train_batch_after_loss(self) -> None:
        self.ctx.loss_grad = self.ctx.loss_grad + self.ctx.model.w


def test_callback_that_adds_to_the_loss_changes_the_gradient() -> None:
    # From w = 0, b = 0 the penalty adds 1 to the gradient of w; the rate is 0.01.
    plain, penalized = (
        line_learner().fit(slope(4), 1, callbacks=callbacks, **OFF).model
        for callbacks in ([], [WeightPenalty()])
    )
    assert (plain.w - penalized.w).item() == pytest.approx(0.01)
    assert torch.equal(plain.b, penalized.b)


def test_gradients_are_on_again_after_a_callback_raised() -> None:
    with pytest.raises(ZeroDivisionError):
        line_learner().fit(
            slope(4), 1, callbacks=[At("on_epoch_begin", lambda ctx: 1 / 0)], **OFF
        )
    assert torch.is_grad_enabled()


# ----------------------------------------------------------------- events of one's own


class Rings(harness.Callback):
    events = ("on_bell",)

    def on_train_batch_end(self) -> None:
        self.ctx.call_callbacks("on_bell")


class Hears(harness.Callback):
    events = ("on_bell", "on_gong")

    def __init__(self) -> None:
        self.heard: list[Any] = []

    def on_bell(self) -> None:
        self.heard.append((self.ctx.iter, torch.is_grad_enabled()))


class HearsMore(Hears):
    def on_gong(self) -> None: ...


def test_own_event_reaches_who_listens_without_gradients() -> None:
    hears, more = Hears(), HearsMore()
    line_learner().fit(slope(64), 1, callbacks=[Rings(), hears, more], **OFF)
    assert hears.heard == more.heard == [(1, False), (2, False)]


def test_own_event_that_nobody_in_the_fit_hears_is_fired_to_nobody() -> None:
    line_learner().fit(slope(2), 1, callbacks=[Rings()], **OFF)
    context = harness.Context()
    context.call_callbacks("on_gong")


def test_own_event_that_ends_the_fit_ends_it() -> None:
    class Stops(harness.Callback):
        events = ("on_bell",)

        def on_bell(self) -> None:
            raise harness.EarlyStop

    tape = Tape()
    line_learner().fit(slope(64), 3, callbacks=[Rings(), Stops(), tape], **OFF)
    assert tape.events.count("on_train_batch_begin") == 1
    assert "on_early_stopping" in tape.events


@pytest.mark.parametrize(
    ("body", "kind", "match"),
    [
        (
            {"events": ("on_bell",), "on_bel": lambda self: None},
            ValueError,
            r"class Wrong: expected an event, got 'on_bel'\. Did you mean 'on_bell'",
        ),
        ({"events": "on_bell"}, TypeError, r"Wrong.events: expected a tuple of names"),
        ({"events": (3,)}, TypeError, r"Wrong.events: expected a tuple of names"),
        ({"events": ("bell",)}, ValueError, r"begins with 'on_', got 'bell'\. Rename"),
        ({"events": ("on_fit_end",)}, ValueError, r"a name that is new .*'on_fit_end'"),
        (
            {"event_weights": {"on_fit_ends": 3}},
            ValueError,
            r"expected an event, got 'on_fit_ends'\. Did you mean 'on_fit_end'",
        ),
    ],
)
def test_own_events_and_weights_are_checked_when_the_class_is_defined(
    body: Any, kind: Any, match: str
) -> None:
    with pytest.raises(kind, match=match):
        type("Wrong", (harness.Callback,), body)


def test_misspelt_own_event_is_an_error_when_it_is_fired() -> None:
    class Misspells(harness.Callback):
        def on_train_batch_end(self) -> None:
            self.ctx.call_callbacks("on_bel")

    with pytest.raises(TypeError, match="a tuple of names") as refused:

        class Odd(harness.Callback):
            events = (1, None)  # type: ignore[assignment]

    assert refused.value  # holds the class, which is still below Callback
    with pytest.raises(ValueError, match=r"got 'on_bel'\. Did you mean 'on_bell'"):
        line_learner().fit(slope(2), 1, callbacks=[Misspells(), Hears()], **OFF)


# ------------------------------------------------------------------- weights, prepare


def test_weights_at_single_events_change_the_order_there() -> None:
    order: list[str] = []

    def make(name: str, **body: Any) -> harness.Callback:
        def note(self: Any) -> None:
            order.append(name)

        methods = {"on_fit_begin": note, "on_fit_end": note}
        made: harness.Callback = type(name, (harness.Callback,), methods | body)()
        return made

    one, two = (
        make("one", weight=1),
        make("two", weight=2, event_weights={"on_fit_end": 0}),
    )
    line_learner().fit(slope(2), 1, callbacks=[two, one], **OFF)
    assert order == ["one", "two", "two", "one"]


def test_prepare_changes_model_and_optimizers_before_everything_else() -> None:
    seen: list[Any] = []

    class Prepares(Tape):
        def prepare(self, ctx: harness.Context) -> None:
            assert ctx.accelerator is not None
            assert ctx.train_data is None
            seen.append(list(self.events))
            ctx.model.b.requires_grad_(False)
            ctx.optimizers = {"mine": torch.optim.SGD([ctx.model.w], lr=0.5)}

        def check(self, ctx: harness.Context) -> None:
            seen.append(list(ctx.optimizers))

    fitted = line_learner().fit(slope(2), 1, callbacks=[Prepares()], **OFF)
    assert seen == [[], ["mine"]]
    # Rows (0, 0) and (1, 2): the gradient of w is -2.
    assert (fitted.model.w.item(), fitted.model.b.item()) == (1.0, 0.0)


def test_error_in_prepare_says_where() -> None:
    class Fails(harness.Callback):
        def prepare(self, ctx: harness.Context) -> None:
            raise RuntimeError

    with pytest.raises(RuntimeError) as caught:
        line_learner().fit(slope(2), 1, callbacks=[Fails()], **OFF)
    assert caught.value.__notes__ == ["in Fails.prepare, before the first epoch"]
