"""The tables that compare luz with this library name what exists, and leave nothing out."""

from __future__ import annotations

import importlib
import inspect
import re
from pathlib import Path
from typing import Any

import pytest

import harness
import tracking
from harness import events
from harness.accelerators.single import SingleDevice

HERE = Path(__file__).parent
ROOT = HERE.parent.parent

EXPORTED = """
    %>% accelerator as_dataloader evaluate fit get_metrics lr_finder luz_callback
    luz_callback_auto_resume luz_callback_csv_logger luz_callback_early_stopping
    luz_callback_gradient_clip luz_callback_interrupt luz_callback_keep_best_model
    luz_callback_lr_scheduler luz_callback_metrics luz_callback_mixed_precision
    luz_callback_mixup luz_callback_model_checkpoint luz_callback_profile
    luz_callback_progress luz_callback_resume_from_checkpoint luz_callback_tfevents
    luz_callback_train_valid luz_load luz_load_checkpoint luz_load_model_weights
    luz_metric luz_metric_accuracy luz_metric_binary_accuracy
    luz_metric_binary_accuracy_with_logits luz_metric_binary_auroc luz_metric_mae
    luz_metric_mse luz_metric_multiclass_auroc luz_metric_rmse luz_metric_set luz_save
    luz_save_model_weights nn_mixup_loss nnf_mixup predict set_hparams set_opt_hparams setup
"""
"""What luz 0.5 exports, and ``predict``, which R itself exports."""

OWNERS = {
    "ctx": harness.FitContext,
    "learner": harness.Learner,
    "fitted": harness.Fitted,
    "evaluation": harness.Evaluation,
    "run": tracking.Run,
    "accelerator": SingleDevice,
}


def table_rows(path: Path) -> list[list[str]]:
    """Cells of the rows of all tables of a page."""
    lines = [line for line in path.read_text().splitlines() if line.startswith("| ")]
    cells = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]
    return [row for row in cells if set(row[0]) != {"-"}]


def find(name: str) -> Any:
    """What a dotted name stands for."""
    if name.startswith("on_"):
        assert name in events.EVENTS
        return None
    first, *rest = name.split(".")
    found: Any = OWNERS.get(first)
    for end in range(len(rest), -1, -1):
        if found is not None:
            break
        try:
            found = importlib.import_module(".".join([first, *rest[:end]]))
            rest = rest[end:]
        except ModuleNotFoundError:
            continue
    for part in rest:
        fields = getattr(found, "__dataclass_fields__", {})
        if part in fields and not hasattr(found, part):
            return None  # a field of a dataclass without a default
        found = getattr(found, part)
    return found


def check_counterpart(text: str) -> None:
    """Check a name such as ``harness.setup(loss=, metrics=)``, and its arguments."""
    name, _, options = text.partition("(")
    found = find(name)
    if wanted := re.findall(r"(\w+)=", options):
        known = inspect.signature(found).parameters
        takes_any = any(one.kind is one.VAR_KEYWORD for one in known.values())
        is_own = name.startswith(("harness.", "learner."))
        missing = [option for option in wanted if option not in known]
        assert not missing or (takes_any and not is_own), f"{text}: {missing}"


COUNTERPARTS = [
    name
    for row in table_rows(ROOT / "docs" / "from-luz.md")
    if row[0].startswith("`")
    for name in re.findall(r"`([^`]+)`", row[1])
]


def test_every_counterpart_exists() -> None:
    assert len(COUNTERPARTS) > 100
    for name in COUNTERPARTS:
        check_counterpart(name)


def test_counterpart_that_does_not_exist_is_found() -> None:
    for wrong in ("ctx.nope", "harness.setup(nope=)", "on_nope", "torch.nope"):
        with pytest.raises((AssertionError, AttributeError)):
            check_counterpart(wrong)


def test_everything_that_luz_exports_is_listed() -> None:
    rows = table_rows(ROOT / "docs" / "from-luz.md")
    listed = {row[0].strip("`") for row in rows}
    assert set(EXPORTED.split()) <= listed
    assert set(events.FIT_EVENTS) | set(events.PREDICT_EVENTS) <= listed


def test_table_of_cases_is_complete() -> None:
    rows = [row for row in table_rows(HERE / "README.md") if row[0].startswith("`")]
    assert len(rows) == 68
    for _, case, test, *_ in rows:
        file, _, name = test.strip("`").partition("::")
        assert f"\ndef {name}(" in (HERE / file).read_text(), case
