"""The transfers of each collective: bytes, ends and latencies.

The default is `lowcomm.sim.wire.gloo`. Every schedule here is an ideal pipeline of chunks: all transfers of a
collective run at once, and its time is that of the busiest link plus the latencies of the steps. For n members with S
bytes each, over uplinks and downlinks of B and one-way latencies a:

    Ring          all_sum 2(n-1)/n S/B + 2(n-1) a     all_gather (n-1) S/B + (n-1) a    broadcast (n-1) S/B + a
    Tree          all_sum 3 S/B + 2d a                all_gather (2n+1) S/B + 2d a      broadcast 2 S/B + d a
    TwoShot       all_sum 2(n-1)/n S/B + 2a           all_gather (n-1) S/B + a          broadcast S/B + 2a
    Star          all_sum (n-1) S/B + 2a              all_gather (n-1)^2 S/B + 2a       broadcast (n-1) S/B + a
    Pairwise      all_sum (n-1) S/B + a               all_gather (n-1) S/B + a          broadcast (n-1) S/B + a
    Hierarchical  a chain in every island, a ring of the islands' first members

with d = log2 n the depth of a binary tree whose inner ranks have three neighbours. A transfer counts all its latencies
on its own path, so in a chain of unequal paths the slowest counts for every step.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise, permutations
from typing import ClassVar, NamedTuple, TypeVar

T = TypeVar("T")

# Members above which `all_to_all` is one transfer from each to the next with all its pieces: as many bytes on every up-
# and down-link, and n transfers instead of n (n - 1), of which 10,000 ranks would make 100 million.
MANY = 64

KINDS = ("all_sum", "all_gather", "all_to_all", "broadcast", "exchange")


class Turns(NamedTuple):
    """Waits of a transfer beside its latencies; see `lowcomm.sim.wire.tcp.turns_s`.

    Attributes:
        num: number of waits for the receiver's readiness, each for two messages.
        message_bytes: of each.
        both_ways: whether the other rank sends as much on the same connection.
        behind: messages that its sender sends to others first.
    """

    num: int
    message_bytes: int
    both_ways: bool = False
    behind: float = 0.0


class Transfer(NamedTuple):
    """Bytes from one rank to another, moving after a number of one-way latencies of their path.

    Attributes:
        turns: its waits; None: a single stream.
        after: index of the transfer that must end first; None: it starts at once.
    """

    source: int
    to: int
    num_bytes: int
    num_latencies: float
    turns: Turns | None = None
    after: int | None = None


class Schedule(ABC):
    """The transfers of collectives. `all_to_all` (but see `MANY`), `send` and `exchange` are direct in every schedule.

    Attributes:
        direct_latencies: of the direct ones.
    """

    direct_latencies: ClassVar[float] = 1

    def transfers(
        self, kind: str, members: tuple[int, ...], num_bytes: int, source: int | None = None
    ) -> list[Transfer]:
        """All transfers of one collective; they start together and it is over when all have ended.

        Args:
            kind: "all_sum", "all_gather", "all_to_all", "broadcast" or "exchange".
            members: the ranks that take part; two for "exchange".
            num_bytes: that each member puts in; for "all_to_all", for every other.
            source: who sends, for "broadcast".

        Raises:
            ValueError: when the schedule has no place for a member.
        """
        assert kind in KINDS, kind
        assert (source in members) == (kind == "broadcast"), (kind, source, members)
        if len(members) == 1:
            return []
        if kind == "all_sum":
            return self.all_sum(members, num_bytes)
        if kind == "all_gather":
            return self.all_gather(members, num_bytes)
        if kind == "broadcast":
            assert source is not None
            return self.broadcast(members, num_bytes, source)
        assert kind == "all_to_all" or len(members) == 2, members
        if len(members) > MANY:
            return [Transfer(a, b, (len(members) - 1) * num_bytes, self.direct_latencies) for a, b in _round(members)]
        return _exchange(members, num_bytes, self.direct_latencies)

    def check(self, members: Sequence[int]) -> None:
        """Raise ValueError if the schedule does not cover a member."""
        return

    @abstractmethod
    def all_sum(self, members: tuple[int, ...], num_bytes: int) -> list[Transfer]:
        """The transfers of a sum of ``num_bytes`` from each of at least two members."""

    @abstractmethod
    def all_gather(self, members: tuple[int, ...], num_bytes: int) -> list[Transfer]:
        """The transfers after which at least two members have each other's payloads of ``num_bytes``."""

    @abstractmethod
    def broadcast(self, members: tuple[int, ...], num_bytes: int, source: int) -> list[Transfer]:
        """The transfers of ``num_bytes`` from ``source`` to at least one other."""


