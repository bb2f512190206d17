"""Documents from a dataset of the Hugging Face hub, or from a folder in its form."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from lowcomm.data.corpus import digest
from lowcomm.data.files import text_of
from lowcomm.data.source import Cursor, Source
from lowcomm.optional import require


@dataclass(frozen=True)
class HuggingFace(Source):
    """A dataset that `datasets.load_dataset` can open.

    Attributes:
        name: on the hub, or a local folder.
        config: the dataset's configuration, if it has several.
        split: such as "train" or "train[:1%]" (slices only without streaming).
        field: the column that holds the text.
        streaming: read during training, nothing is stored; False downloads first and holds all tokens in memory.
    """

    name: str
    config: str | None = None
    split: str = "train"
    field: str = "text"
    streaming: bool = True

    def is_streamed(self) -> bool:
        return self.streaming

    def documents(self) -> Iterator[str]:
        for number, row in enumerate(self.dataset(), 1):
            if text := _text(self, row, number):
                yield text

    def cursor(self, state: Mapping[str, Any] | None = None) -> Cursor:
        """Resumes by the dataset's own position if it proves right, without reading what lies before."""
        if not self.streaming:
            return super().cursor(state)
        return _DatasetCursor(self, state)

    def dataset(self) -> Any:
        """The dataset, reduced to the column of the text; ValueError when it cannot be opened or lacks it."""
        datasets = require("datasets")
        try:
            dataset = datasets.load_dataset(self.name, self.config, split=self.split, streaming=self.streaming)
        except (OSError, ValueError) as error:
            raise ValueError(
                f"the dataset {self.name!r} (config {self.config!r}, split {self.split!r}) cannot be opened: {error}"
            ) from error
        if dataset.column_names is None:  # a stream may learn its columns only from its rows
            return dataset
        if self.field not in dataset.column_names:
            raise ValueError(f"{self.name} has no column {self.field!r}; set field to one of {dataset.column_names}")
        return dataset.select_columns([self.field])


class _DatasetCursor:
    """A pass over a streamed dataset, which knows its own position.

    Releases of `datasets` have resumed in the wrong place, silently (its issues 8145 and 8308). So the state is the
    position before the last row and a hash of its text. Resuming reads that row again and compares; on a mismatch it
    counts rows from the start, which is slow but right.
    """

    def __init__(self, source: HuggingFace, state: Mapping[str, Any] | None) -> None:
        self._source = source
        if state is None or state["num_rows"] == 0:
            self._restart(None)
            self._num_documents = 0
            return
        num_before = int(state["num_rows"]) - 1
        self._restart(state["before_last_row"])
        if not self._comes_next(state["last_row"], num_before):
            warnings.warn(
                f"datasets resumed {source.name} in another place than it was left; reading over {num_before} rows "
                "instead. A newer release of datasets may resume at once",
                stacklevel=3,
            )
            self._restart(None)
            for _ in itertools.islice(self._rows, num_before):
                pass
            self._position = self._dataset.state_dict() if num_before else None
            if not self._comes_next(state["last_row"], num_before):
                raise ValueError(
                    f"row {num_before + 1} of {source.name} ({source.split}) is not the one read before: the dataset "
                    "has changed; resume with the one that the run began with"
                )
        self._num_documents = int(state["num_documents"])

    def _restart(self, position: dict[str, Any] | None) -> None:
        self._dataset = self._source.dataset()
        if position is not None:
            self._dataset.load_state_dict(position)
        self._rows = iter(self._dataset)
        self._num_rows = 0
        self._position, self._before_last_row, self._last_row = position, position, ""

    def _comes_next(self, text_hash: str, num_before: int) -> bool:
        """Read the next row, which is number ``num_before + 1``, and see whether it has this text."""
        self._num_rows = num_before
        try:
            self._next_text()
        except StopIteration:
            return False
        return self._last_row == text_hash

    def _next_text(self) -> str:
        row = next(self._rows)
        self._num_rows += 1
        text = _text(self._source, row, self._num_rows)
        # only a dataset that has yielded knows its position: one that was just resumed still tells the start
        self._before_last_row, self._position = self._position, self._dataset.state_dict()
        self._last_row = digest(text.encode())
        return text

    def __next__(self) -> str:
        text = ""
        while not text:
            text = self._next_text()
        self._num_documents += 1
        return text

    def state_dict(self) -> dict[str, Any]:
        return {
            "num_documents": self._num_documents,
            "num_rows": self._num_rows,
            "before_last_row": self._before_last_row,
            "last_row": self._last_row,
        }


def _text(source: HuggingFace, row: dict[str, Any], number: int) -> str:
    return text_of(row, source.field, f"{source.name} ({source.split}), row {number}")
