"""EF21 that also feeds a little of its error back (EControl, arXiv:2311.05645).

Each member keeps h, which moves by what it sends, and e, the sum of what it failed to send. It compresses
``x - h + eta e``. ``eta = 0`` is EF21. A good eta is the compressor's contraction delta (k / d for top-k), which keeps
large step sizes stable. With one far above it the error itself grows. The theory's delta / 400 is EF21 in practice.

Differs from the paper in: eta may be taken from what the compressor lets through, round by round; and ``dense_first``
chooses between the paper's starts.
"""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from lowcomm.comm.base import Comm, Work
from lowcomm.feedback.base import Feedback
from lowcomm.feedback.tracked import Tracked, move, resynced, tracked


@dataclass
class EControlState:
    """What each member keeps.

    Attributes:
        error: e, all that it failed to send.
        known: h, and its mean over members.
        eta: for the next round, without dimensions.
    """

    error: Tensor
    known: Tracked
    eta: Tensor


@dataclass(frozen=True)
class EControl(Feedback[EControlState]):
    """EF21 with a controlled share of EF14.

    Attributes:
        eta: the share of the error that is fed back in a round, in [0, 1]; best the compressor's contraction delta.
            None: measured in this member's last round, as the smaller of two shares that got through: of the values
            (those sent that are not zero) and of the energy. That is k / d for top-k, near 1 for a code that hardly
            errs.
        dense_first: start from the exact x of the first round, which goes uncompressed; otherwise from zero.
    """

    eta: float | None = None
    dense_first: bool = True
    keeps_mean: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.eta is not None and not 0.0 <= self.eta <= 1.0:
            raise ValueError(
                f"EControl(eta={self.eta}): it must lie within [0, 1]; take the compressor's contraction, k / d for "
                "top-k, or None to have it measured"
            )

    def init(self, like: Tensor) -> EControlState:
        return EControlState(torch.zeros_like(like), tracked(like), like.new_full((), self.eta or 0.0))

    def is_dense(self, state: EControlState) -> bool:
        """The first round, if so wanted."""
        return self.dense_first and state.known.is_new

    def before(self, x: Tensor, state: EControlState) -> tuple[Tensor, Tensor]:
        """What is new in ``x`` and some of the error; for `after` the former."""
        new = x - state.known.mine
        return new if state.known.is_new else _wanted(new, state), new

    def after(self, kept: Tensor, sent: Tensor, mean: Tensor, state: EControlState) -> tuple[Tensor, EControlState]:
        """The mean of all h."""
        eta = state.eta if self.eta is not None else _share(sent, _wanted(kept, state))
        error = state.error.add_(kept).sub_(sent)
        move(state.known, sent, mean)
        return state.known.ours.clone(), EControlState(error, state.known, eta)

    def resync(self, state: EControlState, comm: Comm) -> Generator[Work[Any], Any, EControlState]:
        """Recompute the mean; a new member has h = e = 0."""
        return replace(state, known=(yield from resynced(state.known, comm)))


def _wanted(new: Tensor, state: EControlState) -> Tensor:
    return torch.where(state.eta > 0, state.eta * state.error, 0.0).add_(new)


def _share(sent: Tensor, wanted: Tensor) -> Tensor:
    """How much of ``wanted``, which it overwrites, got through as ``sent``, in [0, 1]; 0 where nothing was wanted."""
    wide = torch.promote_types(sent.dtype, torch.float32)  # squares and counts leave the range of float16
    values = sent.count_nonzero().to(wide) / max(sent.numel(), 1)
    energy = wanted.to(wide).square().sum()
    left = wanted.sub_(sent).to(wide).square_().sum() / torch.where(energy > 0, energy, torch.ones_like(energy))
    share = torch.where(energy > 0, torch.minimum(values, 1 - left).clamp(0, 1), torch.zeros_like(energy))
    return share.to(sent.dtype)
