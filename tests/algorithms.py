"""Methods with the options that matter: what the conformance tests run over."""

import inspect
from collections.abc import Callable
from typing import Any

from lowcomm.algorithms.base import Algorithm
from lowcomm.algorithms.composed import After, Then
from lowcomm.algorithms.data_parallel import DataParallel
from lowcomm.algorithms.des_loc import DESLOC
from lowcomm.algorithms.diloco import DiLoCo
from lowcomm.algorithms.eager_diloco import EagerDiLoCo
from lowcomm.algorithms.gasloc import GASLoC
from lowcomm.algorithms.local_sgd import LocalSGD
from lowcomm.algorithms.noloco import NoLoCo
from lowcomm.algorithms.sparta import SPARTA
from lowcomm.algorithms.streaming_diloco import StreamingDiLoCo
from lowcomm.compress.cast import Cast
from lowcomm.compress.power_sgd import PowerSGD
from lowcomm.compress.quantized import Quantized
from lowcomm.compress.top_k import TopK
from lowcomm.feedback.ef14 import EF14
from lowcomm.feedback.ef21 import EF21
from lowcomm.outer.nesterov import Nesterov
from lowcomm.reduce import Reducer
from lowcomm.rounds.fragments import offsets
from lowcomm.rounds.qsr import QSR
from tests.replicas import Inner, adamw, scaled_sgd, sgd
from tests.roles import players

# Rounds of 2, 2 and then 9 steps at the rate of these tests.
_GROWING = QSR(base=2, alpha=0.0301, num_warmup_steps=4)
_PERIODS = {"param": 2, "exp_avg": 3, "exp_avg_sq": 4}
# Beyond every class as `variants` makes it.
ALGORITHMS: list[Algorithm] = [
    DiLoCo(_GROWING),
    DiLoCo(_GROWING, reducer=Reducer(bucket_bytes=64), overlap=True),
    EagerDiLoCo(4, reducer=Reducer(Quantized(), EF14())),
    EagerDiLoCo(4, reducer=Reducer(PowerSGD(1), EF21())),
    DESLOC(_PERIODS),
    DESLOC(_PERIODS, Nesterov(), Reducer(Cast(), bucket_bytes=64)),
    DESLOC(_PERIODS, reducer=Reducer(TopK(0.25, chunk=8), EF14())),
    StreamingDiLoCo(4, blocks_per_fragment=1),
    StreamingDiLoCo(4, 3, blocks_per_fragment=1, reducer=Reducer(Quantized(), EF14())),
    StreamingDiLoCo(4, 4, blend=0.0, blocks_per_fragment=None, reducer=Reducer(PowerSGD(1), EF14())),
    StreamingDiLoCo(5, 0, blend=0.0, blocks_per_fragment=1, first_round_guard=False),
    StreamingDiLoCo(4, 2, blocks_per_fragment=1, reducer=Reducer(Quantized(), EF14(), bucket_bytes=64), overlap=True),
    StreamingDiLoCo(3, 0, blocks_per_fragment=1, reducer=Reducer(bucket_bytes=64), overlap=True),
    NoLoCo(4, gamma=0.5),
    NoLoCo(4, gamma=0.5, reducer=Reducer(Quantized(), EF14())),
    NoLoCo(4, gamma=0.5, reducer=Reducer(Cast("float16"), EF21()), anchors=Reducer(Cast(), bucket_bytes=64)),
    NoLoCo(4, alpha=0.9, gamma=None, group_size=None),
    GASLoC(4, momentum=0.9, gossip=0.3),
    SPARTA(fraction=1.0),
    SPARTA(fraction=0.3, delay=2, reducer=Reducer(Quantized())),
    SPARTA(fraction=0.3, every=2, delay=5),
    Then(SPARTA(fraction=0.3, delay=1), DiLoCo(every=4)),
    Then(SPARTA(fraction=0.3), DiLoCo(every=4, overlap=True, reducer=Reducer(bucket_bytes=64))),
    Then(SPARTA(fraction=0.3, delay=2), StreamingDiLoCo(4, 1, reducer=Reducer(bucket_bytes=64), overlap=True)),
    After(5, DataParallel(), DESLOC(_PERIODS, reducer=Reducer(Cast(), bucket_bytes=64))),
    After(3, DataParallel(overlap=True), StreamingDiLoCo(4, blocks_per_fragment=1)),
    After(3, DataParallel(), LocalSGD(4)),
]
# The inner optimizer of methods that need one of their own; AdamW for the others.
INNERS: dict[str, Inner] = {"DESLOC": adamw, "DeMo": sgd, "SAVIC": scaled_sgd}
# How many rounds a run has, where that is not one for every `every` steps and one for the rest.
ROUNDS: dict[str, Callable[[Algorithm, int], int]] = {
    "DESLOC": lambda a, num_steps: _des_loc_rounds(a, num_steps),
    "DiLoCo": lambda a, num_steps: _diloco_rounds(a, num_steps),
    "After": lambda a, num_steps: _after_rounds(a, num_steps),
    "SPARTA": lambda a, num_steps: _sparta_rounds(a, num_steps),
    "Then": lambda a, num_steps: _then_rounds(a, num_steps),
    "StreamingDiLoCo": lambda a, num_steps: _streaming_rounds(a, num_steps),
}
# What a run of `lowcomm train` needs besides the name of the method.
FLAGS: dict[str, list[str]] = {
    "DeMo": ["--clip_norm", "null", "--optimizer.path", "torch.optim.SGD", "--optimizer.args", "{lr: 1.0e-3}"],
    "SAVIC": ["--optimizer.path", "lowcomm.optim.scaled_sgd.ScaledSGD", "--optimizer.args", "{lr: 1.0e-3}"],
}


