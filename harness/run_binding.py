"""Tracking of a fit: which run records it, and the description that the run keeps."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import TypeAlias

from torch import Tensor
from torch.nn.parameter import is_lazy

import tracking
from harness.accelerators.base import Accelerator
from harness.checkpoint.state import begin_fit
from harness.checkpoint.weights import WeightsReport
from harness.checks.calls import check_arguments
from harness.context import Context
from harness.data.loaders import describe_data
from harness.data.pace import NO_LIMIT, count_epochs, list_limits
from harness.export.summary import ShapeRecorder, summarize
from harness.pytree import Options
from harness.records import NullRun
from harness.reshard.meta_parameters import count_elements
from tracking import capture
from tracking.errors import RunClosedError, escape_control, write_stderr

# Arrow takes a quarter of a second to import; what needs it is imported when a fit starts.
Tracker: TypeAlias = "tracking.Run | Mapping[str, object] | bool | None"
"""Where a fit is recorded; see ``Learner.fit``."""


def check_tracker(tracker: object) -> None:
    """Check the argument of ``Learner.fit``."""
    is_plain = tracker is None or isinstance(tracker, bool | Mapping)
    if not is_plain and not isinstance(tracker, tracking.Run):
        msg = f"fit(tracker): expected None, False, a dict or a Run, got {tracker!r}."
        raise TypeError(f"{msg} A dict holds arguments of tracking.start().")
    if isinstance(tracker, tracking.Run) and tracker.status != "running":
        msg = (
            f"fit(tracker): expected a run that is open, got {tracker.id!r}, which has"
        )
        raise tracking.RunClosedError(f"{msg} finished. Fit before it ends.")
    if isinstance(tracker, Mapping):
        from tracking.api import check_start  # noqa: PLC0415  imports Arrow

        check_arguments("fit(tracker)", tracking.start, tracker)
        check_start(**tracker)


def make_null_run() -> NullRun:
    """Make the run of a call without tracking; it refuses what a real run would refuse."""
    return NullRun(_check_value, _check_item)


def _check_value(value: object, place: str) -> None:
    from tracking.schema import flatten_value  # noqa: PLC0415  imports Arrow

    flatten_value(value, place)


def _check_item(call: str, name: str, value: object, **counts: int) -> None:
    from tracking.artifact_logger import check_item  # noqa: PLC0415  imports Arrow

    check_item(call, name, value, **counts)


def prepare_tracking(tracker: Tracker, accelerator: Accelerator) -> None:
    """Let MLflow be imported beside torch's compiler, which the first optimizer imports.

    Each takes more than a second. A later fit of the process finds both imported.
    """
    if isinstance(tracker, tracking.Run) or tracker is False:
        return
    given = tracker if isinstance(tracker, Mapping) else {}
    is_delivered = "run_id" not in given and given.get("delivery") is not False
    if is_delivered and accelerator.is_main and "torch._dynamo" not in sys.modules:
        from tracking.delivery.waiting import prepare_delivery  # noqa: PLC0415  Arrow

        prepare_delivery()


@contextmanager
def start_tracking(ctx: Context, tracker: Tracker) -> Iterator[None]:
    """Set ``ctx.run`` to the run that records the fit, and finish it after the block."""
    if tracker is False:
        ctx.run = make_null_run()
        yield
        return
    if isinstance(tracker, tracking.Run):
        with count_fit(ctx, tracker):
            yield
        return
    given = tracker if isinstance(tracker, Mapping) else {}
    rank, share = ctx.accelerator.rank, ctx.accelerator.broadcast
    options: Options = {"all_ranks": False, **given}
    if resumed := find_resumed_run(ctx):  # which keeps its name, whatever is given now
        options |= {"name": None, "experiment": None, **resumed}
    if rank == 0:
        run = tracking.start(**options | {"rank": 0})
        share(run.id)
    else:
        run = tracking.start(**options | {"rank": rank, "run_id": share(None)})
    with run:
        with count_fit(ctx, run) if "run_id" in options else nullcontext():
            ctx.run = run
            yield
        if ctx.stop_signal is not None:
            run.finish("killed")


@contextmanager
def count_fit(ctx: Context, run: tracking.Run) -> Iterator[None]:
    """Count the fit as another one of a run, unless it continues one that the run has."""
    ctx.run, outer = run, run.fit
    if ctx.resume is None or not ctx.resume.continues(run):
        begin_fit(ctx)
    try:
        yield
    finally:
        with suppress(RunClosedError):  # a callback may finish the run
            run.end_fit(outer)


def find_resumed_run(ctx: Context) -> Options:
    """Return arguments that open the run that the fit resumes; none if there is no run."""
    resume = ctx.resume
    if resume is None or not resume.is_exact:
        return {}
    home = resume.path.parent.parent
    run = resume.manifest.run
    for path in (home, Path(str(run.path or home))):
        if path.name == run.id and path.is_dir():
            return {"run_id": path.name, "runs_dir": path.parent}
    return {}


def get_code_commit() -> str | None:
    """Return the git commit of the working folder, marked if there are changes."""
    summary = capture.code_summary(Path.cwd()) or {}
    mark = " (changed)" if summary.get("dirty") else ""
    return f"{summary['commit']}{mark}" if summary.get("commit") else None


def log_description(ctx: Context, seed: int | None) -> None:
    """Log what is trained on what data: params, dataset inputs and the model's layers."""
    accelerator, model, run = ctx.accelerator, ctx.model, ctx.run
    assert ctx.train_data is not None
    if not accelerator.is_main:
        return
    opt = next(iter(ctx.optimizers.values()))
    is_known = not any(is_lazy(param) for param in model.parameters())
    params: Options = {"model": type(model).__name__}
    if is_known:
        params["num_params"] = count_elements(model)
    params |= {
        "optimizer": type(getattr(opt, "optimizer", opt)).__name__,
        "loss": _name_loss(ctx.loss_fn),
        **describe_pace(ctx),
        "batch_size": ctx.train_data.batch_size,
        "accumulate": accelerator.accumulate,
        "accelerator": type(accelerator).__name__,
        "device": str(accelerator.device),
        **(
            {}
            if accelerator.precision == "fp32"
            else {"precision": accelerator.precision}
        ),
        "world_size": accelerator.world_size,
        "seed": seed,
    }
    if ctx.min_epochs:
        params["min_epochs"] = ctx.min_epochs
    params |= ctx.hparams
    params |= {f"opt.{name}": value for name, value in ctx.opt_hparams.items()}
    run.log_params({name: as_param(value) for name, value in params.items()})
    run.log_input("train", "training", **describe_data(ctx.train_data))
    for name, loader in ctx.valid_sets.items():
        run.log_input(name, "validation", **describe_data(loader))
    _log_model(ctx, {})


