from __future__ import annotations

import argparse
import copy
import dataclasses
import decimal
import enum
import inspect
import json
import os
import pickle
import resource
import signal
import subprocess
import sys
import threading
import time
import types
import warnings
from datetime import datetime
from pathlib import Path

import numpy as np
import pytest
import torch

import tracking
from tracking import row_logger, schema
from tracking.api import start
from tracking.delivery.state import DeliveryState
from tracking.delivery.waiting import _report_unsent
from tracking.errors import (
    DeliveryError,
    RunBusyError,
    RunClosedError,
    RunNotFoundError,
    TrackingWarning,
    warn,
)
from tracking.journal.reader import JournalReader
from tracking.journal.segment import CAPACITY
from tracking.read import PastRun
from tracking.run import Run
from tracking.store import Manifest, get_rank_dir


@pytest.fixture
def runs(tmp_path):
    return tmp_path / "runs"


@pytest.fixture
def run(tmp_path):
    """A run without all that is about its start."""
    run = Run(tmp_path / "a-run", None)
    yield run
    run.finish()


def logged(run, *columns, **having):
    table = PastRun(run.path).records(**having)
    return [tuple(row[c] for c in columns) for row in table.to_pylist()]


def run_script(script, *args, cwd, **options):
    return subprocess.run(
        [sys.executable, "-c", script, *map(str, args)],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        **options,
    )


# --------------------------------------------------------------------------- logging


def test_log_writes_what_set_name_and_counts(run):
    run.log("metrics", "train", {"loss": 0.5}, index=3, epoch=3, step=70)
    run.log("metrics", "train", {"loss": 0.25}, 4, epoch=4, step=80)  # the fast way
    columns = ("what", "set", "name", "index", "epoch", "step", "value", "kind")
    assert logged(run, *columns) == [
        ("metrics", "train", "loss", 3, 3, 70, 0.5, "float"),
        ("metrics", "train", "loss", 4, 4, 80, 0.25, "float"),
    ]


def test_log_without_index_takes_the_next_of_its_what_and_set(run):
    for _ in range(2):
        run.log("metrics", "train", {"loss": 0.5, "text": "x"})
        run.log("metrics", "valid", 0.5)
    run.log("metrics", "valid", 0.5, index=7)
    run.log("metrics", "valid", 0.5)
    run.log("metrics", "valid", 0.5, index=2)
    run.log("metrics", "valid", 0.5)
    assert logged(run, "index", set="train") == [(1,), (1,), (2,), (2,)]
    assert logged(run, "index", set="valid") == [(1,), (2,), (7,), (8,), (2,), (9,)]


def test_log_with_step_alone_has_no_index(run):
    for step in (1, 2):
        run.log("metrics", "train", {"loss": 0.5, "n": 1}, step=step)
        run.log_step({"loss": 0.5}, step, epoch=1)
    found = logged(run, "what", "name", "index", "epoch", "step")
    assert found[:3] == [
        ("metrics", "loss", None, None, 1),
        ("metrics", "n", None, None, 1),
        ("steps", "loss", None, 1, 1),
    ]
    assert found[3:] == [(*row[:4], 2) for row in found[:3]]


def test_log_metric_and_log_step_are_of_training_by_default(run):
    run.log_metric("acc", 0.5)
    run.log_step({"loss": 0.5}, step=1)
    run.log_step({"loss": 0.25}, step=2, set="valid")
    assert logged(run, "what", "set", "name") == [
        ("metrics", "train", "acc"),
        ("steps", "train", "loss"),
        ("steps", "valid", "loss"),
    ]


def test_log_metric_is_log_of_one_name(run):
    for value in (0.5, 0.25, 1, "x"):
        run.log_metric("acc", value, set="valid")
    assert logged(run, "what", "set", "name", "index") == [
        ("metrics", "valid", "acc", index) for index in (1, 2, 3, 4)
    ]


def test_log_time_is_that_of_the_call(run):
    before = time.time()
    run.log("metrics", "train", 0.5)
    run.log("metrics", "train", 0.5)
    after = time.time()
    times = [row[0].timestamp() for row in logged(run, "time")]
    assert before - 1e-5 <= times[0] <= times[1] <= after


def test_log_refused_value_writes_nothing_of_it(run):
    with pytest.raises(
        TypeError, match=r"Run\.log\('metrics', 'train'\).*value\['b'\]"
    ):
        run.log("metrics", "train", {"a": 1.0, "b": object()})
    with pytest.raises(ValueError, match="valid Unicode"):
        run.log("metrics", "train", {"a": 1.0, "\ud800": 2.0})
    assert logged(run, "name") == []


@pytest.mark.parametrize(
    ("argument", "error", "match"),
    [
        ({"what": 1}, TypeError, "expected a string as what, got 1"),
        ({"set": ["x"]}, TypeError, r"expected a string as set, got \['x'\]"),
        ({"set": "\ud800"}, ValueError, "expected valid Unicode as set"),
        ({"index": "1"}, TypeError, "expected an integer or None as index, got '1'"),
        ({"index": 1.0}, TypeError, "expected an integer or None as index, got 1.0"),
        ({"index": 2**63}, ValueError, "expected index up to 9223372036854775807"),
        ({"epoch": 0.5}, TypeError, "expected an integer or None as epoch"),
        ({"epoch": 2**31}, ValueError, "expected epoch up to 2147483647"),
        ({"step": "x"}, TypeError, "expected an integer or None as step"),
        ({"step": -(2**63) - 1}, ValueError, "expected step up to"),
    ],
)
def test_log_refused_argument_writes_nothing(run, argument, error, match):
    for count, value in enumerate([0.5, {"a": 0.5}, 1]):
        run.log("metrics", "train", value)
        with pytest.raises(error, match=rf"Run\.log\(.*\): {match}"):
            run.log(**{"what": "metrics", "set": "train", "value": value, **argument})
        run.log("metrics", "train", value, step=5)
        assert len(logged(run, "name")) == 2 * (count + 1)


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda run: run.log({"loss": 1}), r"Run\.log: .* got only \{'loss': 1\}\."),
        (lambda run: run.log("loss", 1.0, step=3), r"got only 'loss', 1\.0\."),
        (lambda run: run.log_metric({"loss": 1}), "expected name and value, got only"),
        (
            lambda run: run.log_metric("loss"),
            r"Write .* log_metric\('loss', 0\.3, set=",
        ),
    ],
)
def test_log_call_in_the_form_of_another_library_shows_the_right_one(run, call, match):
    with pytest.raises(TypeError, match=match):
        call(run)
    assert logged(run, "name") == []
    assert list(inspect.signature(run.log).parameters)[:3] == ["what", "set", "value"]


