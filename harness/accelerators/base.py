"""The protocol of an accelerator, the same for one device and for many ranks."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal, Protocol, TypeVar

import torch
from torch import Tensor, nn

from harness.accelerators.optimizer_step import default_step_opt
from harness.data.batch import Batch
from harness.pytree import StateDict, map_tensors

T = TypeVar("T")

StepHook = Callable[[str], object]
"""Called with the name of the optimizer that steps."""

StepOpt = Callable[[Any], object]
"""A function that steps an optimizer; see ``Context.step_opt``."""


def needs_closure(opt: Any) -> bool:
    """Whether an optimizer's ``step`` must be given a function that evaluates the loss.

    Its class says so: a schedule replaces the method of the instance.
    """
    step = getattr(type(opt), "step", None)
    try:
        parameters = [*inspect.signature(step or opt.step).parameters.values()]
    except (TypeError, ValueError):
        return False  # written in C
    if step is not None:
        del parameters[:1]  # self
    return any(
        parameter.default is parameter.empty
        and parameter.kind
        in {parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD}
        for parameter in parameters
    )


def has_modes(opt: object) -> bool:
    """Whether an optimizer trains and evaluates with different weights, by its own methods.

    Schedule-free optimizers do: ``train()`` and ``eval()`` change the weights.
    """
    return all(callable(getattr(opt, name, None)) for name in ("train", "eval"))


def list_parameters(opt: Any) -> list[Any]:
    """The parameters that an optimizer steps, in the order of its groups."""
    return [param for group in opt.param_groups for param in group["params"]]


HOW_TO_STEP = frozenset({"capturable", "differentiable", "foreach", "fused"})
"""Options of torch's optimizers that say how a step is computed. A state does not change them."""


def restore_named_state(
    opt: Any, saved: Mapping[str, object], device: torch.device
) -> None:
    """Restore entries of an optimizer's state that belong to no parameter."""
    for name, value in saved.items():
        opt.state[name] = map_tensors(
            value,
            lambda tensor: tensor.to(device if tensor.dim() else "cpu", copy=True),
        )


def counts_on_device(group: Mapping[str, object]) -> bool:
    """Whether the kernels of a group read its step counters, and so on their device.

    Anywhere else torch would read each counter from the device in every step.
    """
    return bool(group.get("fused") or group.get("capturable"))


def check_whole(model: nn.Module, where: str) -> None:
    """Check that no parameter is divided over ranks, as ``deepspeed.zero.Init`` divides them.

    Raises
    ------
    ValueError
        If one is.
    """
    for name, param in model.named_parameters():
        if hasattr(param, "ds_id"):
            msg = f"prepare: expected whole parameters {where}, got a part of {name!r}."
            advice = 'Train with "zero_optimization": {"stage": 3}, or build the model'
            raise ValueError(f"{msg} {advice} outside of deepspeed.zero.Init.")


def ignore_step(name: str) -> None:
    """Do nothing at a step."""


def missing_backward(where: str) -> RuntimeError:
    """Error for an own ``backward`` that does not call the accelerator's."""
    msg = "backward(loss): expected a call of ctx.accelerator.backward"
    advice = "Call ctx.accelerator.backward(loss, ctx.opt_name) in it."
    return RuntimeError(f"{msg}, got none {where}. {advice}")


class Agreement:
    """A batch at which all ranks do what one of them asks for, such as to stop.

    This one is of a rank alone.
    """

    def __init__(self) -> None:
        self._asked: int | None = None

    def ask(self, value: int = 1) -> None:
        """Ask for it, with a value that all ranks will get; safe in a signal handler.

        The first value counts.
        """
        if self._asked is None:
            self._asked = value

    def check(self) -> int | None:
        """Count a batch; return the value asked for if all ranks are to act after it.

        Every rank calls it after each batch. It sends nothing, and waits only if something
        is asked for. Once it has returned a value, it does so until ``renew``.
        """
        return self._asked

    def renew(self) -> None:
        """Begin anew, after ``check`` has returned a value; at the same batch on all ranks."""
        self._asked = None


