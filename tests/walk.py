"""Read the blocks of code of a page, and do what it says as a reader would."""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

FENCE = re.compile(
    r"(?:^<!-- (?P<mark>not run|needs|file|run): (?P<about>[^\n]*) -->\n)?"
    r"^```(?P<language>\w+)[^\n]*\n(?P<code>.*?)^```",
    re.MULTILINE | re.DOTALL,
)


@dataclass(frozen=True)
class Block:
    """A block of code of a page, and what the comment above it says of it."""

    language: str
    code: str
    mark: str | None
    about: str


def blocks_of(path: Path) -> Iterator[Block]:
    """The blocks of code of a page."""
    for match in FENCE.finditer(path.read_text()):
        found = match.groupdict()
        yield Block(
            found["language"], found["code"], found["mark"], found["about"] or ""
        )


class Walk:
    """A reader who does what a page says, in an empty folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
        self.environment = {**os.environ, "PATH": path, "OMP_NUM_THREADS": "1"}

    def follow(self, page: Path) -> None:
        """Write each file and run each command of the page, in its order."""
        written = {
            block.about: block.code for block in blocks_of(page) if block.mark == "file"
        }
        for name, code in written.items():
            (self.folder / name).write_text(code)
        for block in blocks_of(page):
            if block.language == "sh" and block.mark != "not run":
                for line in block.code.replace("\\\n", " ").splitlines():
                    if not line.startswith("#"):
                        self.run(self.named(line))

    def named(self, line: str) -> str:
        """The line with ids of runs: RUN is the newest one, OTHER the one before."""
        runs = sorted(path.name for path in self.folder.glob("runs/2*"))
        newest = dict(zip(("RUN", "OTHER"), reversed(runs), strict=False))
        for word, run in newest.items():
            line = re.sub(rf"\b{word}\b", run, line)
        return line

    def run(self, line: str) -> None:
        """Run one command, and press Ctrl-C if its comment says so."""
        words = shlex.split(line, comments=True)
        options = {"cwd": self.folder, "env": self.environment, "text": True}
        if "# press Ctrl-C" in line:
            process = subprocess.Popen(words, **options)  # type: ignore[call-overload]
            self.wait_for_a_checkpoint(process)
            process.send_signal(signal.SIGINT)
            assert process.wait(timeout=300) == 130
            return
        done = subprocess.run(
            words, capture_output=True, timeout=500, check=False, **options
        )  # type: ignore[call-overload]
        assert done.returncode == 0, f"{line}\n{done.stdout}\n{done.stderr}"

    def wait_for_a_checkpoint(self, process: subprocess.Popen[str]) -> None:
        """Wait until the newest run, which the process started, has saved."""
        before = set(self.folder.glob("runs/2*/checkpoints/0*"))
        until = time.monotonic() + 300
        while not set(self.folder.glob("runs/2*/checkpoints/0*")) - before:
            assert process.poll() is None
            assert time.monotonic() < until
            time.sleep(0.02)
