"""The README's commands, run in a fresh clone as a newcomer would."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import duckdb
import pyarrow.parquet as pq
import pytest

from tests.walk import Walk

pytestmark = pytest.mark.slow

GOAL = 0.97


@dataclass(frozen=True)
class Quickstart:
    """A clone in which the quickstart ran."""

    folder: Path
    output: str

    @property
    def run_id(self) -> str:
        found = re.search(r"harness runs show (\S+)", self.output)
        assert found, self.output
        return found.group(1)

    def harness(self, *words: str) -> str:
        """What a harness command prints in the clone."""
        run = ["harness", *words]
        done = subprocess.run(
            run, cwd=self.folder, env=environment(), capture_output=True, text=True
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout


def environment() -> dict[str, str]:
    """This environment, with the commands of the running Python first."""
    bin_folder = str(Path(sys.executable).parent)
    path = os.pathsep.join([bin_folder, os.environ["PATH"]])
    return {**os.environ, "PATH": path, "HARNESS_ENV": "active"}


def clone(root: Path, folder: Path) -> Path:
    """The tracked files as they are now, and new ones, in a repository of their own."""
    listing = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    names = subprocess.run(listing, cwd=root, capture_output=True, check=True).stdout
    for name in names.decode().split("\0"):
        source = root / name
        if name and source.is_file():
            target = folder / name
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(source.read_bytes())
            target.chmod(source.stat().st_mode)
    return folder


@pytest.fixture(scope="module")
def quickstart(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Quickstart:
    folder = clone(root, tmp_path_factory.mktemp("clone"))
    done = subprocess.run(
        ["scripts/quickstart"],
        cwd=folder,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        stdin=subprocess.DEVNULL,
    )
    assert done.returncode == 0, done.stdout
    return Quickstart(folder, done.stdout)


def test_quickstart_reaches_the_goal(quickstart: Quickstart) -> None:
    found = re.search(r"result: validation accuracy ([\d.]+)", quickstart.output)
    assert found, quickstart.output
    assert float(found.group(1)) >= GOAL


def test_quickstart_tells_once_what_to_type_next(quickstart: Quickstart) -> None:
    for command in ("harness ui", "harness runs show", "harness export"):
        assert quickstart.output.count(f"  {command}") == 1, command


def test_quickstart_prints_no_traceback_or_warning(quickstart: Quickstart) -> None:
    assert "Traceback" not in quickstart.output
    assert "Warning" not in quickstart.output


def test_run_is_listed_as_finished(quickstart: Quickstart) -> None:
    (run,) = json.loads(quickstart.harness("runs", "list", "--json"))
    assert (run["id"], run["status"]) == (quickstart.run_id, "finished")


def test_parquet_reads_alike_in_pyarrow_and_duckdb(quickstart: Quickstart) -> None:
    file = quickstart.folder / "digits.parquet"
    table = pq.read_table(file)
    query = f"select count(*), max(value) from '{file}' where name = 'accuracy'"
    duck = duckdb.connect().execute(query).fetchone()
    values = [row["value"] for row in table.to_pylist() if row["name"] == "accuracy"]
    assert duck == (len(values), max(values))
    assert len(values) == 30


def test_mlflow_has_the_history_of_the_parquet_file(quickstart: Quickstart) -> None:
    quickstart.harness("sync")
    import mlflow  # noqa: PLC0415  # three seconds, in suites without this test too

    store = f"sqlite:///{quickstart.folder}/mlflow.db"
    client = mlflow.MlflowClient(store)
    experiment = client.get_experiment_by_name("digits")
    assert experiment is not None
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.status == "FINISHED"
    history = client.get_metric_history(run.info.run_id, "train/loss")
    rows = pq.read_table(quickstart.folder / "digits.parquet").to_pylist()
    wanted = [
        (row["index"], row["value"])
        for row in rows
        if (row["what"], row["set"], row["name"]) == ("metrics", "train", "loss")
    ]
    found = sorted((metric.step, metric.value) for metric in history)
    assert found == wanted
    assert len(found) == 15


def test_setup_without_a_new_enough_python_says_what_to_do(
    root: Path, tmp_path: Path
) -> None:
    env = {**os.environ, "PYTHON": "/bin/false", "HARNESS_ENV": str(tmp_path / "env")}
    done = subprocess.run(
        ["scripts/setup"], cwd=root, env=env, capture_output=True, text=True
    )
    assert done.returncode == 1
    assert done.stderr == (
        "scripts/setup: expected Python 3.11 or newer, found none. "
        "Install it, or set PYTHON=/path/to/python.\n"
    )
    assert not (tmp_path / "env").exists()


FAKE_PYTHON = """\
#!/usr/bin/env bash
# Stands for an interpreter: makes a folder for an environment, writes down the rest.
# An installation fails without a network, and some files can never be compiled.
case "$*" in
    -c*) exit 0 ;;
    *--editable*) echo "$*" >> "$FAKE_LOG"; [ ! -e "$FAKE_LOG.offline" ] ;;
    "-m compileall"*) exit 1 ;;
    --version) echo "Python 3.11.0" ;;
    "-m venv"*) mkdir -p "${@: -1}/bin" && cp "$0" "${@: -1}/bin/python" ;;
    *--upgrade*) exit 1 ;;
esac
"""


def test_setup_installs_again_only_for_other_dependencies(
    root: Path, tmp_path: Path
) -> None:
    folder = clone(root, tmp_path / "clone")
    fake, log = tmp_path / "python", tmp_path / "log"
    fake.write_text(FAKE_PYTHON)
    fake.chmod(0o755)
    env = {name: text for name, text in os.environ.items() if name != "HARNESS_ENV"}
    env |= {"PYTHON": str(fake), "FAKE_LOG": str(log)}

    def setup(code: int = 0) -> tuple[int, str]:
        """Installations so far, and what this one printed."""
        done = subprocess.run(
            ["scripts/setup", "dev"],
            cwd=folder,
            env=env,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert done.returncode == code
        return len(log.read_text().splitlines()), done.stdout

    project, offline = folder / "pyproject.toml", tmp_path / "log.offline"
    offline.touch()
    setup(code=1)
    offline.unlink()
    log.unlink()
    assert "environment: ready" in setup()[1]
    install = log.read_text()
    assert "--constraint scripts/constraints.txt --editable .[dev]" in install
    assert setup() == (1, "")
    project.write_text(
        project.read_text().replace("line-length = 88", "line-length = 90")
    )
    assert setup() == (1, "")
    project.write_text(project.read_text().replace("click>=", "click>"))
    assert setup()[0] == 2


def test_commands_of_the_first_hour_work(quickstart: Quickstart, root: Path) -> None:
    Walk(quickstart.folder).follow(root / "README.md")
    listed = json.loads(quickstart.harness("runs", "list", "--json"))
    assert {run["status"] for run in listed} == {"finished"}
    assert len(listed) == 5  # the quickstart's own too
    assert (quickstart.folder / "digits.parquet").exists()
