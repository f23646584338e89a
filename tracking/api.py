"""Start a run, or continue one."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from tracking import capture
from tracking.delivery.options import check_options
from tracking.mlflow_store.keys import LATEST
from tracking.ranks import RankRun, announce_run, next_announcement, wait_for_run
from tracking.redaction import redact, strip_url
from tracking.run import Run, utc_now
from tracking.schema import check_name, check_path
from tracking.settings import read_rank, read_secrets
from tracking.store import (
    FORMAT,
    Manifest,
    create_run_dir,
    find_run,
    get_rank_dir,
    get_status,
    get_working_folder,
    remove_failures,
    runs_folder,
)


def start(
    *,
    experiment: str | None = None,
    name: str | None = None,
    params: Mapping[str, Any] | None = None,
    tags: Mapping[str, Any] | None = None,
    note: str | None = None,
    runs_dir: str | os.PathLike[str] | None = None,
    durability: Literal["process", "fsync"] = "process",
    delivery: bool | Mapping[str, Any] = True,
    save_diff: bool = True,
    rank: int | None = None,
    run_id: str | None = None,
    all_ranks: bool | None = None,
) -> Run:
    """Start a run, or continue one.

    Parameters
    ----------
    experiment
        Name of the MLflow experiment; None: MLflow's own default.
    name
        Readable name of the run; None: made from ``experiment`` and two random words. A
        run that is continued keeps its name and experiment.
    params, tags
        Logged at once, as by ``Run.log_params`` and ``Run.set_tags``.
    note
        Description in Markdown, which MLflow shows.
    runs_dir
        Folder of runs; None: ``HARNESS_RUNS``, else ``./runs``.
    durability
        ``"process"``: logged values survive if the process is killed. ``"fsync"``: they
        also survive a power cut, at the cost of one disk write for each row.
    delivery
        True: a separate process sends the records to MLflow, at most 10,000 points of each
        metric. A dict: the same, with options, e.g. ``{"per_key": None}`` for all points.
        False: nothing is sent to MLflow.
    save_diff
        Keep uncommitted changes of the code as the artifact ``code.diff``.
    rank : >= 0, or None
        Rank of this process. None: the rank that a launcher such as torchrun gave it, else
        0. All ranks of a launch share one run, in which only rank 0 writes the manifest and
        sends to MLflow. 0 gives each process its own run.
    run_id
        Run to join (on a rank above 0) or to continue (on rank 0). None: a new run, which
        rank 0 starts; other ranks of a launch wait for it.
    all_ranks
        Whether a rank other than 0 records everything that it logs. False: it records only
        what it logs with ``all_ranks=True``, and an exception that ends it. None: True if
        ``rank`` is given, False if it comes from the launcher.

    Returns
    -------
    a run, to be used as a context manager

    Raises
    ------
    OSError
        If the folder of runs cannot be written.
    RunBusyError
        If another process writes the records of this rank.
    RunNotFoundError
        If ``run_id`` names no run.
    TimeoutError
        On a rank above 0, if rank 0 starts no run.
    ValueError, TypeError
        If an argument is wrong.

    Examples
    --------
    >>> with start(experiment="digits", delivery=False) as run:
    ...     run.log("metrics", "train", {"loss": 0.31}, index=1, step=500)
    """
    check_start(**locals())
    options = dict(delivery) if isinstance(delivery, Mapping) else {}
    experiment, name, note = (
        text and redact(text, read_secrets()) for text in (experiment, name, note)
    )
    records_all = rank is not None if all_ranks is None else all_ranks
    rank, run_id, announcement = _find_place(rank, run_id, runs_folder(runs_dir))
    made = None
    run: Run
    if rank > 0:
        assert run_id is not None
        path = runs_folder(runs_dir) / run_id
        rank_dir = get_rank_dir(path, rank)
        made = None if rank_dir.exists() else rank_dir
        if records_all:
            run = Run(path, None, rank=rank, durability=durability)
        else:
            run = RankRun(path, rank=rank, durability=durability)
    elif run_id is not None:
        given = {"name": name, "experiment": experiment}
        run = _continue(find_run(run_id, runs_dir), durability, given)
    else:
        run = _start_new(runs_folder(runs_dir), experiment, name, durability, save_diff)
        made = run.path
    try:
        if run_id is not None:
            _go_behind_fits(run)
        run.log_params(params or {})
        run.set_tags(tags or {})
        if rank == 0:
            manifest = run.manifest
            manifest.note = note or manifest.note
            manifest.deliver = delivery is not False
            manifest.delivery = options or manifest.delivery
            manifest.mlflow = manifest.mlflow or _active_mlflow_run()
            run._start_capture(save_diff=save_diff and run_id is None)
            run.save_manifest()
            remove_failures(run.path)
    except BaseException:  # leaves nothing of it: no thread, lock or new folder
        run._abandon()
        if made is not None:
            shutil.rmtree(made, ignore_errors=True)
        raise
    if announcement is not None:
        announce_run(announcement, run.id)
    if rank == 0 and delivery is not False:
        run.deliver(is_new=run_id is None)
    return run


def _find_place(
    rank: int | None, run_id: str | None, runs: Path
) -> tuple[int, str | None, Path | None]:
    """Return the rank, the run to join or continue, and where rank 0 announces a new one."""
    launched = read_rank() if rank is None else None
    if launched is None:
        rank = rank or 0
        if rank < 0 or (rank > 0 and run_id is None):
            raise ValueError(
                f"start(rank={rank}): expected rank 0, or a run_id to join, got "
                f"run_id={run_id!r}. Start on rank 0 and pass its run.id to the others."
            )
        return rank, run_id, None
    if run_id is not None:
        return launched.rank, run_id, None
    path = next_announcement(runs, launched)
    if launched.rank > 0:
        return launched.rank, wait_for_run(path, launched.rank), None
    return 0, None, path


def check_start(**arguments: Any) -> None:
    """Check arguments of ``start``, so that ranks may refuse them before one starts a run."""
    for word in ("experiment", "name", "run_id", "note"):
        if arguments.get(word) is not None:
            _check_text(word, arguments[word])
    for word in ("params", "tags"):
        given = arguments.get(word)
        if given is not None and not isinstance(given, Mapping):
            raise TypeError(
                f"start({word}): expected a dictionary, got {given!r}. "
                f"Use for example {word}={{'lr': 0.1}}."
            )
    if (runs_dir := arguments.get("runs_dir")) is not None:
        check_path(runs_dir, "start(runs_dir)")
        if not str(runs_dir).strip() or "\0" in str(runs_dir):
            raise ValueError(
                f"start(runs_dir): expected a path, got {runs_dir!r}. "
                "Leave it out for HARNESS_RUNS or ./runs, or use '.' for this folder."
            )
    durability = arguments.get("durability", "process")
    if durability not in ("process", "fsync"):
        raise ValueError(
            f"start(durability): expected 'process' or 'fsync', got {durability!r}. "
            "Choose one of the two."
        )
    _check_delivery(arguments.get("delivery", True))
    _check_options(**arguments)


def _check_text(word: str, text: object) -> None:
    check_name(text, word, "start")
    if word != "note" and not str(text).strip():
        raise ValueError(
            f"start({word}): expected a name, got {text!r}. "
            "Leave it out for the default."
        )


def _go_behind_fits(run: Run) -> None:
    """Leave the fit of a process that was killed; a resume goes back into it.

    The records of a run with more than one fit, or of an earlier version, are read for that.
    """
    num_fits = None if isinstance(run, RankRun) else run.manifest.num_fits
    if num_fits is None:
        run.restore_indices()
        run.end_fit()
    else:
        run.restore_indices_later(num_fits)


def _check_options(
    save_diff: object = True, rank: object = None, all_ranks: object = None, **_: object
) -> None:
    if all_ranks is not None and not isinstance(all_ranks, bool):
        raise TypeError(
            f"start(all_ranks): expected True, False or None, got {all_ranks!r}. "
            "Leave it out to let rank 0 record for the ranks of a launch."
        )
    if not isinstance(save_diff, bool):
        raise TypeError(
            f"start(save_diff): expected True or False, got {save_diff!r}. "
            "Use False to keep no changes of the code."
        )
    if rank is not None and (not isinstance(rank, int) or isinstance(rank, bool)):
        raise TypeError(
            f"start(rank): expected a whole number, got {rank!r}. "
            "Leave it out to take that of the launcher."
        )


def _check_delivery(delivery: object) -> None:
    """Check whether and how a run is to be delivered."""
    if isinstance(delivery, bool):
        return
    if not isinstance(delivery, Mapping):
        raise TypeError(
            f"start(delivery=): expected True, False or a dict of options, got "
            f"{delivery!r}. Use for example delivery={{'per_key': None}}."
        )
    check_options(delivery)


def _start_new(
    runs: Path,
    experiment: str | None,
    name: str | None,
    durability: Literal["process", "fsync"],
    save_diff: bool,
) -> Run:
    """Create a run; its folder is removed again if that fails."""
    path, name = create_run_dir(runs, experiment, name)
    manifest = Manifest(
        id=path.name,
        name=name,
        path=str(path),
        experiment=experiment,
        created=utc_now(),
        command=capture.command(),
        cwd=str(get_working_folder()),
        pid=os.getpid(),
        keys=LATEST,
        num_fits=1,
        **capture.machine(),
    )
    try:
        return Run(path, manifest, durability=durability)
    except BaseException as error:
        shutil.rmtree(path, ignore_errors=True)
        if isinstance(error, OSError) and error.filename is None and error.errno:
            raise type(error)(
                error.errno,
                f"start(runs_dir={str(runs)!r}): expected a disk that can be written, got "
                f"{error.strerror}. Free some space, or pass another folder.",
            ) from error
        raise


def _continue(
    path: Path, durability: Literal["process", "fsync"], given: Mapping[str, str | None]
) -> Run:
    """Continue a run that has finished, failed or was killed."""
    manifest = Manifest.read(path)
    for word, text in given.items():
        own = getattr(manifest, word)
        if text is not None and text != own:
            raise ValueError(
                f"start({word}): expected that of run {path.name!r}, {own!r}, got "
                f"{text!r}. Leave it out: a run keeps it when it is continued."
            )
    earlier = manifest.adopt_environment(path)
    resumed = {
        "time": utc_now(),
        "status": get_status(path, manifest),
        "command": capture.command(),
        "host": capture.machine()["host"],
        "pid": os.getpid(),
    }
    run = Run(path, manifest, durability=durability)
    manifest.resumed.append(resumed)
    manifest.status, manifest.ended, manifest.error = "running", None, None
    manifest.format = FORMAT
    manifest.pid = os.getpid()
    if earlier is not None and earlier.diff:
        run.log_text(earlier.diff, "code.diff")
    return run


def _active_mlflow_run() -> dict[str, Any]:
    """The caller's active MLflow run, if any; this never imports MLflow."""
    mlflow = sys.modules.get("mlflow")
    if mlflow is None or not hasattr(mlflow, "active_run"):
        return {}
    active = mlflow.active_run()
    if active is None:
        return {}
    uri = strip_url(str(mlflow.get_tracking_uri()))
    return {"run_id": active.info.run_id, "borrowed": True, "tracking_uri": uri}
