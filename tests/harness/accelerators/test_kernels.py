"""What chooses kernels."""

from __future__ import annotations

import pytest
import torch

from harness.accelerators.kernels import describe_kernels, use_deterministic_kernels


def test_kernels_are_described_by_versions_and_switches(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    before = torch.backends.cudnn.benchmark
    cuda = torch.device("cuda")  # nothing is asked of the device itself
    plain = describe_kernels(cuda)
    assert describe_kernels(torch.device("cpu")).keys() < plain.keys()
    try:
        torch.backends.cudnn.benchmark = True
        assert describe_kernels(cuda)["cuDNN benchmark"] == "True"
        monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "")  # restored afterwards
        monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG")
        use_deterministic_kernels()
        changed = {
            name: value
            for name, value in describe_kernels(cuda).items()
            if value != plain[name]
        }
        assert changed == {"deterministic": "on", "cuBLAS workspace": ":4096:8"}
    finally:
        torch.use_deterministic_algorithms(False)
        torch.backends.cudnn.benchmark = before
