"""What is documented is what there is, and what is shown runs."""

from __future__ import annotations

import ast
import doctest
import functools
import importlib
import importlib.util
import itertools
import json
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import click
import pytest

import harness
import tracking
from harness import context, events
from harness.cli import main as cli
from scripts.docsite import site
from tests.walk import FENCE, Walk, blocks_of

ROOT = Path(__file__).resolve().parent.parent
DOCS = sorted((ROOT / "docs").rglob("*.md"))
PAGES = [ROOT / "README.md", *DOCS]
LINKING = [*PAGES, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"]
PLACE = re.compile(r"`((?:harness|tracking)/[\w/]*(?:\.py|/))(?:::([\w.]+))?`")
LINK = re.compile(r"\]\(([^)#\s]*)(?:#([^)\s]*))?\)")
WALK = "<!-- walk:"


def page(name: str) -> str:
    return (ROOT / "docs" / name).read_text()


def python_of(path: Path) -> str:
    """The Python blocks of a page that run here, one after another."""
    return "\n".join(
        block.code
        for block in blocks_of(path)
        if block.language == "python"
        and block.mark in (None, "needs")
        and (not block.mark or importlib.util.find_spec(block.about))
    )


def commands(group: click.Command, *words: str) -> dict[str, click.Command]:
    """Each command under a group, by its words."""
    found = {" ".join(words): group}
    if isinstance(group, click.Group):
        for name in group.list_commands(click.Context(group)):
            command = group.get_command(click.Context(group), name)
            assert command is not None
            found |= commands(command, *words, name)
    return found


def modules_with_examples() -> list[str]:
    """Names of the modules whose docstrings show a session."""
    found = []
    for path in sorted(ROOT.glob("harness/**/*.py")) + sorted(
        ROOT.glob("tracking/**/*.py")
    ):
        if ">>> " in path.read_text():
            parts = path.relative_to(ROOT).with_suffix("").parts
            found.append(".".join(parts).removesuffix(".__init__"))
    return found


# ------------------------------------------------------------ everything is there


def test_every_event_is_documented() -> None:
    text = page("events.md")
    assert [name for name in events.EVENTS if f"| `{name}` |" not in text] == []


def test_every_context_field_and_method_has_a_row_with_a_text() -> None:
    rows = re.findall(
        r"^\| `(?:ctx\.)?(\w+)(?:\(.*\))?` \| \S", page("context.md"), re.M
    )
    names = {name for name in dir(context.Context) if not name.startswith("_")}
    assert names - set(rows) == set()


def test_every_command_says_what_it_does_and_is_documented() -> None:
    text = page("cli.md")
    found = commands(cli.main, "harness")
    assert [name for name, command in found.items() if not command.help] == []
    assert [name for name in found if f"### `{name}`\n" not in text] == []


def test_every_public_name_is_documented() -> None:
    text = "\n".join(path.read_text() for path in PAGES)
    names = [f"harness.{name}" for name in harness.__all__]
    names += [f"tracking.{name}" for name in tracking.__all__]
    assert [name for name in names if f"`{name}`" not in text] == []


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
    (tmp_path / "scripts" / "docsite").symlink_to(ROOT / "scripts" / "docsite")
    script = tmp_path / "scripts" / "docs"
    script.write_text((ROOT / "scripts" / "docs").read_text())
    check = [sys.executable, str(script), "--check"]
    done = subprocess.run(check, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stdout == "docs: events.md out of date. Run 'python scripts/docs'.\n"
    assert (tmp_path / "docs" / "events.md").read_text() == text


# ------------------------------------------------------------------- the reference


def test_every_callback_has_its_signature_and_an_example() -> None:
    for name in harness.callbacks.__all__:
        _, _, text = page("callbacks.md").partition(f"\n### `{name}`\n")
        own = re.split(r"^##", text, maxsplit=1, flags=re.MULTILINE)[0]
        assert f"<!-- generated: callback_{name} -->\n```py\n{name}(" in own, name
        example = FENCE.search(own.partition("<!-- end -->")[2])
        assert example is not None, name
        assert f"callbacks.{name}" in example["code"] or name == "Profile", name


@pytest.mark.parametrize("module", ["harness", "callbacks", "tracking"])
def test_reference_says_something_of_each_parameter(module: str) -> None:
    text = page(f"api/{module}.md")
    signatures = re.findall(
        r"^## `(\S+)`\n\n```py\n(.*?)```\n(.*?)(?=^##)", text, re.M | re.S
    )
    assert len(signatures) > 10
    for name, signature, body in signatures:
        for parameter in re.findall(r"^    \**(\w+)", signature, re.MULTILINE):
            if "**Parameters**" in body and parameter not in ("options", "kwargs"):
                assert re.search(rf"`\**{parameter}`", body), (name, parameter)


# ----------------------------------------------------------------------- the links


def test_links_lead_somewhere() -> None:
    for path, target, anchor in links():
        if "://" in target:
            continue
        file = path.parent / target if target else path
        assert file.exists(), (path, target)
        if anchor:
            assert anchor in anchors(file.resolve()), (path, f"{target}#{anchor}")


def links() -> list[tuple[Path, str, str]]:
    """Page, target and anchor of each link."""
    texts = ((path, without_code(path.read_text())) for path in LINKING)
    return [(path, *link) for path, text in texts for link in LINK.findall(text)]


def without_code(text: str) -> str:
    """A page without its blocks of code, in which nothing is a link or a heading."""
    return re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)


@functools.cache
def anchors(file: Path) -> set[str]:
    """Anchors of the headings of a page, as a code host makes them."""
    headings = re.findall(r"^#+ (.*)$", without_code(file.read_text()), re.MULTILINE)
    return {
        re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in headings
    }


def test_links_to_other_servers_are_well_formed() -> None:
    for path, target, _ in links():
        if "://" in target:
            parts = urlsplit(target)
            assert parts.scheme == "https", (path, target)
            assert re.fullmatch(r"[\w-]+(\.[\w-]+)+", parts.netloc), (path, target)
            if parts.netloc == "github.com" and "/issues" in parts.path:
                issue = r"/[\w.-]+/[\w.-]+/issues(/\d+)?"
                assert re.fullmatch(issue, parts.path), (path, target)


NAMED_TEST = re.compile(r"\[`(test_\w+)`\]\(\.\./(tests/[\w/]+\.py)\)")


@pytest.mark.parametrize("name", ["problems.md", "reliability.md"])
def test_tests_that_a_page_names_exist(name: str) -> None:
    named = NAMED_TEST.findall(page(name))
    assert len(named) > 10
    assert len(named) == page(name).count("(../tests/")
    for test, file in named:
        assert f"def {test}(" in (ROOT / file).read_text(), f"{file}::{test}"


def test_each_problem_has_a_thread_and_a_test() -> None:
    rows = [line for line in page("problems.md").splitlines() if line.startswith("| ")]
    for row in rows:
        if not row.startswith(("| problem", "| ---")):
            cells = row.strip("| ").split(" | ")
            assert re.search(r"\(https://github\.com/[^)]+/\d+\)", cells[1]), row
            assert NAMED_TEST.search(cells[2]), row


# ------------------------------------------------------------------------ the site


def test_site_has_every_page() -> None:
    config = tomllib.loads((ROOT / "docs" / "zensical.toml").read_text())

    def pages(entry: Any) -> Iterator[str]:
        if isinstance(entry, str):
            yield entry
        else:
            for inner in entry.values() if isinstance(entry, dict) else entry:
                yield from pages(inner)

    listed = list(pages(config["project"]["nav"]))
    there = {str(path.relative_to(ROOT / "docs")) for path in DOCS}
    there |= set(site.ROOT_PAGES.values())
    assert there - set(listed) == set(), "List the page in docs/zensical.toml."
    assert set(listed) - there == set()
    assert len(listed) == len(there)


@pytest.mark.parametrize(
    ("page", "place", "link", "shown"),
    [
        ("docs/data.md", "data.md", "pace.md#a", "pace.md#a"),
        ("docs/recipes/gan.md", "recipes/gan.md", "../data.md", "../data.md"),
        ("docs/data.md", "data.md", "../CHANGELOG.md", "changes.md"),
        (
            "docs/recipes/gan.md",
            "recipes/gan.md",
            "../../CONTRIBUTING.md",
            "../contributing.md",
        ),
        ("CONTRIBUTING.md", "contributing.md", "docs/data.md", "data.md"),
        (
            "CONTRIBUTING.md",
            "contributing.md",
            "LICENSE",
            f"{site.REPOSITORY}/blob/main/LICENSE",
        ),
        ("docs/data.md", "data.md", "../tests", f"{site.REPOSITORY}/tree/main/tests"),
        ("docs/data.md", "data.md", "https://a.org/b.md", "https://a.org/b.md"),
        ("docs/data.md", "data.md", "gone.md", "gone.md"),
        ("docs/data.md", "data.md", "../gone.md", "gone.md"),
        ("docs/data.md", "data.md", "#forms-of-data", "#forms-of-data"),
    ],
)
def test_link_on_the_site(page: str, place: str, link: str, shown: str) -> None:
    found = site.site_links(f"[x]({link})", ROOT / page, ROOT, Path(place))
    assert found == f"[x]({shown})"


def test_lists_and_tables_begin_behind_an_empty_line() -> None:
    """A code host does not need it, the site does."""
    for path in LINKING:
        lines = without_code(path.read_text()).splitlines()
        for before, line in itertools.pairwise(lines):
            begins = re.match(r"- |1\. |\| ", line) is not None
            inside = re.match(r"\s|- |\d+\. |\| |<!--|$", before) is not None
            assert not begins or inside, (path, line)


def test_site_is_not_built_over_other_files(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    kept = tmp_path / "thesis.md"
    kept.write_text("mine")
    assert site.build(ROOT, tmp_path) == 1
    assert "expected an empty folder or an earlier site" in capsys.readouterr().err
    assert kept.read_text() == "mine"


@pytest.mark.parametrize(
    "arguments", [["--chekc"], ["--site", "a", "b"], ["--check", "x"]]
)
def test_unknown_arguments_change_nothing(arguments: list[str]) -> None:
    run = [sys.executable, str(ROOT / "scripts" / "docs"), *arguments]
    done = subprocess.run(run, capture_output=True, text=True)
    assert done.returncode == 2
    assert "scripts/docs --check" in done.stdout


@pytest.mark.slow
def test_site_builds_and_a_broken_link_is_an_error(tmp_path: Path) -> None:
    pytest.importorskip("zensical")
    assert site.build(ROOT, tmp_path / "site") == 0
    assert (tmp_path / "site" / "index.html").exists()
    for name in site.ROOT_PAGES:
        (tmp_path / name).write_text((ROOT / name).read_text())
    docs = tmp_path / "docs"
    docs.mkdir()
    for name in ("zensical.toml", "README.md"):
        (docs / name).write_text((ROOT / "docs" / name).read_text())
    assert site.build(tmp_path, tmp_path / "broken") == 1
    assert not (tmp_path / "broken").exists()


# ---------------------------------------------------------------- everything runs


def test_code_runs_or_says_why_not() -> None:
    for path in PAGES:
        check_blocks(path)


def check_blocks(path: Path) -> None:
    is_walk = WALK in path.read_text()
    for block in blocks_of(path):
        assert block.language in ("python", "py", "pycon", "sh", "text", "diff"), path
        if block.language == "sh":
            assert is_walk or block.mark in ("not run", "run"), block.code
        if block.mark == "file":
            assert is_walk, block.code
        if block.mark == "not run":
            for named in re.findall(r"tests/[\w/.]+|[\w-]+\.md", block.about):
                base = ROOT if named.startswith("tests/") else ROOT / "docs"
                assert (base / named).exists(), block.about
        if block.language == "text":
            code = re.search(
                r"^(harness|python|pip|import|from|class|def) ", block.code, re.M
            )
            assert code is None, block.code


def command_lines(path: Path) -> Iterator[list[str]]:
    """Words after ``harness`` of each line of the shell blocks of a page."""
    for block in blocks_of(path):
        code = block.code.replace("\\\n", " ") if block.language == "sh" else ""
        for line in code.splitlines():
            words = shlex.split(re.split(r" [|;&]", line)[0], comments=True)
            for name in ("harness", "harness.cli"):
                if name in words[:6]:
                    yield words[words.index(name) + 1 :]


def test_commands_of_shell_blocks_exist() -> None:
    for words in (words for path in PAGES for words in command_lines(path)):
        command: click.Command = cli.main
        words = [word for word in words if word not in ("--debug", "--version", "...")]
        while words and isinstance(command, click.Group):
            inner = command.get_command(click.Context(command), words.pop(0))
            assert inner is not None, words
            command = inner
        settings = (
            cli.main.context_settings
        )  # click keeps the names of the first context
        context = click.Context(command, **{**settings, **command.context_settings})
        _, rest, _ = command.make_parser(context).parse_args(list(words))
        if command.name == "launch":
            fit = cli.main.get_command(click.Context(cli.main), "fit")
            assert fit is not None
            fit.make_parser(click.Context(fit, **settings)).parse_args(rest)


SHOWN = [
    path
    for path in PAGES
    if python_of(path)
    and path.parent.name != "recipes"
    and WALK not in path.read_text()
]  # tests/test_recipes.py runs the programs of the recipes


@pytest.mark.slow
@pytest.mark.parametrize("path", SHOWN, ids=lambda path: path.name)
def test_python_blocks_run(path: Path, tmp_path: Path) -> None:
    script = tmp_path / "blocks.py"
    script.write_text(python_of(path))
    run = [sys.executable, "-W", "error::DeprecationWarning:__main__", str(script)]
    done = subprocess.run(run, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
@pytest.mark.distributed
def test_first_hour_works_as_it_is_written(tmp_path: Path) -> None:
    Walk(tmp_path).follow(ROOT / "docs" / "get-started.md")
    runs = tracking.list_runs(tmp_path / "runs")
    assert {run.status for run in runs} == {"finished"}
    epochs = [
        run.records(what="metrics", set="valid")["name"].to_pylist().count("loss")
        for run in runs
    ]
    assert sorted(epochs) == [2, 5, 5, 5, 50]


@pytest.mark.parametrize("name", modules_with_examples())
def test_docstring_examples_run(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    failures, count = doctest.testmod(importlib.import_module(name))
    assert count > 0
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
