"""The choice of a rank's device."""

from __future__ import annotations

import pytest
import torch

from harness.accelerators.devices import choose_device, choose_rank_device


def test_rank_gets_the_cpu_where_it_is_asked_for() -> None:
    assert choose_rank_device("cpu", local_rank=3) == torch.device("cpu")


def test_rank_gets_the_best_device_by_default() -> None:
    best = choose_device().type
    wanted = "cpu" if best == "mps" else best  # DeepSpeed cannot train on MPS
    assert choose_rank_device(None, local_rank=0).type == wanted


def test_device_that_deepspeed_does_not_support_is_refused() -> None:
    with pytest.raises(ValueError, match=r"expected 'cpu' or 'cuda', got 'meta'"):
        choose_rank_device("meta", local_rank=0)


def test_missing_cuda_is_refused() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    with pytest.raises(ValueError, match=r"expected a CUDA device, got none"):
        choose_rank_device("cuda", local_rank=0)
