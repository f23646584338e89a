"""``load`` reads what ``Fitted.save`` wrote."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from torch import nn

from harness.checkpoint.full_weights.placement import ModelPlacement
from harness.checkpoint.hparams import HparamDecoder
from harness.checkpoint.saved_objects import decode_objects
from harness.checkpoint.weights import find_model_class, read_saved_model
from harness.checks.calls import explain_calls
from harness.checks.values import as_path
from harness.errors import CheckpointError
from harness.fitted import Fitted
from harness.learner.learner import Learner
from harness.records import unpack_records
from harness.reshard.consolidated import STATE_ERRORS, load_whole_state, shape_buffers


@explain_calls
def load(
    path: str | Path,
    module: Callable[..., nn.Module] | None = None,
    *,
    trust: bool = False,
) -> Fitted:
    """Load a fitted model that ``Fitted.save`` wrote, on the CPU.

    Parameters
    ----------
    path
        The folder.
    module
        Model class or factory; None: the class whose name was saved, from a module that
        is already imported.
    trust
        Import the module that the folder names. This runs its code, so use it only for
        a folder that you trust.

    Returns
    -------
    Fitted
        It predicts, and evaluates with the loss and metrics of the fit. Those that cannot be
        found by name in imported modules are left out: use ``Learner.evaluate`` of a learner
        from ``setup``.

    Raises
    ------
    CheckpointError
        If the folder is missing, damaged or of another format, or the class is not
        imported or does not fit the weights.
    """
    path = as_path("load(path)", path)
    weights, about = read_saved_model(path)
    given = module
    module = module or find_model_class(path, about.module, trust=trust)
    source = HparamDecoder(module.__module__, trust=trust)
    if given is None and (texts := source.list_texts(about.hparams)):
        msg = f"load({str(path)!r}): expected hparams that can be rebuilt, got only"
        advice = "Pass a function as module=, or trust=True to import what they name."
        raise CheckpointError(f"{msg} text for {texts}. {advice}")
    if given is None and (secrets := source.list_secrets(about.hparams)):
        msg = f"load({str(path)!r}): expected values of all hparams, got none for {secrets}"
        advice = (
            "They are secrets, which are not saved. Pass module=functools.partial(...)."
        )
        raise CheckpointError(f"{msg}. {advice}")
    try:
        objects = decode_objects(about, source)
        learner = Learner(
            module=module,
            loss=objects.loss,
            metrics=objects.metrics,
            batch=objects.batch,
            hparams=source.decode(about.hparams),
            opt_hparams=source.decode(about.opt_hparams),
        )
        records = unpack_records(about.records)
    except STATE_ERRORS as exc:
        msg = f"load({str(path)!r}): expected what Fitted.save wrote, got: {exc!r}."
        raise CheckpointError(f"{msg} Take another copy.") from exc
    try:
        model = module(**learner.hparams)
        shape_buffers(model, weights)
        load_whole_state(model, weights)
    except (RuntimeError, TypeError) as exc:
        msg = f"load({str(path)!r}): expected weights that fit {module!r}, got: {exc}."
        raise CheckpointError(f"{msg} Pass the right class as module=.") from exc
    return Fitted(
        placement=ModelPlacement(module=model.eval()),
        records=records,
        learner=learner,
        hparams=dict(learner.hparams),
        opt_hparams=dict(learner.opt_hparams),
        loss=learner.loss,
        run_id=about.run_id,
        best_epoch=about.best_epoch,
        best_step=about.best_step,
        unit=about.unit,
    )