def variants(cls: Callable[..., Algorithm]) -> list[Algorithm]:
    """The class with few steps a round where it has rounds, with and without compression, and overlapped if it can."""
    fields = inspect.signature(cls).parameters
    options: dict[str, Any] = {"every": 4} if "every" in fields else {}
    found = [cls(**options)]
    if "reducer" in fields:
        found.append(cls(**options, reducer=Reducer(Cast(), bucket_bytes=64)))
    if "overlap" in fields:
        found.append(cls(**options, overlap=True, reducer=Reducer(bucket_bytes=64)))
    return found


def all_algorithms() -> list[Algorithm]:
    """Each class in its variants, then `ALGORITHMS`."""
    return [a for cls in players(Algorithm, "algorithms") for a in variants(cls)] + ALGORITHMS


def inner_of(algorithm: Algorithm) -> Inner:
    """What its replicas train with."""
    return INNERS.get(type(algorithm).__name__, adamw)


def expected_rounds(algorithm: Algorithm, num_steps: int) -> int:
    """Rounds of a finished run of so many steps."""
    count = ROUNDS.get(type(algorithm).__name__)
    return count(algorithm, num_steps) if count else -(-num_steps // getattr(algorithm, "every", 1))


def _sparta_rounds(sparta: Algorithm, num_steps: int) -> int:
    """Sparse averages, and one of everything."""
    assert isinstance(sparta, SPARTA)
    num = num_steps // sparta.every
    return num + (sparta.fraction < 1 or sparta.delay > 0 or num_steps % sparta.every > 0)


def _des_loc_rounds(algorithm: Any, num_steps: int) -> int:
    """Steps after which a slot is due, and a partial last round of the parameters."""
    periods = algorithm.periods
    due = {t for t in range(1, num_steps + 1) if any(t % every == 0 for every in periods.values())}
    return len(due) + (num_steps % periods["param"] != 0)


def _then_rounds(algorithm: Any, num_steps: int) -> int:
    """Those of both, none of the first's at the end."""
    return num_steps // algorithm.first.every + expected_rounds(algorithm.then, num_steps)


def _after_rounds(algorithm: Any, num_steps: int) -> int:
    """Those of both."""
    num_first = min(algorithm.num_steps, num_steps)
    rest = num_steps - num_first
    return num_first + (expected_rounds(algorithm.then, rest) if rest else 0)


def _diloco_rounds(algorithm: Any, num_steps: int) -> int:
    """Rounds one after the other, each as long as it is when it begins."""
    num, t = 0, 0
    while t < num_steps:
        t += algorithm.every.round_steps(t, 0.01) if isinstance(algorithm.every, QSR) else algorithm.every
        num += 1
    return num


def _streaming_rounds(algorithm: Any, num_steps: int) -> int:
    """Each fragment's syncs, and one for what is left of it; the small model has two blocks."""
    num_fragments = 2 if algorithm.blocks_per_fragment == 1 else 1
    num_rounds = 0
    for first in offsets(num_fragments, algorithm.every):
        guarded = algorithm.first_round_guard or first == 0
        sent = range(first + (algorithm.every if guarded else 0), num_steps + 1, algorithm.every)
        num_rounds += len(sent) + (not sent or sent[-1] < num_steps)
    return num_rounds
