from __future__ import annotations

from pathlib import Path

import pytest

from tracking.mlflow_store.uris import local_path, relocate, resolve_uri


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        (None, "sqlite:////w/a b/mlflow.db"),
        ("sqlite:///x.db", "sqlite:////w/a b/x.db"),
        ("sqlite:///x.db?timeout=5", "sqlite:////w/a b/x.db?timeout=5"),
        ("sqlite:////abs/x.db", "sqlite:////abs/x.db"),
        ("http://host:5000", "http://host:5000"),
        ("postgresql://u:p@h/db", "postgresql://u:p@h/db"),
        ("databricks", "databricks"),
        ("mlruns", "file:///w/a%20b/mlruns"),
    ],
)
def test_uri_is_resolved_as_mlflow_does(given, wanted):
    assert resolve_uri(Path("/w/a b"), given) == wanted


def test_file_store_in_use_is_the_default(tmp_path):
    (tmp_path / "mlruns" / "0").mkdir(parents=True)
    (tmp_path / "mlruns" / "0" / "meta.yaml").touch()
    assert resolve_uri(tmp_path, None) == (tmp_path / "mlruns").as_uri()


@pytest.mark.parametrize(
    ("uri", "path"),
    [
        ("sqlite:////a/mlflow.db", "/a/mlflow.db"),
        ("file:///a%20b/mlruns", "/a b/mlruns"),
        ("file:/a/mlruns", "/a/mlruns"),
        ("http://host", None),
        ("postgresql://h/db", None),
    ],
)
def test_local_path_of_a_store(uri, path):
    assert local_path(uri) == (path and Path(path))


def test_store_is_found_where_the_project_was_moved_to(tmp_path):
    old, new = tmp_path / "old" / "runs" / "r", tmp_path / "a" / "b %c" / "runs" / "r"
    database = new.parents[1] / "mlflow.db"
    uri = f"sqlite:///{tmp_path}/old/mlflow.db?timeout=5"
    assert relocate(uri, old, new) == uri  # there is none
    database.parent.mkdir(parents=True)
    database.touch()
    found = relocate(uri, old, new)
    assert local_path(found) == database
    assert found.endswith("?timeout=5")
    assert relocate(uri, old, old) == uri
    folder = (tmp_path / "old" / "mlruns").as_uri()
    assert relocate(folder, old, new) == folder
    (new.parents[1] / "mlruns").mkdir()
    assert relocate(folder, old, new) == (new.parents[1] / "mlruns").as_uri()
    assert relocate("http://host", old, new) == "http://host"
