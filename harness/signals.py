"""Signals: their handlers during a fit, and the end of a process that a signal asked to end."""

from __future__ import annotations

import ctypes
import os
import signal
from collections.abc import Callable
from functools import cache
from types import FrameType
from typing import TYPE_CHECKING, ClassVar

import torch

from tracking.errors import write_stderr

if TYPE_CHECKING:
    from harness.accelerators.base import Accelerator

Handler = Callable[[int, FrameType | None], object] | int | None

GROUP_SIGNALS = tuple(
    signal.Signals[name]
    for name in ("SIGINT", "SIGTERM", "SIGUSR1", "SIGHUP")
    if hasattr(signal, name)  # Windows has only the first two
)
"""Signals that a terminal or a job scheduler sends to every process of a group."""

ENDING_SIGNALS = tuple(n for n in GROUP_SIGNALS if n.name in {"SIGTERM", "SIGHUP"})
"""Those that ask the whole program to end, and not only what it does at the moment."""


class SignalHandlers:
    """Handlers that are installed for a while, and what was there before.

    ``signal.signal`` knows only what Python installed. A handler of a library or of
    ``faulthandler.register`` is kept as the system describes it.
    """

    def __init__(self) -> None:
        self._taken: dict[int, tuple[Handler, bytes, Handler, bytes]] = {}

    def take(self, number: int, handler: Handler) -> None:
        """Install a handler, unless the program that Python runs in, such as R, has one."""
        before, action = signal.getsignal(number), _read_action(number)
        if before is not None:  # else Python could not put it back
            signal.signal(number, handler)
            self._taken[number] = before, action, handler, _read_action(number)

    def restore(self) -> None:
        """Put back what was there, except where something else was installed since."""
        while self._taken:
            number, (before, action, own, own_action) = self._taken.popitem()
            is_own = signal.getsignal(number) == own
            if is_own and _get_address(_read_action(number)) == _get_address(
                own_action
            ):
                signal.signal(number, before)
                _write_action(number, action)


def has_handler(number: int) -> bool:
    """Whether the program or a library handles a signal, or ignores it."""
    is_default = signal.getsignal(number) == signal.SIG_DFL
    return not is_default or any(_get_address(_read_action(number)))


class EndOfProcess:
    """What remains to be done after a signal that a fit took: the process has to end.

    A fit ends in order on SIGTERM and SIGHUP, so that its result can be saved. Without the
    fit, the signal would have ended the process. So the process does not begin another one.
    """

    asked_by: ClassVar[int | None] = None

    @classmethod
    def ask(cls, number: int) -> None:
        """Remember a signal, if it asks the process to end."""
        if cls.asked_by is None and number in ENDING_SIGNALS:
            cls.asked_by = number

    @classmethod
    def check(cls, accelerator: Accelerator) -> None:
        """End the process if a signal has asked for it, on this rank or on another one.

        Raises
        ------
        SystemExit
            With the code that a shell gives a process that the signal ended.
        """
        asked_by = torch.tensor(cls.asked_by or 0)
        number = int(accelerator.reduce(asked_by, "max"))
        if number:
            if accelerator.is_main:
                told = f"{signal.Signals(number).name} asked this process to end"
                write_stderr(f"harness: {told}, so no other fit starts.\n")
            raise SystemExit(128 + number)


# --------------------------------------------------------- what the system has installed

_ACTION_BYTES = 1024
"""More than any system's ``struct sigaction``; Linux has 152 bytes, macOS 16."""


@cache
def _find_sigaction() -> Callable[..., int] | None:
    """Return the C function ``sigaction``; None where there is none, as on Windows."""
    return ctypes.CDLL(None).sigaction if os.name == "posix" else None


def _read_action(number: int) -> bytes:
    """Read what the system does at a signal, as it describes it; empty if it does not."""
    sigaction, found = _find_sigaction(), ctypes.create_string_buffer(_ACTION_BYTES)
    if sigaction is None or sigaction(int(number), None, found) != 0:
        return b""
    return found.raw


def _write_action(number: int, action: bytes) -> None:
    """Let the system do again what it did at a signal."""
    sigaction = _find_sigaction()
    if sigaction is not None and action:
        sigaction(int(number), action, None)


def _get_address(action: bytes) -> bytes:
    """Address of the handler, the first field: 0 is the default."""
    return action[: ctypes.sizeof(ctypes.c_void_p)]
