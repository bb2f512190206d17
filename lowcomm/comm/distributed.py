"""Comm over torch.distributed: gloo (TCP, CPU) or NCCL (GPUs), with the environment variables of torchrun.

Tensors may be on any device: they are staged in host memory for gloo, on this rank's GPU for NCCL. Everything but sums
is sent as bytes, so any dtype works.
"""

from __future__ import annotations

import gc
import importlib
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any, Generic, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import PrefixStore, Store

from lowcomm.comm.base import Call, Comm, Late, PeerLost, Work
from lowcomm.comm.launched import Launch, check_interfaces, launched, number
from lowcomm.tensors import bytes_of

T = TypeVar("T")

_POLL_S = 0.01
_ALL_TO_ALL_TAG, _EXCHANGE_TAG = 1, 2  # `send` and `recv` use 0


class Pending(Generic[T]):
    """A torch Work, and the function that makes its result."""

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
    """A Work that failed at its start; `wait` raises the error."""

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


@dataclass(frozen=True)
class _World:
    """The ranks of the default process group, and the means to replace it after a loss.

    Attributes:
        ranks: our ranks by torch's, which torch renumbers in each group.
        store: the key-value store shared by the ranks.
        epoch: number of earlier groups.
        timeout: of messages.
        grace_s: how long a rank that notices a loss waits for the others.
    """

    ranks: tuple[int, ...]
    store: Store | None = None
    epoch: int = 0
    timeout: timedelta | None = None
    grace_s: float = 0.0

    def number(self, rank: int) -> int:
        """Torch's number of a rank."""
        return self.ranks.index(rank) if self.epoch else rank


