"""The values themselves, in float32: exact."""

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
        """See `Codec.encode`."""
        return as_bytes(x.to(torch.float32, copy=True))

    def decode(self, payload: Tensor, num: int) -> Tensor:
        """See `Codec.decode`."""
        return from_bytes(payload, torch.float32)
