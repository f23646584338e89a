"""Losses and metrics of a saved model as JSON: what their classes and names can rebuild.

A module or metric is kept by the name of its class and by its attributes. It is rebuilt
without a call of its constructor, so that no code of its class runs while it is loaded.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from harness.checkpoint.hparams import HparamDecoder, encode_hparams, find_import_name
from harness.checkpoint.weights import SavedModel
from harness.metrics.sets import MetricSet
from harness.metrics.state import list_common_attributes
from harness.metrics.type_checks import is_metric
from harness.pytree import Options

_OF_MODULE = frozenset(vars(nn.Module()))
_OPTIONS_OF_METRIC = frozenset(
    {"_device", "_dtype_convert", "compute_on_cpu", "compute_with_cache"}
    | {"dist_sync_on_step", "sync_on_compute"}
)
"""What a user chooses; torch and torchmetrics set the other attributes by themselves."""


def encode_object(value: object) -> Any:
    """A loss, metric or function as JSON can hold it; see ``encode_hparams``."""
    if not isinstance(value, nn.Module):
        return _encode(value)
    hooks = [name for name in vars(value) if name.endswith("_hooks")]
    name = find_import_name(type(value))
    if name is None or any(vars(value)[hook] for hook in hooks):
        return {"$text": type(value).__qualname__}
    metric: Any = value if is_metric(value) else None
    states = metric._defaults if metric is not None else {}
    known = {*states, *_OF_MODULE}
    if metric is not None:
        known = {*states, *list_common_attributes()} - _OPTIONS_OF_METRIC
    return {
        "$module": name,
        "attributes": _encode_all(
            {key: item for key, item in vars(value).items() if key not in known}
        ),
        "parameters": {
            key: None if item is None else [_encode(item.detach()), item.requires_grad]
            for key, item in value._parameters.items()
        },
        "buffers": {
            key: [_encode(item), key not in value._non_persistent_buffers_set]
            for key, item in value._buffers.items()
        },
        "modules": _encode_all(value._modules),
        "states": {
            key: [
                _encode(item),
                _encode(metric._reductions[key]),
                metric._persistent[key],
            ]
            for key, item in states.items()
        },
        "training": value.training,
    }


def _encode(value: object) -> Any:
    if isinstance(value, nn.Module):
        return encode_object(value)
    if isinstance(value, list | tuple) and any(isinstance(v, nn.Module) for v in value):
        return {"$text": "a list of modules"}
    return encode_hparams({"value": value})["value"]


def _encode_all(values: Mapping[str, object]) -> dict[str, Any]:
    return {name: _encode(value) for name, value in values.items()}


@dataclass(frozen=True, kw_only=True)
class SavedObjects:
    """The loss, batch function and metrics of a saved model, as far as they can be rebuilt."""

    loss: Callable[..., Tensor] | None
    batch: Any
    metrics: MetricSet
    lost: list[str]  #: names of those that cannot be rebuilt


def decode_objects(about: SavedModel, source: HparamDecoder) -> SavedObjects:
    """Rebuild what ``encode_object`` wrote.

    Parameters
    ----------
    source
        Rebuilds plain values; functions are found as it finds them.
    """
    lost: dict[str, None] = {}

    def decode(name: str, saved: object) -> Any:
        with contextlib.suppress(LookupError):
            return _decode(saved, source)
        lost[name] = None
        return None

    loss, batch = decode("loss", about.loss), decode("batch", about.batch)
    metrics = {
        split: {name: decode(name, saved) for name, saved in own.items()}
        for split, own in about.metrics.items()
    }
    known = {
        split: {
            n: item for n, item in metrics.get(split, {}).items() if item is not None
        }
        for split in ("train", "valid")
    }
    return SavedObjects(
        loss=loss, batch=batch, metrics=MetricSet(**known), lost=[*lost]
    )


def _decode(saved: object, source: HparamDecoder) -> Any:
    """Rebuild an object; ``LookupError`` names what cannot be rebuilt."""
    if isinstance(saved, dict) and "$module" in saved:
        return _decode_module(saved, source)
    if source.list_texts({"": saved}):
        raise LookupError(str(saved))
    return source.decode({"": saved})[""]


def _decode_module(saved: Options, source: HparamDecoder) -> nn.Module:
    kind = source.find_class(saved["$module"], nn.Module)
    if kind is None:
        raise LookupError(saved["$module"])
    module: nn.Module = object.__new__(kind)
    if is_metric(module):
        from torchmetrics import Metric  # noqa: PLC0415  slow to import

        Metric.__init__(module)
        for name, (default, reduction, is_kept) in saved["states"].items():
            fx = _decode(reduction, source)
            module.add_state(name, _decode(default, source), fx, persistent=is_kept)
    else:
        nn.Module.__init__(module)
    for name, item in saved["attributes"].items():
        module.__dict__[name] = _decode(item, source)
    for name, item in saved["parameters"].items():
        param = None
        if item is not None:
            param = nn.Parameter(_decode(item[0], source), requires_grad=item[1])
        module.register_parameter(name, param)
    for name, (item, is_kept) in saved["buffers"].items():
        module.register_buffer(name, _decode(item, source), persistent=is_kept)
    for name, item in saved["modules"].items():
        module.add_module(name, None if item is None else _decode(item, source))
    return module.train(saved["training"])
