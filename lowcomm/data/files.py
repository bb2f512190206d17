"""Documents from files of one's own: text, JSON lines and Parquet."""

from __future__ import annotations

import glob
import gzip
import json
import lzma
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from lowcomm.data.source import Source
from lowcomm.optional import require

_CHUNK_CHARACTERS = 1 << 20


@dataclass(frozen=True)
class Files(Source):
    """Documents from files, in the order of ``paths``; the matches of one glob are sorted.

    A .txt file is one document, or is cut at ``separator``. A document is an object in one line of .jsonl and .json, or
    a row of .parquet, with its text under ``field``. All but Parquet may be compressed: .txt.gz, .jsonl.xz. Text is
    UTF-8. Empty documents are left out; a file with no other is an error.

    Attributes:
        paths: files or globs (``**`` goes through folders).
        field: the key or column that holds the text.
        separator: cuts text files into documents, such as a blank line or a NUL.
        streaming: read and tokenise during training rather than hold all tokens in memory.
    """

    paths: list[str]
    field: str = "text"
    separator: str | None = None
    streaming: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.paths, str) or not self.paths:
            raise ValueError(f"paths is {self.paths!r}; give a list with at least one file or glob")
        if self.separator == "":
            raise ValueError("separator is empty and would cut nowhere; leave it out to take each text file whole")

    def is_streamed(self) -> bool:
        return self.streaming

    def identity(self) -> str:
        files = [(path.name, path.stat().st_size) for path in self.files()]
        return f"Files({files}, {self.field!r}, {self.separator!r})"

    def files(self) -> list[Path]:
        """The files named by ``paths``; ValueError for a missing one or a glob without a match."""
        found: list[Path] = []
        for name in self.paths:
            matches = [Path(name)] if Path(name).is_file() else []
            if not matches and glob.has_magic(name):
                matches = [Path(match) for match in sorted(glob.glob(name, recursive=True)) if Path(match).is_file()]
            if not matches:
                raise ValueError(f"{name} names no file (seen from {Path.cwd()}); check the path or the glob")
            found += matches
        return found

    def documents(self) -> Iterator[str]:
        for path in self.files():
            is_empty = True
            for document in self._read(path):
                if document:
                    is_empty = False
                    yield document
            if is_empty:
                raise ValueError(f"{path} holds no text; leave it out of paths")

    def _read(self, path: Path) -> Iterator[str]:
        kind = path.with_suffix("").suffix if path.suffix in (".gz", ".xz") else path.suffix
        try:
            if path.suffix == ".parquet":
                yield from self._rows(path)
            elif kind == ".txt":
                yield from self._pieces(path)
            elif kind in (".jsonl", ".json"):
                yield from self._lines(path)
            else:
                raise ValueError(
                    f"{path} has the unknown kind {''.join(path.suffixes)!r}; "
                    "known are .txt, .jsonl and .json (each also .gz or .xz) and .parquet"
                )
        except (OSError, EOFError, lzma.LZMAError, UnicodeDecodeError) as error:
            raise ValueError(f"{path} cannot be read to its end as its name promises: {error}") from error

    def _pieces(self, path: Path) -> Iterator[str]:
        with _open(path) as file:
            if self.separator is None:
                yield file.read()
                return
            rest = ""
            while chunk := file.read(_CHUNK_CHARACTERS):
                *pieces, rest = (rest + chunk).split(self.separator)
                yield from pieces
            yield rest

    def _lines(self, path: Path) -> Iterator[str]:
        with _open(path) as file:
            for number, line in enumerate(file, 1):
                if not line.strip():
                    continue
                try:
                    row = json.loads(line)
                except json.JSONDecodeError as error:
                    raise ValueError(f"{path}, line {number} is not one whole JSON value: {error}") from error
                if not isinstance(row, dict):
                    raise ValueError(f"{path}, line {number} is a {type(row).__name__}; each line must be an object")
                yield text_of(row, self.field, f"{path}, line {number}")

    def _rows(self, path: Path) -> Iterator[str]:
        pyarrow, parquet = require("pyarrow"), require("pyarrow.parquet")
        try:
            with parquet.ParquetFile(path) as file:
                if self.field not in file.schema_arrow.names:
                    raise ValueError(
                        f"{path} has no column {self.field!r}; set field to one of {file.schema_arrow.names}"
                    )
                number = 0
                for batch in file.iter_batches(columns=[self.field]):
                    for row in batch.to_pylist():
                        number += 1
                        yield text_of(row, self.field, f"{path}, row {number}")
        except pyarrow.ArrowInvalid as error:
            raise ValueError(f"{path} is not a whole Parquet file: {error}") from error


def text_of(row: dict[str, Any], field: str, place: str) -> str:
    """The text of a row; errors name its ``place``.

    Raises:
        ValueError: when the field is missing, is not a string, or holds half a surrogate pair.
    """
    if field not in row:
        raise ValueError(f"{place} has no field {field!r}; set field to one of {sorted(row)}")
    text = row[field]
    if not isinstance(text, str):
        raise ValueError(f"{place}: field {field!r} is a {type(text).__name__}; it must be a string")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{place}: field {field!r} is no valid text: {error}") from error
    return text


def _open(path: Path) -> IO[str]:
    opener: Any = {".gz": gzip.open, ".xz": lzma.open}.get(path.suffix, open)
    # newline="\n": a carriage return is text like any other
    file: IO[str] = opener(path, "rt", encoding="utf-8", newline="\n")
    return file
