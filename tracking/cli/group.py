"""The group of commands: how their failures, warnings and texts reach the terminal."""

from __future__ import annotations

import contextlib
import sys
import warnings
from collections.abc import Iterator
from typing import Any

import click

from tracking.cli import render
from tracking.errors import TrackingWarning, escape_control


class CommandGroup(click.Group):
    """A click group whose failures print one line; ``--debug`` shows the traceback."""

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
            error.message = escape_control(error.message)  # type: ignore[misc]
            raise
        except (click.exceptions.Exit, click.Abort):
            raise
        except KeyboardInterrupt:
            sys.exit(130)
        except Exception as error:
            if ctx.params.get("debug"):
                raise
            render.echo(f"error: {format_error(error)}", err=True)
            sys.exit(1)


def format_error(error: Exception) -> str:
    """Format an exception and its notes as one line."""
    text = str(error) or type(error).__name__
    notes = " ".join(getattr(error, "__notes__", []))
    is_clear = isinstance(error, ValueError | TypeError | LookupError | OSError)
    if not is_clear and not text.startswith(type(error).__name__):
        text = f"{type(error).__name__}: {text}"
    return f"{text} ({notes})" if notes else text


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
