"""Add what was not sent to what is to be sent next (1-bit SGD, Seide et al. 2014; arXiv:1901.09847).

With e the error so far, a round compresses ``decay * e + x`` and keeps what the compressor left of it. With
``decay=1`` all that was ever put in has been sent but for the last e. SparseLoCo (arXiv:2508.15706) takes a decay of
0.95 and no outer momentum, for which the memory then stands in. Nothing is shared, so members may come and go.

Differs from the paper in: the memory may be held in a code, such as 8 bits a value (LoCo, arXiv:2407.04480, does so);
its rounding is lost then.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lowcomm.codecs.base import Codec
from lowcomm.feedback.base import Feedback
from lowcomm.tensors import rng


@dataclass
class EF14State:
    """The error: what this member has not sent.

    Attributes:
        error: the values, or their code.
        num_rounds: so far; it keys random rounding.
    """

    error: Tensor
    num_rounds: int


@dataclass(frozen=True)
class EF14(Feedback[EF14State]):
    """Error feedback. The step size must be part of ``x`` where it varies, as it is in a delta.

    Attributes:
        decay: of the error from round to round, in [0, 1].
        memory: the code in which the error is held; None: as it is, in the precision of ``x``.
        seed: of a memory that rounds at random.
    """

    decay: float = 1.0
    memory: Codec | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0.0 <= self.decay <= 1.0:
            raise ValueError(
                f"EF14(decay={self.decay}): it must lie within [0, 1]: 1 loses nothing, 0 forgets as NoFeedback does"
            )

    def init(self, like: Tensor) -> EF14State:
        return EF14State(self._kept(torch.zeros_like(like), 0), 0)

    def before(self, x: Tensor, state: EF14State) -> tuple[Tensor, Tensor]:
        """``x`` and the error, for `after` too."""
        error = state.error
        if self.memory is not None:
            error = self.memory.decode(error, x.numel()).view(x.shape).to(x.dtype)
        wanted = x if self.decay == 0 else x.add(error, alpha=self.decay)
        return wanted, wanted

    def after(self, kept: Tensor, sent: Tensor, mean: Tensor, state: EF14State) -> tuple[Tensor, EF14State]:
        """The mean of what was sent."""
        num_rounds = state.num_rounds + 1
        return mean, EF14State(self._kept(kept.sub_(sent), num_rounds), num_rounds)

    def _kept(self, error: Tensor, num_rounds: int) -> Tensor:
        if self.memory is None:
            return error
        random = rng(self.seed, "memory", num_rounds, device="cpu" if error.is_meta else error.device)
        return self.memory.encode(error.reshape(1, -1), random)
