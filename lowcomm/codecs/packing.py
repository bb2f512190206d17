"""Small unsigned integers and floats as bytes, row by row, on little-endian machines."""

from __future__ import annotations

from functools import reduce

import torch
from torch import Tensor


def packed_bytes(num: int, bits: int) -> int:
    """The size of ``num`` numbers of 1, 2, 4 or 8 bits."""
    return -(-num * bits // 8)


def pack(codes: Tensor, bits: int) -> Tensor:
    """Numbers below ``2**bits``, uint8 or bool ``[rows, num]``, as uint8 ``[rows, packed_bytes(num, bits)]``.

    The first number of a byte is in its lowest bits; the last byte is padded with zeros.
    """
    assert bits in (1, 2, 4, 8) and codes.itemsize == 1
    if bits == 8:
        return codes
    if torch.compiler.is_compiling():
        first, *others = of_byte(codes.to(torch.uint8), bits)
        for i, part in enumerate(others, 1):
            first = torch.bitwise_or(first, part << i * bits)
        return first
    codes, per_byte, (num_rows, num) = codes.view(torch.uint8), 8 // bits, codes.shape
    if codes.numel() == 0:  # has no strides that a wider dtype could have
        return codes.new_empty(num_rows, packed_bytes(num, bits))
    padding = -num % per_byte
    if padding:
        codes = torch.cat([codes, codes.new_zeros(num_rows, padding)], 1)
    elif not codes.is_contiguous() or codes.storage_offset() % per_byte:
        codes = codes.clone(memory_format=torch.contiguous_format)  # aligned for the view that follows
    # The numbers of one byte as one wide integer: they move together, and its lowest byte is the result.
    if bits == 4:
        wide = codes.view(torch.int16)
        return (wide | (wide >> 4)).to(torch.uint8)
    if bits == 2:
        wide = codes.view(torch.int32)
        return (wide | (wide >> 6) | (wide >> 12) | (wide >> 18)).to(torch.uint8)
    wide = codes.view(torch.int64)
    return ((wide * 0x0102040810204080) >> 56).to(torch.uint8)  # the sum of 8 shifts, gathered in the highest byte


def unpack(packed: Tensor, num: int, bits: int) -> Tensor:
    """The inverse of `pack`: uint8 ``[rows, num]``; int32 when compiled."""
    assert bits in (1, 2, 4, 8) and packed.dtype == torch.uint8
    if bits == 8:
        return packed[:, :num]
    if torch.compiler.is_compiling():
        shifts = torch.arange(0, 8, bits, dtype=torch.int32, device=packed.device)
        codes = torch.bitwise_right_shift(packed.to(torch.int32)[:, :, None], shifts)
        return torch.bitwise_and(codes, 2**bits - 1).flatten(1)[:, :num]
    if bits == 4:
        wide = packed.to(torch.int16)
        wide = (wide | (wide << 4)) & 0x0F0F
    elif bits == 2:
        wide = packed.to(torch.int32)
        wide = (wide | (wide << 6) | (wide << 12) | (wide << 18)) & 0x03030303
    else:
        wide = packed.to(torch.int64)
        wide = (wide | (wide << 28)) & 0x0000000F0000000F
        wide = (wide | (wide << 14)) & 0x0003000300030003
        wide = (wide | (wide << 7)) & 0x0101010101010101
    return wide.view(torch.uint8)[:, :num]


def of_byte(x: Tensor, bits: int) -> tuple[Tensor, ...]:
    """Values ``[rows, num]`` by their place in a byte of codes: all first ones, all second ones, and so on.

    When compiled, both packing and reductions read rows in this order, so that they fuse into one program.
    """
    return x.view(x.shape[0], -1, 8 // bits).unbind(2)


def largest(x: Tensor, bits: int) -> Tensor:
    """The largest magnitude of each row, ``[rows, 1]``; ``bits``: of the codes that will be packed."""
    size = x.abs()
    if torch.compiler.is_compiling():
        size = reduce(torch.maximum, of_byte(size, bits))
    return size.amax(1, keepdim=True)


def total(x: Tensor, bits: int) -> Tensor:
    """The sum of each row, ``[rows, 1]``; ``bits`` as in `largest`."""
    if torch.compiler.is_compiling():
        x = reduce(torch.add, of_byte(x, bits))
    return x.sum(1, keepdim=True)


def as_bytes(x: Tensor) -> Tensor:
    """``[rows, num]`` of any dtype as uint8 ``[rows, num * itemsize]``."""
    return x.contiguous().view(torch.uint8)


def from_bytes(raw: Tensor, dtype: torch.dtype) -> Tensor:
    """The inverse of `as_bytes`."""
    if raw.numel() == 0:  # as in `pack`
        return raw.new_empty(raw.shape[0], raw.shape[1] // dtype.itemsize, dtype=dtype)
    return raw.clone(memory_format=torch.contiguous_format).view(dtype)  # aligned, whatever it was cut from


def copy_bytes(out: Tensor, x: Tensor) -> None:
    """out <- x, both uint8 ``[rows, num]``, in words where rows are aligned: GPUs copy single bytes slowly."""
    for dtype in (torch.int64, torch.int32):
        if all(n % dtype.itemsize == 0 for y in (out, x) for n in (y.shape[1], y.stride(0), y.storage_offset())):
            out.view(dtype).copy_(x.view(dtype))
            return
    out.copy_(x)
