import os
import subprocess
import sys

PROGRAM = """
import gc
from tracking.mlflow_store.imports import block_frames, import_mlflow

block_frames()
import_mlflow("client")
import client, pandas, polars

assert client.found == [], client.found
assert gc.isenabled()
assert gc.get_freeze_count() > 0  # no collection looks through what was imported
"""

CLIENT = """
import contextlib, gc

found = []
for name in ("pandas", "polars"):
    with contextlib.suppress(ImportError):
        __import__(name)
        found.append(name)
assert not gc.isenabled()
"""


def test_mlflow_finds_no_pandas_and_polars_while_it_is_imported(tmp_path, root):
    (tmp_path / "client.py").write_text(CLIENT)
    for name in ("pandas", "polars"):
        (tmp_path / f"{name}.py").touch()
    path = os.pathsep.join(map(str, (tmp_path, root)))
    environment = {**os.environ, "PYTHONPATH": path}
    command = [sys.executable, "-c", PROGRAM]
    subprocess.run(command, env=environment, cwd=tmp_path, check=True)
