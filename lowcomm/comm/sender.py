"""Messages that leave one after another, while the program goes on."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from queue import SimpleQueue

Batch = tuple[list[Callable[[], None]], "Future[None]"]


class Sender:
    """A thread that sends in the order of calls; it starts with the first and ends with the process."""

    def __init__(self) -> None:
        self._queue: SimpleQueue[Batch] = SimpleQueue()
        self._thread: threading.Thread | None = None

    def send(self, messages: Iterable[Callable[[], None]]) -> Future[None]:
        """Queue messages, each a call that returns when it has left; the result is there when all have.

        After a message that fails the batch's others are not sent, and its error is the result.
        """
        future: Future[None] = Future()
        self._queue.put((list(messages), future))
        if self._thread is None:
            # A daemon: a message to a peer that is gone must not keep the process from ending.
            self._thread = threading.Thread(target=self._run, name="lowcomm sender", daemon=True)
            self._thread.start()
        return future

    def _run(self) -> None:
        while True:
            messages, future = self._queue.get()
            try:
                for message in messages:
                    message()
            except Exception as error:
                future.set_exception(error)
            else:
                future.set_result(None)
            del messages, future  # and the buffers that they hold, until the next batch comes
