"""One rank of a launch that runs cases in turn and writes how each went, or a script."""

from __future__ import annotations

import atexit
import gc
import importlib
import json
import multiprocessing
import os
import runpy
import sys
import threading
import traceback
import warnings
from pathlib import Path

import torch

from tests.harness.accelerators.cases import Lab

OWN_MAPPINGS = {"MALLOC_MMAP_THRESHOLD_": str(1 << 20)}
"""Environment of a process whose memory is measured. What glibc has freed for tensors of more
than 1 MiB goes back to the system at once; by default it keeps up to twice the greatest."""


def main(folder: Path, module: str, stages: list[int], names: list[str]) -> int:
    """Run the cases at each stage; stop at the first that fails, for ranks must agree."""
    warnings.simplefilter("error")
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    cases = importlib.import_module(module).CASES
    done: dict[str, str] = {}
    for stage in stages:
        for name in names or cases:
            key = f"{name}-{stage}"
            own = folder / key
            own.mkdir(exist_ok=True)
            try:
                cases[name](Lab(stage=stage, folder=own, rank=rank, world=world))
                done[key] = "ok"
            except BaseException:  # noqa: BLE001  written down; the parent judges
                done[key] = traceback.format_exc()
            (folder / f"rank-{rank}.json").write_text(json.dumps(done))
            if done[key] != "ok":
                sys.stdout.flush()
                os._exit(1)
    return 0


def become_rank(env: dict[str, str], log: Path) -> None:
    """Take the environment of a rank, and write what it says to the end of a file."""
    os.environ.clear()
    os.environ.update(env)
    opened = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(opened, sys.stdout.fileno())
    os.dup2(opened, sys.stderr.fileno())
    gc.freeze()  # what is imported is never searched for garbage
    torch.set_num_threads(1)
    # Workers of loaders start as in a program of the user's.
    usual, *_ = multiprocessing.get_all_start_methods()
    multiprocessing.set_start_method(usual, force=True)


def run_rank(
    folder: Path, module: str, stages: list[int], names: list[str], env: dict[str, str]
) -> None:
    """Be a rank that runs cases."""
    become_rank(env, folder / f"log-{env['RANK']}.txt")
    sys.exit(main(folder, module, stages, names))


def run_program(words: list[str], log: Path, env: dict[str, str]) -> None:
    """Be a rank that runs a script, and end as the interpreter does."""
    become_rank(env, log)
    sys.argv[:] = words
    code = 0
    try:
        runpy.run_path(words[0], run_name="__main__")
    except BaseException:  # noqa: BLE001  written by the hook that is set
        sys.excepthook(*sys.exc_info())  # type: ignore[arg-type]
        code = 1
    for thread in threading.enumerate():
        if thread is not threading.current_thread() and not thread.daemon:
            thread.join()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    os._exit(code)
