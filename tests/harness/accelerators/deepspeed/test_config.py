"""DeepSpeed's config: what is refused, what is filled in."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest

from harness.accelerators.deepspeed.config import (
    KEYS,
    ConfigFacts,
    check_config,
    complete_batch_sizes,
    fill_config,
    read_config,
)
from harness.accelerators.deepspeed.library import (
    find_config_error,
    import_deepspeed,
    known_fields,
)


def setting(**facts: Any) -> ConfigFacts:
    """Two ranks on the CPU, unless told otherwise."""
    usual: dict[str, Any] = {"world_size": 2, "device": "cpu", "fields": known_fields()}
    return ConfigFacts(**usual | facts)


def test_keys_are_those_that_deepspeed_reads() -> None:
    import_deepspeed()
    from deepspeed.runtime.config import DeepSpeedConfig  # noqa: PLC0415

    asked: set[str] = set()

    class Asked(dict[str, Any]):
        def get(self, key: str, default: Any = None) -> Any:
            asked.add(key)
            return super().get(key, default)

        def __getitem__(self, key: str) -> Any:
            asked.add(key)
            return super().__getitem__(key)

        def __contains__(self, key: object) -> bool:
            asked.add(str(key))
            return super().__contains__(key)

    DeepSpeedConfig(Asked(train_batch_size=1))
    assert asked <= KEYS


def test_config_of_a_dict_is_a_copy() -> None:
    given = {"zero_optimization": {"stage": 1}}
    read = read_config(given)
    read["zero_optimization"]["stage"] = 2
    assert given == {"zero_optimization": {"stage": 1}}
    assert read_config(None) == {}


def test_config_of_a_json_file_is_read(tmp_path: Path) -> None:
    path = tmp_path / "ds.json"
    path.write_text(json.dumps({"zero_optimization": {"stage": 3}}))
    assert read_config(path) == {"zero_optimization": {"stage": 3}}
    assert read_config(str(path)) == read_config(path)
    path.write_text(path.read_text(), "utf-8-sig")  # as some editors on Windows do
    assert read_config(path) == {"zero_optimization": {"stage": 3}}


@pytest.mark.parametrize(
    ("text", "match"),
    [
        (None, r"ds.json'\): expected a JSON file or a dict, got a path that does not"),
        ("{", r"expected JSON with each key once, got Expecting"),
        ("[1]", r"expected an object, got list"),
        ('{"bf16": {}, "bf16": {}}', r"got the key 'bf16' twice"),
    ],
)
def test_config_file_that_is_wrong_is_refused(
    text: str | None, match: str, tmp_path: Path
) -> None:
    path = tmp_path / "ds.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ValueError, match=match):
        read_config(path)


@pytest.mark.parametrize(
    ("config", "match"),
    [
        (
            {"zero_optimisation": {}},
            r"'zero_optimisation'. Did you mean 'zero_optimization'",
        ),
        (
            {"zero_optimization": {"stag": 1}},
            r"'zero_optimization.stag'. Did you mean 'stage'",
        ),
        ({"optimizer": {"typ": "Adam"}}, r"'optimizer.typ'. Did you mean 'type'"),
        ({"bf16": {"enable": True}}, r"'bf16.enable'. Did you mean 'enabled'"),
        ({"zero_optimization": {"stage": 4}}, r"stage in 0..3, got 4"),
        ({"zero_optimization": {"stage": "auto"}}, r"stage in 0..3, got 'auto'"),
        ({"zero_optimization": {"stage": True}}, r"stage in 0..3, got True"),
        ({"fp16": {"enabled": True}}, r"on the CPU, got fp16.*bf16"),
        (
            {"torch_autocast": {"enabled": True, "dtype": "torch.float16"}},
            r"on the CPU, got fp16",
        ),
        (
            {"fp16": {"enabled": True}, "bf16": {"enabled": True}},
            r"expected one precision, got fp16 and bf16",
        ),
        (
            {"bf16": {"enabled": "auto"}},
            r"bf16.enabled true or false, got 'auto'.*, or pass precision='fp32'",
        ),
        (
            {"managed_gradient_accumulation": True},
            r"managed_gradient_accumulation false",
        ),
        (
            {"zero_optimization": {"stage": 1, "overlap_comm": True}},
            r"overlap_comm at stage 2 or 3, got stage 1",
        ),
        (
            {"compile": {"deepcompile": True}},
            r"expected no compile.deepcompile, got true",
        ),
    ],
)
def test_config_that_cannot_work_is_refused(config: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        check_config(config, setting())


VALUES = [True, False, "auto", 2, -1, 0.5, "x", [], {}, None, {"enabled": 1}, {"a": 1}]


def test_value_of_any_type_is_understood_or_refused_by_its_key() -> None:
    for key, value in itertools.product(sorted(KEYS), VALUES):
        try:
            config = read_config({key: value})
            check_config(config, setting())
            filled = fill_config(config, setting(num_parameters=8))
            found = find_config_error(filled)
        except ValueError as error:
            assert key in str(error), (key, value)  # noqa: PT017  any value may pass
        else:
            assert found is None or found[0].startswith(key), (key, value)


def test_short_forms_are_written_out_and_null_is_left_out() -> None:
    config = {"bf16": True, "fp16": False, "zero_optimization": 2, "scheduler": None}
    nested = {"zero_optimization": {"stage": 1, "offload_optimizer": None}}
    assert read_config(config) == {
        "bf16": {"enabled": True},
        "fp16": {"enabled": False},
        "zero_optimization": {"stage": 2},
    }
    assert read_config(nested) == {"zero_optimization": {"stage": 1}}


@pytest.mark.parametrize(
    ("config", "match"),
    [
        ({"bf16": "auto"}, r"expected an object for 'bf16', got 'auto'"),
        ({"fp16": {"enabled": "auto"}}, r"fp16.enabled true or false, got 'auto'"),
        ({"amp": {"enabled": "auto"}}, r"amp.enabled true or false, got 'auto'"),
        ({"zero_optimization": [2]}, r"an object for 'zero_optimization', got \[2\]"),
        ({"optimizer": "AdamW"}, r"expected an object for 'optimizer', got 'AdamW'"),
        ({"optimizer": {"params": {}}}, r"a name for 'optimizer.type', got None"),
        ({"optimizer": {"type": "LBFGS"}}, r"another optimizer.type, got 'LBFGS'"),
        (
            {"scheduler": {"type": "WarmupLR", "params": [1]}},
            r"'scheduler.params', got \[1\]",
        ),
        ({"gradient_clipping": "1.0"}, r"a number >= 0 for 'gradient_clipping'"),
        ({"wall_clock_breakdown": "no"}, r"true or false for 'wall_clock_breakdown'"),
        ({"nebula": {"enabled": True}}, r"expected no 'nebula', got one"),
        ({"log_level": "loud"}, r"expected log_level debug, .*, got 'loud'"),
        ({"sequence_parallel_size": 2}, r"sequence_parallel_size 1, got 2"),
    ],
)
def test_config_of_wrong_types_names_the_key(
    config: dict[str, Any], match: str
) -> None:
    with pytest.raises(ValueError, match=match):
        check_config(read_config(config), setting())


@pytest.mark.parametrize(
    ("config", "found"),
    [
        ({"zero_optimization": {"sub_group_size": "x"}}, "zero_optimization.sub_group"),
        ({"bf16": {"enabled": True}, "csv_monitor": {"enabled": 3}}, "csv_monitor.ena"),
        ({"amp": {"enabled": True}}, "amp"),
    ],
)
def test_key_that_deepspeed_cannot_read_is_found(
    config: dict[str, Any], found: str
) -> None:
    error = find_config_error(config)
    assert error is not None
    assert error[0].startswith(found)


def test_fp16_on_a_gpu_is_let_pass() -> None:
    check_config({"fp16": {"enabled": True}}, setting(device="cuda"))


@pytest.mark.parametrize(
    ("config", "facts", "sizes"),
    [
        ({}, {}, (2, 1, 1)),
        ({}, {"batch_size": 8, "accumulate": 3}, (48, 8, 3)),
        ({"train_batch_size": "auto"}, {"batch_size": 8}, (16, 8, 1)),
        ({"train_batch_size": 48}, {"batch_size": 8}, (48, 8, 3)),
        ({"train_batch_size": 48, "gradient_accumulation_steps": 4}, {}, (48, 6, 4)),
        ({"train_batch_size": 48}, {}, (48, 24, 1)),
        ({"train_micro_batch_size_per_gpu": 5}, {"accumulate": 2}, (20, 5, 2)),
    ],
)
def test_batch_sizes_complete_each_other(
    config: dict[str, Any], facts: dict[str, Any], sizes: tuple[int, int, int]
) -> None:
    assert tuple(complete_batch_sizes(config, setting(**facts)).values()) == sizes


@pytest.mark.parametrize(
    ("config", "facts", "match"),
    [
        (
            {"train_batch_size": 64},
            {"batch_size": 4, "accumulate": 2},
            r"train_batch_size = 4 micro x 2 accumulation x 2 ranks = 16, got 64",
        ),
        ({"train_batch_size": 15}, {"batch_size": 4}, r"= 8, got 15"),
        (
            {"train_micro_batch_size_per_gpu": 4},
            {"batch_size": 8},
            r"= 8, the loader's batch size, got 4",
        ),
        (
            {"gradient_accumulation_steps": 2},
            {"accumulate": 3},
            r"= 3, the value of accumulate, got 2",
        ),
        (
            {"train_batch_size": 0},
            {},
            r"train_batch_size of at least 1 or 'auto', got 0",
        ),
        ({"train_batch_size": 1.5}, {}, r"or 'auto', got 1.5"),
    ],
)
def test_batch_sizes_that_contradict_each_other_are_refused(
    config: dict[str, Any], facts: dict[str, Any], match: str
) -> None:
    with pytest.raises(ValueError, match=match):
        complete_batch_sizes(config, setting(**facts))


def test_auto_values_are_filled() -> None:
    config = {
        "train_batch_size": "auto",
        "gradient_clipping": "auto",
        "optimizer": {
            "type": "AdamW",
            "params": {"lr": "auto", "betas": "auto", "weight_decay": 0.1},
        },
        "zero_optimization": {
            "stage": 3,
            "reduce_bucket_size": "auto",
            "stage3_prefetch_bucket_size": "auto",
            "stage3_param_persistence_threshold": "auto",
            "overlap_comm": "auto",
            "offload_optimizer": {"device": "cpu", "pin_memory": "auto"},
        },
        "scheduler": {
            "type": "WarmupLR",
            "params": {"warmup_min_lr": "auto", "warmup_max_lr": "auto"},
        },
        "steps_per_print": "auto",
    }
    filled = fill_config(
        config, setting(batch_size=4, num_parameters=101, opt_hparams={"lr": 0.5})
    )
    assert filled["train_batch_size"] == 8
    assert filled["gradient_clipping"] == 0.0
    assert filled["optimizer"]["params"] == {"lr": 0.5, "weight_decay": 0.1}
    # DeepSpeed's own defaults.
    zero = {"stage": 3, "offload_optimizer": {"device": "cpu"}}
    assert filled["zero_optimization"] == zero | {"reduce_bucket_size": 102}
    assert "steps_per_print" not in filled
    rates = {"warmup_min_lr": 0.0, "warmup_max_lr": 0.5}
    assert filled["scheduler"]["params"] == rates
    assert filled["managed_gradient_accumulation"] is False
    assert config["train_batch_size"] == "auto"


def test_clipping_is_off_where_nothing_is_said() -> None:
    # DeepSpeed 0.19.8's own default is 1.0.
    assert fill_config({}, setting())["gradient_clipping"] == 0.0
    assert (
        fill_config({"gradient_clipping": 2.0}, setting())["gradient_clipping"] == 2.0
    )


def test_auto_that_nothing_fills_is_refused() -> None:
    config = {"scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": "auto"}}}
    match = r"expected a value for scheduler.params.warmup_num_steps, got 'auto'"
    with pytest.raises(ValueError, match=match):
        fill_config(config, setting())


def test_deepspeed_measures_no_throughput_unless_it_is_asked_to() -> None:
    # It would wait for the device twice in each step.
    assert fill_config({}, setting())["timers"] == {"throughput": {"enabled": False}}
    asked = {"timers": {"throughput": {"synchronized": False}}}
    assert fill_config(asked, setting())["timers"] == asked["timers"]
