"""DiLoCoX as configs/dilocox.yaml puts it together, against explicit replicas with the update one round late."""

from pathlib import Path

import pytest
import torch

from lowcomm.algorithms.streaming_diloco import StreamingDiLoCo
from lowcomm.cli import parse_run
from lowcomm.compress.power_sgd import PowerSGD
from lowcomm.feedback.ef14 import EF14
from lowcomm.outer.nesterov import Nesterov
from lowcomm.reduce import Reducer
from tests.replicas import adamw, flat, make_model, step_all, train
from tests.world import run_world

N, EVERY, LR, MOMENTUM = 3, 3, 0.4, 0.9
CONFIGS = Path(__file__).resolve().parents[2] / "configs"


class LowRank:
    """One matrix of every replica: PowerSGD of rank 1 with error feedback, in plain steps."""

    def __init__(self, like):
        self.q = PowerSGD(1).init(like[None]).q[0]
        self.errors = [torch.zeros_like(like) for _ in range(N)]

    def mean(self, deltas):
        given = [x + e for x, e in zip(deltas, self.errors, strict=True)]
        p = sum(m @ self.q for m in given)
        p = p / p.norm()
        shares = [m.T @ p for m in given]
        self.q = sum(shares) / N
        self.errors = [m - p @ share.T for m, share in zip(given, shares, strict=True)]
        return p @ self.q.T


def reference(num_rounds):
    """The anchor after each round, and at the end, where the last average is waited for."""
    models = [make_model() for _ in range(N)]
    optimizers = [adamw(list(m.parameters())) for m in models]
    anchor = [p.detach().clone() for p in models[0].parameters()]
    momentum = [torch.zeros_like(a) for a in anchor]
    late = [torch.zeros_like(a) for a in anchor]
    low_rank, trace = LowRank(anchor[0]), []  # the others would not shrink to half, and go whole

    def outer():
        for a, b, x in zip(anchor, momentum, late, strict=True):
            b.mul_(MOMENTUM).add_(x)
            a.sub_(LR * (x + MOMENTUM * b))
        trace.append(flat(anchor))

    for round in range(num_rounds):
        for t in range(round * EVERY + 1, (round + 1) * EVERY + 1):
            step_all(models, optimizers, t)
        params = [list(m.parameters()) for m in models]
        deltas = [[a - ps[i].detach() for ps in params] for i, a in enumerate(anchor)]
        outer()
        late = [low_rank.mean(deltas[0]), *(sum(ds) / N for ds in deltas[1:])]
        for ps in params:
            for p, a in zip(ps, anchor, strict=True):
                p.data = a.clone()
    outer()
    return trace


def test_the_combination_is_the_reference():
    reducer = Reducer(PowerSGD(1), EF14())
    algorithm = StreamingDiLoCo(
        EVERY, EVERY, blend=0.0, blocks_per_fragment=None, outer=Nesterov(LR, MOMENTUM), reducer=reducer
    )
    expected = reference(num_rounds=5)
    for got in run_world(N, lambda comm: train(algorithm, comm, 5 * EVERY, adamw)):
        for a, b in zip([*got[EVERY - 1 : -1 : EVERY], got[-1]], expected, strict=True):
            assert torch.allclose(a, b, rtol=0, atol=1e-12)
    assert len({tuple(x.tolist()) for x in expected}) == 6, "it moved after each round but the first"


@pytest.mark.parametrize("name", ["dilocox", "delayed_diloco"])
def test_the_config_is_one_round_late(name):
    algorithm = parse_run(["--config", str(CONFIGS / f"{name}.yaml")])[0].algorithm
    assert isinstance(algorithm, StreamingDiLoCo)
    assert algorithm.delay == algorithm.every and algorithm.blend == 0 and algorithm.blocks_per_fragment is None
    if name == "dilocox":
        assert isinstance(algorithm.reducer.compressor, PowerSGD) and isinstance(algorithm.reducer.feedback, EF14)
