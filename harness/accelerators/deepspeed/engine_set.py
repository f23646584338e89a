"""The engines of one model, by the name of their optimizer."""

from __future__ import annotations

import traceback
from argparse import Namespace
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from harness.accelerators.base import list_parameters
from harness.accelerators.deepspeed import library
from harness.accelerators.deepspeed.config import zero_stage
from harness.accelerators.deepspeed.engine import NamedEngine, find_parameters

DEFAULT_NAME = "opt"
"""Name of the optimizer that DeepSpeed's config describes."""


class EngineSet:
    """The engines of one model, of which at most one is active.

    Parameters
    ----------
    engines
        One for each named optimizer; none if the model is only evaluated.
    """

    def __init__(self, engines: Sequence[NamedEngine] = ()) -> None:
        self._by_name = {engine.name: engine for engine in engines}
        self._active: NamedEngine | None = None
        self._checked_graphs: set[str] = set()

    def __iter__(self) -> Iterator[NamedEngine]:
        return iter(self._by_name.values())

    def __len__(self) -> int:
        return len(self._by_name)

    @property
    def names(self) -> list[str]:
        """Names of the optimizers."""
        return list(self._by_name)

    @property
    def deepspeed_engines(self) -> dict[str, Any]:
        """DeepSpeed's engines by the name of their optimizer."""
        return {engine.name: engine.engine for engine in self}

    def find(self, name: str | None) -> NamedEngine:
        """The engine of an optimizer; None means the active one, or the only one.

        Raises
        ------
        ValueError
            If there is no such optimizer, or None could mean several.
        """
        if name is None and self._active is not None:
            return self._active
        if name is None and len(self) == 1:
            return next(iter(self))
        if name not in self._by_name:
            msg = "accelerator: expected the name of a prepared optimizer"
            raise ValueError(f"{msg}, got {name!r}. Choose from {self.names}.")
        return self._by_name[name]

    def find_owner(self, param: Tensor) -> NamedEngine | None:
        """The engine whose optimizer steps a parameter."""
        return next((e for e in self if id(param) in e.owned_ids), None)

    @contextmanager
    def activate(self, name: str | None) -> Iterator[None]:
        """Run the forward and backward of one optimizer inside."""
        engine = self.find(name)
        engine.check_frozen()
        engine.follow_weights()
        engine.begin_forward()
        before, self._active = self._active, engine
        try:
            with engine.freeze_others():
                yield
        finally:
            self._active = before

    def check_loss(self, engine: NamedEngine, loss: Tensor) -> None:
        """Refuse a loss whose gradients would be wrong or missing.

        The graph is checked at the first loss of each optimizer only.

        Raises
        ------
        ValueError
            If the loss is not a scalar with a graph, or its graph contains parameters of
            another optimizer.
        RuntimeError
            If there are several optimizers and this one is not active.
        """
        place = f"backward({engine.name!r})"
        if loss.numel() != 1 or loss.grad_fn is None:
            got = f"shape {tuple(loss.shape)}, grad_fn {loss.grad_fn}"
            msg = f"{place}: expected a scalar with a graph, got {got}."
            raise ValueError(f"{msg} Take the mean, and compute it with gradients on.")
        if len(self) == 1:
            return
        if self._active is not engine:
            active = None if self._active is None else self._active.name
            section = f"'with accelerator.optimizing({engine.name!r})'"
            msg = f"{place}: expected {section} around it, got {active!r}."
            advice = "Put the optimizer's forward and backward inside."
            raise RuntimeError(f"{msg} {advice}")
        if engine.name not in self._checked_graphs:
            self._check_graph(place, engine, loss)
            self._checked_graphs.add(engine.name)

    def _check_graph(self, place: str, engine: NamedEngine, loss: Tensor) -> None:
        used = find_parameters(loss)
        for other in self:
            if other is not engine and used & other.owned_ids:
                msg = f"{place}: expected a separate graph, got one shared with"
                advice = f"Compute the loss of {engine.name!r} inside its optimizing()."
                raise ValueError(f"{msg} optimizer {other.name!r}. {advice}")


