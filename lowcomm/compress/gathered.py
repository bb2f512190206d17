"""Send one's coded vector to everybody, who decode all of them and average.

One latency instead of the two of `lowcomm.compress.quantized`, and the mean itself is not coded, so the error is that
of one code only. The price: each rank sends (n - 1) codes of the vector, not 2 (n - 1) / n.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, ClassVar

import torch
from torch import Tensor

from lowcomm.codecs.absmax import Absmax
from lowcomm.codecs.base import Codec
from lowcomm.comm.base import Comm, Work
from lowcomm.compress.base import Compressor
from lowcomm.tensors import rng


@dataclass(frozen=True)
class Gathered(Compressor[int]):
    """The mean of what every rank's coded vector decodes to.

    Attributes:
        codec: of the values.
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
        """One all-gather. Ranks are decoded one at a time, in members' order."""
        num = x.numel()
        if num == 0:
            return x, x.clone(), state + 1
        random = rng(self.seed, "rounding", comm.rank, state + 1, device="cpu" if x.is_meta else x.device)
        payload = self.codec.encode(x.reshape(1, num), random)
        under_way = comm.all_gather(payload[0])
        sent = self.codec.decode(payload, num).to(x.dtype)
        total = torch.zeros_like(sent)
        for received in (yield under_way):
            total += self.codec.decode(received[None], num).to(x.dtype)
        return sent.view(x.shape), total.div_(len(comm.members)).view(x.shape), state + 1

    def sent_bytes(self, shape: Sequence[int], element_bytes: int, num_members: int) -> int:
        """See `Compressor.sent_bytes`."""
        return (num_members - 1) * self.codec.num_bytes(prod(shape))
