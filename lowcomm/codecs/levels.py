"""Rounding to the nearest of a few levels: how codes do it, how they read it back, and the most that is lost."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from math import floor

import torch
from torch import Tensor

from lowcomm.codecs.packing import unpack
from lowcomm.codecs.scales import SCALE_GROWTH, ScaleFormat

CELLS = 2**16
# float32 arithmetic itself misses by parts in 2^24; no bound is sharper than its square, with room to spare
ROUNDING = 1e-12


def nearest_level(levels: Sequence[float], reach: float, device: torch.device) -> Callable[[Tensor], Tensor]:
    """A function from float32 in [-reach, reach] to the place of the nearest level, uint8; beyond counts as the end.

    ``levels`` ascend and hold 0. The answer is looked up for one of at most 2^16 cells, by the end of the cell that is
    next to zero: within a cell of the middle of two levels the smaller magnitude may be taken.
    """
    cell = cell_size(reach)
    num_cells = int(2 * reach / cell) + 1
    # the first cell that belongs to the upper of two levels
    first = [floor(((low + high) / 2 + reach) / cell) + (low >= 0) for low, high in pairwise(levels)]
    counts = [end - start for start, end in pairwise([0, *first, num_cells])]
    table = torch.cat([torch.full((count,), i, dtype=torch.uint8) for i, count in enumerate(counts)]).to(device)

    def nearest(x: Tensor) -> Tensor:
        cells = torch.add(x, reach).mul_(1 / cell).to(torch.int32).clamp_(0, num_cells - 1)
        return table.index_select(0, cells.view(-1)).view(x.shape)

    return nearest


def round_to_bytes(x: Tensor) -> Tensor:
    """The nearest integers of float32 values in [-128, 255] as uint8, modulo 256; ``x`` is used up.

    Beside 1.5 2^23 the unit in the last place is 1: the sum rounds, ties to even, and its lowest byte is the integer.
    torch's own rounding wakes all threads on CPUs, however few values there are.
    """
    return x.add_(1.5 * 2**23).view(torch.int32).to(torch.uint8)


def round_at_random(x: Tensor, random: torch.Generator | None) -> Tensor:
    """The integer below or above each float32 value, so that the mean is the value; ``x`` is used up.

    The random number meets the fraction alone: added to the value it may round up to the next integer, and so would
    zero after any offset.
    """
    whole = x.floor()
    return whole.add_(x.sub_(whole).add_(torch.rand(x.shape, generator=random, device=x.device)).floor_())


def cell_size(reach: float) -> float:
    """The power of two that cuts [-reach, reach] into at most `CELLS` cells."""
    cell = 1.0
    while 2 * reach / cell > CELLS:
        cell *= 2
    while 4 * reach / cell <= CELLS:
        cell /= 2
    return cell


def lookup(levels: Sequence[float], bits: int, device: torch.device) -> Callable[[Tensor, Tensor], object]:
    """A function that takes packed codes ``[num, bytes]`` and writes the levels that they name.

    To its second argument, float32 ``[num, width]`` and contiguous.
    """
    per_byte = 8 // bits
    each = torch.tensor([*levels] + [0.0] * (2**bits - len(levels)))
    table = each[unpack(torch.arange(256, dtype=torch.uint8)[:, None], per_byte, bits).long()].to(device)
    return lambda packed, out: look_up_bytes(table, packed.reshape(-1).to(torch.int32), out)


def look_up_bytes(table: Tensor, places: Tensor, out: Tensor) -> None:
    """Write to ``out``, float32 ``[num, width]``, the rows of ``table`` at ``places``: all values of a byte at once.

    Args:
        table: float32, a row for what each byte stands for.
        places: int32, of the bytes of all ``num`` rows; the last byte of a row may be used in part.
    """
    per_byte = table.shape[1]
    if out.shape[1] % per_byte or out.storage_offset() % per_byte:  # not whole bytes, or not aligned for wide elements
        whole = torch.empty(out.shape[0], -(-out.shape[1] // per_byte) * per_byte, device=out.device)
        look_up_bytes(table, places, whole)
        out.copy_(whole[:, : out.shape[1]])
        return
    wide = {1: torch.float32, 2: torch.float64, 4: torch.complex128}.get(per_byte)
    if wide is None:
        torch.index_select(table, 0, places, out=out.view(-1, per_byte))
    else:  # a row as one element
        torch.index_select(table.view(wide).view(-1), 0, places, out=out.view(-1).view(wide))


def contraction_of_nearest(
    levels: Sequence[float], width: int, reach: float, scale: ScaleFormat, inexact: float = 0.0
) -> float:
    """The sharp delta of ``width`` values that are scaled to at most ``reach`` and rounded to the nearest level.

    With the loss lambda = 1 - delta, no block may have sum(e^2 - lambda v^2) > 0. For a single value the maximum of
    that stands in the middle of two levels, for the largest it may also stand at either end of where the largest can
    lie: [reach / growth of the scale's format, reach]. So lambda is found by bisection.

    Args:
        levels: ascending, with 0.
        inexact: how far beyond the middle of two levels the lower magnitude may still be taken.
    """
    low, high = reach / SCALE_GROWTH[scale], reach
    worst = [(max(abs(a), abs(b)) - (b - a) / 2 + inexact, (b - a) / 2 + inexact) for a, b in pairwise(levels)]
    worst += [(high, high - end) for end in (levels[-1], -levels[0]) if high > end]
    ends = [(v, max(_distance(levels, v), _distance(levels, -v))) for v in (low, high)]
    largest = ends + [(v, e) for v, e in worst if low <= v <= high]

    def excess(loss: float) -> float:
        others = max(0.0, *(e * e - loss * v * v for v, e in worst))
        return max(e * e - loss * v * v for v, e in largest) + (width - 1) * others

    below, above = 0.0, 1.0
    for _ in range(50):
        middle = (below + above) / 2
        below, above = (middle, above) if excess(middle) > 0 else (below, middle)
    return 1 - max(above, ROUNDING)


def _distance(levels: Sequence[float], value: float) -> float:
    return min(abs(value - level) for level in levels)
