"""How fast the simulator is: a pattern of messages beside SimPy, the training loop without and with its arithmetic.

    OMP_NUM_THREADS=1 python -m benchmarks.simulator_speed            # all parts
    OMP_NUM_THREADS=1 python -m benchmarks.simulator_speed --quick    # a rehearsal

speed    Ranks on meta tensors go through the real `Clock`, `Network`, `World` and `SimComm`: in every round they
         compute for a random time and gather among eight, compute and pass a message to the next rank, compute and
         sum among all. An event is a hand-over to a rank, or the start or the end of a flow. SimPy runs the same
         pattern in the same process, in turns: the same hand-overs and flows, but their rates are given, no link is
         shared, and no message holds anything.
scaling  The same pattern, without a training loop, for more and more ranks, and for more and more rounds, each in a
         process of its own, with its peak memory; the cost against c n log n.
loop     The training loop itself in timing alone, likewise (`benchmarks.simulated_loop`).
real     Replicas of a Llama take the steps and the round of the quick start's DiLoCo, on the simulator and in a plain
         loop over the same engines, batches and algorithm, where each rank hears its own echo. In turns.

Seconds are the process's CPU time, as the machine may be shared; those of the wall are recorded beside them.

Needs SimPy: pip install 'lowcomm[bench]'.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.record import ROOT, parser, table, write_record
from benchmarks.simulated_loop import loop
from lowcomm.algorithms.base import step
from lowcomm.algorithms.diloco import DiLoCo
from lowcomm.assemble import build_engine
from lowcomm.comm.base import Comm
from lowcomm.comm.echo import EchoComm
from lowcomm.config import Batch, Checkpointing, Run
from lowcomm.engine.base import Engine
from lowcomm.models.llama import Llama
from lowcomm.sim.memory import peak_bytes
from lowcomm.sim.wire import collectives
from lowcomm.sim.wire.clock import Clock
from lowcomm.sim.wire.comm import World
from lowcomm.sim.wire.links import BARE, Links
from lowcomm.sim.wire.network import Network
from lowcomm.tensors import rng

GROUP, SMALL, LARGE = 8, 1_000, 1_000_000  # ranks that gather; float32 numbers in a message and in a sum
LATENCY_S = 0.01
SIM_COLLECT_AFTER = 100_000  # as the clock sets it while it runs; SimPy gets the same


def main() -> None:
    """Measure, print, record."""
    flags = parser(__doc__, "simulator_speed")
    parts = ["speed", "scaling", "loop", "real"]
    flags.add_argument("--parts", nargs="+", choices=parts, default=parts)
    flags.add_argument("--quick", action="store_true", help="few ranks, few repetitions: does it run at all?")
    flags.add_argument("--ranks", type=int, default=10_000, help="of `speed`")
    flags.add_argument("--rounds", type=int, default=4, help="of `speed`; `scaling` takes 2")
    flags.add_argument("--repeats", type=int, default=5, help="pairs of runs in `speed` and `real`")
    flags.add_argument("--most_ranks", type=int, default=100_000, help="of `scaling` and `loop`")
    flags.add_argument("--replicas", type=int, default=16, help="of `real`")
    flags.add_argument("--size", default="1m", help="of the Llama")
    flags.add_argument("--steps", type=int, default=28, help="of each replica in a run of `real`; one round at the end")
    flags.add_argument("--point", type=int, nargs=2, default=None, help="ranks and rounds: print one point and stop")
    given = flags.parse_args()
    if given.point is not None:
        print(json.dumps(point(*given.point)))
        return
    if given.quick:
        given.ranks, given.repeats, given.most_ranks = 200, 2, 1000
        given.replicas, given.size, given.steps = 2, "500k", 2
    results: dict[str, Any] = {"torch_threads": torch.get_num_threads()}
    measures = {"speed": speed, "scaling": scaling, "loop": loop, "real": real}
    texts = []
    for part, measure in measures.items():
        if part in given.parts:
            results[part], text = measure(given)
            texts.append(text)
    texts.append(
        f"Seconds are CPU time of the process, in which torch computes on {results['torch_threads']} thread(s)."
    )
    folder = write_record(given, results, "\n\n".join(texts))
    if "scaling" in given.parts:
        save_scaling(folder / "scaling.svg", results["scaling"])
    print(f"record: {folder}")


# the pattern of events, twice


def rates(num_ranks: int) -> tuple[list[float], list[float]]:
    """Uneven up- and down-links, in bits per second."""
    draw = random.Random(0)
    return ([draw.uniform(5e7, 15e7) for _ in range(num_ranks)], [draw.uniform(1e8, 3e8) for _ in range(num_ranks)])


def think_s(rank: int, i: int) -> float:
    """How long a rank computes before it talks for the ith time: between 0.5 and 1.5 s, as if at random."""
    return 0.5 + (rank * 7919 + i * 104_729 + rank * i * 31) % 1009 / 1009


def lowcomm_run(num_ranks: int, num_rounds: int) -> tuple[Callable[[], object], Callable[[], int]]:
    """What to time, and how many events it had."""
    clock = Clock(isolate_torch=False)
    network = Network(clock, Links(*rates(num_ranks), lambda source, to: LATENCY_S, transport=BARE))
    world, everybody = World(clock, network, collectives.Ring()), tuple(range(num_ranks))
    small, large = torch.empty(SMALL, device="meta"), torch.empty(LARGE, device="meta")

    def program(rank: int) -> None:
        comm = world.comm(rank, everybody)
        first = rank // GROUP * GROUP
        near = comm.sub(everybody[first : first + GROUP])
        for i in range(num_rounds):
            clock.sleep(think_s(rank, 3 * i))
            near.all_gather(small).wait()
            clock.sleep(think_s(rank, 3 * i + 1))
            sent = comm.send(small, (rank + 1) % num_ranks)
            comm.recv(small, (rank - 1) % num_ranks).wait()
            sent.wait()
            clock.sleep(think_s(rank, 3 * i + 2))
            comm.all_sum(large).wait()

    for rank in everybody:
        clock.spawn(rank, partial(program, rank))
    return clock.run, lambda: clock.num_turns + 2 * network.num_flows


def simpy_run(num_ranks: int, num_rounds: int) -> Callable[[], object]:
    """The same hand-overs and flows in SimPy."""
    import simpy

    env = simpy.Environment()
    up, down = rates(num_ranks)

    def send(source: int, to: int, num_bytes: float, num_latencies: int, ended: Callable[[object], None]) -> None:
        seconds = 8 * num_bytes / min(up[source], down[to])

        def begin(_: object) -> None:
            env.timeout(seconds).callbacks.append(ended)

        env.timeout(num_latencies * LATENCY_S).callbacks.append(begin)

    class Ring:
        """A collective: its flows start with the last member, and it is over with the last flow."""

        def __init__(self, members: range, edge_bytes: float, num_latencies: int) -> None:
            self.members, self.edge_bytes, self.num_latencies = members, edge_bytes, num_latencies
            self.over, self.num_away, self.num_open = env.event(), len(members), len(members)

        def arrive(self) -> Any:
            self.num_away -= 1
            if not self.num_away:
                for i, source in enumerate(self.members):
                    to = self.members[(i + 1) % len(self.members)]
                    send(source, to, self.edge_bytes, self.num_latencies, self.ended)
            return self.over

        def ended(self, _: object) -> None:
            self.num_open -= 1
            if not self.num_open:
                self.over.succeed()

    def rings(members: range, edge_bytes: float, num_latencies: int) -> list[Ring]:
        return [Ring(members, edge_bytes, num_latencies) for _ in range(num_rounds)]

    groups = [range(first, min(first + GROUP, num_ranks)) for first in range(0, num_ranks, GROUP)]
    near = [rings(group, 4 * SMALL * (len(group) - 1), len(group) - 1) for group in groups]
    everybody = rings(range(num_ranks), 8 * LARGE * (num_ranks - 1) / num_ranks, 2 * (num_ranks - 1))
    messages = [[env.event() for _ in range(num_rounds)] for _ in range(num_ranks)]  # by sender

    def program(rank: int) -> Iterator[Any]:
        for i in range(num_rounds):
            yield env.timeout(think_s(rank, 3 * i))
            yield near[rank // GROUP][i].arrive()
            yield env.timeout(think_s(rank, 3 * i + 1))
            mine, theirs = messages[rank][i], messages[rank - 1][i]
            send(rank, (rank + 1) % num_ranks, 4 * SMALL, 1, lambda _, mine=mine: mine.succeed())
            yield theirs
            if not mine.processed:
                yield mine
            yield env.timeout(think_s(rank, 3 * i + 2))
            yield everybody[i].arrive()

    for rank in range(num_ranks):
        env.process(program(rank))

    def run() -> None:
        before = gc.get_threshold()
        gc.set_threshold(SIM_COLLECT_AFTER, *before[1:])
        try:
            env.run()
        finally:
            gc.set_threshold(*before)

    return run


def timed(run: Callable[[], object]) -> dict[str, float]:
    """Seconds of the process and of the wall."""
    gc.collect()
    cpu, wall = time.process_time(), time.perf_counter()
    run()
    return {"cpu_s": time.process_time() - cpu, "wall_s": time.perf_counter() - wall}


def spread(values: list[float]) -> dict[str, float]:
    """Median, least and most."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


