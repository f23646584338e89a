from __future__ import annotations

from harness.accelerators.single import SingleDevice
from tests.harness.fakes import line_learner, slope


def test_profile_logs_counts_and_times_of_each_split_and_epoch():
    fitted = line_learner().fit(
        slope(5),
        2,
        slope(3),
        dataloader_options={"batch_size": 2},
        accelerator=SingleDevice("cpu"),
        tracker=False,
        verbose=False,
    )
    profile = fitted.records["profile"]
    assert [item["batches"] for item in profile["train"]] == [2, 2]
    assert [item["batches"] for item in profile["valid"]] == [2, 2]
    for split, rows in (("train", 4), ("valid", 3)):
        for item in profile[split]:
            assert item["epoch_s"] > 0
            rate = item["samples_per_s"]
            assert abs(rate * item["epoch_s"] - rows) < 1e-6
