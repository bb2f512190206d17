"""The anchor that replicas share, and what each has moved away from it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def anchor_of(params: Sequence[Tensor]) -> list[Tensor]:
    """A copy of the parameters in float32 or better."""
    return [x.detach().to(torch.promote_types(x.dtype, torch.float32), copy=True) for x in params]


def delta(anchor: Sequence[Tensor], params: Sequence[Tensor], factor: float, numbers: Sequence[int]) -> list[Tensor]:
    """What the parameters with these numbers have moved, times a factor, in the anchor's dtype."""
    if factor == 0:  # nothing may come from a replica that is lost, NaN neither
        return [torch.zeros_like(anchor[i]) for i in numbers]
    moved = []
    for a, p in ((anchor[i], params[i]) for i in numbers):
        # what this replica was loaded with, not the anchor: no step taken must mean no delta
        loaded = a.to(p.dtype).to(a.dtype, copy=True)
        moved.append(loaded.sub_(p).mul_(factor))
    return moved
