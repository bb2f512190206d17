"""Two methods put together: what the one has under way when the other sets parameters."""

from dataclasses import dataclass

import pytest
import torch

from lowcomm.algorithms.base import step
from lowcomm.algorithms.composed import After, Then
from lowcomm.algorithms.data_parallel import DataParallel
from lowcomm.algorithms.des_loc import DESLOC
from lowcomm.algorithms.diloco import DiLoCo
from lowcomm.algorithms.local_sgd import LocalSGD
from lowcomm.algorithms.sparta import SPARTA
from lowcomm.algorithms.streaming_diloco import StreamingDiLoCo
from lowcomm.engine.torch_engine import TorchEngine
from lowcomm.outer.sgd import SGD
from lowcomm.reduce import Reducer
from lowcomm.rounds.base import Rounds, RoundsState
from lowcomm.rounds.exchanges import Sending
from tests.compressors import Cast
from tests.replicas import flat, make_batch, make_engine
from tests.world import run_world

LATE = [
    SPARTA(0.25, delay=2),
    SPARTA(0.3, every=2, delay=5, reducer=Reducer(Cast())),
    StreamingDiLoCo(3, 2, blend=0.5, outer=SGD(), blocks_per_fragment=None),
]
THEN = [
    LocalSGD(4),
    DiLoCo(4, SGD()),
    DiLoCo(4, SGD(), overlap=True, reducer=Reducer(bucket_bytes=64)),
    DESLOC({"param": 4}, SGD()),
    StreamingDiLoCo(4, 0, blend=0.0, outer=SGD(), blocks_per_fragment=None),
    StreamingDiLoCo(4, 1, blend=0.0, outer=SGD(), blocks_per_fragment=None),
    StreamingDiLoCo(4, 4, blend=0.0, outer=SGD(), blocks_per_fragment=None),
    After(3, DataParallel(), LocalSGD(4)),
    Then(SPARTA(0.5, every=3, delay=2), LocalSGD(4)),
]


@pytest.mark.parametrize("then", THEN, ids=str)
@pytest.mark.parametrize("first", LATE, ids=str)
def test_nothing_parts_replicas_that_were_made_equal(first, then):
    """Pulled apart for some steps, then left alone: what is under way at a sync must not come after it."""

    def program(comm):
        model = torch.nn.Linear(8, 1, bias=False, dtype=torch.float64)
        torch.nn.init.zeros_(model.weight)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        engine = TorchEngine(model, optimizer, loss=lambda m, g: (m.weight * g).sum(), clip_norm=None)
        algorithm, seen = Then(first, then), []
        state = algorithm.init(engine, comm)
        for t in range(1, 21):
            pull = float(comm.rank) if t <= 10 else 0.0
            step(algorithm, t, engine, state, comm, torch.full((1, 8), pull, dtype=torch.float64))
            seen.append(model.weight.detach().clone())
        return seen

    runs = run_world(3, program)
    apart = [float(torch.stack(weights).std(0).max()) for weights in zip(*runs, strict=True)]
    assert max(apart) > 0.05
    # by the sync after step 12, or when its average has come, all are equal for good
    assert max(apart[15:]) < 1e-12, apart


@dataclass
class LateState(RoundsState):
    pass


@dataclass(frozen=True)
class LateStep(Rounds[LateState]):
    """All replicas take the mean of what each would like off their parameters, two steps after it was sent."""

    reducer: Reducer = Reducer()

    @property
    def every(self):
        return 1

    def begin(self, engine, comm):
        return LateState(kept={"wishes": self.keep(engine.slots()["param"])})

    def round(self, t, engine, state, comm):
        wishes = [torch.full_like(p, t + comm.rank) for p in engine.slots()["param"]]
        return [Sending("wishes", self.reducer, wishes, delay=2)]

    def commit(self, t, engine, state, sent, means):
        for p, mean in zip(engine.slots()["param"], means, strict=True):
            p.sub_(mean)

    def stands(self, engine, state):
        return engine.slots()["param"]

    def keeps_equal(self):
        return True


def test_what_the_first_has_under_way_at_the_switch_is_applied_before_the_second_begins():
    def program(comm):
        engine = make_engine(lambda params: torch.optim.SGD(params, lr=0.0))
        algorithm, start = After(3, LateStep(), LocalSGD(100)), flat(engine.slots()["param"])
        state = algorithm.init(engine, comm)
        for t in range(1, 4):
            step(algorithm, t, engine, state, comm, make_batch(comm.rank, t))
        assert not state.first.under_way
        return [
            (start - flat(x)).round(decimals=9).unique().tolist() for x in (engine.slots()["param"], state.then.anchor)
        ]

    assert run_world(2, program) == [[[1.5 + 2.5 + 3.5]] * 2] * 2
