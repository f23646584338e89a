"""The only importer of DeepSpeed."""

from __future__ import annotations

import copy
import inspect
import logging
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from functools import cache, wraps
from types import ModuleType
from typing import Any

import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook

from harness.accelerators.deepspeed.config import SIZES
from harness.accelerators.devices import choose_device
from harness.accelerators.distributed.environment import set_environment
from harness.pytree import map_tensors

# ----------------------------------------------------------------- the door


@cache
def import_deepspeed() -> ModuleType:
    """DeepSpeed, imported quietly, without MLflow, and without compiling at start."""
    # DeepSpeed's autotuner imports MLflow, which takes a second and has no place in the
    # training process; nothing else of it does.
    had_mlflow = "mlflow" in sys.modules
    if not had_mlflow:
        sys.modules["mlflow"] = None  # type: ignore[assignment]
    # Without a device DeepSpeed warns at each import that there is none.
    named = {} if choose_device().type == "cuda" else {"DS_ACCELERATOR": "cpu"}
    try:
        with set_environment(**named), ignore_warnings():
            import deepspeed  # noqa: PLC0415  slow, and not on every system
    finally:
        if not had_mlflow:
            del sys.modules["mlflow"]
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    # At ZeRO 0, DeepSpeed 0.19.8 refuses gradients of any other dtype.
    device = deepspeed.get_accelerator()
    dtypes = [*device.supported_dtypes(), torch.float64]
    device.supported_dtypes = lambda: dtypes
    # Asked for its ops, DeepSpeed tries to compile each, with chatter. The one that it asks
    # for itself, for ranks that meet on a CPU, would then be built: half a minute.
    built = deepspeed.git_version_info.installed_ops.get("deepspeed_shm_comm", False)
    vars(deepspeed.ops).setdefault("__compatible_ops__", {"deepspeed_shm_comm": built})
    _import_muon()
    found: ModuleType = deepspeed
    return found


def _import_muon() -> None:
    """Import DeepSpeed's Muon so that its functions are compiled when they are called.

    At ZeRO 1 to 3 DeepSpeed 0.19.8 imports it to know its type. It then loads torch's compiler:
    two seconds in each rank, whatever the optimizer.
    """
    # A version without it has nothing to import.
    with suppress(ImportError, AttributeError):
        from deepspeed.runtime import compiler  # noqa: PLC0415  see door

        with replace_attributes(compiler, compile=lambda: _compile_at_call):
            import deepspeed.runtime.zero.muon.original_muon  # noqa: PLC0415, F401


