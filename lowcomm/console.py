"""Words for whoever watches. Nobody need watch: a console that is gone, or cannot spell a word, ends no run."""

from __future__ import annotations

import os
import sys
from contextlib import suppress
from typing import TextIO


def show(text: str, stream: TextIO | None = None) -> None:
    """Print a line on ``stream``, None for the standard output, if that can be."""
    stream = stream or sys.stdout
    if stream is not None:
        with suppress(OSError, ValueError):
            print(spelt(text, getattr(stream, "encoding", None)), file=stream, flush=True)


def spelt(text: str, encoding: str | None) -> str:
    """The text with backslashes for what an encoding lacks."""
    encoding = encoding or "utf-8"
    return text.encode(encoding, "backslashreplace").decode(encoding)


def open_closed_streams() -> None:
    """Give the numbers of closed standard streams to the null device.

    Otherwise the next files get them, checkpoints and metrics too, and libraries write their warnings into these.
    """
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(descriptor)


def abandon_dead_streams() -> None:
    """Point standard streams that cannot be written any more at the null device, on which Python may flush them."""
    for stream in (sys.stdout, sys.stderr):
        try:
            if stream is not None:
                stream.flush()
        except OSError:
            with suppress(OSError, ValueError):
                null = os.open(os.devnull, os.O_WRONLY)
                os.dup2(null, stream.fileno())
                os.close(null)
        except ValueError:  # closed by whoever called
            pass
