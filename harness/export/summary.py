"""Summary of a model: its layers, with output shapes, parameters and sizes.

Shapes come from the first call in a fit; else from a call that computes nothing, of a copy
of the model whose weights have no storage (torch's ``meta`` device).
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils.hooks import RemovableHandle

from harness.callback import bind_context
from harness.data.batch import num_rows
from harness.export.sample import as_arguments, has_rows, suppress_output
from harness.pytree import iter_tensors, map_tensors
from harness.reshard.consolidated import whole_shape

MAX_ROWS = 100
"""Layers that are shown. Of a larger model the innermost ones are left out."""


@dataclass(frozen=True, kw_only=True)
class LayerSummary:
    """One module of a model.

    Attributes
    ----------
    name : str
        Name in its parent; empty for the model itself.
    kind : str
        Class.
    depth : int
        Modules around it.
    num_params : int or None
        Parameters in it, each once; None if a lazy one has no shape yet.
    shared_with : str or None
        Full name of the place where the same module was shown before.
    shape : str
        Shape of its output; ``N`` is the number of rows. Empty if it is not known.
    """

    name: str
    kind: str
    depth: int
    num_params: int | None
    shared_with: str | None
    shape: str


@dataclass(frozen=True, kw_only=True)
class ModelSummary:
    """Layers of a model and what they need; ``print`` shows them as a table.

    Attributes
    ----------
    layers : list of LayerSummary
        The model and its modules, in the order of their definition.
    num_params, num_trainable : int
        Parameters, shared ones once, and those of them that are trained.
    size_bytes : int
        Bytes of parameters and buffers.
    is_complete : bool
        False if lazy parameters have no shape yet, which the numbers leave out.
    """

    layers: list[LayerSummary] = field(repr=False)
    num_params: int
    num_trainable: int
    size_bytes: int
    is_complete: bool

    def __str__(self) -> str:
        depth = max((layer.depth for layer in self.layers), default=0)
        while depth > 1 and sum(la.depth <= depth for la in self.layers) > MAX_ROWS:
            depth -= 1
        shown = [layer for layer in self.layers if layer.depth <= depth]
        num_hidden = len(self.layers) - len(shown)
        has_shapes = any(layer.shape for layer in shown)
        heads = ("layer", *(["output"] if has_shapes else []), "parameters")
        rows = [heads, *(_format_layer(layer, has_shapes) for layer in shown)]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = []
        for *texts, number in rows:
            cells = [t.ljust(w) for t, w in zip(texts, widths, strict=False)]
            lines.append("  ".join([*cells, number.rjust(widths[-1])]))
        if num_hidden:
            lines.append(f"... and {num_hidden} modules within these")
        return "\n".join([*lines, self._format_total()])

    def _format_total(self) -> str:
        least = "" if self.is_complete else "at least "
        total = f"{least}{self.num_params:,} parameters, {format_size(self.size_bytes)}"
        num_frozen = self.num_params - self.num_trainable
        return total + (f", {num_frozen:,} parameters frozen" if num_frozen else "")


def summarize(
    model: nn.Module, example: object = None, shapes: Mapping[str, str] | None = None
) -> ModelSummary:
    """Describe a model.

    Parameters
    ----------
    model
        It is neither called nor changed.
    example
        Input of the model as a batch has it, for the shapes of outputs. Only its shapes
        and types are used. None: no shapes.
    shapes
        Shapes by module, where they are known already.
    """
    if shapes is None:
        shapes = {} if example is None else find_shapes(model, example)
    layers: list[LayerSummary] = []
    _add_layers(layers, model, "", "", 0, shapes, {})
    params = [*model.parameters()]
    known = [param for param in params if not is_lazy(param)]
    tensors = known + [buffer for buffer in model.buffers() if not is_lazy(buffer)]
    return ModelSummary(
        layers=layers,
        num_params=sum(whole_shape(p).numel() for p in known),
        num_trainable=sum(whole_shape(p).numel() for p in known if p.requires_grad),
        size_bytes=sum(whole_shape(t).numel() * t.element_size() for t in tensors),
        is_complete=len(known) == len(params),
    )


def _add_layers(
    layers: list[LayerSummary],
    module: nn.Module,
    name: str,
    path: str,
    depth: int,
    shapes: Mapping[str, str],
    seen: dict[nn.Module, str],
) -> None:
    """Add a module and, unless it was shown before, the modules within."""
    params = [*module.parameters()]
    is_known = not any(map(is_lazy, params))
    shared_with = seen.get(module)
    layers.append(
        LayerSummary(
            name=name,
            kind=type(module).__name__,
            depth=depth,
            num_params=sum(whole_shape(p).numel() for p in params)
            if is_known
            else None,
            shared_with=shared_with,
            shape=shapes.get(path, ""),
        )
    )
    if shared_with is not None:
        return
    seen[module] = path
    for child_name, child in module._modules.items():
        if child is not None:
            below = f"{path}.{child_name}" if path else child_name
            _add_layers(layers, child, child_name, below, depth + 1, shapes, seen)


def find_shapes(model: nn.Module, example: object) -> dict[str, str]:
    """Shapes of the outputs of each module, by its full name; empty if they are unknown.

    They are where the model cannot be copied, has lazy parameters, or looks at values.
    torch imports hundreds of modules for it, which takes a second the first time.
    """
    recorder = ShapeRecorder()
    try:
        with suppress_output(), torch.random.fork_rng(devices=[]):
            twin = copy_without_storage(model)
            recorder.attach(twin)
            input = map_tensors(example, lambda tensor: tensor.to("meta"))
            args, named = as_arguments(input)
            with torch.no_grad(), torch.device("meta"):
                twin(*args, **named)
    except Exception:  # noqa: BLE001  whatever a model does there, it is only a summary
        return {}
    return recorder.shapes


class ShapeRecorder:
    """Notes the shapes of all outputs in the first call of a model, and nothing after it.

    Attributes
    ----------
    shapes : dict
        By full name of the module.
    """

    def __init__(self) -> None:
        self.shapes: dict[str, str] = {}
        self._first: RemovableHandle | None = None
        self._others: list[RemovableHandle] = []

    def attach(self, model: nn.Module) -> None:
        """Wait for the first call of a model; a scripted one takes no hook."""
        if isinstance(model, torch.jit.ScriptModule):
            return
        self._first = model.register_forward_pre_hook(self._begin, with_kwargs=True)

    def detach(self) -> None:
        """Take all hooks off the model."""
        for handle in [*self._others, *([self._first] if self._first else [])]:
            handle.remove()
        self._others = []

    def _begin(
        self, model: nn.Module, args: object, named: Mapping[str, object]
    ) -> None:
        """Hook all modules. A copy of the model has this hook too, and only loses it."""
        assert self._first is not None
        is_original = self._first.hooks_dict_ref() is model._forward_pre_hooks
        model._forward_pre_hooks.pop(self._first.id, None)
        model._forward_pre_hooks_with_kwargs.pop(self._first.id, None)
        if not is_original:
            return
        rows = num_rows([args, dict(named)])
        modules = [*model.named_modules(remove_duplicate=False)]
        for path, module in [*modules[1:], modules[0]]:
            if not isinstance(module, torch.jit.ScriptModule):
                note = partial(self._note, path, rows)
                self._others.append(module.register_forward_hook(note))
        self._others.append(model.register_forward_hook(lambda *_: self.detach()))

    def _note(
        self, path: str, rows: int | None, _: object, __: object, out: object
    ) -> None:
        found = [_format_shape(tensor, rows) for tensor in iter_tensors(out)]
        more = ", ..." if found[4:] else ""
        self.shapes.setdefault(path, ", ".join(found[:4]) + more)


def copy_without_storage(model: nn.Module) -> nn.Module:
    """Copy a model in evaluation mode whose parameters and buffers have shapes alone."""
    memo: dict[int, object] = {}
    for tensor in [*model.parameters(), *model.buffers()]:
        empty = torch.empty(whole_shape(tensor), dtype=tensor.dtype, device="meta")
        is_param = isinstance(tensor, nn.Parameter)
        memo[id(tensor)] = nn.Parameter(empty, False) if is_param else empty
    twin = copy.deepcopy(model, memo)
    bind_context(twin, None)
    for module in twin.modules():
        module._forward_hooks.clear()
        module._forward_pre_hooks.clear()
        module._compiled_call_impl = None
    return twin.eval()


def _format_shape(tensor: Tensor, rows: int | None) -> str:
    sizes = [str(size) for size in tensor.shape]
    if has_rows(tensor, rows):
        sizes[0] = "N"
    return f"({', '.join(sizes)})"


def _format_layer(layer: LayerSummary, has_shapes: bool) -> tuple[str, ...]:
    name = f"{layer.name}: {layer.kind}" if layer.depth else layer.kind
    if layer.shared_with is not None:
        number = f"as {layer.shared_with or 'the model'}"
    elif layer.num_params is None:
        number = "not known yet"
    else:
        number = f"{layer.num_params:,}"
    shape = [layer.shape] if has_shapes else []
    return ("  " * layer.depth + name, *shape, number)


def format_size(size_bytes: float) -> str:
    """Format bytes with a unit.

    Examples
    --------
    >>> format_size(812), format_size(2_400_000)
    ('812 bytes', '2.4 MB')
    """
    if size_bytes < 1000:
        return f"{size_bytes:.0f} bytes"
    for unit in ("kB", "MB"):
        size_bytes /= 1000
        if size_bytes < 1000:
            return f"{size_bytes:.3g} {unit}"
    return f"{size_bytes / 1000:.3g} GB"
