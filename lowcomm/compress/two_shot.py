"""The mean of coded vectors in two shots: vectors are coded once, and their mean once (ZeRO++, arXiv:2306.10209, 3.3).

Rank i owns the i-th of n equal chunks. Each rank sends every owner its chunk, coded. The owner decodes the n chunks,
adds them in members' order, and sends their mean, coded, to all. Each rank sends 2 (n - 1) / n codes of the vector, as
in a ring, but the error does not grow with n.
"""

from __future__ import annotations

from collections.abc import Generator
from typing import Any

import torch
from torch import Tensor

from lowcomm.codecs.base import Codec
from lowcomm.comm.base import Comm, Work
from lowcomm.compress.base import in_rows


def two_shot(
    x: Tensor, codec: Codec, comm: Comm, random: torch.Generator | None, wants_sent: bool
) -> Generator[Work[Any], Any, tuple[Tensor, Tensor]]:
    """What this rank sent and the mean, both shaped like ``x``; all ranks get the same mean, bit for bit.

    Owners use the decoded mean as all others do. Only the owner knows the error of the second shot: its ``sent``
    includes n times that error, so the mean of what was sent stays the mean. See `Compressor.mean` for ``wants_sent``.
    """
    n, me, num, shape, dtype = len(comm.members), comm.place, x.numel(), x.shape, x.dtype
    if num == 0:
        return x.clone(), x.clone()
    payload, chunk = codec.encode(in_rows(x, n, dtype), random), -(-num // n)
    del x
    if n == 1:
        sent = codec.decode(payload, chunk).to(dtype).view(-1)[:num].view(shape)
        return sent, sent.clone()
    work, mine = comm.all_to_all(payload), payload if wants_sent else None
    del payload
    wide = torch.promote_types(dtype, torch.float32)  # sums may leave the range of 16 bits, where means do not
    exact = codec.decode((yield work), chunk).to(wide).sum(0).div_(n)
    work = comm.all_gather(codec.encode(exact[None], random)[0])
    if mine is None:
        del exact
    means = codec.decode((yield work), chunk).to(dtype)
    mean = means.view(-1)[:num].view(shape)
    if mine is None:
        return mean, mean
    sent = codec.decode(mine, chunk).to(dtype)
    sent[me] += n * (means[me] - exact)
    return sent.view(-1)[:num].view(shape), mean


def two_shot_bytes(num: int, codec: Codec, num_members: int) -> int:
    """What each rank sends for a vector of ``num`` values."""
    if num == 0 or num_members == 1:
        return 0
    return 2 * (num_members - 1) * codec.num_bytes(-(-num // num_members))
