"""One rank of a launch that runs cases in turn and writes how each went."""

from __future__ import annotations

import gc
import importlib
import json
import multiprocessing
import os
import sys
import traceback
import warnings
from pathlib import Path

import torch

from tests.harness.accelerators.cases import Lab


def main(folder: Path, module: str, stages: list[int], names: list[str]) -> int:
    """Run the cases at each stage; stop at the first that fails, for ranks must agree."""
    warnings.simplefilter("error")
    torch.set_num_threads(1)
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


def run_rank(
    folder: Path, module: str, stages: list[int], names: list[str], env: dict[str, str]
) -> None:
    """Be a rank: with its environment, and what it says in a file."""
    os.environ.clear()
    os.environ.update(env)
    log = os.open(folder / f"log-{env['RANK']}.txt", os.O_WRONLY | os.O_CREAT)
    os.dup2(log, sys.stdout.fileno())
    os.dup2(log, sys.stderr.fileno())
    gc.freeze()  # what is imported is never searched for garbage
    # Workers of loaders start as in a program of the user's.
    usual, *_ = multiprocessing.get_all_start_methods()
    multiprocessing.set_start_method(usual, force=True)
    sys.exit(main(folder, module, stages, names))
