"""What is released works where nothing else of the project is: from the sdist to a fit."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from dataclasses import dataclass
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

#: What the sdist has beside the packages: whoever packages it anew tests and reads it too.
PARTS = ("docs", "harness", "scripts", "tests", "tracking")
FILES = ("CHANGELOG.md", "CONTRIBUTING.md", "LICENSE", "README.md", "conda-env.yml")


@dataclass(frozen=True)
class Environment:
    """An environment that holds the wheel, and the dependencies of this one."""

    folder: Path

    @property
    def python(self) -> str:
        """The interpreter, whose folder has the command ``harness``."""
        return str(self.folder / "bin" / "python")

    def run(self, *words: str, cwd: Path) -> str:
        """Output of a command that sees only this environment; it must succeed."""
        path = os.pathsep.join([str(self.folder / "bin"), os.environ["PATH"]])
        kept = {
            name: value for name, value in os.environ.items() if name != "PYTHONPATH"
        }
        done = subprocess.run(
            words,
            cwd=cwd,
            env={**kept, "PATH": path},
            capture_output=True,
            text=True,
            stdin=subprocess.DEVNULL,
        )
        assert done.returncode == 0, f"{words}\n{done.stdout}\n{done.stderr}"
        return done.stdout


def build(source: Path, target: str, output: Path) -> Path:
    """Build the wheel or sdist of a source tree."""
    command = [sys.executable, "-m", "hatchling", "build", "-t", target]
    subprocess.run(
        [*command, "-d", str(output)], cwd=source, check=True, capture_output=True
    )
    (made,) = output.glob("*.whl" if target == "wheel" else "*.tar.gz")
    return made


@pytest.fixture(scope="module")
def source(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The unpacked sdist."""
    folder = tmp_path_factory.mktemp("sdist")
    with tarfile.open(build(root, "sdist", folder)) as archive:
        if hasattr(tarfile, "data_filter"):  # not in each Python 3.11
            archive.extraction_filter = tarfile.data_filter
        archive.extractall(folder)
    (unpacked,) = (path for path in folder.iterdir() if path.is_dir())
    return unpacked


@pytest.fixture(scope="module")
def wheel(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of the sdist."""
    return build(source, "wheel", tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def environment(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Environment:
    """A new environment with the wheel. It borrows the dependencies, without a network."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, with_pip=False)
    made = Environment(folder)
    install = [
        sys.executable,
        "-m",
        "pip",
        "--python",
        made.python,
        "install",
        "--quiet",
    ]
    subprocess.run([*install, "--no-index", "--no-deps", str(wheel)], check=True)
    (own,) = folder.glob("lib/python*/site-packages")
    # A path in a .pth file is only appended: .pth files there, such as that of an
    # editable installation of this project, are not read.
    paths = {sysconfig.get_path(name) for name in ("purelib", "platlib")}
    (own / "dependencies.pth").write_text("\n".join(sorted(paths)))
    return made


def test_sdist_has_the_tracked_files_of_its_parts_and_nothing_else(
    root: Path, source: Path
) -> None:
    listing = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    names = subprocess.run(listing, cwd=root, capture_output=True, check=True).stdout
    tracked = {name for name in names.decode().split("\0") if (root / name).is_file()}
    wanted = {
        name for name in tracked if name.startswith(tuple(f"{p}/" for p in PARTS))
    }
    made_by_hatchling = {"PKG-INFO", "pyproject.toml", ".gitignore"}
    there = {
        str(path.relative_to(source)) for path in source.rglob("*") if path.is_file()
    }
    assert there - made_by_hatchling == wanted | set(FILES)


def test_wheel_has_the_packages_of_the_repository(root: Path, wheel: Path) -> None:
    names = {
        name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name
    }
    files = [
        path for part in ("harness", "tracking") for path in (root / part).rglob("*")
    ]
    there = {
        str(path.relative_to(root))
        for path in files
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert names == there
    assert {"harness/py.typed", "tracking/py.typed"} <= names


def test_description_has_whole_addresses_alone(wheel: Path) -> None:
    archive = zipfile.ZipFile(wheel)
    (name,) = (name for name in archive.namelist() if name.endswith("/METADATA"))
    text = archive.read(name).decode()
    links = re.findall(r"\]\(([^)\s]+)\)", re.sub(r"```.*?```", "", text, flags=re.S))
    assert len(links) > 20
    assert [link for link in links if not link.startswith(("https://", "#"))] == []
    assert any(link.endswith(".png") and "//raw." in link for link in links)
    assert "<!--" not in text


def test_installed_wheel_trains_the_project_of_init(
    environment: Environment, tmp_path: Path, root: Path
) -> None:
    where = "import harness, tracking; print(harness.__file__, tracking.__file__)"
    for file in environment.run(environment.python, "-c", where, cwd=tmp_path).split():
        assert Path(file).is_relative_to(environment.folder)
    version = environment.run("harness", "--version", cwd=tmp_path)
    assert f'version = "{version.split()[-1]}"' in (root / "pyproject.toml").read_text()

    environment.run("harness", "init", "spirals", cwd=tmp_path)
    project = tmp_path / "spirals"
    environment.run(
        "harness", "fit", "train.py:experiment", "--epochs", "2", cwd=project
    )
    listed = environment.run("harness", "runs", "list", "--json", cwd=project)
    assert '"status": "finished"' in listed
    assert environment.run("harness", "sync", cwd=project) is not None
    assert (project / "mlflow.db").exists()
