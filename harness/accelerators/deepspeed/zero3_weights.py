"""Whole weights where user code reads them at ZeRO 3, or an error that says where it may.

Also the form that an engine expects of a model that was divided while it was built.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import wraps
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from harness.accelerators.deepspeed.library import replace_linear, share_and_divide
from harness.accelerators.deepspeed.precision import find_weights_dtype
from harness.accelerators.distributed.group import RankGroup

_MARK = -1
"""Stands for a layer in the set of layers that use a parameter, so that DeepSpeed keeps it."""

_METADATA = frozenset(
    {"dtype", "device", "layout", "grad", "grad_fn", "is_leaf", "names"}
    | {"requires_grad", "requires_grad_", "retains_grad", "is_floating_point"}
    | {"is_complex", "is_cuda", "is_cpu", "is_meta", "is_sparse"}
    | {"__hash__", "__repr__", "_version"}
)
"""What a part of a parameter says as the whole does."""

_GRADIENT = frozenset([torch.Tensor.grad.__get__, torch.Tensor.grad.__set__])  # type: ignore[union-attr]

_FORM = frozenset(
    [
        *(torch.Tensor.shape.__get__, torch.Tensor.ndim.__get__),  # type: ignore[attr-defined]
        *(torch.Tensor.nbytes.__get__, torch.Tensor.__len__),  # type: ignore[attr-defined]
        *(torch.Tensor.dim, torch.Tensor.ndimension, torch.Tensor.size),
        *(torch.Tensor.numel, torch.Tensor.nelement, torch.Tensor.stride),
        *(torch.Tensor.is_contiguous, torch.numel),
    ]
)
"""What a parameter says of its form, which is known without the values."""


_DIVIDE_GRADIENTS = (
    "independent_gradient_partition_epilogue",
    "_DeepSpeedZeroOptimizer_Stage3__reduce_and_partition_ipg_grads",
)
"""Methods of DeepSpeed 0.19.8 that read many attributes of parameters in a step."""


class WholeWeights(TorchFunctionMode):
    """Gives operations whole weights where ZeRO 3 has divided them.

    DeepSpeed gathers the weights of a layer while the layer runs. A penalty on weights, or a
    gradient of a gradient, reads them outside. In ``gathering`` such an operation gets the
    weight from all ranks, which is kept until ``release``. Elsewhere it is refused: other
    ranks might not read the same weight. Shapes are those of whole weights everywhere.

    Parameters
    ----------
    model
        The model, after its engines were created.
    optimizers
        DeepSpeed's of ZeRO 3.
    """

    def __init__(self, model: nn.Module, optimizers: Iterable[Any] = ()) -> None:
        super().__init__()
        for wrapper in optimizers:
            for name in _DIVIDE_GRADIENTS:
                setattr(wrapper, name, self._leave(getattr(wrapper, name)))
        for module in model.modules():
            for hooks in (module._forward_pre_hooks, module._forward_hooks):
                for number, hook in hooks.items():
                    # A method of a dict or another type of C has None.
                    if str(getattr(hook, "__module__", "")).startswith("deepspeed."):
                        hooks[number] = self._leave(hook, of_layer=True)
        # DeepSpeed's, until ``keep_functions`` ends.
        functional = torch.nn.functional
        functional.linear = self._make_linear(functional.linear)
        self._params: list[Any] = [p for p in model.parameters() if hasattr(p, "ds_id")]
        self._names = {id(p): name for name, p in model.named_parameters()}
        self._gathered: list[Any] = []
        self._is_gathering = False

    def __torch_function__(
        self, func: Any, types: object, args: Any = (), kwargs: Any = None
    ) -> object:
        # Each operation of a model's forward comes here, so this is short.
        for value in args if kwargs is None else (*args, *kwargs.values()):
            kind = type(value)
            if kind is nn.Parameter:
                params: Iterable[nn.Parameter] = (value,)
            elif kind is list or kind is tuple:
                params = _flatten(value)
            elif kind is not torch.Tensor and hasattr(value, "ds_status"):
                params = (value,)  # of a subclass
            else:
                continue
            for param in params:
                if _is_divided(param) and _is_called_by_user():
                    if func in _FORM:
                        return func(_make_form(param), *args[1:], **(kwargs or {}))
                    self._read(param, func)
        if kwargs is None:
            return func(*args)
        if func is torch.autograd.grad and kwargs.get("create_graph"):
            # The second backward runs no hooks of layers, but the first one divides weights
            # that layers have gathered.
            self._gather_and_keep(self._params)
        return func(*args, **kwargs)

    def _leave(
        self, method: Callable[..., Any], *, of_layer: bool = False
    ) -> Callable[..., Any]:
        """Wrap a method of DeepSpeed to run outside of this mode; it runs no code of the user.

        DeepSpeed calls torch thousands of times in a step. The mode would make the step a
        tenth slower.
        """

        @wraps(method)
        def called(*args: Any, **kwargs: Any) -> Any:
            depth = torch._C._len_torch_function_stack()
            if not depth or torch._C._get_function_stack_at(depth - 1) is not self:
                return method(*args, **kwargs)
            if of_layer:
                _check_no_transform()
            torch._C._pop_torch_function_stack()
            try:
                return method(*args, **kwargs)
            except AttributeError as error:
                if "'Tensor' object has no attribute 'ds_" in str(error):
                    what = "torch.func.functional_call gives them others"
                    error.add_note(
                        f"ZeRO 3 runs layers with their own weights, and {what}: use ZeRO 2."
                    )
                raise
            finally:
                torch._C._push_on_torch_function_stack(self)

        return called

    def _make_linear(self, linear: Callable[..., Any]) -> Callable[..., Any]:
        """Wrap DeepSpeed's ``linear``, which no mode sees, to gather divided weights first."""
        called = self._leave(linear)

        @wraps(linear)
        def run(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Any:
            for param in filter(_is_divided, (weight, bias)):
                self._read(param, linear)
            return called(input, weight, bias)

        return run

    def _read(self, param: Any, func: Any) -> None:
        """Gather a parameter that an operation reads, or refuse it."""
        if self._is_gathering:
            self._gather_and_keep([param])
            return
        name = _name(func)
        if name in _METADATA:
            return
        msg = f"ZeRO 3: expected no use of the weight {self._names.get(id(param))!r}"
        got = f"got {name}: this rank has a part of it"
        advice = "Read ctx.accelerator.full_state_dict(ctx.model) on every rank (rank 0"
        raise ValueError(
            f"{msg} outside a step, {got}. {advice} gets them), or use ZeRO 2."
        )

    def _gather_and_keep(self, params: Iterable[Any]) -> None:
        """Gather parameters, and keep DeepSpeed from dividing them again."""
        _check_no_transform()
        for param in params:
            param.ds_active_sub_modules.add(_MARK)
            if _is_divided(param):
                param.all_gather(param_list=[param])
            self._gathered.append(param)

    @contextmanager
    def gathering(self) -> Iterator[None]:
        """Gather each weight that is read inside, until ``release``."""
        before, self._is_gathering = self._is_gathering, True
        try:
            with self:
                yield
        finally:
            self._is_gathering = before
            if not before:
                self.release()

    def release(self) -> None:
        """Divide the weights again that were gathered."""
        while self._gathered:
            param = self._gathered.pop()
            param.ds_active_sub_modules.discard(_MARK)
            if not (_is_divided(param) or param.ds_active_sub_modules):
                param.partition()


class LocalGradients(TorchFunctionMode):
    """Refuses gradients that code of the user reads from parameters before a step.

    Engines combine the gradients of all ranks only in the step. Before it, a parameter has
    those of this rank's rows, and at ZeRO 2 and 3 none at all: code that clips them would
    do nothing, without an error.

    Parameters
    ----------
    stage : 0..3
        ZeRO stage.
    """

    def __init__(self, stage: int) -> None:
        super().__init__()
        self._stage = stage

    def __torch_function__(
        self, func: Any, types: object, args: Any = (), kwargs: Any = None
    ) -> object:
        is_read = func in _GRADIENT and isinstance(args[0], nn.Parameter)
        if is_read and _is_called_by_user():
            has = "it has none" if self._stage > 1 else "it is of this rank alone"
            msg = f"ZeRO {self._stage}: expected no use of a parameter's .grad before"
            advice = "GradientClip clips those of all ranks, and records grad_norm."
            raise ValueError(f"{msg} the step, got one: {has}. {advice}")
        return func(*args, **(kwargs or {}))


class NewWeights(TorchFunctionMode):
    """Gives operations whole weights of a model that is divided while it is built.

    A module sets weights of layers that it has made, as rules for initial weights do. What
    ``deepspeed.zero.Init`` has divided by then would be found empty and stay as it was, without
    an error. Here each weight that an operation reads is gathered. It is divided again, with
    what was done to it, before the next one is gathered, unless a view of it is in use.

    Every rank must run the same operations.
    """

    def __init__(self, ranks: RankGroup) -> None:
        super().__init__()
        self._ranks = ranks
        self._gathered: list[Any] = []

    def __torch_function__(
        self, func: Any, types: object, args: Any = (), kwargs: Any = None
    ) -> object:
        kwargs = kwargs or {}
        params: list[Any] = [*filter(_is_divided, _flatten((*args, *kwargs.values())))]
        if params and _is_called_by_user() and _name(func) not in _METADATA:
            if func in _FORM:
                return func(_make_form(params[0]), *args[1:], **kwargs)
            self._gather(params)
        return func(*args, **kwargs)

    def _gather(self, params: list[Any]) -> None:
        """Gather weights, after dividing those that are not in use on any rank."""
        if self._gathered:
            in_use = self._ranks.any_each(list(map(_is_viewed, self._gathered)))
            pairs = zip(self._gathered, in_use, strict=True)
            self._divide([param for param, is_used in pairs if not is_used])
        for param in params:
            param.all_gather()
        self._gathered += params

    def __exit__(self, kind: object, *error: object) -> None:
        super().__exit__(kind, *error)  # type: ignore[no-untyped-call]
        if kind is None:  # the other ranks get here too
            self._divide(self._gathered)

    def _divide(self, params: Iterable[Any]) -> None:
        """Divide weights again."""
        params = list(params)
        for param in params:
            if not _is_divided(param):  # by the user's own code
                share_and_divide(param)
        done = set(map(id, params))
        self._gathered = [param for param in self._gathered if id(param) not in done]


def finish_zero_init(
    model: nn.Module, config: Mapping[str, Any], device: torch.device
) -> None:
    """Do for a model that was divided while it was built what DeepSpeed does for others.

    DeepSpeed 0.19.8 leaves dtypes of parameters and devices of buffers as ``zero.Init`` has
    made them, also those of parts that were built without it, and torch's ``linear``.

    Parameters
    ----------
    model
        The model; one without divided parameters is left alone.
    """
    if not any(hasattr(param, "ds_id") for param in model.parameters()):
        return
    if config["zero_optimization"].get("memory_efficient_linear", True):
        replace_linear()
    dtype = find_weights_dtype(config)
    for param in model.parameters() if dtype is not None else ():
        if param.dtype in _CAST:
            param.data = param.data.to(dtype)
            if hasattr(param, "ds_tensor"):
                param.ds_tensor.data = param.ds_tensor.data.to(dtype)
    for buffer in model.buffers():
        buffer.data = buffer.data.to(device)


_CAST = frozenset({torch.float32, torch.float16, torch.bfloat16})
"""Dtypes of weights that DeepSpeed casts to the one of training."""


def _make_form(param: Any) -> torch.Tensor:
    """A tensor without values that has the form of the whole parameter."""
    return torch.empty(param.ds_shape, dtype=param.dtype, device="meta")


def _check_no_transform() -> None:
    """Refuse layers and divided weights in a transform, which would keep what is gathered."""
    # torch 2.13 has no public way to it.
    if torch._C._functorch.peek_interpreter_stack() is not None:
        msg = "ZeRO 3: expected no layer or weight in a function that torch.func transforms"
        raise ValueError(f"{msg}, got one (vmap, grad, jvp, ...). Use ZeRO 2.")


def _is_viewed(param: torch.Tensor) -> bool:
    """Whether another tensor shares the memory of a parameter."""
    return _count_uses(param) > _count_uses(torch.empty(1))


def _count_uses(tensor: torch.Tensor) -> int:
    """Tensors that share the memory of one, and a constant."""
    # torch 2.13 has no public way to it.
    count: int = torch._C._storage_Use_Count(tensor.untyped_storage()._cdata)
    return count


def _name(func: Any) -> str:
    """The name of an operation, or of the attribute that it reads."""
    name = getattr(func, "__name__", "")
    return getattr(func.__self__, "__name__", name) if name == "__get__" else name


def _is_divided(value: Any) -> bool:
    """True for a parameter of ZeRO 3 of which this rank has only a part."""
    status = getattr(value, "ds_status", None)
    # The name of a member of an enum costs a call.
    return status is not None and status._name_ == "NOT_AVAILABLE"


def _flatten(values: Iterable[Any]) -> Iterator[nn.Parameter]:
    """The parameters among the arguments of an operation, also those in lists."""
    for value in values:
        if isinstance(value, list | tuple):
            yield from _flatten(value)
        elif hasattr(value, "ds_status"):  # a subclass, too
            yield value


def _is_called_by_user() -> bool:
    """False where DeepSpeed or this package makes the call, below torch's own code.

    Of DeepSpeed's functions, ``wrapper`` only runs the ``__init__`` of a layer of torch.
    """
    frame = sys._getframe(2)
    while frame is not None:
        module = frame.f_globals.get("__name__", "").partition(".")[0]
        is_mode = frame.f_code.co_name == "__torch_function__"  # around this one
        if module != "torch" and not is_mode:
            is_init = frame.f_code.co_name == "wrapper"
            return is_init or module not in {"deepspeed", "harness"}
        frame = frame.f_back  # type: ignore[assignment]
    return False
