from __future__ import annotations

import json
import os

import pytest

from tracking.delivery.state import DeliveryState, StateFile, rows_behind
from tracking.errors import InvalidFileError


@pytest.fixture
def state():
    return DeliveryState(
        phase="waiting", mlflow_run_id="abc", delivered=7, flags={"infinite": {"a": 2}}
    )


def change_field(run_path, name, value):
    path = run_path / "delivery" / "state.json"
    content = json.loads(path.read_text())
    path.write_text(json.dumps({**content, name: value}))


def test_state_is_read_as_it_was_written(state, tmp_path):
    state.write(tmp_path)
    assert DeliveryState.read(tmp_path) == state


def test_bytes_of_the_file_stay_the_same(tmp_path):
    DeliveryState(error="ü", superseded=["a"]).write(tmp_path)
    assert (tmp_path / "delivery" / "state.json").read_bytes() == (
        b'{\n "phase": "connecting",\n "tracking_uri": "",\n "experiment_id": null,\n'
        b' "mlflow_run_id": null,\n "page": null,\n "delivered": -1,\n "behind": 0,\n'
        b' "error": "\xc3\xbc",\n "pid": 0,\n "updated": "",\n "flags": {},\n'
        b' "names": {},\n "superseded": [\n  "a"\n ],\n "run_path": ""\n}'
    )


def test_missing_file_is_none(tmp_path):
    assert DeliveryState.read(tmp_path) is None
    assert DeliveryState.read_or_none(tmp_path) is None


def test_unknown_field_is_ignored(state, tmp_path):
    state.write(tmp_path)
    change_field(tmp_path, "later", 1)
    assert DeliveryState.read(tmp_path) == state


@pytest.mark.parametrize(
    ("name", "value", "match"),
    [
        ("delivered", "7", "expected int in field 'delivered', got str"),
        ("phase", None, "expected str in field 'phase', got null"),
        ("superseded", {"a": 1}, "expected array in field 'superseded', got object"),
        ("names", {"k": [1]}, "expected str in field 'names"),
    ],
)
def test_wrong_type_is_one_named_error(state, tmp_path, name, value, match, caplog):
    state.write(tmp_path)
    change_field(tmp_path, name, value)
    with pytest.raises(InvalidFileError, match=match):
        DeliveryState.read(tmp_path)
    assert caplog.records == []
    assert DeliveryState.read_or_none(tmp_path) is None
    (record,) = caplog.records
    assert "state.json: expected" in record.getMessage()


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b"null", b"\xff"])
def test_damaged_file_is_one_named_error(tmp_path, content):
    (tmp_path / "delivery").mkdir()
    (tmp_path / "delivery" / "state.json").write_bytes(content)
    with pytest.raises(InvalidFileError, match=r"state\.json: expected"):
        DeliveryState.read(tmp_path)


def test_full_disk_keeps_the_old_file(state, tmp_path):
    state.write(tmp_path)
    # What is written here fails as on a full disk.
    temporary = tmp_path / "delivery" / f".{os.getpid()}-state.json"
    temporary.symlink_to("/dev/full")
    DeliveryState(phase="done").write(tmp_path)
    assert DeliveryState.read(tmp_path) == state


def test_folder_of_a_deleted_run_is_not_created(state, tmp_path):
    state.write(tmp_path / "gone")
    assert not (tmp_path / "gone").exists()


def test_state_file_counts_rows_and_is_saved_at_most_once_a_second(state, tmp_path):
    counts = iter([5, 4, 3])
    file = StateFile(tmp_path, state, count_behind=lambda: next(counts))
    file.save(at_once=True)
    file.save()
    assert DeliveryState.read(tmp_path).behind == 5
    file.set_phase("done")
    assert DeliveryState.read(tmp_path).behind == 4
    assert DeliveryState.read(tmp_path).phase == "done"


def test_rows_behind_counts_what_was_written_later(record):
    run = record()
    run.log_curve(10)
    assert rows_behind(run.path, DeliveryState()) == 20
    assert rows_behind(run.path, DeliveryState(delivered=14)) == 5
    assert rows_behind(run.path, DeliveryState(delivered=14, behind=8)) == 8
