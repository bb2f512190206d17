"""Every parameter after every step under scripted gradients, against numbers that are kept.

After an intended change: pytest tests/golden --write-golden, and read the difference.
"""

import json
from pathlib import Path

import pytest
import torch

from lowcomm.algorithms.base import step
from lowcomm.algorithms.composed import After, Then
from lowcomm.algorithms.data_parallel import DataParallel
from lowcomm.algorithms.demo import DeMo
from lowcomm.algorithms.diloco import DiLoCo
from lowcomm.algorithms.eager_diloco import EagerDiLoCo
from lowcomm.algorithms.gasloc import GASLoC
from lowcomm.algorithms.local_sgd import LocalSGD
from lowcomm.algorithms.noloco import NoLoCo
from lowcomm.algorithms.sparta import SPARTA
from lowcomm.algorithms.streaming_diloco import StreamingDiLoCo
from lowcomm.engine.torch_engine import TorchEngine
from lowcomm.reduce import Reducer
from lowcomm.rounds.participation import DroppedRounds
from lowcomm.rounds.qsr import QSR
from tests.compressors import DCT, EF14, Cast, Half, TopK
from tests.world import run_world

KEPT = Path(__file__).with_name("parameters.json")
STEPS = 8
CASES = {
    "data parallel": DataParallel(),
    "local sgd, post-local, weighted": After(
        2, DataParallel(weights=[1.0, 3.0]), LocalSGD(every=2, weights=[1.0, 3.0])
    ),
    "diloco": DiLoCo(every=3),
    "diloco, bfloat16 wire": DiLoCo(every=3, reducer=Reducer(Cast())),
    # of one value the transform is exact: of more, the signs of what cancels would be up to the processor's rounding
    "demo": DeMo(Reducer(DCT(TopK(num=2, chunk=2, values=Half(), divide_by="present"), tile=1), EF14(decay=0.5))),
    "sparta": SPARTA(fraction=0.5),
    "sparta, late, then diloco": Then(SPARTA(fraction=0.5, delay=1), DiLoCo(every=3)),
    "diloco, dropped": DiLoCo(every=2, dropped=DroppedRounds(0.5, "all", seed=7)),
    "eager diloco": EagerDiLoCo(every=2),
    "local sgd, growing rounds": LocalSGD(QSR(base=2, alpha=0.22, num_warmup_steps=2)),
    "noloco": NoLoCo(every=3),
    "gasloc": GASLoC(every=3),
    "streaming diloco": StreamingDiLoCo(every=3),
    "streaming diloco, a whole round late": StreamingDiLoCo(every=2, delay=2, blend=0.0),
}


def scripted_loss(model, batch):
    """Its gradient is the batch itself: (t, -rank) on two numbers."""
    return (model.weight[0] * batch).sum()


def trace(algorithm, comm):
    model = torch.nn.Linear(2, 1, bias=False, dtype=torch.float64)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[1.0, -1.0]]))
    engine = TorchEngine(model, torch.optim.SGD(model.parameters(), lr=0.125), loss=scripted_loss, clip_norm=None)
    state = algorithm.init(engine, comm)
    steps = []
    for t in range(1, STEPS + 1):
        step(algorithm, t, engine, state, comm, torch.tensor([float(t), -float(comm.rank)], dtype=torch.float64))
        if t == STEPS:
            algorithm.finish(t, engine, state, comm)
        steps.append(model.weight.detach().reshape(-1).tolist())
    return steps


@pytest.mark.parametrize("name", CASES)
def test_parameters_are_those_that_were_kept(name, request):
    got = run_world(2, lambda comm: trace(CASES[name], comm))
    if request.config.getoption("--write-golden"):
        kept = json.loads(KEPT.read_text()) if KEPT.exists() else {}
        KEPT.write_text(json.dumps(kept | {name: got}, indent=1) + "\n")
    assert json.loads(KEPT.read_text())[name] == got


def test_first_steps_by_hand():
    """The kept numbers themselves: step 1 and 2 of data parallel, and the first average of Local SGD."""
    kept = json.loads(KEPT.read_text())
    # mean gradient (t, -1/2): 1 - 0.125 t, -1 + 0.0625
    assert kept["data parallel"][0][0] == [0.875, -0.9375]
    assert kept["data parallel"][1][1] == [0.875 - 0.25, -0.875]
    # up to step 2 the gradient is (t, -(0 x 1 + 1 x 3) / 4), after that (t, -r), with the same mean
    assert [kept["local sgd, post-local, weighted"][0][t][1] for t in (1, 3)] == [-0.8125, -0.8125 + 2 * 0.125 * 0.75]
    # DiLoCo's first round: delta = (0.125 x 6, -0.125 x 3 / 2); anchor - 0.7 x (1 + 0.9) delta
    assert kept["diloco"][0][2] == pytest.approx([1 - 0.7 * 1.9 * 0.75, -1 + 0.7 * 1.9 * 0.1875])
    # Streaming DiLoCo applies that one step later, half of it: step 4 adds -0.125 x 4 to 0.25
    assert kept["streaming diloco"][0][3][0] == pytest.approx(0.5 * (0.25 - 0.5) + 0.5 * (1 - 0.4 * 1.9 * 0.75))
    # one round late: nothing has come after round 1, and the first delta, -0.125 x (1 + 2), is applied after round 2
    late = kept["streaming diloco, a whole round late"][0]
    assert late[1] == [1.0, -1.0]
    assert late[3][0] == pytest.approx(1 - 0.4 * 1.9 * 0.375)
