"""Which kernels compute a result, and so whether its bits repeat."""

from __future__ import annotations

import torch

from harness.accelerators.distributed.environment import (
    fix_cublas_workspace,
    read_cublas_workspace,
)


def use_deterministic_kernels() -> None:
    """Let the same computation give the same bits in each run, on the CPU and on CUDA.

    It is for the whole process, and should come before anything runs on CUDA. An operation
    without such a kernel raises an error. Some are slower.

    References
    ----------
    https://docs.pytorch.org/docs/stable/notes/randomness.html
    """
    fix_cublas_workspace()
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False


def describe_kernels(device: torch.device) -> dict[str, str]:
    """Name the versions and switches on which the bits of results depend, beside the device.

    Returns
    -------
    dict
        Text by name; on CUDA those of its libraries too.
    """
    modes = ("off", "warn", "on")
    backends = torch.backends
    found: dict[str, object] = {
        "deterministic": modes[torch.get_deterministic_debug_mode()],
        "float32 matmul": _read_precision(
            backends.cuda if device.type == "cuda" else backends.mkldnn, "matmul"
        ),
    }
    if device.type == "cuda":
        # torch 2.13 has no public name for the version of the driver.
        read_driver = getattr(torch._C, "_cuda_getDriverVersion", lambda: None)
        found |= {
            "CUDA": torch.version.cuda,
            "CUDA driver": read_driver(),
            "cuDNN": backends.cudnn.version(),  # type: ignore[no-untyped-call]
            "cuDNN enabled": backends.cudnn.enabled,
            "cuDNN benchmark": backends.cudnn.benchmark,
            "cuDNN deterministic": backends.cudnn.deterministic,
            "float32 convolution": _read_precision(backends.cudnn, "conv"),
            "cuBLAS workspace": read_cublas_workspace(),
        }
    return {name: str(value) for name, value in found.items()}


def _read_precision(backend: object, operation: str) -> object:
    """How float32 is computed, such as ``tf32``; None before torch 2.9, which has no such name."""
    return getattr(getattr(backend, operation, None), "fp32_precision", None)
