from __future__ import annotations

from pathlib import Path

import pytest

from tracking.mlflow_store.uris import resolve_uri


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
