from __future__ import annotations

import pytest

from harness.events import (
    EVENTS,
    EXTRA_EVENTS,
    FIT_EVENTS,
    PREDICT_EVENTS,
    check_event,
    nearest,
)
from tests.harness.event_lists import ONE_EPOCH_FIT


def test_events_of_a_fit_stand_in_firing_order() -> None:
    assert list(FIT_EVENTS) == ONE_EPOCH_FIT


def test_events_of_a_prediction_stand_in_firing_order() -> None:
    assert list(PREDICT_EVENTS) == [
        "on_predict_begin",
        "on_predict_batch_begin",
        "on_predict_batch_end",
        "on_predict_end",
    ]


def test_events_together_are_each_named_once() -> None:
    parts = [*FIT_EVENTS, *PREDICT_EVENTS, *EXTRA_EVENTS]
    assert list(EVENTS) == parts
    assert len(parts) == len(set(parts)) == 26


def test_check_event_that_exists_says_nothing() -> None:
    check_event("here", "on_fit_end")


def test_check_event_with_a_typo_offers_the_nearest() -> None:
    with pytest.raises(
        ValueError, match=r"here: expected an event, got 'on_fit_ends'."
    ):
        check_event("here", "on_fit_ends")
    with pytest.raises(ValueError, match="Did you mean 'on_fit_end'"):
        check_event("here", "on_fit_ends")


def test_nearest_without_anything_alike_is_empty() -> None:
    assert nearest("zzz", ["loss", "accuracy"]) == ""
    assert nearest("los", ["loss", "accuracy"]) == " Did you mean 'loss'?"


@pytest.mark.parametrize(
    ("name", "choice"), [("learning_rate", "lr"), ("wd", "weight_decay")]
)
def test_nearest_knows_initials(name: str, choice: str) -> None:
    assert nearest(name, ["momentum", choice]) == f" Did you mean {choice!r}?"
