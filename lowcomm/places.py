"""The place of a rank when each replica has many ranks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from lowcomm.comm.base import Call, Comm, Late, PeerLost, Work


@dataclass(frozen=True)
class Place:
    """The replica and shard of a rank.

    Attributes:
        replica, shard: from 0.
        within: the ranks of this replica.
        across: the ranks that hold this shard, one per replica, under the replicas' numbers; given to the algorithm.
    """

    replica: int
    shard: int
    within: Comm
    across: Comm

    @property
    def num_shards(self) -> int:
        """Ranks of each replica."""
        return len(self.within.members)

    @property
    def name(self) -> str:
        """What files of this rank are called."""
        return name_of(self.replica, self.shard, self.num_shards)

    def meet(self, across: Comm) -> None:
        """Return once every rank of every replica is here; ``across`` is `Place.across`, or a meter around it."""
        for comm in [across, self.within] if self.num_shards > 1 else [across]:
            comm.all_sum(torch.ones(1)).wait()


def name_of(replica: int, shard: int = 0, num_shards: int = 1) -> str:
    """replica00003, or replica00003.shard00001 where replicas are many ranks."""
    return f"replica{replica:05d}" + (f".shard{shard:05d}" if num_shards > 1 else "")


def place_of(comm: Comm, num_shards: int) -> Place:
    """The place of this rank, if every ``num_shards`` consecutive members are one replica.

    Raises:
        ValueError: when members do not form whole replicas.
    """
    if num_shards < 1 or len(comm.members) % num_shards:
        raise ValueError(f"{len(comm.members)} ranks do not make replicas of {num_shards}; start a multiple of it")
    replica, shard = divmod(comm.place, num_shards)
    within = comm.sub(comm.members[replica * num_shards : (replica + 1) * num_shards])
    if num_shards == 1:
        return Place(replica, shard, within, comm)
    inner = comm.sub(comm.members[shard::num_shards])
    return Place(replica, shard, within, Across(inner, within, range(len(inner.members))))


class Across(Comm):
    """The ranks that hold the same shard, under the numbers of their replicas.

    Args:
        inner: of those ranks, in the order of their replicas.
        within: of this rank's replica, which decides together whether an exchange succeeded.
        replicas: the numbers, ascending.
    """

    def __init__(self, inner: Comm, within: Comm, replicas: Sequence[int]) -> None:
        self.members, self.rank = tuple(replicas), replicas[inner.place]
        self._inner, self._within = inner, within
        self._ranks = dict(zip(replicas, inner.members, strict=True))

    def issue(self, call: Call) -> Work[Any]:
        peer = None if call.peer is None else self._ranks[call.peer]
        return _Numbered(self._inner.issue(call._replace(peer=peer)), call.kind, self._ranks)

    def sub(self, members: Sequence[int]) -> Comm:
        replicas = sorted(members)
        return Across(self._inner.sub([self._ranks[replica] for replica in replicas]), self._within, replicas)

    def agree(self, error: Exception | None) -> None:
        """Raise ``error``, or `Late` where another rank of this replica has one."""
        num_failed = self._within.all_sum(torch.tensor([0.0 if error is None else 1.0])).wait()
        if error is not None:
            raise error
        if not num_failed.is_meta and float(num_failed) > 0:
            raise Late(f"{int(num_failed)} other ranks of replica {self.rank} did not come to the end of an exchange")

    def now(self) -> float:
        return self._inner.now()


class _Numbered:
    """A Work whose result and errors name replicas, not ranks."""

    def __init__(self, work: Work[Any], kind: str, ranks: dict[int, int]) -> None:
        self._work, self._kind, self._ranks = work, kind, ranks

    def wait(self) -> Any:
        replicas = {rank: replica for replica, rank in self._ranks.items()}
        try:
            result = self._work.wait()
        except PeerLost as error:
            raise PeerLost(str(error), [replicas[rank] for rank in error.ranks if rank in replicas]) from error
        return (replicas[result[0]], result[1]) if self._kind == "recv" else result
