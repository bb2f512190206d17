"""Who listens to backward hears of each gradient once, when it is final."""

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lowcomm.engine.torch_engine import TorchEngine


def engine_of(model, **options):
    return TorchEngine(model, torch.optim.SGD(model.parameters(), lr=0.1), **options)


class Sometimes(nn.Module):
    """Three scales, the second left out where asked, and one that is never used."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third, self.never = (nn.Parameter(torch.ones(())) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        x = x * self.first
        x = x * self.second if (x > 0).all() else x
        return x * self.third


@pytest.mark.parametrize(
    ("inputs", "order"),
    [
        ([2.0], [2, 1, 0, 3]),
        ([-2.0], [2, 0, 3, 1]),
        ([2.0, 3.0], [2, 1, 0, 3]),
        ([2.0, -3.0], [2, 0, 3, 1]),  # the second has a gradient, but not from the last micro-batch
    ],
)
def test_gradients_are_reported_once_each_when_they_are_final(inputs, order):
    def engine():
        options = {"loss": lambda model, x: model(x).mean(), "num_micro_batches": len(inputs)}
        return engine_of(Sometimes(), **options)

    reported: list[tuple[int, float]] = []
    told, untold = engine(), engine()
    loss = told.backward(torch.tensor(inputs), lambda i, x: reported.append((i, x.item())))
    assert torch.equal(loss, untold.backward(torch.tensor(inputs)))
    gradients = [x.item() for x in untold.slots()["grad"]]
    assert reported == [(i, gradients[i]) for i in order]
    assert [x.item() for x in told.slots()["grad"]] == gradients
    told.backward(torch.tensor(inputs))
    assert len(reported) == 4, "nobody listens any more"


def test_a_gradient_that_comes_in_parts_is_refused():
    model = nn.Linear(2, 2)

    def loss(model, x):
        for _ in range(2):
            x = checkpoint(model, x, use_reentrant=True)
        return x.sum()

    engine = engine_of(model, loss=loss)
    with pytest.raises(ValueError, match="came in parts"):
        engine.backward(torch.ones(1, 2, requires_grad=True), lambda i, x: None)
