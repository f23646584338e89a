"""Hints on frequent mistakes, for errors that a user's model, loss, metric or data raises.

The error stays torch's own; a hint is a note below it. What a hint says comes from shapes,
dtypes and layers. A few words of torch's message decide whether it is given: where another
version words it differently, there is no hint.
"""

from __future__ import annotations

import contextlib
import inspect
import traceback
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
CONVS = {3: nn.Conv1d, 4: nn.Conv2d, 5: nn.Conv3d}
"""Convolutions by the number of dimensions of a batch."""


def find_model_hint(
    error: BaseException, model: nn.Module, input: object, target: object
) -> str:
    """Return what may be wrong with the input of a model; empty: nothing is known.

    Parameters
    ----------
    error
        What was raised.
    model
        Model whose ``forward``, or own step, failed.
    input, target
        Those of the batch.
    """
    if type(target).__name__ == "MixedTarget":
        return "Mixup and CutMix mix the targets: compute the loss by MixupLoss(...)."
    text = str(error).lower()
    own = tuple(f"{kind.__qualname__}.forward()".lower() for kind in type(model).mro())
    is_call = isinstance(error, TypeError) and text.startswith(own)
    is_call = is_call and "call_model" in _frames(error)  # not by the user's own code
    if isinstance(input, Mapping) and is_call:
        names = list(map(repr, input))
        advice = "If one is the target: setup(batch=lambda b: (b['x'], b['y']))."
        return (
            f"forward is called with the batch's {', '.join(names)} by name. {advice}"
        )
    if is_call and "missing" in text and target is not None:
        several = "fit(((a, b), y)), predict(((a, b),))"
        return (
            f"The second item of a batch is its target. For several inputs: {several}."
        )
    if is_call and "positional argument" in text and isinstance(input, tuple):
        items = f"The input's {len(input)} items are the arguments of forward"
        return f"{items}. A forward(self, *items) takes any number."
    if is_call and "positional argument" in text and isinstance(input, list):
        lists = "Lists in the rows of data are joined by torch item by item"
        whole = (
            "A forward(self, *items) or predict(self, input) takes a list as a whole"
        )
        return f"{lists}: give torch.tensor(...) in their place. {whole}."
    if "indices" in text and "embedding" in text:
        return "nn.Embedding takes whole numbers: pass them as int64, by .long()."
    if not isinstance(input, Tensor):
        return ""
    layers = [layer for layer in model.modules() if not list(layer.children())]
    first = layers[0] if layers else None
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), None)
    found = _hint_dtype(layers, input, dtype) if "type" in text else ""
    is_of_sizes = any(word in text for word in ("shape", "size", "channel", "dim"))
    width = _hint_width(first, input) if is_of_sizes else ""
    if width and target is None and model.training:
        width += " The batch has no target: pass data as (input, target)."
    return found or width or _hint_rows(model, layers, input)


def _hint_dtype(
    layers: list[nn.Module], input: Tensor, dtype: torch.dtype | None
) -> str:
    if any(isinstance(layer, nn.Embedding) for layer in layers):
        return ""
    if dtype is None or input.dtype == dtype or input.is_complex():
        return ""
    name = str(dtype).removeprefix("torch.")
    other = ""
    if dtype in {torch.bfloat16, torch.float16}:
        short = {"bfloat16": "bf16", "float16": "fp16"}[name]
        other = (
            f", or train with precision={short!r}, which keeps the weights in float32"
        )
    return f"The weights are {name}: pass the input as input.to(torch.{name}){other}."


def _hint_width(first: object, input: Tensor) -> str:
    if type(first) is nn.Linear and input.dim():
        wanted, found = first.in_features, input.shape[-1]
        if wanted != found:
            return f"The first layer takes {wanted} features, the input has {found}."
    kind = CONVS.get(input.dim())
    if kind is not None and type(first) is kind:
        wanted = first.in_channels
        if input.shape[1] != wanted and input.shape[-1] == wanted:
            order = [0, input.dim() - 1, *range(1, input.dim() - 1)]
            advice = f"input.permute({', '.join(map(str, order))})"
            return f"Channels come second, and are last in the input: use {advice}."
        if input.shape[1] != wanted:
            return f"The first layer takes {wanted} channels, the input has {input.shape[1]}."
    return ""


