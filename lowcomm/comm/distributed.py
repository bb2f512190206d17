"""Comm over torch.distributed: gloo (TCP, CPU) and NCCL (GPUs), started by torchrun or what sets its variables.

Tensors may live anywhere: what gloo sends is staged in host memory, what NCCL sends on this rank's GPU. Everything
but sums travels as bytes, so dtypes that a backend does not know still arrive.
"""

from __future__ import annotations

import importlib
import os
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any, Generic, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from lowcomm.comm.base import Call, Comm, Late, PeerLost, Work
from lowcomm.tensors import bytes_of

T = TypeVar("T")

_ENVIRONMENT = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_ALL_TO_ALL_TAG, _EXCHANGE_TAG = 1, 2  # `send` and `recv` use 0


class Pending(Generic[T]):
    """A torch Work and what to make of its result."""

    def __init__(self, work: Any, finish: Callable[[], T]) -> None:
        self._work = work
        self._finish = finish

    def wait(self) -> T:
        """Block (NCCL: make the current stream wait) and return the result."""
        try:
            if self._work is not None:
                self._work.wait()
        except RuntimeError as error:
            if "timed out" in str(error).lower() or "timeout" in str(error).lower():
                raise Late(f"a message did not arrive in time: {error}") from error
            raise PeerLost(f"the connection to another rank broke: {error}") from error
        self._work = None
        return self._finish()


class _Broken:
    """What a connection that is broken already gives in place of a message under way: its error, to who waits."""

    def __init__(self, error: RuntimeError) -> None:
        self._error = error

    def wait(self) -> None:
        """Raise it."""
        raise self._error


def _started(start: Callable[[], Any]) -> Any:
    """The torch Work that ``start`` returns, or a `_Broken`."""
    try:
        return start()
    except RuntimeError as error:
        return _Broken(error)


