"""One bit a value: its sign, times the mean magnitude of the block.

The mean magnitude is the best of all scales: |x|^2 shrinks by |x|_1^2 / num. There is no zero. In a block that is not
zero throughout, each zero comes back as the scale, so entries that must stay zero need error feedback, or a block, of
their own.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lowcomm.codecs.blocks import BlockCodec, BlockDecoder, BlockEncoder, Layout
from lowcomm.codecs.levels import lookup
from lowcomm.codecs.packing import as_bytes, from_bytes


@dataclass(frozen=True)
class Sign(BlockCodec):
    """Signs with a float32 scale: ``1 + 32 / block`` bits a value.

    Attributes:
        block: values that share a scale.
    """

    block: int = 4096

    def __post_init__(self) -> None:
        self.layout()

    def layout(self) -> Layout:
        """See `BlockCodec.layout`."""
        return Layout(self.block, 1, 4)

    def block_contraction(self, width: int) -> float:
        """A single value among zeros; for a normal distribution it is 2 / pi."""
        return (1 - 1e-6) / width

    def encoder(self, device: torch.device, random: torch.Generator | None) -> BlockEncoder:
        """See `BlockCodec.encoder`."""

        def encode(x: Tensor) -> tuple[Tensor, Tensor]:
            # divided before they are added, for sums beyond float32
            return as_bytes(x.abs().mul_(1 / x.shape[1]).sum(1, keepdim=True)), (x >= 0).view(torch.uint8)

        return encode

    def decoder(self, device: torch.device) -> BlockDecoder:
        """See `BlockCodec.decoder`."""
        look = lookup((-1.0, 1.0), 1, device)

        def decode(header: Tensor, codes: Tensor, out: Tensor) -> None:
            look(codes, out)
            out.mul_(from_bytes(header, torch.float32))

        return decode