# the parts; each returns its results and what to say of them


def speed(given: argparse.Namespace) -> tuple[Any, str]:
    """Events per second, beside SimPy's on the same pattern."""
    runs = []
    for _ in range(given.repeats):
        run, num_events = lowcomm_run(given.ranks, given.rounds)
        ours = timed(run)
        theirs = timed(simpy_run(given.ranks, given.rounds))
        runs.append({"num_events": num_events(), "lowcomm": ours, "simpy": theirs})
        print(runs[-1], flush=True)
    per_s = {
        f"{name}_{clock}": spread([run["num_events"] / run[name][f"{clock}_s"] for run in runs])
        for name in ("lowcomm", "simpy")
        for clock in ("cpu", "wall")
    }
    columns = ("events per second of", "median", "min", "max")
    rows = [(name.replace("_", ", "), *(f"{x:,.0f}" for x in row.values())) for name, row in per_s.items()]
    text = (
        f"A pattern of messages, {given.ranks:,} ranks, {runs[0]['num_events']:,} events, {given.repeats} runs each in "
        f"turns (target: 50,000 events/s, aim 100,000).\n\n{table(columns, rows)}"
    )
    return {"events_per_s": per_s, "runs": runs}, text


def point(num_ranks: int, num_rounds: int) -> dict[str, float]:
    """One run in this process: its events, its seconds without and with making the ranks, its peak memory."""
    run, num_events = lowcomm_run(num_ranks, num_rounds)
    seconds = timed(run)
    peak = peak_bytes(torch.device("cpu"))
    return {"ranks": num_ranks, "rounds": num_rounds, "events": num_events(), **seconds, "peak_bytes": peak}


