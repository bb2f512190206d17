"""Tokenizers: the interface, and bytes."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray


class Tokenizer(ABC):
    """Turns a document into token ids.

    How many bytes a token stands for may depend on the text, so a `Corpus` counts both; see `Corpus.bytes_per_token`.
    """

    @property
    @abstractmethod
    def vocab_size(self) -> int:
        """One more than the largest id that `encode` or `separator` can give."""

    @property
    @abstractmethod
    def separator(self) -> int:
        """The id put after each document."""

    @property
    @abstractmethod
    def fingerprint(self) -> str:
        """32 hexadecimal digits, equal for tokenizers that encode alike."""

    @abstractmethod
    def encode(self, text: str) -> NDArray[Any]:
        """The ids of ``text`` without a separator, as a 1-d array of unsigned integers."""

    def encode_batch(self, texts: list[str]) -> list[NDArray[Any]]:
        return [self.encode(text) for text in texts]

    def num_bytes(self, ids: NDArray[Any]) -> int | None:
        """Bytes of the text that ``ids``, none a separator, were made from; None when the ids alone do not tell."""
        return None


@dataclass(frozen=True)
class Bytes(Tokenizer):
    """UTF-8 bytes: 256 ids and nothing to train. Documents end with a zero byte, which text hardly ever holds."""

    @property
    def vocab_size(self) -> int:
        return 256

    @property
    def separator(self) -> int:
        return 0

    @property
    def fingerprint(self) -> str:
        return b"lowcomm bytes 1\0".hex()

    def encode(self, text: str) -> NDArray[Any]:
        return np.frombuffer(text.encode(), np.uint8)

    def num_bytes(self, ids: NDArray[Any]) -> int:
        return len(ids)
