"""Process groups that user code made."""

from __future__ import annotations

import pytest

from harness.accelerators.distributed.group import check_backends


@pytest.mark.parametrize(
    ("found", "kind"),
    [
        ("cpu:gloo", "cpu"),
        ("cpu:gloo,cuda:gloo", "cpu"),
        ("cpu:gloo,cuda:nccl", "cuda"),
        ("cuda:nccl,cpu:mpi", "cuda"),
    ],
)
def test_backends_that_serve_the_cpu_and_the_device_are_used(
    found: str, kind: str
) -> None:
    check_backends(found, kind)


@pytest.mark.parametrize(
    ("found", "kind"),
    [("cpu:gloo,cuda:gloo", "cuda"), ("cuda:nccl", "cuda"), ("cuda:nccl", "cpu")],
)
def test_backends_that_do_not_serve_them_are_refused(found: str, kind: str) -> None:
    wanted = "cpu:gloo,cuda:nccl" if kind == "cuda" else "cpu:gloo"
    with pytest.raises(ValueError, match=f"a process group with '{wanted}', got "):
        check_backends(found, kind)
