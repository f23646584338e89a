"""The accelerator for one device, which adds almost nothing to a plain loop."""

from __future__ import annotations

import itertools
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import partial, wraps
from inspect import unwrap
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from harness.accelerators.base import (
    HOW_TO_STEP,
    Accelerator,
    StepHook,
    StepOpt,
    check_whole,
    counts_on_device,
    ignore_step,
    list_parameters,
    missing_backward,
    needs_closure,
    restore_named_state,
)
from harness.accelerators.devices import find_device
from harness.accelerators.optimizer_step import clear_gradients, default_step_opt
from harness.accelerators.pinned import make_mover
from harness.accelerators.precision import (
    DTYPES,
    LossScaler,
    check_precision,
    hook_autocast,
    make_autocast,
)
from harness.checks.values import check_count
from harness.data.batch import Batch
from harness.errors import CheckpointError
from harness.pytree import StateDict, map_tensors
from harness.reshard.consolidated import copy_tensors
from harness.reshard.index import select_named
from harness.reshard.layout import OWN_FORM, group_members, make_plain_layout
from harness.reshard.meta_parameters import release_parameters


def named_tensors(model: nn.Module) -> dict[str, Tensor]:
    """All weights, then all buffers, also those that a ``state_dict`` leaves out; live."""
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


LEFT_OUT = "left_out"
"""Key of a saved group whose parameters the optimizer has state of, and no longer steps."""


@contextmanager
def list_all_state(opt: Any) -> Iterator[None]:
    """List parameters that are no longer stepped in a last group, so that none is lost.

    torch 2.13: ``Optimizer.state_dict`` fails if it has state of a parameter in no group.
    """
    stepped = set(map(id, list_parameters(opt)))
    left = [
        param
        for param in getattr(opt, "state", ())
        if isinstance(param, Tensor) and id(param) not in stepped
    ]
    if not left:
        yield
        return
    opt.param_groups.append({**opt.param_groups[0], "params": left, LEFT_OUT: True})
    try:
        yield
    finally:
        opt.param_groups.pop()


def get_optimizer_state(opt: Any) -> StateDict:
    """State of an optimizer as torch's own have it.

    What an optimizer of another form returns, such as one that wraps others, is kept whole,
    as `OWN_FORM`, beside the options of its groups.
    """
    state: StateDict = opt.state_dict()
    if isinstance(state, dict) and {"state", "param_groups"} <= state.keys():
        return state
    count = itertools.count()
    groups = [dict(group) for group in opt.param_groups]
    for group in groups:  # last in it, as torch has them
        group["params"] = [next(count) for _ in group.pop("params")]
    return {"state": {}, "param_groups": groups, OWN_FORM: state}


def load_optimizer_state(opt: Any, saved: StateDict, name: str) -> None:
    """Restore the state of an optimizer in its saved dtypes.

    Its groups and its state stay the same objects: another optimizer may share them.
    """
    before = [dict(group) for group in opt.param_groups]
    groups = [dict(group) for group in saved["param_groups"]]
    for group, had in zip(groups, before, strict=False):  # some are no longer stepped
        group.update({key: had[key] for key in HOW_TO_STEP & had.keys()})
    wrapped = [own for own in vars(opt).values() if isinstance(own, Optimizer)]
    try:
        with ExitStack() as stack:
            for one in (opt, *wrapped):
                stack.enter_context(_keeping_objects(one))
            if OWN_FORM in saved:
                opt.load_state_dict(saved[OWN_FORM])
            else:
                opt.load_state_dict({**saved, "param_groups": groups})
    except (ValueError, KeyError) as error:
        msg = f"resume: expected the saved groups of optimizer {name!r}, got: {error}"
        advice = "Resume with the learner that was saved."
        raise CheckpointError(f"{msg}. {advice}") from error
    if OWN_FORM in saved:
        for group, own in zip(opt.param_groups, groups, strict=False):
            group.update({key: own[key] for key in own if key != "params"})
    # Keep what a scheduler that is new in this fit has added.
    for group, had in zip(opt.param_groups, before, strict=True):
        group.update({k: v for k, v in had.items() if k not in group})
    _load_entries(opt, saved["state"])
    opt.param_groups[:] = [group for group in opt.param_groups if LEFT_OUT not in group]


