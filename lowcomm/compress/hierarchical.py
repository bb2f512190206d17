"""Islands: one precision over fast links, a smaller one over slow links.

Members form islands of equal size, consecutive in rank, such as the GPUs of one machine. Each island averages
(``inner``); then its j-th member averages the j-th slice of the island's mean with the j-th members of the other
islands (``outer``), so a slow link carries each slice once; then islands put the slices together, exactly. ZeRO++
(arXiv:2306.10209) and most collective libraries cut collectives like this.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, fields, is_dataclass
from math import prod
from typing import Any, ClassVar

from torch import Tensor

from lowcomm.codecs.base import Codec
from lowcomm.comm.base import Comm, Work
from lowcomm.compress.base import Compressor, in_rows
from lowcomm.compress.identity import Identity
from lowcomm.compress.quantized import Quantized


@dataclass(frozen=True)
class HierarchicalState:
    """The states of both compressors."""

    inner: Any
    outer: Any


@dataclass(frozen=True)
class Hierarchical(Compressor[HierarchicalState]):
    """The mean of island means.

    Attributes:
        island: members per island; must divide the number of members.
        inner: averages within an island.
        outer: averages between islands. Where both draw random numbers, they need different seeds.
    """

    island: int = 1
    inner: Compressor = Identity()
    outer: Compressor = Quantized()
    elementwise: ClassVar[bool] = True
    passes_nonfinite: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if self.island < 1:
            raise ValueError(f"Hierarchical(island={self.island}): it must be at least 1")
        for part in (self.inner, self.outer):
            if not part.elementwise:
                raise ValueError(
                    f"Hierarchical averages slices of vectors, and {part} needs whole tensors; choose another, such "
                    "as Quantized"
                )
        shared = sorted({seed for _, seed in set(_streams(self.inner)) & set(_streams(self.outer))})
        if shared:
            raise ValueError(
                f"Hierarchical: inner={self.inner} and outer={self.outer} would draw the same random numbers, from "
                f"seed {shared[0]}, and their errors would add up rather than average out; give outer another seed, "
                f"such as seed={shared[-1] + 1}"
            )

    def init(self, like: Tensor) -> HierarchicalState:
        return HierarchicalState(self.inner.init(like), self.outer.init(like.new_zeros(self._slice(like.numel()))))

    def mean(
        self, x: Tensor, state: HierarchicalState, comm: Comm, wants_sent: bool = True
    ) -> Generator[Work[Any], Any, tuple[Tensor, Tensor, HierarchicalState]]:
        """Average within the island, then between islands, then gather.

        Raises:
            ValueError: when members do not form whole islands.
        """
        near, far, j = self._views(comm)
        steps, num, shape = self.inner.mean(x, state.inner, near, wants_sent), x.numel(), x.shape
        del x
        sent, island_mean, inner = yield from steps
        if self.island == len(comm.members) or num == 0:
            return sent, island_mean, HierarchicalState(inner, state.outer)

        mine = in_rows(island_mean, self.island, island_mean.dtype)[j]
        del island_mean
        outer_sent, outer_mean, outer = yield from self.outer.mean(mine, state.outer, far, wants_sent)
        mean = outer_mean
        if self.island > 1:
            mean = (yield near.all_gather(outer_mean)).reshape(-1)
        mean, states = mean[:num].view(shape), HierarchicalState(inner, outer)
        if not wants_sent:
            return mean, mean, states

        # What the outer average lost of a slice is known to its owner alone, who answers for the whole island.
        rows = in_rows(sent, self.island, sent.dtype).clone()
        rows[j] += self.island * (outer_sent - mine)
        return rows.view(-1)[:num].view(shape), mean, states

    def divides_by_all(self) -> bool:
        return self.inner.divides_by_all() and self.outer.divides_by_all()

    def keeps_values(self) -> bool:
        return self.inner.keeps_values() and self.outer.keeps_values()

    def num_messages(self) -> int:
        return self.inner.num_messages() + self.outer.num_messages() + 1

    def sent_bytes(self, shape: Sequence[int], element_bytes: int, num_members: int) -> float:
        """The total over fast and slow links, see `slow_bytes`."""
        num = prod(shape)
        within = self.inner.sent_bytes(shape, element_bytes, self.island)
        if self.island == num_members or num == 0:
            return within
        together = (self.island - 1) * self._slice(num) * element_bytes
        return within + self.slow_bytes(shape, element_bytes, num_members) + together

    def slow_bytes(self, shape: Sequence[int], element_bytes: int, num_members: int) -> float:
        """The part of `sent_bytes` that leaves the island."""
        return self.outer.sent_bytes((self._slice(prod(shape)),), element_bytes, self._num_islands(num_members))

    def resync(self, state: HierarchicalState, comm: Comm) -> Generator[Work[Any], Any, HierarchicalState]:
        """Resync both among the members they communicate with."""
        near, far, _ = self._views(comm)
        inner = yield from self.inner.resync(state.inner, near)
        outer = yield from self.outer.resync(state.outer, far)
        return HierarchicalState(inner, outer)

    def _slice(self, num: int) -> int:
        return -(-num // self.island)

    def _num_islands(self, num_members: int) -> int:
        if num_members % self.island:
            raise ValueError(
                f"Hierarchical(island={self.island}) met {num_members} members, which do not fill whole islands; "
                f"choose an island size that divides {num_members}"
            )
        return num_members // self.island

    def _views(self, comm: Comm) -> tuple[Comm, Comm, int]:
        """This rank's island, its counterparts, and its place in the island."""
        members = comm.members
        self._num_islands(len(members))
        island, j = divmod(comm.place, self.island)
        near = members[island * self.island : (island + 1) * self.island]
        return comm.sub(near), comm.sub(members[j :: self.island]), j


def _streams(part: Compressor) -> Iterator[tuple[type, int]]:
    """Kind and seed of all random numbers of a compressor and those within it; kinds do not depend on each other.

    One with a seed and a code draws only for codes that round at random; without a code its seed is always in use.
    """
    inside: list[Any] = [getattr(part, field.name) for field in fields(part)] if is_dataclass(part) else []
    codes = [value for value in inside if isinstance(value, Codec)]
    if hasattr(part, "seed") and (not codes or any(code.stochastic for code in codes)):
        yield Codec if codes else type(part), part.seed
    for value in inside:
        if isinstance(value, Compressor):
            yield from _streams(value)