def test_log_metric_takes_the_step_in_third_place_as_mlflow(run):
    run.log_metric("loss", 0.5, 7)
    run.log_metric("loss", 0.25, 8)  # whose name is known by now
    assert logged(run, "step", "index", "value") == [(7, None, 0.5), (8, None, 0.25)]
    with pytest.raises(TypeError, match="integer or None as step, got 'valid'"):
        run.log_metric("loss", 0.5, "valid")


def test_log_refused_argument_holds_up_no_reader(run):
    run.log("m", "s", 0.5)
    with pytest.raises(TypeError, match="as step"):
        run.log("m", "s", 0.5, step="x")
    run.log("m", "s", 0.25)
    found = JournalReader(get_rank_dir(run.path, 0)).read()
    assert found["value"].to_pylist() == [0.5, 0.25]


def test_log_counts_of_numpy_are_integers(run):
    import numpy as np  # noqa: PLC0415

    for value in (0.5, 0.5, 1):
        run.log("m", "s", value, np.int64(3), epoch=np.int32(2), step=np.uint8(1))
    assert logged(run, "index", "epoch", "step") == [(3, 2, 1)] * 3


def test_log_from_a_handler_in_the_middle_of_log_is_no_different(run):
    count = 0

    def handler(*_):
        nonlocal count
        count += 1
        run.log("handler", "s", {"float": 0.5, "text": "x", "new" + str(count): 1.0})

    before = signal.signal(signal.SIGALRM, handler)
    signal.setitimer(signal.ITIMER_REAL, 0.001, 0.001)
    try:
        for i in range(5000):
            run.log("main", "s", {"a": float(i), "text": "y"}, index=i)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert count > 3
    assert len(logged(run, "seq", what="handler")) == 3 * count
    found = [value for (value,) in logged(run, "value", what="main", name="a")]
    assert found == list(range(5000))


# -------------------------------------------------------------------------- tensors


def test_log_tensor_is_copied_at_once_and_read_later(run):
    import torch  # noqa: PLC0415

    loss = torch.tensor(1.0, requires_grad=True)
    run.log("metrics", "train", {"loss": loss, "list": [loss], "plain": 1.0}, index=1)
    with torch.no_grad():
        loss.add_(5)
    run.flush()
    assert sorted(logged(run, "name", "value", "payload")) == [
        ("list", None, "[1.0]"),
        ("loss", 1.0, None),
        ("plain", 1.0, None),
    ]
    assert len({row[0] for row in logged(run, "time")}) == 1


