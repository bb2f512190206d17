"""`lowcomm simulate`: a run on a cluster that exists in virtual time.

The arithmetic is real; time and faults are the cluster's. Every rank runs the code that `lowcomm train` runs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import save_model

from lowcomm.assemble import assemble, describe_into
from lowcomm.checkpoint import Checkpoints
from lowcomm.comm.metered import Meter, MeteredComm
from lowcomm.config import Run, describe
from lowcomm.engine.base import Engine
from lowcomm.metrics import Metrics, ProgressSink, Sink
from lowcomm.sim.clock import Clock
from lowcomm.sim.cluster import Cluster
from lowcomm.sim.comm import World
from lowcomm.sim.compute import ComputeModel
from lowcomm.sim.engine import SimEngine
from lowcomm.sim.faults import Crash, Event, Partition, Rejoin, SlowDown
from lowcomm.sim.network import Links, Network
from lowcomm.sim.trace import Trace, write_chrome_trace
from lowcomm.train import train


def simulate(run: Run, cluster: Cluster, out: Path) -> dict[str, Any]:
    """Train one replica on each host of the cluster and return rank 0's summary line; times are virtual.

    Writes into ``out`` what `lowcomm train` would on all ranks (but no checkpoints), the cluster as cluster.yaml, and
    the timeline as trace.json, for Perfetto or chrome://tracing.

    Raises:
        ValueError: for anything wrong with the config, the data, the directory or the cluster, before training.
        PeerLost: when a rank waits for one that crashed.
        Deadlock: when all ranks wait.
    """
    if (out / "metrics.jsonl").exists():
        raise ValueError(f"{out} already holds a run; choose another --out")
    if run.checkpoint.every:
        raise ValueError("a simulation is not checkpointed: set checkpoint.every to 0")
    compute, events, num_ranks = cluster.compute_model(), cluster.fault_events(), cluster.num_ranks
    if compute.needs_calibration():
        raise ValueError("this compute model wants the time of a measured step; give it one: compute.seconds_per_step")
    if any(isinstance(event, Rejoin) for event in events):
        raise ValueError("a rank that comes back must be given the state it missed, and no method does that yet")

    run.steps(num_ranks)  # refuse what cannot run before reading data
    loaded = run.data.load()
    describe_into(run, out)
    (out / "cluster.yaml").write_text(yaml.safe_dump(describe(cluster), sort_keys=False), encoding="utf-8")
    clock, trace, links = Clock(), Trace(), cluster.links()
    network = Network(clock, links, trace.add_flow)
    world = World(clock, network)
    schedule_faults(events, clock, world, network, links)
    members = tuple(range(num_ranks))

    def program(rank: int) -> dict[str, Any]:
        comm = MeteredComm(world.comm(rank, members), Meter())
        sinks: list[Sink] = [ProgressSink(run.steps(num_ranks))] if rank == 0 else []
        metrics = Metrics(out / ("metrics.jsonl" if rank == 0 else f"metrics.rank{rank}.jsonl"), sinks)
        around = partial(_on_clock, clock=clock, compute=compute, rank=rank, trace=trace)
        try:
            assembled = assemble(run, loaded, comm, torch.device("cpu"), metrics.write, around)
            train(assembled.replica, assembled.plan, Checkpoints(out / "checkpoints", rank, num_ranks, "simulated"))
            if rank == 0:
                save_model(assembled.model, str(out / "final.safetensors"))
            return assembled.summary()
        finally:
            metrics.close()

    for rank in members:
        clock.spawn(rank, partial(program, rank))
    summaries = clock.run()
    write_chrome_trace(trace.spans, out / "trace.json")
    first: dict[str, Any] = summaries[0]
    return first


def schedule_faults(events: Sequence[Event], clock: Clock, world: World, network: Network, links: Links) -> None:
    """Put crashes, partitions and slow links on the clock; pauses and slow steps are the compute model's."""
    for event in events:
        if isinstance(event, Crash):
            clock.at(event.at_s, partial(world.crash, event.rank))
        elif isinstance(event, Partition):
            for source, to in event.pairs(links.num_ranks):
                clock.at(event.at_s, partial(network.block, source, to))
                clock.at(event.at_s + event.seconds, partial(network.unblock, source, to))
        elif isinstance(event, SlowDown) and event.what == "network":
            up, down = links.up_bits_per_s[event.rank], links.down_bits_per_s[event.rank]
            clock.at(event.at_s, partial(network.set_rate, event.rank, up / event.factor, down / event.factor))
            clock.at(event.at_s + event.seconds, partial(network.set_rate, event.rank, up, down))


def _on_clock(engine: Engine, clock: Clock, compute: ComputeModel, rank: int, trace: Trace) -> Engine:
    """The engine whose steps take this rank's time and stand in the trace."""
    t = 0

    def sleep(seconds: float) -> None:
        nonlocal t
        t += 1
        trace.add(rank, "compute", clock.now, clock.now + seconds, f"step {t}")
        clock.sleep(seconds)

    seconds: Callable[[int, float], float] = partial(compute.seconds, rank)
    return SimEngine(engine, sleep, seconds, lambda: clock.now)