class Accelerator(Protocol):
    """Places model and data, runs backward and steps, and communicates between ranks.

    Methods that communicate have a default: what they do where there is one rank.

    Attributes
    ----------
    device : torch.device
        Device of this rank.
    rank, local_rank, world_size : int
        As in torch; 0, 0 and 1 on one device.
    is_main : bool
        True on rank 0.
    accumulate : >= 1
        Micro-batches per optimizer step, as configured.
    precision : str
        ``fp32``, ``bf16`` or ``fp16``.
    window : >= 1
        Micro-batches in the present step. The loop makes it smaller for a short last step.
    steps : dict of int
        Finished optimizer steps by optimizer name, without those skipped on overflow.
    num_backwards : >= 0
        Backward passes that it has made or counted.
    before_step, after_step
        What ``step`` calls before it steps, and after the weights have changed.
    counted : int or None
        Samples of the present batch that count on this rank. 0 means that the batch is a
        placeholder because the rank has no samples left; None, that every sample counts.
    """

    device: torch.device
    rank: int
    local_rank: int
    world_size: int
    is_main: bool
    accumulate: int
    window: int
    steps: dict[str, int]
    num_backwards: int
    before_step: StepHook
    after_step: StepHook

    @property
    def precision(self) -> str:
        """Precision of the forward; the weights may have another."""

    @property
    def counted(self) -> int | None:
        """Samples of the present batch that count; None if all do."""

    def prepare(
        self,
        model: nn.Module,
        optimizers: Mapping[str, object] | None = None,
        loaders: Sequence[object] = (),
    ) -> tuple[nn.Module, dict[str, Any], list[Any]]:
        """Place the model, take over the optimizers, divide the loaders over the ranks.

        The same model object is returned, ready to be called. The optimizers have ``step``,
        ``zero_grad``, ``param_groups``, ``state_dict`` and ``load_state_dict``. A loader that
        is None stays None.
        """

    def optimizing(self, name: str | None = None) -> AbstractContextManager[object]:
        """Run the forward and backward of one optimizer inside (None: the only one)."""

    def building(self) -> AbstractContextManager[object]:
        """Build the model of a fit inside, before ``prepare``."""
        return nullcontext()

    @property
    def guard(self) -> AbstractContextManager[object] | None:
        """Refuses operations on weights that are divided over ranks; None if none are.

        Before ``prepare`` it gives operations the whole weights.
        """

    def backward(self, loss: Tensor, name: str | None = None) -> None:
        """Add the gradients of ``loss / window``; `loss` is a scalar with a graph."""

    def counting_backward(
        self, name: str | None = None
    ) -> AbstractContextManager[object]:
        """Count one backward of the loss that user code runs inside.

        On one device, any way of doing so works. DeepSpeed needs a call of ``backward``.
        """

    def is_boundary(self, name: str | None = None) -> bool:
        """True when the window has as many backwards as it should."""

    def step(
        self, name: str | None = None, step_opt: StepOpt = default_step_opt
    ) -> bool:
        """Step at a boundary and clear the gradients; True if the weights were changed.

        It calls ``before_step`` before, and ``after_step`` if the weights were changed.
        """

    def drop_window(self) -> None:
        """Clear the gradients of windows that were not stepped, and count them as empty."""

    def clip(
        self, max_norm: float, name: str | None = None, norm_type: float = 2.0
    ) -> Tensor:
        """Clip the total gradient norm before ``step``; returns the norm, a scalar."""

    def to_device(self, batch: Batch) -> Batch:
        """Move the batch to ``device``; tuples, lists and mappings keep their structure."""

    def gather(self, tensor: Tensor) -> Tensor:
        """Concatenate the tensors of all ranks along dim 0; their lengths may differ.

        A rank whose batch is a placeholder (``counted`` is 0) adds no rows.
        """
        return tensor

    def reduce(
        self, tensor: Tensor, op: Literal["sum", "mean", "max"] = "sum"
    ) -> Tensor:
        """The tensor reduced over ranks; the same value on each."""
        return tensor

    def broadcast(self, value: object, src: int = 0) -> Any:
        """The value that rank `src` holds: numbers, strings, lists, dicts, tensors."""
        return value

    def gather_objects(self, value: T) -> list[T]:
        """The value of each rank, in order of rank: what ``broadcast`` takes, on the CPU."""
        return [value]

    def any(self, flag: bool) -> bool:
        """True on every rank if it is on one."""
        return flag

    def meet(self, what: str) -> None:
        """Wait until every rank does the same, before something that all must do.

        An error on each rank tells what another one does instead, or that it has ended.

        Parameters
        ----------
        what
            What this rank does, for messages.
        """
        return

    def agreement(self, name: str) -> Agreement:
        """Make what ranks use to agree on a batch, without a message in each.

        Every rank must call it, at the same point.

        Parameters
        ----------
        name
            Its name. A new one of the same name takes the place of the earlier one.
        """
        return Agreement()

    def barrier(self) -> None:
        """Wait until every rank gets here."""
        return

    def full_state_dict(self, model: nn.Module) -> dict[str, Tensor]:
        """Whole weights and buffers, detached, on the CPU; empty except on rank 0."""

    def state_dict(self) -> StateDict:
        """Weights, buffers, optimizers, open gradients and counters of this rank.

        Tensors are live: copy them before the next step. Everything else is plain JSON.
        """

    def load_state_dict(
        self, state: StateDict, parts: Sequence[str] = ("model", "optimizers")
    ) -> None:
        """Restore what ``state_dict`` returned, all of it or one of the two parts.

        Raises
        ------
        CheckpointError
            If it is from another model, other optimizers or another number of ranks.
        """

    def share_weights(self, model: nn.Module) -> None:
        """Give every rank the parameters and buffers of rank 0's model, before ``prepare``."""
        return

    def finish(self, *, failed: bool = False, keep: bool = True) -> None:
        """Release what ``prepare`` created, engines and hooks; the model is whole again.

        Parameters
        ----------
        failed
            This rank ends alone and the others may not call it: nothing is gathered.
        keep
            False: this rank needs no weights. Its parameters are on the ``meta`` device.
        """
