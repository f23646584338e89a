"""`tracking` works where torch, DeepSpeed, Pillow and matplotlib are not installed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

PROGRAM = """
import importlib
import pkgutil
import sys

# As if none were installed: the import raises, and find_spec finds nothing.
for name in ("torch", "deepspeed", "PIL", "matplotlib"):
    sys.modules[name] = None

import tracking

for module in pkgutil.walk_packages(tracking.__path__, "tracking."):
    importlib.import_module(module.name)

with tracking.start(experiment="digits", params={"lr": 0.1}, delivery=False) as run:
    for epoch in (1, 2):
        run.log("metrics", "train", {"loss": 1 / epoch}, index=epoch)
    run.log_step({"loss": 0.5}, step=1)
    run.log_image("samples", [[0.0, 1.0]], step=1)
    run.log_table("errors", {"a": [1]}, step=1)
    run.log_histogram("grads", [1.0, 2.0], step=1)

past = tracking.open(run.id)
assert past.status == "finished"
num_rows = past.records().num_rows
assert past.wide().num_rows >= 2
assert past.records(what="metrics")["value"].to_pylist() == [1.0, 0.5]
assert tracking.export([past], "records.parquet") == num_rows

from harness.cli.main import main

for words in (
    ["runs", "list"],
    ["runs", "show", run.id],
    ["verify", run.id, "--no-mlflow", "--file", "records.parquet"],
):
    main(words, standalone_mode=False)
assert "harness.context" not in sys.modules
"""


def test_tracking_works_without_torch(tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    done = subprocess.run(
        [sys.executable, str(program)], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "finished" in done.stdout
    assert "digits" in done.stdout
