"""Communication between ranks: the only module that uses ``torch.distributed``.

Small values are sent by gloo on the CPU, so that asking "does any rank want to stop?" never
waits for a device. Tensors on a CUDA device are sent by NCCL.
"""

from __future__ import annotations

import atexit
import copy
import faulthandler
import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Literal, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from harness.accelerators.distributed.environment import (
    Launch,
    let_device_errors_be_raised,
    read_agent,
)
from harness.accelerators.distributed.store import connect_store
from harness.pytree import as_bytes, map_tensors
from harness.reshard.consolidated import copy_into

T = TypeVar("T")

FAILED = "failed"
"""Key in the store with the rank that failed first, and its error."""

TIMEOUT = timedelta(minutes=30)
"""Time to wait for the other ranks, longer than a slow checkpoint of one of them."""

CUDA_BACKENDS = "cpu:gloo,cuda:nccl"
"""Backends for tensors on both kinds of device; gloo lacks some operations on CUDA."""

SENT_BYTES = 1 << 24
"""Tensors up to this size are sent together, a larger one alone."""

_OPS = {"sum": dist.ReduceOp.SUM, "mean": dist.ReduceOp.SUM, "max": dist.ReduceOp.MAX}


class PeerError(RuntimeError):
    """Another rank failed, and this rank ends with it. The other rank shows the error.

    Attributes
    ----------
    rank
        The rank that failed.
    """

    def __init__(self, rank: int, reason: str) -> None:
        super().__init__(f"rank {rank} failed: {reason}")
        self.rank = rank


_STDERR = 2
"""Its descriptor, whatever ``sys.stderr`` is."""


