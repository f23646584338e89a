"""How a fit is recorded: which run it goes into, and what that run says of it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tracking
from harness.context import Context
from harness.data.loaders import describe
from harness.records import Nobody
from tracking import capture
from tracking.schema import flatten_value

if TYPE_CHECKING:
    from harness.learner import Learner


class Unrecorded(Nobody):
    """The recorder of a fit without tracking: checks values as a run would, keeps none."""

    def log(self, what: str, set: str, value: Any, *_: Any, **__: Any) -> None:
        """Check the value."""
        flatten_value(value, f"log({what!r}, {set!r})")

    def log_step(
        self, values: Mapping[str, Any], *_: Any, set: str = "train", **__: Any
    ) -> None:
        """Check the values."""
        flatten_value(values, f"log_step(set={set!r})")


@contextmanager
def tracked(ctx: Context, tracker: Any) -> Iterator[tracking.Run | None]:
    """Give the context its recorder, and the run behind it for as long as the fit lasts.

    Parameters
    ----------
    ctx
        Context of the fit.
    tracker
        As in ``Learner.fit``.

    Raises
    ------
    TypeError
        If `tracker` is none of the forms that ``Learner.fit`` names.
    """
    if tracker is False:
        ctx.recorder = Unrecorded()
        yield None
        return
    if isinstance(tracker, tracking.Run):
        ctx.recorder = tracker
        yield tracker
        return
    if tracker is None or tracker is True:
        tracker = {}
    if not isinstance(tracker, Mapping):
        msg = f"fit(tracker): expected None, False, a dict or a Run, got {tracker!r}."
        raise TypeError(f"{msg} A dict holds arguments of tracking.start().")
    assert ctx.accelerator is not None
    rank, share = ctx.accelerator.rank, ctx.accelerator.broadcast
    options = dict(tracker) | earlier_run(ctx)
    if rank == 0:
        run = tracking.start(**options)
        share(run.id)
    else:
        run = tracking.start(**options | {"rank": rank, "run_id": share(None)})
    with run:
        ctx.recorder = run
        yield run
        if ctx.stop_signal is not None:
            run.finish("killed")


def earlier_run(ctx: Context) -> dict[str, Any]:
    """Arguments that open the run of the checkpoint that the fit goes on from."""
    resume = ctx.resume
    if resume is None or not resume.is_exact:
        return {}
    home = resume.place.parent.parent
    run = resume.manifest["run"]
    for path in (home, Path(str(run.get("path") or home))):
        if path.name == run.get("id") and path.is_dir():
            return {"run_id": path.name, "runs_dir": path.parent}
    return {}


def code_commit() -> str | None:
    """The git commit of the working folder, with a mark if there are changes."""
    summary = capture.code_state(Path.cwd()).summary or {}
    mark = " (changed)" if summary.get("dirty") else ""
    return f"{summary['commit']}{mark}" if summary.get("commit") else None


def describe_fit(
    run: tracking.Run, ctx: Context, learner: Learner, seed: int | None
) -> None:
    """Record what is trained, on what data, how: params, dataset inputs, the model's form."""
    accelerator, model = ctx.accelerator, ctx.model
    assert accelerator is not None and ctx.train_data is not None
    if not accelerator.is_main:
        return
    opt = next(iter(ctx.optimizers.values()))
    params = {
        "model": type(model).__name__,
        "num_params": sum(param.numel() for param in model.parameters()),
        "optimizer": type(getattr(opt, "optimizer", opt)).__name__,
        "loss": _name(ctx.loss_fn),
        "epochs": ctx.max_epochs,
        "batch_size": ctx.train_data.batch_size,
        "accumulate": accelerator.accumulate,
        "accelerator": type(accelerator).__name__,
        "device": str(accelerator.device),
        "world_size": accelerator.world_size,
        "seed": seed,
    }
    if ctx.min_epochs:
        params["min_epochs"] = ctx.min_epochs
    params |= dict(learner.hparams)
    params |= {f"opt.{name}": value for name, value in learner.opt_hparams.items()}
    run.log_params({name: as_param(value) for name, value in params.items()})
    run.log_input("train", "training", **describe(ctx.train_data))
    if ctx.valid_data is not None:
        run.log_input("valid", "validation", **describe(ctx.valid_data))
    run.log_text(str(model), "model.txt")


def as_param(value: Any) -> Any:
    """The value if it can be a param as it is, else its text."""
    return value if isinstance(value, str | int | float | bool) else str(value)


def _name(thing: Any) -> str:
    """Class or function name of a loss."""
    if thing is None:
        return "model.step"
    return getattr(thing, "__name__", type(thing).__name__)