class DistributedComm(Comm):
    """A view of some ranks of the default process group; see `connect`.

    Sums of more than two ranks are in the backend's order, so they agree with other worlds to rounding only; gathers
    are exact. All members call collectives of one view in the same order.
    """

    def __init__(
        self,
        members: Sequence[int],
        device: torch.device,
        group: dist.ProcessGroup | None = None,
        timeout: timedelta | None = None,
    ) -> None:
        """See `over` for a ``group``; ``timeout`` is that of messages in parts of this view, None: torch's own."""
        if not dist.is_initialized():
            raise ValueError("torch.distributed is not initialised; call lowcomm.comm.distributed.connect() first")
        self.rank = dist.get_rank()
        self.members = tuple(sorted(members))
        if self.rank not in self.members or len(set(self.members)) != len(self.members):
            raise ValueError(f"members {self.members} must be distinct and hold this rank, {self.rank}")
        if self.members[0] < 0 or self.members[-1] >= dist.get_world_size():
            raise ValueError(f"members {self.members} must lie within the world of {dist.get_world_size()} ranks")
        self.backend = str(dist.get_backend(group))
        self._wire = torch.device("cpu") if self.backend == "gloo" else device
        self._group, self._timeout = group, timeout
        self._subs: dict[tuple[int, ...], DistributedComm] = {}

    def issue(self, call: Call) -> Work[Any]:
        """See `Comm.issue`. A message that cannot be started is an error for who waits for it."""
        x, peer = call.x.detach(), call.peer
        if call.kind == "all_sum":
            y, device = x.to(self._wire, copy=True).contiguous(), x.device
            return Pending(
                _started(lambda: dist.all_reduce(y, group=self._ready(), async_op=True)), lambda: y.to(device)
            )
        if call.kind == "recv":
            return self._recv(x, peer)
        mine = bytes_of(x.to(self._wire, copy=True))
        if call.kind == "all_gather":
            return self._all_gather(mine, x)
        if call.kind == "all_to_all":
            return self._all_to_all(mine, x)
        if call.kind == "exchange":
            assert peer is not None
            theirs = torch.empty_like(mine)
            return Pending(_started(lambda: self._swap(mine, theirs, peer)), _typed(theirs, x, x.shape))
        if call.kind == "broadcast":
            work = _started(lambda: dist.broadcast(mine, peer, group=self._ready(), async_op=True))
            return Pending(work, _typed(mine, x, x.shape))
        assert call.kind == "send"
        return Pending(_started(lambda: dist.isend(mine, peer, group=self._ready())), lambda: _release(mine))

    def sub(self, members: Sequence[int]) -> Comm:
        """A smaller view; its process group is made by its members alone, when they first use it.

        Asked again, it is the same view, as process groups stay until the end. Torch tells groups of the same ranks
        apart by how many each rank is in already: members that are in different numbers of them never meet, and hear
        `Late`; `lowcomm.pairwise` needs none.
        """
        if not set(members) <= set(self.members):
            raise ValueError(f"members {tuple(members)} are not all among {self.members}")
        key = tuple(sorted(members))
        if key not in self._subs:
            self._subs[key] = DistributedComm(key, self._wire, timeout=self._timeout)
        return self._subs[key]

    def now(self) -> float:
        """Seconds of the monotonic clock."""
        return time.perf_counter()

    def _ready(self) -> dist.ProcessGroup | None:
        """The process group of this view; None means the default group of all ranks."""
        if self._group is None and len(self.members) < dist.get_world_size():
            self._group = dist.new_group(list(self.members), self._timeout, use_local_synchronization=True)
            _meet(self.backend, self._wire, self._group)
        return self._group

    def _swap(self, mine: Tensor, theirs: Tensor, peer: int) -> _All:
        """An exchange of bytes with another rank."""
        group = self._ready()
        if self.backend == "gloo":
            # The receive goes first: the word that one is ready must not stand in line behind one's own message.
            works = [dist.irecv(theirs, peer, group=group, tag=_EXCHANGE_TAG)]
            works.append(dist.isend(mine, peer, group=group, tag=_EXCHANGE_TAG))
        else:  # in one group: each of two kernels that wait for the other's would hold up what is behind it
            ops = [dist.P2POp(dist.isend, mine, peer, group), dist.P2POp(dist.irecv, theirs, peer, group)]
            works = list(dist.batch_isend_irecv(ops))
        return _All(works, mine)

    def _deal(self, mine: Tensor, out: Tensor) -> _All:
        """An all-to-all of rows; each rank begins with its next neighbour's.

        All receives are posted before the first message leaves. gloo's own all-to-all sends first: two ranks then wait
        for each other's word that they are ready to receive, which stands in line behind the message itself, so a
        pair's two directions take turns, and slow links are idle for almost half of the time.
        """
        group, num, me = self._ready(), len(self.members), self.place
        out[me].copy_(mine[me])
        neighbours = [(me + i) % num for i in range(1, num)]
        works = [dist.irecv(out[i], self.members[i], group, _ALL_TO_ALL_TAG) for i in reversed(neighbours)]
        works += [dist.isend(mine[i], self.members[i], group, _ALL_TO_ALL_TAG) for i in neighbours]
        return _All(works, mine)

    def _all_gather(self, mine: Tensor, x: Tensor) -> Work[Tensor]:
        n = len(self.members)
        out = mine.new_empty(n, mine.numel())
        work = _started(lambda: dist.all_gather(list(out), mine, group=self._ready(), async_op=True))
        return Pending(work, _typed(out.view(-1), x, (n, *x.shape)))

    def _all_to_all(self, mine: Tensor, x: Tensor) -> Work[Tensor]:
        n, out = len(self.members), torch.empty_like(mine)
        if self.backend == "gloo":
            rows = [y.view(n, y.numel() // n) for y in (mine, out)]
            work = _started(lambda: self._deal(*rows))
        else:
            work = _started(lambda: dist.all_to_all_single(out, mine, group=self._ready(), async_op=True))
        return Pending(work, _typed(out, x, x.shape))

    def _recv(self, like: Tensor, source: int | None) -> Work[tuple[int, Tensor]]:
        """NCCL cannot receive from whoever comes first."""
        if source is None and self.backend != "gloo":
            raise ValueError("recv(source=None) needs gloo: NCCL must know the sender; name the source")
        y = torch.empty(like.numel() * like.element_size(), dtype=torch.uint8, device=self._wire)
        typed = _typed(y, like, like.shape)
        work = _started(lambda: dist.irecv(y, source, group=self._ready()))
        return Pending(work, lambda: (self.members[work.source_rank()] if source is None else source, typed()))


class _All:
    """Messages under way, and the buffer of those that leave."""

    def __init__(self, works: list[Any], buffer: Tensor) -> None:
        self._works, self._buffer = works, buffer

    def wait(self) -> None:
        """Until all have ended; a RuntimeError of torch's when one of them breaks."""
        for work in self._works:
            work.wait()


def _meet(backend: str, device: torch.device, group: dist.ProcessGroup | None) -> None:
    """Have NCCL connect all members of a group, without which two of them could not exchange alone."""
    if backend == "nccl":
        dist.all_reduce(torch.zeros(1, device=device), group=group)


def _release(x: Tensor) -> None:
    """Holds a buffer until the message has left."""
    del x


def _typed(raw: Tensor, like: Tensor, shape: Sequence[int]) -> Callable[[], Tensor]:
    """Gives bytes from the wire as a tensor of this shape, with dtype and device of ``like``, which it lets go."""
    dtype, device = like.dtype, like.device
    return lambda: raw.view(dtype).view(shape).to(device)


def over(group: dist.ProcessGroup, device: torch.device) -> DistributedComm:
    """A view of the members of a process group that exists already, over that group.

    Groups of fewer members, which it makes where they are used, have torch's own time-out.
    """
    return DistributedComm(dist.get_process_group_ranks(group), device, group=group)


def under_torchrun() -> bool:
    """Whether the variables that torchrun sets are all there."""
    return all(name in os.environ for name in _ENVIRONMENT)


def connect(backend: str, timeout_s: float = 600.0) -> DistributedComm:
    """Join the process group that torchrun's variables describe.

    Args:
        backend: "gloo" or "nccl"; nccl takes the GPU of number LOCAL_RANK.
        timeout_s: how long a message may take before `Late`.

    Raises:
        ValueError: when a variable is missing, or NCCL is asked for without enough GPUs.
    """
    missing = [name for name in _ENVIRONMENT if name not in os.environ]
    if missing:
        raise ValueError(f"the variables {missing} are not set; start the program with torchrun")
    if backend not in ("gloo", "nccl"):
        raise ValueError(f"backend {backend!r}: choose 'gloo' or 'nccl'")
    device = torch.device("cpu")
    if backend == "nccl":
        local_rank = int(os.environ.get("LOCAL_RANK", "0"))
        if not torch.cuda.is_available():
            raise ValueError("backend 'nccl' needs CUDA, and torch sees no GPU here; use backend 'gloo'")
        if local_rank >= torch.cuda.device_count():
            raise ValueError(
                f"backend 'nccl' wants a GPU for each process: local rank {local_rank}, but there are only "
                f"{torch.cuda.device_count()} GPUs; start fewer processes or use backend 'gloo'"
            )
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
    # Whoever imports this later, such as torch's optimizers do, has the process group in the default arguments of its
    # functions for ever: `disconnect` could not end gloo's threads, and one that then frees a tensor while Python ends
    # aborts the process.
    importlib.import_module("torch.distributed.nn.functional")
    # No device_id: a group that is bound to its GPU splits its sub-groups off, for which all ranks must call, and the
    # ranks outside of a `sub` know nothing of it.
    timeout = timedelta(seconds=timeout_s)
    dist.init_process_group(backend, timeout=timeout)
    _meet(backend, device, None)
    return DistributedComm(range(dist.get_world_size()), device, timeout=timeout)


def disconnect() -> None:
    """Leave the process group, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()
