"""A claim on a run's directory, by a lock of the operating system that ends with its process, however that ends.

Each rank claims the name of its own files, so the ranks of one run may share a directory and two runs may not. NFS
passes such locks on to its server, so they hold between machines, and of one that crashed until its lease ends. Where a
file system has none, a warning says so.
"""

from __future__ import annotations

import datetime
import errno
import fcntl
import os
import socket
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TextIO

_ATTEMPTS = 100
_SIGNED_WITHIN_S, _POLL_S = 1.0, 0.02


@contextmanager
def claimed(out: Path, name: str) -> Iterator[None]:
    """Make the directory ``out`` if need be, and hold its files ``name`` alone; what stays empty is removed.

    Raises:
        ValueError: when another process holds them, naming it, or ``out`` cannot be written.
    """
    path = out / f"{name}.claim"
    try:
        made = [folder for folder in (out, *out.absolute().parents) if not folder.exists()]
        file = _locked(path)
        file.truncate(0)
        now = datetime.datetime.now(datetime.UTC).isoformat(" ", "seconds")
        file.write(f"process {os.getpid()} on {socket.gethostname()} since {now}")
        file.flush()
        os.fsync(file.fileno())  # other machines read it
    except OSError as error:
        raise ValueError(
            f"--out is {out}, where no file can be written ({error}); name a directory on a disk that has space and "
            "lets this process write"
        ) from error
    try:
        yield
    finally:
        with suppress(OSError):
            path.unlink()  # while it is locked: whoever waits for it sees that it is gone
        file.close()
        with suppress(OSError):  # the others' files may lie in it
            for folder in made:
                folder.rmdir()


def _locked(path: Path) -> TextIO:
    for _ in range(_ATTEMPTS):
        path.parent.mkdir(parents=True, exist_ok=True)
        with suppress(FileNotFoundError):  # others remove what they leave empty
            file = path.open("a+", encoding="utf-8")
            if _is_locked_and_there(file, path):
                return file
    raise OSError(errno.EAGAIN, f"{path} is made and removed by others all the time")


def _is_locked_and_there(file: TextIO, path: Path) -> bool:
    """Lock the file, or close it, whose last holder may have removed it before it was locked here."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.path.samestat(os.fstat(file.fileno()), path.stat()):
            return True
    except FileNotFoundError:
        pass
    except OSError as error:
        if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
            message = f"{path.parent} cannot be locked ({error}): another run that writes there goes unnoticed"
            warnings.warn(message, stacklevel=5)
            return True
        holder = _holder(file)
        file.close()
        raise ValueError(
            f"{path.parent} already is in use by {holder}; wait until it has ended, end it, or choose another --out"
        ) from None
    file.close()
    return False


def _holder(file: TextIO) -> str:
    """Who holds a claim, which has its name a moment after its lock."""
    ends_s = time.monotonic() + _SIGNED_WITHIN_S
    while True:
        file.seek(0)
        holder = file.read()
        if holder or time.monotonic() > ends_s:
            return holder or "another process"
        time.sleep(_POLL_S)