def test_log_tensor_never_reads_a_scalar_in_the_caller(run):
    import torch  # noqa: PLC0415
    from torch.utils._python_dispatch import TorchDispatchMode  # noqa: PLC0415

    class Recorded(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            called.append(str(func))
            return func(*args, **(kwargs or {}))

    called: list[str] = []
    loss = torch.tensor(0.5)
    with Recorded():
        for index in range(1, 50):
            run.log("metrics", "train", {"loss": loss, "vector": loss.expand(3)}, index)
            run.log("metrics", "valid", loss)
            run.log_metric("loss", loss, set="valid")
    assert called
    assert not [name for name in called if "_local_scalar" in name or "item" in name]
    with Recorded():
        called.clear()
        loss.item()
    assert any("_local_scalar_dense" in name for name in called)  # it would be seen


def test_log_tensor_is_durable_within_a_second_by_itself(run, until):
    import torch  # noqa: PLC0415

    run.log("metrics", "train", torch.tensor(2.0))
    until(lambda: logged(run, "value"), timeout_s=10)
    assert logged(run, "value", "index") == [(2.0, 1)]


def test_log_tensor_is_superseded_by_a_later_overwrite(run):
    import torch  # noqa: PLC0415

    run.log("metrics", "train", torch.tensor(1.0), index=1)
    run.log("metrics", "train", torch.tensor(2.0), index=1, append=False)
    run.flush()
    assert logged(run, "value") == [(2.0,)]


def test_log_tensor_that_cannot_be_read_is_named_in_a_warning(run):
    class Broken:
        ndim = 1
        dtype = device = None

        def detach(self):
            return self

        clone = detach

        def numel(self):
            return 1

        def is_complex(self):
            return False

        def tolist(self):
            raise RuntimeError("CUDA error: device-side assert triggered")

    run.log("metrics", "train", {"loss": Broken()})
    with pytest.warns(
        TrackingWarning, match=r"got CUDA error.*Lost: metrics/train/loss"
    ):
        run.flush()


# --------------------------------------------------------- params, tags, inputs, files


def test_log_params_tags_and_inputs_are_rows(run):
    run.log_params({"lr": 0.1, "net": {"act": "relu", "sizes": (1, 2)}})
    run.set_tags({"stage": "x"})
    run.log_input("digits", "train", num_samples=10)
    run.log_params({})
    assert logged(run, "what", "set", "name", "index", "value", "payload") == [
        ("params", "", "lr", None, 0.1, None),
        ("params", "", "net/act", None, None, '"relu"'),
        ("params", "", "net/sizes", None, None, "[1,2]"),
        ("tags", "", "stage", None, None, '"x"'),
        *[
            ("inputs", "", "train", None, None, payload)
            for payload in ['[{"name":"digits","num_samples":10}]']
        ],
    ]


def test_log_params_that_are_no_dictionary_are_refused(run):
    with pytest.raises(
        TypeError, match=r"Run\.log_params: expected a dictionary, got 3"
    ):
        run.log_params(3)
    with pytest.raises(
        TypeError, match=r"Run\.set_tags: expected a dictionary, got 'a'"
    ):
        run.set_tags("a")


def test_log_artifact_copies_a_file_or_a_folder(run, tmp_path):
    (tmp_path / "x.txt").write_text("hello")
    (tmp_path / "folder" / "deep").mkdir(parents=True)
    (tmp_path / "folder" / "deep" / "y.txt").write_text("")
    run.log_artifact(tmp_path / "x.txt")
    run.log_artifact(str(tmp_path / "x.txt"), "other/z.txt")
    run.log_artifact(tmp_path / "folder")
    names = [name for (name,) in logged(run, "name", what="artifacts")]
    assert names == ["x.txt", "other/z.txt", "folder/deep/y.txt"]
    assert (run.path / "artifacts" / "other" / "z.txt").read_text() == "hello"
    (described,) = json.loads(logged(run, "payload", name="x.txt")[0][0])
    assert described["size_bytes"] == 5
    assert described["sha256"].startswith("2cf24dba5fb0")
    kept = [path for path in (run.path / "artifacts").rglob("*") if path.is_file()]
    assert len(kept) == 3


@pytest.mark.parametrize("name", ["../x", "/etc/x", "a/../../x", "a\0b"])
def test_log_artifact_name_that_leads_out_is_refused(run, tmp_path, name):
    (tmp_path / "x.txt").write_text("")
    with pytest.raises(ValueError, match="expected a relative name without"):
        run.log_artifact(tmp_path / "x.txt", name)
    with pytest.raises(ValueError, match="expected a relative name without"):
        run.log_text("", name)


@pytest.mark.parametrize(
    ("name", "kind", "got"), [(3, TypeError, "3"), ("\ud800", ValueError, r"'\\ud800'")]
)
def test_artifact_name_that_is_no_text_is_refused(run, tmp_path, name, kind, got):
    with pytest.raises(kind, match=rf"Run\.log_text: expected .* as name, got {got}"):
        run.log_text("x", name)
    with pytest.raises(kind, match=rf"Run\.log_figure: expected .* name, got {got}"):
        run.log_figure(None, name)


def test_step_without_a_number_or_values_without_names_are_refused(run):
    for values, step in (({"loss": 0.5}, None), (0.5, 3)):
        with pytest.raises(
            TypeError, match=r"Run\.log_step: expected values by name and"
        ):
            run.log_step(values, step)
    with pytest.raises(TypeError, match="expected a string as name, got 3"):
        run.log_input(3, "train")
    assert logged(run, "name") == []


def test_manifest_takes_no_value_that_it_cannot_write(tmp_path):
    run = start(runs_dir=tmp_path, delivery=False)
    with pytest.raises(
        TypeError, match=r"save_manifest: expected JSON values, got {'x'"
    ):
        run.save_manifest(x=object())
    run.finish()
    assert Manifest.read(run.path).status == "finished"


def test_artifact_that_is_a_pipe_or_a_device_is_refused(run):
    with pytest.raises(FileNotFoundError, match="'/dev/null', a pipe or a device"):
        run.log_artifact("/dev/null")


def test_artifact_with_a_name_that_is_taken_by_a_folder_asks_for_another(run):
    run.log_text("x", "a/b.txt")
    with pytest.warns(TrackingWarning, match="without it; use another name"):
        run.log_text("x", "a")


def test_log_text_of_something_else_is_refused(run):
    with pytest.raises(
        TypeError, match=r"Run\.log_text\('a'\): expected a text, got b'x'"
    ):
        run.log_text(b"x", "a")


def test_log_artifact_that_is_not_there_is_refused(run, tmp_path):
    with pytest.raises(
        FileNotFoundError, match=r"expected a file or folder, got '.*no'"
    ):
        run.log_artifact(tmp_path / "no")


def test_log_artifact_on_a_failing_disk_is_a_warning(run, tmp_path):
    (tmp_path / "x.txt").write_text("")
    (run.path / "artifacts").write_text("in the way")
    with pytest.warns(TrackingWarning, match=r"expected to write artifacts/x\.txt"):
        run.log_artifact(tmp_path / "x.txt")
    assert logged(run, "name") == []


def test_log_figure_saves_by_what_the_figure_can(run):
    import matplotlib as mpl  # noqa: PLC0415

    mpl.use("Agg")
    from matplotlib.figure import Figure  # noqa: PLC0415

    figure = Figure()
    figure.subplots().plot([1, 2])
    run.log_figure(figure, "plots/curves.png")
    data = (run.path / "artifacts" / "plots" / "curves.png").read_bytes()
    assert data.startswith(b"\x89PNG")

    class Plotly:
        def write_html(self, path):
            Path(path).write_text("<html>")

    run.log_figure(Plotly(), "page.html")
    assert (run.path / "artifacts" / "page.html").read_text() == "<html>"
    with pytest.raises(TypeError, match=r"Run\.log_figure: expected a figure"):
        run.log_figure(object(), "x.png")
    assert sorted(p.name for p in (run.path / "artifacts").iterdir()) == [
        "page.html",
        "plots",
    ]


# ----------------------------------------------------------------- position, history


def test_position_is_that_of_the_last_row(run):
    import torch  # noqa: PLC0415

    assert run.position() == -1
    run.log("metrics", "train", {"a": 1.0, "b": 2.0})
    assert run.position() == 1
    run.log("metrics", "train", torch.tensor(1.0))
    assert run.position() == 2
    run.finish()
    assert run.position() == 2


def test_rewind_supersedes_and_lets_the_index_go_back(run):
    run.log("metrics", "train", 1.0)
    here = run.position()
    run.log("metrics", "train", 2.0)
    run.rewind(here)
    run.log("metrics", "train", 3.0)
    assert logged(run, "index", "value") == [(1, 1.0), (2, 3.0)]
    run.rewind(-1)
    run.log("metrics", "train", 4.0)
    assert logged(run, "index", "value") == [(1, 4.0)]


@pytest.mark.parametrize("seq", [-2, 5])
def test_rewind_to_where_nothing_is_is_refused(run, seq):
    run.log("metrics", "train", 1.0)
    with pytest.raises(
        ValueError, match=f"expected a position from -1 to 0, got {seq}"
    ):
        run.rewind(seq)


# ---------------------------------------------------------------- start and going on


def test_start_records_what_it_ran_on(runs, monkeypatch):
    monkeypatch.setattr("tracking.run._CAPTURE_WAIT_S", 60.0)  # a slow machine
    run = start(
        experiment="digits",
        params={"lr": 0.1},
        tags={"a": "b"},
        note="*why*",
        runs_dir=runs,
        delivery=False,
    )
    manifest = Manifest.read(run.path)
    assert manifest.status == run.status == "running"
    assert manifest.id == run.id == run.path.name
    assert manifest.name == run.name
    assert manifest.experiment == "digits"
    assert manifest.note == "*why*"
    assert manifest.pid == os.getpid()
    assert manifest.command[0] == sys.orig_argv[0]
    assert datetime.fromisoformat(manifest.created).tzinfo
    assert manifest.deliver is False
    assert manifest.mlflow == {}
    run.save_manifest(seed=7)
    run.finish()
    ended = Manifest.read(run.path)
    assert ended.status == run.status == "finished"
    assert ended.extra == {"seed": 7}
    assert ended.packages["pyarrow"]
    assert ended.platform
    assert not (run.path / "environment.json").exists()
    assert ended.ended is not None
    assert ended.ended > ended.created
    past = PastRun(run.path)
    assert (past.params, past.tags) == ({"lr": 0.1}, {"a": "b"})
    assert run.id in repr(run)


def test_start_dirty_code_is_an_artifact(runs, tmp_path, monkeypatch):
    repo = tmp_path / "repo"
    repo.mkdir()
    git = ["git", "-c", "user.name=x", "-c", "user.email=x@x", "-C", str(repo)]
    (repo / "train.py").write_text("a = 1\n")
    for line in (["init", "-q"], ["add", "."], ["commit", "-q", "-m", "x"]):
        subprocess.run([*git, *line], check=True)
    (repo / "train.py").write_text("a = 2\n")
    monkeypatch.chdir(repo)
    monkeypatch.setattr("tracking.run._CAPTURE_WAIT_S", 60.0)  # a slow machine
    with start(runs_dir=runs, delivery=False) as run:
        pass
    assert "+a = 2" in (run.path / "artifacts" / "code.diff").read_text()
    assert logged(run, "name", what="artifacts") == [("code.diff",)]
    git_state = Manifest.read(run.path).git
    assert git_state is not None
    assert git_state["dirty"] is True


def test_start_again_goes_on_with_a_run(runs):
    with start(runs_dir=runs, delivery=False) as run:
        run.log("metrics", "train", 1.0)
    with start(run_id=run.id, runs_dir=runs, delivery=False) as again:
        assert again.path == run.path
        assert Manifest.read(run.path).status == "running"
        again.log("metrics", "train", 2.0)
    assert logged(run, "index", "value", what="metrics") == [(1, 1.0), (2, 2.0)]
    manifest = Manifest.read(run.path)
    assert manifest.status == "finished"
    (resumed,) = manifest.resumed
    assert resumed["status"] == "finished"


@pytest.mark.parametrize("word", ["name", "experiment"])
def test_start_again_under_another_name_is_refused(runs, word):
    own = {"name": "a", "experiment": "b"}
    with start(runs_dir=runs, delivery=False, **own) as run:
        pass
    with start(run_id=run.id, runs_dir=runs, delivery=False, **own) as again:
        assert again.name == "a"
    with pytest.raises(ValueError, match=rf"start\({word}\): expected that of run"):
        start(run_id=run.id, runs_dir=runs, delivery=False, **own | {word: "c"})
    assert Manifest.read(run.path).status == "finished"


def test_start_on_a_run_being_written_is_refused_and_changes_nothing(runs):
    with start(runs_dir=runs, delivery=False) as run:
        before = (run.path / "run.json").read_bytes()
        with pytest.raises(
            RunBusyError, match="expected a run that no process is writing"
        ):
            start(run_id=run.id, runs_dir=runs, delivery=False)
        assert (run.path / "run.json").read_bytes() == before


def test_start_unknown_run_or_bad_rank_is_refused(runs):
    with pytest.raises(RunNotFoundError, match="expected a run in"):
        start(run_id="nobody", runs_dir=runs)
    with pytest.raises(ValueError, match=r"start\(rank=1\): .* got run_id=None"):
        start(rank=1, runs_dir=runs)
    with pytest.raises(ValueError, match=r"start\(rank=-1\)"):
        start(rank=-1, run_id="x", runs_dir=runs)
    with pytest.raises(ValueError, match=r"start\(delivery=\): expected per_key"):
        start(delivery={"perkey": 5}, runs_dir=runs)
    with pytest.raises(TypeError, match=r"start\(delivery=\): expected True, False"):
        start(delivery=None, runs_dir=runs)  # type: ignore[arg-type]
    assert not runs.exists()


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"rank": "x"}, r"start\(rank\): expected a whole number, got 'x'"),
        ({"rank": True}, r"start\(rank\): expected a whole number, got True"),
        ({"save_diff": "no"}, r"start\(save_diff\): expected True or False, got 'no'"),
        ({"run_id": 3}, "start: expected a string as run_id, got 3"),
        ({"note": 3}, "start: expected a string as note, got 3"),
        ({"tags": ["a"]}, "expected a dictionary, got"),
        ({"runs_dir": 3}, r"start\(runs_dir\): expected a path, got 3\. Pass text"),
    ],
)
def test_start_argument_of_a_wrong_kind_is_told_and_leaves_nothing(
    options, match, runs
):
    with pytest.raises(TypeError, match=match):
        start(**{"runs_dir": runs, "delivery": False} | options)
    assert not list(runs.glob("*/run.json"))


