"""A vector of each member, moved by what it sends, and the mean of all members' vectors.

Methods that compress differences to such a vector share this state. The mean is right only while members stay the same,
hence `resynced`.
"""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lowcomm.comm.base import Comm, Work


@dataclass
class Tracked:
    """A member's vector and the members' mean.

    Attributes:
        mine: this member's vector.
        ours: the mean of ``mine`` over members, equal on all of them.
        is_new: whether there was no round yet; equal on all of them.
    """

    mine: Tensor
    ours: Tensor
    is_new: bool


def tracked(like: Tensor) -> Tracked:
    """Zeros shaped like ``like``, before the first round."""
    return Tracked(torch.zeros_like(like), torch.zeros_like(like), True)


def move(state: Tracked, sent: Tensor, mean: Tensor, by: float = 1.0) -> None:
    """Move both vectors in place, by what this member and all together sent, times ``by``."""
    state.mine.add_(sent, alpha=by)
    state.ours.add_(mean, alpha=by)
    state.is_new = False


def resynced(state: Tracked, comm: Comm) -> Generator[Work[Any], Any, Tracked]:
    """The state for these members: ``ours`` is recomputed from ``mine`` by one uncompressed sum.

    ``is_new`` is false for all if it is for one.
    """
    is_old = state.mine.new_full((1,), 0.0 if state.is_new else 1.0)
    total = yield comm.all_sum(torch.cat([state.mine.reshape(-1), is_old]))
    ours = total[:-1].div(len(comm.members)).view_as(state.mine)
    return Tracked(state.mine, ours, state.is_new if total.is_meta else not total[-1])
