"""Averages a list of tensors over replicas: feedback around a compressor, bucket by bucket."""

from __future__ import annotations

from collections.abc import Generator, Sequence
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
from lowcomm.tensors import buckets, flatten, unflatten

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
            shapes, tensors of one shape are stacked up to this size.
    """

    compressor: Compressor = Identity()
    feedback: Feedback = NoFeedback()
    bucket_bytes: int = 32 * 2**20

    def __post_init__(self) -> None:
        if self.bucket_bytes < 1:
            raise ValueError(f"Reducer(bucket_bytes={self.bucket_bytes}): it must be at least 1; the default is 32 MiB")
        if self.feedback.keeps_mean and not self.compressor.divides_by_all():
            raise ValueError(
                f"{self.feedback} keeps the mean of what all ranks sent, but that of {self.compressor} is over those "
                "that sent a place; take divide_by='all', or EF14"
            )

    def init(self, like: Sequence[Tensor]) -> ReducerState:
        """The state before the first round for lists shaped like ``like``."""
        packed = [self._pack([like[i] for i in group]) for group in self._groups(like)]
        return ReducerState([BucketState(self.compressor.init(x), self.feedback.init(x)) for x in packed])

    def mean(self, xs: Sequence[Tensor], state: ReducerState, comm: Comm) -> Task[tuple[list[Tensor], ReducerState]]:
        """Start averaging ``xs``; the Task's result is the means, shaped like ``xs``, and the new state.

        ``xs`` is read before this returns and neither it nor ``state`` is modified: a round that fails costs nothing.
        Means are equal on all ranks, bit for bit.

        Raises:
            NonFinite: from the Task, on all ranks, when a rank's values are not finite and the compressor could not
                carry that; nothing of such values was sent.
        """
        return Task(self._mean(xs, state, comm))

    def resync(self, state: ReducerState, comm: Comm) -> Task[ReducerState]:
        """The state to go on with among new members: what members share is made anew from what each has.

        All members call it, those that came fresh with `init`'s state. Compressors' states are rank ``members[0]``'s.
        """
        return Task(self._resync(state, comm))

    def _mean(
        self, xs: Sequence[Tensor], state: ReducerState, comm: Comm
    ) -> Generator[Work[Any], Any, tuple[list[Tensor], ReducerState]]:
        groups = self._groups(xs)
        assert len(groups) == len(state.buckets), "the state was made for another list of tensors"
        packed = [self._pack([xs[i] for i in group]) for group in groups]
        joined, flags = JoinedComm(comm, self.bucket_bytes), None
        if packed and not self.compressor.passes_nonfinite:
            bad = torch.stack([~x.isfinite().all() for x in packed]).any()
            packed = [torch.where(bad, torch.zeros_like(x), x) for x in packed]
            # Directly and before the values, behind which it would stand in line, step by step in a ring.
            flags = comm.all_to_all(bad.to(torch.uint8).expand(len(comm.members), 1))
        tasks = [Task(self._bucket(x, bucket, joined)) for x, bucket in zip(packed, state.buckets, strict=True)]
        joined.flush()
        if flags is not None and not (told := (yield flags)).is_meta and told.any():
            for task in tasks:  # what is under way must come to its end
                if task.pending is not None:
                    yield task.pending
            raise NonFinite([rank for rank, flag in zip(comm.members, told[:, 0].tolist(), strict=True) if flag])
        # Round robin in a fixed order: while one bucket waits for its second message the others' first are under way.
        while unfinished := [task for task in tasks if task.pending is not None]:
            for task in unfinished:
                assert task.pending is not None
                task.resume((yield task.pending))
            joined.flush()
            yield ALL_SENT
        means: list[Tensor] = list(xs)
        for group, task in zip(groups, tasks, strict=True):
            mean, _ = task.result()
            for i, piece in zip(group, unflatten(mean.reshape(-1), [xs[i] for i in group]), strict=True):
                means[i] = piece
        return means, ReducerState([task.result()[1] for task in tasks])

    def _bucket(
        self, x: Tensor, state: BucketState, comm: Comm
    ) -> Generator[Work[Any], Any, tuple[Tensor, BucketState]]:
        corrected, compressor = self.feedback.before(x, state.feedback), state.compressor
        if self.feedback.is_dense(state.feedback):
            sent, mean, _ = yield from Identity().mean(corrected, None, comm)
        else:
            sent, mean, compressor = yield from self.compressor.mean(corrected, compressor, comm)
        estimate, feedback = self.feedback.after(x, sent, mean, state.feedback)
        if self._would_remember_nan(mean):
            return estimate, state
        return estimate, BucketState(compressor, feedback)

    def _would_remember_nan(self, mean: Tensor) -> bool:
        """Whether an infinity went through, of which a feedback would keep NaN for good; all see it in the mean."""
        keeps = self.compressor.passes_nonfinite and not isinstance(self.feedback, NoFeedback)
        return keeps and not mean.is_meta and not bool(mean.isfinite().all())

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
            return buckets(xs, self.bucket_bytes)
        by_shape: dict[torch.Size, list[int]] = {}
        for i, x in enumerate(xs):
            by_shape.setdefault(x.shape, []).append(i)
        return [
            [alike[i] for i in group]
            for alike in by_shape.values()
            for group in buckets([xs[i] for i in alike], self.bucket_bytes)
        ]

    def _pack(self, xs: list[Tensor]) -> Tensor:
        """A copy, since ``xs`` may change while it is under way."""
        return flatten(xs) if self.compressor.elementwise else torch.stack(xs)
