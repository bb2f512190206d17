"""What rounding may do to the states that DES-LOC averages: no negative second moments, no steps out of nothing."""

import pytest
import torch
from torch import nn

from lowcomm.algorithms.base import step
from lowcomm.algorithms.des_loc import DESLOC
from lowcomm.compress.cast import Cast
from lowcomm.compress.quantized import Quantized
from lowcomm.compress.top_k import TopK
from lowcomm.engine.torch_engine import TorchEngine
from lowcomm.feedback.ef14 import EF14
from lowcomm.reduce import Reducer
from lowcomm.tensors import rng
from tests.replicas import make_batch, make_model, mse
from tests.world import run_world


class Overshoots(nn.Module):
    """One weight whose gradient is what the batch says."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(8))


@pytest.mark.parametrize("reducer", [Reducer(Quantized()), Reducer(Cast()), Reducer(TopK(0.25), EF14())], ids=str)
def test_second_moments_stay_at_least_zero_and_momenta_keep_their_sign(reducer):
    """Gradients of very different sizes that die away: each difference is about minus the last average, and rounded."""

    def program(comm):
        model = Overshoots()
        optimizer = torch.optim.Adam(model.parameters(), lr=0.0, betas=(0.3, 0.3))
        engine = TorchEngine(model, optimizer, loss=lambda model, g: (model.weight * g).sum(), clip_norm=None)
        algorithm = DESLOC({"param": 50, "exp_avg": 4, "exp_avg_sq": 4}, reducer=reducer)
        state = algorithm.init(engine, comm)
        seen = []
        for t in range(1, 25):
            generator = rng(0, "gradient", comm.rank, t)
            engine.backward(torch.randn(8, generator=generator) * 10.0 ** (torch.arange(8) / 4 - t / 2))
            engine.update()
            before = [engine.slots()[name][0].clone() for name in ("exp_avg", "exp_avg_sq")]
            anchor = {name: average[0].clone() for name, average in state.averages.items()}
            algorithm.after_update(t, engine, state, comm)
            seen.append((before, anchor, [engine.slots()[name][0].clone() for name in ("exp_avg", "exp_avg_sq")]))
        return seen

    seen = run_world(2, program)[0]
    assert all((v >= 0).all() for _, _, (_, v) in seen)
    assert all((u < 0).any() for _, _, (u, _) in seen[7::4]), "momenta are not cut"
    if not isinstance(reducer.compressor, Cast):  # 16 bits are too good to go wrong here
        cut = [(v == 0) & (before[1] > 0) for before, _, (_, v) in seen[7::4]]
        assert any(c.any() for c in cut), "nothing was ever cut, so this test shows nothing"


def test_momenta_that_are_negative_on_one_replica_alone_are_not_cut():
    def program(comm):
        options = {"loss": lambda model, g: (model.weight * g).sum(), "clip_norm": None}
        model = Overshoots()
        engine = TorchEngine(model, torch.optim.Adam(model.parameters(), lr=0.0), **options)
        algorithm = DESLOC({"param": 50, "exp_avg": 1}, reducer=Reducer(Cast()))
        state = algorithm.init(engine, comm)
        for t in range(1, 4):
            step(algorithm, t, engine, state, comm, torch.full((8,), -3.0 if comm.rank == 1 else 1.0))
        return engine.slots()["exp_avg"][0].clone()

    expected = torch.full((8,), -1.0 * (1 - 0.9**3))  # of the mean gradient
    assert all(torch.allclose(u, expected, rtol=1e-2) for u in run_world(2, program))


def test_replicas_in_bfloat16_that_take_no_step_change_nothing():
    """Averages are finer than the states, and what a replica was loaded with is no difference."""

    def program(comm):
        model = make_model(torch.bfloat16)
        optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
        engine = TorchEngine(model, optimizer, loss=mse, clip_norm=None)
        algorithm = DESLOC({"param": 1, "exp_avg": 1, "exp_avg_sq": 1}, reducer=Reducer(Cast()))
        state = algorithm.init(engine, comm)
        for t in range(1, 4):
            step(algorithm, t, engine, state, comm, make_batch(comm.rank, t, torch.bfloat16))
        anchors = [x for average in state.averages.values() for x in average]
        assert all(x.dtype == torch.float32 for x in anchors)
        assert any(not torch.equal(x, x.bfloat16().float()) for x in anchors)
        before = [x.clone() for name in ("exp_avg", "exp_avg_sq") for x in engine.slots()[name]]
        old = [x.clone() for x in anchors]
        for t in range(4, 8):
            algorithm.after_update(t, engine, state, comm)
        after = [x for name in ("exp_avg", "exp_avg_sq") for x in engine.slots()[name]]
        anchors = [x for average in state.averages.values() for x in average]
        assert all(torch.equal(x, y) for x, y in zip(before + old, after + anchors, strict=True))

    run_world(2, program)
