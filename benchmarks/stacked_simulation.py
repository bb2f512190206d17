"""Seconds of a simulated step of all replicas, with gradients computed for each alone and for all at once.

    python -m benchmarks.stacked_simulation --device cuda

`lowcomm simulate` with and without --stacked, in turns, in one process: DiLoCo on hosts of equal speed. A step's time
is the difference of a long and a short run over that of their steps, so what a run costs once does not count.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path

from benchmarks.record import parser, table, write_record
from lowcomm.cli import parse_simulation
from lowcomm.sim.simulate import simulate


def seconds(given: argparse.Namespace, stacked: bool, num_steps: int) -> float:
    """Of one simulation, by the wall."""
    with tempfile.TemporaryDirectory() as folder:
        run, cluster, _ = parse_simulation(
            [
                *("--model", "Llama", "--model.size", given.size, "--data.seq_len", str(given.seq_len)),
                *("--batch.size", str(given.batch), "--batch.per", "replica", "--algorithm", "DiLoCo"),
                *("--algorithm.every", str(given.every), "--num_steps", str(num_steps), "--device", given.device),
                *("--precision", given.precision, "--checkpoint.every", "0", "--evaluation.num_tokens", "4096"),
                *("--log.every", "1000", "--cluster", "LAN", "--cluster.num_hosts", str(given.replicas)),
            ]
        )
        start = time.perf_counter()
        simulate(run, cluster, Path(folder, "run"), stacked=stacked)
        return time.perf_counter() - start


def main() -> None:
    """Measure, print, record."""
    flags = parser(__doc__, "stacked_simulation")
    flags.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    flags.add_argument("--size", default="1m", help="of the Llama")
    flags.add_argument("--replicas", type=int, default=16)
    flags.add_argument("--batch", type=int, default=4, help="sequences of a replica's step")
    flags.add_argument("--seq_len", type=int, default=128)
    flags.add_argument("--every", type=int, default=20, help="steps of a round")
    flags.add_argument("--precision", choices=["fp32", "bf16_mixed", "bf16"], default="fp32")
    flags.add_argument("--steps", type=int, nargs=2, default=[20, 60], help="of the short and the long run")
    flags.add_argument("--repeats", type=int, default=3)
    given = flags.parse_args()
    short, long = given.steps
    if not 0 < short < long:
        flags.error(f"--steps {short} {long}: the first must be positive and the second larger")
    step_s: dict[bool, list[float]] = {False: [], True: []}
    for stacked in step_s:  # first touches
        seconds(given, stacked, 2)
    for _ in range(given.repeats):
        for stacked, found in step_s.items():
            few = seconds(given, stacked, short)
            found.append((seconds(given, stacked, long) - few) / (long - short))
            print(f"stacked {stacked}: {found[-1] * 1e3:.1f} ms a step of all replicas", flush=True)
    medians = {stacked: statistics.median(found) for stacked, found in step_s.items()}
    rows = []
    for stacked, found in step_s.items():
        spread = f"{min(found) * 1e3:.1f} to {max(found) * 1e3:.1f}"
        rows.append(["at once" if stacked else "one by one", f"{medians[stacked] * 1e3:.1f}", spread])
    about = (
        f"A simulated step of {given.replicas} replicas of a Llama {given.size}, {given.batch} x {given.seq_len} "
        f"tokens each, {given.precision}, DiLoCo(every={given.every}): one by one over at once "
        f"{medians[False] / medians[True]:.2f} (medians of {given.repeats})."
    )
    summary = f"{about}\n\n{table(['gradients', 'ms a step', 'range'], rows)}"
    record = write_record(given, {"one_by_one_s": step_s[False], "at_once_s": step_s[True]}, summary)
    print((record / "summary.md").read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
