"""How the interpreter ends: by an exception that nobody caught, an exit code, or well."""

from __future__ import annotations

import sys
from typing import Any, Final, NoReturn

_python_exit: Final = sys.exit
_uncaught: list[SystemExit] = []


class _Exit(SystemExit):
    """Notes that nobody caught it.

    The interpreter drops it then before it calls exit handlers, when no Python code is
    running any more. One that was caught is dropped by the code that caught it.
    """

    def __del__(self) -> None:
        if sys._getframe().f_back is None:
            _uncaught.append(SystemExit(self.code))


def get_last_error() -> BaseException | None:
    """Return the last exception that was printed because nobody caught it."""
    return getattr(sys, "last_exc", None) or getattr(sys, "last_value", None)


def watch_exit() -> None:
    """Note the exit code of ``sys.exit`` from now on.

    Python tells exit handlers of an uncaught exception, but not of an exit code. Remove
    this when it does.
    """
    if sys.exit is _python_exit:
        sys.exit = _exit


def _exit(status: Any = None, /) -> NoReturn:
    """Exit the interpreter by raising SystemExit(status)."""
    raise _Exit(status)


def find_error(earlier: BaseException | None) -> BaseException | None:
    """Find what ends the interpreter; None if nothing went wrong.

    Parameters
    ----------
    earlier
        What ``get_last_error`` returned when the run started.
    """
    error = get_last_error()
    # A prompt prints errors and continues.
    if hasattr(sys, "ps1") or sys.flags.interactive or error is earlier:
        error = None
    return error or next(iter(_uncaught), None)
