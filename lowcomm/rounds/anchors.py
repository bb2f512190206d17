"""The shared anchor, and the replicas' differences to it."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from lowcomm.reduce import Reducer
from lowcomm.rounds.exchanges import Sending
from lowcomm.tensors import mul_, unflatten, valueless, zeros


def anchor_of(params: Sequence[Tensor]) -> list[Tensor]:
    """A copy of the parameters in float32 or better."""
    wide = [torch.promote_types(x.dtype, torch.float32) for x in params]
    if valueless(params) and wide == [x.dtype for x in params]:
        return list(params)
    return [x.detach().to(dtype, copy=True) for x, dtype in zip(params, wide, strict=True)]


def deltas(
    reducer: Reducer,
    anchor: list[Tensor],
    params: list[Tensor],
    factor: float = 1.0,
    slot: str = "deltas",
    share: float = 1.0,
) -> list[Sending]:
    """A `Sending` of the deltas of all parameters, times factor and share; the factor is its memo."""
    values = partial(delta, anchor, params, factor * share)
    return [Sending(slot, reducer, anchor, values, range(len(anchor)), memo=factor)]


def delta(anchor: Sequence[Tensor], params: Sequence[Tensor], factor: float, numbers: Sequence[int]) -> list[Tensor]:
    """The deltas of the parameters with these indices, times a factor, in the anchor's dtype."""
    anchor, params = [anchor[i] for i in numbers], [params[i] for i in numbers]
    if factor == 0 or valueless(anchor):  # nothing may come from a replica that is lost, NaN neither
        return zeros(anchor)
    # what this replica was loaded with, not the anchor: no step taken must mean no delta
    loaded = [a.to(p.dtype).to(a.dtype) for a, p in zip(anchor, params, strict=True)]
    if {(x.dtype, x.is_cpu) for x in anchor} == {(anchor[0].dtype, True)}:
        # into one vector, as it is sent: on a CPU a second copy costs as much as the all-reduce
        moved = unflatten(anchor[0].new_empty(sum(x.numel() for x in anchor)), anchor)
        for x, y, out in zip(loaded, params, moved, strict=True):
            torch.sub(x, y, out=out)
    else:
        moved = list(torch._foreach_sub(loaded, params))
    if factor != 1:
        mul_(moved, factor)
    return moved
