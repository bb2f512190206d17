"""The loop: what comes after what, and what an evaluation is of."""

from types import SimpleNamespace
from unittest.mock import MagicMock

import pytest
import torch
from torch import nn

from lowcomm.comm.base import Comm
from lowcomm.comm.metered import Meter, MeteredComm
from lowcomm.engine.torch_engine import TorchEngine
from lowcomm.membership import Members
from lowcomm.replica import Replica
from lowcomm.train import Plan, evaluate, train
from tests.world import run_world


def calls(start: int, plan: Plan) -> list[str]:
    """What the loop calls on its parts, in order, each with the inner step if it is told."""
    parts = MagicMock()
    parts.ledger.t, parts.ledger.step_tokens = start, 1
    parts.engine.slots.return_value = {"param": [torch.zeros(1)]}
    parts.engine.evaluate.return_value, parts.engine.buffers.return_value = torch.tensor(2.0), []
    parts.algorithm.consensus.return_value = [torch.ones(1)]
    parts.comm.members, parts.comm.place = (0,), 0
    parts.engine.standing.return_value.__enter__.return_value = []
    parts.comm.tagged.return_value.all_sum = lambda x: SimpleNamespace(wait=lambda: x)
    train(
        Replica(
            parts.algorithm, parts.engine, {}, parts.stream, parts.ledger, Members(parts.comm), torch.device("cpu")
        ),
        plan,
        parts.checkpoints,
    )
    shown = ("algorithm.", "engine.", "ledger.", "checkpoints.")
    hidden = ("num_rounds", "slots", "state_dict", "consensus", "__exit__", "__enter__")
    found = []
    for name, args, _ in parts.mock_calls:
        if name.startswith(shown) and not name.endswith(hidden):
            t = [str(x) for x in args[:1] if isinstance(x, int)]
            found.append(" ".join([name.split(".", 1)[1], *t]))
    return found


def test_the_order_of_a_run():
    def step(t: int, *, last: bool = False) -> list[str]:
        before = ["lr", f"during_backward {t}", "backward", f"before_update {t}", "update"]
        after = [f"complete {t}", f"finish {t}", "buffers"] if last else []
        return [*before, f"after_update {t}", *after, f"step {t}"]

    evaluation = ["flush", "paused", "standing", "buffers", "buffers", "evaluate", "evaluation"]
    saving = ["flush", "paused", "settle", *("save {0}", "place.meet", "confirm {0}", "prune {0}")]
    saves = {t: [x.format(t) for x in saving] for t in (2, 4)}
    batch = torch.zeros(2, 3, dtype=torch.int64)
    whole = calls(0, Plan(4, 3, 2, [batch], 1.0))
    expected = [*step(1), *step(2), *saves[2], *step(3), *evaluation, *step(4, last=True), *evaluation, *saves[4]]
    assert whole == ["start", *expected]
    assert calls(3, Plan(4, 0, 0, [batch], 1.0)) == ["start", *step(4, last=True), *evaluation]
    assert calls(3, Plan(4, 1, 0, [], 1.0)) == ["start", *step(4, last=True), "flush"]


@pytest.mark.parametrize("num_batches", [1, 2, 5])
def test_an_evaluation_is_of_the_consensus_on_every_batch_once(num_batches):
    """Each rank evaluates its share with the parameters that stand for the run, and goes on with its own."""
    batches = [torch.full((1 + k % 2, 3), float(2**k)) for k in range(num_batches)]

    evaluated = []

    def loss(model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
        evaluated.append(batch[0, 0].item())
        return (next(model.parameters()) * batch).mean()

    def program(comm: Comm) -> tuple[float, float, int]:
        model = nn.Linear(1, 1, bias=False)
        torch.nn.init.constant_(model.weight, 100.0 + comm.rank)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        engine = TorchEngine(model, optimizer, loss=loss)
        algorithm, metered = MagicMock(), MeteredComm(comm, Meter())
        algorithm.consensus.return_value = [torch.full((1, 1), 3.0)]
        replica = Replica(algorithm, engine, {}, MagicMock(), MagicMock(), Members(metered), torch.device("cpu"))
        return (
            evaluate(replica, batches, metered),
            model.weight.item(),
            metered.meter.by_tag["evaluation"].num_exchanges,
        )

    targets = torch.cat([batch[:, 1:].flatten() for batch in batches])
    mean = 3.0 * targets.mean().item()
    for rank, (loss, kept, num_exchanges) in enumerate(run_world(2, program)):
        assert loss == pytest.approx(mean) and kept == 100.0 + rank and num_exchanges == 1
    assert sorted(evaluated) == [2.0**k for k in range(num_batches)]
