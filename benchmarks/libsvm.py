"""Error feedback on logistic regression: the study of EF21, with EControl and EF-BV beside it.

    python -m benchmarks.libsvm --data FOLDER            # a9a, mushrooms and phishing as NAME.libsvm.xz
    python -m benchmarks.libsvm --data FOLDER --most_rounds 300    # only what comes early

Each of 20 workers has the mean logistic loss of its part of the rows, cut in equal runs, plus 0.1 sum x^2 / (1 + x^2),
and sends one value of its full gradient in a round: the largest, or for EF-BV one of the larger half, drawn at random.
Steps are multiples of what theory allows EF21 (EF21-W and EF-BV: what their own theory does). "EControl d" takes the
contraction 1 / num_features of top-1 for its eta, "EControl d/400" a 400th of it. Workers are ranks of the simulator,
so what runs is `lowcomm.Reducer` as it is anywhere. They start from numpy's default_rng(0).normal(size=num_features),
with the labels in rising order as -1 and 1.

The table counts rounds until the squared norm of the full gradient is at most 1e-3, 1e-5 and 1e-7, beside another
implementation's figures for the same problem. The pictures show that norm against what a worker has sent: by the
custom of these papers, 32 bits for a value and nothing else, and in the bits of its real messages with places, scales,
flags and the first, uncompressed round.

Needs scikit-learn: pip install 'lowcomm[bench]'.
"""

from __future__ import annotations

import argparse
import lzma
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import cache, partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.sparse import block_diag, csr_matrix
from sklearn.datasets import load_svmlight_file
from torch import Tensor

from benchmarks import step_size
from benchmarks.record import parser, save_picture, table, write_record
from lowcomm.codecs.base import Codec
from lowcomm.codecs.packing import as_bytes, from_bytes
from lowcomm.compress.base import Compressor
from lowcomm.compress.ef21_plus import EF21Plus
from lowcomm.compress.gathered import Gathered
from lowcomm.compress.identity import Identity
from lowcomm.feedback.base import Feedback
from lowcomm.feedback.econtrol import EControl
from lowcomm.feedback.ef14 import EF14
from lowcomm.feedback.ef21 import EF21
from lowcomm.feedback.ef_bv import EFBV
from lowcomm.feedback.none import NoFeedback
from lowcomm.reduce import Reducer
from lowcomm.sim.wire.clock import Clock
from lowcomm.sim.wire.comm import World

NUM_WORKERS, PENALTY = 20, 0.1
LEVELS = (1e-3, 1e-5, 1e-7)
FEATURES = {"a9a": 123, "mushrooms": 112, "phishing": 68}
DIVERGED = 1e9
METHODS = ("EF14", "EF21", "EF21+", "EF21-W", "EF-BV", "EControl d/400", "EControl d")
# Rounds to each of LEVELS that another implementation took; None: not reached, or nothing is known.
Rounds = tuple[int | None, int | None, int | None]
KNOWN: dict[tuple[str, str, int], Rounds] = {
    ("mushrooms", "dense", 1): (238, 699, 1252),
    ("mushrooms", "EF14", 64): (1549, None, None),
    ("mushrooms", "EF21", 64): (1264, 2972, None),
    ("mushrooms", "EF21+", 64): (1335, 2990, None),
    ("mushrooms", "EF21-W", 64): (1256, 2950, None),
    ("mushrooms", "EControl d/400", 64): (1261, 2997, None),
    ("mushrooms", "EControl d", 64): (1043, 3101, 5530),
    ("mushrooms", "EF14", 256): (None, None, None),
    ("mushrooms", "EF21", 256): (334, 613, 1147),
    ("mushrooms", "EF21+", 256): (313, 824, 1394),
    ("mushrooms", "EF21-W", 256): (331, 607, 1133),
    ("mushrooms", "EControl d/400", 256): (334, 623, None),
    ("mushrooms", "EControl d", 256): (537, 838, 1358),
    ("mushrooms", "EF14", 1024): (None, None, None),
    ("mushrooms", "EF21", 1024): (435, None, None),
    ("mushrooms", "EF21+", 1024): (222, 368, 501),
    ("mushrooms", "EF21-W", 1024): (444, 3473, None),
    ("mushrooms", "EControl d/400", 1024): (425, 3450, None),
    ("mushrooms", "EControl d", 1024): (529, 792, 1053),
    ("phishing", "dense", 1): (19, 22, 25),
    ("phishing", "EF21", 1): (2638, 3217, 3786),
    ("phishing", "EControl d", 1): (2571, 3151, 3726),
    ("phishing", "EF14", 16): (195, None, None),
    ("phishing", "EF21", 16): (207, 286, 379),
    ("phishing", "EF21+", 16): (206, 260, 359),
    ("phishing", "EF21-W", 16): (207, 289, 384),
    ("phishing", "EControl d/400", 16): (206, 285, None),
    ("phishing", "EControl d", 16): (283, 436, 599),
    ("phishing", "EF14", 64): (121, None, None),
    ("phishing", "EF21", 64): (194, 2808, None),
    ("phishing", "EF21+", 64): (101, 151, 231),
    ("phishing", "EF21-W", 64): (191, None, None),
    ("phishing", "EControl d/400", 64): (200, 3255, None),
    ("phishing", "EControl d", 64): (421, 572, 733),
    ("phishing", "EF21", 256): (3479, None, None),
    ("phishing", "EF21+", 256): (49, 102, 182),
}
# Nobody's figures are known for these. What theory allows EF-BV is very small: it takes large multiples.
EF_BV = {"a9a": 4096, "mushrooms": 8192, "phishing": 1024}
OWN = [("a9a", "dense", 1), *[("a9a", method, 64) for method in METHODS if method != "EF-BV"]]
OWN += [(data, "EF-BV", factor) for data, factor in EF_BV.items()]
UNKNOWN_ROUNDS = 1000  # of runs of which nothing is known to be reached
MARGIN = 1.15  # a run ends so much later than is known
PICTURED = {"a9a": 64, "mushrooms": 256, "phishing": 16}


