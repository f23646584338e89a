"""Evaluating and predicting with what a run trained."""

from __future__ import annotations

import json

import numpy as np
import pandas as pd

import tracking


def test_fit_then_evaluate_and_predict_use_the_trained_model(call, folder):
    words = ["--runs-dir", "runs", "--quiet", "--name", "first", "--no-deliver"]
    assert call("fit", "exp_cli.py:experiment", *words).exit_code == 0
    (past,) = tracking.list_runs("runs")
    assert past.status == "finished"
    assert {"hidden": 2, "opt.lr": 0.1, "seed": 3}.items() <= past.params.items()

    found = json.loads(call("evaluate", "first", "--json").output)
    last = past.records(what="metrics", set="valid", name="loss").to_pylist()[-1]
    assert found == {"loss": last["value"]}

    rows = np.arange(12, dtype=np.float32).reshape(4, 3)
    np.save("rows.npy", rows)
    pd.DataFrame(rows).to_csv("rows.csv", index=False)
    done = call("predict", "first", "rows.npy", "--to", "out.npy")
    assert "4 rows -> out.npy" in done.output
    call("predict", "first", "rows.csv", "--to", "out.csv")
    assert np.load("out.npy").shape == (4, 1)
    np.testing.assert_allclose(pd.read_csv("out.csv"), np.load("out.npy"), rtol=1e-6)
