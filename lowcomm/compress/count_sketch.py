"""Count sketch: find the largest entries of the mean without knowing where they are.

Each row of a table adds up all values of a vector, with random signs, in few cells (Charikar, Chen and Farach-Colton
2002). All ranks share cells and signs, so tables can be added on the way. An entry of the mean is estimated from its
cell in each row, by the median over rows; the entries with the largest estimates are kept:

    T_w = sketch(x_w);   T = mean_w T_w;   K = top-k of median_row |sign_row T[row, cell_row]|

With ``exact`` the ranks then average their true values at K (a second message; Sketched-SGD, Ivkin et al. 2019,
arXiv:1903.04488): sent is x_w on K, and never more than there was. Without, the estimates are the mean, as in FetchSGD
(Rothchild et al. 2020, arXiv:2007.07682): then sent is, for each entry of K, what this rank's own table says in the
very cell that was the median of the mean, so that the mean of sent is the mean. That saves the second message, but
estimates of vectors without a few dominating entries are mostly noise, larger than what they stand for: error feedback
then diverges.

Differs from the paper in: rows are balanced (each is a fresh random affine permutation of the entries, folded to the
row's length) so that tables are sums in a fixed order; momentum and errors are not kept in sketches but are the
feedback's; k is not refined from a larger candidate set.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass
from math import ceil, gcd, prod
from typing import Any, ClassVar

import torch
from torch import Tensor

from lowcomm.comm.base import Comm, Work
from lowcomm.compress.base import Compressor, first_count
from lowcomm.compress.identity import Identity
from lowcomm.tensors import rng


@dataclass(frozen=True)
class _Row:
    """One row of the table, for a vector padded to ``length``.

    Attributes:
        signs: of every entry, ``[length]``.
        source: the entry at each place of the permuted vector, ``[length]``.
        cell: of every entry, ``[length]``.
    """

    signs: Tensor
    source: Tensor
    cell: Tensor


@dataclass(frozen=True)
class CountSketch(Compressor[int]):
    """The mean's largest entries, found in a sketch; the state is the number of rounds so far.

    Attributes:
        rows: of the table; odd, as the median is one of them.
        density: cells of the table for each value of the vector.
        keep: the share of entries that are kept; at most the share of cells in one row, ``density / rows``.
        exact: average the true values at the entries that are kept, in a second message.
        seed: of cells and signs; the same on all ranks.
    """

    rows: int = 3
    density: float = 0.1
    keep: float = 0.01
    exact: bool = True
    seed: int = 0
    elementwise: ClassVar[bool] = True
    passes_nonfinite: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if self.rows < 1 or self.rows % 2 == 0:
            raise ValueError(f"CountSketch(rows={self.rows}): it must be odd, as the median is one of them; try 3")
        if not 0 < self.density <= 1:
            raise ValueError(f"CountSketch(density={self.density}): it must lie above 0 and be at most 1")
        # 3 x 0.1 rounds to more than 0.3, and is allowed
        if not 0 < self.keep * self.rows <= self.density * (1 + 1e-9):
            raise ValueError(
                f"CountSketch(keep={self.keep}): it must lie above 0 and be at most density / rows = "
                f"{self.density / self.rows:.4g}: a row cannot tell more entries apart than it has cells"
            )

    def init(self, like: Tensor) -> int:
        """No rounds so far."""
        return 0

    def mean(
        self, x: Tensor, state: int, comm: Comm, wants_sent: bool = True
    ) -> Generator[Work[Any], Any, tuple[Tensor, Tensor, int]]:
        """A sum of tables and, with ``exact``, one of values."""
        if self._num_sent(x.numel()) >= x.numel():
            sent, mean, _ = yield from Identity().mean(x, None, comm, wants_sent)
            return sent, mean, state + 1
        num_columns, length, num_kept = self._sizes(x.numel())
        rows = [self._row(x, num_columns, length, state + 1, i) for i in range(self.rows)]
        flat = x.new_zeros(length)
        flat[: x.numel()] = x.reshape(-1)
        table = torch.stack([(flat * row.signs)[row.source].view(num_columns, -1).sum(1) for row in rows])

        total = yield comm.all_sum(table)
        estimates = _estimates(total / len(comm.members), rows)[:, : x.numel()]
        values, origins = (part[self.rows // 2] for part in estimates.sort(dim=0, stable=True))
        kept = values.abs().topk(num_kept).indices
        if self.exact:
            mine = flat[kept]
            total = yield comm.all_sum(mine)
            ours = total / len(comm.members)
        else:
            mine = _estimates(table, rows)[origins[kept], kept]
            ours = values[kept]
        return _placed(mine, kept, x), _placed(ours, kept, x), state + 1

    def keeps_values(self) -> bool:
        return False

    def num_messages(self) -> int:
        return 2 if self.exact else 1

    def sent_bytes(self, shape: Sequence[int], element_bytes: int, num_members: int) -> float:
        num_values = min(self._num_sent(prod(shape)), prod(shape))
        return Identity().sent_bytes((num_values,), element_bytes, num_members)

    def resync(self, state: int, comm: Comm) -> Generator[Work[Any], Any, int]:
        """The first member's count of rounds, on which the random numbers depend."""
        return (yield from first_count(state, comm))

    def _num_sent(self, num: int) -> int:
        num_columns, _, num_kept = self._sizes(num)
        return self.rows * num_columns + (num_kept if self.exact else 0)

    def _sizes(self, num: int) -> tuple[int, int, int]:
        """Columns of the table, the length of the vector when padded to a multiple of them, and the entries kept."""
        if num == 0:
            return 0, 0, 0
        num_columns = ceil(self.density * num / self.rows)
        return num_columns, -(-num // num_columns) * num_columns, ceil(self.keep * num)

    def _row(self, like: Tensor, num_columns: int, length: int, round: int, i: int) -> _Row:
        """Drawn on the CPU, as all ranks must have the same."""
        entries = torch.arange(length, device=like.device)
        if like.is_meta:
            return _Row(like.new_empty(length), entries, entries)
        random = rng(self.seed, "count_sketch", round, i)
        signs = (2 * torch.randint(2, (length,), generator=random, dtype=torch.int8) - 1).to(like.device, like.dtype)
        factor, shift = (int(v) for v in torch.randint(length, (2,), generator=random))
        while gcd(factor, length) != 1:
            factor += 1
        inverse = pow(factor, -1, length)
        cell = (entries * factor + shift) % length // (length // num_columns)
        return _Row(signs, (entries - shift) * inverse % length, cell)


def _estimates(table: Tensor, rows: Sequence[_Row]) -> Tensor:
    """What each row says about every entry, ``[rows, length]``."""
    return torch.stack([line[row.cell] * row.signs for line, row in zip(table, rows, strict=True)])


def _placed(values: Tensor, indices: Tensor, like: Tensor) -> Tensor:
    """Zeros shaped like ``like``, but for ``values`` at distinct ``indices``."""
    flat = like.new_zeros(like.numel())
    flat[indices] = values
    return flat.view(like.shape)