@dataclass(frozen=True)
class Task:
    """One run. ``factor`` multiplies the step size that theory allows."""

    folder: Path
    data: str
    method: str
    factor: int
    max_rounds: int
    seed: int


@dataclass(frozen=True)
class Largest(Codec):
    """One of the largest values of a row: 2 bytes for its place, a float32.

    `TopK` sends as many bytes, but in a process that plays all ranks its general code takes ten times as long.

    Attributes:
        among: 1 is top-1. Otherwise one of so many is drawn and multiplied by their number: comp-(1, among) of EF-BV.
    """

    among: int = 1

    def num_bytes(self, num: int) -> int:
        """A place and a value."""
        return 6 if num else 0

    def contraction(self, num: int) -> float:
        """Of top-1; a value that was drawn and multiplied may err by more than there was."""
        if self.among > 1:
            raise ValueError("comp-(1, k') does not contract: EF-BV scales it down")
        return 1.0 / num

    def encode(self, x: Tensor, random: torch.Generator | None = None) -> Tensor:
        """See `Codec.encode`."""
        where = x.abs().topk(self.among).indices
        if self.among > 1:
            where = where.gather(1, torch.randint(self.among, (len(x), 1), generator=random))
        value = (self.among * x.gather(1, where)).float()
        return torch.cat([as_bytes(value), as_bytes(where.to(torch.int16))], 1)

    def decode(self, payload: Tensor, num: int) -> Tensor:
        """See `Codec.decode`."""
        value, where = from_bytes(payload[:, :4], torch.float32), from_bytes(payload[:, 4:], torch.int16)
        return torch.zeros(len(payload), num).scatter_(1, where.long(), value)


class Workers:
    """The data of all workers and their gradients, which are computed together: they are all at the same point.

    Attributes:
        num_features: d.
        smoothness: of the mean function.
        local: of each worker's.
    """

    def __init__(self, path: Path, num_features: int) -> None:
        with lzma.open(path) as file:
            rows, labels = load_svmlight_file(file, n_features=num_features)
        self.num_features = num_features
        self._signs = np.where(labels == labels.max(), 1.0, -1.0)
        size = len(labels) // NUM_WORKERS
        edges = [*range(0, size * NUM_WORKERS, size), len(labels)]  # the last takes what is left over
        parts = [rows[first:last] for first, last in pairwise(edges)]
        self._rows = csr_matrix(rows)
        self._to_workers = csr_matrix(block_diag([part.T / part.shape[0] for part in parts]))
        self.local = [_smoothness(part) for part in parts]
        self.smoothness = _smoothness(rows)

    def gradients(self, x: np.ndarray) -> np.ndarray:
        """Of each worker's function at ``x``, ``[NUM_WORKERS, num_features]``."""
        margin = self._signs * (self._rows @ x)
        slope = -self._signs / (1.0 + np.exp(np.minimum(margin, 500.0)))
        penalty = PENALTY * 2.0 * x / (1.0 + x * x) ** 2
        gradients: np.ndarray = (self._to_workers @ slope).reshape(NUM_WORKERS, -1) + penalty
        return gradients


