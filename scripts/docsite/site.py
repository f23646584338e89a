"""Build the site of docs/, with strict checks of its links and anchors."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

REPOSITORY = "https://github.com/luz-harness/luz-harness"
#: Pages of the repository's root that the site has too, by their name there.
ROOT_PAGES = {"CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changes.md"}
LINK = re.compile(r"(\]\()([^)#\s]+)((?:#[^)\s]*)?\))")


def site_links(text: str, page: Path, root: Path, place: Path) -> str:
    """The text with its links as they are on the site.

    Parameters
    ----------
    text
        Markdown of ``page``.
    page
        The file, whose links are relative to it.
    root
        The repository.
    place
        Where the page stands on the site, relative to its top.
    """

    def rewrite(match: re.Match[str]) -> str:
        before, target, after = match.groups()
        if "://" in target or target.startswith("mailto:"):
            return match.group()
        return f"{before}{site_target(page.parent / target, root, place)}{after}"

    return LINK.sub(rewrite, text)


def site_target(file: Path, root: Path, place: Path) -> str:
    """The address of a file of the repository, for a page at ``place``."""
    name = os.path.relpath(file, root)
    inside = ROOT_PAGES.get(name) or name.removeprefix("docs/")
    # What is not there stays a link of the site, which is then refused.
    if name in ROOT_PAGES or name.startswith("docs/") or not file.exists():
        return os.path.relpath(inside, place.parent)
    kind = "tree" if file.is_dir() else "blob"
    return f"{REPOSITORY}/{kind}/main/{name}"


def stage(root: Path, folder: Path) -> None:
    """Lay the pages out as the site has them; the repository is not changed."""
    shutil.copytree(root / "docs", folder / "docs")
    (folder / "docs" / "zensical.toml").rename(folder / "zensical.toml")
    pages = {page.relative_to(root / "docs"): page for page in find_pages(root)}
    pages |= {Path(name): root / source for source, name in ROOT_PAGES.items()}
    for place, page in pages.items():
        text = site_links(page.read_text(), page, root, place)
        (folder / "docs" / place).write_text(text)


def find_pages(root: Path) -> list[Path]:
    """The pages of docs/."""
    return sorted((root / "docs").rglob("*.md"))


def build(root: Path, output: Path) -> int:
    """Build the site into ``output``, in place of an earlier one; returns the exit code."""
    problem = find_problem(output)
    if problem:
        print(f"docs: {problem}", file=sys.stderr)
        return 1
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        stage(root, folder)
        command = [sys.executable, "-m", "zensical", "build", "--strict"]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
        if done.returncode:
            print(done.stdout + done.stderr, end="", file=sys.stderr)
            return 1
        if output.exists():
            shutil.rmtree(output)  # an earlier site, or empty: see `find_problem`
        output.parent.mkdir(parents=True, exist_ok=True)
        shutil.move(folder / "site", output)
    print(f"docs: {output}/index.html")
    return 0


def find_problem(output: Path) -> str | None:
    """Why the site cannot be built into ``output``; None: nothing is in the way."""
    is_site = (output / "sitemap.xml").exists() and (output / "search.json").exists()
    if output.exists() and not is_site and (output.is_file() or any(output.iterdir())):
        return f"expected an empty folder or an earlier site, got {str(output)!r}."
    if importlib.util.find_spec("zensical") is None:
        return (
            "expected the package zensical, got none. Run \"pip install -e '.[docs]'\"."
        )
    return None
