"""The tokens of many documents as one sequence, in memory or mapped from files."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lowcomm.data.tokenizer import Tokenizer

Tokens = NDArray[Any]  # [num_tokens], unsigned integers
Ints = NDArray[np.int64]
Mask = NDArray[np.bool_]

_DOCUMENTS_AT_ONCE = 256


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    """The narrower of uint16 and uint32 that holds every id, little-endian."""
    return np.dtype("<u2") if vocab_size <= 1 << 16 else np.dtype("<u4")


@dataclass(frozen=True, eq=False)
class Corpus:
    """Documents one after the other, each followed by its separator. Choosing some of them copies no tokens.

    Attributes:
        arrays: where the tokens lie.
        pieces: [num_pieces, 3], rows of (start in this corpus, index into ``arrays``, start in that array).
        document_ends: [num_documents], the position after each document's separator.
        text_byte_ends: [num_documents], bytes of text (UTF-8, without separators) up to the end of each document.
        vocab_size: one more than the largest id possible.
        fingerprint: differs between corpora that differ.
    """

    arrays: tuple[Tokens, ...]
    pieces: Ints
    document_ends: Ints
    text_byte_ends: Ints
    vocab_size: int
    fingerprint: str

    @property
    def num_tokens(self) -> int:
        """All tokens, separators included."""
        return int(self.document_ends[-1])

    @property
    def num_documents(self) -> int:
        """Documents, at least one."""
        return len(self.document_ends)

    @property
    def num_text_bytes(self) -> int:
        """UTF-8 bytes of all documents."""
        return int(self.text_byte_ends[-1])

    @property
    def bytes_per_token(self) -> float:
        """Bytes of text for each token, separators counted as tokens."""
        return self.num_text_bytes / self.num_tokens

    @cached_property
    def _piece_starts(self) -> Ints:
        return np.ascontiguousarray(self.pieces[:, 0])

    def read(self, start: int, stop: int) -> Ints:
        """Tokens ``start`` to ``stop`` as a fresh array."""
        assert 0 <= start <= stop <= self.num_tokens, (start, stop, self.num_tokens)
        tokens = np.empty(stop - start, np.int64)
        at, piece = start, int(np.searchsorted(self._piece_starts, start, side="right")) - 1
        while at < stop:
            piece_start, array, array_start = self.pieces[piece].tolist()
            piece_stop = int(self._piece_starts[piece + 1]) if piece + 1 < len(self.pieces) else self.num_tokens
            upto, offset = min(stop, piece_stop), array_start - piece_start
            tokens[at - start : upto - start] = self.arrays[array][at + offset : upto + offset]
            at, piece = upto, piece + 1
        return tokens

    def select(self, chosen: Mask) -> Corpus:
        """The documents for which ``chosen`` [num_documents] is True, at least one, in order."""
        assert chosen.shape == (self.num_documents,)
        assert chosen.any()
        document_starts = np.concatenate([[0], self.document_ends[:-1]])
        edges = np.diff(np.concatenate([[False], chosen, [False]]).astype(np.int8))
        run_starts = document_starts[edges[:-1] == 1]
        run_ends = self.document_ends[edges[1:] == -1]
        new_run_starts = np.cumsum(run_ends - run_starts) - (run_ends - run_starts)
        # a new piece begins with every run, and wherever an old piece begins inside a run
        cuts = np.union1d(run_starts, self._piece_starts)
        runs = np.searchsorted(run_starts, cuts, side="right") - 1
        inside = (runs >= 0) & (cuts < run_ends[runs])
        cuts, runs = cuts[inside], runs[inside]
        old = self.pieces[np.searchsorted(self._piece_starts, cuts, side="right") - 1]
        pieces = np.stack([new_run_starts[runs] + cuts - run_starts[runs], old[:, 1], old[:, 2] + cuts - old[:, 0]], 1)
        return Corpus(
            arrays=self.arrays,
            pieces=pieces,
            document_ends=np.cumsum((self.document_ends - document_starts)[chosen]),
            text_byte_ends=np.cumsum(np.diff(self.text_byte_ends, prepend=0)[chosen]),
            vocab_size=self.vocab_size,
            fingerprint=digest(self.fingerprint.encode(), np.packbits(chosen).tobytes()),
        )


def join(
    arrays: Sequence[Tokens],
    document_ends: Sequence[NDArray[Any]],
    text_byte_ends: Sequence[NDArray[Any]],
    vocab_size: int,
    fingerprint: str,
) -> Corpus:
    """One corpus of several arrays, each with the ends of its own documents counted from its own start."""
    sizes = [len(array) for array in arrays]
    starts = list(itertools.accumulate(sizes, initial=0))[:-1]
    text_starts = list(itertools.accumulate((int(ends[-1]) for ends in text_byte_ends), initial=0))
    return Corpus(
        arrays=tuple(arrays),
        pieces=np.array([(start, i, 0) for i, start in enumerate(starts)], np.int64),
        document_ends=np.concatenate(
            [np.asarray(ends, np.int64) + s for ends, s in zip(document_ends, starts, strict=True)]
        ),
        text_byte_ends=np.concatenate(
            [np.asarray(e, np.int64) + s for e, s in zip(text_byte_ends, text_starts[:-1], strict=True)]
        ),
        vocab_size=vocab_size,
        fingerprint=fingerprint,
    )


def tokenize(documents: Iterable[str], tokenizer: Tokenizer, max_tokens: int | None = None) -> Corpus:
    """The tokens of all documents, in memory; with ``max_tokens``, of the first documents that have so many, whole.

    Raises:
        ValueError: when there is no document.
    """
    arrays: list[Tokens] = []
    byte_counts: list[int] = []
    num_tokens = 0
    for tokens, num_text_bytes in encode_documents(documents, tokenizer):
        arrays.append(tokens)
        byte_counts.append(num_text_bytes)
        num_tokens += len(tokens)
        if max_tokens is not None and num_tokens >= max_tokens:
            break
    if not arrays:
        raise ValueError("there is no document in the source to tokenise; check its paths and split")
    tokens = np.concatenate(arrays)
    ends = np.cumsum([len(array) for array in arrays], dtype=np.int64)
    fingerprint = digest(tokenizer.fingerprint.encode(), tokens.data, ends.data)
    return join([tokens], [ends], [np.cumsum(byte_counts)], tokenizer.vocab_size, fingerprint)


def encode_documents(documents: Iterable[str], tokenizer: Tokenizer) -> Iterator[tuple[Tokens, int]]:
    """For each document its tokens, the separator last, in the dtype of `token_dtype`, and its bytes of text."""
    dtype, separator = token_dtype(tokenizer.vocab_size), tokenizer.separator
    pending = iter(documents)
    while texts := list(itertools.islice(pending, _DOCUMENTS_AT_ONCE)):
        for text, ids in zip(texts, tokenizer.encode_batch(texts), strict=True):
            tokens = np.empty(len(ids) + 1, dtype)
            tokens[:-1], tokens[-1] = ids, separator
            yield tokens, len(text.encode())


def digest(*parts: bytes | memoryview) -> str:
    """A 128-bit hash of the bytes, in hexadecimal."""
    hashed = hashlib.blake2b(digest_size=16)
    for part in parts:
        hashed.update(part)
    return hashed.hexdigest()