@contextmanager
def _keeping_objects(opt: Any) -> Iterator[None]:
    """Put what the block loads into the groups and the state that an optimizer had."""
    live_groups, own_groups = opt.param_groups, list(opt.param_groups)
    live_state = vars(opt).get("state")
    yield
    if vars(opt).get("param_groups", live_groups) is not live_groups:
        for own, loaded in zip(own_groups, opt.param_groups, strict=True):
            own.clear()
            own.update(loaded)
        opt.param_groups[:] = live_groups[:] = own_groups
        opt.param_groups = live_groups
    if isinstance(live_state, dict) and opt.state is not live_state:
        loaded = dict(opt.state)
        live_state.clear()
        live_state.update(loaded)
        opt.state = live_state


def _load_entries(opt: Any, saved: StateDict) -> None:
    """Restore the state of each parameter, and the entries that belong to none.

    torch converts it to the parameter's dtype, which may be less precise.
    """
    params = [(p, group) for group in opt.param_groups for p in group["params"]]
    named = select_named(saved)
    for n in saved.keys() - named.keys():
        param, group = params[int(n)]
        live = opt.state[param]
        copy_to = partial(Tensor.to, device=param.device, copy=True)
        for key, value in saved[n].items():
            if isinstance(value, Tensor):
                is_counter = key == "step" and not counts_on_device(group)
                device = torch.device("cpu") if is_counter else live[key].device
                live[key] = value.to(device, copy=True)
            elif isinstance(value, list | tuple | dict):  # as LBFGS has
                live[key] = map_tensors(value, copy_to)
            elif isinstance(value, deque):  # torch makes one without its length
                items = (map_tensors(item, copy_to) for item in value)
                live[key] = deque(items, value.maxlen)
    if named:
        restore_named_state(opt, named, params[0][0].device)


def parameters_of_others(optimizers: Mapping[str, Any]) -> dict[str, list[Tensor]]:
    """For each optimizer, the parameters that only other optimizers own."""
    owned = {
        name: {id(param): param for param in list_parameters(opt)}
        for name, opt in optimizers.items()
    }
    union = {key: param for params in owned.values() for key, param in params.items()}
    return {
        name: [param for key, param in union.items() if key not in params]
        for name, params in owned.items()
    }


@contextmanager
def freeze_parameters(params: Sequence[Tensor]) -> Iterator[None]:
    """Turn off ``requires_grad`` of these parameters inside."""
    trained = [param for param in params if param.requires_grad]
    for param in trained:
        param.requires_grad_(False)
    try:
        yield
    finally:
        for param in trained:
            param.requires_grad_(True)


def with_dense_grad(param: Tensor) -> Tensor:
    """The parameter; if its gradient is sparse, a tensor whose gradient is its values.

    Both share their memory. torch's ``clip_grad_norm_`` has no kernel for sparse gradients.
    """
    if param.grad is None or param.grad.layout != torch.sparse_coo:
        return param
    param.grad = param.grad.coalesce()  # a row that is there twice counts as the sum
    values = param.grad.values()
    stand_in = torch.empty_like(values)
    stand_in.grad = values
    return stand_in


class _StepHook:
    """Calls a function after each step of an optimizer that torch's own hooks do not count."""

    def __init__(self, opt: Any, function: Callable[[], object]) -> None:
        self._opt, self._before, step = opt, vars(opt).get("step"), opt.step

        @wraps(step)
        def step_and_call(_: object, *args: Any, **kwargs: Any) -> Any:
            returned = step(*args, **kwargs)
            function()
            return returned

        opt.step = MethodType(step_and_call, opt)  # torch's schedulers wrap a method

    def remove(self) -> None:
        """Give the optimizer its own ``step`` back."""
        if self._before is None:
            del self._opt.step
        else:
            self._opt.step = self._before


def _hook_step(
    opt: Any, function: Callable[..., object]
) -> RemovableHandle | _StepHook:
    """Call a function after each step of an optimizer."""
    is_torchs = isinstance(opt, torch.optim.Optimizer)
    if is_torchs and not hasattr(opt, "_optimizer_step_post_hooks"):
        # It wraps another one and has not called __init__ of the class above, which adds
        # what torch's own methods need, and wraps ``step``.
        vars(opt).update({name: OrderedDict() for name in _OPTIMIZER_HOOKS})
        return _StepHook(opt, function)
    # torch 2.13 runs its hooks again for a step of the class above, if that is called in it.
    # It wraps the one of AdamW, which is Adam's, anew.
    steps = [vars(kind)["step"] for kind in type(opt).__mro__ if "step" in vars(kind)]
    num_own = len({id(unwrap(step)) for step in steps}) - 1  # without Optimizer's
    is_nested = is_torchs and num_own > 1
    if is_nested or not hasattr(opt, "register_step_post_hook"):
        return _StepHook(opt, function)
    handle: RemovableHandle = opt.register_step_post_hook(function)
    return handle