def scaling(given: argparse.Namespace) -> tuple[Any, str]:
    """The cost against n log n, of ranks and of events, and the memory of very many ranks."""
    sizes = [n for n in (100, 300, 1000, 3000, 10_000, 30_000, 100_000) if n <= given.most_ranks]
    lengths = [1, 3, 10, 30] if given.quick else [1, 3, 10, 30, 100]
    by_ranks = [measured(n, 2, 5 if n <= 3000 else 3 if n <= 10_000 else 1) for n in sizes]
    by_events = [measured(given.most_ranks // 100, rounds, 3) for rounds in lengths]
    results: dict[str, Any] = {}
    for name, points, n in (("ranks", by_ranks, "ranks"), ("events", by_events, "events")):
        costs = [x["cpu_s"] / (x[n] * math.log2(x[n])) for x in points]
        x, y = [math.log(x[n] * math.log2(x[n])) for x in points], [math.log(p["cpu_s"]) for p in points]
        exponent = statistics.linear_regression(x, y).slope
        fit = math.exp(statistics.mean(map(math.log, costs)))
        results[name] = {"points": points, "seconds_per_n_log2_n": fit, "exponent_of_n_log_n": exponent}
    largest = by_ranks[-1]
    rows = [
        (
            *(f"{x['ranks']:,}", f"{x['rounds']}", f"{x['events']:,}", f"{x['cpu_s']:.2f}", f"{x['wall_s']:.2f}"),
            *(f"{x['events'] / x['cpu_s']:,.0f}", f"{x['peak_bytes'] / 1e9:.2f}"),
        )
        for x in (*by_ranks, *by_events)
    ]
    text = (
        f"Cost of the pattern as (n log n)^a: a = {results['ranks']['exponent_of_n_log_n']:.3f} in ranks, "
        f"{results['events']['exponent_of_n_log_n']:.3f} in events (1 is n log n). {largest['ranks']:,} ranks have a "
        f"peak of {largest['peak_bytes'] / 1e9:.2f} GB (target: 4 GB for 100,000), of which torch itself "
        f"{by_ranks[0]['peak_bytes'] / 1e9:.2f} GB. Picture: scaling.svg.\n\n"
        + table(("ranks", "rounds", "events", "CPU s", "wall s", "events/s", "peak GB"), rows)
    )
    return results, text


def measured(num_ranks: int, num_rounds: int, num_runs: int) -> dict[str, float]:
    """The median run of some, each in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.simulator_speed", "--point", str(num_ranks), str(num_rounds)]
    runs: list[dict[str, float]] = []
    for _ in range(num_runs):
        printed = subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True).stdout
        runs.append(json.loads(printed.splitlines()[-1]))
    middle = sorted(runs, key=lambda run: run["cpu_s"])[num_runs // 2]
    print(middle, flush=True)
    return middle


def save_scaling(path: Any, results: Any) -> None:
    """Seconds over n log n, for both n, with the fitted constant."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.4), layout="constrained")
    for ax, name in zip(figure.subplots(1, 2), ("ranks", "events"), strict=True):
        points, fit = results[name]["points"], results[name]["seconds_per_n_log2_n"]
        n = [x[name] for x in points]
        costs = [1e6 * x["cpu_s"] / (x[name] * math.log2(x[name])) for x in points]
        ax.plot(n, costs, marker="o", markersize=4, linewidth=1.5, label="measured")
        ax.axhline(1e6 * fit, color="grey", linewidth=1, label=f"{1e6 * fit:.3g} µs · n log2 n")
        ax.set(xscale="log", xlabel=name, ylabel="CPU µs / (n log2 n)", ylim=(0, 1.3 * max(costs)))
        ax.grid(linewidth=0.4)
        ax.legend()
    figure.savefig(path)


def real(given: argparse.Namespace) -> tuple[Any, str]:
    """Real steps on the simulator over the same steps in a plain loop."""
    runs = []
    for i in range(given.repeats + 1):
        ways = [("bare", bare_steps), ("simulated", simulated_steps)]
        pair = {name: steps(given, seed=i) for name, steps in (ways if i % 2 else ways[::-1])}
        assert pair["bare"].pop("loss") == pair["simulated"].pop("loss"), "before the round both compute the same"
        if i:  # the first warms up
            runs.append(pair)
            print(pair, flush=True)
    medians = {
        name: {clock: statistics.median(run[name][clock] for run in runs) for clock in ("cpu_s", "wall_s")}
        for name in ("bare", "simulated")
    }
    ratio = {clock: medians["simulated"][clock] / medians["bare"][clock] for clock in ("cpu_s", "wall_s")}
    each = spread([run["simulated"]["cpu_s"] / run["bare"]["cpu_s"] for run in runs])
    text = (
        f"Real steps, {given.replicas} replicas of a Llama {given.size}, {given.steps} steps of 4 x 128 tokens and a "
        f"round of DiLoCo each, {given.repeats} runs each in turns: simulated over bare {ratio['cpu_s']:.4f} in CPU "
        f"time (ratio of medians; pairs {each['median']:.4f}, from {each['min']:.4f} to {each['max']:.4f}), "
        f"{ratio['wall_s']:.4f} by the wall (target: at most 1.05)."
    )
    return {"ratio_of_medians": ratio, "medians": medians, "pairs": each, "runs": runs}, text


def replicas(given: argparse.Namespace, seed: int) -> tuple[DiLoCo, list[Engine], list[list[Tensor]]]:
    """Engines that start alike, and the batches of each."""
    algorithm = DiLoCo(every=given.steps)
    checkpoint = Checkpointing(every=0)
    run = Run(model=Llama(given.size), algorithm=algorithm, batch=Batch(4), checkpoint=checkpoint, num_steps=1000)
    engines: list[Engine] = [build_engine(run, run.model.build(256, 0), 1000) for _ in range(given.replicas)]
    generator = rng(seed, "simulator_speed")
    batches = [[torch.randint(256, (4, 129), generator=generator) for _ in range(given.steps)] for _ in engines]
    return algorithm, engines, batches


def bare_steps(given: argparse.Namespace, seed: int) -> dict[str, float]:
    """A plain loop over replicas that take their steps in turns."""
    algorithm, engines, batches = replicas(given, seed)
    comms = [EchoComm(given.replicas, rank) for rank in range(given.replicas)]
    states = [algorithm.init(engine, comm) for engine, comm in zip(engines, comms, strict=True)]
    losses = []

    def run() -> None:
        for t in range(1, given.steps + 1):
            for rank, (engine, comm) in enumerate(zip(engines, comms, strict=True)):
                losses.append(one_step(algorithm, t, engine, states[rank], comm, batches[rank][t - 1]))

    return {**timed(run), "loss": math.fsum(map(float, losses))}


def simulated_steps(given: argparse.Namespace, seed: int) -> dict[str, float]:
    """The same on a clock and a network; a step takes a second."""
    algorithm, engines, batches = replicas(given, seed)
    clock = Clock()
    world = World(clock, Network(clock, Links(*rates(given.replicas), lambda source, to: LATENCY_S)))
    comms = [world.comm(rank, range(given.replicas)) for rank in range(given.replicas)]
    states = [algorithm.init(engine, comm) for engine, comm in zip(engines, comms, strict=True)]
    losses = []

    def program(rank: int) -> None:
        for t in range(1, given.steps + 1):
            losses.append(one_step(algorithm, t, engines[rank], states[rank], comms[rank], batches[rank][t - 1]))
            clock.sleep(1.0)

    for rank in range(given.replicas):
        clock.spawn(rank, partial(program, rank))
    return {**timed(clock.run), "loss": math.fsum(map(float, losses))}


def one_step(algorithm: DiLoCo, t: int, engine: Engine, state: Any, comm: Comm, batch: Tensor) -> Tensor:
    """What the training loop does with a batch."""
    loss = step(algorithm, t, engine, state, comm, batch)
    return loss


if __name__ == "__main__":
    main()
