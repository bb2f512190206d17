"""Which ``kept`` of ``num`` places were chosen, as bytes: sorted distinct numbers below ``num``, row by row.

Two codes, whose size depends on ``num`` and ``kept`` alone:

- "packed": each number in ceil(log2 num) bits, 12 for chunks of 4,096. The lowest bits of all numbers come first, then
  the next.
- "elias_fano": the l = floor(log2(num / kept)) low bits of each number, stored the same way. The remaining high bits
  never fall from one number to the next, so only their rises are stored, in unary: bit (number >> l) + i is set for the
  i-th number. Together that is kept (l + 1) + ceil(num / 2^l) bits: at most 2 + log2(num / kept) a number, and less
  than 1 more in all. No code needs less than about half a bit a number below that (Elias 1974; Vigna 2013,
  arXiv:1206.4300). 64 of 4,096 take 8 bits each, 128 take 7, 32 take 9.

All of ``num`` places, or none, take no bytes.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from lowcomm.codecs.packing import pack, packed_bytes, unpack

IndexCode = Literal["packed", "elias_fano"]
INDEX_CODES = ("packed", "elias_fano")


def index_bytes(num: int, kept: int, code: IndexCode) -> int:
    """The size of one row, rounded up to whole bytes."""
    if kept in (0, num):
        return 0
    if code == "packed":
        return packed_bytes(kept * _width(num), 1)
    low = _low_bits(num, kept)
    return packed_bytes(kept * low + _high_size(num, kept, low), 1)


def encode_indices(indices: Tensor, num: int, code: IndexCode) -> Tensor:
    """Rows of sorted distinct numbers below ``num``, int64 ``[rows, kept]``, as uint8 ``[rows, index_bytes]``."""
    num_rows, kept = indices.shape
    if kept in (0, num):
        return indices.new_empty((num_rows, 0), dtype=torch.uint8)
    if code == "packed":
        return pack(_to_bits(indices, _width(num)), 1)
    low = _low_bits(num, kept)
    rises = torch.zeros(num_rows, _high_size(num, kept, low), dtype=torch.uint8, device=indices.device)
    rises.scatter_(1, (indices >> low) + torch.arange(kept, device=indices.device), 1)
    return pack(torch.cat([_to_bits(indices, low), rises], 1), 1)


def decode_indices(raw: Tensor, num: int, kept: int, code: IndexCode) -> Tensor:
    """The inverse of `encode_indices`: int64 ``[rows, kept]``."""
    place = torch.arange(kept, device=raw.device)
    if kept in (0, num):
        return place.repeat(raw.shape[0], 1)
    if code == "packed":
        return _from_bits(unpack(raw, kept * _width(num), 1), kept, _width(num))
    low = _low_bits(num, kept)
    bits = unpack(raw, kept * low + _high_size(num, kept, low), 1)
    # The i-th set bit is where the count of set bits first reaches i + 1: unlike nonzero, of a size known beforehand.
    count = bits[:, kept * low :].cumsum(1, dtype=torch.int32)
    wanted = (place + 1).to(torch.int32).repeat(raw.shape[0], 1)
    high = torch.searchsorted(count, wanted) - place
    return (high << low) + _from_bits(bits[:, : kept * low], kept, low)


def _width(num: int) -> int:
    return (num - 1).bit_length()


def _low_bits(num: int, kept: int) -> int:
    return (num // kept).bit_length() - 1  # floor(log2(num / kept))


def _high_size(num: int, kept: int, low: int) -> int:
    return kept - (-num // (1 << low))


def _to_bits(numbers: Tensor, width: int) -> Tensor:
    """``[rows, num]`` as single bits, uint8 ``[rows, width * num]``: the lowest of all numbers, then the next bit."""
    kind = _kind(width)
    shifts = torch.arange(width, dtype=kind, device=numbers.device)[:, None]
    return ((numbers.to(kind)[:, None] >> shifts) & 1).to(torch.uint8).flatten(1)


def _from_bits(bits: Tensor, num: int, width: int) -> Tensor:
    """The inverse of `_to_bits`, in int64."""
    planes = bits.reshape(bits.shape[0], width, num)
    numbers = torch.zeros(bits.shape[0], num, dtype=_kind(width), device=bits.device)
    for i in range(width):
        numbers.add_(planes[:, i], alpha=1 << i)
    return numbers.long()


def _kind(width: int) -> torch.dtype:
    """The narrowest dtype for so many bits: the tensors are large."""
    return torch.int32 if width < 32 else torch.int64
