"""A language model on real text with data parallel, Local SGD and DiLoCo at equal tokens: loss, bytes, speed, curves.

    python -m benchmarks.language_model --train english_train.txt.xz --validation english_val.txt.xz

Each method is a `lowcomm train` of its own under torchrun with the same model, data, batch, optimizer and schedule.
Every replica has the full batch in all of them (DiLoCo's accounting of 2023), so steps and tokens are equal too.
Beside the record lie curves.png, report.html, and each run's metrics and config.
"""

from __future__ import annotations

import argparse
import os
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from benchmarks.launch import train
from benchmarks.record import ROOT, parser, save_picture, table, write_record
from lowcomm.report.page import write_report
from lowcomm.report.table import SUMMARY_COLUMNS, summary_cells

# of each run's summary
KEPT = (
    *("algorithm", "num_parameters", "members", "t", "round", "tokens", "loss", "val_loss", "val_bits_per_byte"),
    *("bytes_sent", "bytes_received", "comm_wait_s", "compute_s", "time_s", "tokens_per_s", "mfu"),
)


def number(text: str) -> int:
    """A count such as 20M or 500k."""
    factor = {"k": 10**3, "M": 10**6, "G": 10**9}.get(text[-1:], 1)
    return round(float(text.rstrip("kMG")) * factor)


