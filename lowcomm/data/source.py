"""Sources of text: the interface, and Python's standard library, which needs no download."""

from __future__ import annotations

import itertools
import os
import sys
import sysconfig
import tokenize
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

_NOT_LIBRARY = {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test"}


class Cursor(Protocol):
    """One pass over a source's documents, which can be resumed."""

    def __next__(self) -> str:
        """The next document; StopIteration when the pass is over."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """What `Source.cursor` needs to go on here; "num_documents" counts those handed out in this pass."""
        ...


class Origin(ABC):
    """Where a run's tokens come from: text (`Source`), or tokens that were written before (`lowcomm.data.Shards`)."""

    @abstractmethod
    def is_streamed(self) -> bool:
        """Whether it is too large to hold: read and tokenised during training, not before it."""


class Source(Origin, ABC):
    """Documents in an order that is the same on every replica and in every run."""

    @abstractmethod
    def documents(self) -> Iterator[str]:
        """Every document, none empty; raises ValueError, naming the place, for one that cannot be read."""

    def is_streamed(self) -> bool:
        return False

    def identity(self) -> str:
        """Identifies this source without reading it."""
        return repr(self)

    def cursor(self, state: Mapping[str, Any] | None = None) -> Cursor:
        """A pass from the first document, or from where ``state`` was taken."""
        return _CountingCursor(self, 0 if state is None else int(state["num_documents"]))


class _CountingCursor:
    """Counts the documents handed out, and resumes by reading over them."""

    def __init__(self, source: Source, num_documents: int) -> None:
        self._num_documents = num_documents
        self._documents = itertools.islice(source.documents(), num_documents, None)

    def __next__(self) -> str:
        document = next(self._documents)
        self._num_documents += 1
        return document

    def state_dict(self) -> dict[str, Any]:
        return {"num_documents": self._num_documents}


@dataclass(frozen=True)
class StandardLibrary(Source):
    """The source code of the running Python's standard library: about 12 MB in 700 files, one document each.

    Sorted by relative path. Tests, installed packages and the files that the interpreter's own build generated (they
    hold its paths) are left out. The text differs between Python versions.
    """

    def documents(self) -> Iterator[str]:
        root = Path(sysconfig.get_path("stdlib"))
        for path in _library_files(root):
            with tokenize.open(path) as file:  # obeys the coding line
                text = file.read()
            if text:
                yield text

    def identity(self) -> str:
        return f"StandardLibrary({sys.version})"


def _library_files(root: Path) -> list[Path]:
    found = []
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = [name for name in subfolders if name not in _NOT_LIBRARY and not name.startswith("config-")]
        found += [
            Path(folder, name) for name in names if name.endswith(".py") and not name.startswith("_sysconfigdata")
        ]
    if not found:
        raise ValueError(
            f"no .py file under {root}: this Python comes without the source of its standard library; "
            "choose another source, such as Files"
        )
    return sorted(found, key=lambda path: path.relative_to(root).as_posix())
