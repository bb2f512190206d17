"""Tokens on disk, tokenised once and mapped into memory: any size, no loading time.

A folder holds the files ``tokens-00000.bin``, ``tokens-00001.bin``, ... Each has a header (`_Header`), then the tokens
as little-endian uint16 or uint32, then zeros up to a multiple of 8 bytes, then two arrays of uint64 with a number for
each document: where its tokens end (with the separator), and where its bytes of text end. Both count from the file's
first document.
"""

from __future__ import annotations

import hashlib
import itertools
import os
import shutil
import struct
from collections.abc import Iterator
from dataclasses import astuple, dataclass, replace
from pathlib import Path

import numpy as np

from lowcomm.data.corpus import Corpus, Tokens, digest, encode_documents, join, token_dtype
from lowcomm.data.source import Origin, Source
from lowcomm.data.tokenizer import Tokenizer

_LAYOUT = struct.Struct("<8sIIQQQQII16s16s")
_HEADER_BYTES = 128
_MAGIC = b"lowcomm\0"
_VERSION = 1


@dataclass(frozen=True)
class _Header:
    magic: bytes
    version: int
    token_bytes: int  # 2 or 4
    num_tokens: int
    num_documents: int
    num_text_bytes: int
    vocab_size: int
    shard: int  # this file's number, from 0
    num_shards: int
    tokenizer: bytes  # fingerprint
    content: bytes  # hash of the tokens

    def pack(self) -> bytes:
        return _LAYOUT.pack(*astuple(self)).ljust(_HEADER_BYTES, b"\0")

    @property
    def ends_at(self) -> int:
        """The byte of the file at which the document ends begin."""
        tokens_end = _HEADER_BYTES + self.num_tokens * self.token_bytes
        return tokens_end + -tokens_end % 8

    @property
    def file_bytes(self) -> int:
        return self.ends_at + 16 * self.num_documents


@dataclass(frozen=True)
class Shards(Origin):
    """A folder written by `write_shards`, as a source.

    Attributes:
        path: the folder.
    """

    path: str

    def is_streamed(self) -> bool:
        """Never: tokens stay on the disk until they are read."""
        return False

    def read(self, tokenizer: Tokenizer) -> Corpus:
        """The whole folder as one corpus, mapped and not loaded.

        Raises:
            ValueError: for a missing, foreign or truncated file, another version of the format, or tokens that another
                tokenizer made.
        """
        paths = sorted(Path(self.path).glob("tokens-*.bin"))
        if not paths:
            raise ValueError(f"{self.path} holds no shards (tokens-*.bin); write_shards makes them")
        headers = [_read_header(path) for path in paths]
        numbers = [header.shard for header in headers]
        if numbers != list(range(headers[0].num_shards)) or len({header.num_shards for header in headers}) > 1:
            raise ValueError(
                f"{self.path} holds the shards {numbers} of {headers[0].num_shards}; copy the folder again, whole"
            )
        for path, header in zip(paths, headers, strict=True):
            if header.tokenizer.hex() != tokenizer.fingerprint:
                raise ValueError(
                    f"{path} was made by a tokenizer with fingerprint {header.tokenizer.hex()}, not {tokenizer} with "
                    f"{tokenizer.fingerprint}; set tokenizer to the one given to write_shards, or write them again"
                )
        tokens = [
            np.memmap(path, f"<u{header.token_bytes}", "r", _HEADER_BYTES, (header.num_tokens,))
            for path, header in zip(paths, headers, strict=True)
        ]
        ends = [
            np.memmap(path, "<u8", "r", header.ends_at, (2, header.num_documents))
            for path, header in zip(paths, headers, strict=True)
        ]
        return join(
            tokens,
            [one[0] for one in ends],
            [one[1] for one in ends],
            headers[0].vocab_size,
            digest(*(header.pack() for header in headers)),
        )


@dataclass(frozen=True)
class ShardsSummary:
    """What `write_shards` wrote."""

    num_shards: int
    num_documents: int
    num_tokens: int
    num_text_bytes: int


