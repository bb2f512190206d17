"""Batches of windows: shuffled, one share for each replica, resumable at any batch.

A window is ``seq_len + 1`` tokens: inputs ``[:-1]`` and targets ``[1:]``. Consecutive windows overlap by one token, so
every token is a target once, except the very first and those after the last whole window.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from lowcomm.data.corpus import Corpus
from lowcomm.tensors import rng

Split = Literal["windows", "documents"]


class TokenStream(ABC):
    """An endless stream of batches for one replica."""

    @abstractmethod
    def next(self) -> Tensor:
        """The next batch, int64 on the CPU, [batch_size, seq_len + 1]."""

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """Where the stream stands."""

    @abstractmethod
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where `state_dict` was taken; ValueError when it was taken from a stream over other data."""


class WindowStream(TokenStream):
    """The windows of a corpus, permuted anew every epoch, in equal shares for the replicas.

    Window i of batch b of replica r is number ``(b * num_replicas + r) * batch_size + i`` of the epoch's permutation:
    one replica with ``num_replicas`` times the batch would see the same windows at the same step. Windows that do not
    fill a batch on every replica are dropped; the next epoch drops others.

    The state is the number of batches taken, the same on all replicas. A newcomer may load any other's. The number of
    replicas and the batch size may change at a restart if their product stays.

    Args:
        purpose: sets the permutations apart from those of other streams with this seed.
    """

    def __init__(
        self,
        corpus: Corpus,
        seq_len: int,
        batch_size: int,
        seed: int,
        replica: int = 0,
        num_replicas: int = 1,
        purpose: tuple[str | int, ...] = (),
    ) -> None:
        check_share(seq_len, batch_size, replica, num_replicas)
        self._corpus, self._seq_len, self._batch_size, self._seed = corpus, seq_len, batch_size, seed
        self._replica, self._num_replicas, self._purpose = replica, num_replicas, purpose
        self._batches_per_epoch = num_windows(corpus, seq_len) // (batch_size * num_replicas)
        if self._batches_per_epoch == 0:
            raise ValueError(
                f"the training text has {corpus.num_tokens} tokens, but one batch of {batch_size} windows of {seq_len} "
                f"on each of {num_replicas} replicas takes {batch_size * num_replicas * seq_len + 1}; "
                "lower batch_size or seq_len, or give more text"
            )
        self._num_batches = 0
        self._epoch, self._share = 0, self._permute(0)

    def _permute(self, epoch: int) -> Tensor:
        """This replica's windows of an epoch, [batches_per_epoch, batch_size]."""
        generator = rng(self._seed, "epoch", epoch, *self._purpose)
        order = torch.randperm(num_windows(self._corpus, self._seq_len), generator=generator)
        shape = (self._batches_per_epoch, self._num_replicas, self._batch_size)
        return order[: shape[0] * shape[1] * shape[2]].view(shape)[:, self._replica].clone()

    def next(self) -> Tensor:
        epoch, batch = divmod(self._num_batches, self._batches_per_epoch)
        if epoch != self._epoch:
            self._epoch, self._share = epoch, self._permute(epoch)
        starts = (self._share[batch] * self._seq_len).tolist()
        windows = np.stack([self._corpus.read(start, start + self._seq_len + 1) for start in starts])
        self._num_batches += 1
        return torch.from_numpy(windows)

    def state_dict(self) -> dict[str, Any]:
        return {"num_batches": self._num_batches, **self._identity()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        check_identity(self._identity(), state)
        self._num_batches = int(state["num_batches"])

    def _identity(self) -> dict[str, Any]:
        return {
            "fingerprint": self._corpus.fingerprint,
            "seq_len": self._seq_len,
            "windows_per_step": self._batch_size * self._num_replicas,
            "seed": self._seed,
        }


def window_stream(
    corpus: Corpus, split: Split, seq_len: int, batch_size: int, seed: int, replica: int, num_replicas: int
) -> WindowStream:
    """One replica's stream.

    "windows": all replicas draw from one permutation of the whole corpus (iid). "documents": each replica shuffles the
    windows of its own contiguous group of documents (non-iid); epochs end when the own group does.

    Raises:
        ValueError: on every replica alike, when any of them would get no whole batch.
    """
    check_share(seq_len, batch_size, replica, num_replicas)
    if split == "windows":
        return WindowStream(corpus, seq_len, batch_size, seed, replica, num_replicas)
    bounds = document_groups(corpus, num_replicas)
    ends = np.concatenate([[0], corpus.document_ends])[bounds]
    smallest = int(np.diff(ends).min())
    needed = batch_size * seq_len + 1
    if smallest < needed:
        raise ValueError(
            f"{corpus.num_documents} documents cut in {num_replicas} groups leave {smallest} tokens in the smallest, "
            f"but a batch of {batch_size} windows of {seq_len} takes {needed}; lower batch_size, seq_len or the number "
            "of replicas, or give more and shorter documents"
        )
    own = np.zeros(corpus.num_documents, np.bool_)
    own[bounds[replica] : bounds[replica + 1]] = True
    return WindowStream(corpus.select(own), seq_len, batch_size, seed, purpose=("replica", replica))


def document_groups(corpus: Corpus, num_groups: int) -> list[int]:
    """Bounds ``[0, ..., num_documents]`` of contiguous groups with about equally many tokens, none empty.

    Each bound is the end of a document nearest to an equal share, so a document longer than a share unbalances them.

    Raises:
        ValueError: when there are fewer documents than groups.
    """
    num_documents = corpus.num_documents
    if num_documents < num_groups:
        raise ValueError(
            f"{num_documents} documents cannot be split over {num_groups} replicas, each needs one; "
            'use split="windows", fewer replicas, or a source with more documents (Files has a separator)'
        )
    bounds = [0]
    for group in range(1, num_groups):
        target = corpus.num_tokens * group / num_groups
        after = int(np.searchsorted(corpus.document_ends, target))  # the first document that ends there or later
        before = int(corpus.document_ends[after - 1]) if after else 0
        nearest = after if target - before < corpus.document_ends[after] - target else after + 1
        bounds.append(min(max(nearest, bounds[-1] + 1), num_documents - (num_groups - group)))
    return [*bounds, num_documents]


def num_windows(corpus: Corpus, seq_len: int) -> int:
    """Whole windows of ``seq_len`` targets."""
    return (corpus.num_tokens - 1) // seq_len


def check_share(seq_len: int, batch_size: int, replica: int, num_replicas: int) -> None:
    """Raises ValueError for a share of the data that no replica can have."""
    if seq_len < 1 or batch_size < 1:
        raise ValueError(f"seq_len is {seq_len} and batch_size {batch_size}; both must be at least 1")
    if not 0 <= replica < num_replicas:
        raise ValueError(f"replica is {replica}; with {num_replicas} replicas it must lie in 0..{num_replicas - 1}")


def check_identity(mine: Mapping[str, Any], state: Mapping[str, Any]) -> None:
    """Raises ValueError when a stream's state was taken from a stream with another identity."""
    other = {key: (state.get(key), value) for key, value in mine.items() if state.get(key) != value}
    if other:
        difference = ", ".join(f"{key} {theirs!r} there and {ours!r} here" for key, (theirs, ours) in other.items())
        raise ValueError(
            f"the saved position belongs to another stream of tokens: {difference}; "
            "resume with the data and batch settings of the first run"
        )
