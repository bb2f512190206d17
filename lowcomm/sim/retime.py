"""`lowcomm retime`: the times of a simulated run on another cluster, without training again.

The run is simulated on the other cluster with timing only, with the same messages. Lines of metrics keep their losses
and get the new times.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import yaml

from lowcomm.checkpoint import Checkpoints
from lowcomm.config import Run, describe
from lowcomm.metrics import Metrics, Record, check_names, file_of, read
from lowcomm.places import name_of, place_of
from lowcomm.sim.cluster.cluster import Cluster
from lowcomm.sim.cluster.faults import Crash, Rejoin
from lowcomm.sim.engine import SimEngine
from lowcomm.sim.machines import Machines
from lowcomm.sim.record.timing import assemble_shapes, explained, shapes_of
from lowcomm.sim.record.trace import write_chrome_trace
from lowcomm.train import train

_TIMES = ("time_s", "comm_wait_s", "compute_s", "tokens_per_s", "mfu")


def retime(run_dir: Path, run: Run, cluster: Cluster, out: Path) -> dict[str, Any]:
    """Give a simulated run the times of another cluster with as many hosts, and return rank 0's summary line.

    Writes into ``out`` what `lowcomm.sim.simulate.simulate` would have written for that cluster, but for the weights.

    Args:
        run: what config.yaml in ``run_dir`` says.

    Raises:
        ValueError: when ``out`` holds a run, ``run_dir`` holds no simulation that ended, the cluster has more or fewer
            hosts or ranks that crash, or the run could have learnt, sent or done something else at other times.
    """
    if any(out.glob("metrics*.jsonl")):
        raise ValueError(f"{out} already holds a run; choose another --out")
    vocab_size, token_flops, peak_flops = _kept(run_dir)
    check_names(run_dir)
    num_ranks = len(list(run_dir.glob("metrics*.jsonl")))
    _check(run, cluster, num_ranks)
    shapes = shapes_of(run, num_ranks, vocab_size)
    machines = Machines(cluster, isolate_torch=False)
    found: list[list[Record]] = [[] for _ in range(num_ranks)]

    def program(rank: int) -> None:
        def refuse(what: str) -> None:
            raise ValueError(
                f"{run_dir} cannot be timed anew: rank {rank} {what}, so it may do something else at other times; "
                "simulate it on the other cluster instead"
            )

        comm, pace = machines.comm(rank, refuse), machines.pace(rank)
        assembled = assemble_shapes(run, shapes, comm, found[rank].append, lambda engine: SimEngine(engine, pace))
        ledger = assembled.replica.ledger
        ledger.now = lambda: machines.clock.now  # which may be read
        ledger.token_flops, ledger.peak_flops = token_flops, peak_flops
        place = place_of(assembled.replica.comm, num_shards=1)
        train(assembled.replica, assembled.plan, Checkpoints(out / "checkpoints", place, "simulated"))
        assembled.summary()

    with explained():
        machines.run(program)
    lines = [_anew(file_of(run_dir, name_of(rank)), new) for rank, new in enumerate(found)]

    out.mkdir(parents=True, exist_ok=True)
    for name in ("config.yaml", "environment.json"):
        shutil.copyfile(run_dir / name, out / name)
    (out / "cluster.yaml").write_text(yaml.safe_dump(describe(cluster), sort_keys=False), encoding="utf-8")
    write_chrome_trace(machines.trace.spans, out / "trace.json")
    for rank, of_rank in enumerate(lines):
        metrics = Metrics(file_of(out, name_of(rank)))
        for line in of_rank:
            metrics.write(line)
    return lines[0][-1]


def _kept(run_dir: Path) -> tuple[int, float | None, float | None]:
    """What a simulation that ended left: its vocabulary, and the FLOPs of a token and of its device each second."""
    path = run_dir / "environment.json"
    if not path.exists():
        raise ValueError(f"there is no {path}; `lowcomm simulate` writes one: simulate it anew")
    try:
        kept = json.loads(path.read_text(encoding="utf-8"))["simulated"]
        return kept["vocab_size"], kept["token_flops"], kept["peak_flops"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is not of a simulation that ended ({error!r}); simulate it anew") from error


def _check(run: Run, cluster: Cluster, num_ranks: int) -> None:
    if cluster.num_ranks != num_ranks:
        raise ValueError(
            f"the cluster has {cluster.num_ranks} hosts, but the run had {num_ranks} replicas; more or fewer learn "
            f"something else: take a cluster of {num_ranks}, or simulate anew"
        )
    if any(isinstance(event, Crash | Rejoin) for event in cluster.fault_events()):
        raise ValueError("a rank crashes in this cluster, which changes what the others learn; simulate the run on it")
    if cluster.compute.needs_calibration():
        raise ValueError("there is no real step here whose time could be measured; give Measured a step_s")
    if run.compile and run.algorithm.sends_in_backward():
        raise ValueError(
            "the run compiles its model and overlaps its messages with backward, whose order only the compiled code "
            "knows; simulate it on the other cluster"
        )
    cluster.check_steps(run.steps(num_ranks))


def _anew(path: Path, new: list[Record]) -> list[dict[str, Any]]:
    """The lines of a file with the times of others, which must say the same of all that both know."""
    old = read(path)
    differing = [
        f"line {number} has {key} {before.get(key)}, not {after[key]}"
        for number, (before, after) in enumerate(zip(old, new, strict=False), start=1)
        for key in after
        if key not in _TIMES and before.get(key) != after[key]
    ]
    if differing or len(old) != len(new):
        what = differing[0] if differing else f"{len(old)} lines, not {len(new)}"
        raise ValueError(
            f"{path} is not what this run sends and does without values ({what}): sizes or order depended on values, "
            "or the files are not of one run; simulate it on the other cluster"
        )
    return [
        {**before, **{key: after[key] for key in _TIMES if key in before}}
        for before, after in zip(old, new, strict=True)
    ]
