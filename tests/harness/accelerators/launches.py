"""Starts workers and reads what they wrote."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.harness.accelerators.worker import OWN_MAPPINGS, run_program, run_rank

ROOT = Path(__file__).resolve().parents[3]

RANKS = multiprocessing.get_context("forkserver")
"""Forks each rank from a process that has done the imports, which take seconds."""
RANKS.set_forkserver_preload(["tests.harness.accelerators.imports"])

PATIENCE_S = 500
"""Seconds after which a launch is taken for hung."""


def free_port() -> int:
    """A port that was free a moment ago."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def rank_environment(rank: int, world: int, port: int) -> dict[str, str]:
    """What a launcher sets for a rank on this machine."""
    return dict(os.environ) | {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world),
        "LOCAL_WORLD_SIZE": str(world),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT),
    }


@contextlib.contextmanager
def server_environment() -> Iterator[None]:
    """Set the environment of the process that ranks are forked from."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setenv("PYTHONPATH", str(ROOT))
        for name, value in OWN_MAPPINGS.items():
            patch.setenv(name, value)
        yield


def started(
    command: list[str], env: dict[str, str], log: Path
) -> subprocess.Popen[bytes]:
    """A process that writes what it says into a file."""
    with log.open("w") as out:
        return subprocess.Popen(
            command, env=env, cwd=ROOT, stdout=out, stderr=subprocess.STDOUT
        )


def forked(world: int, target: Callable[..., None], *args: object) -> list[Any]:
    """Ranks under way that are forked and run a function, without a launcher."""
    port = free_port()
    ranks = [
        RANKS.Process(
            target=target,
            args=args,
            kwargs={"env": rank_environment(rank, world, port)},
        )
        for rank in range(world)
    ]
    with server_environment():
        for process in ranks:
            process.start()
    return ranks


def run_cases(
    folder: Path, module: str, world: int, stages: list[int], names: list[str]
) -> dict[str, str]:
    """How each case went on all ranks: "ok", or the tracebacks."""
    ranks = forked(world, run_rank, folder, module, stages, names)
    until = time.monotonic() + PATIENCE_S
    while any(process.exitcode is None for process in ranks):
        ended = [process.exitcode for process in ranks]
        if time.monotonic() > until or any(code not in (None, 0) for code in ended):
            time.sleep(2)
            for process in ranks:
                process.kill()
                process.join()
            break
        time.sleep(0.05)
    found: dict[str, str] = {}
    for rank in range(world):
        path = folder / f"rank-{rank}.json"
        done = json.loads(path.read_text()) if path.exists() else {}
        text = (folder / f"log-{rank}.txt").read_text()
        for key in [f"{name}-{stage}" for stage in stages for name in names]:
            said = done.get(key, f"not run or not finished:\n{text[-3000:]}")
            if said != "ok":
                found[key] = found.get(key, "") + f"rank {rank}: {said}\n"
    return {f"{n}-{s}": found.get(f"{n}-{s}", "ok") for s in stages for n in names}


class ForkedProgram:
    """Two ranks that run a script without a launcher; they write to ``log`` in a folder."""

    def __init__(self, folder: Path, script: Path, how: str) -> None:
        (folder / "log").write_text("")
        words = [str(script), str(folder), how]
        self.ranks = forked(2, run_program, words, folder / "log")

    def wait(self, timeout: float) -> int:
        """The highest exit code, once both have ended."""
        for process in self.ranks:
            process.join(timeout)
        codes = [process.exitcode for process in self.ranks]
        assert None not in codes, codes
        return max(map(abs, codes))

    def kill(self) -> None:
        """End both."""
        for process in self.ranks:
            process.kill()


class Launches:
    """Launches of groups of cases, each started once."""

    def __init__(self, folder: Path, module: str) -> None:
        self.folder, self._module = folder, module
        self._done: dict[tuple[int, tuple[int, ...], tuple[str, ...]], Any] = {}

    def said(
        self, world: int, stages: list[int], names: list[str], name: str, stage: int
    ) -> str:
        """How a case of a group went: "ok", or the tracebacks of the ranks."""
        key = world, tuple(stages), tuple(names)
        if key not in self._done:
            own = (
                self.folder / f"{len(self._done)}-{world}-{'-'.join(map(str, stages))}"
            )
            own.mkdir()
            self._done[key] = run_cases(own, self._module, world, stages, names)
        return self._done[key][f"{name}-{stage}"]