def _compile_at_call(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, compiled by torch when it is first called."""
    compiled: Callable[..., Any] | None = None

    @wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        nonlocal compiled
        if torch.compiler.is_compiling():
            return function(*args, **kwargs)  # a part of what is being compiled
        if compiled is None:
            with ignore_warnings():  # of what the compiler imports
                compiled = torch.compile(function)
        return compiled(*args, **kwargs)

    return run


def choose_kind(kind: str) -> None:
    """Let DeepSpeed train on devices of a kind: it knows one in a process, and finds it itself.

    Parameters
    ----------
    kind
        ``cpu`` or ``cuda``.

    Raises
    ------
    ValueError
        If it trains on another kind in this process.
    """
    with set_environment(DS_ACCELERATOR=kind):  # read when it is imported
        found = import_deepspeed().get_accelerator().device_name()
    if found != kind:
        msg = f"accelerator(device): expected {found!r}, the kind of device that"
        got = f"DeepSpeed uses in this process, got {kind!r}"
        advice = f"Start another process, with DS_ACCELERATOR={kind} if it imports"
        raise ValueError(f"{msg} {got}. {advice} deepspeed itself.")


@contextmanager
def ignore_warnings() -> Iterator[None]:
    """Let nothing warn: what DeepSpeed does at start concerns its own authors."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@contextmanager
def replace_attributes(owner: Any, **attributes: object) -> Iterator[None]:
    """Give a module, class or object other attributes inside."""
    before = {name: getattr(owner, name) for name in attributes}
    for name, value in attributes.items():
        setattr(owner, name, value)
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(owner, name, value)


def keep_functions() -> AbstractContextManager[None]:
    """Restore torch's ``linear``: at ZeRO 3, DeepSpeed 0.19.8 replaces it and leaves it so."""
    functional = torch.nn.functional
    return replace_attributes(functional, linear=functional.linear)


def replace_linear() -> None:
    """Use the ``linear`` of DeepSpeed 0.19.8, until ``keep_functions`` ends.

    DeepSpeed does so itself only where it divides a model at the beginning of training.
    """
    import_deepspeed()
    from deepspeed.runtime.zero.linear import zero3_linear_wrap  # noqa: PLC0415  see door

    torch.nn.functional.linear = zero3_linear_wrap


@contextmanager
def divide_layers(
    config: Mapping[str, object], check: Callable[[torch.nn.Module], None]
) -> Iterator[None]:
    """Divide each layer over the ranks as soon as it is made inside, by ``zero.Init``.

    Layers are made on the CPU and in their own dtype, as without it, so that random numbers
    are the same. By default DeepSpeed makes them on the device, in the dtype of training.

    Parameters
    ----------
    config
        DeepSpeed's config with a batch size, at ZeRO 3.
    check
        Refuses a layer that cannot be divided.
    """
    kind = import_deepspeed().zero.Init

    class CheckedInit(kind):  # type: ignore[misc, valid-type]
        def _post_init_method(self, module: torch.nn.Module) -> None:
            check(module)
            super()._post_init_method(module)

    with ignore_warnings():
        init = CheckedInit(config_dict_or_path=dict(config), tensor_overrides=[])
    with init:
        yield


def divide_copies() -> AbstractContextManager[None]:
    """Divide copies of divided parameters inside; in DeepSpeed 0.19.8 they have no values."""
    copy_whole = torch.nn.Parameter.__deepcopy__

    def copy_divided(param: Any, memo: dict[int, Any]) -> Any:
        is_part = hasattr(param, "ds_id") and param.ds_status.name == "NOT_AVAILABLE"
        if is_part:
            param.all_gather()
        found = copy_whole(param, memo)  # type: ignore[no-untyped-call]
        if is_part:
            param.partition()
        if hasattr(param, "ds_id") and not hasattr(found, "ds_id"):
            param.convert_to_zero_parameters([found])
        return found

    return replace_attributes(torch.nn.Parameter, __deepcopy__=copy_divided)


def share_and_divide(param: Any) -> None:
    """Divide a parameter of ZeRO 3 that is whole, with the values and dtype of rank 0."""
    deepspeed = import_deepspeed()
    device = deepspeed.get_accelerator().current_device_name()
    whole = param.data = param.data.to(device).contiguous()
    deepspeed.comm.broadcast(whole.view(torch.uint8), 0)
    param.ds_tensor.data = param.ds_tensor.data.to(whole.dtype)
    param.partition(has_been_updated=True)


def forget_model(model: torch.nn.Module) -> None:
    """Let DeepSpeed 0.19.8 release a model whose ZeRO 3 engines are finished.

    It never takes the model off its stack of running modules. A cache keeps the coordinator
    of the engine, and with it the optimizer's states, for the life of the process.
    """
    import_deepspeed()
    from deepspeed.runtime.zero import parameter_offload  # noqa: PLC0415  see door

    # A version without them may keep memory; the end of a fit must not fail for it.
    with suppress(AttributeError, KeyError, TypeError):
        modules, stack = set(model.modules()), parameter_offload.FWD_MODULE_STACK
        stack[:] = [module for module in stack if module not in modules]
    with suppress(AttributeError, KeyError, TypeError):
        coordinator = parameter_offload.PartitionedParameterCoordinator
        cached = vars(coordinator)[
            "_PartitionedParameterCoordinator__params_to_release"
        ]
        inspect.getclosurevars(cached).nonlocals["func"].cache_clear()


def reset_autocast() -> AbstractContextManager[None]:
    """Begin without autocast, and restore what there was before.

    DeepSpeed 0.19.8 notes for the whole process that an engine has autocast, so that every
    later one at ZeRO 1 to 3 has it too.
    """
    import_deepspeed()
    from deepspeed.runtime import torch_autocast  # noqa: PLC0415  see door

    return replace_attributes(
        torch_autocast, TORCH_AUTOCAST_INITIALIZED=False, TORCH_AUTOCAST_DTYPE=None
    )


def silence_deepspeed_warnings() -> None:
    """Keep DeepSpeed 0.19.8's use of torch 2.13's old names from warning on every step."""
    warnings.filterwarnings(
        "ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning
    )


def allow_float64() -> AbstractContextManager[None]:
    """Let ZeRO 3 take models in float64 wherever it runs.

    DeepSpeed 0.19.8 refuses them where the processor computes in float16, as GPUs do. Elsewhere
    ``_set_dtype`` gives another dtype by the order of its conditions, and nothing uses it.
    """
    from deepspeed.runtime.zero import partition_parameters as zero  # noqa: PLC0415  see door

    maker = zero.InsertPostInitMethodToModuleSubClasses
    before = maker._set_dtype

    def set_dtype(self: Any, config: object, dtype: torch.dtype | None) -> None:
        before(self, config, torch.float32 if dtype == torch.float64 else dtype)

    return replace_attributes(maker, _set_dtype=set_dtype)


@contextmanager
def keep_optimizers() -> Iterator[None]:
    """Let DeepSpeed initialize without changing the optimizers that it is given.

    DeepSpeed 0.19.8 changes them in two ways, both to allocate their state:

    - At ZeRO 0 with 16-bit weights it steps once with zero gradients. That decays the
      float32 masters, counts as Adam's first step, and runs the user's hooks.
    - At ZeRO 1 to 3 it replaces Adagrad by a new one with a single parameter group, the
      default options and no hooks.

    Optimizers of torch and DeepSpeed allocate their state at the first real step anyway.

    References
    ----------
    DeepSpeed 0.19.8: ``initialize_optimizer_states`` in ``fp16/fused_optimizer.py``,
    ``fp16/unfused_optimizer.py``, ``zero/stage_1_and_2.py`` and ``zero/stage3.py``.
    """
    with ExitStack() as stack:
        stack.callback(register_optimizer_step_pre_hook(_refuse_step).remove)
        for wrapper, initialize in _initializers().items():
            new = {"initialize_optimizer_states": initialize}
            stack.enter_context(replace_attributes(wrapper, **new))
        yield


def _initializers() -> dict[Any, Callable[[Any], None]]:
    """For each of DeepSpeed's wrappers, what initializes it without a change."""
    import_deepspeed()
    from deepspeed.runtime.fp16 import fused_optimizer, unfused_optimizer  # noqa: PLC0415  see door
    from deepspeed.runtime.zero import stage3, stage_1_and_2  # noqa: PLC0415

    def forget_state(wrapper: Any) -> None:
        wrapper.optimizer.state.clear()

    def pass_state_on(wrapper: Any) -> None:
        # What Adagrad made for the 16-bit weights; it steps their float32 masters now.
        state = wrapper.optimizer.state
        made = dict(state)
        state.clear()
        for halves, masters in zip(
            wrapper.fp16_groups, wrapper.fp32_groups, strict=True
        ):
            for half, master in zip(halves, masters, strict=True):
                if half in made:
                    state[master] = map_tensors(made[half], torch.Tensor.float)

    return {
        fused_optimizer.FP16_Optimizer: forget_state,
        unfused_optimizer.FP16_UnfusedOptimizer: pass_state_on,
        **{
            wrapper: _keep_optimizer(wrapper.initialize_optimizer_states)
            for wrapper in (
                stage_1_and_2.DeepSpeedZeroOptimizer,
                stage3.DeepSpeedZeroOptimizer_Stage3,
            )
        },
    }


def _keep_optimizer(initialize: Callable[[Any], None]) -> Callable[[Any], None]:
    """The method, with the optimizer put back where it was replaced."""

    def kept(wrapper: Any) -> None:
        own = wrapper.optimizer
        initialize(wrapper)
        if wrapper.optimizer is not own:
            own.state.clear()
            own.state.update(wrapper.optimizer.state)
            wrapper.optimizer = own

    return kept


def _refuse_step(optimizer: object, *_: object) -> None:
    """Raise: a step before training would be silent and wrong."""
    kind, version = type(optimizer).__name__, import_deepspeed().__version__
    msg = f"prepare: expected no step while DeepSpeed {version} initializes"
    raise RuntimeError(f"{msg}, got one of {kind}. Use DeepSpeed 0.19.8.")


def correct_half_autocast(engine: Any) -> None:
    """Let steps under autocast with float16 see gradients without the scale of the losses.

    DeepSpeed 0.19.8 steps them by torch's ``GradScaler``, which is wrong in two ways:

    - At ZeRO 1 to 3 clipping sees scaled gradients. An overflow ends the step before the
      scaler learns of it, so the scale never falls and every later step overflows too. Here
      ZeRO's own scale replaces it, with the options of torch's: it divides, clips, skips.
    - At ZeRO 0 a fused optimizer takes the scale itself. So clipping sees scaled gradients,
      and a step that its kernel skips counts. Here the scaler treats it as any other.

    References
    ----------
    DeepSpeed 0.19.8: ``_take_model_step`` in ``runtime/engine.py``, and ``step`` in
    ``zero/stage_1_and_2.py`` and ``zero/stage3.py``. torch 2.13, ``GradScaler.step``.
    """
    if engine.torch_autocast_z0_gradscaler is not None:
        engine.basic_optimizer._step_supports_amp_scaling = False
    wrapper = engine.optimizer
    if getattr(wrapper, "torch_autocast_gradscaler", None) is not None:
        from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler  # noqa: PLC0415  see door

        wrapper.torch_autocast_gradscaler = None
        wrapper.dynamic_loss_scale = True
        wrapper.loss_scaler = DynamicLossScaler(
            init_scale=2.0**16,
            scale_window=2000,
            min_scale=1.0,
            delayed_shift=1,
            consecutive_hysteresis=False,
            raise_error_at_min_scale=False,
        )


def order_reductions(wrapper: Any, model: torch.nn.Module) -> None:
    """Install `OrderedReductions`, or warn if this DeepSpeed lacks what it needs."""
    missing = [name for name in _NEEDED if not hasattr(wrapper, name)]
    if not missing:
        OrderedReductions(wrapper, model)
        return
    msg = f"DeepSpeed {import_deepspeed().__version__} has no {missing[0]}: gradients may be"
    advice = "Let all ranks use the same layers, or use DeepSpeed 0.19.8."
    warnings.warn(f"{msg} wrong if ranks use different layers. {advice}", stacklevel=2)


_NEEDED = (
    *("bit16_groups", "partition_gradients", "params_already_reduced"),
    *("use_grad_accum_attribute", "gradient_accumulation_dtype", "get_param_id"),
    *("setup_buckets", "get_gradient_for_reduction", "reduce_gradients"),
    *("reduce_ready_partitions_and_remove_grads", "_backward_active_depth"),
    "overlapping_partition_gradients_reduce_epilogue",
)


class OrderedReductions:
    """Lets ZeRO 1 and 2 reduce every gradient, in the same order on every rank.

    DeepSpeed 0.19.8 reduces gradients as they come, and leaves out parameters without one. If
    ranks use different layers (experts, a head for some rows), it adds the gradients of
    different parameters: without an error where the sizes agree. Here a missing gradient
    counts as zeros, and at ZeRO 2 a gradient that comes early waits for its turn.

    Parameters
    ----------
    wrapper
        DeepSpeed's optimizer of ZeRO 1 or 2, changed in place.

    References
    ----------
    DeepSpeed 0.19.8: ``reduce_gradients`` and ``process_gradients`` in
    ``zero/stage_1_and_2.py``.
    """

    def __init__(self, wrapper: Any, model: torch.nn.Module) -> None:
        self._wrapper = wrapper
        group_of = {id(p): n for n, g in enumerate(wrapper.bit16_groups) for p in g}
        # Most backward passes reach the layers in this order, so few gradients wait.
        params = [p for p in model.parameters() if id(p) in group_of][::-1]
        self._params = [(param, group_of[id(param)]) for param in params]
        self._present: set[int] = set()
        self._num_reduced = 0
        self._reduce = wrapper.reduce_ready_partitions_and_remove_grads
        if wrapper.partition_gradients:
            self._finish = wrapper.overlapping_partition_gradients_reduce_epilogue
            wrapper.reduce_ready_partitions_and_remove_grads = self.reduce_in_turn
            wrapper.overlapping_partition_gradients_reduce_epilogue = self.finish
        else:
            self._reduce_all = wrapper.reduce_gradients
            wrapper.reduce_gradients = self.reduce_all

    def reduce_in_turn(self, param: Any, group: int) -> None:
        """Reduce a gradient, and those that waited for it, once all before it are reduced."""
        if not getattr(param, "ds_grad_is_ready", True):  # DeepSpeed's tiled layers
            return
        if self._wrapper.params_already_reduced[self._wrapper.get_param_id(param)]:
            self._reduce(param, group)  # refuses a second gradient
        # DeepSpeed never leaves a backward pass that failed. In a single pass, layers that are
        # checkpointed may give a second gradient.
        if id(param) in self._present and self._wrapper._backward_active_depth > 1:
            msg = "backward: expected that none failed before at ZeRO 2, got one, whose"
            advice = "Resume from the last checkpoint."
            raise RuntimeError(f"{msg} gradients would count twice. {advice}")
        self._present.add(id(param))
        self._reduce_present()

    def _reduce_present(self) -> None:
        while self._num_reduced < len(self._params):
            param, group = self._params[self._num_reduced]
            if id(param) not in self._present:
                return
            self._num_reduced += 1
            self._reduce(param, group)

    def finish(self) -> None:
        """Reduce what is left at the end of a backward pass."""
        self._wrapper.setup_buckets()
        # One at a time: those before are reduced, and ZeRO 2 has freed most of them.
        for param, group in self._params[self._num_reduced :]:
            self._add_zeros(param)
            self._reduce(param, group)
        self._present.clear()
        self._num_reduced = 0
        self._finish()

    def reduce_all(self, *args: Any, **kwargs: Any) -> None:
        """Reduce the gradients of a window at ZeRO 1."""
        self._wrapper.setup_buckets()
        for param, _ in self._params:
            self._add_zeros(param)
        self._reduce_all(*args, **kwargs)

    def _add_zeros(self, param: Any) -> None:
        if self._wrapper.get_gradient_for_reduction(param) is None:
            keeps_sums = self._wrapper.use_grad_accum_attribute
            dtype = self._wrapper.gradient_accumulation_dtype if keeps_sums else None
            name = "grad_accum" if keeps_sums else "grad"
            setattr(param, name, torch.zeros_like(param, dtype=dtype))


def get_tracked_random() -> dict[str, torch.Tensor]:
    """States of the random streams of DeepSpeed's activation checkpointing, by name."""
    tracker = import_deepspeed().checkpointing.get_cuda_rng_tracker()
    return dict(tracker.get_states())


def set_tracked_random(states: Mapping[str, torch.Tensor]) -> None:
    """Restore what ``get_tracked_random`` returned."""
    tracker = import_deepspeed().checkpointing.get_cuda_rng_tracker()
    tracker.set_states({name: state.clone() for name, state in states.items()})


@cache
def known_fields() -> dict[str, frozenset[str]]:
    """Keys that DeepSpeed knows in parts of its config, by the part's name."""
    import_deepspeed()
    from deepspeed.runtime import precision_config  # noqa: PLC0415  see door
    from deepspeed.runtime.zero import config as zero_config  # noqa: PLC0415

    models = {
        "zero_optimization": zero_config.DeepSpeedZeroConfig,
        "fp16": precision_config.DeepSpeedFP16Config,
        "bf16": precision_config.DeepSpeedBF16Config,
        "bfloat16": precision_config.DeepSpeedBF16Config,
    }
    return {name: _fields_of(model) for name, model in models.items()}


def find_config_error(config: Mapping[str, object]) -> tuple[str, str] | None:
    """The key at which DeepSpeed fails to read a config, and why; None if it reads it.

    Parameters
    ----------
    config
        Config without ``"auto"``; its batch sizes are not read.
    """
    import_deepspeed()
    from deepspeed.runtime.config import DeepSpeedConfig  # noqa: PLC0415  see door

    sized = {name: value for name, value in config.items() if name not in SIZES}

    def read(without: str | None = None) -> Exception | None:
        kept = {name: value for name, value in sized.items() if name != without}
        try:
            with ignore_warnings():
                # A multiple of any number of ranks that DeepSpeed may know of already.
                DeepSpeedConfig(copy.deepcopy({**kept, "train_batch_size": _MANY}))
        except Exception as error:  # noqa: BLE001  of any kind: reported by its key
            return error
        return None

    error = read()
    if error is None:
        return None
    place = next((name for name in sized if read(without=name) is None), "the config")
    reason = f"{type(error).__name__}: {error}".partition("\n")[0]
    if hasattr(error, "errors"):  # of pydantic
        first = error.errors()[0]
        keys = [str(key) for key in first["loc"]]
        place = ".".join(keys if keys[:1] == [place] else [place, *keys])
        reason = str(first["msg"])
    return place, reason


_MANY = 2**10 * 3**4 * 5**2 * 7


def _fields_of(model: Any) -> frozenset[str]:
    """Names and aliases of a pydantic model's fields."""
    fields = model.model_fields
    aliases = {field.alias for field in fields.values() if field.alias}
    return frozenset(fields) | aliases


def list_ops() -> dict[str, list[str]]:
    """Which of DeepSpeed's compiled ops are built here, can be built, or cannot be.

    Asked for them, DeepSpeed tries compilers, with chatter on both outputs.

    Returns
    -------
    dict
        Their names by ``built``, ``can be built`` and ``cannot be built``.
    """
    built = import_deepspeed().git_version_info.installed_ops
    from deepspeed.ops.op_builder.all_ops import ALL_OPS  # noqa: PLC0415  see door

    found: dict[str, list[str]] = {
        "built": [],
        "can be built": [],
        "cannot be built": [],
    }
    for name in sorted(ALL_OPS.keys() - {"deepspeed_not_implemented"}):
        can = "can" if ALL_OPS[name].is_compatible(False) else "cannot"
        found["built" if built.get(name, False) else f"{can} be built"].append(name)
    return found
