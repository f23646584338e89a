"""The README as a package index shows it: there, a relative link leads nowhere."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from hatchling.metadata.plugin.interface import MetadataHookInterface

SERVER = "https://github.com/luz-harness/luz-harness/blob/main/"
IMAGES = "https://raw.githubusercontent.com/luz-harness/luz-harness/main/"
LINK = re.compile(r"(!?)(\[[^\]]*\])\(([^)\s]+)\)")
COMMENT = re.compile(r"^<!-- .*? -->\n", re.MULTILINE)


def with_whole_addresses(text: str) -> str:
    """The text with addresses of the repository, and without comments for the tests."""

    def rewrite(match: re.Match[str]) -> str:
        image, label, target = match.groups()
        if not target.startswith(("https://", "#")):
            target = (IMAGES if image else SERVER) + target
        return f"{image}{label}({target})"

    return LINK.sub(rewrite, COMMENT.sub("", text))


class CustomMetadataHook(MetadataHookInterface):
    """Sets the field ``readme`` when hatchling builds the package."""

    def update(self, metadata: dict[str, Any]) -> None:
        """Add the description to the metadata."""
        text = (Path(self.root) / "README.md").read_text(encoding="utf-8")
        metadata["readme"] = {
            "content-type": "text/markdown",
            "text": with_whole_addresses(text),
        }
