"""The command ``export-weights``, which writes the weights of a checkpoint."""

from __future__ import annotations

from pathlib import Path

import click

from tracking.cli import render
from tracking.cli.commands import open_run, runs_dir_option


@click.command("export-weights")
@click.argument("source", metavar="CHECKPOINT")
@click.argument("to", metavar="OUT", type=click.Path(path_type=Path))
@click.option("--shard-size", "shard_gb", type=click.FloatRange(min=0, min_open=True),
              default=5.0, show_default=True, metavar="GB",
              help="Size of each file in a folder.")  # fmt: skip
@runs_dir_option
def export_weights(
    source: str, to: Path, shard_gb: float, runs_dir: Path | None
) -> None:
    """Write the weights of CHECKPOINT into safetensors files.

    CHECKPOINT is a checkpoint, saved on any number of ranks, a folder of checkpoints, of
    which the newest is taken, or a run. OUT is a .safetensors file, or a folder for several
    files with an index, as Hugging Face's libraries read them. One parameter at a time is in
    memory.
    """
    from harness.checkpoint.whole.export import export_weights as write  # noqa: PLC0415  imports torch

    path = Path(source)
    if not path.exists():
        path = open_run(source, runs_dir).path
    found = write(path, to, max(1, int(shard_gb * 1e9)))
    render.echo(f"{found} -> {to}")
