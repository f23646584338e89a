"""One named optimizer under DeepSpeed: its engine and the parameters that it owns."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from harness.accelerators.base import StepOpt
from harness.accelerators.deepspeed.library import replace_attributes
from harness.accelerators.deepspeed.state import (
    base_optimizer,
    master_weights,
    refresh_masters,
)
from harness.accelerators.single import freeze_parameters
from harness.reshard.layout import group_members, make_engine_layout

_STEPPED_ALIKE = frozenset({torch.float32, torch.float64})
"""Dtypes of weights whose copies, which ZeRO steps, have the same values."""


class NamedEngine:
    """A DeepSpeed engine and the parameters that its optimizer owns.

    Parameters
    ----------
    engine
        DeepSpeed's engine for the whole model, with ``managed_gradient_accumulation`` off.
    stage : 0..3
        ZeRO stage.
    groups
        The optimizer's parameter groups from before the engine was created.
    on_step
        Called after each step with the optimizer's name and whether weights changed.

    Attributes
    ----------
    done : >= 0
        Micro-batches since the last step.
    members
        Indexes of the parameters in each group, as ``Module.parameters`` orders them.
    facade
        The optimizer as the loop and schedulers see it.
    """

    def __init__(
        self,
        name: str,
        engine: Any,
        model: nn.Module,
        owned: Sequence[Tensor],
        stage: int,
        groups: Sequence[Mapping[str, Any]],
        on_step: Callable[[str, bool], None],
    ) -> None:
        self._on_step = on_step
        self.name, self.engine, self.stage = name, engine, stage
        self._model = model
        self.members = group_members(model.parameters(), groups)
        self._layout: Tensor | None = None
        self._places: dict[int, tuple[int, int, int]] | None = None
        self._stepped = 0
        self.done = 0
        self._owned = list(owned)
        mine = set(map(id, owned))
        self.owned_ids = frozenset(mine)
        self._others = [p for p in model.parameters() if id(p) not in mine]
        self._trained = [param.requires_grad for param in owned]
        self._base = base_optimizer(engine)
        self._hook = self._base.register_step_pre_hook(self._on_base_step)
        self._base_stepped = False
        self._clips: list[tuple[float, Tensor]] = []
        self._is_fresh = False
        self._was_stepped = False
        self._followed = list(self._owned)
        if stage == 3:  # code of the user may also change weights that nothing steps
            self._followed += [p for p in self._others if not p.requires_grad]
        self._versions = [param._version for param in self._followed]
        self.facade = EngineOptimizer(self._base, self._engine_step)

    # --------------------------------------------------------- forward, backward

    def freeze_others(self) -> AbstractContextManager[None]:
        """Turn off ``requires_grad`` inside for parameters that the optimizer does not own."""
        return freeze_parameters(self._others)

    def check_frozen(self) -> None:
        """Refuse parameters that were frozen or unfrozen after ``prepare``, which ZeRO misses."""
        now = [param.requires_grad for param in self._owned]
        if self.stage == 0 or now == self._trained:
            return
        change = "unfrozen" if sum(now) > sum(self._trained) else "frozen"
        msg = f"optimizing({self.name!r}): expected the same trained parameters as at fit's"
        got = f"begin at ZeRO {self.stage}, got some {change} later"
        advice = "Choose them before fit and fit in two parts, or use ZeRO 0."
        raise RuntimeError(f"{msg} {got}. {advice}")

    def follow_weights(self) -> None:
        """Let ZeRO step weights that code of the user has changed since the last step.

        It steps float32 copies. Weights in 16 bits are left alone: the copies have more.
        """
        if self.stage == 0:
            return
        versions = [param._version for param in self._followed]
        if versions == self._versions:
            return
        self._versions = versions
        if self.stage == 3:
            self._divide_whole()
        if all(param.dtype in _STEPPED_ALIKE for param in self._owned):
            refresh_masters([self.engine])

    def _divide_whole(self) -> None:
        """Put values of small parameters, which ZeRO 3 keeps whole, into the parts of this rank."""
        followed: list[Any] = self._followed
        for param in followed:
            is_whole = param.numel() and hasattr(param, "ds_tensor")
            if is_whole and param.dtype in _STEPPED_ALIKE:
                part = param.ds_tensor.data
                own = param.data.reshape(-1)[
                    param.ds_zero_partition_rank * part.numel() :
                ]
                own = own[: part.numel()]
                part[: own.numel()].copy_(own)

    def begin_forward(self) -> None:
        """Tell ZeRO that a forward begins, so that it counts micro-batches correctly.

        DeepSpeed does this in ``engine.forward``, but here the model is called directly.
        Without it, ZeRO 3 forgets all but the last micro-batch of a window.
        """
        if self.stage and not self._is_fresh:
            clear = getattr(self.engine.optimizer, "clear_backward_seen_flag", None)
            if clear is not None:
                clear()
            self._is_fresh = True

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of a loss that is already divided by the window."""
        self.begin_forward()
        handle = loss.register_hook(self._begin_backward)  # type: ignore[no-untyped-call]
        try:
            self.engine.backward(loss, scale_wrt_gas=False)
        finally:
            handle.remove()
        self._is_fresh = False
        self.done += 1

    def _begin_backward(self, grad: Tensor) -> Tensor | None:
        """Do what ``engine.forward`` would have registered; return another gradient of the loss.

        DeepSpeed 0.19.8 at ZeRO 0 divides gradients of float16 weights by the scale of the
        losses, and multiplies no loss by it.
        """
        self.engine._backward_prologue()
        if self.stage or not self.engine.fp16_enabled():
            return None
        return torch.full_like(grad, self.engine.optimizer.loss_scale_config.cur_scale)

    # -------------------------------------------------------------------- step

    def clip(self, max_norm: float) -> Tensor:
        """Clip at the next step, which then writes the norm into the returned tensor."""
        found = torch.full((), math.nan, device=self.engine.device)
        self._clips.append((max_norm, found))
        return found

    def step(self, step_opt: StepOpt) -> bool:
        """Step by calling the user's ``step_opt``; True if weights changed."""
        self._was_stepped = False
        step_opt(self.facade)
        return self._was_stepped

    def _engine_step(self) -> None:
        """Finish the reduction of gradients, step, and clear them."""
        if self.done == 0:
            msg = f"step({self.name!r}): expected accelerator.backward(loss) first, got none."
            raise RuntimeError(f"{msg} Call it instead of loss.backward().")
        self._base_stepped = False
        self.follow_weights()
        # Without ZeRO, DeepSpeed reduces and clears the gradients of the whole module.
        kept = [(p, p.grad) for p in self._others] if self.stage == 0 else []
        with self.freeze_others(), self._clipping():
            for param, _ in kept:
                param.grad = None
            try:
                self.engine.step()
            except AttributeError as error:
                if "'ds_" in str(error):
                    msg = (
                        "ZeRO 3 steps only layers that the model had when the fit began"
                    )
                    advice = (
                        "Add them in its __init__, or in prepare(ctx) of a callback"
                    )
                    error.add_note(f"{msg}. {advice}.")
                raise
            finally:
                for param, grad in kept:
                    param.grad = grad
        self.done = 0
        self._versions = [param._version for param in self._followed]
        self._clear_gradients()
        applied = bool(self.engine.was_step_applied()) and self._base_stepped
        self._was_stepped = applied
        self._on_step(self.name, applied)

    def note_steps(self, count: int) -> None:
        """Note how many steps a resumed fit has made."""
        # torch 2.13: a scheduler warns if its optimizer has not stepped before it.
        self.facade._opt_called = count > 0  # type: ignore[attr-defined]

    def drop_window(self) -> None:
        """Clear the gradients of an open window as DeepSpeed does after an overflow."""
        if not self.done:
            return
        wrapper = self.engine.optimizer
        if self.stage == 0:
            for param in self._owned:
                param.grad = None
        else:
            # DeepSpeed 0.19.8: ``step`` of stages 1 and 2, ``_overflow_clean_up`` of stage 3.
            wrapper.zero_grad(set_to_none=True)
            wrapper.micro_step_id = 0 if self.stage == 3 else -1
            wrapper.averaged_gradients.clear()
            getattr(wrapper, "all_grad_tensors", {}).clear()
        self._clear_gradients()
        self.done, self._is_fresh = 0, False
        self._clips.clear()

    def _clear_gradients(self) -> None:
        """Clear the gradients that ZeRO 3 and offload keep after a step.

        DeepSpeed 0.19.8 overwrites them in the next window, except for a parameter without
        a gradient: its old gradient would be applied again.
        """
        wrapper = self.engine.optimizer
        flat = getattr(wrapper, "grad_partitions_flat_buffer", None)
        kept = [] if flat is None else [flat]
        kept += [
            master.grad
            for master in master_weights(self.engine)
            if master.grad is not None
        ]
        kept += getattr(wrapper, "accumulated_grads_in_cpu", {}).values()
        for gradient in kept:
            gradient.zero_()

    @contextmanager
    def _clipping(self) -> Iterator[None]:
        """Clip in the step inside; DeepSpeed does it if it keeps the gradients itself."""
        if not self._clips:
            yield
            return
        wrapper = self.engine.optimizer
        keeps_gradients = hasattr(wrapper, "clip_grad")
        if keeps_gradients:
            least = min(max_norm for max_norm, _ in self._clips)
            clipping = replace_attributes(wrapper, clip_grad=least)
        else:  # the config's clipping comes before ``_on_base_step``
            clipping = replace_attributes(self.engine._config, gradient_clipping=0.0)
        with clipping:
            yield
        if keeps_gradients:
            norm = self.engine.get_global_grad_norm()
            # Nothing is read from the device.
            norm = torch.as_tensor(math.nan if norm is None else norm).reshape(())
            for max_norm, found in self._clips:
                norm = found.copy_(norm).clamp(max=max_norm)
        self._clips.clear()

    def _on_base_step(self, *_: object) -> None:
        """Record that the torch optimizer is stepped: gradient scalers may skip it."""
        self._base_stepped = True
        if not hasattr(self.engine.optimizer, "clip_grad"):
            for max_norm, found in self._clips:
                found.copy_(nn.utils.clip_grad_norm_(self._owned, max_norm))

    def read_full_precision(self, param: Any) -> Tensor | None:
        """The whole parameter in float32, gathered from all ranks; None if it is float32 already.

        DeepSpeed's ``safe_get_full_fp32_param`` knows only the last engine at ZeRO 3.
        """
        if param.dtype not in {torch.bfloat16, torch.float16}:
            return None
        if self.stage == 0:
            return self._read_master(param)
        found: Any = None
        if self.stage == 3:
            # None if the parameter is frozen.
            found = self.engine.optimizer.get_full_hp_param(param)
            found = None if found is None else found.reshape(param.ds_shape)
        elif getattr(param, "_hp_mapping", None) is not None or hasattr(
            param, "_dp_group"
        ):
            found = param.get_full_hp_param()
        assert found is None or isinstance(found, Tensor)
        return found

    def _read_master(self, param: Tensor) -> Tensor | None:
        """The float32 copy that is stepped at ZeRO 0; None if the parameter is frozen."""
        if self._places is None:
            params = list(self._model.parameters())
            self._places = {
                id(params[number]): (n, at, length)
                for n, number, at, _, length in self.layout(rank=0).tolist()
            }
        if id(param) not in self._places:
            return None
        n, at, length = self._places[id(param)]
        master = master_weights(self.engine)[n].detach().reshape(-1)
        return master[at : at + length].reshape(param.shape)

    def layout(self, rank: int) -> Tensor:
        """The layout of what the optimizer steps on this rank."""
        stepped = master_weights(self.engine)
        if self._layout is None or self._stepped != len(stepped):
            self._stepped = len(stepped)
            self._layout = make_engine_layout(
                self._model.parameters(), self.engine, stepped, rank
            )
        return self._layout

    def finish(self) -> None:
        """Remove the hooks and destroy the engine."""
        self._hook.remove()
        for hook in ("module_forward_pre_hook", "module_forward_post_hook"):
            getattr(self.engine, hook).remove()
        wrapper = self.engine.optimizer
        self.engine.destroy()
        # They refer to each other: the memory of their tensors would otherwise be free
        # only when Python looks for such cycles.
        for owner in (self.engine, wrapper):
            if owner is not self._base:
                vars(owner).clear()
        del self.facade


