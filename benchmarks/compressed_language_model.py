"""A language model by DiLoCo with every kind of compressor, with and without feedback, at equal tokens: loss and bytes.

    python -m benchmarks.compressed_language_model --train english_train.txt.xz --validation english_val.txt.xz

Each run is a `lowcomm simulate` of its own: the replicas share one device, only the wire differs. Bytes are those that
a replica hands to the wire, evaluation left out. Beside the record lies pareto.png. With --go_on the runs that stand in
the record of the same name, made with the same arguments, are kept and the others added.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from benchmarks.record import Runs, kept_runs, origins, parser, table, write_record
from benchmarks.simulations import Job, Parts, add_run_flags, add_runs, language_run, part
from lowcomm.report.si import si

# that a run may be added to a record with others of: everything else must be equal
FREE = ("only", "jobs", "go_on")
KEPT = ("num_parameters", "members", "t", "round", "tokens", "loss", "val_loss", "val_bits_per_byte", "wire_bytes")


def quantized(codec: str, **options: Any) -> Parts:
    """A two-shot all-reduce of a code."""
    return part("Quantized", codec=part(codec, **options))


EXACT = {"fp32": part("Identity"), "bf16": part("Cast", dtype="bfloat16")}
LOSSY = {
    "int8": quantized("Absmax", bits=8, block=256),
    "nf4": quantized("NF4"),
    "e3m0": quantized("E3M0"),
    "2-bit": quantized("Bins"),
    "top-k 1/64 + 2-bit": part("TopK", density=1 / 64, values=part("SignMagnitude"), indices="elias_fano"),
    "PowerSGD r=4": part("PowerSGD", rank=4),
    "PowerSGD r=16": part("PowerSGD", rank=16),
}
SPARSE_DECAY = 0.95  # of SparseLoCo's error memory


def variants() -> dict[str, Parts]:
    """What is compared, by name: the arguments of DiLoCo but ``every``, or data parallel."""
    runs = {"data parallel": {}}
    runs |= {name: {"reducer": {"compressor": compressor}} for name, compressor in EXACT.items()}
    for name, compressor in LOSSY.items():
        decay = SPARSE_DECAY if name.startswith("top-k") else 1.0
        runs[name] = {"reducer": {"compressor": compressor}}
        runs[f"{name}, feedback"] = {"reducer": {"compressor": compressor, "feedback": part("EF14", decay=decay)}}
    sparse = {"compressor": LOSSY["top-k 1/64 + 2-bit"], "feedback": part("EF14", decay=SPARSE_DECAY)}
    runs["SparseLoCo"] = {"reducer": sparse, "outer": part("SGD", lr=1.0)}
    return runs


def config(given: argparse.Namespace, name: str, options: Parts) -> Parts:
    """A run of `lowcomm simulate`."""
    num_steps = -(-given.tokens // (given.batch * given.replicas * given.seq_len))
    nesterov = part("Nesterov", lr=given.outer_lr, momentum=given.outer_momentum)
    method = (
        part("DataParallel")
        if name == "data parallel"
        else part("DiLoCo", **{"every": given.every, "outer": nesterov, **options})
    )
    optimizer = {"path": "torch.optim.AdamW", "args": {"lr": given.lr, "betas": [0.9, 0.95], "weight_decay": 0.1}}
    return language_run(given, method, optimizer, num_steps, "replica", given.seed)


def save(given: argparse.Namespace, runs: Runs) -> Path:
    """Write the record and the picture of the runs that have ended."""
    baseline = runs.get("fp32")
    rows = []
    for name, x in runs.items():
        beside = "–" if baseline is None else f"{x['val_loss'] / baseline['val_loss'] - 1:+.2%}"
        fewer = "–" if baseline is None else f"{baseline['wire_bytes'] / x['wire_bytes']:,.1f}"
        bits = 8 * x["wire_bytes"] / (max(1, x["round"]) * x["num_parameters"])
        losses = [f"{x['val_loss']:.4f}", f"{x['val_bits_per_byte']:.4f}", beside]
        rows.append([name, *losses, si(x["wire_bytes"], "B"), fewer, f"{bits:.3g}"])
    columns = [
        "run",
        "val loss (nats)",
        "bits/byte",
        "against fp32",
        "sent per replica",
        "times fewer",
        "bits / param / round",
    ]
    first = next(iter(runs.values()))
    about = (
        f"Llama {given.size} ({first['num_parameters']:,} parameters), {given.replicas} replicas simulated on one "
        f"device, {given.batch} x {given.seq_len} tokens a step and replica, {first['tokens']:,} byte tokens in all, "
        f"DiLoCo(every={given.every}, outer Nesterov({given.outer_lr}, {given.outer_momentum})), {given.precision}, "
        f"one seed. Feedback is EF14, with decay {SPARSE_DECAY} for top-k and 1 elsewhere; SparseLoCo is that with "
        "outer SGD(1)."
    )
    lines = [about, "", table(columns, rows), "", "![loss against bytes](pareto.png)", "", origins(runs)]
    record = write_record(given, runs, "\n".join(lines))
    draw(runs, record / "pareto.png")
    return record


def draw(runs: Runs, path: Path) -> None:
    """Loss against bytes; the line joins the runs that no other beats in both."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    ax = figure.subplots()
    points = {name: (x["wire_bytes"], x["val_bits_per_byte"]) for name, x in runs.items()}
    best: list[tuple[float, float]] = []
    for point in sorted(points.values()):
        if not best or point[1] < best[-1][1]:
            best.append(point)
    ax.plot(*zip(*best, strict=True), color="#999999", linewidth=1, zorder=0)
    for name, (sent, loss) in points.items():
        kept = "feedback" in name or name == "SparseLoCo"
        ax.scatter([sent], [loss], s=24, color="#4878a8" if kept else "#d8a24a", marker="o" if kept else "s")
        ax.annotate(name, (sent, loss), textcoords="offset points", xytext=(4, 3), fontsize=7)
    ax.set_xscale("log")
    ax.set_xlabel("bytes sent by a replica")
    ax.set_ylabel("validation loss (bits per byte)")
    ax.grid(linewidth=0.4)
    figure.savefig(path, dpi=110)


def main() -> None:
    """Simulate, print, record; what is done so far is recorded as runs end."""
    flags = parser(__doc__, "compressed_language_model")
    add_run_flags(flags, "each replica")
    flags.add_argument("--only", nargs="+", default=None, help="names of runs; all by default")
    flags.add_argument("--replicas", type=int, default=4)
    flags.add_argument("--lr", type=float, default=1.5e-3)
    flags.add_argument("--every", type=int, default=30, help="steps of a round")
    flags.add_argument("--outer_lr", type=float, default=1.0)
    flags.add_argument("--outer_momentum", type=float, default=0.5)
    flags.add_argument("--seed", type=int, default=0)
    flags.add_argument("--go_on", action="store_true", help="keep the runs of the record that is there")
    given = flags.parse_args()
    known = variants()
    if unknown := set(given.only or []) - set(known):
        flags.error(f"--only {sorted(unknown)} are unknown; there are {list(known)}")
    ended = kept_runs(given, FREE) if given.go_on else {}
    if given.go_on and not ended:
        flags.error(f"--go_on: there is no record {given.name} to go on with")
    wanted = [name for name in known if given.only is None or name in given.only]
    jobs = [Job(name, config(given, name, known[name]), given.replicas) for name in wanted]
    add_runs(given, ended, jobs, KEPT, lambda runs: save(given, {name: runs[name] for name in known if name in runs}))


if __name__ == "__main__":
    main()
