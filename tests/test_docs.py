"""What is documented is what there is, and what is shown runs."""

from __future__ import annotations

import ast
import doctest
import importlib
import json
import pkgutil
import re
import subprocess
import sys
from pathlib import Path

import click
import pytest

import harness
import tracking
from harness import context, events
from harness.cli import main as cli

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
FENCE = re.compile(r"^```(\w+)[^\n]*\n(.*?)^```", re.MULTILINE | re.DOTALL)
PLACE = re.compile(r"`((?:harness|tracking)/[\w/]*(?:\.py|/))(?:::([\w.]+))?`")
LINK = re.compile(r"\]\(([^)#\s]+)(?:#[^)]*)?\)")


def page(name: str) -> str:
    return (ROOT / "docs" / name).read_text()


def python_of(path: Path) -> str:
    """The Python blocks of a page, one after another."""
    blocks = FENCE.findall(path.read_text())
    return "\n".join(code for language, code in blocks if language == "python")


def commands(group: click.Command, *words: str) -> list[str]:
    """Each command under a group, in words."""
    found = [" ".join(words)]
    if isinstance(group, click.Group):
        for name in group.list_commands(click.Context(group)):
            command = group.get_command(click.Context(group), name)
            assert command is not None
            found += commands(command, *words, name)
    return found


def modules() -> list[str]:
    """Every module of both packages."""
    found = ["harness", "tracking"]
    for package in (harness, tracking):
        prefix = f"{package.__name__}."
        found += [info.name for info in pkgutil.walk_packages(package.__path__, prefix)]
    return [name for name in found if not name.endswith("__main__")]


# ------------------------------------------------------------ everything is there


@pytest.mark.parametrize("event", events.EVENTS)
def test_event_is_documented(event: str) -> None:
    assert f"| `{event}` |" in page("events.md")


@pytest.mark.parametrize(
    "field", [name for name in dir(context.Context) if not name.startswith("_")]
)
def test_context_field_or_method_is_documented(field: str) -> None:
    row = re.search(rf"^\| `(ctx\.)?{field}(\(.*\))?` \| \S", page("context.md"), re.M)
    assert row, f"no row with a text for {field}"


@pytest.mark.parametrize("command", commands(cli.main, "harness"))
def test_command_is_documented(command: str) -> None:
    assert f"### `{command}`\n" in page("cli.md")


@pytest.mark.parametrize("command", commands(cli.main, "harness"))
def test_command_says_what_it_does(command: str) -> None:
    found: click.Command = cli.main
    for word in command.split()[1:]:
        assert isinstance(found, click.Group)
        inner = found.get_command(click.Context(found), word)
        assert inner is not None
        found = inner
    assert found.help


@pytest.mark.parametrize(
    "name",
    [
        *(f"harness.{name}" for name in harness.__all__),
        *(f"tracking.{name}" for name in tracking.__all__),
    ],
)
def test_public_name_is_documented(name: str) -> None:
    text = "\n".join(path.read_text() for path in PAGES)
    assert re.search(rf"`{re.escape(name)}`|## `{re.escape(name)}`", text)


def defined_names(path: Path) -> set[str]:
    """Classes, functions and methods of a module, such as `Run` and `Run.log`."""
    found = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef):
            found.add(node.name)
            inner = node.body if isinstance(node, ast.ClassDef) else []
            methods = [item for item in inner if isinstance(item, ast.FunctionDef)]
            found |= {f"{node.name}.{method.name}" for method in methods}
    return found


def test_architecture_names_what_exists() -> None:
    mentioned = PLACE.findall(page("architecture.md"))
    assert len(mentioned) > 30
    missing = [
        f"{path}::{name}"
        for path, name in mentioned
        if not (ROOT / path).exists()
        or (name and name not in defined_names(ROOT / path))
    ]
    assert missing == []


def test_stale_block_is_named(tmp_path: Path) -> None:
    for name in ("docs", "scripts", "harness", "tracking"):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / "docs").unlink()
    (tmp_path / "docs").mkdir()
    text = "<!-- generated: fit_events -->\nold\n<!-- end -->\n"
    (tmp_path / "docs" / "events.md").write_text(text)
    (tmp_path / "scripts").unlink()
    (tmp_path / "scripts").mkdir()
    script = tmp_path / "scripts" / "docs"
    script.write_text((ROOT / "scripts" / "docs").read_text())
    check = [sys.executable, str(script), "--check"]
    done = subprocess.run(check, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stdout == "docs: events.md out of date. Run 'python scripts/docs'.\n"
    assert (tmp_path / "docs" / "events.md").read_text() == text


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_links_lead_somewhere(path: Path) -> None:
    for target in LINK.findall(path.read_text()):
        if not target.startswith(("https://", "http://")):
            assert (path.parent / target).exists(), target


# ---------------------------------------------------------------- everything runs


SHOWN = [
    path for path in PAGES if python_of(path) and path.parent.name != "recipes"
]  # tests/test_recipes.py runs the programs of the recipes


@pytest.mark.slow
@pytest.mark.parametrize("path", SHOWN, ids=lambda path: path.name)
def test_python_blocks_run(path: Path, tmp_path: Path) -> None:
    script = tmp_path / "blocks.py"
    script.write_text(python_of(path))
    run = [sys.executable, "-W", "error::DeprecationWarning:__main__", str(script)]
    done = subprocess.run(run, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", modules())
def test_docstring_examples_run(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    failures, _ = doctest.testmod(importlib.import_module(name))
    assert failures == 0


@pytest.mark.parametrize("words", [["--help"], ["fit", "--help"], ["runs", "--help"]])
def test_help_imports_nothing_heavy(words: list[str]) -> None:
    program = f"""
import json, sys
from harness.cli.main import main
try:
    main({words!r})
finally:
    heavy = ("torch", "mlflow", "pyarrow", "pandas", "numpy", "deepspeed", "matplotlib")
    print(json.dumps(sorted(set(sys.modules) & set(heavy))))
"""
    run = [sys.executable, "-c", program]
    done = subprocess.run(run, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout.splitlines()[-1]) == []
