"""DeepSpeed's own config: checked before training, its ``"auto"`` values filled in.

Options stay in DeepSpeed's words, https://www.deepspeed.ai/docs/config-json/.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from harness.events import nearest

# Top-level keys that DeepSpeed 0.19.8 reads; it ignores others without a word. A test
# compares the list with what the installed version asks for.
KEYS = frozenset(
    [
        "activation_checkpointing",
        "aio",
        "amp",
        "autotuning",
        "bf16",
        "bfloat16",
        "checkpoint",
        "comet",
        "comms_logger",
        "communication_data_type",
        "compile",
        "compression_training",
        "csv_monitor",
        "curriculum_learning",
        "data_efficiency",
        "data_parallel_size",
        "data_types",
        "dataloader_drop_last",
        "datastates_ckpt",
        "disable_allgather",
        "disable_python_gc",
        "dump_state",
        "eigenvalue",
        "elasticity",
        "expert_parallel",
        "flops_profiler",
        "fp16",
        "gradient_accumulation_steps",
        "gradient_allreduce_op",
        "gradient_clipping",
        "gradient_predivide_factor",
        "graph_harvesting",
        "hybrid_engine",
        "log_level",
        "managed_gradient_accumulation",
        "memory_breakdown",
        "nebula",
        "optimizer",
        "pipeline",
        "prescale_gradients",
        "progressive_layer_drop",
        "quantize_training",
        "scheduler",
        "seq_parallel_communication_data_type",
        "sequence_parallel_size",
        "sparse_attention",
        "sparse_gradients",
        "steps_per_print",
        "tensor_parallel",
        "tensorboard",
        "timers",
        "torch_autocast",
        "train_batch_size",
        "train_micro_batch_size_per_gpu",
        "use_data_before_expert_parallelism",
        "vocabulary_size",
        "wall_clock_breakdown",
        "wandb",
        "weight_quantization",
        "zero_allow_untested_optimizer",
        "zero_force_ds_cpu_optimizer",
        "zero_optimization",
    ]
)

_PARTS = {
    "optimizer": {"type", "params", "legacy_fusion"},
    "scheduler": {"type", "params"},
    "torch_autocast": {"enabled", "dtype", "lower_precision_safe_modules"},
}
"""Keys of the parts that DeepSpeed reads without a model of its own."""

_SIZES = (
    "train_batch_size",
    "train_micro_batch_size_per_gpu",
    "gradient_accumulation_steps",
)

_HALF = {"fp16", "half", "float16"}
"""DeepSpeed's names for the dtype that CPUs do not train in."""

_BUCKETS = {
    "reduce_bucket_size": 5e8,
    "stage3_prefetch_bucket_size": 5e7,
    "stage3_param_persistence_threshold": 1e5,
}
"""Sizes in parameters that may be ``"auto"``, with DeepSpeed's defaults."""


@dataclass(frozen=True, kw_only=True)
class ConfigFacts:
    """What fills ``"auto"``: facts of learner, loaders, machine and launch.

    Attributes
    ----------
    world_size : >= 1
        Ranks.
    device
        Kind of device: ``cpu``, ``cuda``.
    accumulate : >= 1
        Micro-batches to an optimizer step that the caller asked for; 1 also means unsaid.
    batch_size : >= 1, or None
        Samples in a rank's batch, as the training loader has it.
    num_parameters : >= 0
        Elements in all parameters.
    opt_hparams
        The learner's hyper-parameters for its optimizer.
    fields
        Keys that DeepSpeed knows in a part of the config, by the part's name.
    """

    world_size: int
    device: str
    accumulate: int = 1
    batch_size: int | None = None
    num_parameters: int = 0
    opt_hparams: Mapping[str, object] = field(default_factory=dict)
    fields: Mapping[str, Collection[str]] = field(default_factory=dict)


def read_config(config: Mapping[str, object] | str | Path | None) -> dict[str, Any]:
    """The config as a dict of its own.

    Parameters
    ----------
    config
        Dict, path of a JSON file, or None for an empty one.

    Raises
    ------
    ValueError
        If the file is missing, no JSON, holds a key twice, or is no object.
    """
    if config is None:
        return {}
    if isinstance(config, Mapping):
        return copy.deepcopy(dict(config))
    path = Path(config)
    place = f"accelerator(config={str(config)!r})"
    if not path.is_file():
        msg = f"{place}: expected a JSON file or a dict, got no such file."
        raise ValueError(f"{msg} Check the path.")
    try:
        read = json.loads(path.read_text(), object_pairs_hook=_refuse_duplicates)
    except ValueError as error:
        msg = f"{place}: expected JSON with each key once, got {error}."
        raise ValueError(f"{msg} Mend the file.") from error
    if not isinstance(read, dict):
        msg = f"{place}: expected an object, got {type(read).__name__}."
        raise ValueError(f"{msg} Put the keys in braces.")
    return read