@pytest.mark.parametrize(
    "call",
    [
        lambda: tracking.open(3),
        lambda: tracking.list_runs(3),
        lambda: tracking.export([], 3),
    ],
)
def test_path_of_a_wrong_kind_is_told(call):
    with pytest.raises(TypeError, match="expected a path, got 3"):
        call()


def test_export_of_a_number_is_told(tmp_path):
    with pytest.raises(TypeError, match=r"export\(runs\): expected a run or a list"):
        tracking.export(3, tmp_path / "x.csv")  # type: ignore[arg-type]


def test_start_delivery_options_stay_with_the_run(runs):
    with start(runs_dir=runs, delivery=False) as run:
        assert Manifest.read(run.path).deliver is False
    (run.path / "delivery").write_text("in the way of a delivery process")
    for delivery in ({"per_key": 5}, True):
        with pytest.warns(
            TrackingWarning, match=r"start\(delivery=True\): expected to"
        ):
            again = start(run_id=run.id, runs_dir=runs, delivery=delivery)
        again.finish()
        manifest = Manifest.read(run.path)
        assert (manifest.deliver, manifest.delivery) == (True, {"per_key": 5})


def test_start_that_cannot_use_its_folder_leaves_nothing(runs):
    with pytest.raises(ValueError, match="expected 'process' or 'fsync'"):
        start(durability="none", runs_dir=runs)  # type: ignore[arg-type]
    assert not runs.exists()


def test_start_on_a_disk_that_takes_no_file_names_the_folder(runs):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
    try:
        with pytest.raises(
            OSError, match=r"start\(runs_dir=.*got File too large. Free"
        ):
            tracking.start(runs_dir=runs, delivery=False)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert list(runs.glob("*")) == []