class DistributedComm(Comm):
    """A view of some ranks of the default process group; see `connect`.

    Sums of more than two ranks are in the backend's order, so they equal other worlds' only to rounding; gathers are
    exact. All members must call a view's collectives in the same order.
    """

    def __init__(
        self,
        members: Sequence[int],
        device: torch.device,
        group: dist.ProcessGroup | None = None,
        world: _World | None = None,
    ) -> None:
        """``world`` is needed to regroup and for message time-outs; `over` says what a ``group`` is."""
        if not dist.is_initialized():
            raise ValueError("torch.distributed is not initialised; call lowcomm.comm.distributed.connect() first")
        self._world = world or _World(tuple(range(dist.get_world_size())))
        self.rank = self._world.ranks[dist.get_rank()]
        self.members = tuple(sorted(members))
        if self.rank not in self.members or len(set(self.members)) != len(self.members):
            raise ValueError(f"members {self.members} must be distinct and hold this rank, {self.rank}")
        if not set(self.members) <= set(self._world.ranks):
            raise ValueError(f"members {self.members} must lie within the world of {dist.get_world_size()} ranks")
        self.backend = str(dist.get_backend(group))
        self._wire = torch.device("cpu") if self.backend == "gloo" else device
        self._group = group
        self._subs: dict[tuple[int, ...], DistributedComm] = {}

    def issue(self, call: Call) -> Work[Any]:
        """A message that cannot be started fails when it is waited for."""
        x, peer = call.x.detach(), None if call.peer is None else self._world.number(call.peer)
        if call.kind == "all_sum":
            y, device = x.to(self._wire, copy=True).contiguous(), x.device
            return Pending(
                _started(lambda: dist.all_reduce(y, group=self._ready(), async_op=True)), lambda: y.to(device)
            )
        if call.kind == "recv":
            return self._recv(x, call.peer)
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
        """A smaller view. Its members create its process group at first use.

        Views are cached, as process groups are never freed. torch names groups of the same ranks by how many groups
        each rank is in: members in different numbers of groups never meet and get `Late`. `lowcomm.pairwise` needs no
        groups.
        """
        if not set(members) <= set(self.members):
            raise ValueError(f"members {tuple(members)} are not all among {self.members}")
        key = tuple(sorted(members))
        if key not in self._subs:
            self._subs[key] = DistributedComm(key, self._wire, world=self._world)
        return self._subs[key]

    def regroup(self, lost: PeerLost | Late) -> Comm:
        """The ranks that call it within the grace period form a new process group; gloo only.

        The old one is destroyed at once, so ranks that wait in it for this one notice the loss too.

        Raises:
            PeerLost: also when the others continued without this rank.
        """
        world = self._world
        if world.store is None or self.backend != "gloo":
            raise lost
        self._group = None
        self._subs.clear()
        dist.destroy_process_group()
        gc.collect()  # gloo closes its connections when nobody holds the group any more
        ranks = _survivors(world, self.rank, self.members)
        if self.rank not in ranks:
            raise PeerLost(f"ranks {list(ranks)} went on without rank {self.rank}, which came too late") from lost
        return _join(self.backend, self._wire, replace(world, ranks=ranks, epoch=world.epoch + 1), self.rank)

    def now(self) -> float:
        """Seconds of the monotonic clock."""
        return time.perf_counter()

    def _ready(self) -> dist.ProcessGroup | None:
        """The process group of this view; None is the default group."""
        if self._group is None and len(self.members) < dist.get_world_size():
            numbers = [self._world.number(member) for member in self.members]
            self._group = dist.new_group(numbers, self._world.timeout, use_local_synchronization=True)
            _meet(self.backend, self._wire, self._group)
        return self._group

    def _swap(self, mine: Tensor, theirs: Tensor, peer: int) -> _All:
        """Exchange bytes with another rank."""
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
        """An all-to-all of rows, starting with the next neighbour.

        All receives are posted before the first send. gloo's own all-to-all sends first: each rank's word that it is
        ready to receive then queues behind its message, so the two directions alternate and slow links idle almost half
        of the time.
        """
        group, num, me = self._ready(), len(self.members), self.place
        out[me].copy_(mine[me])
        neighbours = [(me + i) % num for i in range(1, num)]
        numbers = [self._world.number(member) for member in self.members]
        works = [dist.irecv(out[i], numbers[i], group, _ALL_TO_ALL_TAG) for i in reversed(neighbours)]
        works += [dist.isend(mine[i], numbers[i], group, _ALL_TO_ALL_TAG) for i in neighbours]
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
        """Receive; NCCL cannot receive from any rank."""
        if source is None and self.backend != "gloo":
            raise ValueError("recv(source=None) needs gloo: NCCL must know the sender; name the source")
        y = torch.empty(like.numel() * like.element_size(), dtype=torch.uint8, device=self._wire)
        number = None if source is None else self._world.number(source)
        typed = _typed(y, like, like.shape)
        work = _started(lambda: dist.irecv(y, number, group=self._ready()))
        return Pending(work, lambda: (self.members[work.source_rank()] if source is None else source, typed()))


class _All:
    """Several pending messages, and the send buffer they need."""

    def __init__(self, works: list[Any], buffer: Tensor) -> None:
        self._works, self._buffer = works, buffer

    def wait(self) -> None:
        """Wait for all; raises torch's RuntimeError when one fails."""
        for work in self._works:
            work.wait()


def _meet(backend: str, device: torch.device, group: dist.ProcessGroup | None) -> None:
    """Make NCCL connect all members of a group; without that a pair cannot exchange alone."""
    if backend == "nccl":
        dist.all_reduce(torch.zeros(1, device=device), group=group)


def _release(x: Tensor) -> None:
    """Keeps a buffer until its message is sent."""
    del x


def _typed(raw: Tensor, like: Tensor, shape: Sequence[int]) -> Callable[[], Tensor]:
    """Received bytes as a tensor of this shape, with dtype and device of ``like``, which is released."""
    dtype, device = like.dtype, like.device
    return lambda: raw.view(dtype).view(shape).to(device)


def over(group: dist.ProcessGroup, device: torch.device) -> DistributedComm:
    """A view of an existing process group.

    Groups of fewer members, made at first use, have torch's own time-out.
    """
    return DistributedComm(dist.get_process_group_ranks(group), device, group=group)


def under_torchrun() -> bool:
    """Whether torchrun's environment variables are set; a ValueError when only some are, see `launched`."""
    return launched() is not None