def _smoothness(rows: Any) -> float:
    """Of the mean logistic loss of some rows with the penalty."""
    return float(np.linalg.eigvalsh((rows.T @ rows).toarray() / (4 * rows.shape[0]))[-1]) + 2 * PENALTY


@cache
def workers(folder: Path, data: str) -> Workers:
    """Read once in each process."""
    return Workers(folder / f"{data}.libsvm.xz", FEATURES[data])


def chosen(task: Task, problem: Workers) -> tuple[Compressor, Feedback, float]:
    """What a method sends, what it remembers, and its step size."""
    d, smoothness, local = problem.num_features, problem.smoothness, problem.local
    top, delta = Gathered(Largest()), 1.0 / d
    theory = step_size.ef21(smoothness, local, delta) if task.method != "dense" else step_size.dense(smoothness)
    compressor: Compressor = top
    feedback: Feedback = EF21()
    match task.method:
        case "dense":
            compressor, feedback = Identity(), NoFeedback()
        case "EF14":
            feedback = EF14()
        case "EF21+":
            compressor, feedback = EF21Plus(top, dense_first=True), NoFeedback()
        case "EF21-W":
            theory = step_size.ef21_w(smoothness, local, delta)
        case "EF-BV":
            among = d // 2
            eta, omega = (1 - among / d) ** 0.5, among - 1.0
            compressor, feedback = Gathered(Largest(among)), EFBV.best(eta, omega, omega / NUM_WORKERS)
            theory = step_size.ef_bv(smoothness, local, eta, omega, omega / NUM_WORKERS, feedback)
        case "EControl d/400":
            feedback = EControl(delta / 400)
        case "EControl d":
            feedback = EControl(delta)
    return compressor, feedback, task.factor * theory


