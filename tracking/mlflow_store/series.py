"""Images, tables and histograms as MLflow's page shows them.

MLflow (3.17) shows files of ``images/`` whose names have a form of their own as a grid
with a slider of steps, and files that the tag ``mlflow.loggedArtifacts`` names as tables.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import json
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, Final

import numpy as np

from tracking.artifacts.files import find_artifact

SERIES: Final = ("images", "tables", "histograms")
"""``what`` of the rows of images, tables and histograms; those with a number are metrics."""

IMAGES_TAG: Final = "mlflow.loggedImages"
TABLES_TAG: Final = "mlflow.loggedArtifacts"

_THUMBNAIL: Final = 256
_MAX_NAME: Final = 100
_UNFIT: Final = re.compile(r"[^\w.\- ]+", re.ASCII)
_TAKEN: Final = re.compile(r"-?\d+|.*\.json", re.ASCII)
"""Last words of names that files of another series of tables may have."""

Uploads = dict[str, dict[str, Any]]
"""By path in MLflow: ``file``, below the run's artifacts, and what is made of it."""


def collect_uploads(
    rows: Sequence[Mapping[str, Any]],
) -> tuple[Uploads, dict[str, str]]:
    """List the files that MLflow should have of a run's images, tables and histograms.

    Parameters
    ----------
    rows
        Live rows whose ``what`` is one of `SERIES`, with ``about``, their payload.
    """
    uploads: Uploads = {}
    tables: dict[str, None] = {}
    for row in rows:
        about = row["about"]
        if row["what"] == "tables" and row["name"]:
            tables[_add_table(uploads, row, about)] = None
        elif "counts" in about or (row["what"] == "images" and row["name"]):
            _add_image(uploads, row, about)
    tags = {IMAGES_TAG: "True"} if any(n.startswith("images/") for n in uploads) else {}
    if tables:
        listed = [{"path": path, "type": "table"} for path in tables]
        tags[TABLES_TAG] = json.dumps(listed)
    return uploads, tags


def merge_tables(ours: str, theirs: str | None) -> str:
    """Return the tag that lists tables with those that the caller logged by itself."""
    try:
        found = [*json.loads(theirs or "[]")]
    except (TypeError, ValueError):
        found = []
    found += [table for table in json.loads(ours) if table not in found]
    return json.dumps(found)


@contextlib.contextmanager
def open_upload(folder: Path, name: str, about: Mapping[str, Any]) -> Iterator[Path]:
    """Yield a file that has an upload's content and the last part of its name.

    Parameters
    ----------
    about
        As ``collect_uploads`` describes it, or a plain artifact.

    Raises
    ------
    ImportError, OSError, ValueError
        If the picture cannot be made.
    """
    if not is_series_file(about):
        yield folder / name
        return
    with tempfile.TemporaryDirectory() as temporary:
        path = Path(temporary, PurePosixPath(name).name)
        if "histogram" in about:
            _draw_histogram(about["histogram"], path)
        elif path.suffix == ".webp":
            _write_thumbnail(folder / about["file"], path)
        else:
            path.symlink_to(folder / about["file"])
        yield path


def is_series_file(about: Mapping[str, Any]) -> bool:
    """Whether an upload is of an image, table or histogram."""
    return "file" in about or "histogram" in about


def _add_image(uploads: Uploads, row: Mapping[str, Any], about: dict[str, Any]) -> None:
    """Add a picture in full, and the small one that the grid shows."""
    time_ms = int(row["time"].timestamp() * 1000)
    digest = about.get("sha256") or hashlib.sha256(row["payload"].encode()).hexdigest()
    path = (
        f"images/{_fit_key(row['set'])}+step+{_get_step(row)}+timestamp+{time_ms}"
        f"+{str(digest)[:20]}"
    )
    if row["what"] == "images":
        uploads[f"{path}.png"] = _describe_source(row, about)
        uploads[f"{path}+compressed.webp"] = {"file": row["name"]}
    else:
        uploads[f"{path}.png"] = {"histogram": about}
        uploads[f"{path}+compressed.png"] = {"histogram": about}


def _add_table(uploads: Uploads, row: Mapping[str, Any], about: dict[str, Any]) -> str:
    """Add a table, its pictures, and the newest of its series; return the path of that."""
    key = _fit_key(row["set"]).replace("~", "/")
    if _TAKEN.fullmatch(PurePosixPath(key).name):
        key += f"-{hashlib.sha256(row['set'].encode()).hexdigest()[:8]}"
    newest = f"tables/{key}.json"
    for path in (f"tables/{key}/{_get_step(row)}.json", newest):
        uploads[path] = _describe_source(row, about)
    for file in about.get("images", []):
        uploads[str(file)] = {"file": str(file)}
        uploads[f"{str(file).removesuffix('.png')}.webp"] = {"file": str(file)}
    return newest


def _get_step(row: Mapping[str, Any]) -> int:
    """Step at which MLflow shows an item."""
    place = row["index"] if row["step"] is None else row["step"]
    return int(place or 0)


def _describe_source(row: Mapping[str, Any], about: dict[str, Any]) -> dict[str, Any]:
    return {"file": row["name"], "size_bytes": about.get("size_bytes")}


def _fit_key(name: str) -> str:
    """Name of a series as MLflow takes it in a file name; ``~`` stands for ``/``."""
    words = [_UNFIT.sub("_", word) for word in name.split("/")]
    key = "~".join(word for word in words if word.strip(". "))
    if key.replace("~", "/") == name and len(key) <= _MAX_NAME:
        return key
    digest = hashlib.sha256(name.encode()).hexdigest()[:8]
    return f"{key[:_MAX_NAME]}-{digest}" if key else digest


def _write_thumbnail(source: Path, path: Path) -> None:
    try:
        pillow = importlib.import_module("PIL.Image")  # comes with matplotlib
    except ImportError:  # a browser looks at the content, not at the suffix
        shutil.copyfile(source, path)
        return
    with pillow.open(source) as image:
        if (times := _THUMBNAIL // max(image.size)) > 1:
            # The page shows a small image as small as it is.
            size = tuple(times * length for length in image.size)
            image.resize(size, pillow.Resampling.NEAREST).save(path, lossless=True)
        else:
            image.thumbnail((_THUMBNAIL, _THUMBNAIL))
            image.save(path)


def _draw_histogram(about: Mapping[str, Any], path: Path) -> None:
    from matplotlib.figure import Figure  # noqa: PLC0415  takes half a second

    figure = Figure(figsize=(4.0, 3.0), layout="constrained")
    axes = figure.add_subplot()
    words = [f"{about.get('num')} values"]
    if about.get("counts"):
        edges = np.asarray(about["edges"], float)
        if np.abs(edges).max() > 1e300:  # matplotlib needs a finite range, and margins
            edges = edges / 1e10
            words.append("in 1e10")
        axes.stairs(np.asarray(about["counts"]), edges, fill=True)
    words += [f"{about[n]} {n[4:]}" for n in ("num_nan", "num_inf") if about.get(n)]
    axes.set_title(", ".join(words), fontsize=10)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=100)


def is_present(folder: Path, name: str, about: Mapping[str, Any]) -> bool:
    """Whether the run has what an upload is made from."""
    if "histogram" in about:
        return True
    return find_artifact(folder, str(about.get("file", name))) is not None
