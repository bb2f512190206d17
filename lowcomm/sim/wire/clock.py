"""Virtual time: ranks are greenlets of one thread; a heap decides whose turn it is.

A rank is ordinary code that runs until it sleeps or parks. Then the earliest event runs, in the order of (time,
sequence number), so a run is reproducible.
"""

from __future__ import annotations

import functools
import gc
import heapq
import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from greenlet import GreenletExit, getcurrent, greenlet

from lowcomm.sim.wire.torch_state import TorchState, take

_FEW_VOID = 64
_COLLECT_AFTER = 100_000  # new objects


class Deadlock(Exception):
    """Raised by `Clock.run` when nothing is due but ranks are parked.

    Attributes:
        waiting: what each blocked rank waits for.
    """

    def __init__(self, now: float, waiting: dict[int, str]) -> None:
        by_reason: dict[str, list[int]] = {}
        for rank, reason in waiting.items():
            by_reason.setdefault(reason, []).append(rank)
        lines = [f"  ranks {', '.join(map(str, ranks))}: {reason}" for reason, ranks in by_reason.items()]
        super().__init__("\n".join([f"at {now:g} s nothing is due, but {len(waiting)} ranks wait:", *lines]))
        self.waiting = waiting


@dataclass(eq=False, slots=True)
class Alarm:
    """An action due at a moment, see `Clock.at`; void once it has run or was cancelled."""

    _clock: Clock
    action: Callable[[], None]
    void: bool = False

    def cancel(self) -> None:
        """Forget the action; does nothing once it has run."""
        if not self.void:
            self.void = True
            self._clock._count_void()


@dataclass(eq=False, slots=True)
class _Program:
    """One rank's program and its state.

    Attributes:
        greenlet: made at its first turn; 7 KB each.
        void: ended or killed; it gets no more turns.
        waiting: says what a parked rank waits for; None while it runs or a turn is due.
        value: what its next turn brings it.
    """

    rank: int
    function: Callable[[], Any]
    greenlet: greenlet | None = None
    state: TorchState | None = None
    void: bool = False
    waiting: Callable[[], str] | None = None
    value: Any = None
    result: Any = None
    error: BaseException | None = None

    def body(self, first: Any) -> None:
        """Runs in the greenlet; whatever is raised is kept for the clock."""
        del first
        try:
            result = self.function()
            if not self.void:
                self.result = result
        except GreenletExit:
            pass
        except BaseException as error:
            if not self.void:  # what breaks while a killed program unwinds is no news
                self.error = error
        self.void = True


