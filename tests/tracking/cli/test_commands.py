"""The commands: what they print, and how they end."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import time
import urllib.parse
import urllib.request
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

import tracking
from tests.tracking.stores import Recorded
from tracking.cli import render
from tracking.cli.commands import INDEXED_RUNS, commands
from tracking.cli.group import CommandGroup
from tracking.cli.run_index import INDEX, RunIndex
from tracking.cli.watching import _iter_looks
from tracking.delivery.state import DeliveryState
from tracking.errors import TrackingError
from tracking.mlflow_store.server import Server
from tracking.read import PastRun
from tracking.schema import FIT, REWIND
from tracking.store import run_paths


@click.group(cls=CommandGroup, context_settings={"help_option_names": ["-h", "--help"]})
def group():
    """A group as `harness` is one."""


for command in commands:
    group.add_command(command)


@pytest.fixture
def call(tmp_path, monkeypatch):
    """Runs a command in the test's folder."""
    monkeypatch.chdir(tmp_path)

    def run(*words, code=0, **options):
        result = CliRunner().invoke(group, [str(word) for word in words], **options)
        error = result.exception
        if error is not None and not isinstance(error, SystemExit):
            raise error
        assert result.exit_code == code, result.output
        return result

    return run


@pytest.fixture(scope="module")
def recorded_runs(tmp_path_factory):
    """Folders of ended runs, which tests copy: two, and three with other losses."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("recorded"))  # no repository
        options = {"experiment": "digits", "delivery": False}
        for lr in (0.1, 0.2):
            own = {"name": f"lr {lr}", "params": {"lr": lr, "same": 1}}
            run = tracking.start(note="A **note**.", runs_dir="two", **own, **options)
            Recorded(run).log_curve(5, scale=lr)
            run.finish()
        for place, loss in enumerate([0.3, 0.1, 0.2]):
            params = {"lr": 10.0**-place, "kind": "big"}
            own = {"name": f"run-{place}", "params": params}
            run = tracking.start(runs_dir="three", **own, **options)
            for index, value in enumerate([1.0, 0.05, loss], start=1):
                run.log("metrics", "train", {"loss": 9.0}, index=index)
                values = {"loss": value, "score": -value}
                run.log("metrics", "valid", values, index=index)
            run.finish()
        yield Path.cwd()


@pytest.fixture
def two(recorded_runs, tmp_path, monkeypatch):
    """Two runs that have ended."""
    monkeypatch.chdir(tmp_path)
    runs = shutil.copytree(recorded_runs / "two", tmp_path / "runs")
    return [tracking.open(path) for path in sorted(runs.glob("2*"))]


# ---------------------------------------------------------------------------- runs


def test_list_shows_runs_newest_first(call, two):
    result = call("runs", "list")
    lines = [line for line in result.output.splitlines() if "digits" in line]
    assert [line.split()[0] for line in lines] == [two[1].id, two[0].id]
    assert all("finished" in line and "not delivered" in line for line in lines)
    assert call("runs").output == result.output


def test_list_as_json_can_be_limited(call, two):
    (found,) = json.loads(call("runs", "list", "--json", "--limit", 1).output)
    assert found["id"] == two[1].id
    assert (found["status"], found["experiment"]) == ("finished", "digits")
    assert found["behind"] is None
    assert 0 <= found["duration_s"] < 60


@pytest.fixture
def three(recorded_runs, tmp_path, monkeypatch):
    """Runs whose last validation losses are 0.3, 0.1 and 0.2."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(recorded_runs / "three", tmp_path / "runs")


