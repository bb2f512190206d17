"""Codes that take each row in blocks, every block with a small header of its own: the part that they share.

A payload is the headers of all blocks, then the codes of all blocks. The last block of a row may be shorter.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from lowcomm.codecs.base import Codec
from lowcomm.codecs.packing import pack, packed_bytes

# On CPUs this many values at a time: what one pass over them leaves in the cache the next one finds there. Where torch
# has several threads it still runs most operations on fewer than 32768 elements in the calling one; on busy cores others
# cost a hundred times as much. (Not round, floor, sqrt and aminmax, which always share: codes do without.)
SHARED_CPU_SLICE = 32767
CPU_SLICE = 2**17
OTHER_SLICE = 2**24  # elsewhere only memory counts

BlockEncoder = Callable[[Tensor], tuple[Tensor, Tensor]]
BlockDecoder = Callable[[Tensor, Tensor, Tensor], object]


@dataclass(frozen=True)
class Layout:
    """Sizes of a block.

    Attributes:
        block: values in it.
        bits: of each code: 1, 2, 4 or 8.
        header_bytes: beside the codes.
    """

    block: int
    bits: int
    header_bytes: int

    def __post_init__(self) -> None:
        per_byte = 8 // self.bits
        if self.block < 1 or self.block % per_byte:
            raise ValueError(
                f"block is {self.block}; codes of {self.bits} bits need a multiple of {per_byte}, so that blocks fill "
                f"whole bytes"
            )


class BlockCodec(Codec, ABC):
    """A code of blocks: says how one is coded; rows, payloads and speed are seen to here."""

    @abstractmethod
    def layout(self) -> Layout:
        """Sizes of a block."""

    @abstractmethod
    def block_contraction(self, width: int) -> float:
        """`Codec.contraction` for one block of ``width`` values; it does not grow with the width."""

    @abstractmethod
    def encoder(self, device: torch.device, random: torch.Generator | None) -> BlockEncoder:
        """A function from float32 ``[num, width]`` to headers ``[num, header_bytes]`` and codes ``[num, width]``.

        Both uint8, the codes not packed yet. It must not modify what it is given.
        """

    @abstractmethod
    def decoder(self, device: torch.device) -> BlockDecoder:
        """A function that takes headers and packed codes and writes values to its third argument.

        That is float32 ``[num, width]``, contiguous: the result itself where possible, which spares a copy.
        """

    def num_bytes(self, num: int) -> int:
        """Headers and codes."""
        layout = self.layout()
        return -(-num // layout.block) * layout.header_bytes + packed_bytes(num, layout.bits)

    def contraction(self, num: int) -> float:
        """That of the widest block: errors of blocks add, and so do their squares."""
        return self.block_contraction(min(self.layout().block, max(num, 1)))

    def encode(self, x: Tensor, random: torch.Generator | None = None) -> Tensor:
        """See `Codec.encode`."""
        payload = torch.empty(x.shape[0], self.num_bytes(x.shape[1]), dtype=torch.uint8, device=x.device)
        if x.is_meta or x.numel() == 0:
            return payload
        layout, encode = self.layout(), self.encoder(x.device, random)
        for part in _parts(x, x.shape[1], layout):
            cut = x[part.rows, part.values].to(torch.float32).reshape(-1, part.width)
            header, codes = encode(cut)
            num_rows = part.rows.stop - part.rows.start
            payload[part.rows, part.headers] = header.view(num_rows, -1)
            payload[part.rows, part.codes] = pack(codes, layout.bits).view(num_rows, -1)
        return payload

    def decode(self, payload: Tensor, num: int) -> Tensor:
        """See `Codec.decode`."""
        x = torch.empty(payload.shape[0], num, device=payload.device)
        if payload.is_meta or x.numel() == 0:
            return x
        layout, decode = self.layout(), self.decoder(payload.device)
        for part in _parts(x, num, layout):
            header = payload[part.rows, part.headers].reshape(-1, layout.header_bytes)
            codes = payload[part.rows, part.codes].reshape(-1, packed_bytes(part.width, layout.bits))
            target = x[part.rows, part.values]
            if target.is_contiguous():
                decode(header, codes, target.view(-1, part.width))
            else:
                values = torch.empty(codes.shape[0], part.width, device=x.device)
                decode(header, codes, values)
                target.copy_(values.view(target.shape))
        return x


@dataclass(frozen=True)
class _Part:
    """Blocks of one width that are coded together, and where they lie in rows and payloads."""

    rows: slice
    values: slice
    headers: slice
    codes: slice
    width: int


def _parts(like: Tensor, num: int, layout: Layout) -> Iterator[_Part]:
    """All blocks of ``like``, ``[rows, num]``, in an order that depends on shapes only."""
    limit = OTHER_SLICE
    if like.device.type == "cpu":
        limit = CPU_SLICE if torch.get_num_threads() == 1 else SHARED_CPU_SLICE
    block, num_rows = layout.block, like.shape[0]
    num_whole, rest = divmod(num, block)
    first_code = (num_whole + (rest > 0)) * layout.header_bytes

    def part(row: int, row_end: int, start: int, end: int, width: int) -> _Part:  # blocks [start, end)
        values = slice(start * block, min(end * block, num))
        codes = slice(
            first_code + start * packed_bytes(block, layout.bits), first_code + packed_bytes(values.stop, layout.bits)
        )
        headers = slice(start * layout.header_bytes, end * layout.header_bytes)
        return _Part(slice(row, row_end), values, headers, codes, width)

    if num_whole:
        at_once = max(1, limit // block)  # blocks
        rows_at_once = max(1, at_once // num_whole)
        for row in range(0, num_rows, rows_at_once):
            for start in range(0, num_whole, at_once):
                yield part(row, min(row + rows_at_once, num_rows), start, min(start + at_once, num_whole), block)
    if rest:
        rows_at_once = max(1, limit // rest)
        for row in range(0, num_rows, rows_at_once):
            yield part(row, min(row + rows_at_once, num_rows), num_whole, num_whole + 1, rest)