class Clock:
    """The clock of all ranks of a simulation.

    Args:
        isolate_torch: give each rank its own gradient mode, default generators and so on (`TorchState`), initially
            those at the call of `run`. False is faster, for programs that only measure time; Python's garbage collector
            then also runs less often.
        before_turn: called with a rank whenever it is about to run.

    Attributes:
        now: seconds from 0; never decreases.
        num_events: turns of ranks and actions so far.
        num_turns: those of ranks alone: how often one was handed over to.
    """

    def __init__(self, isolate_torch: bool = True, before_turn: Callable[[int], None] | None = None) -> None:
        self.now = 0.0
        self.num_events = self.num_turns = 0
        self._isolate, self._before_turn = isolate_torch, before_turn
        self._due: list[tuple[float, int, Alarm | _Program]] = []
        self._sequence = itertools.count()
        self._num_void = 0  # entries of `_due` that will be skipped
        self._programs: dict[int, _Program] = {}
        self._num_alive = 0
        self._paused: dict[int, float] = {}  # until when
        self._running: _Program | None = None
        self._hub = getcurrent()
        self._start: TorchState | None = None  # what torch's state is when a program starts; None: not kept

    def spawn(self, rank: int, program: Callable[[], Any], at: float = 0.0) -> None:
        """Start a rank's program at a moment; a rank whose last program has ended or was killed may start again."""
        assert rank >= 0 and (rank not in self._programs or self._programs[rank].void), f"rank {rank} still runs"
        assert self.now <= at < math.inf, at
        self._programs[rank] = _Program(rank, program)
        self._paused.pop(rank, None)
        self._num_alive += 1
        heapq.heappush(self._due, (at, next(self._sequence), self._programs[rank]))

    def at(self, time: float, action: Callable[[], None]) -> Alarm:
        """Call ``action`` at a moment, between ranks' turns. It may wake and kill ranks, but neither sleep nor park."""
        assert self.now <= time < math.inf, time
        alarm = Alarm(self, action)
        heapq.heappush(self._due, (time, next(self._sequence), alarm))
        return alarm

    def sleep(self, seconds: float) -> None:
        """Let virtual time pass for the rank whose turn it is."""
        if not 0.0 <= seconds < math.inf:
            raise ValueError(f"a rank cannot sleep {seconds} s; give a finite number that is not negative")
        program = self._turn()
        heapq.heappush(self._due, (self.now + seconds, next(self._sequence), program))
        self._hub.switch()

    def park(self, waiting: Callable[[], str]) -> Any:
        """Block the rank whose turn it is until `wake`, whose value is returned.

        Args:
            waiting: says what it waits for, for `Deadlock`.
        """
        program = self._turn()
        program.waiting = waiting
        return self._hub.switch()

    def wake(self, rank: int, value: Any = None) -> None:
        """Give a parked rank a turn now, after those already due; no effect if it was killed."""
        program = self._programs[rank]
        if program.void:
            return
        assert program.waiting is not None, f"rank {rank} is not parked"
        program.waiting, program.value = None, value
        heapq.heappush(self._due, (self.now, next(self._sequence), program))

    def kill(self, rank: int) -> None:
        """End a rank's program now; its ``finally`` blocks run and must not wait.

        Does not return when the rank kills itself.
        """
        program = self._programs[rank]
        if program.void:
            return
        program.void = True
        if program is self._running:
            raise GreenletExit
        if program.waiting is None:  # its turn is due
            self._count_void()
        program.waiting = None
        self._num_alive -= 1
        self.at(self.now, lambda: self._unwind(program))

    def pause(self, rank: int, until: float) -> None:
        """Give a rank no turn before this time; turns due earlier are delayed until then. `spawn` ends the pause."""
        self._paused[rank] = max(until, self._paused.get(rank, 0.0))

    def run(self) -> list[Any]:
        """Run until every program has ended; later events are dropped.

        Returns:
            What each program returned, by rank; None for ranks that were killed.

        Raises:
            Deadlock: when only parked ranks are left.
            BaseException: the first error of a program, which ends all others.
        """
        assert self._running is None, "the clock runs already"
        self._hub = getcurrent()
        outside = take() if self._isolate else None
        if outside is not None:
            self._start = replace(outside, leave_neutral=None)
        collect_after = gc.get_threshold()
        if outside is None:
            gc.set_threshold(max(collect_after[0], _COLLECT_AFTER), *collect_after[1:])
        try:
            self._loop()
        finally:
            for program in list(self._programs.values()):
                self._unwind(program)
            self._due.clear()
            self._num_void = self._num_alive = 0
            gc.set_threshold(*collect_after)
            if outside is not None:
                outside.restore()
        programs = self._programs
        return [programs[rank].result if rank in programs else None for rank in range(max(programs, default=-1) + 1)]

    def _loop(self) -> None:
        due, pop = self._due, heapq.heappop
        while self._num_alive:
            if not due:
                say = functools.cache(lambda waiting: waiting())  # thousands may wait for one thing
                raise Deadlock(self.now, {p.rank: say(p.waiting) for p in self._programs.values() if p.waiting})
            time, _, event = pop(due)
            if event.void:
                self._num_void -= 1
                continue
            self.now = time
            self.num_events += 1
            if isinstance(event, Alarm):
                event.void = True
                event.action()
            elif not self._paused or not self._put_off(event):
                self._take_turn(event)
                if event.error is not None:
                    event.error.add_note(f"rank {event.rank} raised this at {self.now:g} s of virtual time")
                    raise event.error

    def _take_turn(self, program: _Program, thrown: BaseException | None = None) -> None:
        if program.greenlet is None:
            program.greenlet, program.state = greenlet(program.body, self._hub), self._start
        if self._before_turn is not None:
            self._before_turn(program.rank)
        self.num_turns += 1
        was_void = program.void
        self._running = program
        if program.state is not None:
            program.state.restore()
        value, program.value = program.value, None
        if thrown is None:
            program.greenlet.switch(value)
        else:
            program.greenlet.throw(thrown)
        if program.state is not None:
            program.state = take()
        self._running = None
        if program.void and not was_void:
            self._num_alive -= 1

    def _unwind(self, program: _Program) -> None:
        """Run the ``finally`` blocks of an ended program."""
        program.void = True
        if program.greenlet is not None and not program.greenlet.dead:
            self._take_turn(program, GreenletExit())

    def _put_off(self, program: _Program) -> bool:
        until = self._paused.get(program.rank, 0.0)
        if until <= self.now:
            self._paused.pop(program.rank, None)
            return False
        heapq.heappush(self._due, (until, next(self._sequence), program))
        return True

    def _turn(self) -> _Program:
        program = self._running
        assert program is not None, "only a rank's program may do this, in its turn"
        if program.void:
            raise GreenletExit  # killed; it may not wait
        return program

    def _count_void(self) -> None:
        """Remove void entries from the heap once they are the majority."""
        self._num_void += 1
        if self._num_void > max(_FEW_VOID, len(self._due) // 2):
            self._due[:] = [entry for entry in self._due if not entry[2].void]
            heapq.heapify(self._due)
            self._num_void = 0
