"""Status of a run that is still open when the interpreter ends."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import tracking

START = """
import sys, tracking
run = tracking.start(delivery=False, runs_dir=globals().get("runs", "runs"))
"""


def get_status(folder, code, *options, **more):
    root = str(Path(tracking.__file__).parents[1])
    subprocess.run(
        [sys.executable, *options, "-c", code],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": root},
        capture_output=True,
        check=False,
        **more,
    )
    (run,) = tracking.list_runs(folder / "runs")
    return run.status


CASES = [
    ("sys.exit(1)", "failed"),
    ("sys.exit('a text')", "failed"),
    ("raise SystemExit(1)", "failed"),
    ("raise SystemExit", "finished"),
    ("exit(3)", "failed"),
    ("quit()", "finished"),
    ("class Own(SystemExit): pass\nraise Own(2)", "failed"),
    ("def main(): raise SystemExit(143)\nmain()", "killed"),
    (
        "try: raise SystemExit(1)\nexcept SystemExit as e: assert e.code == 1",
        "finished",
    ),
    ("raise KeyboardInterrupt", "killed"),
    ("import sys; sys.excepthook = lambda *more: None\n1 / 0", "failed"),
    (
        "def rows():\n  with run: yield 1\nfor row in rows(): break\nraise SystemExit(1)",
        "finished",
    ),
    (
        "import threading; t = threading.Thread(target=exit, args=(1,))\n"
        "t.start(); t.join()",
        "finished",
    ),
    ("import argparse; argparse.ArgumentParser().parse_args(['--no'])", "failed"),
    ("1 / 0", "failed"),
    ("sys.exit(143)", "killed"),
    ("sys.exit(0)", "finished"),
    ("try: sys.exit(1)\nexcept SystemExit as error: pass", "finished"),
    (
        "import threading; t = threading.Thread(target=sys.exit, args=(1,))\n"
        "t.start(); t.join()",
        "finished",
    ),
]

# Each program ends a fork of one process, which imports what a run needs, and describes
# the folder that runs are started in, only once.
FORKS = """
import os, sys, tracking
tracking.start(delivery=False, runs_dir="first").finish()
for number, code in enumerate(sys.argv[1:]):
    if os.fork() == 0:
        runs = f"{number}/runs"
        break
    os.wait()
else:
    sys.exit()
exec(code)
"""


@pytest.fixture(scope="module")
def statuses(tmp_path_factory):
    """Status of the run of each program, by its code."""
    folder = tmp_path_factory.mktemp("forks")
    codes = [code for code, _ in CASES]
    python = [sys.executable, "-c", FORKS, *(START + code for code in codes)]
    environment = {**os.environ, "PYTHONPATH": str(Path(tracking.__file__).parents[1])}
    subprocess.run(python, cwd=folder, env=environment, capture_output=True, check=True)
    found = {}
    for number, code in enumerate(codes):
        (run,) = tracking.list_runs(folder / str(number) / "runs")
        found[code] = run.status
    return found


@pytest.mark.parametrize(("code", "status"), CASES)
def test_status_at_exit(code, status, statuses):
    assert statuses[code] == status


def test_error_at_a_prompt_is_no_failure(tmp_path):
    code = START + "1 / 0"
    assert get_status(tmp_path, code, "-i", input=b"") == "finished"


def test_error_before_the_run_is_no_failure(tmp_path):
    code = f"import sys; sys.last_value = sys.last_exc = ValueError()\n{START}"
    assert get_status(tmp_path, code) == "finished"


WORKERS = """
import multiprocessing, sys, tracking.api

def work(name):
    run = tracking.start(name=name, delivery=False, runs_dir="runs")
    run.log_metric("loss", 0.5)
    if name == "code":
        sys.exit(3)
    if name == "error":
        raise ValueError
    if name == "ctrl-c":
        raise KeyboardInterrupt

if __name__ == "__main__":
    for name in ("returned", "code", "error", "ctrl-c"):
        child = multiprocessing.get_context("fork").Process(target=work, args=[name])
        child.start()
        child.join()
"""


def test_worker_of_multiprocessing_finishes_its_run(tmp_path):
    subprocess.run(
        [sys.executable, "-c", WORKERS],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(Path(tracking.__file__).parents[1])},
        capture_output=True,
        check=True,
    )
    assert {run.name: run.status for run in tracking.list_runs(tmp_path / "runs")} == {
        "returned": "finished",
        "code": "failed",
        "error": "failed",
        "ctrl-c": "killed",
    }
