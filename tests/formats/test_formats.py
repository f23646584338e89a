"""The files of runs and checkpoints are, byte for byte, those of format 1.

``kept/`` has files that an earlier arrangement of the code wrote from ``cases.py``. A
change of a format that is meant adds files beside them, and the old ones stay readable.
"""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pytest
import torch

import harness
import tracking
from harness.checkpoint.format import verify_checkpoint
from tests.formats import cases
from tests.tracking.tables import same
from tracking.delivery.state import DeliveryState
from tracking.journal.reader import read_records
from tracking.journal.row_format import ROW_BYTES
from tracking.journal.segment import CAPACITY, read_segment
from tracking.journal.writer import Journal
from tracking.schema import FLOAT, OVERWRITE, REWIND, flatten_value
from tracking.store import Manifest, write_failure

KEPT = Path(__file__).parent / "kept"
ENVIRONMENT = ("device", "threads", "python", "torch", "numpy", "code")
"""What a checkpoint records of the machine; it may differ."""


def write_small(rank_dir):
    """Write ``cases.VALUES``, an overwrite and a rewind; the journal is left open."""
    journal = Journal(rank_dir)
    time_us = cases.TIME_US
    for what, set_, value, counts in cases.VALUES:
        leaves = flatten_value(value, "test")
        journal.write(what, set_, leaves, **counts, time_us=time_us)
        time_us += 1500
    overwrite, rewind = ("", OVERWRITE, 0.0, None), ("", REWIND, 5.0, None)
    journal.write("metrics", "train", [overwrite], index=1, time_us=time_us)
    journal.write("", "", [rewind], time_us=time_us + 1500)
    return journal


def write_many(rank_dir):
    journal = Journal(rank_dir)
    for step, (name, value) in enumerate(cases.many_rows()):
        time_us = cases.TIME_US + 1500 * step
        row = (name, FLOAT, value, None)
        journal.write("steps", "train", [row], step=step, time_us=time_us)
    return journal


# ----------------------------------------------------------------------- journals


def test_open_block_is_written_byte_for_byte(tmp_path):
    journal = write_small(tmp_path / "3")
    rows = (tmp_path / "3" / "000000.rows").read_bytes()
    text = (tmp_path / "3" / "000000.text").read_bytes()
    journal.close()
    assert len(rows) == CAPACITY * ROW_BYTES
    assert rows.rstrip(b"\0") == (KEPT / "open.rows").read_bytes()
    assert text == (KEPT / "open.text").read_bytes()


@pytest.mark.parametrize(
    ("rows_name", "text_name"),
    [("open-1", "open-1"), ("open", "open-1"), ("open", "open")],
)
def test_open_block_that_was_kept_is_read_and_recovered(rows_name, text_name, tmp_path):
    kept = tmp_path / "kept" / "3"
    kept.mkdir(parents=True)
    rows = (KEPT / f"{rows_name}.rows").read_bytes().ljust(CAPACITY * ROW_BYTES, b"\0")
    (kept / "000000.rows").write_bytes(rows)
    (kept / "000000.text").write_bytes((KEPT / f"{text_name}.text").read_bytes())
    write_small(tmp_path / "3").close()
    today = read_records(tmp_path / "3")[0]
    table, damage = read_records(kept)
    assert damage == []
    assert identical(table, today)
    Journal(kept).close()
    assert identical(read_records(kept)[0], today)


@pytest.mark.parametrize(
    ("name", "write"), [("small", write_small), ("many", write_many)]
)
def test_sealed_block_holds_the_same_rows_and_bytes(tmp_path, name, write):
    rank_dir = tmp_path / ("3" if name == "small" else "0")
    write(rank_dir).close()
    today = rank_dir / "000000.arrow"
    table, damage = read_segment(KEPT / f"{name}.arrow")
    assert damage == []
    assert identical(table, read_segment(today)[0])
    # Another version of Arrow may lay out or compress the same columns differently.
    written_by = json.loads((KEPT / "versions.json").read_text())["pyarrow"]
    if pa.__version__ == written_by:
        assert today.read_bytes() == (KEPT / f"{name}.arrow").read_bytes()


def identical(first, second):
    """Whether two tables are equal, bit for bit: NaN and -0.0 too."""
    values = [table["value"].combine_chunks() for table in (first, second)]
    numbers = [value.fill_null(0.0).to_numpy().view("<i8").tolist() for value in values]
    return (
        same(first.drop_columns(["value"]), second.drop_columns(["value"]))
        and values[0].is_null() == values[1].is_null()
        and numbers[0] == numbers[1]
    )


# --------------------------------------------------------------------- JSON files


