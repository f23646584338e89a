"""Base of callbacks that average the weights, and put the averages into the model."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from types import MappingProxyType

import torch
from torch import Tensor, nn

from harness.callback import MetricsListener
from harness.checks.values import check_flags
from harness.context import Context
from harness.events import nearest
from harness.pytree import StateDict

AverageFunction = Callable[[list[Tensor], list[Tensor], int], object]
"""Called with averages, weights and the number of earlier updates; changes the averages."""

_LOW = frozenset({torch.bfloat16, torch.float16})
"""Dtypes that lose small changes; their averages are float32."""


class AveragedWeights(MetricsListener):
    """Averages the weights of named optimizers, each at its own steps.

    The first update copies the weights. Averages are kept on the device of the weights, at
    least in float32. Buffers, such as BatchNorm's statistics, are not averaged.

    Parameters
    ----------
    opt_name
        Optimizer whose weights are averaged; None: all.
    in_result
        Whether the fit returns the averaged weights.

    Attributes
    ----------
    in_valid : bool
        Whether the averages are validated; then weights that are loaded from a checkpoint,
        without the rest of the fit, are the averages.
    averages : dict of tensors
        Averaged weights by name.
    counts : dict of int
        Updates by optimizer name.

    Raises
    ------
    ValueError
        Before the first epoch, if there is no such optimizer, another callback averages the
        same weights for the result, or the weights are divided or rounded by an engine.
    """

    weight = 45  # after KeepBestModel has copied the validated weights
    in_valid = False
    event_weights = MappingProxyType({"on_fit_end": 35})  # before KeepBestModel

    def __init__(self, *, opt_name: str | None = None, in_result: bool = True) -> None:
        check_flags(type(self).__name__, in_result=in_result)
        self.opt_name, self.in_result = opt_name, in_result
        self._reset()

    def _reset(self) -> None:
        self.averages: dict[str, Tensor] = {}
        self.counts: dict[str, int] = {}
        self._names: dict[str, list[str]] = {}
        self._trained: dict[str, Tensor] = {}

    # --- before the fit

    def check(self, ctx: Context) -> None:
        """Refuse what cannot be averaged."""
        name, known = type(self).__name__, list(ctx.optimizers)
        if self.opt_name is not None and self.opt_name not in known:
            guess = nearest(self.opt_name, known)
            msg = f"{name}(opt_name): expected the name of an optimizer"
            got = f"got {self.opt_name!r}.{guess}"
            raise ValueError(f"{msg}, {got} Choose from {known}.")
        params = list(ctx.model.parameters())
        if any(hasattr(param, "ds_id") for param in params):
            msg = f"{name}: expected whole weights on each rank, got ZeRO stage 3."
            raise ValueError(f"{msg} Use stage 0, 1 or 2.")
        is_engine = "stage" in ctx.accelerator.state_dict()
        low = {param.dtype for param in params} & _LOW
        if is_engine and low:
            got = ", ".join(map(str, low))
            msg = f"{name}: expected float32 weights, got {got}, a rounded copy."
            raise ValueError(f"{msg} Use torch_autocast in DeepSpeed's config.")
        others = (c for c in ctx.callbacks if isinstance(c, AveragedWeights))
        for other in others:
            if other is not self and self._conflicts_with(other):
                got = f"two, {type(other).__name__} and {name}"
                msg = f"{name}: expected one average of the same weights, got {got}."
                raise ValueError(f"{msg} Pass in_result=False to one, or opt_name.")

    def _conflicts_with(self, other: AveragedWeights) -> bool:
        """Whether both would put their averages into the same weights of the result."""
        is_same = None in {self.opt_name, other.opt_name} or (
            self.opt_name == other.opt_name
        )
        return is_same and self.in_result and other.in_result

    def on_fit_begin(self) -> None:
        self._reset()

    def on_epoch_begin(self) -> None:
        """Find out which weights belong to which optimizer; put back what an epoch left."""
        self.put_back()
        self._find_names()

    def _find_names(self) -> None:
        names = [name for name, _ in self.ctx.model.named_parameters()]
        members = self.ctx.accelerator.state_dict()["members"]
        self._names = {
            opt_name: [names[n] for group in groups for n in group]
            for opt_name, groups in members.items()
            if self.opt_name in {None, opt_name}
        }

    # --- averages

    def update(self, opt_name: str, average: AverageFunction) -> None:
        """Add the present weights of an optimizer to their averages."""
        params = dict(self.ctx.model.named_parameters())
        new: dict[str, Tensor] = {}
        known: dict[str, Tensor] = {}
        for name in self._names[opt_name]:
            value = params[name].detach()
            value = value.float() if value.dtype in _LOW else value
            (known if name in self.averages else new)[name] = value
        # An optimizer may go on with weights that another one has stepped.
        count = self.counts.get(opt_name, max(self.counts.values(), default=0))
        if known:
            averages = [self.averages[name] for name in known]
            average(averages, list(known.values()), count)
        self.averages |= {name: value.clone() for name, value in new.items()}
        self.counts[opt_name] = count + 1

    def copy_to(self, model: nn.Module) -> None:
        """Copy the averages into a model with the same names of weights."""
        for param, average in self._pairs(model):
            # Through ``data`` the change counts as none, so that a signal may end the fit in
            # validation: ``on_interrupt`` puts the weights back before the checkpoint.
            param.data.copy_(average)

    def _pairs(self, model: nn.Module) -> Iterator[tuple[Tensor, Tensor]]:
        params = dict(model.named_parameters())
        for name, average in self.averages.items():
            if name not in params:
                place = f"{type(self).__name__}.copy_to({type(model).__name__})"
                msg = f"{place}: expected a weight {name!r}, got none."
                raise ValueError(f"{msg} Pass a model like the one that was trained.")
            yield params[name], average

    def put_in(self) -> None:
        """Put the averages into the model, and keep the weights of training."""
        if not self._trained:
            params = dict(self.ctx.model.named_parameters())
            self._trained = {n: params[n].detach().clone() for n in self.averages}
            self.copy_to(self.ctx.model)

    def put_back(self) -> None:
        """Put the weights of training back, if the averages are in the model."""
        params = dict(self.ctx.model.named_parameters()) if self._trained else {}
        for name, value in self._trained.items():
            params[name].data.copy_(value)
        self._trained = {}

    # --- the end

    def on_interrupt(self) -> None:
        """Put the weights of training back, for the checkpoint."""
        self.put_back()

    def on_exception(self) -> None:
        self.put_back()

    def on_fit_end(self) -> None:
        """Put the averages into the result; ``KeepBestModel`` may put the best ones there."""
        self.put_back()
        if not self.in_result:
            return
        names = {name for name, _ in self.ctx.model.named_parameters()}
        if missing := sorted(self.averages.keys() - names):  # layers have been changed
            msg = f"{type(self).__name__}: expected weights {missing}, got none."
            advice = "The fit returns those that were trained. Change layers before it."
            warnings.warn(f"{msg} {advice}", stacklevel=2)
            return
        self.copy_to(self.ctx.model)

    def state_dict(self) -> StateDict:
        """Return the averages, the numbers of updates, and whether they are validated."""
        return {
            "averages": self.averages,
            "counts": self.counts,
            "is_validated": self.in_valid,
        }

    def load_state_dict(self, state: StateDict) -> None:
        """Restore the averages and the numbers of updates."""
        params = dict(self.ctx.model.named_parameters())
        self.averages = {
            name: value.to(params[name].device, copy=True)
            for name, value in state["averages"].items()
        }
        self.counts = dict(state["counts"])