@contextmanager
def record_shapes(ctx: Context) -> Iterator[None]:
    """Describe the model again after the block, with shapes of its first call in there.

    They are left out of a compiled model, for which a hook would be part of the graph.
    """
    is_recorded = ctx.run.id is not None and ctx.accelerator.is_main
    if not is_recorded or ctx.model._compiled_call_impl is not None:
        yield
        return
    recorder = ShapeRecorder()
    recorder.attach(ctx.model)
    try:
        yield
    finally:
        recorder.detach()
    if recorder.shapes:
        _log_model(ctx, recorder.shapes)


def _log_model(ctx: Context, shapes: Mapping[str, str]) -> None:
    text = f"{summarize(ctx.model, shapes=shapes)}\n\n{ctx.model}\n"
    ctx.run.log_text(text, name_file(ctx, "model"))


def report_start(ctx: Context, name: str, report: WeightsReport) -> None:
    """Record which weights the fit started from, and show it where progress is shown."""
    if not ctx.accelerator.is_main:
        return
    lines = [f"fit started from {name}: {report}"]
    if ctx.verbose:
        write_stderr(f"{escape_control(lines[0])}\n")
    for kind in ("loaded", "missing", "unexpected", "mismatched"):
        names = getattr(report, kind)
        lines += [f"\n{kind}:", *(f"  {own}" for own in names)] if names else []
    file = name_file(ctx, "start")
    ctx.run.log_text("\n".join(lines) + "\n", file)
    ctx.run.set_tags({"started_from": name})


def describe_pace(ctx: Context) -> Options:
    """What was asked for about epochs, steps, validation and batches."""
    pace, found = ctx.pace, dict[str, object]()
    epochs = ctx.max_epochs if ctx.max_epochs < NO_LIMIT else count_epochs(ctx)
    if epochs is not None:
        found["epochs"] = epochs
    if pace.max_steps is not None:
        found["max_steps"] = pace.max_steps
    if pace.is_given:
        found["valid_every"] = str(pace)
    if limits := list_limits(ctx):
        found["limit_batches"] = limits
    return found


def as_param(value: object) -> str | int | float | bool:
    """Return the value if it can be a param as it is, or else its text."""
    return value if isinstance(value, str | int | float | bool) else str(value)


def name_file(ctx: Context, stem: str) -> str:
    """Return the name of a text file of this fit, which other fits of its run do not take."""
    from tracking.journal.fits import name_in_fit  # noqa: PLC0415  imports Arrow

    return f"{name_in_fit(stem, ctx.run.fit)}.txt"


def _name_loss(loss: Callable[..., Tensor] | None) -> str:
    if loss is None:
        return "model.step"
    return getattr(loss, "__name__", type(loss).__name__)


def describe_next(run: tracking.Run | NullRun) -> list[str]:
    """Return the lines that say where a run is and what to type next; none without a run."""
    if run.id is None or isinstance(run, NullRun):
        return []
    from tracking.delivery.state import DeliveryState  # noqa: PLC0415  imports Arrow
    from tracking.store import runs_folder  # noqa: PLC0415  imports Arrow

    is_default = run.path.parent == runs_folder()
    name = run.id if is_default else shorten_path(run.path)
    lines = [f"run   {shorten_path(run.path)}"]
    state = DeliveryState.read_or_none(run.path)
    if state is not None and state.page:
        lines.append(f"page  {state.page}")
    lines.append(f"next  harness runs show {name}")
    if run.manifest.deliver:
        lines.append(f"      harness ui {name}")
    return lines


def shorten_path(path: Path) -> str:
    """Return the path from the working folder, if it is inside of it."""
    near = os.path.relpath(path)
    return str(path) if near.startswith("..") else near
