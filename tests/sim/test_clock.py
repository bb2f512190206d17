"""The clock alone: whose turn it is, what ends a program, and what torch keeps apart."""

import contextlib
import gc

import pytest
import torch
import torch.utils._device

from lowcomm.sim.wire.clock import Clock, Deadlock


def run(*programs, isolate_torch=False):
    """Run program(clock) on each rank."""
    clock = Clock(isolate_torch)
    for rank, program in enumerate(programs):
        clock.spawn(rank, lambda program=program: program(clock))
    return clock, clock.run()


def test_turns_go_by_time_then_by_who_asked_first():
    log = []

    def program(rank, naps):
        def go(clock):
            for nap in naps:
                clock.sleep(nap)
                log.append((clock.now, rank))
            return rank * 10

        return go

    clock, results = run(program(0, [2, 1, 1]), program(1, [1, 1, 1]), program(2, [1, 0, 2]))
    # at 3 s: ranks 0 and 2 fell asleep at 2 s and at 1 s, rank 1 at 2 s after rank 0
    assert log == [(1, 1), (1, 2), (1, 2), (2, 0), (2, 1), (3, 2), (3, 0), (3, 1), (4, 0)]
    assert results == [0, 10, 20] and clock.now == 4
    assert clock.num_events == 12  # the first turns and the naps


def test_somebody_may_prepare_each_turn_also_the_last_one_of_a_killed_rank():
    log = []

    def program(rank):
        try:
            log.append(f"{rank} runs")
            clock.sleep(1 + rank)
        finally:
            log.append(f"{rank} ends")

    clock = Clock(isolate_torch=False, before_turn=lambda rank: log.append(f"{rank} is next"))
    for rank in range(2):
        clock.spawn(rank, lambda rank=rank: program(rank))
    clock.at(1.5, lambda: clock.kill(1))
    clock.run()
    turns = [("0", "runs"), ("1", "runs"), ("0", "ends"), ("1", "ends")]
    assert log == [line for rank, what in turns for line in (f"{rank} is next", f"{rank} {what}")]
    assert clock.num_turns == 4


@pytest.mark.parametrize("isolate_torch", [False, True])
def test_garbage_is_looked_for_as_before_once_it_has_run(isolate_torch):
    before, inside = gc.get_threshold(), []

    def program(clock):
        inside.append(gc.get_threshold()[0])
        raise RuntimeError

    with pytest.raises(RuntimeError):
        run(program, isolate_torch=isolate_torch)
    assert gc.get_threshold() == before and inside == [before[0] if isolate_torch else max(before[0], 100_000)]


def test_programs_start_when_they_are_spawned_to():
    clock = Clock(isolate_torch=False)
    clock.spawn(2, lambda: clock.now, at=1.5)
    clock.spawn(0, lambda: clock.spawn(3, lambda: clock.now, at=7.0))
    assert clock.run() == [None, None, 1.5, 7.0]


def test_actions_run_between_turns_unless_cancelled():
    log = []

    def go(clock):
        clock.at(1.0, lambda: log.append("a"))
        doomed = clock.at(1.0, lambda: log.append("never"))
        clock.at(0.5, doomed.cancel)
        done = clock.at(2.0, lambda: log.append("b"))
        clock.sleep(2.0)
        log.append("turn")
        done.cancel()  # too late: nothing
        clock.at(99.0, lambda: log.append("after the end"))

    clock, _ = run(go)
    assert log == ["a", "b", "turn"] and clock.now == 2.0
    clock.spawn(0, lambda: clock.sleep(200.0), at=2.0)
    assert clock.run() == [None] and log == ["a", "b", "turn"], "what was due after the end is forgotten"


def test_cancelled_actions_do_not_pile_up():
    def go(clock):
        for _ in range(2000):
            clock.at(1e9, lambda: None).cancel()
            clock.sleep(1.0)
            assert len(clock._due) < 200

    clock, _ = run(go)
    assert clock.num_events == 2001 and clock.now == 2000


def test_park_and_wake():
    def waker(clock):
        clock.sleep(1.0)
        clock.wake(0, "hello")

    assert run(lambda clock: (clock.park(lambda: "a word"), clock.now), waker)[1] == [("hello", 1.0), None]


def test_a_wake_comes_after_what_is_due():
    log = []

    def parked(clock):
        clock.park(lambda: "")
        log.append("woken")

    def waker(clock):
        clock.wake(0)
        log.append("waker")

    run(parked, waker, lambda clock: log.append("due"))
    assert log == ["waker", "due", "woken"]


@pytest.mark.parametrize("state", ["asleep", "parked", "woken", "not started", "running", "ended"])
def test_kill(state):
    log = []

    def victim(clock):
        try:
            if state == "asleep":
                clock.sleep(10.0)
            elif state in ("parked", "woken"):
                clock.park(lambda: "death")
            elif state == "running":
                clock.sleep(1.0)
                clock.kill(0)
            log.append("alive")
            return "result"
        finally:
            log.append("unwound")
            if state != "ended":
                clock.sleep(5.0)  # the dead may not wait
                log.append("waited")

    def killer(clock):
        clock.sleep(1.0)
        if state == "woken":
            clock.wake(0)
        clock.kill(0)
        clock.kill(0)
        clock.wake(0)
        clock.sleep(1.0)

    clock = Clock(isolate_torch=False)
    clock.spawn(0, lambda: victim(clock), at=3.0 if state == "not started" else 0.0)
    clock.spawn(1, lambda: killer(clock))
    results = clock.run()
    assert clock.now == 2.0
    assert results == ["result" if state == "ended" else None, None]
    assert log == {"ended": ["alive", "unwound"], "not started": []}.get(state, ["unwound"])