def create_engines(
    model: nn.Module,
    optimizers: Mapping[str, Optimizer],
    config: Mapping[str, object],
    device: torch.device,
    on_step: Callable[[str, bool], None],
) -> EngineSet:
    """Make one engine for each optimizer.

    Parameters
    ----------
    optimizers
        By name; empty if the config describes the optimizer.
    on_step
        Called after each step with the optimizer's name and whether weights changed.
    """
    deepspeed = library.import_deepspeed()
    library.silence_deepspeed_warnings()
    deepspeed.utils.logger.setLevel(str(config.get("log_level", "error")).upper())
    stage = zero_stage(config)
    trained: list[Tensor] = [
        param for param in model.parameters() if param.requires_grad
    ]
    owned = {name: list_parameters(opt) for name, opt in optimizers.items()}
    # DeepSpeed changes the model in each call, so all groups are copied before the first.
    groups = {name: _copy_groups(opt, stage) for name, opt in optimizers.items()}
    if not optimizers:
        owned, groups = {DEFAULT_NAME: trained}, {DEFAULT_NAME: [{"params": trained}]}
    for param in model.parameters():
        # DeepSpeed 0.19.8 cannot send others, such as transposed or channels_last ones.
        if not param.is_contiguous():
            param.data = param.data.contiguous()
    made = {}
    for name in owned:
        with (
            library.ignore_warnings(),
            library.keep_optimizers(),
            library.allow_float64(),
            explain_failure(config),
        ):
            made[name], *_ = deepspeed.initialize(
                args=Namespace(device_rank=device.index or 0),
                model=model,
                optimizer=optimizers.get(name),
                model_parameters=None if optimizers else trained,
                config=dict(config),
            )
        library.correct_half_autocast(made[name])
        wrapper, num_ranks = made[name].optimizer, made[name].world_size
        # Sums of bfloat16 gradients in float32 have another wrapper at ZeRO 1, which has
        # zeros for missing gradients itself.
        is_summed = type(wrapper).__name__ == "BF16_Optimizer"
        if stage in {1, 2} and num_ranks > 1 and not is_summed:
            library.order_reductions(wrapper, model)
        is_double = any(param.dtype == torch.float64 for param in owned[name])
        if is_double and "communication_data_type" not in config:
            # DeepSpeed would send them as float32.
            made[name].communication_data_type = torch.float64
    return EngineSet(
        [
            NamedEngine(name, engine, model, owned[name], stage, groups[name], on_step)
            for name, engine in made.items()
        ]
    )


@contextmanager
def explain_failure(config: Mapping[str, Any]) -> Iterator[None]:
    """Name the optimizer or scheduler of the config that DeepSpeed fails to build inside.

    Any other error gains a note: DeepSpeed's own seldom tell the key of the config.
    """
    try:
        yield
    except Exception as error:
        frames = traceback.extract_tb(error.__traceback__)
        called = {frame.name for frame in frames}
        if "_scheduler_from_config" in called:
            section = "scheduler"
        elif called & {"_configure_basic_optimizer", "_do_sanity_check"}:
            section = "optimizer"
        else:
            section = ""
        if section not in config:
            zero = sorted(config.get("zero_optimization", {}))
            error.add_note(
                "in deepspeed.initialize, with a config of"
                f" {', '.join(sorted(config))}; zero_optimization has {', '.join(zero)}"
            )
            raise
        place = f"accelerator(config): expected an {section} that DeepSpeed builds"
        msg = f"{place.replace('an s', 'a s')}, got {config[section]!r}: {error}."
        if any("op_builder" in frame.filename for frame in frames):
            advice = "Its kernel could not be compiled, see 'harness doctor'."
            other = "Use 'torch_adam': true in its params, or an optimizer of torch in setup."
            raise ValueError(f"{msg} {advice} {other}") from error
        raise ValueError(f"{msg} Correct its type or params.") from error


def _copy_groups(opt: Optimizer, stage: int) -> list[dict[str, Any]]:
    """Copy the groups; ZeRO 1 and 2 fail on one whose parameters are all frozen."""
    for group in opt.param_groups if stage else ():
        group["params"] = [p for p in group["params"] if p.requires_grad]
    return [dict(group) for group in opt.param_groups if group["params"]]