@pytest.mark.parametrize(
    ("words", "names"),
    [
        ([], ["run-2", "run-1", "run-0"]),
        (["--where", "valid/loss < 0.25"], ["run-2", "run-1"]),
        (["--where", "metrics.valid/loss<=.1 or params.lr = 1"], ["run-1", "run-0"]),
        (["--where", "not (valid/loss.min = 0.05 and params.lr < 0.5)"], ["run-0"]),
        (["--where", "params.kind != 'big' or name = \"run-1\""], ["run-1"]),
        (["--where", "status = finished and valid/loss > 1"], []),
        (["--sort", "valid/loss"], ["run-1", "run-2", "run-0"]),
        (["--sort", "-valid/loss", "--limit", "2"], ["run-0", "run-2"]),
        (["--sort", "params.lr"], ["run-2", "run-1", "run-0"]),
        (["--where", "name > run-0"], ["run-2", "run-1"]),
        (["--where", "name > 0 or params.kind > 0"], []),
        (["--where", "created > 2026 and id > 2026"], ["run-2", "run-1", "run-0"]),
    ],
)
def test_list_can_choose_and_sort_runs(call, three, words, names):
    found = json.loads(call("runs", "list", "--json", *words).output)
    assert [run["name"] for run in found] == names


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--where", "valid/los < 1"], "Did you mean 'valid/loss'"),
        (["--where", "lr < 1"], "Did you mean 'params.lr'"),
        (["--where", "valid/loss <"], "expected a value after valid/loss <"),
        (["--where", "(" * 5000], "expected fewer 'not' and"),
        (["--where", "valid/loss"], "expected an operator after 'valid/loss'"),
        (["--where", "(valid/loss < 1"], r"expected '\)'"),
        (["--where", "valid/loss < 1 params.lr > 0"], "expected 'and' or 'or'"),
        (["--where", ""], "expected a name"),
        (["--where", "params.lr < big"], "expected a number after params.lr <"),
        (["--sort", "los"], "--sort: expected a name that a run has, got 'los'"),
        (["--sort", "-"], "--sort: expected a name that a run has, got ''"),
    ],
)
def test_list_refuses_what_it_cannot_read(call, three, words, message):
    assert re.search(message, call("runs", "list", *words, code=2).stderr)


def test_list_takes_odd_names_and_values(call, record):
    first = record(name="first", params={"seed": 10**400, "batch size": 8}).run
    first.log("metrics", "valid", {"acc>0": 0.5}, index=1)
    first.finish()
    second = record(name="second", params={"seed": 3}).run
    second.log("metrics", "valid", {"acc>0": float("nan")}, index=1)
    second.log("metrics", "", {"status": 1.0}, index=1)
    second.finish()

    def names(*words):
        found = json.loads(call("runs", "list", "--json", *words).output)
        return [run["name"] for run in found]

    assert names("--where", "params.seed = 3") == ["second"]
    assert names("--where", f"params.seed = {10**400}") == ["first"]
    assert names("--where", '"valid/acc>0" > 0.1') == ["first"]
    assert names("--where", "'params.batch size' = 8") == ["first"]
    assert names("--where", "status = finished") == ["second", "first"]
    # NaN is never the best.
    for order in ("valid/acc>0", "-valid/acc>0"):
        assert names("--sort", order) == ["first", "second"]


def test_list_and_show_pass_over_control_rows_that_nothing_here_writes(call, record):
    run = record(name="odd").run
    for kind in (FIT, REWIND):
        for number in (float("nan"), float("inf"), -float("inf")):
            run._journal.write("", "", [("", kind, number, None)])
    for number in (0.0, -5.0, 1e300):
        run._journal.write("", "", [("", FIT, number, None)])
    run.log("metrics", "valid", {"loss": 0.5}, index=1)
    run.finish()
    (found,) = json.loads(call("runs", "list", "--json").output)
    assert found["metrics"]["valid/loss"]["last"] == 0.5
    assert found["name"] in call("runs", "show", run.id).output


def test_main_metric_of_a_list_does_not_depend_on_its_limit(call, three, record):
    for name in ("newer", "newest"):
        run = record(name=name)
        run.run.log("metrics", "train", {"loss": 4.0}, index=1)
        run.run.finish()
    for limit in (0, 1, 2, 4):
        lines = call("runs", "list", "--limit", limit).output.splitlines()
        assert lines[1].split()[2] == "valid/loss"
        assert len(lines[3:-1]) == (limit or 5)
    assert " *" not in call("runs", "list", "--limit", 3).output
    assert (
        "0.2 *"
        in call("runs", "list", "--limit", 3 + 1, "--where", "valid/loss > 0.1").output
    )