def test_run_is_neither_copied_nor_sent_to_another_process(runs):
    with tracking.start(runs_dir=runs, delivery=False) as run:
        for copied in (copy.deepcopy, pickle.dumps):
            with pytest.raises(TypeError, match=r"stay in its process.*Pass run\.path"):
                copied(run)


def test_start_joining_rank_writes_its_part_alone(runs):
    with start(runs_dir=runs, delivery=False) as run:
        manifest = (run.path / "run.json").read_bytes()
        with start(run_id=run.id, rank=1, runs_dir=runs) as other:
            other.log("metrics", "train", 1.0)
            other.save_manifest(x=1)
            assert other.manifest.id == run.id
        assert (run.path / "run.json").read_bytes() == manifest
        assert not (run.path / "delivery").exists()
    assert logged(run, "rank", "value", what="metrics") == [(1, 1.0)]


def test_start_notes_the_callers_active_mlflow_run(runs, monkeypatch):
    # As MLflow's module looks to one who must not import it.
    active = types.SimpleNamespace(info=types.SimpleNamespace(run_id="abc"))
    fake = types.ModuleType("mlflow")
    fake.active_run = lambda: active  # type: ignore[attr-defined]
    fake.get_tracking_uri = lambda: "https://u:p@h/x"  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "mlflow", fake)
    with start(runs_dir=runs, delivery=False) as run:
        pass
    assert Manifest.read(run.path).mlflow == {
        "run_id": "abc",
        "borrowed": True,
        "tracking_uri": "https://h/x",
    }


# --------------------------------------------------------------------- how a run ends


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (None, "finished"),
        (ValueError("bad"), "failed"),
        (KeyboardInterrupt(), "killed"),
        (SystemExit(), "finished"),
        (SystemExit(0), "finished"),
        (SystemExit(1), "failed"),
        (SystemExit("message"), "failed"),
        (SystemExit(130), "killed"),
        (SystemExit(143), "killed"),
    ],
)
def test_run_context_ends_as_the_block_did(runs, error, status):
    run = start(runs_dir=runs, delivery=False)
    if error is None:
        with run:
            pass
    else:
        with pytest.raises(type(error)), run:
            raise error
    manifest = Manifest.read(run.path)
    assert manifest.status == run.status == status
    if status == "failed":
        error_of_run = {"type": type(error).__name__, "message": str(error)}
        assert manifest.error == error_of_run
    else:
        assert manifest.error is None


def test_finish_twice_keeps_the_first_and_log_after_it_is_refused(runs):
    run = start(runs_dir=runs, delivery=False)
    run.finish("failed")
    run.finish("finished")
    assert Manifest.read(run.path).status == "failed"
    for value in (0.5, "text"):
        with pytest.raises(RunClosedError, match="expected a run that is open"):
            run.log("metrics", "train", value)
    with pytest.raises(RunClosedError, match="expected a run that is open"):
        run.set_tags({"a": 1})
    with pytest.raises(ValueError, match="expected one of finished, failed, killed"):
        run.finish("done")


LEFT_OPEN = """
import sys, tracking
run = tracking.start(runs_dir=sys.argv[1], delivery=False)
run.log("metrics", "train", 0.5)
raise ValueError("x")
"""


def test_run_left_open_ends_as_the_interpreter_did(runs, root):
    run_script(LEFT_OPEN, runs, cwd=root)
    (path,) = runs.iterdir()
    assert Manifest.read(path).status == "failed"
    assert PastRun(path).damage == []
    assert sorted(p.suffix for p in (path / "records" / "0").iterdir()) == [
        "",
        ".arrow",
    ]


FORK_IN_RUN = """
import os, sys, tracking
with tracking.start(runs_dir=sys.argv[1], delivery=False) as run:
    run.log("metrics", "train", 0.5)
    pid = os.fork()
    if pid:
        os.waitpid(pid, 0)
        assert tracking.open(run.path).status == "running"
        run.log("metrics", "train", 0.25)
"""


def test_run_forked_child_leaving_the_block_ends_nothing(runs, root):
    done = run_script(FORK_IN_RUN, runs, cwd=root)
    assert done.returncode == 0, done.stderr
    (path,) = runs.iterdir()
    assert PastRun(path).records("metrics")["value"].to_pylist() == [0.5, 0.25]


def test_run_threads_may_log_while_it_finishes(runs, until):
    run = start(runs_dir=runs, delivery=False)
    returned = [0] * 4

    def work(n):
        try:
            while True:
                run.log("metrics", str(n), {"x": 0.5})
                returned[n] += 1
        except RunClosedError:
            pass

    threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    until(lambda: min(returned) > 100)
    run.finish()
    for thread in threads:
        thread.join()
    past = PastRun(run.path)
    for n in range(4):
        assert past.records("metrics", str(n)).num_rows == returned[n]
    assert past.damage == []


def test_position_is_known_while_its_block_is_sealed_and_closed(run, until):
    block = run._journal.block
    run.log("metrics", "train", {"x": 0.5})

    def late():
        del block.find_last_slot
        for _ in range(CAPACITY):
            run.log("metrics", "train", {"x": 0.5})
        until(lambda: (run.path / "records" / "0" / "000000.arrow").exists())
        until(lambda: block._file < 0)
        return block.find_last_slot()

    block.find_last_slot = late
    assert run.position() == CAPACITY


# -------------------------------------------------------------------------- delivery


class FakeProcess:
    """A delivery process, which has ended or not."""

    pid = 0

    def __init__(self, is_lost):
        self.is_lost = is_lost

    def take(self, request):
        return True


def delivering(run, is_lost=False, **state):
    run._delivery._process = FakeProcess(is_lost)
    if state:
        DeliveryState(**state).write(run.path)


def test_mlflow_run_id_is_what_delivery_wrote(run):
    delivering(run, mlflow_run_id="abc", delivered=10**9)
    assert run.mlflow_run_id == "abc"


def test_mlflow_run_id_without_delivery_is_an_error(run):
    with pytest.raises(DeliveryError, match=r"got no delivery process.*harness sync"):
        _ = run.mlflow_run_id
    delivering(run, is_lost=True, error="refused", phase="gave up")
    with pytest.raises(DeliveryError, match="got refused"):
        _ = run.mlflow_run_id


