"""The service that delivers the runs of a training process, without MLflow."""

from __future__ import annotations

import contextlib
import json
import os
import threading
from pathlib import Path

import pytest

from tracking.delivery.service import DeliveryService, Request


class Served:
    """A service in a thread, and the pipes to talk to it."""

    def __init__(self, deliver, linger_s=300.0):
        requests, self.requests = os.pipe()
        self.reports, reports = os.pipe()
        service = DeliveryService(deliver, requests, reports, linger_s)
        self.thread = threading.Thread(target=service.serve, daemon=True)
        self.thread.start()
        self.fds = [requests, reports]

    def send(self, text):
        os.write(self.requests, text.encode())

    def hand_over(self, number, run):
        self.send(json.dumps({"number": number, "run": run}) + "\n")

    def read(self):
        return json.loads(os.read(self.reports, 1000))

    def end(self):
        """Close what the training process holds, and wait for the service's end."""
        with contextlib.suppress(OSError):
            os.close(self.requests)
        self.thread.join(60)
        assert not self.thread.is_alive()
        for fd in [*self.fds, self.reports]:
            os.close(fd)


def test_run_that_hangs_holds_up_no_other_and_is_finished_at_the_end():
    answers = threading.Event()

    def deliver(request: Request):
        assert request.is_new is False
        if request.run == Path("/hangs"):
            answers.wait(60)
        return None if request.run == Path("/fails") else list

    served = Served(deliver)
    served.hand_over(1, "/hangs")
    served.hand_over(2, "/works")
    assert served.read() == {"number": 2, "is_done": True}
    served.hand_over(3, "/fails")
    assert served.read() == {"number": 3, "is_done": False}
    os.close(served.requests)  # the training process has ended
    answers.set()
    assert served.read() == {"number": 1, "is_done": True}
    served.end()


@pytest.mark.parametrize("line", ["", '{"number": 1, "run": "/hal'])
def test_service_ends_with_the_training_process(line):
    served = Served(lambda request: list)
    served.send(line)
    served.end()


def test_service_without_runs_ends_after_a_while():
    served = Served(lambda request: list, linger_s=0.05)
    served.thread.join(60)
    assert not served.thread.is_alive()
    served.end()


def test_what_is_left_of_a_run_waits_until_others_are_delivered():
    other = threading.Event()
    seen = []

    def deliver(request: Request):
        if request.number == 2:
            other.wait(60)
        seen.append(f"delivered {request.number}")
        return lambda: seen.append(f"finished {request.number}")

    served = Served(deliver)
    served.hand_over(1, "/one")
    served.hand_over(2, "/two")
    assert served.read() == {"number": 1, "is_done": True}
    os.close(served.requests)  # at the end of training, nothing more is to come
    other.set()
    assert served.read() == {"number": 2, "is_done": True}
    served.end()
    assert seen[:2] == ["delivered 1", "delivered 2"]
    assert sorted(seen[2:]) == ["finished 1", "finished 2"]


def test_delivery_that_pauses_is_woken():
    def deliver(request: Request):
        request.pause(60)
        return list

    served = Served(deliver)
    served.hand_over(1, "/one")
    served.send('{"wake": 7}\n{"wake": 1}\n')  # of a run that is over, and of this one
    assert served.read() == {"number": 1, "is_done": True}
    served.end()