class EngineOptimizer(torch.optim.Optimizer):
    """The optimizer as the loop, callbacks and schedulers see it.

    ``step`` steps the engine. ``param_groups``, with the learning rates, are those of the
    torch optimizer below it. ``zero_grad`` does nothing, because the engine clears the
    gradients that it used.
    """

    def __init__(self, base: torch.optim.Optimizer, step: Callable[[], None]) -> None:
        # Optimizer.__init__ would create its own parameter groups.
        self._base, self._step = base, step

    @property
    def unwrapped(self) -> torch.optim.Optimizer:
        """The torch optimizer below it."""
        return self._base

    @property
    def param_groups(self) -> list[dict[str, Any]]:  # type: ignore[override]
        """Groups of the torch optimizer, live."""
        return self._base.param_groups

    @property
    def state(self) -> Any:  # type: ignore[override]
        """State of the torch optimizer: this rank's part."""
        return self._base.state

    @property
    def defaults(self) -> dict[str, Any]:  # type: ignore[override]
        """Defaults of the torch optimizer."""
        return self._base.defaults

    def step(self, closure: object = None) -> None:  # type: ignore[override]
        """Step the engine.

        Raises
        ------
        TypeError
            If a closure is given: the gradients are already computed.
        """
        if closure is not None:
            msg = f"step(closure): expected None under DeepSpeed, got {closure!r}."
            raise TypeError(f"{msg} Call accelerator.backward(loss) before the step.")
        self._step()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Refuse a group that comes after the engine was made, which would not train it.

        Raises
        ------
        RuntimeError
            Always.
        """
        msg = "add_param_group: expected all parameter groups before the first epoch under"
        advice = "Add it in set_optimizers, or in prepare(ctx) of a callback."
        raise RuntimeError(f"{msg} DeepSpeed, got one more. {advice}")

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Do nothing: the engine clears the gradients that it used."""

    def state_dict(self) -> dict[str, Any]:
        """State of the torch optimizer: this rank's part."""
        return self._base.state_dict()

    def load_state_dict(self, state_dict: dict[str, object]) -> None:
        """Restore this rank's part of the state."""
        self._base.load_state_dict(state_dict)

    def register_step_pre_hook(self, hook: Any) -> Any:
        """Run a hook before the torch optimizer's step."""
        return self._base.register_step_pre_hook(hook)

    def register_step_post_hook(self, hook: Any) -> Any:
        """Run a hook after the torch optimizer's step."""
        return self._base.register_step_post_hook(hook)

    def __getstate__(self) -> Any:
        msg = "DeepSpeed optimizer: expected accelerator.save(), got pickle or deepcopy"
        raise TypeError(f"{msg}. Its state is divided over the ranks.")


def find_parameters(loss: Tensor) -> set[int]:
    """``id`` of each parameter in the graph of a loss.

    Parameters hidden by reentrant checkpointing or a custom function are not found.
    """
    found: set[int] = set()
    seen: set[object] = set()
    pending = [loss.grad_fn]
    while pending:
        node = pending.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            found.add(id(node.variable))
        pending += [function for function, _ in node.next_functions]
    return found