def _hint_rows(model: nn.Module, layers: list[nn.Module], input: Tensor) -> str:
    has_norm = any(isinstance(layer, BATCH_NORMS) for layer in layers)
    if has_norm and model.training and input.dim() and input.shape[0] == 1:
        advice = "use a larger batch_size, or drop_last=True."
        return f"BatchNorm needs more than one row in training: {advice}"
    return ""


def find_loss_hint(
    pred: object, target: object, error: BaseException | None = None
) -> str:
    """Return what may be wrong with a prediction and its target; empty: nothing is known."""
    if pred is None:
        return "The model's forward returned None: does it end with 'return'?"
    if isinstance(pred, Mapping | tuple | list) and pred:
        first = repr(next(iter(pred))) if isinstance(pred, Mapping) else "0"
        way = f"setup(loss=harness.on(loss, pred={first}))"
        return f"The prediction is a {type(pred).__name__}: {way} takes an item of it."
    return _hint_labels(pred, target, is_loss=True) or _hint_kind(
        pred, target, str(error)
    )


def _hint_kind(pred: object, target: object, text: str) -> str:
    """Hint on a target of the prediction's shape; `text` is the error's."""
    if not (isinstance(pred, Tensor) and isinstance(target, Tensor)):
        return ""
    if target.shape != pred.shape:
        return ""
    is_of_kind = "float" in text.lower() or "bool" in text
    if is_of_kind and not target.is_floating_point():
        other = " Class labels, which CrossEntropyLoss takes too, are target.argmax(1)."
        classes = pred.dim() > 1 and pred.shape[1] > 1
        return f"Pass the target as target.float().{other if classes else ''}"
    if "between 0 and 1" in text:
        way = "end the model with a sigmoid, or use BCEWithLogitsLoss"
        return f"BCELoss takes probabilities from 0 to 1: {way}."
    return ""


def _hint_labels(pred: object, target: object, *, is_loss: bool) -> str:
    if not (isinstance(pred, Tensor) and isinstance(target, Tensor)):
        return ""
    if not pred.is_floating_point() or pred.dim() < 2:
        return ""
    classes, is_whole = pred.shape[1], not target.is_floating_point()
    if target.dim() == pred.dim() - 1 and classes > 1:
        if not is_whole:
            return "Class labels are whole numbers: pass the target as target.long()."
        with contextlib.suppress(RuntimeError):  # a device that has failed
            low, high = int(target.min()), int(target.max())
            if low < 0 or high >= classes:
                given = f"the target has {low}" + (f" to {high}" if high > low else "")
                return f"For {classes} outputs labels are 0 to {classes - 1}, {given}."
        is_known = target.dtype in {torch.int64, torch.uint8}
        labels = "class labels" if is_known else "class labels as target.long()"
        others = "BCELoss and MSELoss a target of the prediction's shape"
        call = "A loss is called as loss(pred, target)."
        return f"CrossEntropyLoss takes {labels}, {others}. {call}" if is_loss else ""
    if is_whole and target.dim() == pred.dim() and target.shape[1] == 1 < classes:
        return "Class labels have one dimension fewer: pass the target as target.squeeze(1)."
    if target.shape != pred.shape and target.numel() == pred.numel():
        sizes = ", ".join(map(str, (-1, *pred.shape[1:])))
        return f"Give both the same shape: target.reshape({sizes})."
    return ""


def find_metric_hint(metric: object, pred: object, target: object) -> str:
    """Return what may be wrong with a metric for such predictions; empty: nothing is known."""
    if pred is None:
        return "There is no prediction: set ctx.pred in your step, or return it in forward."
    if isinstance(pred, Mapping) and pred:
        return (
            f"The prediction is a dict: harness.on(metric, pred={next(iter(pred))!r})."
        )
    if isinstance(pred, tuple | list):
        return f"The prediction is a {type(pred).__name__}: harness.on(metric, pred=0)."
    if not (isinstance(pred, Tensor) and isinstance(target, Tensor)):
        return ""
    has_classes = pred.dim() == target.dim() + 1 and pred.dim() > 1
    if not has_classes:
        return ""
    name, classes = type(metric).__name__, pred.shape[1]
    if name.startswith("Binary"):
        other = name.replace("Binary", "Multiclass", 1)
        return f"For {classes} outputs use {other}(num_classes={classes})."
    given = getattr(metric, "num_classes", classes)
    if given != classes:
        return f"The model has {classes} outputs: {name}(num_classes={classes})."
    return _hint_labels(pred, target, is_loss=False)