def test_wait_ends_when_mlflow_has_what_was_logged(run, capsys):
    assert run.wait()  # it is not delivered
    run.log("metrics", "train", 0.5)
    delivering(run, delivered=-1, behind=5)
    assert not run.wait(0.0)
    last = run.position()
    timer = threading.Timer(0.3, lambda: DeliveryState(delivered=last).write(run.path))
    timer.start()
    assert run.wait()
    timer.join()
    run.finish(wait_s=0.05)
    assert not run.wait(0.0)  # until MLflow knows how it ended
    timer = threading.Timer(0.1, run._delivery.end, [True])
    timer.start()
    assert run.wait()
    timer.join()
    assert capsys.readouterr().err == ""


def test_rest_is_reported_without_secrets(run, capsys):
    delivering(run, behind=12, error="refused by https://u:p@h", phase="waiting")
    _report_unsent([run._delivery])
    shown = capsys.readouterr().err
    assert shown.startswith(f"12 rows of {run.id} are not in MLflow yet (refused by")
    assert "delivery continues in the background" in shown
    assert f"'harness sync {run.id}' sends the rest." in shown
    assert "u:p" not in shown
    _report_unsent([run._delivery] * 3)
    shown = capsys.readouterr().err
    assert shown.startswith("36 rows of 3 runs are not in MLflow yet (refused by")
    assert shown.endswith("'harness sync' sends the rest.\n")


def test_start_without_mlflow_is_one_warning(runs, root, tmp_path):
    script = """
import sys, warnings
sys.meta_path.insert(0, type("No", (), {"find_spec": staticmethod(
    lambda name, *_: (_ for _ in ()).throw(ModuleNotFoundError(name))
    if name == "mlflow" else None)})())
import importlib.util
found = importlib.util.find_spec
importlib.util.find_spec = lambda name, *a: None if name == "mlflow" else found(name, *a)
import tracking
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    with tracking.start(runs_dir=sys.argv[1]) as run:
        run.log("metrics", "train", 0.5)
print(len(caught), caught[0].message)
"""
    done = run_script(script, runs, cwd=root)
    assert done.stdout.startswith("1 start(delivery=True): expected mlflow"), (
        done.stderr
    )
    assert "harness sync" in done.stdout


def test_start_process_that_cannot_be_started_is_a_warning(runs):
    run = start(runs_dir=runs, delivery=False)
    (run.path / "delivery").write_text("in the way")
    with pytest.warns(TrackingWarning, match="expected to start the delivery"):
        run.deliver()


def test_save_manifest_on_a_failing_disk_is_a_warning(runs):
    run = start(runs_dir=runs, delivery=False)
    (run.path / "run.json").unlink()
    (run.path / "run.json").mkdir()
    with pytest.warns(TrackingWarning, match="expected to write its manifest"):
        run.save_manifest(x=1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", TrackingWarning)
        run.finish()


# ------------------------------------------------------------------------------ size


FLAT = """
import os, sys
from pathlib import Path
from tracking.run import Run
def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20
run = Run(Path(sys.argv[1]), None)
count = int(sys.argv[2])
for step in range(100_000):
    run.log_step({"loss": step / 7}, step)
at_first = resident()
for step in range(100_000, count):
    run.log_step({"loss": step / 7}, step)
print(resident() - at_first)
run.finish()
"""


def check_flat(tmp_path, root, count):
    done = run_script(FLAT, tmp_path / "run", count, cwd=root)
    assert float(done.stdout) < 24, done.stderr
    assert PastRun(tmp_path / "run").records().num_rows == count


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs Linux")
def test_log_step_memory_stays_flat(tmp_path, root):
    check_flat(tmp_path, root, 300_000)


@pytest.mark.slow
def test_log_step_memory_stays_flat_over_2_million_rows(tmp_path, root):
    check_flat(tmp_path, root, 2_000_000)


# ------------------------------------------------------------- params of any kind


class Colour(enum.Enum):
    RED = 1


@dataclasses.dataclass
class Options:
    lr: float = 0.1


class Untold:
    def __str__(self):
        raise RuntimeError("no text")


class Lazy(dict):
    def items(self):
        raise KeyError("a missing value")


ENDLESS: list[object] = []
ENDLESS.append(ENDLESS)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (Path("data/x"), "data/x"),
        (datetime(2026, 1, 2), "2026-01-02 00:00:00"),
        (Colour.RED, "Colour.RED"),
        (decimal.Decimal("0.10"), "0.10"),
        (Options(), "Options(lr=0.1)"),
        (argparse.Namespace(a=1), "Namespace(a=1)"),
        (np.dtype("float32"), "float32"),
        (Options, f"{__name__}.Options"),
        ({"b", "a"}, "{'a', 'b'}"),
        (range(3), "range(0, 3)"),
        (b"x", "b'x'"),
        (1j, "1j"),
        ([Path("a"), 1, {2: Colour.RED}], ["a", 1, {"2": "Colour.RED"}]),
        (None, None),
        pytest.param(10**5000, None, id="int"),
        (Untold(), None),
        (Lazy(a=1), "{'a': 1}"),
        (ENDLESS, None),
        pytest.param("x" * 3_000_000, None, id="text"),
        pytest.param(list(range(300_000)), None, id="list"),
        (np.zeros(5000), None),
        (np.array([object()]), None),
    ],
)
def test_log_params_of_any_kind_are_recorded(value, text, run):
    run.log_params({"before": 1, "odd": value, "after": 2})
    params = PastRun(run.path).params
    assert (params["before"], params["after"]) == (1, 2)
    if text is None:
        assert "odd" in params
    else:
        assert params["odd"] == text
    assert PastRun(run.path).damage == []


def test_log_params_with_keys_of_any_kind_are_recorded(run):
    deep: dict[str, object] = {}
    for _ in range(200):
        deep = {"d": deep}
    run.log_params({1: "a", (2, 3): "b", None: {4: "c"}, "\ud800": "d", "deep": deep})
    params = PastRun(run.path).params
    assert {k: v for k, v in params.items() if not k.startswith("deep")} == {
        "1": "a",
        "(2, 3)": "b",
        "None/4": "c",
        "\\ud800": "d",
    }