def test_json_files_of_a_run_are_written_byte_for_byte(tmp_path):
    Manifest(**cases.MANIFEST).write(tmp_path)
    DeliveryState(**cases.DELIVERY).write(tmp_path)
    write_failure(tmp_path, ValueError("Größe"), "2026-11-22T23:59:02+00:00")
    for path in ("run.json", "delivery/state.json", "failure.json"):
        today = tmp_path / path
        assert today.read_bytes() == (KEPT / today.name).read_bytes(), path


def test_json_files_that_were_kept_are_read(tmp_path):
    assert Manifest.read(KEPT) == Manifest(**cases.MANIFEST)
    (tmp_path / "delivery").mkdir()
    earlier = {
        "run-1.json": {"path": "", "format": 1, "keys": 1},
        "run-2-without-path.json": {"path": "", "keys": 1},
        "run-2-without-keys.json": {"keys": 1},
        "run-2-without-num-fits.json": {},
    }
    for name, changes in earlier.items():
        (tmp_path / "run.json").write_bytes((KEPT / name).read_bytes())
        manifest = Manifest(**{**cases.MANIFEST, "num_fits": None, **changes})  # type: ignore[dict-item]
        assert Manifest.read(tmp_path) == manifest
    for name, path in (("state.json", "/runs/x"), ("state-without-path.json", "")):
        (tmp_path / "delivery" / "state.json").write_bytes((KEPT / name).read_bytes())
        state = DeliveryState(**{**cases.DELIVERY, "run_path": path})
        assert DeliveryState.read(tmp_path) == state


# -------------------------------------------------------------------------- a fit


@pytest.fixture(scope="module")
def fit_path(tmp_path_factory):
    """Folder of a run that recorded a fit of ``cases.Grid``."""
    folder = tmp_path_factory.mktemp("fit")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)  # no repository, whose state would be recorded
        with tracking.start(runs_dir=folder, name="grid", delivery=False) as run:
            fit_grid(callbacks=[harness.callbacks.ModelCheckpoint()], tracker=run)
    return run.path


def test_fit_logs_the_same_rows(fit_path):
    today = read_records(fit_path / "records" / "0")[0]
    kept, damage = read_segment(KEPT / "fit" / "000000.arrow")
    assert damage == []
    assert compared_rows(today) == compared_rows(kept)


def compared_rows(table):
    """Rows without their time, what was measured in seconds, and files for people to read."""
    rows = table.drop_columns(["time"]).to_pylist()
    return [row for row in rows if row["what"] not in ("profile", "artifacts")]


def test_fit_saves_the_same_checkpoint(fit_path):
    (today,) = (fit_path / "checkpoints").iterdir()
    kept = KEPT / "fit" / "checkpoint"
    assert today.name == "000002-epoch-2-batch-4-step-8"
    name = "rank-0.safetensors"
    assert (today / name).read_bytes() == (kept / name).read_bytes()
    for name in ("manifest.json", "rank-0.json"):
        texts = [(place / name).read_text() for place in (today, kept)]
        first, second = (compared_json(text) for text in texts)
        assert first == second


def compared_json(text):
    """JSON text, whose spacing is checked, without what differs from run to run."""
    content = json.loads(text)
    assert json.dumps(content) == text
    if "records" in content:
        del content["records"]["profile"], content["callbacks"]["Profile"]
    else:
        del content["run"], content["files"]["rank-0.json"]
        for name in ("Profile", "Progress"):  # times; the latter has no state
            del content["about"]["callbacks"][name]
        for name in ENVIRONMENT:
            del content["about"][name]
        content["about"].pop("kernels", None)  # earlier files have none
        content.pop("sha256", None)
    return json.dumps(content)


@pytest.mark.parametrize("name", ["checkpoint", "checkpoint-before-held-state"])
def test_checkpoint_that_was_kept_is_whole_and_resumed(name):
    assert verify_checkpoint(KEPT / "fit" / name).position.step == 8
    resume = harness.callbacks.ResumeFromCheckpoint(KEPT / "fit" / name)
    resumed, whole = (
        fit_grid(callbacks=given, epochs=3, tracker=False) for given in ([resume], [])
    )
    for name, wanted in whole.model.state_dict().items():
        assert torch.equal(resumed.model.state_dict()[name], wanted)


def fit_grid(**options):
    learner = harness.setup(cases.Grid, optimizer=torch.optim.SGD)
    return learner.set_opt_hparams(**cases.OPT).fit(
        cases.grid_data(),
        valid_data=cases.grid_data(),
        dataloader_options=cases.LOADER,
        **{**cases.FIT, **options},
    )
