"""Checks of callbacks, and of the metrics that they monitor."""

from __future__ import annotations

from collections.abc import Iterable

from harness.callback import Callback
from harness.checks.model import names_in_code
from harness.checks.optimizers import has_user_defined
from harness.events import nearest


def check_callbacks(callbacks: Iterable[object]) -> tuple[Callback, ...]:
    """Return the callbacks in running order: by weight, ties in the order given.

    Raises
    ------
    TypeError
        If one is not a ``Callback``, or is a class instead of an instance.
    """
    if not isinstance(callbacks, Iterable):
        given = (
            type(callbacks).__name__ if isinstance(callbacks, Callback) else callbacks
        )
        msg = f"callbacks: expected a list of callbacks, got {given}."
        advice = "Leave it out." if callbacks is None else "Write [...] around it."
        raise TypeError(f"{msg} {advice}")
    found = []
    for place, item in enumerate(callbacks):
        if isinstance(item, type) and issubclass(item, Callback):
            msg = f"callbacks[{place}]: expected an instance, got the class {item.__name__}."
            raise TypeError(f"{msg} Write {item.__name__}(...).")
        if not isinstance(item, Callback):
            msg = f"callbacks[{place}]: expected a harness.Callback, got {item!r:.100}."
            advice = "Derive its class from harness.Callback."
            if getattr(item, "__module__", "") == "torch.optim.lr_scheduler":
                advice = f"Write LRScheduler({getattr(item, '__name__', '...')}, ...)."
            raise TypeError(f"{msg} {advice}")
        found.append(item)
    return tuple(sorted(found, key=lambda callback: callback.weight))


def check_monitor(
    place: str, monitor: object, names: Iterable[str], has_valid_data: bool
) -> str | None:
    """Check that a fit can log a monitored metric.

    Parameters
    ----------
    monitor
        ``<set>/<metric>`` or ``<set>/<metric>/<part>``.
    names
        ``<set>/<metric>`` of the losses and metrics that the fit knows.

    Returns
    -------
    The one of `names` that is monitored; None if a callback must log the metric
    """
    if not isinstance(monitor, str):
        msg = f"{place}: expected '<set>/<metric>', got {monitor!r}."
        raise TypeError(f"{msg} Write for example 'valid/loss'.")
    if "/" not in monitor:
        msg = f"{place}: expected '<set>/<metric>', got {monitor!r}."
        near = nearest(monitor, names) or f" Write for example 'valid/{monitor}'."
        raise ValueError(f"{msg}{near}")
    found = [name for name in names if f"{monitor}/".startswith(f"{name}/")]
    if found and monitor.startswith("valid/") and not has_valid_data:
        msg = f"{place}: expected validation data, got none."
        instead = "train" + monitor.removeprefix("valid")
        raise ValueError(f"{msg} Pass valid_data=..., or monitor {instead!r}.")
    sets = dict.fromkeys(name.partition("/")[0] for name in names)
    if monitor.startswith("valid/") and "valid" not in sets:
        ways = [f"{name}/{monitor.removeprefix('valid/')}" for name in sets]
        msg = f"{place}: expected a set of this fit, got {monitor!r}."
        raise ValueError(f"{msg} Choose from {ways}.")
    return max(found, key=len, default=None)


def check_logged_elsewhere(
    place: str,
    monitor: str,
    names: Iterable[str],
    model: object,
    callbacks: Iterable[object],
) -> None:
    """Check that the model or a callback may log a metric that the fit does not know."""
    near = nearest(monitor, names)
    if (
        near
        and not has_user_defined(callbacks)
        and not names_in_code(type(model), "ctx")
    ):
        msg = f"{place}: expected a metric of this fit, got {monitor!r}."
        raise ValueError(f"{msg}{near} It logs: {', '.join(names)}.")
