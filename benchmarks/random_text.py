"""Text of random characters and a tokenizer that maps each to one id: any vocabulary, for measuring speed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from lowcomm.data import Source, Tokenizer
from lowcomm.tensors import rng

# ids count from this character; 50,000 more are all below those that UTF-16 reserves
_FIRST = 0x100
_MAX_VOCAB_SIZE = 50_000


@dataclass(frozen=True)
class RandomText(Source):
    """Documents of uniformly random characters that `Characters` maps to the ids 1 to ``vocab_size`` - 1."""

    vocab_size: int = 32_000
    num_documents: int = 100
    document_tokens: int = 80_000
    seed: int = 0

    def documents(self) -> Iterator[str]:
        for i in range(self.num_documents):
            ids = torch.randint(1, self.vocab_size, (self.document_tokens,), generator=rng(self.seed, "text", i))
            yield (ids.numpy() + _FIRST).astype("<u2").tobytes().decode("utf-16-le")


@dataclass(frozen=True)
class Characters(Tokenizer):
    """One id for each character of `RandomText`; 0 separates documents."""

    size: int = 32_000

    def __post_init__(self) -> None:
        if not 2 <= self.size <= _MAX_VOCAB_SIZE:
            raise ValueError(f"size is {self.size}; it must be at least 2 and at most {_MAX_VOCAB_SIZE}")

    @property
    def vocab_size(self) -> int:
        return self.size

    @property
    def separator(self) -> int:
        return 0

    @property
    def fingerprint(self) -> str:
        return f"{self.size:032x}"

    def encode(self, text: str) -> NDArray[Any]:
        return np.frombuffer(text.encode("utf-16-le"), "<u2") - np.uint16(_FIRST)
