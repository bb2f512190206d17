"""`lowcomm retime`: what a simulated run would have taken on another cluster, without training again.

Every rank's log is replayed on the other cluster: the same steps, messages and waits in the same order, with bytes that
nobody computed. Lines of metrics keep what was learnt and get new times, from a ledger and a meter of the usual kind.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml

from lowcomm.comm.base import Comm, Work
from lowcomm.comm.metered import Meter, MeteredComm
from lowcomm.config import describe
from lowcomm.ledger import Ledger
from lowcomm.metrics import Metrics, Record, read
from lowcomm.sim.clock import Clock
from lowcomm.sim.cluster import Cluster
from lowcomm.sim.comm import World
from lowcomm.sim.faults import Crash, Rejoin
from lowcomm.sim.inject import schedule_faults
from lowcomm.sim.log import EVENTS, Books, Compute, Events, Issue, Wait, read_events
from lowcomm.sim.network import Network
from lowcomm.sim.pace import Pace
from lowcomm.sim.trace import Trace, write_chrome_trace

_TIMES = ("time_s", "comm_wait_s", "compute_s", "tokens_per_s", "mfu")
_SAME = ("t", "rank", "tokens", "bytes_sent", "bytes_received")


def retime(run_dir: Path, cluster: Cluster, out: Path) -> dict[str, Any]:
    """Give a simulated run the times of another cluster with as many hosts, and return rank 0's summary line.

    Writes into ``out`` what `lowcomm.sim.simulate.simulate` would have written for that cluster, but for the weights.

    Raises:
        ValueError: when ``out`` holds a run, there is no log, the cluster has more or fewer hosts or ranks that crash,
            or the run could have learnt something else at other times.
    """
    if any(out.glob("metrics*.jsonl")):
        raise ValueError(f"{out} already holds a run; choose another --out")
    events = read_events(run_dir / EVENTS)
    num_ranks = len(events.programs)
    _check(cluster, num_ranks)
    names = ["metrics.jsonl", *(f"metrics.rank{rank}.jsonl" for rank in range(1, num_ranks))]
    lines = [read(run_dir / name) for name in names]
    cluster.check_steps(max((line["t"] for line in lines[0]), default=1))

    out.mkdir(parents=True, exist_ok=True)
    for name in ("config.yaml", "environment.json", EVENTS):
        shutil.copyfile(run_dir / name, out / name)
    (out / "cluster.yaml").write_text(yaml.safe_dump(describe(cluster), sort_keys=False), encoding="utf-8")
    clock, trace, compute = Clock(isolate_torch=False), Trace(), cluster.compute_model()
    network = Network(clock, cluster.links(), trace.add_flow)
    world = World(clock, network, cluster.schedule)
    schedule_faults(cluster.fault_events(), clock, world, network)

    def program(rank: int) -> dict[str, Any]:
        metrics = Metrics(out / names[rank])
        meter = Meter(on_wait=lambda tag, start_s, end_s: trace.add(rank, "wait", start_s, end_s, tag))
        pace, wire = Pace(clock, compute, trace, rank, None), _Wire(world, events.views, rank, meter)
        ledger = _Ledger(rank, lines[rank], metrics.write, events.books, meter, lambda: clock.now)
        try:
            _replay(events, rank, pace, wire, ledger)
            return ledger.last()
        finally:
            metrics.close()

    for rank in range(num_ranks):
        clock.spawn(rank, partial(program, rank))
    summaries = clock.run()
    write_chrome_trace(trace.spans, out / "trace.json")
    first: dict[str, Any] = summaries[0]
    return first


def _check(cluster: Cluster, num_ranks: int) -> None:
    if cluster.num_ranks != num_ranks:
        raise ValueError(
            f"the cluster has {cluster.num_ranks} hosts, but the run had {num_ranks} replicas; more or fewer learn "
            f"something else: take a cluster of {num_ranks}, or simulate anew"
        )
    if any(isinstance(event, Crash | Rejoin) for event in cluster.fault_events()):
        raise ValueError("a rank crashes in this cluster, which changes what the others learn; simulate the run on it")
    if cluster.compute.needs_calibration():
        raise ValueError("there is no real step here whose time could be measured; give Measured a step_s")


def _replay(events: Events, rank: int, pace: Pace, wire: _Wire, ledger: _Ledger) -> None:
    t = 0
    for number in events.programs[rank]:
        operation = events.operations[number]
        if isinstance(operation, Compute):
            if operation.is_first:
                t += 1
                pace.begin(t)
            pace.go_on(operation.share)
        elif isinstance(operation, Issue):
            wire.issue(operation)
        elif isinstance(operation, Wait):
            wire.wait(operation.back)
        else:
            ledger.call(operation.call)


@dataclass
class _Wire:
    """A rank's messages, without content, and those that it has not waited for."""

    world: World
    views: list[tuple[int, ...]]
    rank: int
    meter: Meter
    num_issued: int = 0
    pending: dict[int, Work[Any]] = field(default_factory=dict)
    comms: dict[tuple[int, str], Comm] = field(default_factory=dict)  # by view and purpose

    def issue(self, asked: Issue) -> None:
        """Send it off."""
        comm = self.comms.get((asked.view, asked.tag))
        if comm is None:
            inner = self.world.comm(self.rank, self.views[asked.view])
            comm = self.comms[asked.view, asked.tag] = MeteredComm(inner, self.meter, asked.tag)
        self.num_issued += 1
        self.pending[self.num_issued] = _issue(comm, asked)

    def wait(self, back: int) -> None:
        """For the message issued so many messages ago."""
        self.pending.pop(self.num_issued + 1 - back).wait()


