"""A terminal for tests: what a program writes to it, the bars it drew, the lines it left."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import struct
import termios
from collections.abc import Callable
from contextlib import redirect_stderr

ERASE = "\r\x1b[2K"
COLOUR = re.compile(r"\x1b\[[\d;]*m")


def in_terminal(call: Callable[[], object], width: int = 80) -> str:
    """What a call writes to stderr, if that is a terminal."""
    main, side = pty.openpty()
    fcntl.ioctl(side, termios.TIOCSWINSZ, struct.pack("HHHH", 24, width, 0, 0))
    text = ""
    with os.fdopen(side, "w") as terminal, redirect_stderr(terminal):
        call()
        terminal.flush()
        os.set_blocking(main, False)
        while True:
            try:
                text += os.read(main, 65536).decode()
            except BlockingIOError:
                break
    os.close(main)
    return text


def frames(text: str) -> list[str]:
    """Each bar that was drawn."""
    drawn = [frame.partition("\n")[0] for frame in COLOUR.sub("", text).split(ERASE)]
    return [frame for frame in drawn if "\u2501" in frame]


def screen(text: str) -> list[str]:
    """Lines that are left to see when every bar is erased."""
    lines = [line.split(ERASE)[-1] for line in text.replace("\r\n", "\n").split("\n")]
    return [line.rstrip() for line in lines if line.strip()]