def connect(backend: str, timeout_s: float = 600.0, grace_s: float = 30.0) -> DistributedComm:
    """Join the process group that torchrun's variables describe.

    Args:
        backend: "gloo" or "nccl"; nccl takes the GPU of number LOCAL_RANK.
        timeout_s: how long a message, and the others at the start, may take.
        grace_s: how long a rank that notices a loss waits for the others, which may notice it later (`Comm.regroup`).

    Raises:
        ValueError: when a variable is missing or wrong, NCCL is asked for without enough GPUs, or the ranks do not find
            together in time.
    """
    launch = launched()
    if launch is None:
        raise ValueError("the variables RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT are not set; start it with torchrun")
    if backend not in ("gloo", "nccl"):
        raise ValueError(f"backend {backend!r}: choose 'gloo' or 'nccl'")
    device = torch.device("cpu")
    if backend == "gloo":
        check_interfaces()
    else:
        local_rank = number("LOCAL_RANK", 0)
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
    timeout = timedelta(seconds=timeout_s)
    try:
        store = _store(launch, timeout)
        launch.meet(PrefixStore("start", store), timeout_s)
        # No device_id: a group that is bound to its GPU splits its sub-groups off, for which all ranks must call, and
        # the ranks outside of a `sub` know nothing of it.
        world = _World(tuple(range(launch.num_ranks)), store, 0, timeout, grace_s)
        return _join(backend, device, world, launch.rank)
    except RuntimeError as error:
        disconnect()
        interface = "NCCL_SOCKET_IFNAME" if backend == "nccl" else "GLOO_SOCKET_IFNAME"
        raise ValueError(
            f"rank {launch.rank} of {launch.num_ranks} could not connect to the others, met at {launch.address}: "
            f"{_first_line(error)}. If another rank stopped, its own message says why; otherwise set {interface} to "
            f"the interface that leads to them (now {os.environ.get(interface, 'not set')}), or raise timeout_s "
            f"(now {timeout_s:g})"
        ) from error


def _first_line(error: Exception) -> str:
    """What torch says before its trace."""
    return str(error).strip().split("\n")[0].split(" Exception raised from")[0].rstrip(".") or repr(error)


def _store(launch: Launch, timeout: timedelta) -> Store:
    """The key-value store of all ranks, held by rank 0 or by torchrun."""
    if not launch.holds_store:
        launch.reach(timeout.total_seconds())
    try:
        store: Store = dist.TCPStore(  # type: ignore[attr-defined]
            launch.host, launch.port, None, launch.holds_store, timeout, wait_for_workers=False, multi_tenant=True
        )
    except RuntimeError as error:
        if "failed to listen" in str(error):
            raise ValueError(
                f"rank 0 cannot listen on MASTER_PORT {launch.port} ({_first_line(error)}): another program does, such "
                "as another run or a second process of rank 0; end it, or give all ranks another port (1024 to 65535)"
            ) from error
        raise
    return store if launch.attempt is None else PrefixStore(f"/worker/attempt_{launch.attempt}", store)


def _join(backend: str, device: torch.device, world: _World, rank: int) -> DistributedComm:
    """Create the process group of a world, with all its ranks."""
    assert world.store is not None
    store, number = PrefixStore(f"epoch {world.epoch}", world.store), world.ranks.index(rank)
    dist.init_process_group(backend, timeout=world.timeout, store=store, rank=number, world_size=len(world.ranks))
    _meet(backend, device, None)
    return DistributedComm(world.ranks, device, world=world)


def _survivors(world: _World, rank: int, members: Sequence[int]) -> tuple[int, ...]:
    """The members that arrived in time, as recorded by the rank that decided first."""
    assert world.store is not None
    store = PrefixStore(f"after epoch {world.epoch}", world.store)
    store.set(f"here {rank}", "")
    ends_s = time.monotonic() + world.grace_s
    while not store.check(["members"]):
        here = [member for member in members if store.check([f"here {member}"])]
        if len(here) == len(members) or time.monotonic() >= ends_s:
            store.compare_set("members", "", " ".join(map(str, here)))
        else:
            time.sleep(_POLL_S)
    return tuple(int(member) for member in store.get("members").split())


def disconnect() -> None:
    """Leave the process group, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()