_OPTIMIZER_HOOKS = [
    f"_optimizer_{method}_{when}_hooks"
    for method in ("step", "state_dict", "load_state_dict")
    for when in ("pre", "post")
]
"""Attributes of torch's optimizers (torch 2.13)."""


class SingleDevice(Accelerator):
    """One CPU, CUDA or MPS device.

    Parameters
    ----------
    device
        torch device or its name; None takes CUDA if available, then MPS, then the CPU.
    accumulate : >= 1
        Micro-batches per optimizer step; gradients are averaged over them.
    precision
        ``fp32``; or ``bf16`` or ``fp16``: torch's autocast, with the weights in float32. For
        ``fp16`` the losses are scaled, by a scaler for each optimizer.

    Attributes
    ----------
    overflows : dict of int
        Steps skipped because gradients overflowed in ``fp16``, by optimizer name.

    Raises
    ------
    TypeError, ValueError
        If `device` is no device of this machine, `accumulate` no whole number from 1, or
        `precision` none of the three.

    References
    ----------
    luz 0.5.0, ``accelerator``. Differs from luz: it also accumulates gradients.
    torch 2.13, ``torch.amp``.
    """

    rank = 0
    local_rank = 0
    world_size = 1
    is_main = True
    counted: int | None = None
    guard: AbstractContextManager[object] | None = None
    precision = "fp32"

    def __init__(
        self,
        device: str | torch.device | None = None,
        *,
        accumulate: int = 1,
        precision: str = "fp32",
    ) -> None:
        advice = "Use 1 to step on every batch."
        check_count("accelerator(accumulate)", accumulate, 1, advice)
        self.precision = check_precision(precision)
        self._dtype = DTYPES[self.precision]
        self.device = find_device(device)
        self._move = make_mover(self.device)
        self.accumulate = accumulate
        self.window = accumulate
        self.steps: dict[str, int] = {}
        self.overflows: dict[str, int] = {}
        self.num_backwards = 0
        self.before_step: StepHook = ignore_step
        self.after_step: StepHook = ignore_step
        self._model: nn.Module | None = None
        self._optimizers: dict[str, torch.optim.Optimizer] = {}
        self._done: dict[str, int] = {}
        self._hooks: list[RemovableHandle | _StepHook] = []
        self._others: dict[str, list[Tensor]] = {}
        self._scalers: dict[str, LossScaler] = {}
        self._nothing: AbstractContextManager[object] = nullcontext()

    def prepare(
        self,
        model: nn.Module,
        optimizers: Mapping[str, Any] | None = None,
        loaders: Sequence[Any] = (),
    ) -> tuple[nn.Module, dict[str, Any], list[Any]]:
        """Move the model to the device; return optimizers and loaders unchanged.

        Raises
        ------
        ValueError
            If an optimizer's ``step`` needs a closure, and gradients are accumulated or
            scaled: it computes them itself, several times in a step. Or if the parameters
            are divided over ranks.
        """
        check_whole(model, "on one device")
        self._check_closures(optimizers or {})
        self._model = model.to(self.device)
        self._optimizers = dict(optimizers or {})
        self._others = parameters_of_others(self._optimizers)
        self._done = dict.fromkeys(self._optimizers, 0)
        self.steps = dict.fromkeys(self._optimizers, 0)
        self.overflows = dict.fromkeys(self._optimizers, 0)
        self.window = self.accumulate
        self._scalers = {}
        if self._dtype is not None:
            self._hooks += hook_autocast(model, self.device, self._dtype)
        if self._dtype == torch.float16:
            self._scalers = {name: LossScaler(self.device) for name in self._optimizers}
        for name, opt in self._optimizers.items():
            self._place_state(opt)
            self._hooks.append(_hook_step(opt, partial(self._count_step, name)))
        return model, self._optimizers, list(loaders)

    def _check_closures(self, optimizers: Mapping[str, Any]) -> None:
        """Refuse optimizers with a closure where gradients are accumulated or scaled."""
        got = f"accumulate={self.accumulate}" if self.accumulate > 1 else "'fp16'"
        is_refused = self.accumulate > 1 or self._dtype == torch.float16
        for name, opt in optimizers.items() if is_refused else ():
            if needs_closure(opt):
                msg = f"accelerator: expected accumulate=1 and no 'fp16' with {name!r}"
                does = f"{type(opt).__name__} computes gradients itself"
                advice = "Train on larger batches, in 'bf16'."
                raise ValueError(f"{msg}, got {got}. {does}. {advice}")

    def _place_state(self, opt: torch.optim.Optimizer) -> None:
        """Move the state of an optimizer to the device of its parameters."""
        for state in opt.state.values():
            for key, value in state.items():
                if isinstance(value, Tensor) and value.dim() > 0:
                    state[key] = value.to(self.device)

    def _count_step(self, name: str, *_: object) -> None:
        """Count a step, also one of a model's own ``step``."""
        self.steps[name] += 1

    def _only(self, name: str | None) -> str:
        """The name; for None, that of the only optimizer."""
        if name is not None:
            return name
        if len(self._optimizers) == 1:
            return next(iter(self._optimizers))
        msg = "accelerator: expected the name of one of several optimizers, got None."
        raise ValueError(f"{msg} Choose from {list(self._optimizers)}.")

    def optimizing(self, name: str | None = None) -> AbstractContextManager[object]:
        """Run the forward and backward of one optimizer inside.

        Only parameters that it owns get gradients.
        """
        if len(self._optimizers) < 2 or not torch.is_grad_enabled():
            return (
                make_autocast(self.device, self._dtype)
                if self._dtype
                else self._nothing
            )
        others = freeze_parameters(self._others[self._only(name)])
        return others if self._dtype is None else self._under_autocast(others)

    @contextmanager
    def _under_autocast(self, inner: AbstractContextManager[object]) -> Iterator[None]:
        with inner, make_autocast(self.device, self._dtype):
            yield

    @contextmanager
    def counting_backward(self, name: str | None = None) -> Iterator[None]:
        """Count one backward inside, by this accelerator or by user code.

        Raises
        ------
        RuntimeError
            In ``fp16``, if ``backward`` was not called: the loss would not be scaled.
        """
        name = self._only(name)
        before = self._done[name]
        yield
        if self._done[name] == before:
            if name in self._scalers:
                raise missing_backward("in fp16")
            self._done[name] += 1
            self.num_backwards += 1

    def backward(self, loss: Tensor, name: str | None = None) -> None:
        """Add the gradients of ``loss / window``; `loss` is a scalar with a graph."""
        if self.window > 1:
            loss = loss / self.window
        name = name or self._only(name)
        if self._dtype is None:
            loss.backward()  # type: ignore[no-untyped-call]
        else:
            self._backward_mixed(loss, name)
        self._done[name] += 1
        self.num_backwards += 1

    def _backward_mixed(self, loss: Tensor, name: str) -> None:
        """Scale the loss, and run the backward outside of autocast, as torch advises."""
        with torch.autocast(self.device.type, enabled=False):
            if name in self._scalers:
                loss = self._scalers[name].scale(loss)
            loss.backward()  # type: ignore[no-untyped-call]

    def is_boundary(self, name: str | None = None) -> bool:
        """True when the window has as many backwards as it should."""
        return self._done[name or self._only(name)] >= self.window

    def step(
        self, name: str | None = None, step_opt: StepOpt = default_step_opt
    ) -> bool:
        """Step at a boundary and clear the gradients; True if weights changed."""
        name = name or self._only(name)
        if self._done[name] < self.window:
            return False
        opt, scaler = self._optimizers[name], self._scalers.get(name)
        if scaler is not None:
            scaler.unscale(opt)
        self.before_step(name)
        before = self.steps[name]
        if scaler is None:
            step_opt(opt)
        else:
            self.overflows[name] += not scaler.step(opt, step_opt)
        clear_gradients(opt)
        self._done[name] = 0
        is_stepped = self.steps[name] > before
        if is_stepped:
            self.after_step(name)
        return is_stepped

    def drop_window(self) -> None:
        """Clear the gradients of every optimizer in an open window."""
        for name, done in self._done.items():
            if done:
                self._optimizers[name].zero_grad()
                self._done[name] = 0
                if name in self._scalers:
                    self._scalers[name].drop()

    def clip(
        self, max_norm: float, name: str | None = None, norm_type: float = 2.0
    ) -> Tensor:
        """Clip the total gradient norm of one optimizer's parameters."""
        name = self._only(name)
        opt = self._optimizers[name]
        if name in self._scalers:
            if self._done[name] < self.window:
                msg = f"clip: expected {self.window} backwards before it in fp16"
                advice = "Clip at the end of the window: see is_boundary."
                raise RuntimeError(f"{msg}, got {self._done[name]}. {advice}")
            self._scalers[name].unscale(opt)
        params = [with_dense_grad(param) for param in list_parameters(opt)]
        return torch.nn.utils.clip_grad_norm_(params, max_norm, norm_type)

    def to_device(self, batch: Batch) -> Batch:
        """Move the batch to the device."""
        return self._move(batch)

    def full_state_dict(self, model: nn.Module) -> dict[str, Tensor]:
        """All weights and buffers, detached, on the CPU."""
        return {
            name: value.detach().cpu() if isinstance(value, Tensor) else value
            for name, value in model.state_dict().items()
        }

    def state_dict(self) -> StateDict:
        """Weights, buffers, optimizers, gradients, counters and frozen parameters; live."""
        with ExitStack() as stack:
            for opt in self._optimizers.values():
                stack.enter_context(list_all_state(opt))
            return self._capture()

    def _capture(self) -> StateDict:
        model = self._model
        assert model is not None
        named = dict(model.named_parameters())
        params = [*named.values()]
        return {
            "world_size": 1,
            "model": {**named, **dict(model.named_buffers())},
            "optimizers": {
                n: get_optimizer_state(opt) for n, opt in self._optimizers.items()
            },
            "layouts": {
                n: make_plain_layout(params, list_parameters(opt))
                for n, opt in self._optimizers.items()
            },
            "members": {
                n: group_members(params, opt.param_groups)
                for n, opt in self._optimizers.items()
            },
            "kinds": {n: type(opt).__name__ for n, opt in self._optimizers.items()},
            "steps": dict(self.steps),
            "done": dict(self._done),
            "grads": {n: p.grad for n, p in named.items() if p.grad is not None},
            "frozen": [n for n, p in named.items() if not p.requires_grad],
            **self._scaling_state(),
        }

    def _scaling_state(self) -> StateDict:
        """What only ``fp16`` has."""
        if not self._scalers:
            return {}
        scalers = {name: scaler.state_dict() for name, scaler in self._scalers.items()}
        return {"overflows": dict(self.overflows), "scalers": scalers}

    def load_state_dict(
        self, state: StateDict, parts: Sequence[str] = ("model", "optimizers")
    ) -> None:
        """Restore what ``state_dict`` returned, all of it or one of the two parts.

        Raises
        ------
        CheckpointError
            If it is from another model or other optimizers.
        """
        model = self._model
        assert model is not None
        if "model" in parts:
            copy_tensors(named_tensors(model), state["model"])
        if "optimizers" not in parts:
            return
        if set(state["optimizers"]) != set(self._optimizers):
            have, want = sorted(state["optimizers"]), sorted(self._optimizers)
            msg = f"resume: expected optimizers {want}, got {have}."
            raise CheckpointError(f"{msg} Resume with the learner that was saved.")
        for name, own in state["optimizers"].items():
            opt = self._optimizers[name]
            load_optimizer_state(opt, own, name)
            # torch 2.13: a scheduler warns if its optimizer has not stepped before it.
            opt._opt_called = state["steps"].get(name, 0) > 0  # type: ignore[attr-defined]
        self.steps.update(state["steps"])
        self._done.update(state["done"])
        self.overflows.update(state.get("overflows", {}))
        for name, scaler in state.get("scalers", {}).items():
            if name in self._scalers:
                self._scalers[name].load_state_dict(scaler)
        for name, param in model.named_parameters():
            grad = state["grads"].get(name)
            param.grad = None if grad is None else grad.to(self.device, copy=True)
            param.requires_grad_(name not in state["frozen"])

    def finish(self, *, failed: bool = False, keep: bool = True) -> None:
        """Remove the hooks from model and optimizers.

        With ``keep=False`` the parameters are on the ``meta`` device afterwards.
        """
        if not (failed or keep) and self._model is not None:
            release_parameters(self._model)
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        self.before_step = self.after_step = ignore_step
