"""`lowcomm simulate`: a run on a cluster in virtual time.

The arithmetic is real, or left out; time and faults are the cluster's. Every rank runs the code of `lowcomm train`.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml

from lowcomm.assemble import Assembled, assemble, autocast_of, describe_into, device_of
from lowcomm.attendance import Seat
from lowcomm.checkpoint import Checkpoints
from lowcomm.comm.metered import MeteredComm
from lowcomm.config import Run, describe
from lowcomm.console import show
from lowcomm.engine.base import Engine
from lowcomm.engine.torch_engine import TorchEngine
from lowcomm.metrics import Metrics, ProgressSink, Sink, file_of
from lowcomm.places import name_of, place_of
from lowcomm.sim.cluster.calibrate import measured_step_s
from lowcomm.sim.cluster.cluster import Cluster
from lowcomm.sim.cluster.faults import Rejoin
from lowcomm.sim.engine import SimEngine
from lowcomm.sim.machines import Machines
from lowcomm.sim.memory import Residence
from lowcomm.sim.record.timing import assemble_shapes, explained, shapes_of
from lowcomm.sim.record.trace import write_chrome_trace
from lowcomm.sim.seats import seats_of
from lowcomm.sim.stacked import Stack, require_stackable
from lowcomm.state import state_tree
from lowcomm.train import train


def simulate(
    run: Run,
    cluster: Cluster,
    out: Path,
    timing_only: bool = False,
    num_resident: int | None = None,
    stacked: bool = False,
) -> dict[str, Any]:
    """Train one replica on each host of the cluster and return rank 0's summary line; times are virtual.

    Writes into ``out`` what `lowcomm train` would on all ranks, without checkpoints. Adds cluster.yaml; trace.json, the
    timeline for Perfetto or chrome://tracing; and, in environment.json, memory figures and what `lowcomm retime` needs.
    All replicas compute on the run's device.

    Args:
        timing_only: train shapes without values: no text is read, and there are no losses and no final parameters.
        num_resident: how many replicas are on the device at once, the others moved out (see `Residence`); None: all.
        stacked: compute the gradients of many replicas at once (see `Stack`).

    Raises:
        ValueError: for anything wrong with the config, the data, the directory or the cluster, before training; with
            ``timing_only`` also for what depends on values.
        PeerLost: when a rank waits for one that crashed.
        Deadlock: when all ranks wait.
    """
    _refuse(run, cluster, out, timing_only, num_resident, stacked)
    num_ranks = cluster.num_ranks
    device = torch.device("cpu") if timing_only else device_of(run)
    residence = Residence(device, num_resident, out)
    stack = Stack(autocast_of(run), compile=run.compile) if stacked else None
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.cuda.init()  # before the clock notes what state torch is in
    build = _timing(run, num_ranks) if timing_only else _real(run, device)
    if cluster.compute.needs_calibration():
        step_s = measured_step_s(lambda comm: build(comm, lambda record: None, lambda engine: engine, None), num_ranks)
        show(f"a step takes {step_s:.4g} s on this machine")
        cluster = replace(cluster, compute=cluster.compute.calibrated(step_s))
    describe_into(run, out)
    (out / "cluster.yaml").write_text(yaml.safe_dump(describe(cluster), sort_keys=False), encoding="utf-8")
    machines = Machines(cluster, isolate_torch=not timing_only, before_turn=residence.enter if num_resident else None)
    kept: dict[str, Any] = {"vocab_size": run.data.tokenizer.vocab_size}  # what `lowcomm.sim.retime` asks for

    seats = seats_of(run.participation, machines.clock, num_ranks)

    def program(rank: int) -> dict[str, Any]:
        sinks: list[Sink] = [ProgressSink(run.steps(num_ranks))] if rank == 0 else []
        metrics = Metrics(file_of(out, name_of(rank)), sinks)
        pace = machines.pace(rank)

        def around(engine: Engine) -> Engine:
            if not timing_only:  # then there is nothing to keep anywhere
                residence.own(rank, engine.slots)
            if stack is None:
                return SimEngine(engine, pace)
            assert isinstance(engine, TorchEngine), "refused by `require_stackable`"
            joined = stack.join(rank, engine)
            return SimEngine(joined, pace, joined.announce)

        try:
            assembled = build(machines.comm(rank), metrics.write, around, seats[rank])
            if not timing_only:
                residence.own(rank, partial(_states, assembled))
            if rank == 0:
                ledger = assembled.replica.ledger
                kept.update(token_flops=ledger.token_flops, peak_flops=ledger.peak_flops)
            place = place_of(assembled.replica.comm, num_shards=1)
            train(assembled.replica, assembled.plan, Checkpoints(out / "checkpoints", place, "simulated"))
            if not timing_only:
                assembled.save(out / "final.safetensors")
            return assembled.summary()
        finally:
            residence.leave(rank)
            if stack is not None:
                stack.leave(rank)
            metrics.close()

    try:
        with residence, explained() if timing_only else nullcontext():
            summaries = machines.run(program)
    finally:
        write_chrome_trace(machines.trace.spans, out / "trace.json")
    environment = json.loads((out / "environment.json").read_text(encoding="utf-8"))
    environment |= {"simulated": kept, "memory": residence.measured()}
    (out / "environment.json").write_text(json.dumps(environment, indent=1), encoding="utf-8")
    show(residence.line())
    if stack is not None:
        show(stack.line())
    first: dict[str, Any] = summaries[0]
    return first


def _refuse(run: Run, cluster: Cluster, out: Path, timing_only: bool, num_resident: int | None, stacked: bool) -> None:
    """What cannot be simulated, as far as can be told before anything is read."""
    if any(out.glob("metrics*.jsonl")):  # of any rank: one that ended early may have written while rank 0 did not
        raise ValueError(f"{out} already holds a run; choose another --out")
    if run.checkpoint.every:
        raise ValueError("a simulation is not checkpointed: set checkpoint.every to 0")
    if run.participation is not None and cluster.fault_events():
        raise ValueError("participation does not go with a cluster's faults yet: a rank that is lost is waited for")
    for event in cluster.fault_events():
        if isinstance(event, Rejoin):
            raise ValueError(
                f"rank {event.rank} would come back at {event.at_s} s, but no method gives a rank the state that it "
                "missed; leave out Rejoin and repair_s, and of Availability all but each rank's first interval, from 0"
            )
    if timing_only and cluster.compute.needs_calibration():
        raise ValueError("timing alone takes no real step whose time could be measured; give Measured a step_s")
    if timing_only and num_resident is not None:
        raise ValueError(f"num_resident is {num_resident}, but timing alone has no states to move; leave it out")
    if stacked:
        require_stackable(run, timing_only, num_resident)
    # refuses a number of steps that the batch and the replicas do not allow
    cluster.check_steps(run.steps(cluster.num_ranks))


# a rank's replica, given its comm, where its metrics go, what is put around its engine, and its seat at the meeting
_Build = Callable[[MeteredComm, Callable[[dict[str, Any]], None], Callable[[Engine], Engine], Seat | None], Assembled]


def _real(run: Run, device: torch.device) -> _Build:
    loaded = run.data.load()
    return lambda comm, write, around, seat: assemble(run, loaded, comm, device, write, around, seat)


def _timing(run: Run, num_ranks: int) -> _Build:
    shapes = shapes_of(run, num_ranks)
    return lambda comm, write, around, seat: assemble_shapes(run, shapes, comm, write, around, seat)


def _states(assembled: Assembled) -> list[Any]:
    """All that one replica keeps on the device between its turns."""
    replica = assembled.replica
    return [list(assembled.model.parameters()), replica.engine.slots(), state_tree(replica.state)]
