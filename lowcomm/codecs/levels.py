"""Rounding to the nearest of a few levels: encoding, decoding, and a bound on the loss."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from math import floor

import torch
from torch import Tensor

from lowcomm.codecs.packing import unpack
from lowcomm.codecs.scales import SCALE_GROWTH, ScaleFormat

CELLS = 2**16
# float32 arithmetic itself errs by parts in 2^24: no loss is taken to be below the square of that, with room to spare
ROUNDING = 1e-12
# the codes, of 1, 2, 4 or 8 bits, in each of the 256 bytes, byte after byte
CODES_OF_BYTES = {
    bits: unpack(torch.arange(256, dtype=torch.uint8)[:, None], 8 // bits, bits).reshape(-1).to(torch.int32)
    for bits in (1, 2, 4, 8)
}


def cells_of_levels(levels: Sequence[float], reach: float) -> Tensor:
    """The index of the nearest level for each cell of [-reach, reach], uint8; the cells are of `cell_size`.

    ``levels`` ascend and contain 0. The end of a cell that is next to zero decides. So values within one cell of the
    middle of two levels may get the level of smaller magnitude.
    """
    cell = cell_size(reach)
    # the first cell that belongs to the upper of two levels
    first = [floor(((low + high) / 2 + reach) / cell) + (low >= 0) for low, high in pairwise(levels)]
    counts = [end - start for start, end in pairwise([0, *first, int(2 * reach / cell) + 1])]
    return torch.cat([torch.full((count,), i, dtype=torch.uint8) for i, count in enumerate(counts)])


def round_to_bytes(x: Tensor) -> Tensor:
    """The nearest integers of float32 values in [-128, 255] as uint8, modulo 256; ``x`` is overwritten.

    Near 1.5 2^23 floats are 1 apart. So adding that rounds, ties to even, and the lowest byte of the sum is the
    integer. torch's own rounding would start all threads of a CPU, however few values there are.
    """
    return x.add_(1.5 * 2**23).view(torch.int32).to(torch.uint8)


def round_at_random(x: Tensor, draws: Tensor) -> Tensor:
    """The integer below or above each float32 value, such that the mean is the value; both arguments are overwritten.

    The random number is added to the fraction alone. Added to the value itself, the sum might round up to the next
    integer: then even a zero, once it has an offset, would not stay.
    """
    whole = x.floor()
    return whole.add_(x.sub_(whole).add_(draws).floor_())


def cell_size(reach: float) -> float:
    """The power of two that cuts [-reach, reach] into at most `CELLS` cells."""
    cell = 1.0
    while 2 * reach / cell > CELLS:
        cell *= 2
    while 4 * reach / cell <= CELLS:
        cell /= 2
    return cell


def byte_table(levels: Tensor) -> Tensor:
    """The values of the codes in each byte, float32 ``[num * 256, codes in a byte]``, for levels ``[num, 2**bits]``."""
    bits = levels.shape[1].bit_length() - 1
    return levels.index_select(1, CODES_OF_BYTES[bits].to(levels.device)).view(-1, 8 // bits)


def look_up(levels: Tensor, packed: Tensor, out: Tensor, table: Tensor | None = None) -> Tensor:
    """The values of packed codes ``[num, bytes]``: float32 ``[num, width]``, written to ``out`` where possible.

    Args:
        levels: the value of each code, the same for all blocks or one row each: float32 ``[1 or num, 2**bits]``.
        out: contiguous, of the result's shape.
        table: `byte_table` of ``levels``; None: made here.
    """
    (num, width), bits = out.shape, levels.shape[1].bit_length() - 1
    if torch.compiler.is_compiling():
        return levels.expand(num, -1).gather(1, unpack(packed, width, bits).long())
    per_byte = 8 // bits
    if width % per_byte or out.storage_offset() % per_byte:  # not whole bytes, or not aligned for wide elements
        whole = torch.empty(num, packed.shape[1] * per_byte, device=out.device)
        return look_up(levels, packed, whole, table)[:, :width]
    table = byte_table(levels) if table is None else table
    places = packed.to(torch.int32)
    if len(levels) > 1:
        places += torch.arange(0, 256 * num, 256, dtype=torch.int32, device=out.device)[:, None]
    found, wide = out.view(-1, per_byte), {8: torch.float32, 4: torch.float64, 2: torch.complex128}.get(bits)
    if wide is not None:  # all values of a byte as one element
        table, found = table.view(wide).view(-1), found.view(wide).view(-1)
    torch.index_select(table, 0, places.view(-1), out=found)
    return out


def contraction_of_nearest(
    levels: Sequence[float], width: int, reach: float, scale: ScaleFormat, inexact: float = 0.0
) -> float:
    """The sharp contraction delta of blocks of ``width`` values, scaled to at most ``reach`` and rounded to ``levels``.

    Let lambda = 1 - delta be the loss, and e the error of a value v. No block may have sum(e^2 - lambda v^2) > 0. Each
    term is largest in the middle of two levels. The block's largest value lies in [reach / growth of the scale's
    format, reach]; its term may also be largest at an end of that. lambda is found by bisection.

    Args:
        levels: ascending, with 0.
        inexact: how far beyond the middle of two levels the lower magnitude may still be chosen.
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
