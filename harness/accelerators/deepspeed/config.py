"""Check DeepSpeed's config before training and fill in its ``"auto"`` values.

Options are named as in https://www.deepspeed.ai/docs/config-json/.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from harness.checks.values import as_path
from harness.events import nearest
from harness.pytree import Options
from tracking.errors import describe_path

# Top-level keys that DeepSpeed 0.19.8 reads, by what their values are; it silently ignores
# others. A test compares the keys with what the installed version reads.
_SWITCHED = frozenset(
    [
        *("amp", "bf16", "bfloat16", "fp16", "torch_autocast"),
        *("comet", "csv_monitor", "tensorboard", "wandb"),
        *("autotuning", "comms_logger", "curriculum_learning", "data_efficiency"),
        *("eigenvalue", "elasticity", "flops_profiler", "hybrid_engine", "nebula"),
        *("datastates_ckpt", "progressive_layer_drop", "quantize_training"),
    ]
)
"""Sections with a key ``enabled``."""

_OBJECTS = _SWITCHED | frozenset(
    [
        *("activation_checkpointing", "aio", "checkpoint", "compile", "data_types"),
        *("compression_training", "expert_parallel", "optimizer", "pipeline"),
        *("scheduler", "sparse_attention", "tensor_parallel", "timers"),
        *("weight_quantization", "zero_optimization"),
    ]
)
_FLAGS = frozenset(
    [
        *("dataloader_drop_last", "disable_allgather", "disable_python_gc"),
        *("dump_state", "graph_harvesting", "managed_gradient_accumulation"),
        *("memory_breakdown", "prescale_gradients", "sparse_gradients"),
        *("use_data_before_expert_parallelism", "wall_clock_breakdown"),
        *("zero_allow_untested_optimizer", "zero_force_ds_cpu_optimizer"),
    ]
)
_NUMBERS = frozenset(
    [
        *("data_parallel_size", "gradient_clipping", "gradient_predivide_factor"),
        *("sequence_parallel_size", "steps_per_print", "vocabulary_size"),
    ]
)
_TEXTS = frozenset(
    [
        *("communication_data_type", "gradient_allreduce_op", "log_level"),
        "seq_parallel_communication_data_type",
    ]
)

SIZES = (
    "train_batch_size",
    "train_micro_batch_size_per_gpu",
    "gradient_accumulation_steps",
)

KEYS = _OBJECTS | _FLAGS | _NUMBERS | _TEXTS | frozenset(SIZES)

_SECTIONS = {
    "optimizer": {"type", "params", "legacy_fusion"},
    "scheduler": {"type", "params"},
    "torch_autocast": {"enabled", "dtype", "lower_precision_safe_modules"},
}
"""Keys of the sections for which DeepSpeed has no pydantic model."""

PRECISION_KEYS = ("fp16", "bf16", "bfloat16", "torch_autocast")
"""Keys of which one at most is enabled."""

_HALF = {"fp16", "half", "float16"}
"""DeepSpeed's names for float16, which CPUs do not train in."""

SEE_KEYS = "See https://www.deepspeed.ai/docs/config-json/."

_BUCKET = 500_000_000
"""DeepSpeed's default of ``reduce_bucket_size``, in parameters."""


@dataclass(frozen=True, kw_only=True)
class ConfigFacts:
    """Facts of learner, loaders, machine and launch that fill ``"auto"``.

    Attributes
    ----------
    device
        Type of device: ``cpu`` or ``cuda``.
    accumulate : >= 1
        Micro-batches per optimizer step that the caller asked for; 1 also means no wish.
    batch_size : >= 1, or None
        Batch size of the training loader: samples in a rank's batch.
    num_parameters : >= 0
        Elements of all parameters.
    opt_hparams
        The learner's hyper-parameters for its optimizer.
    fields
        Keys that DeepSpeed knows in a section of the config, by the section's name.
    """

    world_size: int
    device: str
    accumulate: int = 1
    batch_size: int | None = None
    num_parameters: int = 0
    opt_hparams: Mapping[str, object] = field(default_factory=dict)
    fields: Mapping[str, Collection[str]] = field(default_factory=dict)