def _refuse_duplicates(pairs: list[tuple[str, object]]) -> dict[str, Any]:
    """A dict of the pairs; a key that comes twice would hide its first value."""
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the key {twice!r} twice")
    return found


def check_config(config: Mapping[str, object], setting: ConfigFacts) -> None:
    """Refuse what DeepSpeed would ignore, misread, or stop at half-way.

    Raises
    ------
    ValueError
        If a key is unknown, or a value is out of its range or contradicts another.
    """
    _check_keys("", config, KEYS)
    for part, value in config.items():
        known = _PARTS.get(part) or setting.fields.get(part)
        if known and isinstance(value, Mapping):
            _check_keys(f"{part}.", value, known)
    stage = zero_stage(config)
    if type(stage) is not int or stage not in range(4):
        msg = f"accelerator(config): expected zero_optimization.stage in 0..3, got {stage!r}"
        raise ValueError(
            f"{msg}. 0 keeps everything on each rank, 3 divides everything."
        )
    _check_precision(config, setting)
    _check_modes(config, stage)


def zero_stage(config: Mapping[str, Any]) -> Any:
    """The config's ZeRO stage, 0 where it names none."""
    return config.get("zero_optimization", {}).get("stage", 0)


def _check_keys(
    prefix: str, found: Mapping[str, object], known: Collection[str]
) -> None:
    """Refuse unknown keys, offering the nearest."""
    for name in found:
        if name not in known:
            msg = f"accelerator(config): expected keys of DeepSpeed, got {prefix + name!r}."
            advice = "The keys are at https://www.deepspeed.ai/docs/config-json/."
            raise ValueError(f"{msg}{nearest(name, known)} {advice}")


def _check_precision(config: Mapping[str, Any], setting: ConfigFacts) -> None:
    """At most one of fp16, bf16 and autocast, on a device that has it."""
    asked = [
        name
        for name in ("fp16", "bf16", "bfloat16", "torch_autocast")
        if config.get(name, {}).get("enabled", False)
    ]
    if len(asked) > 1:
        msg = f"accelerator(config): expected one precision, got {' and '.join(asked)}."
        raise ValueError(f"{msg} Leave one of them enabled.")
    for name in asked:
        if config[name]["enabled"] == "auto":
            msg = f"accelerator(config): expected {name}.enabled true or false, got 'auto'."
            raise ValueError(f"{msg} Nothing tells which is meant: write it out.")
    dtype = str(config.get("torch_autocast", {}).get("dtype", "bfloat16"))
    is_half = "torch_autocast" in asked and dtype.removeprefix("torch.") in _HALF
    if setting.device == "cpu" and (is_half or "fp16" in asked):
        msg = (
            "accelerator(config): expected bf16 or full precision on the CPU, got fp16."
        )
        raise ValueError(f'{msg} Use "bf16": {{"enabled": true}} or a CUDA device.')


def _check_modes(config: Mapping[str, Any], stage: int) -> None:
    """Refuse modes that do not go with caller-owned accumulation."""
    if config.get("managed_gradient_accumulation", False):
        msg = "accelerator(config): expected managed_gradient_accumulation false, got true."
        raise ValueError(f"{msg} Leave it out: the loop says when a step is due.")
    zero = config.get("zero_optimization", {})
    if zero.get("overlap_comm") is True and stage < 2:
        msg = f"accelerator(config): expected overlap_comm at stage 2 or 3, got stage {stage}."
        raise ValueError(f"{msg} Leave overlap_comm out, or raise the stage.")
    if config.get("compile", {}).get("deepcompile", False):
        msg = "accelerator(config): expected no compile.deepcompile, got true."
        raise ValueError(f"{msg} Compile the model with torch.compile instead.")


