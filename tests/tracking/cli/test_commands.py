"""The commands: what they print, and how they end."""

from __future__ import annotations

import json
import os
import signal
import socket
import sqlite3
import subprocess
import sys
import urllib.request
from contextlib import closing
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

import tracking
from tracking.cli.commands import commands
from tracking.cli.group import CommandGroup
from tracking.errors import TrackingError
from tracking.mlflow_store.server import Server


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


@pytest.fixture
def two(record):
    """Two runs that have ended."""
    runs = []
    for lr in (0.1, 0.2):
        run = record(name=f"lr {lr}", params={"lr": lr, "same": 1}, note="A **note**.")
        run.log_curve(5, scale=lr)
        run.run.finish()
        runs.append(run.run)
    return runs


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


def test_list_of_an_empty_folder_is_empty(call, tmp_path):
    assert (
        json.loads(call("runs", "list", "--json", "--runs-dir", tmp_path).output) == []
    )


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
    (loss,) = [line.split() for line in output.splitlines() if "train/loss" in line]
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
        (line,) = call(*command.split()).stderr.splitlines()
        assert line.startswith("warning: ")
        assert f"{spoilt.name}/run.json" in line
        assert line.endswith("The run is skipped.")
    assert call("runs", "delete", "--yes", spoilt.name).exit_code == 0
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
    result = call("sync", two[0].id, "--patience", "0", code=1)
    assert result.output.startswith(f"{two[0].id}: 12 rows still to send: ")
    assert "refused" in result.output


def test_sync_of_all_leaves_out_runs_that_are_not_to_be_delivered(call, two):
    assert call("sync").output == ""


# ------------------------------------------------------------------------------- ui


def test_ui_of_a_server_only_tells_its_address(call, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:5001/")
    assert call("ui").output == (
        "http://127.0.0.1:5001/#/experiments/0/runs?workflowType=machine_learning"
        "&compareRunsMode=CHART\n"
    )


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