def read_config(config: Mapping[str, object] | str | Path | None) -> Options:
    """Read the config into a new dict.

    Parameters
    ----------
    config
        Dict, path of a JSON file, or None for an empty one.

    Returns
    -------
    dict
        With sections written out: ``"bf16": true`` and ``"zero_optimization": 2`` are short
        for their keys ``enabled`` and ``stage``. What is null is left out.
    """
    if config is None:
        return {}
    if isinstance(config, Mapping):
        return _write_out(copy.deepcopy(dict(config)))
    path = as_path("accelerator(config)", config, "a dict or a path")
    place = f"accelerator(config={str(config)!r})"
    if not path.is_file():
        msg = f"{place}: expected a JSON file or a dict, got {describe_path(path)}."
        raise ValueError(f"{msg} Check the path.")
    try:
        read = json.loads(
            path.read_text("utf-8-sig"), object_pairs_hook=_refuse_duplicates
        )
    except ValueError as error:
        msg = f"{place}: expected JSON with each key once, got {error}."
        raise ValueError(f"{msg} Correct the file.") from error
    if not isinstance(read, dict):
        msg = f"{place}: expected an object, got {type(read).__name__}."
        raise ValueError(f"{msg} Put the keys in braces.")
    return _write_out(read)


def _write_out(config: Options) -> Options:
    """Write out short forms of sections, and leave out nulls."""
    found = _drop(config, None)
    for name, value in found.items():
        if name in _SWITCHED and isinstance(value, bool):
            found[name] = {"enabled": value}
        elif name == "zero_optimization" and type(value) is int:
            found[name] = {"stage": value}
    return found


def _drop(section: Mapping[str, object], unset: object) -> Options:
    """A section without keys that are unset, at any depth: null, or ``"auto"``."""
    return {
        name: _drop(value, unset) if isinstance(value, Mapping) else value
        for name, value in section.items()
        if value != unset
    }


def _refuse_duplicates(pairs: list[tuple[str, object]]) -> Options:
    """A dict of the pairs; refuse a duplicate key, which would hide the first value."""
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the key {twice!r} twice")
    return found


def check_config(config: Mapping[str, Any], facts: ConfigFacts) -> None:
    """Refuse a config that DeepSpeed would ignore, misread, or fail on during training."""
    _check_keys("", config, KEYS)
    _check_types(dict(config))
    for section, value in config.items():
        known = _SECTIONS.get(section) or facts.fields.get(section)
        if known and isinstance(value, Mapping):
            _check_keys(f"{section}.", value, known)
    for section in ("optimizer", "scheduler"):
        _check_recipe(section, config.get(section))
    stage = zero_stage(config)
    if type(stage) is not int or stage not in range(4):
        msg = f"accelerator(config): expected zero_optimization.stage in 0..3, got {stage!r}"
        advice = "0 divides nothing over the ranks, 3 divides everything."
        raise ValueError(f"{msg}. {advice}")
    _check_precision(config, facts)
    _check_modes(config, stage)


def _check_types(config: Options) -> None:
    """Refuse values of another type than DeepSpeed expects; ``"auto"`` may be a default."""
    for name, value in config.items():
        is_auto = value == "auto" and name not in _OBJECTS
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        is_count = is_number and value >= 0
        if name in _OBJECTS and not isinstance(value, Mapping):
            expected = f"an object for {name!r}"
        elif name in _FLAGS and not (is_auto or isinstance(value, bool)):
            expected = f"true or false for {name!r}"
        elif name in _NUMBERS and not (is_auto or is_count):
            expected = f"a number >= 0 for {name!r}"
        elif name in _TEXTS and not isinstance(value, str):
            expected = f"text for {name!r}"
        else:
            continue
        msg = f"accelerator(config): expected {expected}, got {value!r}."
        raise ValueError(f"{msg} {SEE_KEYS}")


def _check_recipe(section: str, recipe: Mapping[str, object] | None) -> None:
    """Refuse an optimizer or scheduler without a type, or without params by name."""
    if recipe is None:
        return
    kind, params = recipe.get("type"), recipe.get("params", {})
    if not isinstance(kind, str) or kind == "auto":
        msg = f"accelerator(config): expected a name for '{section}.type'"
        raise ValueError(f"{msg}, got {kind!r}. Write it, or leave the section out.")
    if kind in {"LBFGS", "SparseAdam"}:
        msg = f"accelerator(config): expected another {section}.type, got {kind!r}."
        raise ValueError(f"{msg} DeepSpeed cannot step it: train on one device.")
    if not isinstance(params, Mapping):
        msg = f"accelerator(config): expected an object for '{section}.params'"
        raise ValueError(f"{msg}, got {params!r}. Write it in braces.")


def zero_stage(config: Mapping[str, Any]) -> Any:
    """The config's ZeRO stage, by default 0."""
    return config.get("zero_optimization", {}).get("stage", 0)


def _check_keys(
    prefix: str, found: Mapping[str, object], known: Collection[str]
) -> None:
    """Refuse unknown keys, and suggest the nearest known one."""
    for name in found:
        if name not in known:
            msg = f"accelerator(config): expected a key of DeepSpeed, got {prefix + name!r}."
            raise ValueError(f"{msg}{nearest(name, known)} {SEE_KEYS}")


