"""The package says the same everywhere about what it is and what it needs."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
import tomllib
import zipfile
from importlib.metadata import entry_points, version
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement

import harness
import tracking

PACKAGES = ("harness", "tracking")
IMPORTED_AS = {"pyyaml": "yaml"}


@pytest.fixture(scope="module")
def project(root: Path) -> dict[str, Any]:
    return tomllib.loads((root / "pyproject.toml").read_text())["project"]


@pytest.fixture(scope="module")
def conda(root: Path) -> list[Any]:
    return yaml.safe_load((root / "conda-env.yml").read_text())["dependencies"]


@pytest.fixture(scope="module")
def imported_modules(root: Path) -> set[str]:
    """Top-level modules that the packages import anywhere, lazily too."""
    found = set()
    for package in PACKAGES:
        for file in (root / package).rglob("*.py"):
            for node in ast.walk(ast.parse(file.read_text())):
                if isinstance(node, ast.Import):
                    found |= {alias.name.partition(".")[0] for alias in node.names}
                elif isinstance(node, ast.ImportFrom) and not node.level:
                    found.add((node.module or "").partition(".")[0])
    return found - set(sys.stdlib_module_names) - set(PACKAGES)


def dependency_modules(project: dict[str, Any]) -> set[str]:
    names = {Requirement(text).name for text in project["dependencies"]}
    return {IMPORTED_AS.get(name, name) for name in names}


def test_conda_env_lists_the_same_set_as_pyproject(
    project: dict[str, Any], conda: list[Any]
) -> None:
    pip = next(item["pip"] for item in conda if isinstance(item, dict))
    assert pip == [*project["dependencies"], "--editable ."]


def test_conda_env_has_python_of_pyproject(
    project: dict[str, Any], conda: list[Any]
) -> None:
    assert f"python{project['requires-python']}" in conda


def test_every_import_is_a_dependency(
    imported_modules: set[str], project: dict[str, Any]
) -> None:
    assert imported_modules - dependency_modules(project) == set()


def test_every_dependency_is_imported(
    imported_modules: set[str], project: dict[str, Any]
) -> None:
    assert dependency_modules(project) - imported_modules == set()


def test_every_dependency_has_a_reason_in_decisions(
    root: Path, project: dict[str, Any]
) -> None:
    text = (root / "docs" / "decisions.md").read_text()
    names = {Requirement(line).name for line in project["dependencies"]}
    assert {name for name in names if f"| `{name}`" not in text} == set()


def test_deepspeed_is_wanted_on_linux_only(project: dict[str, Any]) -> None:
    (deepspeed,) = (
        requirement
        for requirement in map(Requirement, project["dependencies"])
        if requirement.name == "deepspeed"
    )
    assert deepspeed.marker is not None
    assert deepspeed.marker.evaluate({"sys_platform": "linux"})
    assert not deepspeed.marker.evaluate({"sys_platform": "darwin"})


def test_lower_bounds_allow_what_is_installed(project: dict[str, Any]) -> None:
    for requirement in map(Requirement, project["dependencies"]):
        if requirement.marker is None or requirement.marker.evaluate():
            installed = version(requirement.name).partition("+")[0]
            assert requirement.specifier.contains(installed), requirement


def requirements(file: Path) -> list[Requirement]:
    """The lines of a constraints file."""
    lines = file.read_text().splitlines()
    return [Requirement(line) for line in lines if line and not line.startswith("#")]


def lower_bounds(project: dict[str, Any]) -> dict[str, str]:
    """The lowest allowed version of each dependency."""
    found = {}
    for requirement in map(Requirement, project["dependencies"]):
        (only,) = requirement.specifier
        assert only.operator == ">=", requirement
        found[requirement.name] = only.version
    return found


def test_constraints_fit_the_lower_bounds(root: Path, project: dict[str, Any]) -> None:
    bounds = {
        requirement.name: requirement.specifier
        for requirement in map(Requirement, project["dependencies"])
    }
    pins = requirements(root / "scripts" / "constraints.txt")
    assert "torch" in {pin.name for pin in pins}
    for pin in pins:
        (only,) = pin.specifier
        assert only.operator == "=="
        assert bounds[pin.name].contains(only.version)


def test_lowest_constraints_are_the_lower_bounds(
    root: Path, project: dict[str, Any]
) -> None:
    pins = requirements(root / "scripts" / "constraints-lowest.txt")
    lowest = {pin.name: str(pin.specifier) for pin in pins}
    # A CPU build of an older torch cannot be had everywhere: see docs/decisions.md.
    bounds = lower_bounds(project) | {"torch": lowest["torch"].removeprefix("==")}
    assert {name: f"=={bound}" for name, bound in bounds.items()} == {
        name: pin for name, pin in lowest.items() if name in bounds
    }


def test_workflow_has_the_python_versions_of_the_classifiers(
    root: Path, project: dict[str, Any]
) -> None:
    workflow = yaml.safe_load((root / ".github" / "workflows" / "ci.yml").read_text())
    prefix = "Programming Language :: Python :: 3."
    stated = [line for line in project["classifiers"] if line.startswith(prefix)]
    job = workflow["jobs"]["test"]
    assert job["strategy"]["matrix"]["python"] == [
        line.rpartition(" ")[2] for line in stated
    ]
    assert job["steps"][-1] == {"run": ".ci/run"}


STUB = """\
#!/usr/bin/env bash
echo "said by $0 $*"
[ "${0##*/}" != setup ] || { mkdir -p "$HARNESS_ENV/bin"; cp "$0" "$HARNESS_ENV/bin/python"; }
[[ "$0 $*" != *"$FAILING"* ]]
"""


@pytest.mark.parametrize(
    "failing",
    ["nothing", "setup", "check", "docs --site", "durations", "not distributed"],
)
def test_ci_fails_with_each_of_its_parts_and_shows_what_all_said(
    failing: str, root: Path, tmp_path: Path
) -> None:
    for name in ("setup", "check", "test"):
        path = tmp_path / "scripts" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(STUB)
        path.chmod(0o755)
    for folder in ("harness/accelerators/deepspeed", "odd", "tracking", "harness/cli"):
        (tmp_path / "tests" / folder).mkdir(parents=True)
    (tmp_path / ".ci").mkdir()
    (tmp_path / ".ci" / "run").write_bytes((root / ".ci" / "run").read_bytes())
    done = subprocess.run(
        ["bash", tmp_path / ".ci" / "run"],
        env={**os.environ, "FAILING": failing, "TMPDIR": str(tmp_path)},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert (done.returncode != 0) is (failing != "nothing")
    wanted = ["setup dev"] if failing == "setup" else [
        *("setup dev", "--durations", "scripts/check", "docs --site"),
        *("distributed and not slow", "slow and not distributed", "-m browser"),
    ]  # fmt: skip
    said = [line for line in done.stdout.splitlines() if line.startswith("said by")]
    assert len(said) == len(wanted)
    assert all(text in line for text, line in zip(wanted, said, strict=True))
    assert not list(tmp_path.glob("luz-harness-ci.*"))


def test_pre_commit_runs_scripts_check(root: Path) -> None:
    config = yaml.safe_load((root / ".pre-commit-config.yaml").read_text())
    (hook,) = config["repos"][0]["hooks"]
    assert hook["entry"] == "scripts/check"
    assert os.access(root / hook["entry"], os.X_OK)


def test_installed_version_and_command_are_those_of_pyproject(
    project: dict[str, Any],
) -> None:
    (command,) = entry_points(group="console_scripts", name="harness")
    assert command.value == project["scripts"]["harness"]
    assert version("luz-harness") == project["version"]


@pytest.mark.parametrize("package", [harness, tracking], ids=PACKAGES)
def test_version_of_package_is_that_of_pyproject(
    package: ModuleType, project: dict[str, Any]
) -> None:
    assert package.__version__ == project["version"]


def test_wheel_holds_both_packages_typed_and_nothing_else(
    root: Path, tmp_path: Path
) -> None:
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel"]
    subprocess.run(
        [*build, "-d", str(tmp_path)], cwd=root, check=True, capture_output=True
    )
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.partition("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == set(PACKAGES)
    assert {"harness/py.typed", "tracking/py.typed"} <= set(names)
    assert any(name.endswith("licenses/LICENSE") for name in names)


WINDOWS = """
import os, signal, sys
import mlflow, pandas, torch, torchmetrics  # these may look for what is removed below

sys.modules.update(dict.fromkeys(["fcntl", "grp", "pwd", "resource", "termios"]))
for owner, names in (
    (os, "fork register_at_fork getuid killpg setsid O_CLOEXEC O_NOFOLLOW O_NONBLOCK"),
    (signal, "SIGUSR1 SIGUSR2 SIGKILL SIGHUP SIGALRM pthread_sigmask SIG_BLOCK"),
):
    for name in names.split():
        delattr(owner, name)

import harness.callbacks, harness.cli.main, tracking.cli.commands
"""


@pytest.mark.slow
def test_packages_import_without_what_windows_does_not_have(root):
    subprocess.run([sys.executable, "-c", WINDOWS], cwd=root, check=True)
