from __future__ import annotations

from pathlib import Path

from tracking.settings import Settings


def test_settings_come_from_the_environment():
    found = Settings.read(
        {
            "MLFLOW_TRACKING_URI": "http://u:p@host",
            "MLFLOW_EXPERIMENT_ID": "7",
            "XDG_CACHE_HOME": "/c",
            "MLFLOW_TRACKING_TOKEN": "t0k3nt0k3n",
            "SHORT_TOKEN": "abc",
        }
    )
    assert found.tracking_uri == "http://u:p@host"
    assert (found.experiment_name, found.experiment_id) == (None, "7")
    assert found.cache == Path("/c/luz-harness")
    assert found.redact("http://u:p@host t0k3nt0k3n abc") == "http://host *** abc"
