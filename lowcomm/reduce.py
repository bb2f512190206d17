"""Averages a list of tensors over replicas: feedback around a compressor, bucket by bucket."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from lowcomm.comm.base import Comm, Task, Work
from lowcomm.compress.base import Compressor
from lowcomm.compress.identity import Identity
from lowcomm.feedback.base import Feedback
from lowcomm.feedback.none import NoFeedback
from lowcomm.tensors import buckets, flatten, unflatten


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
            lists need few messages and the first is under way while the next is packed.
    """

    compressor: Compressor = Identity()
    feedback: Feedback = NoFeedback()
    bucket_bytes: int = 32 * 2**20

    def __post_init__(self) -> None:
        if self.bucket_bytes < 1:
            raise ValueError(f"Reducer(bucket_bytes={self.bucket_bytes}): it must be at least 1; the default is 32 MiB")

    def init(self, like: Sequence[Tensor]) -> ReducerState:
        """The state before the first round for lists shaped like ``like``."""
        packed = [self._pack([like[i] for i in group]) for group in self._groups(like)]
        return ReducerState([BucketState(self.compressor.init(x), self.feedback.init(x)) for x in packed])

    def mean(self, xs: Sequence[Tensor], state: ReducerState, comm: Comm) -> Task[tuple[list[Tensor], ReducerState]]:
        """Start averaging ``xs``; the Task's result is the means, shaped like ``xs``, and the new state.

        ``xs`` is read before this returns and neither it nor ``state`` is modified: a round that fails costs nothing.
        Means are equal on all ranks, bit for bit.
        """
        return Task(self._mean(xs, state, comm))

    def _mean(
        self, xs: Sequence[Tensor], state: ReducerState, comm: Comm
    ) -> Generator[Work[Any], Any, tuple[list[Tensor], ReducerState]]:
        groups = self._groups(xs)
        assert len(groups) == len(state.buckets), "the state was made for another list of tensors"
        tasks = [
            Task(self._bucket(self._pack([xs[i] for i in group]), bucket, comm))
            for group, bucket in zip(groups, state.buckets, strict=True)
        ]
        # Round robin in a fixed order: while one bucket waits for its second message the others' first are under way.
        while unfinished := [task for task in tasks if task.pending is not None]:
            for task in unfinished:
                assert task.pending is not None
                task.resume((yield task.pending))
        means: list[Tensor] = list(xs)
        for group, task in zip(groups, tasks, strict=True):
            mean, _ = task.result()
            for i, piece in zip(group, unflatten(mean.reshape(-1), [xs[i] for i in group]), strict=True):
                means[i] = piece
        return means, ReducerState([task.result()[1] for task in tasks])

    def _bucket(
        self, x: Tensor, state: BucketState, comm: Comm
    ) -> Generator[Work[Any], Any, tuple[Tensor, BucketState]]:
        corrected = self.feedback.before(x, state.feedback)
        sent, mean, compressor = yield from self.compressor.mean(corrected, state.compressor, comm)
        mean, feedback = self.feedback.after(x, sent, mean, state.feedback)
        return mean, BucketState(compressor, feedback)

    def _groups(self, xs: Sequence[Tensor]) -> list[list[int]]:
        """Which tensors share a bucket: a function of shapes, dtypes and devices only, so equal on all ranks."""
        return buckets(xs, self.bucket_bytes) if self.compressor.elementwise else [[i] for i in range(len(xs))]

    def _pack(self, xs: list[Tensor]) -> Tensor:
        """A copy, since ``xs`` may change while it is under way."""
        return flatten(xs) if self.compressor.elementwise else xs[0].clone()