class RankGroup:
    """The ranks of one launch, and the values that they send each other.

    Notes
    -----
    The process group is created once per process and kept for the next fit. A group that
    user code created is used as it is, and user code has to destroy it.
    """

    def __init__(self, launch: Launch, device: torch.device) -> None:
        self.rank = launch.rank
        self.world_size = launch.world_size
        self.device = device
        self.server = f"rank 0 on {launch.address or 'this machine'}"
        self.store: Any = None
        if not dist.is_initialized():
            self._connect(launch)
        elif dist.get_world_size() != launch.world_size:
            msg = f"accelerator: expected a process group of {launch.world_size} ranks"
            advice = "Call torch.distributed.destroy_process_group() first."
            raise ValueError(f"{msg}, got one of {dist.get_world_size()}. {advice}")
        else:
            check_backends(dist.get_backend_config(), device.type)
            self.store = _find_store()

    def _connect(self, launch: Launch) -> None:
        """Create the process group; one rank needs neither launcher nor port."""
        if self.world_size > 1 and not faulthandler.is_enabled():
            # gloo ends the process where ranks send different sizes. This tells the line.
            faulthandler.enable(_STDERR)
        agent = read_agent()
        if agent.has_store:
            self.server = f"torchrun's agent on {launch.address}"
        self.store = connect_store(launch, agent)
        backend = "gloo"
        if self.device.type == "cuda":
            backend = CUDA_BACKENDS
            let_device_errors_be_raised(self.world_size)
        dist.init_process_group(
            backend,
            store=self.store,
            rank=launch.rank,
            world_size=launch.world_size,
            timeout=TIMEOUT,
        )
        atexit.register(disconnect)

    # ------------------------------------------------------------------ values

    def gather_objects(self, value: T) -> list[T]:
        """The value of each rank, in order of rank."""
        if self.world_size == 1:
            return [value]
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value)
        return values

    def broadcast(self, value: object, src: int = 0) -> Any:
        """The value that rank `src` holds, with its tensors on this rank's device."""
        if self.world_size == 1:
            return value
        own = detach_to(value, torch.device("cpu")) if self.rank == src else None
        found = self.broadcast_objects(own, src)
        return value if self.rank == src else detach_to(found, self.device)

    def broadcast_objects(self, value: T, src: int = 0) -> T:
        """The value that rank `src` holds, with its tensors on the CPU."""
        if self.world_size == 1:
            return value
        values = [value]
        dist.broadcast_object_list(values, src=src, device=torch.device("cpu"))
        return value if self.rank == src else values[0]

    def gather_counts(self, value: int) -> list[int]:
        """The count of each rank, in order of rank; faster than ``gather_objects``."""
        return self._gather_numbers([value])[0]

    def _gather_numbers(self, numbers: Sequence[int]) -> list[list[int]]:
        """Each of the numbers as the ranks have it, in order of rank."""
        mine = torch.tensor(numbers)
        theirs = [mine.clone() for _ in range(self.world_size)]
        if self.world_size > 1:
            dist.all_gather(theirs, mine)
        found: list[list[int]] = torch.stack(theirs).T.tolist()
        return found

    def any(self, flag: bool) -> bool:
        """True on every rank if it is on one."""
        return self.any_each([flag])[0]

    def any_each(self, flags: Sequence[bool]) -> list[bool]:
        """For each of the flags, true on every rank if it is on one."""
        if self.world_size == 1:
            return list(flags)
        found = torch.tensor(flags, dtype=torch.int64)
        dist.all_reduce(found, op=dist.ReduceOp.MAX)
        return [bool(flag) for flag in found.tolist()]

    def count_later(self, flag: bool) -> Callable[[], int]:
        """Start to count the ranks where the flag is true; the result waits for the number."""
        found = torch.tensor([int(flag)])
        work = dist.all_reduce(found, async_op=True)

        def count() -> int:
            work.wait()
            return int(found.item())

        return count

    def barrier(self) -> None:
        """Wait until every rank gets here."""
        self.any(False)

    # ----------------------------------------------------------------- tensors

    def gather(self, tensor: Tensor) -> Tensor:
        """Concatenate the tensors of all ranks along dim 0; their lengths may differ.

        Raises
        ------
        ValueError
            If dtypes, or shapes after dim 0, differ; ``PeerError`` on ranks other than 0.
        """
        tensor = tensor.detach()
        if tensor.dim() == 0:
            tensor = tensor.reshape(1)
        if self.world_size == 1:
            return tensor
        tensor, lengths = self._agree_on_rows(tensor)
        row = tensor.shape[1:]
        longest = torch.zeros(
            (max(lengths), *row), dtype=tensor.dtype, device=tensor.device
        )
        longest[: len(tensor)] = tensor
        # Backends do not support every dtype, but all support bytes. Empty rows have none.
        sent = as_bytes(longest)
        received = [torch.empty_like(sent) for _ in lengths]
        if sent.numel():
            dist.all_gather(received, sent)
        padded = [sent.view(tensor.dtype).reshape(longest.shape) for sent in received]
        return torch.cat([rows[:n] for rows, n in zip(padded, lengths, strict=True)])

    def _agree_on_rows(self, tensor: Tensor) -> tuple[Tensor, list[int]]:
        """The tensor in the form of the ranks' rows, and the length of each rank's.

        Other rows would be read as something else, or end in a hang. A rank without rows
        takes the form of the others.
        """
        form = (str(tensor.dtype), tuple(tensor.shape[1:]))
        digest = int.from_bytes(hashlib.sha256(repr(form).encode()).digest()[:7])
        lengths, digests = self._gather_numbers([len(tensor), digest])
        if len(set(digests)) > 1:
            forms = self.gather_objects((tensor.dtype, tensor.shape[1:]))
            has_rows = [n for n, length in enumerate(lengths) if length]
            dtype, shape = forms[has_rows[0] if has_rows else 0]
            if len(tensor) == 0:
                tensor = tensor.new_empty((0, *shape), dtype=dtype)
            rows = f"{tensor.dtype} {tuple(tensor.shape[1:])}"
            advice = "Give them one dtype, and one shape after the first dim."
            self.check_same("gather", {"rows": rows}, advice)
        return tensor, lengths

    def reduce(
        self, tensor: Tensor, op: Literal["sum", "mean", "max"] = "sum"
    ) -> Tensor:
        """Reduce the tensor over the ranks into a new one, the same on every rank."""
        if op not in _OPS:
            msg = f"reduce(op): expected one of {', '.join(_OPS)}, got {op!r}."
            raise ValueError(f"{msg} Use one of these.")
        total = tensor.detach().clone()
        if op == "mean" and not (total.is_floating_point() or total.is_complex()):
            total = total.to(torch.get_default_dtype())
        if self.world_size > 1:
            dist.all_reduce(total, op=_OPS[op])
        return total / self.world_size if op == "mean" else total

    def send_tensors(self, live: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Overwrite tensors with those of rank 0, by name, a few at a time.

        It needs the memory of one more tensor, or ``SENT_BYTES``.

        Parameters
        ----------
        live
            Tensors of this rank. One that has another shape or dtype on rank 0 gets new
            memory.

        Returns
        -------
        Tensors of rank 0 that are not among the live ones
        """
        if self.world_size == 1:
            return {}
        forms = self.broadcast_objects(
            {name: _Form.describe(value) for name, value in live.items()}
        )
        new: dict[str, Tensor] = {}
        for names in _group_by_size(forms):
            for name, value in self._send_group(names, forms, live):
                if name not in live:
                    new[name] = value
                elif _Form.describe(live[name]) == forms[name]:
                    copy_into(live[name].data, value)
                else:
                    live[name].data = value
        return new

    def _send_group(
        self,
        names: Sequence[str],
        forms: Mapping[str, _Form],
        live: Mapping[str, Tensor],
    ) -> Iterator[tuple[str, Tensor]]:
        """Send tensors as bytes, which every backend can; yields those that came here."""
        if not forms[names[0]].is_plain:
            found = self.broadcast(live[names[0]].data if self.rank == 0 else None)
            yield from [(names[0], found)] if self.rank else []
            return
        sizes = [forms[name].num_bytes for name in names]
        if self.rank == 0:
            parts = [as_bytes(live[name]).to(self.device) for name in names]
            sent = parts[0] if len(parts) == 1 else torch.cat(parts)
        else:
            sent = torch.empty(sum(sizes), dtype=torch.uint8, device=self.device)
        if len(sent):
            dist.broadcast(sent, src=0)
        for name, part in zip(names, torch.split(sent, sizes), strict=True):
            form = forms[name]
            # The bytes of a tensor may begin where its dtype may not.
            part = part if len(names) == 1 else part.clone()
            if self.rank:
                yield name, part.view(form.dtype).reshape(form.shape)

    # ------------------------------------------------------------------ errors

    def check_on_every_rank(self, check: Callable[[], T]) -> T:
        """Run a check on every rank; if any fails, raise its error on one rank only.

        Raises
        ------
        Exception
            The error of `check`, on the lowest rank where it failed.
        PeerError
            On the other ranks.
        """
        result, error = _try(check)
        reasons = self.gather_objects(None if error is None else format_error(error))
        first = next((n for n, reason in enumerate(reasons) if reason), None)
        if first is None:
            assert result is not None
            return result[0]
        if error is not None and first == self.rank:
            raise error
        raise PeerError(first, reasons[first] or "")

    def check_same(self, place: str, facts: Mapping[str, object], advice: str) -> None:
        """Raise if a fact differs between ranks.

        Raises
        ------
        ValueError
            On rank 0, with the fact and the rank that differs; ``PeerError`` on the others.
        """
        of_ranks = self.gather_objects(facts)

        def compare() -> None:
            for name, value in of_ranks[0].items():
                for rank, other in enumerate(of_ranks):
                    if other.get(name) != value:
                        msg = f"{place}: expected the same {name} on every rank"
                        got = f"got {value!r} on rank 0 and {other.get(name)!r}"
                        raise ValueError(f"{msg}, {got} on rank {rank}. {advice}")

        self.check_on_every_rank(compare)

    def for_thread(self) -> RankGroup:
        """The same ranks, for a thread that only asks the store, by a client of its own.

        The client of the process group is locked while the group waits for a rank.
        """
        found = copy.copy(self)
        if self.has_clients:
            found.store = self.store.clone()
        return found

    @property
    def has_clients(self) -> bool:
        """Whether the store has a client for each thread: not before torch 2.8."""
        return hasattr(self.store, "clone")

    def report_failure(self, rank: int, reason: str) -> tuple[int, str]:
        """Tell all ranks why one failed, unless one failed first; returns what counts."""
        found = self.read_failure()
        if found is None:
            found = rank, reason
            if self.store is not None:
                self.store.set(FAILED, f"{rank}:{reason}")
        return found

    def first_failure(self) -> tuple[int, str] | None:
        """Rank and error of the rank that failed first, if this rank knows of one."""
        try:
            return self.read_failure()
        except (RuntimeError, ConnectionError):
            return STORE_IS_GONE

    def read_failure(self) -> tuple[int, str] | None:
        """Rank and error of the rank that failed first.

        Raises
        ------
        RuntimeError, ConnectionError
            If what serves the store is gone.
        """
        if self.store is None or self.world_size == 1:
            return None
        if not self.store.check([FAILED]):
            return None
        rank, _, reason = self.store.get(FAILED).decode().partition(":")
        return int(rank), reason


STORE_IS_GONE = 0, "ended without an error message"
"""Failure of rank 0, which serves the store, if it can tell none."""


@dataclass(frozen=True)
class _Form:
    """What a rank must know of a tensor to receive it."""

    shape: torch.Size
    dtype: torch.dtype
    is_plain: bool

    @classmethod
    def describe(cls, tensor: Tensor) -> _Form:
        """The form of a tensor."""
        is_plain = tensor.layout == torch.strided and not tensor.is_quantized
        return cls(tensor.shape, tensor.dtype, is_plain)

    @property
    def num_bytes(self) -> int:
        """Bytes of the elements."""
        return self.shape.numel() * self.dtype.itemsize


def _group_by_size(forms: Mapping[str, _Form]) -> Iterator[list[str]]:
    """Yield names of tensors that are sent at once."""
    names: list[str] = []
    num_bytes = 0
    for name, form in forms.items():
        num_bytes += form.num_bytes
        if names and (num_bytes > SENT_BYTES or not form.is_plain):
            yield names
            names, num_bytes = [], form.num_bytes
        if form.is_plain:
            names.append(name)
        else:
            yield [name]
    if names:
        yield names


def _try(check: Callable[[], T]) -> tuple[tuple[T] | None, Exception | None]:
    """The result in a tuple, or the exception."""
    try:
        return (check(),), None
    except Exception as error:  # noqa: BLE001 - raised again by check_on_every_rank, on one rank
        return None, error


def format_error(error: BaseException) -> str:
    """Class and text of an exception, in one line."""
    return f"{type(error).__name__}: {error}".partition("\n")[0]


def check_backends(found: str, kind: str) -> None:
    """Check that a process group that user code made serves the CPU and a kind of device.

    Parameters
    ----------
    found
        As torch writes the backends of a group, such as ``cpu:gloo,cuda:nccl``.
    kind
        ``cpu`` or ``cuda``.
    """
    backends = dict(pair.split(":", 1) for pair in found.split(",") if ":" in pair)
    if "cpu" in backends and (kind != "cuda" or backends.get("cuda") == "nccl"):
        return
    wanted = CUDA_BACKENDS if kind == "cuda" else "cpu:gloo"
    msg = f"accelerator(device={kind!r}): expected a process group with {wanted!r}"
    advice = f"Call init_process_group({wanted!r}), or leave it to the accelerator."
    raise ValueError(f"{msg}, got {found!r}. {advice}")


def _find_store() -> Any:
    """Store of the process group that user code created."""
    # torch 2.13 has no public way to it.
    store = dist.distributed_c10d._get_default_store()
    prefix = f"harness/{read_agent().attempt}"
    return dist.PrefixStore(prefix, store)  # type: ignore[attr-defined]


def disconnect() -> None:
    """Destroy the process group at exit, unless user code already did."""
    if dist.is_initialized():
        dist.destroy_process_group()


def detach_to(value: object, device: torch.device) -> Any:
    """The value with its tensors detached and on the device."""
    return map_tensors(value, lambda tensor: tensor.detach().to(device))
