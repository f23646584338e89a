from __future__ import annotations

import logging

import pytest

from tracking.delivery.retry import GaveUpError, RetryPolicy
from tracking.delivery.state import DeliveryState, StateFile
from tracking.mlflow_store.client import RefusedError, UnreachableError


class FakeTime:
    """A clock that only sleeping moves."""

    def __init__(self):
        self.now_s = 100.0
        self.slept = []

    def clock(self):
        return self.now_s

    def sleep(self, seconds):
        self.slept.append(seconds)
        self.now_s += seconds


class Failing:
    """An action that fails a number of times before it returns 7."""

    def __init__(self, num_failures, text="no answer"):
        self.num_left = num_failures
        self.text = text

    def __call__(self):
        if self.num_left:
            self.num_left -= 1
            raise UnreachableError(self.text)
        return 7


@pytest.fixture
def time():
    return FakeTime()


@pytest.fixture
def make_policy(tmp_path, time):
    """Makes a policy, and the state that it shows."""

    def make(limit_s=10.0, is_live=lambda: False, redact=str, **more):
        state = DeliveryState(phase="delivering")
        policy = RetryPolicy(
            StateFile(tmp_path, state, count_behind=lambda: 3),
            limit_s=limit_s,
            is_being_written=is_live,
            redact=redact,
            **more,
            sleep=time.sleep,
            clock=time.clock,
        )
        return policy, state

    return make


def test_result_of_the_first_answer_is_returned(make_policy, time):
    policy, state = make_policy()
    assert policy.run(Failing(0)) == 7
    assert time.slept == []
    assert state.phase == "delivering"


def test_delays_double_up_to_a_limit(make_policy, time):
    policy, _ = make_policy(is_live=lambda: True)
    assert policy.run(Failing(9)) == 7
    assert time.slept == [0.25, 0.5] + [1] * (1 + 2 + 4 + 8 + 15 + 15 + 15)


def test_waiting_ends_at_once_when_another_process_takes_over(make_policy, time):
    policy, state = make_policy(
        is_live=lambda: True, is_replaced=lambda: time.now_s > 105
    )
    with pytest.raises(GaveUpError, match="no answer"):
        policy.run(Failing(100))
    assert 105 < time.now_s <= 107
    assert state.phase == "gave up"


def test_live_run_is_retried_without_a_time_limit(make_policy, time):
    policy, _ = make_policy(limit_s=0.0, is_live=lambda: True)
    assert policy.run(Failing(1000)) == 7
    assert time.now_s > 10_000


def test_ended_run_is_given_up_after_the_time_limit(make_policy, time, tmp_path):
    policy, state = make_policy(limit_s=3.0)
    with pytest.raises(GaveUpError, match="no answer"):
        policy.run(Failing(1000))
    assert time.slept == [0.25, 0.5, 1, 1, 1]
    assert (state.phase, state.error, state.behind) == ("gave up", "no answer", 3)
    assert DeliveryState.read(tmp_path) == state


def test_time_that_a_silent_server_takes_counts_for_the_limit(make_policy, time):
    policy, _ = make_policy(limit_s=3.0)

    def wait_in_vain():
        time.now_s += 3.0
        raise UnreachableError("no answer in 3 s")

    with pytest.raises(GaveUpError, match="no answer in 3 s"):
        policy.run(wait_in_vain)
    assert time.now_s == 103


def test_time_limit_starts_again_after_an_answer(make_policy, time):
    policy, _ = make_policy(limit_s=1.0)
    for _ in range(5):
        assert policy.run(Failing(2)) == 7
    assert time.now_s > 103


def test_state_shows_what_delivery_waits_for_and_forgets_it(make_policy, tmp_path):
    policy, state = make_policy(redact=lambda text: text.replace("pw", "***"))
    shown = []

    def watch():
        shown.append(DeliveryState.read(tmp_path))
        if len(shown) < 3:
            raise UnreachableError("no answer from me:pw")

    policy.run(watch)
    assert shown[0] is None
    assert (shown[2].phase, shown[2].error) == ("waiting", "no answer from me:***")
    assert (state.phase, state.error) == ("delivering", None)


def test_each_reason_is_logged_once(make_policy, caplog):
    caplog.set_level(logging.INFO)
    policy, _ = make_policy()
    policy.run(Failing(3))
    assert [record.getMessage() for record in caplog.records] == [
        "waiting for MLflow: no answer",
        "MLflow answers again",
    ]


def test_refusal_is_not_retried(make_policy, time):
    policy, _ = make_policy()

    def refuse():
        raise RefusedError("bad name")

    with pytest.raises(RefusedError, match="bad name"):
        policy.run(refuse)
    assert time.slept == []
