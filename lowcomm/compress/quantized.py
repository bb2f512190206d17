"""Send few bits of each value, add in full precision: a quantised all-reduce in two shots.

Any `lowcomm.codecs` code, such as 8-bit integers in blocks, both ways; see `lowcomm.compress.two_shot`. So few values
that codes of their chunks would be larger go by one exact all-reduce.
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
from lowcomm.compress.identity import Identity, outgrows
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

    def mean(
        self, x: Tensor, state: int, comm: Comm, wants_sent: bool = True
    ) -> Generator[Work[Any], Any, tuple[Tensor, Tensor, int]]:
        """Two shots."""
        if self._goes_whole(x.numel(), len(comm.members)):
            sent, mean, _ = yield from Identity().mean(x, None, comm, wants_sent)
            return sent, mean, state + 1
        device = "cpu" if x.is_meta else x.device
        random = rng(self.seed, "rounding", comm.rank, state + 1, device=device)
        shots = two_shot(x, self.codec, comm, random, wants_sent)
        del x
        sent, mean = yield from shots
        return sent, mean, state + 1

    def num_messages(self) -> int:
        return 2

    def sent_bytes(self, shape: Sequence[int], element_bytes: int, num_members: int) -> float:
        if self._goes_whole(prod(shape), num_members):
            return Identity().sent_bytes(shape, element_bytes, num_members)
        return two_shot_bytes(prod(shape), self.codec, num_members)

    def _goes_whole(self, num: int, num_members: int) -> bool:
        return outgrows(two_shot_bytes(num, self.codec, num_members), num, num_members)
