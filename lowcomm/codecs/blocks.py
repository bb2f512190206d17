"""A base for codes that cut each row in blocks, each with a small header.

A payload is the headers of all blocks, then the codes of all blocks. The last block of a row may be shorter.

A code is one expression over ``[num, width]``. On a GPU long rows run it through torch.compile, on a CPU slices of them
that stay in the cache. Which one is decided by device and shape alone.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from lowcomm.codecs.base import Codec
from lowcomm.codecs.compiled import Programs
from lowcomm.codecs.levels import byte_table, look_up
from lowcomm.codecs.packing import as_bytes, copy_bytes, from_bytes, pack, packed_bytes
from lowcomm.codecs.scales import scale_from_format

# On CPUs this many values at a time: what one pass over them leaves in the cache the next one finds there. Where torch
# has several threads it still runs most operations on fewer than 32768 elements in the calling one; on busy cores
# others cost a hundred times as much. (Not round, floor, sqrt and aminmax, which always share: codes do without.)
SHARED_CPU_SLICE = 32767
CPU_SLICE = 2**17
OTHER_SLICE = 2**24  # elsewhere only memory counts
COMPILED_SLICE = 2**28  # where nothing lies in memory in between but random numbers
COMPILED_FROM = 2**17  # values of a row; fewer take no time
COMPILED_ON = ("cuda",)


Tables = tuple[Tensor, ...]
Factors = tuple[Tensor, Tensor | float]


@dataclass(frozen=True)
class Layout:
    """Sizes of a block.

    Attributes:
        block: values in it.
        bits: of each code: 1, 2, 4 or 8.
        header: the type of the numbers beside the codes.
        count: of these numbers.
    """

    block: int
    bits: int
    header: torch.dtype
    count: int = 1

    def __post_init__(self) -> None:
        per_byte = 8 // self.bits
        if self.block < 1 or self.block % per_byte:
            raise ValueError(
                f"block is {self.block}; codes of {self.bits} bits need a multiple of {per_byte}, so that blocks fill "
                f"whole bytes"
            )

    @property
    def header_bytes(self) -> int:
        """Size of a header."""
        return self.count * self.header.itemsize


class BlockCodec(Codec, ABC):
    """A code of blocks; subclasses code one block, this class handles rows, payloads and speed."""

    @abstractmethod
    def layout(self) -> Layout:
        """Sizes of a block."""

    @abstractmethod
    def block_contraction(self, width: int) -> float:
        """`Codec.contraction` for one block of ``width`` values; it does not grow with the width."""

    @property
    def levels(self) -> tuple[float, ...]:
        """The value of each code before scaling by the header, for codes where this applies."""
        return ()

    def tables(self) -> Tables:
        """Constants for both expressions: levels by code and by byte."""
        num = 2 ** self.layout().bits
        levels = torch.tensor([[*self.levels, *[0.0] * (num - len(self.levels))]])
        return levels, byte_table(levels)

    @abstractmethod
    def encode_blocks(self, x: Tensor, draws: Tensor | None, tables: Tables) -> tuple[Tensor, Tensor]:
        """Headers ``[num, count]`` and codes, uint8 or bool ``[num, width]``, of float32 ``[num, width]``.

        A block with NaN must decode to NaN throughout.

        Args:
            x: stays as it is.
            draws: for codes that round at random, uniform numbers like ``x``, which may be used up; else None.
        """

    def decode_blocks(self, header: Tensor, packed: Tensor, out: Tensor, tables: Tables) -> Factors:
        """Two factors of the values ``[num, width]``: one for each, of any dtype, and float32 ``[num, 1]`` or 1.

        Elementwise arithmetic that rounds alike everywhere, so that all devices decode to equal bits.

        Args:
            header: float32 ``[num, count]``.
            packed: see `pack`; the last byte of a row may be used in part.
            out: of the shape of the values, contiguous; it may be the first factor.
        """
        return look_up(tables[0], packed, out, tables[1]), header

    def num_bytes(self, num: int) -> int:
        """Headers and codes."""
        layout = self.layout()
        return -(-num // layout.block) * layout.header_bytes + packed_bytes(num, layout.bits)

    def contraction(self, num: int) -> float:
        """That of the widest block: errors of blocks add, and so do their squares."""
        return self.block_contraction(min(self.layout().block, max(num, 1)))

    def encode(self, x: Tensor, random: torch.Generator | None = None) -> Tensor:
        payload = torch.empty(x.shape[0], self.num_bytes(x.shape[1]), dtype=torch.uint8, device=x.device)
        if x.is_meta or x.numel() == 0:
            return payload
        assert random is not None or not self.stochastic, "random rounding needs random numbers"
        layout, tables = self.layout(), self._programs.tables(self.tables, x.device)
        raw, codes = _split(payload, x.shape[1], layout)
        headers = torch.empty(len(x), raw.shape[1] // layout.header.itemsize, dtype=layout.header, device=x.device)
        for values, header, code, width, compiled in _parts(x, headers, codes, layout):
            values = values.reshape(-1, width)
            draws = torch.rand(values.shape, generator=random, device=x.device) if self.stochastic else None
            if compiled:
                packed = code if code.is_contiguous() else torch.empty_like(code)  # several rows in one call
                rows = [values, packed.view(len(values), -1), draws]
                kept = self._programs.run(self._encode_into, rows, tables, self, "encode")
                if packed is not code:
                    copy_bytes(code, packed)
            else:
                kept, whole = self.encode_blocks(values.to(torch.float32), draws, tables)
                code.copy_(pack(whole, layout.bits).view(code.shape))
            header.copy_(kept.view(header.shape))
        raw.copy_(as_bytes(headers))
        return payload

    def decode(self, payload: Tensor, num: int) -> Tensor:
        x = torch.empty(payload.shape[0], num, device=payload.device)
        if payload.is_meta or x.numel() == 0:
            return x
        layout, tables = self.layout(), self._programs.tables(self.tables, payload.device)
        raw, codes = _split(payload, num, layout)
        headers = from_bytes(raw, layout.header)
        if x.device.type not in COMPILED_ON:  # all at once: every operation on a slice takes its time
            headers = scale_from_format(headers)
        for values, header, code, width, compiled in _parts(x, headers, codes, layout):
            whole = values.is_contiguous()
            out = (values if whole else torch.empty(values.shape, device=x.device)).view(-1, width)
            if compiled and not code.is_contiguous():
                copy_bytes(packed := torch.empty_like(code, memory_format=torch.contiguous_format), code)
                code = packed
            header, packed = header.reshape(-1, layout.count), code.reshape(len(out), -1)
            if compiled:
                self._programs.run(self._decode_into, [out, header, packed], tables, self, "decode")
            else:
                self._decode_into(out, header, packed, tables)
            if not whole:
                values.copy_(out.view(values.shape))
        return x

    def _encode_into(self, x: Tensor, packed: Tensor, draws: Tensor | None, tables: Tables) -> Tensor:
        header, codes = self.encode_blocks(x.to(torch.float32), draws, tables)
        packed.copy_(pack(codes, 8 * packed.shape[1] // x.shape[1]))
        return header

    def _decode_into(self, out: Tensor, header: Tensor, packed: Tensor, tables: Tables) -> None:
        factor, scale = self.decode_blocks(scale_from_format(header), packed, out, tables)
        if torch.compiler.is_compiling():
            out.copy_(factor * scale)
            return
        if factor is not out:
            out.copy_(factor)
        if isinstance(scale, Tensor):
            out.mul_(scale)

    @cached_property
    def _programs(self) -> Programs:
        return Programs()


def _split(payload: Tensor, num: int, layout: Layout) -> tuple[Tensor, Tensor]:
    """The bytes of headers and the codes, as views."""
    end = -(-num // layout.block) * layout.header_bytes
    return payload[:, :end], payload[:, end:]


def _parts(
    x: Tensor, headers: Tensor, codes: Tensor, layout: Layout
) -> Iterator[tuple[Tensor, Tensor, Tensor, int, bool]]:
    """Values, headers and codes of blocks that are coded together, as views, their width, and whether to compile.

    In an order that depends on shapes only: whole blocks row by row, then the last ones of all rows.
    """
    (num_rows, num), block, each = x.shape, layout.block, layout.count
    num_whole, rest = divmod(num, block)
    compiled = x.device.type in COMPILED_ON and num_whole * block >= COMPILED_FROM
    limit = COMPILED_SLICE if compiled else OTHER_SLICE
    if x.device.type == "cpu":
        limit = CPU_SLICE if torch.get_num_threads() == 1 else SHARED_CPU_SLICE
    for first, count, width in ((0, num_whole, block), (num_whole, 1, rest)):
        if not count * width:
            continue
        whole, code_bytes = compiled and width == block, packed_bytes(width, layout.bits)
        start, at_once = first * packed_bytes(block, layout.bits), max(1, limit // width)  # blocks
        rows_at_once = 1 if whole and rest else max(1, at_once // count)  # no values that must be copied together
        for row in range(0, num_rows, rows_at_once):
            rows = slice(row, row + rows_at_once)
            for part in zip(
                x[rows, first * block : first * block + count * width].split(at_once * width, 1),
                headers[rows, first * each : (first + count) * each].split(at_once * each, 1),
                codes[rows, start : start + count * code_bytes].split(at_once * code_bytes, 1),
                strict=True,
            ):
                yield *part, width, whole
