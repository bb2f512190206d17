"""Send everything uncompressed."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, ClassVar

from torch import Tensor

from lowcomm.comm.base import Comm, Work
from lowcomm.compress.base import Compressor


@dataclass(frozen=True)
class Identity(Compressor[None]):
    """The exact mean, by one all-reduce in the dtype of the input."""

    elementwise: ClassVar[bool] = True
    passes_nonfinite: ClassVar[bool] = True

    def init(self, like: Tensor) -> None:
        """No state."""

    def mean(
        self, x: Tensor, state: None, comm: Comm, wants_sent: bool = True
    ) -> Generator[Work[Any], Any, tuple[Tensor, Tensor, None]]:
        """The sum over ranks by their number."""
        work, sent = comm.all_sum(x), x if wants_sent else None
        del x
        mean = (yield work).div_(len(comm.members))
        return mean if sent is None else sent, mean, state

    def sent_bytes(self, shape: Sequence[int], element_bytes: int, num_members: int) -> float:
        return 2 * (num_members - 1) / num_members * prod(shape) * element_bytes


def outgrows(sent_bytes: float, num: int, num_members: int) -> bool:
    """Whether this many bytes exceed what `Identity` needs for ``num`` float32 values, so it should be used.

    The real dtype is ignored, so that only shapes decide.
    """
    return sent_bytes > Identity().sent_bytes((num,), 4, num_members)
