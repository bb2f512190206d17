"""Averages lists of tensors over replicas, bucket by bucket, through a feedback and a compressor."""

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
from lowcomm.tensors import buckets, extremes, flatten, joined, num_bytes, unflatten

# What to average at some places of a list, as fresh tensors, which are then the reducer's: asked once for each bucket.
Values = Callable[[Sequence[int]], list[Tensor]]
# From 32 MiB on glibc maps memory anew for each, which costs more than the arithmetic; but each bucket costs about a
# millisecond of Python, which GPUs notice: many times, where a model is large.
BUCKET_BYTES, _MOST_BUCKETS = 31 * 2**20, 16

# What an average pauses at, beside its messages, when the next message of every bucket is on its way.
ALL_SENT: Work[None] = Done(None)


class NonFinite(Exception):
    """A rank has an infinity or NaN in a round, or the compressor cannot carry it; raised on all ranks.

    Attributes:
        ranks: those that have one; none when finite values became too large together, or where nobody can tell.
    """

    def __init__(self, ranks: Sequence[int], t: int | None = None) -> None:
        """In the round of step ``t``, if that is known."""
        who = f"ranks {list(ranks)}" if ranks else "other ranks, or a sum of large values,"
        super().__init__(
            f"{who} brought infinite or NaN values to {'a round' if t is None else f'the round of step {t}'}"
        )
        self.ranks = tuple(ranks)


@dataclass
class BucketState:
    """The state of one bucket between rounds."""

    compressor: Any
    feedback: Any


@dataclass
class ReducerState:
    """The state of a list of tensors between rounds, one entry for each bucket."""

    buckets: list[BucketState]


@dataclass(frozen=True)
class Reducer:
    """Averages lists of tensors over the members of a Comm.

    Attributes:
        compressor: what of each bucket is sent.
        feedback: what becomes of the compression error.
        bucket_bytes: the largest size of a joined vector; a larger tensor stands alone. Buckets make few messages, and
            one is sent while the next is packed. For compressors that depend on shapes, tensors of one shape are
            stacked up to this size. None: 31 MiB, or a sixteenth of the list if that is more.
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

    def is_exact(self) -> bool:
        """Whether it is the plain mean, in the precision of the values."""
        return isinstance(self.compressor, Identity) and isinstance(self.feedback, NoFeedback)

    def init(self, like: Sequence[Tensor]) -> ReducerState:
        """The state before the first round for lists shaped like ``like``, in float32 or better."""
        packed = (self._wide(self._pack(group, like, None)) for group in self._groups(like))
        return ReducerState([BucketState(self.compressor.init(x), self.feedback.init(x)) for x in packed])

    def mean(
        self, like: Sequence[Tensor], state: ReducerState, comm: Comm, values: Values | None = None
    ) -> Task[tuple[list[Tensor], ReducerState]]:
        """Start averaging; the Task's result is the means, shaped like ``like``, and the new state.

        All inputs are read before this returns. ``like`` and ``state`` are not modified, so a failed round changes
        nothing. Means are bitwise equal on all ranks, in the dtype of the values; but for the plain mean, 16-bit values
        are compressed, and kept, in float32. With ``values``, a round needs little more memory than the means
        and the feedback's state.

        Args:
            values: computes the values bucket by bucket; None: ``like`` itself.

        Raises:
            NonFinite: from the Task, on all ranks, when a rank's values are not finite and the compressor cannot carry
                that.
        """
        return Task(self._mean(like, state, comm, values))

    def resync(self, state: ReducerState, comm: Comm) -> Task[ReducerState]:
        """The state for new members: what members share is rebuilt.

        All members call it; new ones pass `init`'s state. Compressors' states come from rank ``members[0]``.
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
        """The estimate, the new state, and the extremes that must be finite for the state to be kept."""
        dtype, x = x.dtype, self._wide(x)
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
        return estimate.to(dtype), BucketState(state.compressor if is_dense else after, feedback), ends

    def _resync(self, state: ReducerState, comm: Comm) -> Generator[Work[Any], Any, ReducerState]:
        buckets: list[BucketState] = []
        for bucket in state.buckets:
            compressor = yield from self.compressor.resync(bucket.compressor, comm)
            feedback = yield from self.feedback.resync(bucket.feedback, comm)
            buckets.append(BucketState(compressor, feedback))
        return ReducerState(buckets)

    def _groups(self, xs: Sequence[Tensor]) -> list[list[int]]:
        """The tensors of each bucket. Depends only on shapes, dtypes and devices, so it is equal on all ranks."""
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

    def _wide(self, x: Tensor) -> Tensor:
        """What is compressed and kept, of 16-bit values too: a memory in 16 bits stops adding up small values."""
        return x if self.is_exact() else x.to(torch.promote_types(x.dtype, torch.float32))

    def _pack(self, group: list[int], like: Sequence[Tensor], values: Values | None) -> Tensor:
        """A bucket as one tensor. The caller's tensors are copied, as they may change meanwhile."""
        xs = [like[i] for i in group] if values is None else values(group)
        if values is not None and len(xs) == 1:
            return xs[0].reshape(-1) if self.compressor.elementwise else xs[0][None]
        if not self.compressor.elementwise:
            return torch.stack(xs)
        return flatten(xs) if values is None else joined(xs)


def _remembered(old: list[BucketState], results: list[tuple[Tensor, BucketState, Tensor | None]]) -> list[BucketState]:
    """The new bucket states, but the old ones where the new are not finite; waits for the device once."""
    ends = [x for _, _, x in results if x is not None]
    good = torch.stack(ends).isfinite().all(1).tolist() if ends else [True] * len(results)
    return [new if fine else kept for kept, (_, new, _), fine in zip(old, results, good, strict=True)]
