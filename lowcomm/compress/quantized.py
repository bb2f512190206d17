"""Send few bits of each value, add in full precision: a quantised all-reduce in two shots.

Any `lowcomm.codecs` code, such as 8-bit integers in blocks, both ways; see `lowcomm.compress.two_shot`.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, ClassVar

from torch import Tensor

from lowcomm.codecs.absmax import Absmax
from lowcomm.codecs.base import Codec
from lowcomm.comm.base import Comm, Work
from lowcomm.compress.base import Compressor
from lowcomm.compress.two_shot import two_shot, two_shot_bytes
from lowcomm.tensors import rng


@dataclass(frozen=True)
class Quantized(Compressor[int]):
    """The mean of coded values.

    Attributes:
        codec: of the values, in both shots.
        seed: of random rounding, where the codec wants it; each rank and round has its own numbers.
    """

    codec: Codec = Absmax()
    seed: int = 0
    elementwise: ClassVar[bool] = True
    passes_nonfinite: ClassVar[bool] = False

    def init(self, like: Tensor) -> int:
        """The number of rounds so far."""
        return 0

    def mean(self, x: Tensor, state: int, comm: Comm) -> Generator[Work[Any], Any, tuple[Tensor, Tensor, int]]:
        """Two shots."""
        device = "cpu" if x.is_meta else x.device
        random = rng(self.seed, "rounding", comm.rank, state + 1, device=device)
        sent, mean = yield from two_shot(x, self.codec, comm, random)
        return sent, mean, state + 1

    def sent_bytes(self, shape: Sequence[int], element_bytes: int, num_members: int) -> int:
        """See `Compressor.sent_bytes`."""
        return two_shot_bytes(prod(shape), self.codec, num_members)
