"""Averages lists of tensors over replicas, bucket by bucket, through a feedback and a compressor."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from copy import deepcopy
from dataclasses import dataclass
from math import inf
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

    def arrival(
        self, like: Sequence[Tensor], state: ReducerState, comm: Comm, values: Values | None = None
    ) -> Task[Arrived]:
        """As `mean`, but the Task ends when all messages are here, and `Arrived.commit` makes the means of them.

        With a feedback, it is told by each rank whether its values are finite, whatever the compressor.
        """
        return Task(self._arrival(like, state, comm, values, not isinstance(self.feedback, NoFeedback)))

    def resync(self, state: ReducerState, comm: Comm) -> Task[ReducerState]:
        """The state for new members: what members share is rebuilt.

        All members call it; new ones pass `init`'s state. Compressors' states come from rank ``members[0]``.
        """
        return Task(self._resync(state, comm))

    def _mean(
        self, like: Sequence[Tensor], state: ReducerState, comm: Comm, values: Values | None
    ) -> Generator[Work[Any], Any, tuple[list[Tensor], ReducerState]]:
        return (yield from self._arrival(like, state, comm, values)).commit()

    def _arrival(
        self, like: Sequence[Tensor], state: ReducerState, comm: Comm, values: Values | None, asks: bool = False
    ) -> Generator[Work[Any], Any, Arrived]:
        groups, joined = self._groups(like), JoinedComm(comm, self.limit_bytes(like))
        assert len(groups) == len(state.buckets), "the state was made for another list of tensors"
        ends: list[Tensor] = []  # the extremes of each bucket

        def start(group: list[int], bucket: BucketState) -> _Bucket:
            packed = self._pack(group, like, values)
            if asks or not self.compressor.passes_nonfinite:
                ends.append(extremes(packed))
            return self._start(packed, bucket, joined)

        started = [start(group, bucket) for group, bucket in zip(groups, state.buckets, strict=True)]
        joined.flush()
        flags = None
        if ends:
            bad = torch.stack(ends).isfinite().all().logical_not()
            flags = comm.all_to_all(bad.to(torch.uint8).expand(len(comm.members), 1))
        # With a feedback the last messages wait for `commit`: what is read of them, sent and mean, is two models large.
        num_read = inf if isinstance(self.feedback, NoFeedback) else self.compressor.num_messages() - 1
        num, tasks = 0, [bucket.task for bucket in started]
        # Round robin in a fixed order: while one bucket waits for its second message the others' first are under way.
        while num <= num_read and (tasks := [task for task in tasks if task.pending is not None]):
            for task in tasks:
                assert task.pending is not None
                if num < num_read:
                    task.resume((yield task.pending))
                else:
                    task.pending = Done((yield task.pending))
            num += 1
            joined.flush()
            yield ALL_SENT
        if flags is not None and not (told := (yield flags)).is_meta and told.any():
            raise NonFinite([rank for rank, flag in zip(comm.members, told[:, 0].tolist(), strict=True) if flag])
        return Arrived(self, list(like), list(zip(groups, started, strict=True)))

    def _start(self, x: Tensor, state: BucketState, comm: Comm) -> _Bucket:
        x = self._wide(x)
        wanted, kept = self.feedback.before(x, state.feedback)
        compressor, before = self.compressor, state.compressor
        if is_dense := self.feedback.is_dense(state.feedback):
            compressor, before = Identity(), None
        steps = compressor.mean(wanted, before, comm, self.feedback.wants_sent)
        del x, wanted
        return _Bucket(Task(steps), kept, state, is_dense)

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


@dataclass
class _Bucket:
    """A bucket under way.

    Attributes:
        task: the compressor's.
        kept: what the feedback will need.
        state: that before the round.
        is_dense: whether it goes uncompressed.
    """

    task: Task[tuple[Tensor, Tensor, Any]]
    kept: Any
    state: BucketState
    is_dense: bool


@dataclass
class Arrived:
    """An average whose messages are all here. Nothing has changed yet.

    Attributes:
        reducer: whose average it is.
        like: shapes of the means.
        buckets: the places of each bucket, and what came; in order.
    """

    reducer: Reducer
    like: list[Tensor]
    buckets: list[tuple[list[int], _Bucket]]

    def commit(self, in_place: bool = False) -> tuple[list[Tensor], ReducerState]:
        """The means and the new state, bucket by bucket; to be called once.

        Args:
            in_place: move the feedback's memories where they lie, rather than copies: saves as much memory as they
                take, and the old state is gone.
        """
        means, states = list(self.like), list[BucketState]()
        self.buckets.reverse()
        while self.buckets:
            group, bucket = self.buckets.pop()
            mean, state = self._moved(bucket, in_place)
            states.append(state)
            mean = mean.reshape(-1).to(self.like[group[0]].dtype)
            for i, piece in zip(group, unflatten(mean, [self.like[i] for i in group]), strict=True):
                means[i] = piece
            del bucket, mean
        return means, ReducerState(states)

    def _moved(self, bucket: _Bucket, in_place: bool) -> tuple[Tensor, BucketState]:
        sent, mean, compressor = bucket.task.result()
        feedback, before = self.reducer.feedback, bucket.state
        # An infinity that went through would be kept as NaN for good; all see it in the mean.
        watched = self.reducer.compressor.passes_nonfinite and not isinstance(feedback, NoFeedback)
        is_finite = not watched or mean.is_meta or all(extremes(mean).isfinite().tolist())
        memory = before.feedback if in_place and is_finite else deepcopy(before.feedback)
        estimate, memory = feedback.after(bucket.kept, sent, mean, memory)
        if not is_finite:
            return estimate, before
        return estimate, BucketState(before.compressor if bucket.is_dense else compressor, memory)
