"""Every compressor with every feedback and under every method, a few rounds each; ranks must agree after each round.

Usage: torchrun ... tests/same_code/every_reduction.py OUT
"""

import json
import sys
from pathlib import Path

import torch
from torch import Tensor, nn

import lowcomm
from lowcomm.algorithms.base import Algorithm, step
from lowcomm.algorithms.data_parallel import DataParallel
from lowcomm.algorithms.demo import DeMo
from lowcomm.algorithms.des_loc import DESLOC
from lowcomm.algorithms.diloco import DiLoCo
from lowcomm.algorithms.eager_diloco import EagerDiLoCo
from lowcomm.algorithms.local_sgd import LocalSGD
from lowcomm.algorithms.noloco import NoLoCo
from lowcomm.algorithms.savic import SAVIC
from lowcomm.algorithms.streaming_diloco import StreamingDiLoCo
from lowcomm.comm.base import Comm
from lowcomm.engine.torch_engine import TorchEngine
from lowcomm.feedback.base import Feedback
from lowcomm.reduce import Reducer
from lowcomm.tensors import digest
from tests.algorithms import INNERS
from tests.compressors import Hierarchical, all_compressors
from tests.replicas import make_batch, make_model, mse, sgd
from tests.roles import players

NUM_ROUNDS = 3


class Odd(nn.Module):
    """The small model with tensors of odd shapes: an empty one, one of no dimension, a vector, a stack of matrices."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = make_model(torch.float32)
        self.empty = nn.Parameter(torch.empty(0, 3))
        self.scale = nn.Parameter(torch.tensor(1.0))
        self.vector = nn.Parameter(torch.linspace(-1, 1, 7))
        self.cube = nn.Parameter(torch.linspace(-1, 1, 30).view(2, 5, 3))

    def forward(self, x: Tensor) -> Tensor:
        """As the inner model, moved by all the others."""
        return self.inner(x) * self.scale + self.vector.sum() * 0.1 + self.cube.square().mean() + self.empty.sum()


def methods(reducer: Reducer) -> dict[str, tuple[Algorithm, int]]:
    """Each method and its steps a round."""
    return {
        "DataParallel": (DataParallel(reducer), 1),
        "LocalSGD": (LocalSGD(every=2, reducer=reducer), 2),
        "SAVIC": (SAVIC(every=2, alpha=0.5, reducer=reducer, gradient_reducer=reducer), 2),
        "DiLoCo": (DiLoCo(every=2, reducer=reducer), 2),
        "DESLOC": (DESLOC({"param": 2, "exp_avg": 2, "exp_avg_sq": 3}, reducer=reducer), 2),
        "EagerDiLoCo": (EagerDiLoCo(every=2, reducer=reducer), 2),
        "DeMo": (DeMo(reducer), 1),
        "NoLoCo": (NoLoCo(every=2, gamma=0.5, group_size=None, reducer=reducer), 2),
        "StreamingDiLoCo": (StreamingDiLoCo(every=2, blocks_per_fragment=1, reducer=reducer), 2),
    }


def combinations(num_ranks: int) -> dict[str, tuple[Algorithm, int]]:
    """Each compressor as often as there are methods, every time with another of them and the next feedback."""
    compressors = [*all_compressors(), *([Hierarchical(2)] if num_ranks % 2 == 0 else [])]
    feedbacks, found = [cls() for cls in players(Feedback, "feedback")], {}
    for i, compressor in enumerate(compressors):
        for k, name in enumerate(methods(Reducer())):
            feedback = feedbacks[(i + k) % len(feedbacks)]
            method = methods(Reducer(compressor, feedback, bucket_bytes=256))[name]
            found[f"{name}, {compressor}, {feedback}"] = method
    return found


def run(algorithm: Algorithm, every: int, comm: Comm) -> list[str]:
    """A digest of what stands for the run after each round; all ranks have the same one."""
    model = Odd()
    inner = INNERS.get(type(algorithm).__name__, sgd)
    engine = TorchEngine(model, inner(list(model.parameters())), loss=mse, clip_norm=None)
    state = algorithm.init(engine, comm)
    found = []
    for t in range(1, NUM_ROUNDS * every + 1):
        step(algorithm, t, engine, state, comm, make_batch(comm.rank, t, torch.float32, size=2))
        if t % every == 0:
            found.append(digest(algorithm.consensus(engine, state)))
            mine = torch.tensor(list(bytes.fromhex(found[-1])), dtype=torch.uint8)
            assert all(torch.equal(x, mine) for x in comm.all_gather(mine).wait()), f"ranks differ after step {t}"
    algorithm.finish(NUM_ROUNDS * every, engine, state, comm)
    return found


def run_all(comm: Comm) -> dict[str, list[str]]:
    """Every combination's digests."""
    found = {}
    for name, (algorithm, every) in combinations(len(comm.members)).items():
        try:
            found[name] = run(algorithm, every, comm)
        except Exception as error:
            raise AssertionError(f"{name}: {error!r}") from error
    return found


if __name__ == "__main__":
    torch.set_num_threads(1)
    gloo = lowcomm.connect("gloo", timeout_s=60)
    digests = run_all(gloo)
    Path(sys.argv[1], f"rank{gloo.rank}.json").write_text(json.dumps(digests))
    lowcomm.disconnect()
