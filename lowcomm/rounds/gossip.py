"""Shared parts of methods whose replicas average in small groups that change every round.

Groups follow from a seed and the round, without communication. Within a group everything is exchanged in pairs
(`lowcomm.pairwise`).
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from math import inf
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor

from lowcomm.comm.base import Comm, Task, Work
from lowcomm.pairwise import Pairwise
from lowcomm.reduce import ALL_SENT, Reducer, ReducerState
from lowcomm.tensors import rng

T = TypeVar("T")
# What a run leaves behind: the average of all replicas on each, the first one's on all, or each its own.
Finalize = Literal["average", "pick", "ensemble"]


def groups(members: Sequence[int], size: int | None, seed: int, round: int) -> list[tuple[int, ...]]:
    """A random partition of the members for this round, the same on all of them.

    Members are shuffled. With G full groups, the k-th of the first G x size joins group k mod G; the fewer than
    ``size`` that remain form one more group.

    Args:
        size: of a group; None or more than there are: one group of all.
        round: from 1.
    """
    if size is None or size >= len(members):
        return [tuple(members)]
    order = [members[i] for i in torch.randperm(len(members), generator=rng(seed, "groups", round)).tolist()]
    num_full = len(members) // size
    full, rest = order[: num_full * size], order[num_full * size :]
    found = [tuple(sorted(full[k::num_full])) for k in range(num_full)]
    return found + ([tuple(sorted(rest))] if rest else [])


def group_mean(
    reducer: Reducer, xs: Sequence[Tensor], state: ReducerState, comm: Comm, size: int | None, seed: int, round: int
) -> Task[tuple[list[Tensor], ReducerState]]:
    """Start averaging ``xs`` over this rank's group of a round; result as of `Reducer.mean`.

    ``xs`` must not change until then. A rank alone keeps its values, unrounded. When the group has changed,
    `Reducer.resync` first rebuilds its shared state: free for reducers that share nothing, a whole uncompressed average
    for EF21 and its variants. After that the average is sent, and the task pauses at `ALL_SENT`.
    """

    def of_round(number: int) -> tuple[int, ...]:
        return next(group for group in groups(comm.members, size, seed, number) if comm.rank in group)

    group = of_round(round)
    is_new = round > 1 and of_round(round - 1) != group
    return Task(_mean(reducer, xs, state, Pairwise(comm, group), is_new))


def _mean(
    reducer: Reducer, xs: Sequence[Tensor], state: ReducerState, comm: Comm, is_new: bool
) -> Generator[Work[Any], Any, tuple[list[Tensor], ReducerState]]:
    if len(comm.members) == 1:
        return [x.clone() for x in xs], state
    if is_new:
        state = yield from reducer.resync(state, comm).steps()
    mean = reducer.mean(xs, state, comm)
    yield ALL_SENT
    return (yield from mean.steps())


def local(anchor: Sequence[Tensor], params: Sequence[Tensor]) -> list[Tensor]:
    """Each anchor plus its parameter's change since loading; the parameter itself if it is as precise."""
    return [p.detach().to(a.dtype) + (a - a.to(p.dtype).to(a.dtype)) for a, p in zip(anchor, params, strict=True)]


def largest_pull(momentum: float, size: float, num_replicas: float = inf) -> float:
    """The bound on the pull towards a random group's mean below which replicas contract in mean square.

    With ``d <- momentum d + pull (group mean - x);  x <- x + d`` and groups of ``size`` drawn anew each round, the
    second moments of x and d about their means over replicas decay exactly when

        0 < pull < 2 (1 - momentum^2) / (1 + momentum - 2 momentum kappa),   kappa = (1 - 1 / size) / (1 - 1 / N)

    for N replicas. The default, infinite N, gives the smallest bound: 2 (1 - momentum^2) for pairs. One group of all,
    or an infinite ``size``, has kappa = 1: 2 (1 + momentum).
    """
    kappa = (1 - 1 / size) / (1 - 1 / num_replicas)
    return 2 * (1 - momentum**2) / (1 + momentum - 2 * momentum * kappa)


def check_pull(pull: float, momentum: float, size: int | None, named: str, remedy: str) -> None:
    """Refuse a pull with which replicas diverge.

    Args:
        size: of a group; None: one group of all.
        named: how the pull was given, as in "gamma = 1.6".
        remedy: what to change.

    Raises:
        ValueError: naming the bound.
    """
    limit = largest_pull(momentum, inf if size is None else size)
    if not 0 < pull < limit:
        where, kappa = ("one group of all", "1") if size is None else (f"groups of {size}", f"{size - 1}/{size}")
        raise ValueError(
            f"{named} with momentum {momentum:g} in {where}: replicas come together only for a pull between 0 and "
            f"2 (1 - a^2) / (1 + a - 2 a k) = {limit:.4g}, with the momentum a and k = {kappa}; {remedy}"
        )


def check_keeps_values(reducer: Reducer, named: str, remedy: str) -> None:
    """Refuse reducers that cannot average parameters themselves: zeros would stand where nothing was sent.

    A feedback that sends differences to what is known, and begins uncompressed, makes any compressor fit.

    Args:
        named: the method and its option.
        remedy: what else to change.

    Raises:
        ValueError: naming the compressor.
    """
    feedback = reducer.feedback
    follows = feedback.keeps_mean and feedback.is_dense(feedback.init(torch.zeros(1)))
    if not (follows or reducer.compressor.keeps_values()):
        raise ValueError(
            f"{named} averages parameters themselves, of which {reducer.compressor} leaves out a part, with "
            f"{feedback}: what is not sent would become 0; take a compressor that sends every value, such as "
            f"Quantized, or EF21() as feedback{remedy}"
        )


def check_finalize(finalize: str) -> None:
    """Check that it is a `Finalize`.

    Raises:
        ValueError: naming the choices.
    """
    if finalize not in ("average", "pick", "ensemble"):
        raise ValueError(f"finalize is {finalize!r}; choose 'average', 'pick' or 'ensemble'")


def finalized(tensors: Sequence[Tensor], finalize: Finalize, comm: Comm) -> list[Tensor]:
    """The tensors at the end of a run: fresh ones, but ``ensemble`` returns the same."""
    if finalize == "ensemble":
        return list(tensors)
    if finalize == "pick":
        arrivals = [comm.broadcast(x, comm.members[0]) for x in tensors]
        return [arrival.wait() for arrival in arrivals]
    exact = Reducer()
    return exact.mean(tensors, exact.init(tensors), comm).result()[0]


def disagreement(tensors: Sequence[Tensor], comm: Comm) -> Tensor:
    """Root mean square distance of the members' tensors to their mean over members.

    A 0-d float64 tensor, equal on all members; costs an all-reduce of all tensors in float64.
    """
    copies = [x.detach().double() for x in tensors]
    sums = [comm.all_sum(x) for x in copies]
    mine = [(x - total.wait().div_(len(comm.members))).square().sum() for x, total in zip(copies, sums, strict=True)]
    squares = comm.all_sum(torch.stack(mine).sum()).wait()
    return (squares / (len(comm.members) * sum(x.numel() for x in tensors))).sqrt()