def algorithms(given: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """The methods by name, in the shape of the config."""
    nesterov = {"class_path": "Nesterov", "init_args": {"lr": given.outer_lr, "momentum": given.outer_momentum}}
    return {
        "data_parallel": {"class_path": "DataParallel"},
        "local_sgd": {"class_path": "LocalSGD", "init_args": {"every": given.local_sgd_every}},
        "diloco": {"class_path": "DiLoCo", "init_args": {"every": given.every, "outer": nesterov}},
    }


def config(given: argparse.Namespace, algorithm: dict[str, Any]) -> dict[str, Any]:
    """A run of `lowcomm train`."""
    num_steps = -(-given.tokens // (given.batch * given.replicas * given.seq_len))
    source = {name: text(getattr(given, name), given.separator) for name in ("train", "validation")}
    num_warmup_steps = round(given.warmup * num_steps)
    return {
        "model": {"class_path": "Llama", "init_args": {"size": given.size}},
        "data": {
            "source": source["train"],
            "validation": source["validation"],
            "tokenizer": {"class_path": "Bytes"},
            "seq_len": given.seq_len,
        },
        "algorithm": algorithm,
        "optimizer": {
            "path": "torch.optim.AdamW",
            "args": {"lr": given.lr, "betas": [0.9, 0.95], "weight_decay": 0.1},
        },
        "schedule": {"class_path": "Cosine", "init_args": {"num_warmup_steps": num_warmup_steps, "final": 0.1}},
        "batch": {"size": given.batch, "per": "replica"},
        "evaluation": {
            "every": max(1, num_steps // 20),
            "num_tokens": given.eval_tokens,
            "batch_size": given.batch,
        },
        "checkpoint": {"every": 0},
        "num_steps": num_steps,
        "clip_norm": 1.0,
        "precision": given.precision,
        "compile": given.compile,
        "device": given.device,
        "backend": given.backend,
        "seed": given.seed,
    }


def text(path: Path, separator: str) -> dict[str, Any]:
    """A source of documents; the path relative to where a run starts."""
    return {"class_path": "Files", "init_args": {"paths": [os.path.relpath(path, ROOT)], "separator": separator}}


def without_folders(path: Path) -> None:
    """Leave the names alone of the texts in a run's config.yaml, as in the record: folders are the machine's own."""
    run = yaml.safe_load(path.read_text(encoding="utf-8"))
    for source in (run["data"]["source"], run["data"]["validation"]):
        source["init_args"]["paths"] = [Path(text).name for text in source["init_args"]["paths"]]
    path.write_text(yaml.safe_dump(run, sort_keys=False), encoding="utf-8")


def main() -> None:
    """Train, print, record; what is done so far is recorded after each method."""
    flags = parser(__doc__, "language_model")
    flags.add_argument("--train", type=Path, required=True, help=".txt, .jsonl (both also .gz, .xz) or .parquet")
    flags.add_argument("--validation", type=Path, required=True)
    flags.add_argument("--separator", default="\0", help="between documents of a text file; a zero byte by default")
    flags.add_argument("--methods", nargs="+", default=["data_parallel", "local_sgd", "diloco"])
    flags.add_argument("--size", default="10m", help="of the Llama")
    flags.add_argument("--tokens", type=number, default="20M", help="of all replicas, rounded up to whole steps")
    flags.add_argument("--replicas", type=int, default=2)
    flags.add_argument("--seq_len", type=int, default=512)
    flags.add_argument("--batch", type=int, default=32, help="sequences of a replica's step")
    flags.add_argument("--lr", type=float, default=2e-3)
    flags.add_argument("--warmup", type=float, default=0.05, help="share of the steps")
    flags.add_argument("--every", type=int, default=30, help="DiLoCo's steps of a round")
    flags.add_argument("--outer_lr", type=float, default=0.7)
    flags.add_argument("--outer_momentum", type=float, default=0.9)
    flags.add_argument("--local_sgd_every", type=int, default=16)
    flags.add_argument("--eval_tokens", type=number, default="1M", help="of each evaluation; there are 20")
    flags.add_argument("--precision", choices=["fp32", "bf16_mixed", "bf16"], default="fp32")
    flags.add_argument("--compile", action="store_true")
    flags.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    flags.add_argument("--backend", choices=["auto", "gloo", "nccl"], default="auto")
    flags.add_argument("--seed", type=int, default=0)
    given = flags.parse_args()
    known = algorithms(given)
    if unknown := set(given.methods) - set(known):
        flags.error(f"--methods {sorted(unknown)} are unknown; there are {list(known)}")

    runs: dict[str, list[dict[str, Any]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for method in given.methods:
            run = Path(folder, method)
            runs[method] = train(config(given, known[method]), run, given.replicas)
            record = save(given, runs)
            without_folders(run / "config.yaml")
            for file in ("metrics.jsonl", "config.yaml"):
                shutil.copyfile(run / file, record / f"{method}.{file}")
        write_report([Path(folder, method) for method in given.methods], record / "report.html")
    print((record / "summary.md").read_text(encoding="utf-8"))
    print(f"record: {record}")


def save(given: argparse.Namespace, runs: dict[str, list[dict[str, Any]]]) -> Path:
    """Write the record and the curves of the methods trained so far."""
    summaries = {method: records[-1] for method, records in runs.items()}
    results = {method: {key: x.get(key) for key in KEPT} for method, x in summaries.items()}
    rows = [summary_cells({**x, "run": method}) for method, x in summaries.items()]
    about = (
        f"Llama {given.size}, {given.replicas} replicas, {given.batch} x {given.seq_len} tokens a step and replica, "
        f"{given.precision}, trained on {given.train.name}, evaluated on {given.validation.name}."
    )
    lines = [about, "", table(SUMMARY_COLUMNS, rows), "", *comparison(summaries), "", "![curves](curves.png)"]
    record = write_record(given, results, "\n".join(lines))
    tokens, sent = (
        {method: points(records, key) for method, records in runs.items()} for key in ("tokens", "bytes_sent")
    )
    panels = [("tokens of all replicas", False, tokens), ("bytes sent by a replica", True, sent)]
    save_picture(record / "curves.png", "validation loss (bits per byte)", panels)
    return record


def points(records: Sequence[dict[str, Any]], key: str) -> list[tuple[float, float]]:
    """Validation losses against another key, from the first round on."""
    return [(x[key], x["val_bits_per_byte"]) for x in records if x["kind"] == "eval" and x["round"]]


def comparison(summaries: dict[str, dict[str, Any]]) -> list[str]:
    """How each method stands beside data parallel, one line each."""
    baseline = summaries.get("data_parallel")
    if baseline is None:
        return []
    return [
        f"{method} against data_parallel: validation loss {x['val_loss'] / baseline['val_loss'] - 1:+.2%}, "
        f"{baseline['bytes_sent'] / x['bytes_sent']:,.1f} times fewer bytes.  "
        for method, x in summaries.items()
        if method != "data_parallel" and x["bytes_sent"]
    ]


if __name__ == "__main__":
    main()
