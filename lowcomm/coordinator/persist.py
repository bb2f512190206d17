"""The coordinator's memory on disk: one JSON file, written whole or not at all, by one process at a time."""

from __future__ import annotations

import fcntl
import json
import os
from pathlib import Path
from typing import Any


class StateFile:
    """A file that holds the newest state that was saved, also after the process or the machine dies.

    Raises:
        ValueError: when another process uses it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        self._lock = open(path.with_name(f"{path.name}.lock"), "w")  # noqa: SIM115 - held until `close`
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._lock.close()
            raise ValueError(
                f"another coordinator uses {path}; stop it, or give this one a --state of its own"
            ) from None

    def load(self) -> Any:
        """What was saved last; None when there is no such file yet. Raises ValueError for what is no JSON."""
        try:
            return json.loads(self.path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None

    def save(self, state: Any) -> None:
        """Returns when the state is on disk."""
        partial = self.path.with_name(f"{self.path.name}.partial")
        with open(partial, "w", encoding="utf-8") as file:
            file.write(json.dumps(state))
            file.flush()
            os.fsync(file.fileno())
        os.rename(partial, self.path)
        folder = os.open(self.path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)  # or the new name is lost with the machine
        finally:
            os.close(folder)

    def close(self) -> None:
        """Let another process use the file."""
        self._lock.close()