def test_list_of_many_runs_is_the_same_with_and_without_an_index(call, two):
    runs = two[0].path.parent
    manifest = (two[0].path / "run.json").read_text()
    for second in range(INDEXED_RUNS):
        copy = runs / f"20200101-{second:06d}-copy"
        copy.mkdir()
        (copy / "run.json").write_text(manifest.replace(two[0].id, copy.name))
    table = call("runs", "list", "--limit", 0).output
    assert len(table.splitlines()) == INDEXED_RUNS + 2 + 4
    index = RunIndex(runs, run_paths(runs), settled_s=-1.0)
    for path in run_paths(runs):
        index.summarize(path)
    index.save()
    written = (runs / INDEX).stat()
    assert call("runs", "list", "--limit", 0).output == table
    assert (runs / INDEX).stat() == written  # there was nothing to read
    found = [
        json.loads(call("runs", "list", "--json", "--limit", limit).output)
        for limit in (0, 20)
    ]
    assert found[0][:20] == found[1]


def test_list_marks_the_best_by_the_validation_loss(call, three):
    lines = [line.split() for line in call("runs", "list").output.splitlines()]
    assert "valid/loss" in lines[1]
    assert [line[2:4] for line in lines[3:]][:3] == [
        ["0.2", lines[3][3]],
        ["0.1", "*"],
        ["0.3", lines[5][3]],
    ]


