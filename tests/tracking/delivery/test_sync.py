from __future__ import annotations

from tracking.api import start
from tracking.delivery.state import DeliveryState
from tracking.delivery.sync import sync
from tracking.read import PastRun


def test_sync_of_a_moved_project_names_the_old_store_and_makes_nothing(
    tmp_path, monkeypatch
):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    with start(runs_dir=tmp_path / "runs", delivery=False) as run:
        run.log_metric("loss", 1.0)
    old = tmp_path / "old" / "mlflow.db"
    (run.path / "delivery").mkdir(exist_ok=True)
    DeliveryState(tracking_uri=f"sqlite:///{old}").write(run.path)
    (result,) = sync([PastRun(run.path)])
    assert result.phase == "gave up"
    assert result.error is not None
    assert str(old) in result.error
    assert not old.parent.exists()