@dataclass(frozen=True)
class Ring(Schedule):
    """Each sends to the next: fewest bytes, most latencies. Broadcasts are direct.

    Its bytes per rank are those that `lowcomm.comm.metered` counts.
    """

    def all_sum(self, members: tuple[int, ...], num_bytes: int) -> list[Transfer]:
        """A reduce-scatter and an all-gather, n - 1 steps each."""
        n = len(members)
        return [Transfer(a, b, 2 * (n - 1) * num_bytes // n, 2 * (n - 1)) for a, b in _round(members)]

    def all_gather(self, members: tuple[int, ...], num_bytes: int) -> list[Transfer]:
        """Each edge carries everything except its receiver's payload."""
        others = len(members) - 1
        return [Transfer(a, b, others * num_bytes, others) for a, b in _round(members)]

    def broadcast(self, members: tuple[int, ...], num_bytes: int, source: int) -> list[Transfer]:
        return _direct(source, members, num_bytes)


@dataclass(frozen=True)
class Tree(Schedule):
    """Up a binary tree and down again: few latencies, but each inner rank serves three neighbours."""

    def all_sum(self, members: tuple[int, ...], num_bytes: int) -> list[Transfer]:
        """Every edge carries the payload up and the sum down."""
        num_latencies = 2 * _depth(len(members))
        edges = _edges(members)
        return [Transfer(a, b, num_bytes, num_latencies) for edge in edges for a, b in (edge, edge[::-1])]

    def all_gather(self, members: tuple[int, ...], num_bytes: int) -> list[Transfer]:
        """Up goes what lies below an edge, down everything else."""
        num_below = [1] * len(members)  # a rank and all under it
        for i in range(len(members) - 1, 0, -1):
            num_below[(i - 1) // 2] += num_below[i]
        num_latencies = 2 * _depth(len(members))
        transfers = []
        for (parent, child), num in zip(_edges(members), num_below[1:], strict=True):
            transfers.append(Transfer(child, parent, num * num_bytes, num_latencies))
            transfers.append(Transfer(parent, child, (len(members) - num) * num_bytes, num_latencies))
        return transfers

    def broadcast(self, members: tuple[int, ...], num_bytes: int, source: int) -> list[Transfer]:
        """Down the tree whose root is the source."""
        rooted = (source, *(rank for rank in members if rank != source))
        return [Transfer(a, b, num_bytes, _depth(len(members))) for a, b in _edges(rooted)]


@dataclass(frozen=True)
class TwoShot(Schedule):
    """Each member sums one piece and sends it to all, as a sharded parameter server does."""

    def all_sum(self, members: tuple[int, ...], num_bytes: int) -> list[Transfer]:
        """The receiver's piece before it is summed, and the sender's after."""
        piece = _pieces(members, num_bytes)
        return [Transfer(a, b, piece[b] + piece[a], 2) for a, b in permutations(members, 2)]

    def all_gather(self, members: tuple[int, ...], num_bytes: int) -> list[Transfer]:
        """One shot is enough."""
        return _exchange(members, num_bytes)

    def broadcast(self, members: tuple[int, ...], num_bytes: int, source: int) -> list[Transfer]:
        """The source deals out pieces to the others, and they exchange theirs."""
        others = [rank for rank in members if rank != source]
        piece = _pieces(others, num_bytes)
        deal = [Transfer(source, b, piece[b], 2) for b in others]
        return deal + [Transfer(a, b, piece[a], 2) for a, b in permutations(others, 2)]


@dataclass(frozen=True)
class Star(Schedule):
    """Everything goes through one rank, as with a central parameter server; it takes part in every collective."""

    center: int

    def all_sum(self, members: tuple[int, ...], num_bytes: int) -> list[Transfer]:
        """In to the centre and out again."""
        leaves = self._leaves(members)
        return [Transfer(a, b, num_bytes, 2) for x in leaves for a, b in ((x, self.center), (self.center, x))]

    def all_gather(self, members: tuple[int, ...], num_bytes: int) -> list[Transfer]:
        """The centre sends each member the others' payloads."""
        leaves = self._leaves(members)
        inward = [Transfer(x, self.center, num_bytes, 2) for x in leaves]
        return inward + [Transfer(self.center, x, len(leaves) * num_bytes, 2) for x in leaves]

    def broadcast(self, members: tuple[int, ...], num_bytes: int, source: int) -> list[Transfer]:
        """Through the centre when it is not the source."""
        leaves = [rank for rank in self._leaves(members) if rank != source]
        if source == self.center:
            return [Transfer(source, x, num_bytes, 1) for x in leaves]
        return [Transfer(source, self.center, num_bytes, 1), *(Transfer(self.center, x, num_bytes, 2) for x in leaves)]

    def check(self, members: Sequence[int]) -> None:
        self._leaves(members)

    def _leaves(self, members: Sequence[int]) -> list[int]:
        if self.center not in members:
            raise ValueError(
                f"Star's center is rank {self.center}, which is not among the members {members} of this collective; "
                "choose a center that takes part in all of them, or another schedule"
            )
        return [rank for rank in members if rank != self.center]


@dataclass(frozen=True)
class Pairwise(Schedule):
    """Each sends its whole payload to every other: one latency, most bytes."""

    def all_sum(self, members: tuple[int, ...], num_bytes: int) -> list[Transfer]:
        return _exchange(members, num_bytes)

    def all_gather(self, members: tuple[int, ...], num_bytes: int) -> list[Transfer]:
        return _exchange(members, num_bytes)

    def broadcast(self, members: tuple[int, ...], num_bytes: int, source: int) -> list[Transfer]:
        return _direct(source, members, num_bytes)


@dataclass(frozen=True)
class Hierarchical(Schedule):
    """Only one member of each island communicates with other islands, so little crosses the slow paths.

    An island's members form a chain from its gate: the first member, or the source of a broadcast. Chains and the ring
    of gates form one pipeline.

    Attributes:
        islands: the ranks of each; no rank in two. Collectives may leave out members and whole islands.
    """

    islands: tuple[tuple[int, ...], ...]

    def __post_init__(self) -> None:
        """No rank may be in two islands."""
        ranks = [rank for island in self.islands for rank in island]
        twice = sorted({rank for rank in ranks if ranks.count(rank) > 1})
        if twice:
            raise ValueError(f"ranks {twice} are in Hierarchical's islands more than once; give each rank one island")

    def all_sum(self, members: tuple[int, ...], num_bytes: int) -> list[Transfer]:
        """Along each chain to its gate, around the gates, and back."""
        chains = self._chains(members)
        transfers = []
        for chain in chains:
            for a, b in pairwise(chain):
                transfers += [Transfer(x, y, num_bytes, 2 * (len(chain) - 1)) for x, y in ((b, a), (a, b))]
        gates = tuple(chain[0] for chain in chains)
        return transfers + Ring().transfers("all_sum", gates, num_bytes)

    def all_gather(self, members: tuple[int, ...], num_bytes: int) -> list[Transfer]:
        """Towards the gate goes what lies behind, the other way everything else."""
        chains, total = self._chains(members), len(members) * num_bytes
        transfers = []
        for chain in chains:
            for place, (a, b) in enumerate(pairwise(chain), start=1):
                behind = (len(chain) - place) * num_bytes
                transfers.append(Transfer(b, a, behind, 2 * (len(chain) - 1)))
                transfers.append(Transfer(a, b, total - behind, 2 * (len(chain) - 1)))
        if len(chains) > 1:
            for chain, following in _round(chains):
                size = total - len(following) * num_bytes
                transfers.append(Transfer(chain[0], following[0], size, len(chains) - 1))
        return transfers

    def broadcast(self, members: tuple[int, ...], num_bytes: int, source: int) -> list[Transfer]:
        """From the source to the other gates, and along the chains."""
        chains = self._chains((source, *(rank for rank in members if rank != source)))
        transfers = _direct(source, [chain[0] for chain in chains], num_bytes)
        for chain in chains:
            transfers += [Transfer(a, b, num_bytes, len(chain) - 1) for a, b in pairwise(chain)]
        return transfers

    def check(self, members: Sequence[int]) -> None:
        self._chains(members)

    def _chains(self, members: Sequence[int]) -> list[tuple[int, ...]]:
        """The members of each island that has any, in the order of ``members``."""
        home = {rank: i for i, island in enumerate(self.islands) for rank in island}
        homeless = [rank for rank in members if rank not in home]
        if homeless:
            raise ValueError(
                f"ranks {homeless} are in none of Hierarchical's {len(self.islands)} islands; add them to one, or as "
                "islands of their own"
            )
        chains: dict[int, list[int]] = {}
        for rank in members:
            chains.setdefault(home[rank], []).append(rank)
        return [tuple(chain) for chain in chains.values()]


def _direct(source: int, members: Sequence[int], num_bytes: int, num_latencies: float = 1) -> list[Transfer]:
    return [Transfer(source, to, num_bytes, num_latencies) for to in members if to != source]


def _exchange(members: Sequence[int], num_bytes: int, num_latencies: float = 1) -> list[Transfer]:
    return [Transfer(a, b, num_bytes, num_latencies) for a, b in permutations(members, 2)]


def _round(members: Sequence[T]) -> list[tuple[T, T]]:
    """The edges of the ring, in order."""
    return [(a, members[(i + 1) % len(members)]) for i, a in enumerate(members)]


def _pieces(members: Sequence[int], num_bytes: int) -> dict[int, int]:
    """Who owns how much of a payload that is dealt out evenly."""
    n = len(members)
    return {rank: num_bytes * (i + 1) // n - num_bytes * i // n for i, rank in enumerate(members)}


def _edges(members: Sequence[int]) -> list[tuple[int, int]]:
    """(parent, child) for each but the first of a binary tree in breadth-first order."""
    return [(members[(i - 1) // 2], members[i]) for i in range(1, len(members))]


def _depth(num_members: int) -> int:
    """Steps from the lowest leaf of that tree to its root."""
    return num_members.bit_length() - 1
