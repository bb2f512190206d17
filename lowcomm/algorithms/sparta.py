"""SPARTA: after every step, average another small part of the parameters (Beton et al. 2025, "Improving the Efficiency
of Distributed Training using Sparse Parameter Averaging", https://openreview.net/forum?id=stFPf3gzq1).

    after every `every` inner steps:   theta_i[S] <- mean_j theta_j[S],   S the next part of the parameters
    `delay` steps later instead:       theta_i[S] <- theta_i[S] + mean_j sent_j - sent_i

Parts follow from a shared seed, so no indices are sent. A parameter of n values has K = ceil(1 / fraction) parts:

    part k = {(a i + b) mod n : k m <= i < (k + 1) m},   m = ceil(n / K)

with a and b drawn anew for each pass through the K parts, and a coprime to n. Then i -> (a i + b) mod n is a bijection
of 0 .. n - 1, so a pass averages every value at least once. All parts have one size; where K m > n, the last part wraps
around to the first one's values.

With a delay, L = delay // every later averages are sent before one arrives. A value sent again within L rounds would be
corrected twice for the same difference; repeated, as in a parameter of few values, this makes replicas diverge
exponentially. So with L > 0, a and b are drawn once for the run, and round r, from 0, averages

    {(a i + b) mod n : k m <= i < min((k + 1) m, n)},   k = r mod max(ceil(n / m), L + 1)

Every value then returns after a fixed number of rounds, more than L and at most K. The last parts may be short or empty
and are padded with zeros.

Differs from the paper in: parts cover everything in K rounds, where independent draws leave out a share of (1 - p)^K.
Differences to the last average are sent, in float32 or better, so a lossy reducer never rounds the parameters. No mask
is sent. Replicas are averaged once at the end.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import pad

from lowcomm.comm.base import Comm
from lowcomm.engine.base import Engine
from lowcomm.feedback.none import NoFeedback
from lowcomm.reduce import Reducer
from lowcomm.rounds.anchors import anchor_of, delta
from lowcomm.rounds.base import Rounds, RoundsState
from lowcomm.rounds.exchanges import Exchange, Sending
from lowcomm.rounds.qsr import check_every
from lowcomm.tensors import copy_, rng

_ALL = "all"


@dataclass
class SPARTAState(RoundsState):
    """Attributes:
    last: the last average of every value, first the initial parameters; float32 or better, equal on all replicas.
    """

    last: list[Tensor]


@dataclass(frozen=True)
class SPARTA(Rounds[SPARTAState]):
    """Sparse parameter averaging. Optimizer state stays local.

    Traffic of a round: one all-reduce of ceil(n_k / ceil(1 / fraction)) values of each parameter of n_k values in
    float32 (less with a compressor), 2 (n - 1) / n x 4 bytes a value for each of n replicas: about `fraction` of data
    parallel's. At the end of the run, one average of all parameters.

    Attributes:
        fraction: of each parameter, above 0 and at most 1; taken as 1 / ceil(1 / fraction). Published are 0.0005 to
            0.005. 1 is Local SGD.
        every: inner steps a round.
        delay: inner steps from sending an average to applying it; up to 10 are reported to cost nothing. It must be
            shorter than a pass. From `every` on, all passes have one order, so that no value is sent again before its
            average arrives; each parameter then has passes of its own, of at most K rounds.
        seed: of the parts; must be equal on all replicas.
        reducer: how differences to the last average are averaged. Its feedback must be NoFeedback: its memory would
            belong to another part than the next round's.
    """

    fraction: float = 0.005
    every: int = 1
    delay: int = 0
    seed: int = 0
    reducer: Reducer = Reducer()

    def __post_init__(self) -> None:
        if not 0 < self.fraction <= 1:
            raise ValueError(f"SPARTA(fraction={self.fraction}): it is a share of the parameters, above 0, at most 1")
        check_every(self.every)
        if not 0 <= self.delay < self.every * self.num_parts:
            raise ValueError(
                f"delay is {self.delay}; with every={self.every} and fraction={self.fraction} a pass through all "
                f"parameters has {self.every * self.num_parts} steps, and it must be at least 0 and below that, or "
                "every value would be sent again before its average has come"
            )
        if not isinstance(self.reducer.feedback, NoFeedback):
            raise ValueError(
                f"SPARTA averages other values in each round, but {self.reducer.feedback} remembers what is left of "
                "the last ones: set the reducer's feedback to NoFeedback"
            )

    @property
    def num_parts(self) -> int:
        """Rounds of a pass over all values: K."""
        return math.ceil(1 / self.fraction)

    @property
    def num_late(self) -> int:
        """Later averages that are sent before one is applied: L, below K."""
        return self.delay // self.every

    def begin(self, engine: Engine, comm: Comm) -> SPARTAState:
        """The last averages start as the initial parameters."""
        last = anchor_of(engine.slots()["param"])
        part = [a.new_empty(part_size(a.numel(), self.num_parts)) for a in last]
        return SPARTAState(last, kept={str(i): self.keep(part) for i in range(self.num_late + 1)})

    def round(self, t: int, engine: Engine, state: SPARTAState, comm: Comm) -> list[Sending]:
        """Differences of the next part to its last averages."""
        params = engine.slots()["param"]
        where = self._places(params, t, state)
        own = [p.take(i) for p, i in zip(params, where, strict=True)]
        last = [a.take(i) for a, i in zip(state.last, where, strict=True)]
        # what the reducer keeps has one shape
        fill = [part_size(p.numel(), self.num_parts) - i.numel() for p, i in zip(params, where, strict=True)]
        part = [pad(d, (0, k)) for d, k in zip(delta(last, own, 1.0, range(len(own))), fill, strict=True)]
        slot = str(self._number(t, state) % (self.num_late + 1))
        return [Sending(slot, self.reducer, part, delay=self.delay, memo=[own, last])]

    def commit(self, t: int, engine: Engine, state: SPARTAState, sent: Exchange, means: list[Tensor]) -> None:
        """Apply the averages of a part, keeping the local steps since they were sent."""
        params = engine.slots()["param"]
        if sent.slot == _ALL:
            torch._foreach_sub_(state.last, means)
            copy_(params, state.last)
            del state.kept[_ALL]  # another time it begins anew
            return
        own, last = sent.memo
        where = self._places(params, sent.sent_t, state)
        averages = torch._foreach_sub(last, [mean[: i.numel()] for mean, i in zip(means, where, strict=True)])
        for p, a, i, before, average in zip(params, state.last, where, own, averages, strict=True):
            _put(a, i, average)
            since = p.take(i).to(a.dtype).sub_(before)  # 0 without a delay: the average itself, then
            _put(p, i, since.add_(average).to(p.dtype))

    def rest(self, t: int, engine: Engine, state: SPARTAState, comm: Comm) -> list[Sending] | None:
        """All parameters, unless the last part was all of them and is already averaged."""
        if self.num_parts == 1 and state.synced_t == t and not self.delay:
            return None
        moved = partial(delta, state.last, engine.slots()["param"], 1.0)
        return [Sending(_ALL, self.reducer, state.last, moved)]

    def stands(self, engine: Engine, state: SPARTAState) -> list[Tensor]:
        """This replica's live parameters. Replicas differ slightly until the run ends; an evaluation averages their
        losses.
        """
        return engine.slots()["param"]

    def _number(self, t: int, state: SPARTAState) -> int:
        """The number, from 1, of the average that is sent at step ``t``."""
        return (t - state.begun_t) // self.every

    def _places(self, params: Sequence[Tensor], t: int, state: SPARTAState) -> list[Tensor]:
        return places(params, self.num_parts, self._number(t, state), self.seed, self.num_late)


def part_size(num: int, num_parts: int) -> int:
    """The size m of a part of ``num`` values; with `num_late`, parts may be smaller."""
    return -(-num // num_parts)


def places(params: Sequence[Tensor], num_parts: int, number: int, seed: int, num_late: int = 0) -> list[Tensor]:
    """The indices (int64, distinct) of each parameter in the average of this number, from 1.

    They index the flattened parameter, on its device, and depend only on shapes and seed. They are disjoint from those
    of the ``num_late`` averages before, which must be fewer than the parts.
    """
    assert num_late < num_parts, "a value cannot be left alone for longer than a pass"
    passes, part = divmod(number - 1, num_parts)
    generator = rng(seed, "partition", 0 if num_late else passes)
    draws = torch.randint(2**62, (len(params), 2), generator=generator).tolist()
    found = []
    for p, (a, b) in zip(params, draws, strict=True):
        num, size = p.numel(), part_size(p.numel(), num_parts)
        begin = part * size
        if num_late and num > 0:
            begin = (number - 1) % max(-(-num // size), num_late + 1) * size
            size = min(size, max(num - begin, 0))
        found.append(_progression(num, begin, size, a, b, p.device))
    return found


def _progression(num: int, begin: int, size: int, a: int, b: int, device: torch.device) -> Tensor:
    """(a i + b) mod num for ``size`` numbers i from ``begin``, with the next a that is coprime to num."""
    if size == 0:
        return torch.empty(0, dtype=torch.int64, device=device)
    a = a % num + 1
    while math.gcd(a, num) > 1:
        a = a % num + 1
    first = (a * begin + b) % num
    assert num * (size + 1) < 2**63, "the numbers below must fit 64 bits"
    return torch.arange(first, first + a * size, a, device=device).remainder_(num)


def _put(x: Tensor, where: Tensor, values: Tensor) -> None:
    """The inverse of ``x.take(where)``."""
    if x.is_contiguous():
        x.view(-1).index_copy_(0, where, values)
    else:
        x[torch.unravel_index(where, x.shape)] = values
