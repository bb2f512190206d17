"""The values themselves, in float32: exact, and what goes in place of codes that would be no smaller."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lowcomm.codecs.base import Codec
from lowcomm.codecs.packing import as_bytes, from_bytes


@dataclass(frozen=True)
class Float32(Codec):
    """32 bits a value."""

    def num_bytes(self, num: int) -> int:
        """4 for each."""
        return 4 * num

    def contraction(self, num: int) -> float:
        """Exact, of what float32 can hold."""
        return 1.0

    def encode(self, x: Tensor, random: torch.Generator | None = None) -> Tensor:
        return as_bytes(x.to(torch.float32, copy=True))

    def decode(self, payload: Tensor, num: int) -> Tensor:
        return from_bytes(payload, torch.float32)


def no_longer(codec: Codec, num: int) -> Codec:
    """``codec``, or `Float32` where it would not make ``num`` values any smaller: very few, beside scales."""
    plain = Float32()
    return codec if codec.num_bytes(num) < plain.num_bytes(num) else plain
