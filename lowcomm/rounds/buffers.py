"""One set of buffers for all replicas, right for the parameters that stand."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lowcomm.algorithms.base import Algorithm
from lowcomm.comm.base import Comm
from lowcomm.engine.base import Engine
from lowcomm.tensors import buckets, copy_, flatten, unflatten

_BUCKET_BYTES = 2**25


def align(algorithm: Algorithm[Any], engine: Engine, comm: Comm) -> None:
    """Make the buffers that training changed fit the parameters as they are now, and equal on all members.

    They are averaged. For methods that keep replicas equal that is all. Others have just moved the parameters, and
    running statistics are of those before: each replica recalculates them on its own inputs, and they are averaged once
    more. Where a run leaves replicas apart, each recalculates its own. Without changed buffers nothing is sent.
    """
    if not engine.buffers():
        return
    together = not algorithm.ends_apart()
    if together:
        average(engine.buffers(), comm)
    if not algorithm.keeps_equal():
        engine.recalculate()
        if together:
            average(engine.buffers(), comm)


def average(tensors: Sequence[Tensor], comm: Comm) -> None:
    """In place: means over members, in float32 or better; of tensors that are no fractions, the first member's."""
    tensors = [torch.view_as_real(x) if x.is_complex() else x for x in tensors]
    sent = []
    for group in buckets(tensors, _BUCKET_BYTES):
        like = [tensors[i] for i in group]
        flat = flatten(like)
        is_mean = flat.is_floating_point()
        wide = flat.to(torch.promote_types(flat.dtype, torch.float32)) if is_mean else flat
        sent.append((like, comm.all_sum(wide) if is_mean else comm.broadcast(flat, comm.members[0])))
    arrived = [(like, work.wait()) for like, work in sent]  # all of them, before anything changes
    for like, x in arrived:
        copy_(like, unflatten(x / len(comm.members) if x.is_floating_point() else x, like))