def run(task: Task) -> dict[str, Any]:
    """Squared norms of the full gradient, one for each round, and what came of them."""
    torch.set_num_threads(1)
    began = time.process_time()
    problem = workers(task.folder, task.data)
    compressor, feedback, gamma = chosen(task, problem)
    start = np.random.default_rng(task.seed).normal(size=problem.num_features)
    clock = Clock(isolate_torch=False)
    world = World(clock)
    reducer = Reducer(compressor, feedback)
    norms: list[float] = []
    gradients = torch.zeros(NUM_WORKERS, problem.num_features, dtype=torch.float64)

    def program(rank: int) -> None:
        comm, x = world.comm(rank, range(NUM_WORKERS)), torch.from_numpy(start.copy())
        state, t = reducer.init([x]), 0
        while t <= task.max_rounds:
            if len(norms) == t:  # the first of this round computes for all: their x are bitwise the same
                gradients.copy_(torch.from_numpy(problem.gradients(x.numpy())))
                norms.append(float(gradients.mean(0).square().sum()))
            if not LEVELS[-1] < norms[t] < DIVERGED:
                break
            (mean,), state = reducer.mean([gradients[rank]], state, comm).result()
            x = x - gamma * mean
            t += 1

    for rank in range(NUM_WORKERS):
        clock.spawn(rank, partial(program, rank))
    clock.run()
    d, is_gathered = problem.num_features, not isinstance(compressor, Identity)
    message = compressor.sent_bytes((d,), 8, NUM_WORKERS) / (NUM_WORKERS - 1) if is_gathered else 8 * d
    first = message if isinstance(feedback, EF14) else 8 * d
    return {
        "gamma": gamma,
        "rounds": [next((t for t, norm in enumerate(norms) if norm <= level), None) for level in LEVELS],
        "num_rounds": len(norms) - 1,
        "least": min(norms),
        "last": float(np.median(norms[-len(norms) // 10 :])),
        "message_bytes": message,
        "first_message_bytes": first,
        "norms": norms,
        "cpu_s": time.process_time() - began,
    }


def tasks(given: argparse.Namespace) -> Iterator[Task]:
    """All runs, the long ones first; not those that would reach no known level within the rounds that are allowed."""
    cells = {**dict.fromkeys(OWN), **KNOWN}
    found = []
    for (data, method, factor), known in cells.items():
        reached = [rounds for rounds in known or () if rounds is not None]
        if data in given.sets and not (reached and MARGIN * min(reached) > given.most_rounds):
            limit = min(given.most_rounds, round(MARGIN * max(reached)) if reached else UNKNOWN_ROUNDS)
            found.append(Task(given.data, data, method, factor, limit, given.seed))
    yield from sorted(found, key=lambda task: -task.max_rounds)


def curves(results: dict[Task, dict[str, Any]], data: str) -> Iterator[tuple[str, list[float], list[float], list[Any]]]:
    """For each method at the pictured factor: its name, bits by custom, bits of messages, squared norms."""
    for task, result in results.items():
        if task.data == data and (task.factor == PICTURED[data] or task.method in ("dense", "EF-BV")):
            norms = result["norms"]
            num_values = FEATURES[data] if task.method == "dense" else 1
            kept = sorted({round(t) for t in np.geomspace(1, len(norms), 200)})
            custom = [32.0 * num_values * t for t in kept]
            real = [8.0 * (result["first_message_bytes"] + (t - 1) * result["message_bytes"]) for t in kept]
            name = task.method if task.method == "dense" else f"{task.method} x{task.factor}"
            yield name, custom, real, [norms[t - 1] for t in kept]


def compared(found: list[int | None], known: Rounds | None, num_rounds: int) -> tuple[str, list[float]]:
    """Cells like "1260 / 1264", and the relative deviations of those that are known to come within the run."""
    cells, deviations = [], []
    for ours, theirs in zip(found, known or (None,) * len(LEVELS), strict=True):
        cells.append(f"{ours or '-'} / {theirs or '-'}")
        if theirs is not None and MARGIN * theirs <= num_rounds + 1:
            deviations.append(ours / theirs - 1 if ours is not None else float("inf"))
    return "  ".join(cells), deviations


def main() -> None:
    """Run, print, record."""
    flags = parser(__doc__, "libsvm")
    flags.add_argument("--data", type=Path, required=True, help="the folder of NAME.libsvm.xz")
    flags.add_argument("--sets", nargs="+", choices=sorted(FEATURES), default=sorted(FEATURES))
    flags.add_argument("--seed", type=int, default=0, help="of the starting point; the known figures have 0")
    flags.add_argument("--processes", type=int, default=2)
    flags.add_argument(
        "--most_rounds", type=int, default=7000, help="of a run; levels known to come later are left out"
    )
    given = flags.parse_args()
    todo = list(tasks(given))
    with ProcessPoolExecutor(given.processes) as pool:
        results = dict(zip(todo, pool.map(run, todo), strict=True))
    results = {task: results[task] for task in sorted(todo, key=lambda t: (t.data, t.factor, order(t.method)))}

    rows, beyond = [], []
    for task, result in results.items():
        cells, deviations = compared(
            result["rounds"], KNOWN.get((task.data, task.method, task.factor)), task.max_rounds
        )
        largest = max(deviations, key=abs, default=None)
        if largest is not None and abs(largest) > 0.1:
            beyond.append(f"{task.data} {task.method} x{task.factor}")
        step = f"{result['gamma']:.4g}"
        rows.append([task.data, f"x{task.factor}", task.method, step, *cells.split("  "), f"{result['last']:.1e}"])
        rows[-1].append("" if largest is None else f"{largest:+.1%}")
    columns = ["data", "step", "method", "gamma", *[f"{level:.0e}" for level in LEVELS], "level at the end", "largest"]
    summary = "\n\n".join(
        [
            "Rounds until the squared norm of the gradient is at most this, ours / known; the median of the last tenth "
            "of the run; the largest deviation of the cells that are known.",
            table(columns, rows),
            f"Beyond 10 %: {', '.join(beyond) or 'none'}.",
        ]
    )
    print(summary)
    plain = [
        {"data": t.data, "method": t.method, "factor": t.factor, **{k: v for k, v in r.items() if k != "norms"}}
        for t, r in results.items()
    ]
    folder = write_record(given, plain, summary)
    for data in given.sets:
        by_custom, by_message = {}, {}
        for name, custom, real, norms in curves(results, data):
            by_custom[name] = list(zip(custom, np.log10(norms).tolist(), strict=True))
            by_message[name] = list(zip(real, np.log10(norms).tolist(), strict=True))
        panels = [
            (f"{data}: bits sent by a worker, 32 for a value", True, by_custom),
            (f"{data}: bits of a worker's messages", True, by_message),
        ]
        save_picture(folder / f"{data}.png", "log10 of the squared gradient norm", panels)


def order(method: str) -> int:
    """Dense first."""
    return METHODS.index(method) if method in METHODS else -1


if __name__ == "__main__":
    main()
