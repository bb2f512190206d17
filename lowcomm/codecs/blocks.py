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
# has several threads it still runs most operations on fewer than 32768 elements in the calling one; on busy cores
# others cost a hundred times as much. (Not round, floor, sqrt and aminmax, which always share: codes do without.)
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
        for values, headers, codes, width in _parts(x, payload, layout):
            header, code = encode(values.to(torch.float32).reshape(-1, width))
            headers.copy_(header.view(headers.shape))
            codes.copy_(pack(code, layout.bits).view(codes.shape))
        return payload

    def decode(self, payload: Tensor, num: int) -> Tensor:
        """See `Codec.decode`."""
        x = torch.empty(payload.shape[0], num, device=payload.device)
        if payload.is_meta or x.numel() == 0:
            return x
        layout, decode = self.layout(), self.decoder(payload.device)
        for values, headers, codes, width in _parts(x, payload, layout):
            whole = values.is_contiguous()
            out = (values if whole else torch.empty(values.shape, device=x.device)).view(-1, width)
            header = headers.reshape(-1, layout.header_bytes)
            decode(header, codes.reshape(-1, packed_bytes(width, layout.bits)), out)
            if not whole:
                values.copy_(out.view(values.shape))
        return x


def _parts(x: Tensor, payload: Tensor, layout: Layout) -> Iterator[tuple[Tensor, Tensor, Tensor, int]]:
    """Values, headers and codes of blocks that are coded together, as views, and the width of these blocks.

    In an order that depends on shapes only: whole blocks row by row, then the last ones of all rows.
    """
    limit = OTHER_SLICE
    if x.device.type == "cpu":
        limit = CPU_SLICE if torch.get_num_threads() == 1 else SHARED_CPU_SLICE
    (num_rows, num), block = x.shape, layout.block
    num_whole, rest = divmod(num, block)
    end, last = num_whole * block, num_whole * layout.header_bytes
    headers, codes = payload.split([last + (rest > 0) * layout.header_bytes, packed_bytes(num, layout.bits)], 1)
    code_bytes = packed_bytes(block, layout.bits)

    if num_whole:
        at_once = max(1, limit // block)  # blocks
        rows_at_once = max(1, at_once // num_whole)
        for row in range(0, num_rows, rows_at_once):
            rows = slice(row, row + rows_at_once)
            for part in zip(
                x[rows, :end].split(at_once * block, 1),
                headers[rows, :last].split(at_once * layout.header_bytes, 1),
                codes[rows, : num_whole * code_bytes].split(at_once * code_bytes, 1),
                strict=True,
            ):
                yield *part, block
    if rest:
        rows_at_once = max(1, limit // rest)
        for row in range(0, num_rows, rows_at_once):
            rows = slice(row, row + rows_at_once)
            yield x[rows, end:], headers[rows, last:], codes[rows, num_whole * code_bytes :], rest