def find_step_hint(opt: object, error: BaseException) -> str:
    """Return what an optimizer may miss whose step failed; empty: nothing is known."""
    kind = type(opt)
    step = getattr(kind, "step", None)
    if kind.__module__.startswith(("torch.", "harness.")) or not callable(step):
        return ""
    if isinstance(error, TypeError) and "NoneType" not in str(error):
        return ""
    if "closure" not in inspect.signature(step).parameters:
        return ""
    advice = "If it needs one, say so in a subclass: def step(self, closure)."
    return f"{kind.__name__}.step was called without a closure. {advice}"


def find_loader_hint(error: BaseException) -> str:
    """Return what may be wrong with rows that could not be joined; empty: nothing is known."""
    names = _frames(error)
    text = str(error)  # of a worker it has the traceback, too
    if "collate" in names or "in collate" in text or "in default_collate" in text:
        advice = "dataloader_options={'collate_fn': ...} collates them in another way."
        return f"Rows of a batch are stacked: they need tensors of one shape. {advice}"
    if "_try_get_data" in names and (
        isinstance(error, ConnectionError | EOFError)
        or "exited unexpectedly" in text
        or "killed by signal" in text
    ):
        cause = "A worker process of the loader was killed, perhaps for its memory"
        return f"{cause}. Use fewer workers; num_workers=0 shows where it happens."
    return ""


def _frames(error: BaseException) -> set[str]:
    """Return the names of the functions that an error came through."""
    return {frame.name for frame in traceback.extract_tb(error.__traceback__)}


def find_state_hint(error: BaseException) -> str:
    """Return what may have made a device or autograd fail, whatever they were given."""
    text = str(error)
    if isinstance(error, torch.OutOfMemoryError):
        half = "a batch_size of half as many rows, and accumulate=2 for the same steps"
        return f"Use {half}, or precision='bf16'."
    if "device-side assert" in text or "illegal memory access" in text:
        cause = "An index was out of range, such as a label or a row of an Embedding"
        late = "CUDA reports it late, so it may come from an earlier batch or line"
        again = "device='cpu' names the place, as CUDA_LAUNCH_BLOCKING=1 in the environment does"
        return f"{cause}. {late}: {again}. This process cannot use the GPU any more."
    if "does not require grad" in text and not torch.is_grad_enabled():
        where = "Gradients are off in validation, predictions and callbacks"
        return f"{where}: compute them inside 'with torch.enable_grad():'."
    if "to be on the same device" in text:
        own = "Make a tensor that the model or the loss holds a buffer"
        how = "self.register_buffer(name, tensor), and it moves with the weights"
        return f"{own}: {how}. Move any other one by tensor.to(input.device)."
    return ""


def add_hint(error: BaseException, find: Callable[..., str], *given: object) -> None:
    """Add the hint that a function finds to an error, as its last note, unless it has one.

    What is wrong with a device, or where gradients are off, comes first. Errors of names and
    keys, and those of what autograd keeps, come from the code, not from what it was given, and
    ours say themselves what to do: they get none. A hint that is empty, or that cannot be found,
    is left out: the error of the user must not be replaced by one of ours, as where a nested
    tensor has no shape.
    """
    text = str(error)
    is_of_names = isinstance(error, NameError | KeyError | ImportError) or (
        isinstance(error, AttributeError)
        and not text.startswith(("'NoneType'", "'dict'", "'tuple'", "'list'"))
    )
    if is_of_names or "inplace operation" in text or ": expected " in text:
        return
    with contextlib.suppress(Exception):
        hint = find_state_hint(error) or find(*given)
        has_one = any(
            note.startswith("hint: ") for note in getattr(error, "__notes__", ())
        )
        if hint and not has_one:
            error.add_note(f"hint: {hint}")
