"""Ranks of the command ``harness``: how it starts them, and how they end."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import click

if TYPE_CHECKING:
    from harness.pytree import Options
    from tracking import PastRun


def launcher_options(command: Callable[..., None]) -> Callable[..., None]:
    """Add the options of DeepSpeed's launcher, by its own names."""
    for name, (kind, help_) in reversed(_LAUNCHER_OPTIONS.items()):
        # As in the other commands, and as DeepSpeed has it.
        flags = dict.fromkeys([f"--{name.replace('_', '-')}", f"--{name}"])
        more = {"is_flag": True} if kind is bool else {"type": kind}
        command = click.option(*flags, name, help=help_, **more)(command)
    return command


_LAUNCHER_OPTIONS: dict[str, tuple[object, str]] = {
    "num_gpus": (click.IntRange(min=1), "Ranks per machine."),
    "num_nodes": (click.IntRange(min=1), "Number of machines."),
    "include": (str, "Machines and devices to use, such as node0@node1:0,2."),
    "exclude": (str, "Machines and devices not to use."),
    "hostfile": (
        click.Path(path_type=Path),
        "File with one line 'name slots=N' per machine.",
    ),
    "master_addr": (str, "Address of rank 0."),
    "master_port": (click.IntRange(1, 65535), "Port of rank 0."),
    "launcher": (str, "How to start several machines: pdsh, openmpi, slurm, ..."),
    "launcher_args": (str, "Arguments of that program."),
    "node_rank": (int, "Number of this machine, with --no-ssh."),
    "ssh_port": (click.IntRange(1, 65535), "Port of ssh."),
    "venv_script": (str, "Script that activates the environment."),
    "bind_core_list": (str, "Cores to bind ranks to, such as 0-7,16-23."),
    "enable_each_rank_log": (str, "Folder for a log file of each rank."),
    "bind_cores_to_rank": (bool, "Bind each rank to its own cores."),
    "no_ssh": (bool, "Do not use ssh; run the command on each machine."),
    "no_ssh_check": (bool, "Do not check that machines answer by ssh."),
    "force_multi": (bool, "Use ssh even for one machine."),
}
"""Options of DeepSpeed's launcher: their types, True for a flag, and help."""

_BUILD_OPTIONS = (
    *("num_gpus", "num_nodes", "include", "exclude", "hostfile"),
    *("master_addr", "master_port"),
)
"""Those that ``build_launch_command`` has arguments for."""


def start_ranks(
    words: Sequence[str], options: Options, *, verbose: bool = False
) -> NoReturn:
    """Run a command of ``harness`` on each rank by DeepSpeed's launcher, and exit as it does."""
    from harness.accelerators.distributed import launcher  # noqa: PLC0415  imports torch

    build = {name: options[name] for name in _BUILD_OPTIONS if name in options}
    more = [
        f"--{name}" if value is True else f"--{name}={value}"
        for name, value in options.items()
        if name not in _BUILD_OPTIONS
    ]
    try:
        command = launcher.build_launch_command(
            ["-m", "harness.cli", *words],
            launcher_options=more,
            verbose=verbose,
            **build,
        )
        uses_ssh = str(options.get("launcher", "pdsh")).lower() == "pdsh"
        if "hostfile" in options and uses_ssh and not options.keys() & _WITHOUT_SSH:
            chosen = {name: build[name] for name in build if "master" not in name}
            hosts = launcher.choose_hosts(**chosen)
            launcher.check_hosts(hosts, options.get("ssh_port"))
    except ValueError as error:
        raise click.UsageError(str(error)) from error
    sys.exit(launcher.launch(command, options=options))


_WITHOUT_SSH = {"no_ssh", "no_ssh_check"}


@contextmanager
def end_with_ranks() -> Iterator[None]:
    """Let an error that ends several ranks be shown once.

    Wrong usage is shown by one rank of each machine, and a failure by the rank that fails
    first; the others end with it.
    """
    try:
        yield
    except click.UsageError:
        from harness.accelerators.distributed.environment import read_launch  # noqa: PLC0415  keeps --help quick

        if read_launch().local_rank:
            sys.exit(click.UsageError.exit_code)
        raise
    except Exception as error:
        from harness.accelerators.distributed.watchdog import Watchdog  # noqa: PLC0415  imports torch

        watchdog = Watchdog.find()
        if watchdog is not None and not watchdog.report(error):
            sys.exit(1)
        raise


def find_launch_options(past: PastRun, num_gpus: int | None) -> Options | None:
    """Options of the launcher to resume a run on as many ranks; None if none is needed.

    Parameters
    ----------
    num_gpus
        Number of ranks, on this machine; None for as many as before.
    """
    from harness.accelerators.distributed.environment import read_launch  # noqa: PLC0415  keeps --help quick

    here = read_launch()
    if here.world_size > 1 or here.by == "torchrun":  # this is one of the ranks
        return None
    if num_gpus is not None:
        return None if num_gpus == 1 else {"num_gpus": num_gpus}
    ranks = past.manifest.extra.get("fit_ranks") or {"world_size": 1}
    if ranks["world_size"] == 1:
        return None
    if ranks["options"]:
        return dict(ranks["options"])
    if ranks["local_world_size"] == ranks["world_size"]:
        return {"num_gpus": ranks["world_size"]}
    count = f"{ranks['world_size']} ranks, {ranks['local_world_size']} on this machine"
    msg = f"resume {past.id!r}: expected {count}, got no launcher."
    advice = f"Start them as before, with '-m harness.cli resume {past.id}', or pass"
    raise click.UsageError(f"{msg} {advice} --num-gpus for ranks on this machine.")


def is_main() -> bool:
    """Whether this rank is the one that prints and saves."""
    from harness.accelerators.distributed.environment import read_launch  # noqa: PLC0415  keeps --help quick

    return read_launch().rank == 0
