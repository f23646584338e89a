"""What validation changes, as it was before: a resume in the middle of it starts it again."""

from __future__ import annotations

import copy
from dataclasses import dataclass

from torch import nn

from harness.checkpoint.callback_matching import name_callbacks
from harness.checkpoint.held.attributes import Attributes, copy_attributes
from harness.checkpoint.held.objects import (
    States,
    capture_before_validation,
    capture_metrics,
    get_extra_states,
    mark_tensors,
)
from harness.checkpoint.state import get_generators, search_context
from harness.checks.optimizers import is_user_defined
from harness.context import Context
from harness.pytree import StateDict
from harness.reshard.consolidated import option_groups
from harness.rng import get_rng_state

VALIDATION_EVENTS = (
    "on_valid_begin",
    "on_valid_batch_begin",
    "on_valid_batch_after_pred",
    "on_valid_batch_after_loss",
    "on_valid_batch_end",
)
"""Events that fire again when a fit that stopped in validation resumes.

With several sets, ``on_valid_end`` does too. The callbacks of this package act there once the
last set is done.
"""


@dataclass(frozen=True, kw_only=True)
class ValidationStart:
    """What validation changes, as it was before."""

    random: StateDict  #: state of all random generators
    #: position in the run, and the highest indices there
    journal: int
    indices: StateDict | None
    lengths: dict[str, dict[str, int]]  #: length of each series of records
    #: states of the callbacks that listen to validation
    callbacks: dict[str, StateDict]
    #: what hangs on the model, the loss and callbacks, if validation may change it
    metrics: StateDict
    objects: States
    attributes: Attributes
    extra: StateDict  #: state of modules beside tensors
    #: options of each parameter group, such as learning rates, by optimizer
    options: dict[str, list[StateDict]]
    #: where each tensor of the model is, and how often it was changed
    tensors: list[tuple[int, int]]

    def has_same_tensors(self, model: nn.Module) -> bool:
        """False if validation has changed the model, so that ``rewind`` is not enough."""
        return self.tensors == mark_tensors(model)

    def rewind(self, state: StateDict) -> None:
        """Take a state captured in the middle of validation back to its beginning."""
        state["metrics"] = self.metrics
        for root, found in state["held"].items():
            found |= {p: s for p, s in self.objects.get(root, {}).items() if p in found}
        for root, found in state["fields"].items():
            for path, own in found.items():
                before = self.attributes.get(root, {}).get(path, {})
                own |= {name: before[name] for name in own.keys() & before.keys()}
        state["random"], state["journal"] = self.random, self.journal
        state["indices"] = self.indices
        state["extra"] = self.extra
        for name, groups in option_groups(state["accelerator"]).items():
            for group, options in zip(groups, self.options[name], strict=False):
                group.update(options)
        state["callbacks"] = state["callbacks"] | self.callbacks
        state["records"] = {
            what: {
                split: series[: sets[split]]
                for split, series in found.items()
                if split in sets
            }
            for what, found in state["records"].items()
            if (sets := self.lengths.get(what)) is not None
        }


def mark_validation(ctx: Context) -> None:
    """Remember what a resume in the middle of validation starts again from.

    Nothing is remembered in an evaluation, or if nothing saves the fit.
    """
    if ctx.train_pass is None or not ctx.is_saved:
        return
    search = search_context(ctx)
    ctx.valid_start = ValidationStart(
        random=get_rng_state(get_generators(ctx, search), ctx.device),
        journal=ctx.run.position(),
        indices=ctx.run.get_indices(),
        lengths=ctx.record_book.count(),
        callbacks={
            name: copy.deepcopy(callback.state_dict())
            for name, callback in name_callbacks(ctx.callbacks)
            if any(hasattr(callback, event) for event in VALIDATION_EVENTS)
            or (is_user_defined(callback) and hasattr(callback, "on_valid_end"))
        },
        metrics=copy.deepcopy(capture_metrics(ctx.model)),
        objects=copy.deepcopy(capture_before_validation(search)),
        attributes=copy_attributes(search),
        extra=copy.deepcopy(get_extra_states(ctx.model)),
        options={
            name: [
                {key: copy.deepcopy(group[key]) for key in group if key != "params"}
                for group in opt.param_groups
            ]
            for name, opt in ctx.optimizers.items()
        },
        tensors=mark_tensors(ctx.model),
    )
