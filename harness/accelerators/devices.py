"""Choose the device of a rank, and make it the one of a thread."""

from __future__ import annotations

import torch


def choose_device() -> torch.device:
    """Choose CUDA if available, else MPS, else the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda")
    if torch.backends.mps.is_available():
        return torch.device("mps")
    return torch.device("cpu")


def parse_device(asked: object) -> torch.device:
    """Return the device of a name."""
    msg = f"accelerator(device): expected 'cpu', 'cuda' or 'mps', got {asked!r}."
    advice = "Leave it out to take the best one."
    try:
        return torch.device(asked)  # type: ignore[call-overload, no-any-return]
    except TypeError:
        raise TypeError(f"{msg} {advice}") from None
    except RuntimeError:
        raise ValueError(f"{msg} {advice}") from None


def find_device(asked: object) -> torch.device:
    """Return the device with its index, so that the device of its tensors is equal to it.

    Parameters
    ----------
    asked
        Device or its name; None: the best one.
    """
    found = choose_device() if asked is None else parse_device(asked)
    try:
        return torch.empty(0, device=found).device
    except (AssertionError, NotImplementedError, RuntimeError) as error:
        msg = f"accelerator(device): expected a device of this machine, got {asked!r}."
        advice = "Use device='cpu', or see 'harness doctor'."
        raise ValueError(f"{msg} {advice}") from error


def choose_rank_device(
    asked: str | torch.device | None, local_rank: int
) -> torch.device:
    """Choose the device of this rank.

    Parameters
    ----------
    asked
        Device or its name; with an index, as in ``cuda:1``, it is that one. None: the best.
    local_rank : >= 0
        Number of this rank on its machine, which is the index of its device.
    """
    given = choose_device() if asked is None else parse_device(asked)
    kind = given.type
    if kind == "mps" and asked is None:
        kind = "cpu"
    if kind == "cpu":
        return torch.device("cpu")
    if kind != "cuda":
        msg = f"accelerator(device): expected 'cpu' or 'cuda', got {str(asked)!r}."
        raise ValueError(f"{msg} Leave it out to take the best one.")
    count = torch.cuda.device_count()
    if count == 0:
        msg = "accelerator(device): expected a CUDA device, got none."
        raise ValueError(f"{msg} Use device='cpu', or see 'harness doctor'.")
    # A scheduler may show each rank only its own device.
    index = local_rank if local_rank < count else 0
    if given.index is not None:
        index = given.index
    if index >= count:
        msg = f"accelerator(device): expected an index below {count}, the CUDA devices"
        advice = "Leave the index out to take the device of this rank."
        raise ValueError(f"{msg} that this rank sees, got {str(asked)!r}. {advice}")
    torch.cuda.set_device(index)
    return torch.device("cuda", index)


def use_in_thread(device: torch.device) -> None:
    """Make a CUDA device the current one of this thread; a new thread begins with the first.

    What touches the first device by accident makes a context there, about 0.5 GB of its
    memory, for each rank of the machine.
    """
    if device.type == "cuda":
        torch.cuda.set_device(device)
