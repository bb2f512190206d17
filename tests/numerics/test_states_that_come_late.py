"""DES-LOC where an optimizer's states come late on some replicas, for some parameters, or never."""

import pytest
import torch

from lowcomm.algorithms.des_loc import DESLOC
from lowcomm.comm.solo import SoloComm
from lowcomm.compress.quantized import Quantized
from lowcomm.engine.torch_engine import TorchEngine
from lowcomm.reduce import Reducer
from tests.replicas import adamw, make_batch, make_model, mse
from tests.world import run_world

N = 3


class Bare:
    """An engine's parameters and optimizer as a loop of one's own has them."""

    def __init__(self, inner) -> None:
        self.model = make_model()
        self.params = list(self.model.parameters())
        self.optimizer = inner(self.params)
        self.engine = TorchEngine(self.model, self.optimizer, loss=mse, clip_norm=None)

    def states(self, name):
        return [self.optimizer.state.get(p, {}).get(name) for p in self.params]


def had(rank, t, number):
    """Rank 1 skips its first two updates, as under a gradient scaler; rank 2's last parameter is unused until then."""
    return t > 2 or (rank != 1 and (rank != 2 or number != len(list(make_model().parameters())) - 1))


@pytest.mark.parametrize("reducer", [Reducer(), Reducer(Quantized())], ids=str)
def test_a_state_that_some_do_not_have_yet_is_averaged_over_those_who_do(reducer):
    periods = {"param": 2, "exp_avg": 2, "exp_avg_sq": 2}

    def program(comm):
        own, trace = Bare(adamw), []
        state = DESLOC(periods, reducer=reducer).init(own.engine, comm)
        for t in range(1, 7):
            mse(own.model, make_batch(comm.rank, t)).backward()
            for i, p in enumerate(own.params):
                p.grad = p.grad if had(comm.rank, t, i) else None
            if any(p.grad is not None for p in own.params):
                own.optimizer.step()
            own.optimizer.zero_grad()
            before = [None if x is None else x.clone() for x in own.states("exp_avg_sq")]
            DESLOC(periods, reducer=reducer).after_update(t, own.engine, state, comm)
            trace.append((before, [None if x is None else x.clone() for x in own.states("exp_avg_sq")]))
        return trace

    found = run_world(N, program)
    for t in (2, 4, 6):
        for i in range(len(found[0][0][0])):
            before = [trace[t - 1][0][i] for trace in found]
            after = [trace[t - 1][1][i] for trace in found]
            assert [x is None for x in after] == [not had(rank, t, i) for rank in range(N)]
            mean = torch.stack([x for x in before if x is not None]).mean(0)
            assert all(torch.equal(x, after[0]) for x in after if x is not None)
            if t < 6 or reducer == Reducer():  # each state's first average is exact, the first of all replicas too
                assert torch.allclose(after[0], mean, rtol=1e-12)


@pytest.mark.parametrize("skipped", [0, 3])
def test_a_state_that_never_comes_is_refused_after_the_first_real_step(skipped):
    own, method = Bare(lambda params: torch.optim.SGD(params, lr=0.1)), DESLOC({"param": 2, "exp_avg": 2})
    state = method.init(own.engine, SoloComm())
    for t in range(1, skipped + 1):
        method.after_update(t, own.engine, state, SoloComm())
    mse(own.model, make_batch(0, 1)).backward()
    own.optimizer.step()
    with pytest.raises(ValueError, match="periods names \\['exp_avg'\\], but"):
        method.after_update(skipped + 1, own.engine, state, SoloComm())
