"""What is shown of many differences."""

from __future__ import annotations

from tracking.verify import Mismatch
from tracking.verify.report import list_errors, list_findings
from tracking.verify.verify import Verification


def make(run, num_missing=0, num_notes=0):
    rows = [
        Mismatch("MLflow", "missing", f"train/loss at step {i}", "0.5")
        for i in range(num_missing)
    ]
    return Verification(run, rows, [f"note {i}" for i in range(num_notes)])


def test_equal_runs_give_nothing():
    assert list_findings([make("a"), make("b")]) == []


def test_few_differences_are_all_named():
    found = make("a", 4)
    assert list_findings([found]) == [str(one) for one in found.mismatches]


def test_each_kind_is_summed_up_over_all_runs():
    first, second = make("a", 2, num_notes=1), make("b", 5000)
    second.mismatches.append(Mismatch("MLflow", "unknown", "valid/x at step 0"))
    assert list_findings([first, second]) == [
        "note: a: note 0",
        "missing in MLflow: a: train/loss at step 0: 0.5",
        "missing in MLflow: a: train/loss at step 1: 0.5",
        "missing in MLflow: b: train/loss at step 0: 0.5",
        "missing in MLflow: 4,999 more, the last one b: train/loss at step 4999: 0.5",
        "unknown in MLflow: b: valid/x at step 0",
    ]


def test_runs_that_differ_are_counted_after_the_first_ones():
    assert list_errors(["x"] * 6) == ["x"] * 6
    *named, last = list_errors(["x"] * 1000)
    assert named == ["x"] * 5
    assert last.startswith("verify: 995 more runs differ")