def test_a_killed_rank_has_no_result_whatever_it_catches():
    def stubborn(clock):
        with contextlib.suppress(BaseException):
            clock.sleep(9.0)
        return "result"

    assert run(stubborn, lambda clock: clock.kill(0))[1] == [None, None]


def test_deadlock_names_all_who_wait_and_for_what():
    ended = []

    def waits(clock):
        clock.sleep(1.0)
        try:
            clock.park(lambda: "a letter")
        finally:
            ended.append(clock.now)

    def kills(clock):
        clock.sleep(0.5)
        clock.kill(4)

    with pytest.raises(Deadlock) as caught:  # of rank 4, which waited too, nothing is said
        run(waits, kills, waits, lambda clock: clock.park(lambda: "a call"), lambda clock: clock.park(lambda: "nobody"))
    assert caught.value.waiting == {0: "a letter", 2: "a letter", 3: "a call"}
    assert str(caught.value).splitlines() == [
        "at 1 s nothing is due, but 3 ranks wait:",
        "  ranks 0, 2: a letter",
        "  ranks 3: a call",
    ]
    assert ended == [1.0, 1.0]  # they are unwound


def test_the_first_error_ends_all():
    log = []

    def broken(clock):
        clock.sleep(2.0)
        raise KeyError("broken")

    def later(clock):
        try:
            clock.sleep(3.0)
            log.append("went on")
        finally:
            log.append("unwound")
            raise RuntimeError("while unwinding")

    with pytest.raises(KeyError, match="broken") as caught:
        run(later, broken)
    assert log == ["unwound"]
    assert caught.value.__notes__ == ["rank 1 raised this at 2 s of virtual time"]


def test_mistakes():
    def go(clock):
        for seconds in (-1.0, float("nan"), float("inf")):
            with pytest.raises(ValueError, match=f"cannot sleep {seconds}"):
                clock.sleep(seconds)
        clock.sleep(1.0)
        with pytest.raises(AssertionError, match="rank 0 still runs"):
            clock.spawn(0, lambda: None, at=1.0)

    clock, _ = run(go)
    with pytest.raises(AssertionError, match="in its turn"):
        clock.sleep(1.0)


@contextlib.contextmanager
def default_device(device):
    torch.set_default_device(device)
    yield
    torch.set_default_device(None)


def packed(x):
    return x


def look_at_hooks():
    return torch._C._autograd._top_saved_tensors_default_hooks(True)


# what torch keeps for a thread: (enter a context, what to look at)
CONTEXTS = {
    "no_grad": (torch.no_grad, torch.is_grad_enabled),
    "inference": (torch.inference_mode, torch.is_inference_mode_enabled),
    "autocast": (lambda: torch.autocast("cpu", torch.float16), lambda: torch.is_autocast_enabled("cpu")),
    "autocast dtype": (lambda: torch.autocast("cpu", torch.float16), lambda: torch.get_autocast_dtype("cpu")),
    "saved": (lambda: torch.autograd.graph.saved_tensors_hooks(packed, packed), look_at_hooks),
    "device": (lambda: torch.device("meta"), lambda: torch.empty(1).device.type),
    "current device": (lambda: default_device("meta"), lambda: torch.utils._device.CURRENT_DEVICE),
    "default device": (lambda: default_device("meta"), torch.get_default_device),
}


@pytest.mark.parametrize("name", CONTEXTS)
def test_contexts_of_a_rank_hold_in_its_turns_alone(name):
    context, look = CONTEXTS[name]
    outside = look()

    def inside(start, end):
        def go(clock):
            clock.sleep(start)
            with context():
                within = look()
                assert within != outside
                for _ in range(3):
                    clock.sleep((end - start) / 3)
                    assert look() == within
            assert look() == outside
            clock.sleep(1.0)
            assert look() == outside

        return go

    def watcher(clock):
        for _ in range(20):
            clock.sleep(0.5)
            assert look() == outside

    # contexts of one rank that open and close within, across and around those of another
    run(inside(1, 4), inside(2, 3), watcher, inside(2.5, 6), inside(5, 7), isolate_torch=True)
    assert look() == outside
    with context():
        within = look()
        _, results = run(lambda clock: look(), isolate_torch=True)
        assert look() == within
        assert results == [outside if name == "inference" else within]
    assert look() == outside


def test_ranks_in_autocast_do_not_keep_each_others_casts():
    weight = torch.ones(2, 2, requires_grad=True)

    def doubled():
        with torch.autocast("cpu", torch.bfloat16):
            return (weight @ torch.ones(2, 2)).sum().item()

    def holds(clock):
        with torch.autocast("cpu", torch.bfloat16):
            clock.sleep(5.0)

    def changes(clock):
        clock.sleep(1.0)
        before = doubled()
        with torch.no_grad():
            weight.mul_(2.0)
        return before, doubled()

    assert run(holds, changes, isolate_torch=True)[1][1] == (8.0, 16.0)


def test_each_rank_has_a_default_generator_and_dtype():
    torch.manual_seed(3)
    alone = [torch.rand(1).item() for _ in range(4)]
    after = torch.rand(1).item()
    torch.manual_seed(3)

    def draws(rank):
        def go(clock):
            got = []
            for _ in range(4):
                got.append(torch.rand(1).item())
                torch.set_default_dtype(torch.float64 if rank else torch.float32)
                clock.sleep(1.0 + rank / 3)
                assert torch.get_default_dtype() == (torch.float64 if rank else torch.float32)
                torch.set_default_dtype(torch.float32)
            return got

        return go

    assert run(draws(0), draws(1), draws(2), isolate_torch=True)[1] == [alone] * 3
    assert torch.get_default_dtype() == torch.float32
    assert [torch.rand(1).item() for _ in range(5)] == [*alone, after]  # outside nothing was drawn
