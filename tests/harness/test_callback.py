from __future__ import annotations

import pytest

import harness
from harness.events import EVENTS


def test_callback_method_that_is_no_event_is_refused_when_defined() -> None:
    with pytest.raises(ValueError, match="class Wrong: expected an event") as caught:
        type("Wrong", (harness.Callback,), {"on_epoch_finish": lambda self: None})
    assert "'on_epoch_finish'" in str(caught.value)
    assert "harness.events.EVENTS" in str(caught.value)


def test_callback_with_a_misspelt_event_is_offered_the_nearest() -> None:
    with pytest.raises(ValueError, match="Did you mean 'on_train_batch_end'"):
        type("Wrong", (harness.Callback,), {"on_train_batch_ends": lambda self: None})


@pytest.mark.parametrize("event", EVENTS)
def test_callback_may_listen_to_each_event(event: str) -> None:
    kind = type("Right", (harness.Callback,), {event: lambda self: None})
    assert callable(getattr(kind(), event))


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
