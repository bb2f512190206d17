"""Byte-pair encoding, by the `tokenizers` library (Sennrich et al. 2016, arXiv:1508.07909; on bytes as in GPT-2)."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lowcomm.data.source import Source
from lowcomm.data.tokenizer import Tokenizer
from lowcomm.optional import require

END_OF_DOCUMENT = "<|endoftext|>"


@dataclass(frozen=True)
class BPE(Tokenizer):
    """A tokenizer in the JSON form of the `tokenizers` library: one made by `train_bpe`, or any ``tokenizer.json``.

    Truncation, padding and start or end tokens that the file may ask for are switched off. A special token spelled out
    in a document is plain text.

    Attributes:
        path: the JSON file; read at the first use.
        end_of_document: the token put after each document.
    """

    path: str
    end_of_document: str = END_OF_DOCUMENT

    @cached_property
    def _json(self) -> str:
        try:
            return Path(self.path).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(
                f"the tokenizer {self.path} cannot be read ({error}); train_bpe makes one from text"
            ) from error

    @cached_property
    def _tokenizer(self) -> Any:
        tokenizers = require("tokenizers")
        try:
            tokenizer = tokenizers.Tokenizer.from_str(self._json)
        except Exception as error:  # the library raises nothing narrower
            raise ValueError(f"{self.path} is no tokenizer JSON file: {error}") from error
        tokenizer.no_truncation()
        tokenizer.no_padding()
        tokenizer.encode_special_tokens = True
        return tokenizer

    @cached_property
    def vocab_size(self) -> int:
        return 1 + int(max(self._tokenizer.get_vocab().values()))

    @cached_property
    def separator(self) -> int:
        token_id: int | None = self._tokenizer.token_to_id(self.end_of_document)
        if token_id is None:
            raise ValueError(
                f"{self.path} has no token {self.end_of_document!r}; set end_of_document to the one that ends a text"
            )
        return token_id

    @cached_property
    def fingerprint(self) -> str:
        return hashlib.blake2b(f"{self.end_of_document}\0{self._json}".encode(), digest_size=16).hexdigest()

    def encode(self, text: str) -> NDArray[Any]:
        return np.array(self._tokenizer.encode(text, add_special_tokens=False).ids, np.uint32)

    def encode_batch(self, texts: list[str]) -> list[NDArray[Any]]:
        """`encode` of each, on all cores."""
        encoded = self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        return [np.array(one.ids, np.uint32) for one in encoded]

    def num_bytes(self, ids: NDArray[Any]) -> int | None:
        """Known only for byte-level tokenizers that do not change the text, such as `train_bpe`'s."""
        return None if self._token_bytes is None else int(self._token_bytes[ids].sum())

    @cached_property
    def _token_bytes(self) -> NDArray[np.int64] | None:
        """[vocab_size], the bytes of each token."""
        pre_tokenizer = json.loads(self._json).get("pre_tokenizer") or {}
        steps = pre_tokenizer.get("pretokenizers", [pre_tokenizer])
        byte_level = [step for step in steps if step.get("type") == "ByteLevel"]
        if self._tokenizer.normalizer is not None or not byte_level or any(x["add_prefix_space"] for x in byte_level):
            return None
        sizes = np.zeros(self.vocab_size, np.int64)
        for token, token_id in self._tokenizer.get_vocab(with_added_tokens=False).items():
            sizes[token_id] = len(token)  # the alphabet has one character for each byte
        for token_id, added in self._tokenizer.get_added_tokens_decoder().items():
            sizes[token_id] = len(added.content.encode())
        return sizes


def train_bpe(source: Source, vocab_size: int, path: str) -> BPE:
    """Learn a byte-level BPE of at most ``vocab_size`` ids from all documents of ``source`` and write it to ``path``.

    Any text can be encoded: the 256 bytes are tokens. The end-of-document token has the id 0. A short text may have too
    few pairs, and gives a smaller vocabulary.

    Raises:
        ValueError: when ``vocab_size`` is below 257.
    """
    if vocab_size < 257:
        raise ValueError(f"vocab_size is {vocab_size}; 256 bytes and the end of a document need at least 257")
    tokenizers = require("tokenizers")
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_DOCUMENT],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(source.documents(), trainer)
    aside = f"{path}.{os.getpid()}.partial"
    tokenizer.save(aside)
    os.replace(aside, path)
    return BPE(path)
