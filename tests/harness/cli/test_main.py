"""The group of commands: its help, how it ends on errors, and the doctor."""

from __future__ import annotations

import json
import re
import runpy

import click
import pytest

from harness.cli.main import main
from harness.errors import ExperimentError
from tracking.cli.group import format_error


def walk(context: click.Context):
    """Contexts of a command and of all commands below it, 80 columns wide."""
    yield context
    if isinstance(context.command, click.Group):
        for name in context.command.list_commands(context):
            command = context.command.get_command(context, name)
            yield from walk(click.Context(command, context, name))


ROOT = click.Context(
    main, info_name="harness", terminal_width=80, **main.context_settings
)


def test_help_fits_its_column_and_has_a_short_option():
    for context in walk(ROOT):
        shown = context.get_help()
        lines, commands = shown.splitlines(), shown.partition("\nCommands:\n")[2]
        assert "..." not in commands, context.command_path
        assert any(line.lstrip().startswith("-h, --help") for line in lines), shown


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("--lr", "3"), "of the optimizer is given as --opt lr=VALUE, one of the func"),
        # click 8.2 writes it without quotes.
        (("--epoch", "3"), "--epoch'?[.]? Did you mean '?--epochs"),
    ],
)
def test_unknown_option_is_answered_with_the_near_one_or_the_way(call, words, expected):
    shown = " ".join(call("fit", "x.py:x", *words).output.split())
    assert re.search(expected, shown)
    assert "--help" not in shown.partition("Did you mean")[2]


def test_unknown_option_of_another_command_gets_no_advice(call):
    assert "--opt epochs" not in call("resume", "x", "--epochs", "3").output


def test_failure_shows_notes_on_its_line_and_hints_below():
    error = RuntimeError("no")
    for note in ("in Net", "epoch 1", "hint: try this", "hint: or that"):
        error.add_note(note)
    assert format_error(error) == (
        "RuntimeError: no (in Net, epoch 1)\nhint: try this\nhint: or that"
    )
    assert format_error(ExperimentError("fit: expected a, got b.")).startswith("fit:")


def test_package_runs_as_the_command(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["harness", "--version"])
    with pytest.raises(SystemExit) as caught:
        runpy.run_module("harness", run_name="__main__")
    assert caught.value.code == 0
    assert "version" in capsys.readouterr().out


def test_help_of_the_group_describes_every_command(call):
    shown = call("-h").output
    for name, command in main.commands.items():
        assert f"  {name} " in shown
        assert command.get_short_help_str(64) in shown


def test_failure_ends_with_1_and_one_line_unless_debug_is_given(call, folder):
    done = call("fit", "exp_cli.py:experiment", "--set", "fail=true", "--quiet")
    assert done.exit_code == 1
    (line,) = [line for line in done.output.splitlines() if line.startswith("error: ")]
    assert "equal length" in line
    with pytest.raises(ValueError, match="equal length"):
        call("--debug", "fit", "exp_cli.py:experiment", "--set", "fail=true")


@pytest.mark.slow
def test_doctor_reports_each_part(call, folder):
    done = call("doctor", "--json")
    found = {item["name"]: item for item in json.loads(done.output)}
    assert {"devices", "disk"} <= found.keys()
    assert done.exit_code == any(item["state"] == "broken" for item in found.values())
    for item in found.values():
        assert item["state"] == "ok" or item["advice"]
