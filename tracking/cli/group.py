"""The group of commands: how their failures, warnings and texts reach the terminal."""

from __future__ import annotations

import contextlib
import difflib
import sys
import sysconfig
import traceback
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click

from tracking.cli import render
from tracking.errors import TrackingWarning, escape_control


class CommandGroup(click.Group):
    """A click group whose failures print a line and hints; ``--debug`` shows the traceback."""

    def invoke(self, ctx: click.Context) -> object:
        """Run the command; map exceptions to exit codes 1 and 130."""
        for stream in (sys.stdout, sys.stderr):
            # Such as a latin-1 terminal, which cannot show every name.
            with contextlib.suppress(AttributeError, ValueError):
                stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
        try:
            with _print_warnings():
                return super().invoke(ctx)
        except click.ClickException as error:
            if isinstance(error, click.NoSuchOption):
                _suggest_option(error)
            error.message = escape_control(error.message)  # type: ignore[misc]
            raise
        except (click.exceptions.Exit, click.Abort):
            raise
        except KeyboardInterrupt:
            sys.exit(130)
        except Exception as error:
            has_no_reader = isinstance(error, BrokenPipeError) and not _is_stdout_read()
            if has_no_reader or ctx.params.get("debug"):
                raise  # click ends quietly when the reader, such as head, has ended
            render.echo(f"error: {format_error(error)}", err=True)
            sys.exit(1)


def _suggest_option(error: click.NoSuchOption) -> None:
    """Offer only near names; else, in commands that have it, how a function's is given."""
    near = difflib.get_close_matches(
        error.option_name, error.possibilities or (), 1, 0.7
    )
    error.possibilities = near  # type: ignore[misc]
    params = error.ctx.command.params if error.ctx else ()
    known = {name for param in params for name in param.opts}
    if not near and known.issuperset({"--opt", "--epochs"}):
        name = error.option_name.lstrip("-")
        ways = f"--opt {name}=VALUE, one of the function --set {name}=VALUE"
        advice = f"An option of the optimizer is given as {ways}."
        error.message = f"{error.message} {advice}"  # type: ignore[misc]


def _is_stdout_read() -> bool:
    """Whether what is left in stdout still reaches a reader; any other failure counts as yes."""
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        return False
    except (AttributeError, OSError, ValueError):
        pass
    return True


def format_error(error: Exception) -> str:
    """Format an exception and its notes as one line, with the place in the user's code.

    A hint of what to do has a line of its own.
    """
    text = str(error) or type(error).__name__
    given = [note.partition("hint: ")[::2] for note in getattr(error, "__notes__", [])]
    notes = ", ".join(note for note, _ in given if note)
    hints = "".join(f"\nhint: {hint}" for _, hint in given if hint)
    is_clear = isinstance(error, ValueError | TypeError | LookupError | OSError)
    is_clear = is_clear and type(error) is not KeyError  # its text is only the key
    is_clear = is_clear or ": expected " in text  # our own
    if not is_clear and not text.startswith(type(error).__name__):
        text = f"{type(error).__name__}: {text}"
    text = f"{text} ({notes})" if notes else text
    if place := find_user_code(error):
        text = f"{text} [{place}; --debug shows the traceback]"
    return text + hints


def find_user_code(error: Exception) -> str | None:
    """``file:line`` of the innermost call in the user's own code; None if there is none."""
    paths = sysconfig.get_paths()
    libraries = tuple(paths[key] for key in ("stdlib", "purelib", "platlib", "scripts"))
    found = None
    for frame, line in traceback.walk_tb(error.__traceback__):
        file, module = frame.f_code.co_filename, frame.f_globals.get("__name__", "")
        is_ours = module.partition(".")[0] in {"harness", "tracking"}
        if not is_ours and not file.startswith(("<", *libraries)):
            found = file, line
    if found is None:
        return None
    path = Path(found[0])
    is_below = path.is_relative_to(Path.cwd())
    return f"{path.relative_to(Path.cwd()) if is_below else path}:{found[1]}"


@contextlib.contextmanager
def _print_warnings() -> Iterator[None]:
    """Print warnings of tracking as one line each, without the place in the code."""
    with warnings.catch_warnings():
        warnings.simplefilter("default", TrackingWarning)
        show = warnings.showwarning

        def show_line(
            message: Warning | str, category: type[Warning], *more: Any, **named: Any
        ) -> None:
            if issubclass(category, TrackingWarning):
                render.echo(f"warning: {message}", err=True)
            else:
                show(message, category, *more, **named)

        warnings.showwarning = show_line
        yield
