"""Ends the fit at the first loss, gradient or weight that is not finite."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from harness.callback import Callback
from harness.checkpoint.format import write_tensors
from harness.checks.model import get_method
from harness.checks.values import check_flags
from harness.context import Context
from harness.data.batch import copy_by_value
from harness.pytree import StateDict, flatten, iter_tensors, map_tensors
from harness.rng import get_rng_state, set_rng_state
from harness.steps import call_model

MAX_SHOWN = 10
"""Names and rows that a message lists."""


class NaNGuard(Callback):
    """Ends the fit at the first loss, gradient or weight that is infinite or not a number.

    The error names the module whose output was the first, or the parameters, and the batch
    and its rows. The model and the optimizers then have their state before this batch. If
    the fit has a run, its folder ``not_finite/`` gets the weights before the batch and the
    batch itself, as safetensors files.

    Parameters
    ----------
    gradients, weights
        Whether to check gradients before each step, and weights after it.
    keep
        Keep the state before the batch. This copies weights and optimizer state on their
        device before each batch.

    Raises
    ------
    FloatingPointError
        In the fit, on all ranks. A handler in ``ctx.handlers`` ends the fit without an error.
    ValueError
        Before the first epoch, if an engine divides the gradients over ranks.

    Notes
    -----
    Each check waits for the device. Use it to find a fault, not in every fit. In ``fp16``,
    gradients are not checked: a step whose gradients overflow is skipped on purpose.
    """

    weight = -5  # before clipping, which spreads a NaN over all gradients

    def __init__(
        self, *, gradients: bool = True, weights: bool = True, keep: bool = True
    ) -> None:
        check_flags("NaNGuard", gradients=gradients, weights=weights, keep=keep)
        self.gradients, self.weights, self.keep = gradients, weights, keep
        self._before: StateDict | None = None
        self._is_here = False

    def check(self, ctx: Context) -> None:
        """Refuse ranks that hold only a part of each gradient."""
        state = ctx.accelerator.state_dict()
        stage = state.get("stage")
        if stage and self.gradients:
            msg = f"NaNGuard(gradients): expected whole gradients, got ZeRO stage {stage}."
            raise ValueError(f"{msg} Use stage 0, or NaNGuard(gradients=False).")
        is_half = any(p.dtype == torch.float16 for p in ctx.model.parameters())
        self._sees_gradients = self.gradients and "scalers" not in state and not is_half

    # --- what is looked at

    def on_train_batch_begin(self) -> None:
        if self.keep:
            state = map_tensors(self.ctx.accelerator.state_dict(), Tensor.clone)
            random = get_rng_state(device=self.ctx.device)
            self._before = {"state": state, "random": random}

    def on_train_batch_after_loss(self) -> None:
        loss = self.ctx.loss_grad
        if self._is_found(not _is_finite([loss])):
            assert loss is not None
            self._fail("loss", f"got {float(loss.detach())}")

    def on_train_batch_before_step(self) -> None:
        """Look at the gradients of the optimizer that is about to step."""
        if not self._sees_gradients:
            return
        grads = {n: p.grad for n, p in self._params() if p.grad is not None}
        if self._is_found(not _is_finite(grads.values())):
            self._fail("gradients", f"got others in {_list_names(grads)}")

    def on_train_batch_after_step(self) -> None:
        if not self.weights:
            return
        values = {n: getattr(p, "ds_tensor", p) for n, p in self._params()}
        if self._is_found(not _is_finite(values.values())):
            self._fail("weights", f"got others in {_list_names(values)} after the step")

    def on_fit_end(self) -> None:
        self._before = None

    def _params(self) -> Iterator[tuple[str, nn.Parameter]]:
        return self.ctx.model.named_parameters()

    def _is_found(self, is_here: bool) -> bool:
        """Whether any rank has found something."""
        self._is_here = is_here
        return self.ctx.accelerator.any(is_here)

    # --- what is told

    def _fail(self, what: str, got: str) -> None:
        ctx = self.ctx
        where = f"epoch {ctx.epoch}, batch {ctx.iter}"
        rows = self._describe_rows()
        self._restore()
        if what == "loss":
            rows += self._describe_module()
            self._restore()
        mine = f"{got}.{rows}" if self._is_here else None
        found = enumerate(ctx.accelerator.gather_objects(mine))
        rank, text = next((rank, text) for rank, text in found if text is not None)
        where += f" of rank {rank}" if ctx.accelerator.world_size > 1 else ""
        msg = f"NaNGuard: expected finite {what} in {where}, {text}{self._save()}"
        advice = "Look at this batch, or use a lower learning rate or GradientClip."
        raise FloatingPointError(f"{msg} {advice}")

    def _describe_rows(self) -> str:
        """Rows of the batch that are not finite; if none, those of the prediction."""
        for name in ("input", "target", "pred"):
            rows = _find_rows(getattr(self.ctx, name))
            if rows:
                shown = ", ".join(map(str, rows[:MAX_SHOWN]))
                more = f" and {len(rows) - MAX_SHOWN} more" * (len(rows) > MAX_SHOWN)
                return f" Rows of the {name} that are not finite: {shown}{more}."
        return ""

    def _describe_module(self) -> str:
        """Name the first module whose output is not finite in another forward."""
        ctx, found = self.ctx, list[str]()
        weights = dict(ctx.model.state_dict())
        if not _is_finite(iter_tensors(weights)):
            return f" Weights that were not finite before: {_list_names(weights)}."
        if get_method(ctx.model, "step") is not None:  # how to call it is not known
            return ""

        def hook_for(name: str) -> Any:
            def look(module: nn.Module, args: object, output: object) -> None:
                if not found and not _is_finite(iter_tensors(output)):
                    found.append(f"{name or 'the model'} ({type(module).__name__})")

            return look

        with contextlib.ExitStack() as stack, torch.no_grad():
            for name, module in ctx.model.named_modules():
                stack.callback(module.register_forward_hook(hook_for(name)).remove)
            call_model(ctx.model, ctx.input)
        if found:
            return f" It first appears in the output of {found[0]}."
        return " The prediction is finite."

    # --- what is kept

    def _restore(self) -> None:
        """Go back to the state before the batch."""
        if self._before is not None:
            self.ctx.accelerator.load_state_dict(self._before["state"])
            set_rng_state(self._before["random"], device=self.ctx.device)

    def _save(self) -> str:
        """Write the weights before the batch, and the batch; say where."""
        accelerator, run = self.ctx.accelerator, self.ctx.run
        if self._before is None:
            return ""
        weights = accelerator.full_state_dict(self.ctx.model)
        if run.path is None:
            return ""
        folder = Path(run.path) / "not_finite"
        folder.mkdir(parents=True, exist_ok=True)
        if accelerator.is_main:
            tensors = {n: v for n, v in weights.items() if isinstance(v, Tensor)}
            write_tensors(folder / "weights.safetensors", _on_cpu(tensors))
        with contextlib.suppress(TypeError):  # a batch that is not of tensors
            _, tensors = flatten(copy_by_value(self.ctx.batch), "batch")
            name = f"batch-{accelerator.rank}.safetensors"
            write_tensors(folder / name, _on_cpu(tensors))
        return f" The weights before it and the batch are in {str(folder)!r}."


def _on_cpu(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.cpu().contiguous() for name, value in tensors.items()}


def _is_finite(values: Iterable[Tensor | None]) -> bool:
    """Whether all numbers are finite; read from the device once."""
    flags = [
        (value.coalesce().values() if value.is_sparse else value).isfinite().all()
        for value in values
        if value is not None
    ]
    if not flags:
        return True
    return bool(torch.stack([flag.to(flags[0].device) for flag in flags]).all())


def _list_names(values: Mapping[str, Tensor]) -> str:
    """Names of the tensors that are not finite, the first ten."""
    names = [
        name
        for name, value in values.items()
        if isinstance(value, Tensor) and not _is_finite([value])
    ]
    more = f" and {len(names) - MAX_SHOWN} more" if len(names) > MAX_SHOWN else ""
    return f"{', '.join(names[:MAX_SHOWN]) or 'another rank'}{more}"


def _find_rows(value: object) -> list[int]:
    """Indexes of the rows of tensors that are not finite."""
    found: set[int] = set()
    for tensor in iter_tensors(value):
        if tensor.dim() and not tensor.is_sparse and not tensor.is_nested:
            bad = ~tensor.detach().isfinite().reshape(len(tensor), -1).all(1)
            found |= set(bad.nonzero().flatten().tolist())
    return sorted(found)
