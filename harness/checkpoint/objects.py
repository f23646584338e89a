"""Losses and metrics of a saved model as JSON: what their classes and names can rebuild.

A module or metric is kept by the name of its class and by its attributes. It is rebuilt
without a call of its constructor, so that no code of its class runs while it is loaded.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from harness.checkpoint.hparams import HparamSource, encode_hparams, name_of
from harness.checkpoint.weights import SavedModel
from harness.metrics.kinds import is_metric
from harness.metrics.sets import MetricSet
from harness.metrics.state import list_common_attributes
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
        return encode_hparams({"value": value})["value"]
    hooks = [name for name in vars(value) if name.endswith("_hooks")]
    name = name_of(type(value))
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


class ObjectSource:
    """Rebuilds what ``encode_object`` wrote.

    Parameters
    ----------
    hparams
        What rebuilds plain values; functions are found as it finds them.
    """

    def __init__(self, hparams: HparamSource) -> None:
        self._hparams = hparams

    def decode(self, saved: object) -> Any:
        """The object.

        Raises
        ------
        LookupError
            If it, or a part of it, cannot be rebuilt; the text names the part.
        """
        if isinstance(saved, dict) and "$module" in saved:
            return self._decode_module(saved)
        if texts := self._hparams.list_texts({str(saved): saved}):
            raise LookupError(texts[0])
        return self._hparams.decode({"value": saved})["value"]

    def decode_one(self, saved: object) -> Any:
        """The object; None if it cannot be rebuilt."""
        with contextlib.suppress(LookupError):
            return self.decode(saved)
        return None

    def decode_metrics(self, about: SavedModel) -> MetricSet:
        """The metrics of a saved model that can be rebuilt."""
        found: dict[str, dict[str, Any]] = {"train": {}, "valid": {}}
        for split in found:
            for name, saved in about.metrics.get(split, {}).items():
                with contextlib.suppress(LookupError):
                    found[split][name] = self.decode(saved)
        return MetricSet(**found)

    def list_lost(self, about: SavedModel) -> list[str]:
        """Names of the loss and metrics that cannot be rebuilt."""
        every = {
            name: item for own in about.metrics.values() for name, item in own.items()
        }
        lost = []
        for name, saved in {"loss": about.loss, "batch": about.batch, **every}.items():
            try:
                self.decode(saved)
            except LookupError:
                lost.append(name)
        return lost

    def _decode_module(self, saved: Options) -> nn.Module:
        kind = self._hparams.find_class(saved["$module"], nn.Module)
        if kind is None:
            raise LookupError(saved["$module"])
        module: nn.Module = object.__new__(kind)
        if is_metric(module):
            from torchmetrics import Metric  # noqa: PLC0415  slow to import

            Metric.__init__(module)
            for name, (default, reduction, is_kept) in saved["states"].items():
                fx = self.decode(reduction)
                module.add_state(name, self.decode(default), fx, persistent=is_kept)
        else:
            nn.Module.__init__(module)
        for name, item in saved["attributes"].items():
            module.__dict__[name] = self.decode(item)
        for name, item in saved["parameters"].items():
            module.register_parameter(name, None if item is None else self._make(*item))
        for name, (item, is_kept) in saved["buffers"].items():
            module.register_buffer(name, self.decode(item), persistent=is_kept)
        for name, item in saved["modules"].items():
            module.add_module(name, None if item is None else self.decode(item))
        return module.train(saved["training"])

    def _make(self, value: object, requires_grad: bool) -> nn.Parameter:
        tensor: Tensor = self.decode(value)
        return nn.Parameter(tensor, requires_grad=requires_grad)
