"""Floats of 16 bits, without scales."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from lowcomm.codecs.base import Codec
from lowcomm.codecs.packing import as_bytes, from_bytes


@dataclass(frozen=True)
class Half(Codec):
    """The nearest float of 16 bits.

    Values beyond the format become its largest, so that error feedback can bring the rest later.

    Attributes:
        kind: bfloat16 has float32's range; float16 is 8 times as fine from 6.1e-5 to 65504 and holds nothing larger,
            little that is smaller.
    """

    kind: Literal["bfloat16", "float16"] = "bfloat16"

    def __post_init__(self) -> None:
        if self.kind not in ("bfloat16", "float16"):
            raise ValueError(f"Half(kind={self.kind!r}): choose bfloat16 or float16")

    def num_bytes(self, num: int) -> int:
        """2 for each."""
        return 2 * num

    def contraction(self, num: int) -> float:
        """Each value misses by at most half a unit in the last place, inside the format's range."""
        return 1 - (torch.finfo(self._dtype).eps / 2) ** 2

    def encode(self, x: Tensor, random: torch.Generator | None = None) -> Tensor:
        largest = torch.finfo(self._dtype).max
        x = x.float() if x.itemsize < 4 else x  # another format of 16 bits cannot hold the bound
        return as_bytes(x.clamp(-largest, largest).to(self._dtype))

    def decode(self, payload: Tensor, num: int) -> Tensor:
        return from_bytes(payload, self._dtype).to(torch.float32)

    @property
    def _dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.kind == "bfloat16" else torch.float16