def _check_precision(config: Mapping[str, Any], facts: ConfigFacts) -> None:
    """Allow one of fp16, bf16 and autocast at most, on a device that supports it."""
    for name in sorted(_SWITCHED & config.keys()):
        value = config[name].get("enabled", False)
        if not isinstance(value, bool):
            msg = f"accelerator(config): expected {name}.enabled true or false, got {value!r}."
            advice = "Write true or false"
            if value == "auto" and name in PRECISION_KEYS:
                advice += ", or pass precision='fp32' or 'bf16' to harness.accelerator"
            raise ValueError(f"{msg} {advice}.")
    enabled = [
        name for name in PRECISION_KEYS if config.get(name, {}).get("enabled", False)
    ]
    if len(enabled) > 1:
        got = " and ".join(enabled)
        msg = f"accelerator(config): expected one precision, got {got}."
        raise ValueError(f"{msg} Enable only one of them.")
    dtype = str(config.get("torch_autocast", {}).get("dtype", "bfloat16"))
    is_half = "torch_autocast" in enabled and dtype.removeprefix("torch.") in _HALF
    if facts.device == "cpu" and (is_half or "fp16" in enabled):
        msg = (
            "accelerator(config): expected bf16 or full precision on the CPU, got fp16"
        )
        raise ValueError(f'{msg}. Use "bf16": {{"enabled": true}} or a CUDA device.')


def _check_modes(config: Mapping[str, Any], stage: int) -> None:
    """Refuse modes that do not work with a loop that accumulates by itself."""
    if config.get("managed_gradient_accumulation", False):
        msg = "accelerator(config): expected managed_gradient_accumulation false, got true."
        raise ValueError(f"{msg} Leave it out: the loop decides when to step.")
    zero = config.get("zero_optimization", {})
    if zero.get("overlap_comm") is True and stage < 2:
        msg = f"accelerator(config): expected overlap_comm at stage 2 or 3, got stage {stage}."
        raise ValueError(f"{msg} Leave overlap_comm out, or raise the stage.")
    for name in ("datastates_ckpt", "nebula"):
        if config.get(name, {"enabled": False}) != {"enabled": False}:
            msg = f"accelerator(config): expected no {name!r}, got one."
            raise ValueError(f"{msg} Leave it out: checkpoints are not DeepSpeed's.")
    level, parts = config.get("log_level", "auto"), config.get("sequence_parallel_size")
    if level not in {"auto", "debug", "info", "warning", "error", "critical"}:
        msg = "accelerator(config): expected log_level debug, info, warning, error or critical"
        raise ValueError(f"{msg}, got {level!r}. Choose one of them.")
    if parts not in {None, 1, "auto"}:
        msg = f"accelerator(config): expected sequence_parallel_size 1, got {parts!r}."
        raise ValueError(f"{msg} Leave it out: every rank reads its own rows.")
    if config.get("compile", {}).get("deepcompile", False):
        msg = "accelerator(config): expected no compile.deepcompile, got true."
        raise ValueError(f"{msg} Compile the model with torch.compile instead.")


def init_config(config: Mapping[str, Any]) -> Options:
    """What ``zero.Init`` reads of a config, before the batch sizes are known."""
    zero = _drop(config["zero_optimization"], "auto")
    return {"train_micro_batch_size_per_gpu": 1, "zero_optimization": zero}


def fill_config(config: Mapping[str, Any], facts: ConfigFacts) -> Options:
    """Replace every ``"auto"`` in the config, ready for DeepSpeed.

    Parameters
    ----------
    config
        Config that ``check_config`` accepted.

    Returns
    -------
    dict
        A new config with all batch sizes; ``managed_gradient_accumulation`` is false.
    """
    filled = copy.deepcopy(dict(config))
    filled |= complete_batch_sizes(filled, facts)
    filled = {
        name: value
        for name, value in filled.items()
        if value != "auto" or name not in _FLAGS | _NUMBERS | _TEXTS
    }
    filled["managed_gradient_accumulation"] = False
    if filled.get("gradient_clipping", "auto") == "auto":
        # By default DeepSpeed 0.19.8 clips at 1.0; plain torch does not clip.
        filled["gradient_clipping"] = 0.0
    # By default DeepSpeed 0.19.8 waits for the device twice in each step, to measure it.
    filled["timers"] = {"throughput": {"enabled": False}} | filled.get("timers", {})
    filled.setdefault("zero_optimization", {})
    for section in facts.fields.keys() & filled.keys():
        filled[section] = _drop(filled[section], "auto")
    _fill_zero(filled["zero_optimization"], facts)
    if "torch_autocast" in filled:
        filled["torch_autocast"].setdefault("dtype", "bfloat16")
    params = filled.get("optimizer", {}).setdefault("params", {})
    _fill_params(params, facts.opt_hparams)
    schedule = filled.get("scheduler", {}).setdefault("params", {})
    _fill_schedule(schedule, params, facts)
    for name in ("fp16", "datastates_ckpt", "nebula"):
        # DeepSpeed 0.19.8 reads some keys of sections that are off.
        if not filled.get(name, {}).get("enabled", False):
            filled.pop(name, None)
    for place in _find_autos(filled):
        msg = f"accelerator(config): expected a value for {place}, got 'auto'."
        raise ValueError(f"{msg} It cannot be filled in: write the value.")
    return filled


