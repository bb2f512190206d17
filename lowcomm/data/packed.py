"""Batches from a source too large to hold: read, tokenised and packed during training."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lowcomm.data.corpus import Ints, digest
from lowcomm.data.source import Source
from lowcomm.data.stream import TokenStream, check_identity, check_share
from lowcomm.data.tokenizer import Tokenizer
from lowcomm.data.validation import is_held_out, num_held_out


class PackedStream(TokenStream):
    """Every ``num_replicas``-th document of a source, packed end to end into windows in the source's own order.

    Nothing is shuffled: a source in a telling order should be shuffled where it is stored. Every replica reads all
    documents and tokenises its own. When a pass is over the next begins at once; tokens that fill no batch are carried
    over into it, so every token but the first is a target once each pass.

    The state holds the source's position and the tokens read but not yet used: at most a batch and a document.

    Args:
        held_out: the fraction of documents left for validation, see `is_held_out`.
    """

    def __init__(
        self,
        source: Source,
        tokenizer: Tokenizer,
        seq_len: int,
        batch_size: int,
        replica: int = 0,
        num_replicas: int = 1,
        held_out: float = 0.0,
    ) -> None:
        check_share(seq_len, batch_size, replica, num_replicas)
        self._source, self._tokenizer, self._seq_len, self._batch_size = source, tokenizer, seq_len, batch_size
        self._replica, self._num_replicas, self._held_out = replica, num_replicas, held_out
        self._cursor = source.cursor()
        self._pending: list[Ints] = []  # tokens read and not yet a batch's targets, and the one before them
        self._num_dealt = 0  # documents taken in this pass

    @property
    def fingerprint(self) -> str:
        """Differs between streams of other documents or tokens; equal on all replicas."""
        return stream_fingerprint(self._source, self._tokenizer, self._held_out)

    def next(self) -> Tensor:
        size = self._batch_size * self._seq_len + 1
        num_pending = sum(map(len, self._pending))
        while num_pending < size:
            self._pending.append(self._next_document())
            num_pending += len(self._pending[-1])
        tokens = np.concatenate(self._pending)
        self._pending = [tokens[size - 1 :]]
        windows = np.lib.stride_tricks.sliding_window_view(tokens[:size], self._seq_len + 1)[:: self._seq_len]
        return torch.from_numpy(windows.copy())

    def _next_document(self) -> Ints:
        """The tokens of this replica's next document, from the next pass when this one is over."""
        while True:
            index = self._cursor.state_dict()["num_documents"]
            try:
                text = next(self._cursor)
            except StopIteration:
                if self._num_dealt == 0:
                    raise ValueError(
                        f"{self._source} has {index} documents, none of them for replica {self._replica} of "
                        f"{self._num_replicas}; use fewer replicas or a source with more documents"
                    ) from None
                self._cursor, self._num_dealt = self._source.cursor(), 0
                continue
            if is_held_out(index, self._held_out):
                continue
            if (index - num_held_out(index, self._held_out)) % self._num_replicas == self._replica:
                self._num_dealt += 1
                return np.append(self._tokenizer.encode(text).astype(np.int64), self._tokenizer.separator)

    def state_dict(self) -> dict[str, Any]:
        pending = np.concatenate([np.empty(0, np.int64), *self._pending])
        return {
            "cursor": self._cursor.state_dict(),
            "pending": torch.from_numpy(pending),
            "num_dealt": self._num_dealt,
            **self._identity(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        check_identity(self._identity(), state)
        self._cursor = self._source.cursor(state["cursor"])
        self._pending = [state["pending"].numpy().copy()]
        self._num_dealt = int(state["num_dealt"])

    def _identity(self) -> dict[str, Any]:
        return {"fingerprint": self.fingerprint, "replica": self._replica, "num_replicas": self._num_replicas}


def stream_fingerprint(source: Source, tokenizer: Tokenizer, held_out: float) -> str:
    """Stands for the tokens of a streamed source without reading them."""
    return digest(f"{source.identity()}\0{tokenizer.fingerprint}\0{held_out}".encode())
