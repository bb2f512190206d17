"""Validation data: documents held out of training, in the same windows on every replica."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from lowcomm.data.corpus import Corpus
from lowcomm.data.stream import num_windows
from lowcomm.data.tokenizer import Tokenizer


@dataclass(frozen=True)
class Validation:
    """What is evaluated, the same on every replica.

    Attributes:
        batches: see `validation_batches`; empty when nothing is held out.
        bytes_per_token: see `bytes_per_target`; NaN when nothing is held out.
    """

    batches: Sequence[Tensor] = ()
    bytes_per_token: float = math.nan


def num_held_out(num_documents: int, fraction: float) -> int:
    """How many of the first ``num_documents`` are held out: their ``fraction``, rounded down."""
    return math.floor(num_documents * fraction)


def is_held_out(index: int, fraction: float) -> bool:
    """Whether document ``index``, from 0, is held out; they are spread evenly, as every 20th is for 0.05."""
    return num_held_out(index + 1, fraction) > num_held_out(index, fraction)


def hold_out(corpus: Corpus, fraction: float) -> tuple[Corpus, Corpus]:
    """The documents to train on and those held out.

    Raises:
        ValueError: when the fraction of the documents is less than one.
    """
    held_out = np.array([is_held_out(index, fraction) for index in range(corpus.num_documents)])
    if not held_out.any():
        raise ValueError(
            f"validation_fraction {fraction} of {corpus.num_documents} documents is not one document; raise it, give "
            "validation a source of its own, use a source with more documents (Files has a separator), or set "
            "validation_fraction to 0 to go without"
        )
    return corpus.select(~held_out), corpus.select(held_out)


def validation_batches(corpus: Corpus, seq_len: int, batch_size: int, max_tokens: int) -> list[Tensor]:
    """The first windows of a corpus with at most ``max_tokens`` targets, as batches int64 [rows, seq_len + 1].

    All batches have the same number of rows, so that the mean of their losses is the mean over tokens: ``batch_size``,
    or all windows when there are fewer than one batch. Windows that fill no batch are left out.

    Raises:
        ValueError: when there is not one window.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}; it must be at least 1")
    available = min(num_windows(corpus, seq_len), max_tokens // seq_len)
    if available < 1:
        raise ValueError(
            f"validation has {corpus.num_tokens} tokens and may use {max_tokens}, but one window of {seq_len} takes "
            f"{seq_len + 1} and counts {seq_len}; give more validation text or a larger max_tokens, or lower seq_len"
        )
    rows = min(batch_size, available)
    starts = range(0, available // rows * rows * seq_len, seq_len)
    windows = np.stack([corpus.read(start, start + seq_len + 1) for start in starts])
    return list(torch.from_numpy(windows.reshape(-1, rows, seq_len + 1)).unbind())


def bytes_per_target(corpus: Corpus, tokenizer: Tokenizer, num_targets: int) -> float:
    """Bytes of text for each of the first ``num_targets`` targets of a corpus, separators counted as tokens.

    Where the tokenizer cannot tell the bytes of tokens, those of a document that is cut are shared out equally.

    Raises:
        ValueError: when the targets hold no text.
    """
    # Target 0 is token 1, so a separator, the token before a document's end, is the target two before it.
    separators = corpus.document_ends[: np.searchsorted(corpus.document_ends, num_targets + 1, side="right")] - 2
    text = np.delete(corpus.read(1, num_targets + 1), separators[separators >= 0])
    num_bytes: float | None = tokenizer.num_bytes(text)
    if num_bytes is None:
        token_ends, byte_ends = ([0, *ends] for ends in (corpus.document_ends, corpus.text_byte_ends))
        first, last = np.interp([1, num_targets + 1], token_ends, byte_ends)
        num_bytes = float(last - first)
    if num_bytes <= 0:
        raise ValueError(
            f"the first {num_targets} tokens of validation hold no text, only ends of documents; take empty documents "
            "out, or raise max_tokens"
        )
    return num_bytes / num_targets


def bits_per_byte(loss: float, bytes_per_token: float) -> float:
    """A mean loss in nats per token as bits per byte of text, which compares across tokenizers."""
    return loss / math.log(2) / bytes_per_token