def test_log_of_new_names_to_a_known_set_checks_them(run):
    run.log("metrics", "train", {"a": 1.0}, 1)
    run.log("metrics", "train", {"a": 2.0, "b": 3.0, "ü": 4.0}, 2)
    with pytest.raises(TypeError, match="got 3"):
        run.log("metrics", "train", {"c": 1.0, 3: 5.0}, 3)  # type: ignore[dict-item]
    with pytest.raises(ValueError, match="lone surrogates"):
        run.log("metrics", "train", {"d": 1.0, "\ud800": 5.0}, 3)
    with pytest.raises(TypeError, match="index"):
        run.log("metrics", "train", {"e": 1.0}, "3")  # type: ignore[arg-type]
    run.log("metrics", "train", {"f": 6.0, "g": 7.0})
    table = PastRun(run.path).records("metrics")
    rows = zip(*(table[n].to_pylist() for n in ("name", "index", "value")), strict=True)
    assert list(rows) == [
        ("a", 1, 1.0),
        *[("a", 2, 2.0), ("b", 2, 3.0), ("ü", 2, 4.0)],
        *[("f", 3, 6.0), ("g", 3, 7.0)],
    ]


def test_log_names_that_meet_are_told_apart(run):
    meeting = {"a/b": 1, "a": {"b": 2}, "a/b#2": 3}
    run.log_params(meeting)
    assert PastRun(run.path).params == {"a/b": 1, "a/b#2": 3, "a/b#3": 2}
    run.log("metrics", "t", meeting, index=1)
    assert sorted(logged(run, "what", "value")[-3:]) == [
        ("metrics", 1.0),
        ("metrics", 2.0),
        ("metrics", 3.0),
    ]


# ------------------------------------------------- tensors that cannot be read out


