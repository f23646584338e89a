from __future__ import annotations

import time

import pytest

import harness
from harness.callbacks import ModelCheckpoint, ResumeFromCheckpoint
from harness.errors import CheckpointError
from tests.harness.stops import fit, sgd


class Count(harness.Callback):
    """Counts batches in steps of its own."""

    def __init__(self, by: int, also: object = None) -> None:
        self.by, self.also, self.count = by, also, 0
        self.made = time.perf_counter_ns()

    def on_train_batch_end(self) -> None:
        self.count += self.by

    def state_dict(self):
        return {"count": self.count}

    def load_state_dict(self, state):
        self.count = state["count"]


def count_on(saved, live, tmp_path, **options):
    """Count in two epochs of two batches, and resume for a third."""
    fit(sgd(), [*saved, ModelCheckpoint(tmp_path)], epochs=2)
    fit(sgd(), [*live, ResumeFromCheckpoint(tmp_path, **options)], epochs=3)
    return [(callback.by, callback.count) for callback in live]


@pytest.mark.parametrize(
    ("saved", "live", "expected"),
    [
        ([1, 10], [1, 10], [(1, 6), (10, 60)]),
        ([1, 10], [10, 1], [(10, 60), (1, 6)]),
        ([1, 10], [2, 20], [(2, 8), (20, 80)]),  # other options, in the same order
        ([1, 1], [1, 1], [(1, 6), (1, 6)]),
        ([1, 10, 5], [10, 1], [(10, 60), (1, 6)]),
        ([1], [10, 1], [(10, 20), (1, 6)]),
        ([1], [10], [(10, 60 - 36)]),  # the only one of its class
    ],
)
def test_callbacks_of_a_class_are_found_by_their_options(
    saved, live, expected, tmp_path
):
    found = count_on(map(Count, saved), [*map(Count, live)], tmp_path)
    assert found == expected


@pytest.mark.parametrize(
    ("saved", "live"), [([1, 10], [10, 20]), ([1, 1], [1]), ([1, 2, 3], [2, 9, 1])]
)
def test_callbacks_that_cannot_be_told_apart_are_refused(saved, live, tmp_path):
    with pytest.raises(
        CheckpointError, match="tell the callbacks of class Count apart"
    ):
        count_on(map(Count, saved), [*map(Count, live)], tmp_path)


class Note(harness.Callback):
    """Has no state."""

    def __init__(self, text: str) -> None:
        self.text = text


@pytest.mark.parametrize("live", [["a", "b", "c"], ["c"], ["c", "d", "a"]])
def test_callbacks_without_state_need_no_match(live, tmp_path):
    fit(sgd(), [Note("a"), Note("b"), Count(1), ModelCheckpoint(tmp_path)], epochs=2)
    count = Count(1)
    fit(sgd(), [*map(Note, live), count, ResumeFromCheckpoint(tmp_path)], epochs=3)
    assert count.count == 6


def test_callbacks_are_told_apart_by_one_of_several_options(tmp_path):
    saved = [Count(1, len), Count(2, max)]
    live = [Count(3, max), Count(4, len)]
    assert count_on(saved, live, tmp_path) == [(3, 8 + 6), (4, 4 + 8)]


def test_strict_refuses_to_resume_without_a_callback_that_was_saved(tmp_path):
    with pytest.raises(
        CheckpointError, match=r"Count.2 was saved, but this fit has none"
    ):
        count_on([Count(1), Count(2)], [Count(1)], tmp_path, strict=True)
