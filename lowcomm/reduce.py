"""Averages a list of tensors over replicas: feedback around a compressor, bucket by bucket."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lowcomm.comm.base import Comm, Done, Task, Work
from lowcomm.compress.base import Compressor
from lowcomm.compress.identity import Identity
from lowcomm.feedback.base import Feedback
from lowcomm.feedback.none import NoFeedback
from lowcomm.joined import JoinedComm
from lowcomm.tensors import buckets, extremes, flatten, num_bytes, unflatten

# What to average at some places of a list, as fresh tensors, which are then the reducer's: asked once for each bucket.
Values = Callable[[Sequence[int]], list[Tensor]]
# From 32 MiB on glibc maps memory anew for each, which costs more than the arithmetic; but each bucket costs about a
# millisecond of Python, which GPUs notice: many times, where a model is large.
BUCKET_BYTES, _MOST_BUCKETS = 31 * 2**20, 16

# What an average pauses at, beside its messages, when the next message of every bucket is on its way.
ALL_SENT: Work[None] = Done(None)


class NonFinite(Exception):
    """A rank brought an infinity or NaN to a compressor that cannot carry it; raised on all ranks alike.

    Attributes:
        ranks: who brought one.
    """

    def __init__(self, ranks: Sequence[int]) -> None:
        super().__init__(f"ranks {list(ranks)} brought infinite or NaN values to a compressed round")
        self.ranks = tuple(ranks)


@dataclass
class BucketState:
    """What one bucket keeps between rounds."""

    compressor: Any
    feedback: Any


@dataclass
class ReducerState:
    """What a list of tensors keeps between rounds, one entry for each bucket."""

    buckets: list[BucketState]


@dataclass(frozen=True)
class Reducer:
    """Averages lists of tensors over the members of a Comm.

    Attributes:
        compressor: what is sent of each bucket.
        feedback: what becomes of the rest.
        bucket_bytes: tensors are joined in vectors of at most this size (a larger tensor stands alone), so that large
            lists need few messages and the first is under way while the next is packed. For compressors that look at
            shapes, tensors of one shape are stacked up to this size. None: 31 MiB, or a sixteenth of the list where
            that is more.
    """

    compressor: Compressor = Identity()
    feedback: Feedback = NoFeedback()
    bucket_bytes: int | None = None

    def __post_init__(self) -> None:
        if self.bucket_bytes is not None and self.bucket_bytes < 1:
            raise ValueError(
                f"Reducer(bucket_bytes={self.bucket_bytes}): it must be at least 1, or None to follow sizes"
            )
        if self.feedback.keeps_mean and not self.compressor.divides_by_all():
            raise ValueError(
                f"{self.feedback} keeps the mean of what all ranks sent, but that of {self.compressor} is over those "
                "that sent a place; take divide_by='all', or EF14"
            )

    def limit_bytes(self, like: Sequence[Tensor]) -> int:
        """The largest bucket for lists of these shapes; the same on all kinds of devices."""
        if self.bucket_bytes is not None:
            return self.bucket_bytes
        return max(BUCKET_BYTES, num_bytes(like) // _MOST_BUCKETS)

    def init(self, like: Sequence[Tensor]) -> ReducerState:
        """The state before the first round for lists shaped like ``like``."""
        packed = (self._pack(group, like, None) for group in self._groups(like))
        return ReducerState([BucketState(self.compressor.init(x), self.feedback.init(x)) for x in packed])

    def mean(
        self, like: Sequence[Tensor], state: ReducerState, comm: Comm, values: Values | None = None
    ) -> Task[tuple[list[Tensor], ReducerState]]:
        """Start averaging; the Task's result is the means, shaped like ``like``, and the new state.

        Everything is read before this returns, and neither ``like`` nor ``state`` is modified: a round that fails costs
        nothing. Means are equal on all ranks, bit for bit. What is sent is held no longer than it takes, so with
        ``values`` a round needs little more memory than the means, and what a feedback keeps of values and sent.

        Args:
            values: what to average, made bucket by bucket; None: ``like`` itself.

        Raises:
            NonFinite: from the Task, on all ranks, when a rank's values are not finite and the compressor could not
                carry that; nothing comes of the round.
        """
        return Task(self._mean(like, state, comm, values))

    def resync(self, state: ReducerState, comm: Comm) -> Task[ReducerState]:
        """The state to go on with among new members: what members share is made anew from what each has.

        All members call it, those that came fresh with `init`'s state. Compressors' states are rank ``members[0]``'s.
        """
        return Task(self._resync(state, comm))

    def _mean(
        self, like: Sequence[Tensor], state: ReducerState, comm: Comm, values: Values | None
    ) -> Generator[Work[Any], Any, tuple[list[Tensor], ReducerState]]:
        groups, joined = self._groups(like), JoinedComm(comm, self.limit_bytes(like))
        assert len(groups) == len(state.buckets), "the state was made for another list of tensors"
        ends: list[Tensor] = []  # the extremes of each bucket

        def start(group: list[int], bucket: BucketState) -> Task[tuple[Tensor, BucketState, Tensor | None]]:
            packed = self._pack(group, like, values)
            if not self.compressor.passes_nonfinite:
                ends.append(extremes(packed))
            return Task(self._bucket(packed, bucket, joined))

        tasks = [start(group, bucket) for group, bucket in zip(groups, state.buckets, strict=True)]
        joined.flush()
        flags = None
        if ends:
            bad = torch.stack(ends).isfinite().all().logical_not()
            flags = comm.all_to_all(bad.to(torch.uint8).expand(len(comm.members), 1))
        # Round robin in a fixed order: while one bucket waits for its second message the others' first are under way.
        while unfinished := [task for task in tasks if task.pending is not None]:
            for task in unfinished:
                assert task.pending is not None
                task.resume((yield task.pending))
            joined.flush()
            yield ALL_SENT
        if flags is not None and not (told := (yield flags)).is_meta and told.any():
            raise NonFinite([rank for rank, flag in zip(comm.members, told[:, 0].tolist(), strict=True) if flag])
        means, results = list(like), [task.result() for task in tasks]
        for group, (mean, *_) in zip(groups, results, strict=True):
            for i, piece in zip(group, unflatten(mean.reshape(-1), [like[i] for i in group]), strict=True):
                means[i] = piece
        return means, ReducerState(_remembered(state.buckets, results))

    def _bucket(
        self, x: Tensor, state: BucketState, comm: Comm
    ) -> Generator[Work[Any], Any, tuple[Tensor, BucketState, Tensor | None]]:
        """The estimate, the new state, and what must be finite for that to be good."""
        wanted, kept = self.feedback.before(x, state.feedback)
        compressor, before = self.compressor, state.compressor
        if is_dense := self.feedback.is_dense(state.feedback):
            compressor, before = Identity(), None
        steps = compressor.mean(wanted, before, comm, self.feedback.wants_sent)
        del x, wanted
        sent, mean, after = yield from steps
        estimate, feedback = self.feedback.after(kept, sent, mean, state.feedback)
        # An infinity that went through would be kept as NaN for good; all see it in the mean.
        watched = self.compressor.passes_nonfinite and not isinstance(self.feedback, NoFeedback)
        ends = extremes(mean) if watched and not mean.is_meta else None
        return estimate, BucketState(state.compressor if is_dense else after, feedback), ends

    def _resync(self, state: ReducerState, comm: Comm) -> Generator[Work[Any], Any, ReducerState]:
        buckets: list[BucketState] = []
        for bucket in state.buckets:
            compressor = yield from self.compressor.resync(bucket.compressor, comm)
            feedback = yield from self.feedback.resync(bucket.feedback, comm)
            buckets.append(BucketState(compressor, feedback))
        return ReducerState(buckets)

    def _groups(self, xs: Sequence[Tensor]) -> list[list[int]]:
        """Which tensors share a bucket: a function of shapes, dtypes and devices only, so equal on all ranks."""
        if self.compressor.elementwise:
            return buckets(xs, self.limit_bytes(xs))
        by_shape: dict[torch.Size, list[int]] = {}
        for i, x in enumerate(xs):
            by_shape.setdefault(x.shape, []).append(i)
        return [
            [alike[i] for i in group]
            for alike in by_shape.values()
            for group in buckets([xs[i] for i in alike], self.limit_bytes(xs))
        ]

    def _pack(self, group: list[int], like: Sequence[Tensor], values: Values | None) -> Tensor:
        """A copy of what is the caller's, since that may change while it is under way."""
        xs = [like[i] for i in group] if values is None else values(group)
        if values is not None and len(xs) == 1:
            return xs[0].reshape(-1) if self.compressor.elementwise else xs[0][None]
        return flatten(xs) if self.compressor.elementwise else torch.stack(xs)


def _remembered(old: list[BucketState], results: list[tuple[Tensor, BucketState, Tensor | None]]) -> list[BucketState]:
    """The new states of the buckets, but the old ones where the new one is no good; asks the device once."""
    ends = [x for _, _, x in results if x is not None]
    good = torch.stack(ends).isfinite().all(1).tolist() if ends else [True] * len(results)
    return [new if fine else kept for kept, (_, new, _), fine in zip(old, results, good, strict=True)]