def fill_config(config: Mapping[str, Any], setting: ConfigFacts) -> dict[str, Any]:
    """The config with every ``"auto"`` replaced, ready for DeepSpeed.

    Parameters
    ----------
    config
        Config that ``check_config`` let pass.
    setting
        What fills it.

    Returns
    -------
    dict
        A new config. Batch sizes are all there; ``managed_gradient_accumulation`` is false.

    Raises
    ------
    ValueError
        If batch sizes contradict each other, the loader or `accumulate`, or nothing is
        known that would fill an ``"auto"``.
    """
    filled = copy.deepcopy(dict(config))
    filled |= complete_batch_sizes(filled, setting)
    filled["managed_gradient_accumulation"] = False
    if filled.get("gradient_clipping", "auto") == "auto":
        # DeepSpeed 0.19.8 clips at 1.0 where nothing is said; plain torch does not.
        filled["gradient_clipping"] = 0.0
    _fill_zero(filled.setdefault("zero_optimization", {}), setting)
    if "torch_autocast" in filled:
        filled["torch_autocast"].setdefault("dtype", "bfloat16")
    for part in ("optimizer", "scheduler"):
        _fill_params(filled.get(part, {}).get("params", {}), setting.opt_hparams)
    for place in _find_autos(filled):
        msg = f"accelerator(config): expected a value for {place}, got 'auto'."
        raise ValueError(f"{msg} Nothing here can fill it: write the value.")
    return filled


def complete_batch_sizes(
    config: Mapping[str, object], setting: ConfigFacts
) -> dict[str, int]:
    """DeepSpeed's three batch sizes, completed from each other, loader and `accumulate`.

    Raises
    ------
    ValueError
        If one is no count, or they contradict each other.
    """
    total, micro, steps = (_count(config, name) for name in _SIZES)
    if setting.batch_size is not None:
        if micro not in {None, setting.batch_size}:
            msg = f"accelerator(config): expected {_SIZES[1]} = {setting.batch_size}"
            advice = "Change it or the loader's batch_size, or write 'auto'."
            raise ValueError(f"{msg}, the loader's batch size, got {micro}. {advice}")
        micro = setting.batch_size
    if setting.accumulate > 1:
        if steps not in {None, setting.accumulate}:
            msg = f"accelerator(config): expected {_SIZES[2]} = {setting.accumulate}"
            advice = "Change one of the two, or write 'auto'."
            raise ValueError(f"{msg}, as accumulate says, got {steps}. {advice}")
        steps = setting.accumulate
    if micro is None and total is not None:
        micro = max(1, total // (setting.world_size * (steps or 1)))
    micro = micro or 1
    if steps is None:
        steps = max(1, (total or 0) // (micro * setting.world_size))
    product = micro * steps * setting.world_size
    if total not in {None, product}:
        sizes = f"{micro} micro x {steps} accumulation x {setting.world_size} ranks"
        msg = f"accelerator(config): expected train_batch_size = {sizes} = {product}"
        advice = "Change one of the three, or write 'auto' for it."
        raise ValueError(f"{msg}, got {total}. {advice}")
    return dict(zip(_SIZES, (product, micro, steps), strict=True))


def _count(config: Mapping[str, object], name: str) -> int | None:
    """The size, None where it is missing or ``"auto"``."""
    value = config.get(name, "auto")
    if value == "auto":
        return None
    if type(value) is not int or value < 1:
        msg = f"accelerator(config): expected {name} of at least 1 or 'auto', got {value!r}."
        raise ValueError(f"{msg} Write a whole number.")
    return value


def _fill_zero(zero: dict[str, Any], setting: ConfigFacts) -> None:
    """Bucket sizes; no bucket needs to hold more than the whole model."""
    for name, default in _BUCKETS.items():
        if zero.get(name) == "auto":
            zero[name] = int(default)
    # DeepSpeed allocates the whole bucket, 2 GB by default, however small the model is.
    # Two rows more keep it even, as its alignment asks.
    size = max(2, setting.num_parameters + setting.num_parameters % 2)
    wanted = zero.get("reduce_bucket_size", int(_BUCKETS["reduce_bucket_size"]))
    zero["reduce_bucket_size"] = min(int(wanted), size)


def _fill_params(params: dict[str, object], known: Mapping[str, object]) -> None:
    """``"auto"`` from the learner's hyper-parameters, else DeepSpeed's own default."""
    for name, value in list(params.items()):
        if value == "auto" and name in known:
            params[name] = known[name]
        elif value == "auto" and name in {"betas", "eps", "weight_decay"}:
            del params[name]


def _find_autos(part: object, place: str = "") -> Iterator[str]:
    """Places that still say ``"auto"``; DeepSpeed fills one of them itself."""
    if isinstance(part, Mapping):
        for name, value in part.items():
            if name != "keep_in_fp32_modules":
                yield from _find_autos(value, f"{place}.{name}".lstrip("."))
    elif part == "auto":
        yield place
