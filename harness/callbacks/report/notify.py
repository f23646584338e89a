"""Sends a line to a webhook when a fit ends."""

from __future__ import annotations

import json
import math
import sys
import urllib.request
import warnings
from time import perf_counter

from harness.callback import Callback
from harness.checks.values import check_more_than


class Notify(Callback):
    """Sends one line to a webhook when a fit finishes, fails or is killed by a signal.

    The line is the ``text`` of a JSON object, as chat programs take it. It names the model,
    how the fit ended, epochs, time, the last losses and the run; for an exception, only its
    class. If it cannot be delivered, there is a warning, and the fit ends as without it.

    Parameters
    ----------
    url
        Address of the webhook, ``https://...``. It is not recorded or shown.
    name
        First words of the line; None: the class of the model.
    timeout_s : > 0
        Longest time to wait for the webhook.

    Raises
    ------
    ValueError
        If `url` is not a web address.
    """

    weight = math.inf  # after the last checkpoint is written

    def __init__(
        self, url: str, *, name: str | None = None, timeout_s: float = 5.0
    ) -> None:
        if not isinstance(url, str) or not url.startswith(("https://", "http://")):
            msg = "Notify(url): expected an address that begins with https://"
            raise ValueError(f"{msg}, got another one. Copy it from your chat program.")
        check_more_than(
            "Notify(timeout_s)", timeout_s, 0, "Leave it out for 5 seconds."
        )
        self._url, self.name, self.timeout_s = url, name, timeout_s
        self._began = perf_counter()

    def on_fit_begin(self) -> None:
        self._began = perf_counter()

    def on_fit_end(self) -> None:
        """Say that the fit has finished, or which signal ended it."""
        signum = self.ctx.stop_signal
        self._send("finished" if signum is None else f"was ended by signal {signum}")

    def on_exception(self) -> None:
        """Say that the fit has failed, or was killed by a second Ctrl-C."""
        error = sys.exception()
        is_killed = isinstance(error, KeyboardInterrupt)
        self._send("was killed" if is_killed else f"failed with {type(error).__name__}")

    def describe(self, what: str) -> str:
        """Return the line about the fit."""
        ctx = self.ctx
        parts = [f"epoch {ctx.epoch or 0}", f"{perf_counter() - self._began:.1f} s"]
        for split in ("train", *ctx.valid_sets):
            loss = ctx.get_formatted_metrics(split).get("loss")
            if loss is not None:
                parts.append(f"{split}/loss {loss}")
        if ctx.run.id is not None:
            parts.append(f"run {ctx.run.id}")
        return f"{self.name or type(ctx.model).__name__} {what}: {', '.join(parts)}"

    def _send(self, what: str) -> None:
        if not self.ctx.accelerator.is_main:
            return
        try:
            body = json.dumps({"text": self.describe(what)}).encode()
            head = {"Content-Type": "application/json"}
            request = urllib.request.Request(self._url, body, head)
            with urllib.request.urlopen(request, timeout=self.timeout_s):
                pass
        except Exception as error:  # noqa: BLE001  a message must not end a training
            got = getattr(error, "code", None) or type(error).__name__
            msg = f"Notify: expected the webhook to take a line, got {got}."
            warnings.warn(f"{msg} The fit is not affected.", stacklevel=2)
