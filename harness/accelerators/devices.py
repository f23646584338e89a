"""Choose the device of a rank."""

from __future__ import annotations

import torch


def choose_device() -> torch.device:
    """Choose CUDA if available, else MPS, else the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda")
    if torch.backends.mps.is_available():
        return torch.device("mps")
    return torch.device("cpu")


def choose_rank_device(
    asked: str | torch.device | None, local_rank: int
) -> torch.device:
    """Choose the device of this rank.

    Raises
    ------
    ValueError
        If DeepSpeed cannot use the device, or there is none for this rank.
    """
    kind = torch.device(asked).type if asked is not None else choose_device().type
    if kind == "mps" and asked is None:
        kind = "cpu"
    if kind == "cpu":
        return torch.device("cpu")
    if kind != "cuda":
        msg = f"accelerator(device): expected 'cpu' or 'cuda', got {str(asked)!r}."
        raise ValueError(f"{msg} Leave it out to take the best one.")
    count = torch.cuda.device_count()
    # A scheduler may show each rank only its own device.
    index = local_rank if local_rank < count else 0
    if index >= count:
        msg = "accelerator(device): expected a CUDA device, got none."
        raise ValueError(f"{msg} Use device='cpu', or see 'harness doctor'.")
    torch.cuda.set_device(index)
    return torch.device("cuda", index)