def test_list_at_80_columns_keeps_ids_whole(three, tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr(render, "PIPE_WIDTH", 80)
    result = CliRunner().invoke(group, ["runs", "list"])
    ids = {path.name for path in (tmp_path / "runs").iterdir()}
    assert ids == {line.split()[0] for line in result.output.splitlines()[3:-1]}
    assert all(len(line.rstrip()) <= 80 for line in result.output.splitlines())


def test_compare_at_80_columns_breaks_ids_behind_the_time_only(
    call, three, tmp_path, monkeypatch
):
    monkeypatch.setattr(render, "PIPE_WIDTH", 80)
    ids = sorted(path.name for path in (tmp_path / "runs").iterdir())
    times, names = call("runs", "compare", *ids).output.splitlines()[1:3]
    parts = zip(times.split(), names.split(), strict=True)
    assert [f"{time}{name}" for time, name in parts] == ids
    heading = call("runs", "compare", *ids[:2]).output.splitlines()[1]
    assert heading.split() == ids[:2]


def test_command_whose_reader_has_ended_ends_quietly(three, monkeypatch, capfd):
    reads, writes = os.pipe()
    os.close(reads)
    with monkeypatch.context() as patch, open(writes, "w") as closed:  # noqa: PTH123  a number
        patch.setattr(sys, "stdout", closed)
        with pytest.raises(SystemExit) as ended:
            group(["runs", "list", "--json"])
        # What is left in the buffer has nowhere to go either.
        os.dup2(os.open(os.devnull, os.O_WRONLY), writes)
    assert ended.value.code == 1
    assert capfd.readouterr().err == ""


def test_show_and_compare_draw_curves_and_what_differs(call, three):
    output = call("runs", "show", "run-1").output
    assert "loss   * train   + valid" in output
    output = call("runs", "compare", "run-0", "run-1").output
    assert re.search(r"lr +1\.0|lr +1 ", output)
    assert "kind" not in output
    assert re.search("^valid/loss   [*] .*run-0.*   [+] .*run-1", output, re.MULTILINE)


def test_curves_of_several_fits_are_those_that_their_names_say(call, tmp_path):
    for name in ("folds", "other"):
        with tracking.start(name=name, runs_dir="runs", delivery=False) as run:
            for start in (1.0, 8.0):
                run.begin_fit()
                for index in (1, 2):
                    run.log_metric("loss", start / index, set="valid", index=index)
                run.end_fit()
    output = call("runs", "show", "folds").output
    assert "loss   * valid, fit 2" in output
    assert re.search(r"^ *8 \|", output, re.MULTILINE)
    output = call("runs", "compare", "folds", "other").output
    curves = output[output.index("valid/loss   *") :]
    assert re.search(r"^ *1 \|", curves, re.MULTILINE)  # of fit 1, as in the table


def test_compare_shows_changed_code_and_data(call, record):
    for place in range(2):
        run = record(name=f"run-{place}")
        run.run.log_input("train", "training", rows=10 + place)
        run.run.log_text("+ a line\n" * (place + 1), "code.diff")
        run.run.finish()
    output = call("runs", "compare", "run-0", "run-1").output
    assert re.search(r"data train rows +10 +11", output)
    assert re.search(r"code.diff +1 lines, \w{8} +2 lines, \w{8}", output)


def test_watch_prints_each_epoch_once_and_ends_with_the_run(call, three):
    output = call("runs", "watch", "run-1").output.splitlines()
    assert [line.split()[:2] for line in output[:3]] == [
        ["index", str(index)] for index in (1, 2, 3)
    ]
    assert "finished" in output[3]
    found = call("runs", "watch", "run-1", "--json").output.splitlines()
    assert [json.loads(line)["valid/loss"] for line in found] == [1.0, 0.05, 0.1]


def test_watch_looks_again_soon_after_a_reader_that_was_slow(record):
    looks = _iter_looks(PastRun(record().path), 0.01)
    next(looks)
    time.sleep(0.5)  # what is printed is not read
    start = time.monotonic()
    next(looks)
    assert time.monotonic() - start < 3


def test_runs_are_completed_by_any_part_of_their_ids(three, tmp_path):
    command = group.commands["runs"].commands["show"]  # type: ignore[attr-defined]
    ctx = click.Context(command, info_name="show")
    (argument,) = (p for p in command.params if p.name == "run")
    found = [item.value for item in argument.shell_complete(ctx, "run-1")]
    assert found == [p.name for p in (tmp_path / "runs").iterdir() if "run-1" in p.name]


@pytest.mark.parametrize("command", [["runs", "list"], ["sync"], ["verify"]])
def test_command_says_that_a_folder_has_no_runs(call, tmp_path, command):
    result = call(*command, "--json", "--runs-dir", tmp_path / "wrong")
    assert json.loads(result.stdout) == []
    assert result.stderr == f"no runs in {tmp_path / 'wrong'}\n"


def test_verify_of_all_runs_says_that_none_is_sent_to_mlflow(call, two, tmp_path):
    result = call("verify")
    assert result.output == f"no runs that are sent to MLflow in {tmp_path / 'runs'}\n"


def test_show_tells_all_about_a_run(call, two):
    output = call("runs", "show", "lr 0.1").output
    for text in (
        two[0].id,
        "lr 0.1",
        "finished",
        "A **note**.",
        "train/loss",
        "0.02",
        "12 rows in",
        "not delivered",
    ):
        assert text in output
    found = json.loads(call("runs", "show", two[0].id, "--json").output)
    assert found["params"] == {"lr": 0.1, "same": 1}
    assert found["metrics"]["train/loss"] == {
        "last": 0.02,
        "min": 0.02,
        "max": 0.1,
        "count": 5,
    }
    assert (found["rows"], found["damage"], found["mlflow"]) == (12, [], None)


def test_show_lists_images_tables_and_histograms(call, record):
    run = record()
    run.run.log_image("samples", [[0.0, 1.0]], step=5)
    run.run.log_image("samples", [[1.0, 1.0]], step=9)
    run.run.log_histogram("grads", [1.0])
    run.run.log("tables", "mine", 3.0)  # a number of the user's own
    found = json.loads(call("runs", "show", run.run.id, "--json").output)["items"]
    assert [(i["kind"], i["name"], i["count"], i["last"]) for i in found] == [
        ("images", "samples", 2, 9),
        ("histograms", "grads", 1, 1),
    ]
    assert (run.path / found[0]["file"]).is_file()
    assert "step 9" in call("runs", "show", run.run.id).output


def test_show_tells_how_far_mlflow_is_behind_and_why(call, record):
    run = record(experiment="digits")
    manifest = run.run.manifest
    manifest.deliver = True
    manifest.write(run.path)
    run.log_curve(5)
    run.run.finish()
    assert "10 rows to send" in call("runs", "show", run.run.id).output
    assert json.loads(call("runs", "list", "--json").output)[0]["behind"] == 10


def test_show_names_damage(call, two):
    (block,) = (two[0].path / "records" / "0").glob("*.arrow")
    block.write_bytes(block.read_bytes()[:-20])
    assert "0 rows lost" in call("runs", "show", two[0].id).output
    found = json.loads(call("runs", "show", two[0].id, "--json").output)
    assert found["damage"][0]["file"] == str(block)


def test_json_writes_what_it_has_no_word_for_as_text(call, record):
    run = record()
    run.run.log_metric("loss", float("nan"), set="train", index=1)
    run.run.finish()
    found = json.loads(
        call("runs", "show", run.run.id, "--json").output,
        parse_constant=lambda name: pytest.fail(name),
    )
    assert found["metrics"]["train/loss"]["last"] == "nan"


def test_compare_shows_params_that_differ_and_last_metrics(call, two):
    output = call("runs", "compare", *(run.id for run in two)).output
    (lr,) = [line.split() for line in output.splitlines() if line.startswith(" lr")]
    assert lr == ["lr", "0.1", "0.2"]
    (loss,) = [
        line.split() for line in output.splitlines() if line.startswith(" train/loss")
    ]
    assert loss == ["train/loss", "0.02", "0.04"]
    assert "same" not in output
    found = json.loads(call("runs", "compare", two[0].id, two[1].id, "--json").output)
    assert [one["params"]["lr"] for one in found] == [0.1, 0.2]


def test_delete_asks_first(call, two):
    path = two[0].path
    call("runs", "delete", two[0].id, input="n\n", code=1)
    assert path.is_dir()
    result = call("runs", "delete", two[0].id, input="y\n")
    assert str(path) in result.stderr
    assert not path.exists()
    assert json.loads(call("runs", "delete", two[1].id, "--yes", "--json").output) == [
        two[1].id
    ]


def test_delete_of_one_run_named_twice_deletes_it_once(call, two):
    name = two[0].id
    output = call("runs", "delete", name, name, "--yes", "--json").output
    assert json.loads(output) == [name]
    assert not two[0].path.exists()


def test_negative_limit_is_refused(call):
    assert "--limit" in call("runs", "list", "--limit", "-1", code=2).stderr


def test_delete_of_a_run_that_is_being_written_is_refused(call, record):
    run = record()
    result = call("runs", "delete", run.run.id, "--yes", code=1)
    assert "expected a run that has ended, got" in result.output
    assert run.path.is_dir()


@pytest.mark.parametrize("words", [["runs", "show"], ["verify"], ["sync"]])
def test_unknown_run_is_a_usage_error_that_offers_the_nearest(call, two, words):
    result = call(*words, two[0].id[:-1] + "_", code=2)
    assert "Nearest" in result.output
    assert two[0].id in result.output


@pytest.fixture
def spoilt(two):
    """The folder of a run with an empty manifest beside two others."""
    path = two[0].path.with_name("20300101-000000-spoilt-0000")
    path.mkdir()
    (path / "run.json").write_text("")
    return path


def test_spoilt_run_is_skipped_by_every_command(call, two, spoilt):
    result = call("runs", "list")
    assert "warning: " in result.stderr
    assert all(run.id in result.stdout for run in two)
    assert spoilt.name not in result.stdout
    for words in (
        ("runs", "show", two[0].id),
        ("runs", "compare", two[0].id, two[1].id),
        ("export", two[0].id, "--to", "x.csv"),
        ("verify", two[0].id, "--no-mlflow"),
    ):
        assert spoilt.name not in call(*words).output
    for command in ("sync", "verify --no-mlflow"):
        line, *others = call(*command.split()).stderr.splitlines()
        assert all(other.startswith("no runs that") for other in others)
        assert line.startswith("warning: ")
        assert f"{spoilt.name}/run.json" in line
        assert line.endswith("The run is skipped.")
    assert call("runs", "delete", "--yes", "spoilt").exit_code == 0
    assert not spoilt.exists()


def test_delete_of_a_link_keeps_the_run(call, two):
    link = two[0].path.with_name("latest")
    link.symlink_to(two[0].id)
    call("runs", "delete", "--yes", "latest")
    assert not link.is_symlink()
    assert two[0].path.is_dir()


# ------------------------------------------------------------- names and terminals

CONTROL = "a\x1b[2J\x07\r\x7f\x9b1m\u202eb\u2028c"
"""A name that clears the screen, rings, returns, and turns the text around."""


@pytest.fixture
def hostile(record):
    """The folder of a run whose every name holds control characters."""
    run = record(
        name=f"n {CONTROL}",
        experiment=f"e {CONTROL}",
        params={f"p {CONTROL}": f"v {CONTROL}"},
        tags={f"t {CONTROL}": CONTROL},
        note=f"first\nsecond {CONTROL}",
    ).run
    run.log_metric(f"m {CONTROL}", 1.0, set=f"s {CONTROL}", index=1)
    run.finish("failed", ValueError(CONTROL))
    return run.path.rename(run.path.with_name(f"20260101-000000-{CONTROL}"))


def assert_plain(text):
    assert not set(CONTROL) - set("a[2J1mbc") & set(text), ascii(text)


@pytest.mark.parametrize(
    "command",
    [
        "runs list",
        "runs list --json",
        "runs show RUN",
        "runs show RUN --json",
        "runs compare RUN RUN",
        "verify RUN --no-mlflow --json",
        "export RUN --to x.csv",
    ],
)
def test_control_characters_of_names_never_reach_the_terminal(call, hostile, command):
    words = [str(hostile) if word == "RUN" else word for word in command.split()]
    result = call(*words)
    assert_plain(result.stdout)
    assert_plain(result.stderr)
    if "--json" in command:  # nothing is lost in JSON
        found = json.dumps(json.loads(result.stdout))
        assert "verify" in command or json.dumps(CONTROL)[1:-1] in found
    elif "runs" in command:
        assert r"a\x1b[2J\x07" in "".join(result.stdout.split())


def test_control_characters_of_names_in_errors_never_reach_the_terminal(call, hostile):
    assert_plain(call("runs", "show", "20260101-000000-x", code=2).output)
    (hostile / "run.json").write_text("{}")
    assert_plain(call("runs", "list").output)
    assert_plain(call("runs", "show", hostile, code=1).output)
    result = call("verify", "--no-mlflow")
    assert_plain(result.output)
    assert "is skipped" in result.stderr


def test_newline_in_a_name_makes_no_line_of_its_own(call, record):
    record(name="x", experiment="one\ntwo").run.finish()
    (line,) = [one for one in call("runs", "list").stdout.splitlines() if "two" in one]
    assert r"one\ntwo" in line


def test_name_that_looks_like_an_emoji_is_shown_as_it_is(call, record):
    record(name="x", experiment=":smile: [b]").run.finish()
    assert ":smile: [b]" in call("runs", "list").stdout


def test_name_that_the_encoding_lacks_is_spelled_out(tmp_path, record):
    record(name="x", experiment="größe 数").run.finish()
    done = subprocess.run(
        [sys.executable, "-m", "harness.cli", "runs", "list"],
        cwd=tmp_path,
        env={
            **os.environ,
            "PYTHONPATH": str(Path(tracking.__file__).parents[1]),
            "PYTHONIOENCODING": "ascii",
        },
        capture_output=True,
        text=True,
        check=True,
    )
    assert r"gr\xf6\xdfe \u6570" in done.stdout


# ------------------------------------------------------------------ export and verify


def test_export_writes_the_rows_of_runs(call, two, tmp_path):
    result = call("export", two[0].id, two[1].id, "--to", "both.parquet")
    assert result.output == "24 rows -> both.parquet\n"
    assert (tmp_path / "both.parquet").is_file()
    result = call("export", two[0].id, "--to", "a.csv", "--json")
    assert json.loads(result.output) == {"rows": 12, "path": "a.csv"}


def test_export_to_an_unknown_format_is_a_usage_error(call, two):
    result = call("export", two[0].id, "--to", "a.xlsx", code=2)
    assert "expected a path that ends in .parquet" in result.output


def test_verify_is_silent_where_all_is_equal(call, two):
    call("export", two[0].id, "--to", "a.parquet")
    result = call("verify", two[0].id, "--no-mlflow", "--file", "a.parquet")
    assert result.output == ""


@pytest.mark.slow
def test_verify_waits_once_for_a_server_that_does_not_answer(call, two, monkeypatch):
    with closing(socket.create_server(("127.0.0.1", 0))) as server:
        address = f"http://127.0.0.1:{server.getsockname()[1]}"
        monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
        monkeypatch.delenv("MLFLOW_HTTP_REQUEST_TIMEOUT", raising=False)
        words = ("verify", "--patience", "1", *(run.id for run in two))
        *errors, _ = call(*words, code=1).stderr.split("Run 'harness sync")
        server.setblocking(False)
        server.accept()[0].close()
        with pytest.raises(BlockingIOError):  # the second run asked nothing
            server.accept()
    assert len(errors) == 2
    assert all("read timeout=1" in error for error in errors)


def test_verify_names_rows_and_ends_with_1(call, two, tmp_path):
    call("export", two[0].id, "--to", "a.parquet")
    again = tracking.start(run_id=two[0].id, runs_dir=tmp_path / "runs", delivery=False)
    again.log_metric("late", 1.0, set="train", index=9)
    again.finish()
    words = ("verify", two[0].id, "--no-mlflow", "--file", "a.parquet")
    result = call(*words, code=1)
    (line,) = result.stdout.splitlines()
    assert line.startswith("missing in a.parquet: metrics/train/late at index 9")
    assert result.stderr.startswith(f"error: verify: run {two[0].id} expected equal")
    (found,) = json.loads(call(*words, "--json", code=1).stdout)
    assert found["is_equal"] is False
    assert found["mismatches"][0]["kind"] == "missing"
    assert found["num_rows"] == {"a.parquet": [13, 12]}
    again = tracking.start(run_id=two[0].id, runs_dir=tmp_path / "runs", delivery=False)
    again.log("metrics", "train", {f"m{i}": 1.0 for i in range(2000)}, index=9)
    again.finish()
    lines = call(*words, code=1).stdout.splitlines()
    assert len(lines) == 4
    assert lines[-1].startswith(
        "missing in a.parquet: 1,998 more, the last one metrics"
    )
    (found,) = json.loads(call(*words, "--json", code=1).stdout)
    assert len(found["mismatches"]) == 2001


def test_verify_goes_on_past_a_run_with_a_torn_file(call, two):
    torn = two[0].path / "artifacts" / "torn.parquet"
    torn.parent.mkdir(exist_ok=True)
    torn.write_bytes(b"PAR1")
    (two[1].path / "artifacts" / "of_parts.parquet").mkdir(parents=True)
    words = ("verify", "--no-mlflow", *(run.id for run in two))
    (line,) = call(*words, code=1).stderr.splitlines()
    assert line.startswith(f"error: verify: expected a Parquet file in {torn}, got ")
    (found,) = json.loads(call(*words, "--json", code=1).stdout)
    assert found["run"] == two[1].id


# ----------------------------------------------------------------------------- sync


@pytest.mark.slow
def test_sync_sends_the_row_that_mlflow_lost_and_verify_is_silent(
    call, two, store, deliver, tmp_path
):
    run = two[0].id
    deliver(two[0].path, store)
    with closing(sqlite3.connect(tmp_path / "mlflow.db")) as db, db:
        db.execute("DELETE FROM metrics WHERE key = 'train/loss' AND step = 3")
    assert call("sync", run).output == f"{run}: 1 rows sent, MLflow has all 10\n"
    assert call("verify", run).output == ""


def test_sync_without_a_server_tells_what_is_left(call, two, monkeypatch):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{port}")
    # A state that cannot be written, as on a full disk, is told all the same.
    (two[0].path / "delivery" / "state.json").mkdir(parents=True)
    names = [run.id for run in two]
    lines = call("sync", *names, "--patience", "0", code=1).stdout.splitlines()
    for line, name in zip(lines, names, strict=True):
        assert line.startswith(f"{name}: 12 rows still to send: ")
        assert "refused" in line


def test_sync_of_all_leaves_out_runs_that_are_not_to_be_delivered(call, two):
    result = call("sync")
    assert result.stdout == ""
    assert result.stderr.startswith("no runs that are sent to MLflow in ")


# ------------------------------------------------------------------------------- ui


def test_ui_of_a_server_only_tells_its_address(call, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:5001/")
    assert call("ui").output == (
        "http://127.0.0.1:5001/#/experiments/0/runs?workflowType=machine_learning"
        "&compareRunsMode=CHART\n"
    )


def test_ui_of_several_runs_shows_them_side_by_side(call, two, monkeypatch):
    address = "http://127.0.0.1:5001"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
    first, second = two
    for run, mlflow_id, uri in ((first, "a1", address), (second, None, address)):
        state = DeliveryState(
            tracking_uri=uri,
            experiment_id="7",
            mlflow_run_id=mlflow_id,
            run_path=str(run.path),
        )
        state.write(run.path)
    page = call("ui", first.id).output
    assert page.startswith(f"{address}/#/experiments/7/runs/a1/model-metrics?")
    assert "0<=x<=65535" in call("ui", first.id, "--port", "99999", code=2).stderr
    refused = call("ui", first.id, second.id, code=2).stderr
    assert f"expected a run that MLflow has, got {second.id}." in refused
    replace(state, mlflow_run_id="b2").write(second.path)
    page = call("ui", first.id, second.id).output.strip()
    query = urllib.parse.parse_qs(page.partition("?")[2])
    assert page.startswith(f"{address}/#/compare-runs?")
    assert query["runs"] == ['["a1", "b2"]']
    assert query["experiments"] == ['["7"]']


def test_ui_on_a_taken_port_is_refused(tmp_path):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(
            TrackingError, match=rf"expected port {port} .* Choose another"
        ):
            Server(f"sqlite:///{tmp_path}/mlflow.db", port)


@pytest.mark.slow
def test_server_that_does_not_come_up_says_why(tmp_path):
    with (
        pytest.raises(TrackingError, match="expected MLflow's server to answer"),
        Server("nonsense://", folder=tmp_path),
    ):
        pass


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ui_shows_the_page_until_it_is_interrupted(tmp_path, store, number):
    # A shell's job in the background, as these tests may be, is born deaf to Ctrl-C.
    code = (
        "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); "
        "from tracking.cli.commands import ui; ui()"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, "--port", "0"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(Path(tracking.__file__).parents[1])},
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    address = process.stdout.readline().strip()
    with urllib.request.urlopen(address, timeout=30) as answer:
        assert b"<html" in answer.read()
    os.kill(process.pid, number)
    assert process.wait(30) == 0
    process.stdout.close()
    with pytest.raises(OSError, match="refused"):
        urllib.request.urlopen(address, timeout=5)


# ------------------------------------------------------------------------- start-up


def test_commands_import_nothing_heavy_before_they_run():
    code = (
        "import sys; from tracking.cli import commands; "
        "heavy = {'pyarrow', 'numpy', 'mlflow', 'torch', 'rich'} & set(sys.modules); "
        "assert not heavy, heavy"
    )
    root = str(Path(tracking.__file__).parents[1])
    environment = {**os.environ, "PYTHONPATH": root}
    subprocess.run([sys.executable, "-c", code], env=environment, check=True)


def test_each_command_explains_itself_and_speaks_json(call):
    for name, one in group.commands.items():
        group_or_one = one.commands.values() if isinstance(one, click.Group) else [one]
        for leaf in group_or_one:
            assert leaf.help, name
            assert {"as_json", "runs_dir"} <= {option.name for option in leaf.params}


def test_list_goes_on_past_a_run_whose_manifest_is_spoilt(call, two):
    (two[0].path / "run.json").write_text("{")
    result = call("runs", "list", "--json")
    assert [one["id"] for one in json.loads(result.stdout)] == [two[1].id]
    assert "warning: " in result.stderr
    assert f"{two[0].id}/run.json: expected JSON" in result.stderr