def _issue(comm: Comm, asked: Issue) -> Work[Any]:
    x, other = torch.empty(asked.num_bytes, dtype=torch.uint8, device="meta"), asked.other
    if asked.kind == "all_sum":
        return comm.all_sum(x)
    if asked.kind == "all_gather":
        return comm.all_gather(x)
    if asked.kind == "all_to_all":
        n = len(comm.members)
        return comm.all_to_all(x.view(n, asked.num_bytes // n))
    assert other is not None, "who takes what comes first is not replayed"
    if asked.kind == "broadcast":
        return comm.broadcast(x, other)
    if asked.kind == "send":
        return comm.send(x, other)
    if asked.kind == "exchange":
        return comm.exchange(x, other)
    assert asked.kind == "recv", asked
    return comm.recv(x, other)


class _Ledger:
    """A ledger that is told what another was told, and writes its lines with other times.

    Args:
        lines: those of the other.
        write: where lines go.
        now: virtual seconds.
    """

    def __init__(
        self,
        rank: int,
        lines: Sequence[Record],
        write: Callable[[Record], None],
        books: Books,
        meter: Meter,
        now: Callable[[], float],
    ) -> None:
        self._lines, self._write_line, self._num_written = lines, write, 0
        self._pause = ExitStack()
        self._latest: dict[str, Any] = {}
        self._ledger = Ledger(
            write=self._write,
            meter=meter,
            now=now,
            rank=rank,
            num_replicas=books.num_replicas,
            step_tokens=books.step_tokens,
            log_every=sys.maxsize,  # it writes when it is told to
            token_flops=books.token_flops,
            peak_flops=books.peak_flops,
        )

    def call(self, name: str) -> None:
        """Make the call of which `Ledger.heard` was told; losses have no value."""
        ledger = self._ledger
        if name == "start":
            ledger.start()
        elif name == "flush":
            line = self._next("step")
            for t in range(ledger.t + 1, line["t"] + 1):
                ledger.step(t, torch.empty((), device="meta"), line["lr"], line["round"], ledger.num_replicas)
            ledger.flush(line["lr"], line["round"])
        elif name == "pause":
            self._pause.enter_context(ledger.paused())
        elif name == "resume":
            self._pause.close()
        elif name == "evaluation":
            ledger.evaluation(0.0, 1.0)
        else:
            assert name == "summary", name
            ledger.summary("", 0, 1.0)

    def last(self) -> dict[str, Any]:
        """The summary, once all lines are written."""
        if self._num_written < len(self._lines):
            raise _mixed()
        return self._latest

    def _next(self, kind: str) -> Record:
        if self._num_written == len(self._lines) or self._lines[self._num_written]["kind"] != kind:
            raise _mixed()
        return self._lines[self._num_written]

    def _write(self, new: Record) -> None:
        old = self._next(new["kind"])
        if any(old[key] != new[key] for key in _SAME):
            raise _mixed()
        self._num_written += 1
        self._latest = {**old, **{key: new[key] for key in _TIMES if key in old}}
        self._write_line(self._latest)


def _mixed() -> ValueError:
    return ValueError("the metrics and the log of this directory are not of one run; simulate the run anew")
