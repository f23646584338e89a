"""Addresses of MLflow's stores and pages."""

from __future__ import annotations

import json
import os
import urllib.parse
from collections.abc import Mapping
from pathlib import Path


def resolve_uri(folder: Path, given: str | None) -> str:
    """Resolve the tracking URI that MLflow would use in a folder.

    Parameters
    ----------
    given
        Tracking URI, for example from ``MLFLOW_TRACKING_URI``; None: MLflow's default.
    """
    if not given:
        if _has_file_store(folder / "mlruns"):
            return (folder / "mlruns").resolve().as_uri()
        return sqlite_uri(folder / "mlflow.db")
    if given.startswith("sqlite:///") and not given.startswith("sqlite:////"):
        path, _, query = given.removeprefix("sqlite:///").partition("?")
        if path and not path.startswith(":"):
            uri = sqlite_uri(folder / urllib.parse.unquote(path))
            return f"{uri}?{query}" if query else uri
    if "://" not in given and not given.startswith(("file:", "databricks", "uc")):
        return (folder / given).resolve().as_uri()
    return given


def _has_file_store(folder: Path) -> bool:
    """Whether the folder holds runs of MLflow's older file store.

    MLflow (3.17, `_has_existing_mlruns_data`) then uses it as the default.
    """
    return any(path.parent.name.isdigit() for path in folder.glob("*/meta.yaml"))


def sqlite_uri(path: Path) -> str:
    """URI of a database file.

    Only characters that would end the path are quoted: if all are, MLflow (3.17) also
    creates an empty folder with the quoted name.
    """
    text = str(Path(os.path.abspath(path)))  # noqa: PTH100 (keeps symbolic links)
    return "sqlite:///" + text.replace("%", "%25").replace("?", "%3F")


def sqlite_path(uri: str) -> Path | None:
    """Database file of a URI; None if the URI is of another kind."""
    if not uri.startswith("sqlite:///"):
        return None
    path = uri.removeprefix("sqlite:///").partition("?")[0]
    if not path or path.startswith(":"):
        return None
    return Path(urllib.parse.unquote(path))


def local_path(uri: str) -> Path | None:
    """Database file or folder of a store on this machine; None for a server."""
    if uri.startswith("file:"):
        return Path(urllib.parse.unquote(urllib.parse.urlsplit(uri).path))
    return sqlite_path(uri)


def relocate(uri: str, old: Path, new: Path) -> str:
    """Address of a store that was moved or copied together with a folder.

    Parameters
    ----------
    old, new
        The folder before and now, absolute.

    Returns
    -------
    the address of the store at the same place relative to the folder, if there is one;
    else ``uri``
    """
    path = local_path(uri)
    if path is None or old == new:
        return uri
    moved = Path(os.path.normpath(new / os.path.relpath(path, old)))
    if uri.startswith("file:"):
        return moved.as_uri() if moved.is_dir() else uri
    query = uri.partition("?")[2]
    return (
        sqlite_uri(moved) + (f"?{query}" if query else "") if moved.is_file() else uri
    )


def page_url(
    server: str, experiment_id: str, runs: Mapping[str, str] | None = None
) -> str:
    """Address of an experiment's charts, or of the page of runs, in MLflow's UI.

    Parameters
    ----------
    runs
        Experiment of each run of MLflow: several are shown side by side. None: no run.

    Notes
    -----
    Without ``workflowType`` the UI (3.17) opens in its view for language models.
    """
    root = f"{server.rstrip('/')}/#"
    base = f"{root}/experiments/{experiment_id}/runs"
    if not runs:
        return f"{base}?workflowType=machine_learning&compareRunsMode=CHART"
    if len(runs) > 1:
        given = {"runs": [*runs], "experiments": sorted({*runs.values()})}
        texts = {name: json.dumps(ids) for name, ids in given.items()}
        query = urllib.parse.urlencode(texts, quote_via=urllib.parse.quote)
        return f"{root}/compare-runs?{query}&workflowType=machine_learning"
    run_id = next(iter(runs))
    return f"{base}/{run_id}/model-metrics?workflowType=machine_learning"
