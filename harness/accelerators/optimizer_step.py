"""Step and clear torch's optimizers without the mark that torch makes for a profiler each time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

from torch.optim import Optimizer, optimizer

from harness.checks.hints import add_hint, find_step_hint
from harness.data.row_batches import is_profiling
from harness.pytree import cache_by_identity

_make_wrapper = getattr(Optimizer, "profile_hook_step", lambda function: function)
_WRAPPER: Final[Any] = getattr(_make_wrapper(len), "__code__", None)
_GLOBAL_HOOKS: Final = ("_global_optimizer_pre_hooks", "_global_optimizer_post_hooks")
_OWN_HOOKS: Final = ("_optimizer_step_pre_hooks", "_optimizer_step_post_hooks")
_DONE_HERE: Final = {
    *("__class__", "__name__", "values", "isinstance", "tuple", "len", "RuntimeError"),
    *("torch", "autograd", "profiler", "record_function", "Optimizer", "cast", "chain"),
    *_GLOBAL_HOOKS,
    *_OWN_HOOKS,
    *("_optimizer_step_code", "func"),
}
"""What torch's wrapper of ``step`` uses for its mark and hooks; one with other names does more."""


def default_step_opt(opt: Any) -> None:
    """Call ``opt.step()``, as fast as torch can do it.

    References
    ----------
    torch 2.13, ``Optimizer.profile_hook_step``.
    """
    inner = _find_inner_step(getattr(type(opt), "step", None))
    try:
        if (
            inner is None
            or "step" in vars(opt)  # a schedule puts its own there
            or is_profiling()
            or any(getattr(optimizer, name, True) for name in _GLOBAL_HOOKS)
            or opt._optimizer_step_pre_hooks
        ):
            opt.step()
            return
        inner(opt)
    except (AssertionError, TypeError) as error:
        add_hint(error, find_step_hint, opt, error)
        raise
    for hook in [*opt._optimizer_step_post_hooks.values()]:
        hook(opt, (opt,), {})


def clear_gradients(opt: Optimizer) -> None:
    """As ``opt.zero_grad()``."""
    own = getattr(type(opt), "zero_grad", None)
    is_torchs = own is Optimizer.zero_grad and "zero_grad" not in vars(opt)
    if not is_torchs or is_profiling():
        opt.zero_grad()
        return
    for group in opt.param_groups:
        for param in group["params"]:
            param.grad = None


@cache_by_identity
def _find_inner_step(step: Callable[..., Any] | None) -> Callable[..., Any] | None:
    """The function that torch's wrapper calls; None where the wrapper may do more."""
    code: Any = getattr(step, "__code__", None)
    if code is None or code is not _WRAPPER:
        return None
    if not {*code.co_names, *code.co_freevars} <= _DONE_HERE:
        return None
    inner: Callable[..., Any] = step.__wrapped__  # type: ignore[union-attr]
    return inner