def write_shards(source: Source, tokenizer: Tokenizer, out_dir: str, shard_tokens: int = 100_000_000) -> ShardsSummary:
    """Tokenise every document of ``source`` into the new folder ``out_dir``.

    A file ends with the document that brings it to ``shard_tokens``; no document is cut. All is written to another
    folder beside ``out_dir``, which is renamed at the end: so ``out_dir`` is never there in part.

    Raises:
        ValueError: when ``out_dir`` holds anything already, or the source holds no document.
    """
    check_target(out_dir, shard_tokens)
    out = Path(out_dir)
    aside = out.with_name(f"{out.name}.{os.getpid()}.partial")
    aside.mkdir(parents=True)
    try:
        encoded = encode_documents(source.documents(), tokenizer)
        headers: list[_Header] = []
        while (header := _write_shard(_path(aside, len(headers)), encoded, tokenizer, shard_tokens)) is not None:
            headers.append(header)
        if not headers:
            raise ValueError(f"{source} holds no document to tokenise; check its paths and split")
        for number, header in enumerate(headers):
            with open(_path(aside, number), "r+b") as file:
                file.write(replace(header, shard=number, num_shards=len(headers)).pack())
        aside.replace(out)
    except BaseException:
        shutil.rmtree(aside)
        raise
    return ShardsSummary(
        num_shards=len(headers),
        num_documents=sum(header.num_documents for header in headers),
        num_tokens=sum(header.num_tokens for header in headers),
        num_text_bytes=sum(header.num_text_bytes for header in headers),
    )


def check_target(out_dir: str, shard_tokens: int) -> None:
    """Raise ValueError for arguments that `write_shards` refuses; for callers that have work to do before it."""
    if shard_tokens < 1:
        raise ValueError(f"shard_tokens is {shard_tokens}; it must be at least 1")
    out = Path(out_dir)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} is there already and not an empty folder; choose another or remove it first")


def _path(folder: Path, shard: int) -> Path:
    return folder / f"tokens-{shard:05d}.bin"


def _write_shard(
    path: Path, encoded: Iterator[tuple[Tokens, int]], tokenizer: Tokenizer, shard_tokens: int
) -> _Header | None:
    """Write documents until the file is full, after an empty header. None, and no file, when no document is left."""
    first = next(encoded, None)
    if first is None:
        return None
    dtype = token_dtype(tokenizer.vocab_size)
    ends: list[tuple[int, int]] = []
    num_tokens = num_text_bytes = 0
    content = hashlib.blake2b(digest_size=16)
    with open(path, "wb") as file:
        file.write(bytes(_HEADER_BYTES))
        for tokens, text_bytes in itertools.chain([first], encoded):
            file.write(tokens.data)
            content.update(tokens.data)
            num_tokens, num_text_bytes = num_tokens + len(tokens), num_text_bytes + text_bytes
            ends.append((num_tokens, num_text_bytes))
            if num_tokens >= shard_tokens:
                break
        file.write(bytes(-file.tell() % 8))
        file.write(np.array(ends, "<u8").T.tobytes())
    return _Header(
        magic=_MAGIC,
        version=_VERSION,
        token_bytes=dtype.itemsize,
        num_tokens=num_tokens,
        num_documents=len(ends),
        num_text_bytes=num_text_bytes,
        vocab_size=tokenizer.vocab_size,
        shard=0,
        num_shards=0,
        tokenizer=bytes.fromhex(tokenizer.fingerprint),
        content=content.digest(),
    )


def _read_header(path: Path) -> _Header:
    with open(path, "rb") as file:
        start = file.read(_HEADER_BYTES)
    if start[: len(_MAGIC)] != _MAGIC:
        raise ValueError(f"{path} is no shard of tokens: it does not begin with {_MAGIC!r}; take it out of the folder")
    if len(start) < _HEADER_BYTES:
        raise ValueError(f"{path} is truncated within its header of {_HEADER_BYTES} bytes; copy it again")
    header = _Header(*_LAYOUT.unpack_from(start))
    if header.version != _VERSION:
        raise ValueError(
            f"{path} has version {header.version} of the format, this lowcomm reads {_VERSION}; write the shards again"
        )
    if path.stat().st_size != header.file_bytes:
        raise ValueError(
            f"{path} has {path.stat().st_size} bytes and should have {header.file_bytes}: it is truncated or was "
            "changed; copy it again"
        )
    return header
