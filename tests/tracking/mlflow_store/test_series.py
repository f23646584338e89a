"""Images, tables and histograms in a real MLflow database, as its page reads them."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import tracking
from tests.tracking.stores import get_run
from tracking.artifacts.histograms import make_histogram
from tracking.delivery.scan import JournalScan
from tracking.mlflow_store.keys import SeriesId
from tracking.mlflow_store.series import IMAGES_TAG, TABLES_TAG, open_upload
from tracking.store import get_rank_dir
from tracking.verify.mlflow import compare_with_mlflow

# As MLflow 3.17 takes the names of files apart, in MetricsReducer's imagesByRunUuid.
FILE = re.compile(r"images/([\w.\-~ ]+)\+step\+(-?\d+)\+timestamp\+(\d+)\+([^+.]+)(.*)")


def list_images(client, store, run_id):
    """Name and step of the pictures that the grid shows: full size and small one."""
    found = {}
    for item in client(store).list_artifacts(run_id, "images"):
        name, step, _, _, end = FILE.fullmatch(item.path).groups()
        found.setdefault((name.replace("~", "/"), int(step)), set()).add(end)
    return found


@pytest.fixture(scope="module")
def picture():
    return np.random.default_rng(0).random((300, 400, 3))


def test_page_shows_images_histograms_and_tables(
    record, deliver, store, client, picture, tmp_path, read_back
):
    run = record()
    run.run.log_image("valid/samples", picture, step=10)
    run.run.log_image("valid/samples", picture)
    run.run.log_histogram("grads:é", [1.0, np.nan], step=3)
    run.run.log_table("errors", {"a": [1, 2]}, step=1)
    run.run.log_table("errors", {"a": [3, 4]}, step=2)
    run.run.finish()
    made = deliver(run.path, store)
    found = get_run(client, store, made.state)
    run_id = made.state.mlflow_run_id
    images = list_images(client, store, run_id)
    both = {".png", "+compressed.webp"}
    assert images.pop(("valid/samples", 10)) == both
    assert images.pop(("valid/samples", 1)) == both
    ((name, step), ends), *more = images.items()
    assert (step, ends, more) == (3, {".png", "+compressed.png"}, [])
    assert re.fullmatch(r"grads_-\w{8}", name)
    assert found.data.tags[IMAGES_TAG] == "True"
    listed = json.loads(found.data.tags[TABLES_TAG])
    assert listed == [{"path": "tables/errors.json", "type": "table"}]
    newest = client(store).load_table(
        found.info.experiment_id, "tables/errors.json", [run_id]
    )
    assert newest["a"].tolist() == [3, 4]
    paths = [i.path for i in client(store).list_artifacts(run_id, "tables/errors")]
    assert paths == ["tables/errors/1.json", "tables/errors/2.json"]
    small = client(store).list_artifacts(run_id, "images")
    (path, *_) = [item.path for item in small if item.path.endswith(".webp")]
    file = client(store).download_artifacts(run_id, path, str(tmp_path))
    with Image.open(file) as image:
        assert image.size == (256, 192)
    past = tracking.open(run.path)
    assert compare_with_mlflow(past, read_back(past.path, store)).mismatches == []


def test_second_delivery_uploads_nothing_again(record, deliver, store, client):
    run = record()
    run.run.log_image("samples", np.eye(4), step=1)
    run.run.finish()
    made = deliver(run.path, store)
    run_id = made.state.mlflow_run_id
    before = client(store).list_artifacts(run_id, "images")
    (run.path / "artifacts" / "images").rename(run.path / "artifacts" / "gone")
    again = deliver(run.path, store)
    assert again.state.mlflow_run_id == run_id
    assert again.state.flags.get("refused") is None
    assert client(store).list_artifacts(run_id, "images") == before


def test_small_image_is_enlarged_and_pictures_of_a_table_are_uploaded(
    record, deliver, store, client, tmp_path
):
    run = record()
    run.run.log_image("samples", np.eye(28), step=1)
    run.run.log_table("errors", {"image": [np.zeros((28, 28, 3), np.uint8)]})
    run.run.finish()
    run_id = deliver(run.path, store).state.mlflow_run_id
    table = client(store).download_artifacts(run_id, "tables/errors.json")
    ((cell,),) = json.loads(Path(table).read_text())["data"]
    paths = [cell["filepath"], cell["compressed_filepath"]]
    images = client(store).list_artifacts(run_id, "images")
    paths += [item.path for item in images if item.path.endswith(".webp")]
    sizes = []
    for path in paths:
        with Image.open(client(store).download_artifacts(run_id, path)) as image:
            sizes.append(image.size)
    assert sizes == [(28, 28), (252, 252), (252, 252)]


def test_tables_that_the_caller_logged_stay_listed(record, deliver, store, client):
    run = record()
    run.run.log_table("errors", {"a": [1]})
    run.run.finish()
    made = deliver(run.path, store)
    run_id = made.state.mlflow_run_id
    client(store).log_table(run_id, {"b": [1]}, "mine.json")
    again = deliver(run.path, store)
    listed = json.loads(get_run(client, store, again.state).data.tags[TABLES_TAG])
    assert {table["path"] for table in listed} == {"tables/errors.json", "mine.json"}


def test_long_series_is_thinned_and_a_number_of_the_same_what_stays_a_metric(record):
    run = record()
    run.run.log("images", "seen", {"count": 5.0}, index=1)
    for step in range(210):
        run.run.log_histogram("grads", [float(step)], step=step)
    scan = JournalScan(get_rank_dir(run.path, 0))
    scan.read_all()
    names = [FILE.fullmatch(path).group(2) for path in scan.properties().artifacts]
    assert sorted(map(int, set(names))) == [*range(200), *range(200, 210, 2)]
    assert SeriesId("images", "seen", "count") in scan.keys.by_series


def test_tables_of_one_series_take_no_place_of_another(record):
    run = record().run
    for name, step in (("a", 5), ("a/5", 1), ("a.json", -2), ("a/-2", 1)):
        run.log_table(name, {"name": [name]}, step=step)
    run.finish()
    scan = JournalScan(get_rank_dir(run.path, 0))
    scan.read_all()
    paths = {n for n in scan.properties().artifacts if n.startswith("tables/")}
    assert len(paths) == 8  # for each table a file, and the newest of its series
    folders = {str(folder) for path in paths for folder in Path(path).parents}
    assert not paths & folders


def test_histogram_of_the_largest_numbers_is_drawn(tmp_path):
    about = make_histogram([-1.7e308, 1.7e308], 2, "test")
    uploads = {"histogram": about}
    with open_upload(tmp_path, "grads.png", uploads) as path:
        assert path.stat().st_size > 1000
