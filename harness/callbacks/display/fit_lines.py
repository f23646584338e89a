"""The first lines of a fit, which say what is trained on what, and how long it takes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch.nn.parameter import is_lazy

from harness.data.loaders import Loader, describe_data
from harness.data.pace import NO_LIMIT, count_batches
from harness.reshard.meta_parameters import count_elements

if TYPE_CHECKING:
    from harness.context import Context


def describe_start(ctx: Context) -> list[list[tuple[str, str]]]:
    """Return the lines that say what is trained, where, on which data, and into which run."""
    assert ctx.train_data is not None
    sets = {"train": ctx.train_data, **ctx.valid_sets}
    data = [f"{name} {describe_loader(loader)}" for name, loader in sets.items()]
    lines = [_list_pieces("model", describe_model(ctx), ", ")]
    lines.append(_list_pieces("data", data, "; "))
    if ctx.run.id is not None:
        lines.append([("", f"run   {ctx.run.id}")])
    resume = ctx.resume
    if resume is not None and resume.is_exact:
        at = resume.position
        where = f"in epoch {at.epoch}, after batch {at.iter}"
        if at.phase == "epoch":
            where = f"after epoch {at.epoch}"
        lines.append([("", f"from  checkpoint {where}")])
    return lines


def _list_pieces(title: str, words: Sequence[str], gap: str) -> list[tuple[str, str]]:
    first, *more = words
    return [("", f"{title:<5} {first}"), *((gap, word) for word in more)]


def describe_model(ctx: Context) -> list[str]:
    """Return the model's class and size, and the device, precision and ranks."""
    accelerator = ctx.accelerator
    words = [type(ctx.model).__name__]
    if not any(map(is_lazy, ctx.model.parameters())):
        words.append(f"{count_elements(ctx.model):,} parameters")
    words += [str(accelerator.device), accelerator.precision]
    if accelerator.world_size > 1:
        words.append(f"{accelerator.world_size} ranks")
    if accelerator.accumulate > 1:
        words.append(f"{accelerator.accumulate} batches a step")
    return words


def describe_loader(loader: Loader) -> str:
    """Return rows and batches of a loader, as far as they are known."""
    about = describe_data(loader)
    words = [f"{about['rows']:,} rows"] if "rows" in about else []
    if about["batches"] is not None:
        plural = "" if about["batches"] == 1 else "es"
        words.append(f"{about['batches']:,} batch{plural}")
    text = " in ".join(words) or "of unknown length"
    size = about["batch_size"]
    text += f" of {size}" if words and size is not None else ""
    # Reading gets dearer with each rank; ``sharded = True`` on the data ends that.
    return (
        f"{text}, all read by each rank"
        if getattr(loader, "reads_all", False)
        else text
    )


def estimate_left_s(
    ctx: Context, done: int, rate: float, epochs: int | None, epoch_s: float | None
) -> float | None:
    """Estimate how long the fit still takes, in seconds; None if it is not known.

    Parameters
    ----------
    done
        Batches of the present epoch that are done.
    epoch_s
        Mean time of the finished epochs with their validation, in seconds; None before.
    """
    total = count_batches(ctx)
    if epochs is None or epochs >= NO_LIMIT or not total or rate <= 0:
        return None
    more = max(epochs - (ctx.epoch or 1), 0)
    if epoch_s is None:
        epoch_s = total / rate
    return (total - done) / rate + more * epoch_s