def odd_tensors():
    class Shy(torch.Tensor):
        def tolist(self):
            raise NotImplementedError("not from this class")

    plain = torch.ones(2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # prototypes of torch say that they are
        return {
            "sparse": plain.to_sparse(),
            "meta": plain.to("meta"),
            "meta scalar": torch.ones((), device="meta"),
            "complex": plain.to(torch.complex64),
            "nested": torch.nested.nested_tensor([plain, torch.ones(3)]),
            "quantized": torch.quantize_per_tensor(plain, 0.1, 0, torch.qint8),
            "masked": torch.masked.masked_tensor(plain, plain > 0),
            "shy": plain.as_subclass(Shy),
        }


@pytest.mark.parametrize("kind", odd_tensors())
def test_log_tensor_that_has_no_plain_values_is_refused(kind, run):
    odd = odd_tensors()[kind]
    run.log("metrics", "t", {"loss": torch.tensor(1.5)})
    for value in ({"a": 1.0, "b": odd}, [1.0, odd]):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with pytest.raises(TypeError, match=r"(?s)expected a number.* at value\["):
                run.log("metrics", "t", value)
            run.log_params({"odd": odd})
    run.log("metrics", "t", {"loss": torch.tensor(2.5)})
    run.flush()
    values = PastRun(run.path).records(what="metrics")["value"].to_pylist()
    assert values == [1.5, 2.5]


class Unreadable(torch.Tensor):
    """A tensor that says only in the background that it cannot be read."""

    num_reads = 0

    def tolist(self):
        Unreadable.num_reads += 1
        if Unreadable.num_reads % 2:
            return [1.0]
        raise MemoryError("none left")


@pytest.mark.parametrize("kind", ["large", "unreadable"])
@pytest.mark.parametrize("by", ["finish", "keeper"])
def test_log_tensor_that_cannot_be_read_is_lost_alone(kind, by, runs, until):
    Unreadable.num_reads = 0
    value: object = torch.ones(1).as_subclass(Unreadable)
    if kind == "large":
        value = [torch.rand(1024, dtype=torch.float64) for _ in range(100)]
    run = start(runs_dir=runs, delivery=False)
    run.log("metrics", "t", {"loss": torch.tensor(1.5)})
    run.log("odd", "t", value)
    run.log("metrics", "t", {"loss": torch.tensor(2.5)})
    if by == "keeper":
        until(lambda: not run._deferred)
        run.log("metrics", "t", {"loss": torch.tensor(3.5)})
        until(lambda: not run._deferred)
    run.finish()
    past = PastRun(run.path)
    expected = [1.5, 2.5, 3.5] if by == "keeper" else [1.5, 2.5]
    assert past.records(what="metrics")["value"].to_pylist() == expected
    assert past.status == "finished"


# ------------------------------------------------------------- starts that fail


@pytest.mark.parametrize(
    "options",
    [
        {"params": 3},
        {"tags": [1]},
        {"experiment": 123},
        {"name": b"x"},
        {"note": "\ud800"},
        {"durability": "never"},
        {"delivery": 1},
    ],
)
def test_start_that_fails_leaves_nothing(options, runs):
    threads = threading.active_count()
    with pytest.raises((TypeError, ValueError), match="expected"):
        start(runs_dir=runs, **options)
    assert not runs.exists() or list(runs.iterdir()) == []
    assert threading.active_count() == threads


def test_start_again_that_fails_leaves_the_run_as_it_was(runs):
    with start(runs_dir=runs, delivery=False) as run:
        run.log_metric("loss", 1.0)
    before = PastRun(run.path).manifest
    with pytest.raises(TypeError, match="expected a dictionary"):
        start(runs_dir=runs, run_id=run.id, delivery=False, params=3)  # type: ignore[arg-type]
    assert PastRun(run.path).manifest == before
    with pytest.raises(TypeError, match="expected a dictionary"):
        start(runs_dir=runs, run_id=run.id, rank=1, params=3)  # type: ignore[arg-type]
    assert not get_rank_dir(run.path, 1).exists()
    with start(runs_dir=runs, run_id=run.id, delivery=False) as again:
        assert again.id == run.id


def test_start_in_a_folder_that_is_gone(runs, tmp_path, monkeypatch):
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    with start(runs_dir=runs, delivery=False) as run:
        run.log_metric("loss", 1.0)
    assert PastRun(run.path).status == "finished"


# ------------------------------------------------------------ stderr and children


class Tee:
    """As programs replace stderr: no isatty."""

    def write(self, text):
        return len(text)

    def flush(self):
        pass


class Broken(Tee):
    def write(self, text):
        raise RuntimeError("gone")


@pytest.mark.parametrize("kind", ["Tee", "Broken", "None", "closed"])
def test_end_of_a_run_needs_no_stderr(kind, runs, tmp_path, monkeypatch):
    closed = (tmp_path / "closed").open("w")
    closed.close()
    replaced = {"Tee": Tee(), "Broken": Broken(), "None": None, "closed": closed}
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    monkeypatch.setattr(sys, "stderr", replaced[kind])
    warn("a warning")
    run = start(runs_dir=runs, delivery={"patience_s": 0.1})
    run.log_metric("loss", 1.0)
    run.finish(wait_s=0.2)
    assert PastRun(run.path).status == "finished"


def test_log_in_a_forked_child_is_one_warning(runs, tmp_path):
    with start(runs_dir=runs, delivery=False) as run:
        run.log_metric("loss", torch.tensor(1.0))
        run.log_metric("loss", 1.0)
        child = os.fork()
        if child == 0:  # as a worker of a DataLoader
            code = 1
            try:
                with pytest.warns(TrackingWarning, match="dropped") as caught:  # noqa: PT031
                    run.log_metric("loss", 2.0)
                    run.log("metrics", "t", {"a": torch.tensor(1.0)})
                    run.log_params({"a": 1})
                    run.log_text("x", "x.txt")
                    run.flush()
                    run.save_manifest(a=1)
                    run.finish()
                code = len(caught) - 1
            finally:
                os._exit(code)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        run.log_metric("loss", 3.0)
    past = PastRun(run.path)
    values = past.records(what="metrics")["value"].to_pylist()
    assert sorted(values) == [1.0, 1.0, 3.0]
    assert past.status == "finished"


def test_figure_without_a_format_in_its_name_is_a_png(run):
    class Figure:
        def savefig(self, path):
            assert path.endswith(".png")
            Path(path).write_text("a picture")

    for name in ("plot", "epoch_0.5", "deep/x.png"):
        run.log_figure(Figure(), name)
    names = sorted(p.name for p in (run.path / "artifacts").rglob("*.png"))
    assert names == ["epoch_0.5.png", "plot.png", "x.png"]


def test_left_generator_is_a_finished_run(runs):
    def train():
        with start(runs_dir=runs, delivery=False, name="left") as run:
            while True:
                yield run

    steps = train()
    run = next(steps)
    steps.close()
    assert PastRun(run.path).status == "finished"


def test_error_of_a_run_is_written_without_secrets(tmp_path):
    error = ValueError("login('postgres://u:pw1@h', api_key='hunter22') failed")
    with (
        pytest.raises(ValueError, match="hunter22"),
        start(runs_dir=tmp_path, delivery=False) as run,
    ):
        raise error
    text = (run.path / "run.json").read_text()
    assert "login('postgres://h', api_key='***') failed" in text
    assert "hunter22" not in text
    assert "pw1" not in text


def test_secrets_in_params_tags_inputs_and_texts_are_masked(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "hunter22-hunter22")
    with start(
        runs_dir=tmp_path,
        delivery=False,
        name="x",
        note="with hunter22-hunter22",
        params={
            "api_key": "p1-secret",
            "num_tokens": 8,
            "tokenizer": "gpt2",
            "db": {"password": "p2-secret", "url": "postgres://me:p3-secret@h/x"},
            "args": types.SimpleNamespace(token="p4-secret", lr=0.1),
            "command": ["x", "--password", "p5-secret", "-H", "Cookie: p6-secret"],
        },
        tags={"auth": "p7-secret", "why": "hunter22-hunter22"},
    ) as run:
        run.log_input(
            "rows", "train", source="s3://me:p8-secret@h/x", secret="p9-secret"
        )
        run.log("texts", "train", {"password": "p10-secret", "plain": "as it is"})
        run.log_metric("key", "hunter22-hunter22")
    past = PastRun(run.path)
    text = str(past.records(superseded=True).to_pylist()) + str(past.manifest)
    assert "-secret" not in text.replace("p10-secrets", "")
    assert "hunter22" not in text
    assert past.params["num_tokens"] == 8
    assert past.params["tokenizer"] == "gpt2"
    assert past.params["db/url"] == "postgres://h/x"
    assert "as it is" in text


@pytest.mark.parametrize("num_written", [None, 1])
def test_ctrl_c_while_tensors_are_read_loses_no_row(runs, monkeypatch, num_written):
    run = tracking.start(runs_dir=runs, delivery=False)
    read, num_calls = schema.fetch_values, 0

    class Values(dict[int, object]):
        def __getitem__(self, key):
            if key == [*self][num_written]:
                raise KeyboardInterrupt
            return super().__getitem__(key)

    def read_late(copies):
        nonlocal num_calls
        num_calls += 1
        if threading.current_thread() is threading.main_thread() and num_calls == 1:
            if num_written is None:  # while the device is waited for
                raise KeyboardInterrupt
            return Values(read(copies))
        return read(copies)

    with run._reading:  # no other thread reads meanwhile
        run.log("metrics", "train", {"a": torch.tensor(1.5), "b": torch.tensor(2.5)})
        assert run._deferred
        monkeypatch.setattr(row_logger, "fetch_values", read_late)
        with pytest.raises(KeyboardInterrupt):
            run.flush()
    run.finish("killed")
    rows = tracking.open(run.path).records(what="metrics")
    assert rows.select(["name", "value"]).to_pylist() == [
        {"name": "a", "value": 1.5},
        {"name": "b", "value": 2.5},
    ]


@pytest.mark.parametrize(
    ("argument", "error", "match"),
    [
        ({"experiment": " "}, ValueError, r"start\(experiment\): expected a name, got"),
        ({"name": ""}, ValueError, r"start\(name\): expected a name, got ''"),
        ({"run_id": ""}, ValueError, r"start\(run_id\): expected a name, got ''"),
        ({"name": b"x"}, TypeError, "start: expected a string as name, got b'x'"),
        ({"params": 0}, TypeError, r"start\(params\): expected a dictionary, got 0"),
        ({"tags": "a"}, TypeError, r"start\(tags\): expected a dictionary, got 'a'"),
        ({"runs_dir": ""}, ValueError, r"start\(runs_dir\): expected a path, got ''"),
        ({"runs_dir": "a\0b"}, ValueError, r"start\(runs_dir\): expected a path, got"),
        ({"runs_dir": 3}, TypeError, r"start\(runs_dir\): expected a path, got 3"),
        ({"durability": ""}, ValueError, "expected 'process' or 'fsync', got ''"),
        ({"delivery": None}, TypeError, "expected True, False or a dict of options"),
        ({"save_diff": 0}, TypeError, r"start\(save_diff\): expected True or False"),
        ({"rank": True}, TypeError, r"start\(rank\): expected a whole number"),
    ],
)
def test_start_refuses_what_names_nothing_and_makes_no_run(
    argument, error, match, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(error, match=match):
        tracking.start(**{"delivery": False} | argument)
    assert not any(tmp_path.iterdir())
