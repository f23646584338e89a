"""Addresses of MLflow's stores, as MLflow reads them."""

from __future__ import annotations

import os
import urllib.parse
from pathlib import Path


def resolve_uri(folder: Path, given: str | None) -> str:
    """Address of the store that MLflow would use in a folder.

    Parameters
    ----------
    folder
        Where training was started.
    given
        Tracking URI, such as `MLFLOW_TRACKING_URI` holds; without one MLflow's default.

    Returns
    -------
    a URI that means the same in any folder; credentials in it are kept
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
    """Whether MLflow's older store of plain files is in use there.

    MLflow (3.17, `_has_existing_mlruns_data`) then takes it as the default.
    """
    return any(path.parent.name.isdigit() for path in folder.glob("*/meta.yaml"))


def sqlite_uri(path: Path) -> str:
    """URI of a database file.

    Only what would end the path is quoted: from a wholly quoted one MLflow (3.17)
    also makes an empty folder of that quoted name.
    """
    text = str(Path(os.path.abspath(path)))  # noqa: PTH100 (keeps symbolic links)
    return "sqlite:///" + text.replace("%", "%25").replace("?", "%3F")


def sqlite_path(uri: str) -> Path | None:
    """Database file that a URI names, if it names one."""
    if not uri.startswith("sqlite:///"):
        return None
    path = uri.removeprefix("sqlite:///").partition("?")[0]
    if not path or path.startswith(":"):
        return None
    return Path(urllib.parse.unquote(path))