def complete_batch_sizes(
    config: Mapping[str, object], facts: ConfigFacts
) -> dict[str, int]:
    """Complete DeepSpeed's three batch sizes from each other, loader and `accumulate`."""
    total, micro, steps = (_count(config, name) for name in SIZES)
    if facts.batch_size is not None:
        if micro not in {None, facts.batch_size}:
            msg = f"accelerator(config): expected {SIZES[1]} = {facts.batch_size}"
            advice = "Change it or the loader's batch_size, or write 'auto'."
            raise ValueError(f"{msg}, the loader's batch size, got {micro}. {advice}")
        micro = facts.batch_size
    if facts.accumulate > 1:
        if steps not in {None, facts.accumulate}:
            msg = f"accelerator(config): expected {SIZES[2]} = {facts.accumulate}"
            advice = "Change one of the two, or write 'auto'."
            raise ValueError(f"{msg}, the value of accumulate, got {steps}. {advice}")
        steps = facts.accumulate
    if micro is None and total is not None:
        micro = max(1, total // (facts.world_size * (steps or 1)))
    micro = micro or 1
    if steps is None:
        steps = max(1, (total or 0) // (micro * facts.world_size))
    product = micro * steps * facts.world_size
    if total not in {None, product}:
        sizes = f"{micro} micro x {steps} accumulation x {facts.world_size} ranks"
        msg = f"accelerator(config): expected train_batch_size = {sizes} = {product}"
        advice = "Change one of the three, or write 'auto' for it."
        raise ValueError(f"{msg}, got {total}. {advice}")
    return dict(zip(SIZES, (product, micro, steps), strict=True))


def _count(config: Mapping[str, object], name: str) -> int | None:
    """The size; None if it is missing or ``"auto"``."""
    value = config.get(name, "auto")
    if value == "auto":
        return None
    if type(value) is not int or value < 1:
        msg = f"accelerator(config): expected {name} of at least 1 or 'auto', got {value!r}."
        raise ValueError(f"{msg} Write a whole number.")
    return value


def _fill_zero(zero: Options, facts: ConfigFacts) -> None:
    """Fill in the bucket size; no bucket needs to be larger than the whole model."""
    # DeepSpeed allocates the whole bucket, 2 GB by default, even for a small model. Its
    # alignment needs an even size.
    size = max(2, facts.num_parameters + facts.num_parameters % 2)
    wanted = zero.get("reduce_bucket_size", _BUCKET)
    if isinstance(wanted, int | float) and wanted > size:
        zero["reduce_bucket_size"] = size


def _fill_params(params: dict[str, object], known: Mapping[str, object]) -> None:
    """Fill in ``"auto"`` from the learner's hyper-parameters, else DeepSpeed's default."""
    for name, value in list(params.items()):
        if value == "auto" and name in known:
            params[name] = known[name]
        elif value == "auto" and name in {"betas", "eps", "weight_decay"}:
            del params[name]


def _fill_schedule(
    schedule: dict[str, object], opt: Mapping[str, object], facts: ConfigFacts
) -> None:
    """Fill in the rates of a warm-up; its lengths depend on the fit, and must be written."""
    lr = opt.get("lr", facts.opt_hparams.get("lr"))
    known = {"warmup_min_lr": 0.0, "warmup_max_lr": lr}
    for name, value in known.items():
        if schedule.get(name) == "auto" and value is not None:
            schedule[name] = value


def _find_autos(value: object, place: str = "") -> Iterator[str]:
    """Keys that are still ``"auto"``, except one that DeepSpeed fills in itself."""
    if isinstance(value, Mapping):
        for name, inner in value.items():
            if name != "keep_in_fp32_modules":
                yield from _find_autos(inner, f"{place}.{name}".lstrip("."))
    elif value == "auto":
        yield place
