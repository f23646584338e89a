"""How long a fit trains, how often it validates, and how many batches it takes of each pass."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from numbers import Integral
from typing import TYPE_CHECKING, Any, Literal

from harness.checks.model import get_method
from harness.checks.values import check_count, check_limit, parse_epochs, parse_every
from harness.data.loaders import num_batches
from harness.data.workers import iter_batches
from harness.events import nearest

if TYPE_CHECKING:
    from harness.context import Context

NO_LIMIT = 999_999_999
"""``max_epochs`` of a fit whose steps decide when it ends."""

DEFAULT_EPOCHS = 10


@dataclass(frozen=True, kw_only=True)
class Pace:
    """When a fit validates and ends, counted in optimizer steps as ``ctx.step`` counts them.

    Attributes
    ----------
    max_steps : >= 1
        Steps after which the fit ends; None: epochs decide.
    every : >= 1
        Epochs or steps from one validation to the next.
    unit
        Whether `every` counts epochs or steps. Metrics are indexed by it too.
    is_given
        Whether the user asked for it. Then training draws the same random numbers however
        often the fit validates.
    """

    max_steps: int | None = None
    every: int = 1
    unit: Literal["epoch", "step"] = "epoch"
    is_given: bool = False

    def __str__(self) -> str:
        return f"{self.every} {self.unit}{'s' if self.every > 1 else ''}"

    def is_over(self, step: int) -> bool:
        """Whether the fit has made all of its steps."""
        return self.max_steps is not None and step >= self.max_steps

    def is_crossed(self, before: int, step: int) -> bool:
        """Whether a validation by steps is due after steps from `before` to `step`."""
        return step // self.every > before // self.every


def parse_pace(
    max_steps: object, valid_every: object, epochs: tuple[int, int], *, validates: bool
) -> Pace:
    """Return what ``fit(max_steps, valid_every)`` ask for.

    Parameters
    ----------
    valid_every
        A number of epochs, ``"2 epochs"``, ``"500 steps"``, or None for every epoch.
    """
    if max_steps is not None:
        advice = "Leave it out to count epochs alone."
        check_count("fit(max_steps)", max_steps, 1, advice)
    steps: int | None = None if max_steps is None else int(max_steps)  # type: ignore[call-overload]
    if valid_every is None:
        return Pace(max_steps=steps)
    every, unit = parse_every(valid_every)
    if not validates:
        msg = (
            f"fit(valid_every): expected validation data, got none for {valid_every!r}."
        )
        raise ValueError(f"{msg} Pass valid_data=..., or leave it out.")
    last = epochs[1] if unit == "epoch" else steps
    if last is not None and every > last:
        whole = f"{last} {unit}{'s' if last > 1 else ''}"
        msg = f"fit(valid_every): expected at most the {whole} of this fit"
        advice = f"For steps write '{every} steps'." if unit == "epoch" else "Lower it."
        raise ValueError(f"{msg}, got {valid_every!r}. {advice}")
    return Pace(max_steps=steps, every=every, unit=unit, is_given=True)


def fill_epochs(epochs: object, max_steps: object) -> tuple[int, int]:
    """Return ``(min_epochs, max_epochs)``; None: ten, or as many as `max_steps` take."""
    if epochs is None:
        return 0, DEFAULT_EPOCHS if max_steps is None else NO_LIMIT
    return parse_epochs(epochs)


# ------------------------------------------------------------- steps of the whole fit


def count_epoch_steps(ctx: Context) -> int | None:
    """Optimizer steps of an epoch; None if they are not known before it ends.

    They are not for data without a length, and for a model with its own ``step``.
    """
    if ctx.train_data is None or ctx.accelerator is None:
        return None
    batches = num_batches(ctx.train_data)
    if batches is None or get_method(ctx.model, "step") is not None:
        return None
    return -(-batches // ctx.accelerator.accumulate)


def count_epochs(ctx: Context) -> int | None:
    """Epochs of a fit that nothing ends early; None if they are not known."""
    most, steps = ctx.max_epochs, ctx.pace.max_steps
    in_epoch = count_epoch_steps(ctx)
    if steps is not None and in_epoch:
        return min(most, -(-steps // in_epoch))
    return None if most == NO_LIMIT or steps is not None else most


def count_steps(ctx: Context) -> int | None:
    """Optimizer steps of a fit that nothing ends early; None if they are not known."""
    most, steps = ctx.max_epochs, ctx.pace.max_steps
    if most == NO_LIMIT:
        return steps
    in_epoch = count_epoch_steps(ctx)
    if in_epoch is None:
        return None
    return in_epoch * most if steps is None else min(in_epoch * most, steps)


def count_batches(ctx: Context) -> int | None:
    """Batches after which the present pass ends; None if they are not known."""
    batches, steps = num_batches(ctx.data), ctx.pace.max_steps
    has_own_step = get_method(ctx.model, "step") is not None
    if not ctx.training or steps is None or has_own_step or ctx.accelerator is None:
        return batches
    rest = ctx.trained + (steps - ctx.step) * ctx.accelerator.accumulate
    return rest if batches is None else min(batches, rest)


def validates_now(ctx: Context) -> bool:
    """Whether a fit validates after the training of this epoch."""
    pace, epoch = ctx.pace, ctx.epoch or 1
    is_last = epoch >= ctx.max_epochs or pace.is_over(ctx.step)
    if pace.unit == "step":
        # Not twice after the same batch.
        return is_last and not (ctx.train_pass and ctx.train_pass.is_paused)
    return is_last or epoch % pace.every == 0


# ------------------------------------------------------------------ batches of a pass


class LimitedLoader:
    """The first batches of each pass of a loader; everything else is the loader's own.

    Parameters
    ----------
    loader
        Loader of any kind, as the accelerator prepared it.
    limit : >= 1
        Batches of a pass, on each rank.
    """

    def __init__(self, loader: Any, limit: int) -> None:
        self.unlimited, self.limit = loader, limit

    def __iter__(self) -> Iterator[Any]:
        return islice(iter_batches(self.unlimited), self.limit)

    def __len__(self) -> int:
        return min(self.limit, len(self.unlimited))  # TypeError as of a stream

    def __getattr__(self, name: str) -> Any:
        if name == "unlimited":  # of a copy that is not filled yet
            raise AttributeError(name)
        return getattr(self.unlimited, name)


def list_limits(ctx: Context) -> dict[str, int]:
    """Batches of each pass that is limited, by name of the set."""
    sets: dict[str, object] = {"train": ctx.train_data, **ctx.valid_sets}
    return {n: own.limit for n, own in sets.items() if isinstance(own, LimitedLoader)}


Limit = int | float | Mapping[str, int | float] | None
"""Batches of each pass, a share of them, or one of both by set."""


def check_limits(limits: object, names: Mapping[str, object]) -> dict[str, Any]:
    """Return ``fit(limit_batches)`` by name of the set.

    Parameters
    ----------
    limits
        A whole number, a share in (0, 1), or one of both by set. ``valid`` stands for all
        sets of validation data.
    """
    if limits is None:
        return {}
    if not isinstance(limits, Mapping):
        check_limit("fit(limit_batches)", limits)
        return dict.fromkeys(["train", *names], limits)
    known = ["train", *dict.fromkeys(["valid", *names] if names else [])]
    for name, limit in limits.items():
        if name not in known:
            msg = f"fit(limit_batches): expected sets of this fit, got {name!r}."
            raise ValueError(f"{msg}{nearest(str(name), known)} Choose from {known}.")
        check_limit(f"fit(limit_batches[{name!r}])", limit)
    common = dict.fromkeys(names, limits["valid"]) if "valid" in limits else {}
    return {
        name: n for name, n in {**common, **limits}.items() if name in {"train", *names}
    }


def limit_loader(loader: Any, limit: float | None, place: str) -> Any:
    """Return a loader of the first batches of each pass; None: all of them.

    Raises
    ------
    ValueError
        If the limit is a share, and the loader has no length.
    """
    if limit is None:
        return loader
    if isinstance(limit, Integral):
        return LimitedLoader(loader, int(limit))
    batches = num_batches(loader)
    if batches is None:
        msg = f"fit(limit_batches): expected a number of batches for {place} data"
        raise ValueError(f"{msg} without a length, got {limit!r}. Pass a whole number.")
    return LimitedLoader(loader, max(1, int(limit * batches)))
