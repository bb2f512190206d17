"""A world of ranks as threads of one process: sums in rank order, so results do not depend on timing."""

from __future__ import annotations

import threading
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from lowcomm.comm.base import Call, Comm, Work

T = TypeVar("T")
PATIENCE_S = 60.0


class Board:
    """Where ranks leave messages for each other."""

    def __init__(self) -> None:
        self.changed = threading.Condition()
        self.posts: dict[Any, dict[int, Any]] = defaultdict(dict)
        self.num_calls: dict[Any, int] = defaultdict(int)

    def post(self, key: Any, rank: int, value: Any) -> None:
        with self.changed:
            assert rank not in self.posts[key]
            self.posts[key][rank] = value
            self.changed.notify_all()

    def read(self, key: Any, num_posts: int) -> dict[int, Any]:
        with self.changed:
            if not self.changed.wait_for(lambda: len(self.posts[key]) == num_posts, PATIENCE_S):
                raise TimeoutError(f"{key}: only ranks {sorted(self.posts[key])} came")
            return self.posts[key]


class Later:
    def __init__(self, wait: Callable[[], Any]) -> None:
        self.wait = wait


class ThreadComm(Comm):
    def __init__(self, board: Board, rank: int, members: Sequence[int]) -> None:
        self.board, self.rank, self.members = board, rank, tuple(members)

    def issue(self, call: Call) -> Work[Any]:
        x, peer = call.x, -1 if call.peer is None else call.peer
        assert (call.kind, peer) != ("recv", -1), "no test receives from whoever comes first"
        if call.kind == "send":
            self.board.post(self._next("send", self.rank, peer), self.rank, x.detach().clone())
            return Later(lambda: None)
        if call.kind == "recv":
            key = self._next("send", peer, self.rank)
            return Later(lambda: (peer, self.board.read(key, 1)[peer]))
        if call.kind == "exchange":
            key = self._next("exchange", *sorted((self.rank, peer)))
            self.board.post(key, self.rank, x.detach().clone())
            return Later(lambda: self.board.read(key, 2)[peer].clone())
        combine = {
            "all_sum": lambda xs: torch.stack(xs).sum(0) if len(xs) != 2 else xs[0] + xs[1],
            "all_gather": torch.stack,
            "all_to_all": lambda xs: torch.stack([rows[self.place] for rows in xs]),
            "broadcast": lambda xs: xs[self.members.index(peer)].clone(),
        }
        return self._together(call.kind, x, combine[call.kind])

    def sub(self, members: Sequence[int]) -> Comm:
        return ThreadComm(self.board, self.rank, sorted(members))

    def now(self) -> float:
        return time.perf_counter()

    def _next(self, kind: str, *ranks: int) -> tuple[Any, ...]:
        """A key that this rank's other calls of the kind do not have."""
        call = (kind, self.members, self.rank, *ranks)
        self.board.num_calls[call] += 1
        return (kind, self.members, *ranks, self.board.num_calls[call])

    def _together(self, kind: str, value: Tensor, combine: Callable[[list[Any]], Any]) -> Later:
        copy = value.detach().clone()
        # by view, however often the same one is made; a mismatch of kinds shows as a wrong combination
        view = (self.members, self.rank)
        key = (self.members, self.board.num_calls[view])
        self.board.num_calls[view] += 1
        self.board.post(key, self.rank, (kind, copy))

        def wait() -> Any:
            posts = self.board.read(key, len(self.members))
            kinds = {posts[r][0] for r in self.members}
            assert kinds == {kind}, f"ranks disagree about what they do: {kinds}"
            return combine([posts[r][1] for r in self.members])

        return Later(wait)


def run_world(num_ranks: int, program: Callable[[Comm], T]) -> list[T]:
    """Run ``program(comm)`` on every rank; the results in rank order, or the first error."""
    board = Board()
    results: dict[int, T] = {}
    errors: dict[int, BaseException] = {}

    def body(rank: int) -> None:
        try:
            results[rank] = program(ThreadComm(board, rank, range(num_ranks)))
        except BaseException as error:
            errors[rank] = error

    threads = [threading.Thread(target=body, args=(rank,), daemon=True) for rank in range(num_ranks)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE_S)
    for error in errors.values():
        raise error
    assert not any(thread.is_alive() for thread in threads), "a rank hangs"
    return [results[rank] for rank in range(num_ranks)]
