from __future__ import annotations

import json
import re
import signal
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

import pytest

import harness
from harness.callbacks import Notify
from tests.harness.accelerators.launches import free_port
from tests.harness.exact import Stop
from tests.harness.fakes import At, line_learner, slope


class Webhook(HTTPServer):
    """A webhook on this machine that keeps what it is sent."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.lines: list[str] = []
        self.status = 200
        self.url = f"http://127.0.0.1:{self.server_port}/services/secret-path"


class Handler(BaseHTTPRequestHandler):
    server: Webhook

    def do_POST(self) -> None:
        length = int(self.headers["Content-Length"])
        body = json.loads(self.rfile.read(length))
        assert self.headers["Content-Type"] == "application/json"
        self.server.lines.append(body["text"])
        self.send_response(self.server.status)
        self.end_headers()

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def webhook(monkeypatch: pytest.MonkeyPatch) -> Iterator[Webhook]:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    server = Webhook()
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def fit(url: str, *callbacks: Any, **options: Any) -> harness.Fitted:
    notify = Notify(url, **options)
    return line_learner().fit(
        slope(4),
        2,
        slope(2),
        callbacks=[notify, *callbacks],
        tracker=False,
        verbose=False,
    )


def test_notify_tells_the_end_of_a_fit(webhook):
    fitted = fit(webhook.url)
    (line,) = webhook.lines
    loss = fitted.records["metrics"]["valid"][-1]["loss"]
    assert re.fullmatch(
        rf"Line finished: epoch 2, \d+\.\d s, train/loss \S+, valid/loss {loss:.4g}",
        line,
    )


def test_notify_tells_of_a_signal_and_of_a_failure(webhook):
    fit(webhook.url, Stop("on_train_batch_end", 2), name="my run")
    assert webhook.lines[-1].startswith("my run was ended by signal 2: epoch 2,")

    def fail(ctx):
        raise ZeroDivisionError("with a secret in it")

    with pytest.raises(ZeroDivisionError):
        fit(webhook.url, At("on_valid_end", fail))
    assert webhook.lines[-1].startswith("Line failed with ZeroDivisionError: epoch 1,")
    assert "secret" not in webhook.lines[-1]

    def kill(ctx):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit(webhook.url, At("on_train_batch_end", kill))
    assert webhook.lines[-1].startswith("Line was killed: epoch 1,")
    assert len(webhook.lines) == 3
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_notify_that_is_not_delivered_changes_nothing(webhook):
    webhook.status = 500
    with pytest.warns(
        UserWarning, match=r"Notify: expected .* got 500\. The fit"
    ) as seen:
        assert fit(webhook.url).signum is None
    closed = f"http://127.0.0.1:{free_port()}/services/secret-path"
    with pytest.warns(UserWarning, match="got URLError") as also:
        assert fit(closed, timeout_s=1).signum is None
    assert not any("secret-path" in str(w.message) for w in [*seen, *also])


@pytest.mark.parametrize("url", ["hooks.example.org", None, "file:///etc/passwd"])
def test_notify_address_is_checked(url):
    with pytest.raises(ValueError, match=r"Notify\(url\): expected an address"):
        Notify(url)
    with pytest.raises(ValueError, match=r"Notify\(timeout_s\): expected more than 0"):
        Notify("https://example.org", timeout_s=0)
