"""Each rank sends its coded vector to all, which decode and average them.

One latency instead of the two of `lowcomm.compress.quantized`, and the mean itself is not coded, so the error is that
of one code only. The price: each rank sends (n - 1) codes of the vector, not 2 (n - 1) / n. A vector so short that its
code would be no smaller goes as float32.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, ClassVar

import torch
from torch import Tensor

from lowcomm.codecs.absmax import Absmax
from lowcomm.codecs.base import Codec
from lowcomm.codecs.float32 import no_longer
from lowcomm.comm.base import Comm, Work
from lowcomm.compress.base import Compressor
from lowcomm.tensors import rng

BATCH = 2**16  # values at a time on CPUs, whose caches are small
OTHER_BATCH = 2**22


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

    def mean(
        self, x: Tensor, state: int, comm: Comm, wants_sent: bool = True
    ) -> Generator[Work[Any], Any, tuple[Tensor, Tensor, int]]:
        """One all-gather. Members' vectors are added in their order."""
        num, shape, dtype = x.numel(), x.shape, x.dtype
        if num == 0:
            return x, x.clone(), state + 1
        random = rng(self.seed, "rounding", comm.rank, state + 1, device="cpu" if x.is_meta else x.device)
        payload = self.encode(x.reshape(1, num), random)
        work, mine = comm.all_gather(payload[0]), payload if wants_sent else None
        wide = torch.promote_types(dtype, torch.float32)  # 16 bits would lose late terms
        del x, payload
        gathered = yield work
        total = torch.zeros(num, dtype=wide, device=gathered.device)
        for messages in batches(gathered, num):
            for vector in self.decode(messages, num).to(dtype):
                total += vector
        mean = total.div_(len(comm.members)).to(dtype).view(shape)
        return mean if mine is None else self.decode(mine, num).to(dtype).view(shape), mean, state + 1

    def sent_bytes(self, shape: Sequence[int], element_bytes: int, num_members: int) -> int:
        return (num_members - 1) * self.num_bytes(prod(shape))

    def num_bytes(self, num: int) -> int:
        """Exact size of a message for ``num`` values."""
        return no_longer(self.codec, num).num_bytes(num)

    def encode(self, x: Tensor, random: torch.Generator | None = None) -> Tensor:
        """Rows of values as messages, uint8 ``[rows, num_bytes]``."""
        return no_longer(self.codec, x.shape[1]).encode(x, random)

    def decode(self, messages: Tensor, num: int) -> Tensor:
        """The float32 values ``[rows, num]`` of messages of `encode`."""
        return no_longer(self.codec, num).decode(messages, num)


def batches(messages: Tensor, num: int) -> Iterator[Tensor]:
    """Rows of messages in order, some of them at a time, ``[rows, bytes]``, to be decoded together.

    As many as have ``BATCH`` values, at ``num`` each, but at least one: short ones would take the time of calls, and
    all long ones at once too much memory.
    """
    size = max(1, (BATCH if messages.device.type == "cpu" else OTHER_BATCH) // max(num, 1))
    for first in range(0, len(messages), size):
        yield messages[first : first + size]
