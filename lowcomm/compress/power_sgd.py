"""PowerSGD: the mean of matrices through factors of low rank (Vogels et al. 2019, arXiv:1905.13727, Alg. 1).

    P = orth(sum_w M_w Q);   Q = mean_w M_w^T P;   mean = P Q^T

A tensor ``[n, ...]`` is the matrix of its n rows. Q is kept: the next round starts from there, so that over rounds the
factors turn towards the leading directions, one step of a power iteration at a time. Both sums are linear, so what
travels never grows with the number of ranks. With ``alternate`` one round sends P, the next Q (PowerGossip's
half-steps, Vogels et al. 2020, arXiv:2008.01425, Alg. 2, as an average over all ranks):

    odd rounds:   Q = orth(Q);   P_w = M_w Q;     P = mean_w P_w;   mean = P Q^T
    even rounds:  P = orth(P);   Q_w = M_w^T P;   Q = mean_w Q_w;   mean = P Q^T

What a rank sent, and so what error feedback keeps of it, is its own share of the mean: ``P P^T M_w``. Then memories
stay bounded however much the ranks differ. With ``error="global"`` it is the mean itself, as in the paper's Alg. 2 and
in torch's hook: every rank then remembers for good how it differs from the others.

Factors are orthogonalised after the sum, by Householder QR, on every rank alike; that is bitwise if all ranks have the
same kind of processor, libraries and number of threads. QR completes what has too low a rank by arbitrary directions: a
matrix of zeros gives zeros, and a direction that is missing today can be found tomorrow.

Differs from the paper in: QR where the paper has Gram-Schmidt; the local error as default; matrices that would not
shrink by ``min_compression`` are sent whole.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from lowcomm.comm.base import Comm, Work
from lowcomm.compress.base import Compressor, first_count
from lowcomm.compress.identity import Identity
from lowcomm.tensors import rng


@dataclass(frozen=True)
class PowerSGDState:
    """The state of a stack of matrices; factors are equal on all ranks.

    Attributes:
        round: rounds so far.
        p: ``[num, n, rank]``, only with ``alternate``.
        q: ``[num, m, rank]``; None for tensors that are sent whole.
    """

    round: int
    p: Tensor | None
    q: Tensor | None


@dataclass(frozen=True)
class PowerSGD(Compressor[PowerSGDState]):
    """The mean of matrices by two small sums, of vectors by one.

    Attributes:
        rank: of the mean; more costs more bytes, in proportion.
        warm_start: whether a round starts from the factors of the last; otherwise from random ones.
        alternate: send one factor a round in turns rather than both, for half of the bytes.
        num_iterations: of the power iteration in a round; each costs its own bytes. With ``alternate`` each half-step
            sends what those before it left over.
        min_compression: matrices with fewer values than this many times those of their factors, or those of all
            iterations, are sent whole.
        error: "local" or "global": what a rank sent, see above.
        seed: of the first factors.
    """

    rank: int = 4
    warm_start: bool = True
    alternate: bool = False
    num_iterations: int = 1
    min_compression: float = 2.0
    error: Literal["local", "global"] = "local"
    seed: int = 0
    elementwise: ClassVar[bool] = False
    passes_nonfinite: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ValueError(f"PowerSGD(rank={self.rank}): it must be at least 1")
        if self.num_iterations < 1:
            raise ValueError(f"PowerSGD(num_iterations={self.num_iterations}): it must be at least 1")
        if self.min_compression < 1:
            raise ValueError(
                f"PowerSGD(min_compression={self.min_compression}): it must be at least 1, as factors that are larger "
                "than their matrix help nobody; 1 compresses all that shrink at all"
            )
        if self.error not in ("local", "global"):
            raise ValueError(f"PowerSGD(error={self.error!r}): choose 'local' or 'global'")
        if self.alternate and not self.warm_start:
            raise ValueError(
                "PowerSGD(alternate=True, warm_start=False): half a step from random factors approximates nothing; "
                "leave warm_start on"
            )

    def init(self, like: Tensor) -> PowerSGDState:
        """Random factors, the same on all ranks."""
        sides = self._sides(like.shape[1:])
        if sides is None:
            return PowerSGDState(0, None, None)
        n, m, rank = sides
        p = like.new_zeros(like.shape[0], n, rank) if self.alternate else None
        return PowerSGDState(0, p, self._drawn(like, (like.shape[0], m, rank), 0))

    def mean(
        self, x: Tensor, state: PowerSGDState, comm: Comm, wants_sent: bool = True
    ) -> Generator[Work[Any], Any, tuple[Tensor, Tensor, PowerSGDState]]:
        """Two sums for a stack of matrices; one with ``alternate`` or when sent whole."""
        if state.q is None:
            sent, mean, _ = yield from Identity().mean(x, None, comm, wants_sent)
            return sent, mean, replace(state, round=state.round + 1)
        matrices, shape = x.reshape(*x.shape[:1], x.shape[1], -1), x.shape
        if self.alternate:
            steps = self._half_steps(matrices, state, comm)
        else:
            steps = self._steps(matrices, state, comm, wants_sent and self.error == "local")
        del x, matrices
        sent, mean, state = yield from steps
        mean = mean.view(shape)
        return mean if self.error == "global" else sent.view(shape), mean, state

    def keeps_values(self) -> bool:
        return False

    def num_messages(self) -> int:
        return self._num_factors

    def sent_bytes(self, shape: Sequence[int], element_bytes: int, num_members: int) -> float:
        """With ``alternate``, the average of two consecutive rounds."""
        sides = self._sides(shape[1:])
        values: float = prod(shape)
        if sides is not None:
            n, m, rank = sides
            values = shape[0] * (n + m) * rank * self._num_factors / 2
        return 2 * (num_members - 1) / num_members * values * element_bytes

    def resync(self, state: PowerSGDState, comm: Comm) -> Generator[Work[Any], Any, PowerSGDState]:
        """The factors of the first member, and its count of rounds."""
        source = comm.members[0]
        count = yield from first_count(state.round, comm)
        p, q = state.p, state.q
        if p is not None:
            p = yield comm.broadcast(p, source)
        if q is not None:
            q = yield comm.broadcast(q, source)
        return PowerSGDState(count, p, q)

    def _steps(
        self, x: Tensor, state: PowerSGDState, comm: Comm, wants_sent: bool
    ) -> Generator[Work[Any], Any, tuple[Tensor, Tensor, PowerSGDState]]:
        assert state.q is not None
        q = state.q if self.warm_start else self._drawn(x, state.q.shape, state.round)
        for i in range(self.num_iterations):
            total = yield comm.all_sum(x @ _near_unit(q))
            p = _orthonormal(total)
            mine = x.mT @ p
            if i == self.num_iterations - 1:
                del x
            total = yield comm.all_sum(mine)
            q = total / len(comm.members)
        mean = p @ q.mT
        return p @ mine.mT if wants_sent else mean, mean, PowerSGDState(state.round + 1, None, q)

    def _half_steps(
        self, x: Tensor, state: PowerSGDState, comm: Comm
    ) -> Generator[Work[Any], Any, tuple[Tensor, Tensor, PowerSGDState]]:
        p, q = state.p, state.q
        assert p is not None
        assert q is not None
        sent, mean = torch.zeros_like(x), torch.zeros_like(x)
        for i in range(self.num_iterations):
            if (state.round * self.num_iterations + i) % 2 == 0:
                q = _orthonormal(q)
                mine = (x - sent) @ q
                p = (yield comm.all_sum(mine)) / len(comm.members)
                sent, mean = sent + mine @ q.mT, mean + p @ q.mT
            else:
                p = _orthonormal(p)
                mine = (x - sent).mT @ p
                q = (yield comm.all_sum(mine)) / len(comm.members)
                sent, mean = sent + p @ mine.mT, mean + p @ q.mT
        return sent, mean, PowerSGDState(state.round + 1, p, q)

    def _sides(self, shape: Sequence[int]) -> tuple[int, int, int] | None:
        """Rows, columns and rank of a tensor as a matrix; None if it is sent whole."""
        if len(shape) < 2 or prod(shape) == 0:
            return None
        n, m = shape[0], prod(shape[1:])
        rank = min(n, m, self.rank)
        values = (n + m) * rank * max(1.0, self._num_factors / 2)
        return (n, m, rank) if values * self.min_compression < n * m else None

    @property
    def _num_factors(self) -> int:
        """What is sent in a round."""
        return self.num_iterations * (1 if self.alternate else 2)

    def _drawn(self, like: Tensor, shape: Sequence[int], round: int) -> Tensor:
        """Normal numbers, drawn on the CPU so that all ranks have the same."""
        if like.is_meta:
            return like.new_empty(tuple(shape))
        drawn = torch.randn(tuple(shape), generator=rng(self.seed, "power_sgd", round), dtype=torch.float64)
        return drawn.to(like.device, like.dtype)


def _near_unit(q: Tensor) -> Tensor:
    """Columns times powers of two that bring their norms to 1/2 up to 1; zeros stay.

    A factor of the last round is as large as that round's x, so without this x @ q would have the size of x^2, which
    leaves float16's range early. Powers of two change no digit of the direction.
    """
    norm: Tensor = torch.linalg.vector_norm(q, dim=-2, keepdim=True, dtype=torch.float64)  # no square overflows there
    norm = norm.masked_fill(norm == 0, 0.5)
    scaled: Tensor = q * (torch.frexp(norm).mantissa / norm)
    return scaled.to(q.dtype)


def _orthonormal(x: Tensor) -> Tensor:
    """Orthonormal columns that span those of each matrix of a stack, and more where their rank is too low."""
    basis: Tensor = torch.linalg.qr(x.float() if x.itemsize < 4 else x)[0]
    return basis.to(x.dtype)
