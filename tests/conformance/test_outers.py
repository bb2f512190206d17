"""The laws of every outer optimizer."""

from functools import partial

import pytest
import torch

from lowcomm.outer.base import Outer
from lowcomm.tensors import rng
from tests.compressors import SGD, Nesterov
from tests.roles import players


def draw(*purpose):
    return [torch.randn(s, generator=rng(0, *purpose), dtype=torch.float64) for s in [(3, 4), (5,), ()]]


@pytest.mark.parametrize("cls", players(Outer, "outer"), ids=lambda c: c.__name__)
def test_descends_in_place_and_leaves_delta_alone(cls):
    outer, anchor, delta = cls(), draw("anchor"), draw("delta")
    before, kept = [a.clone() for a in anchor], [d.clone() for d in delta]
    outer.apply(anchor, delta, outer.init(anchor))
    for a, b, d, k in zip(anchor, before, delta, kept, strict=True):
        assert torch.equal(d, k)
        assert ((a - b) * d <= 0).all() and not torch.equal(a, b), "a step against delta"


@pytest.mark.parametrize(
    ("outer", "options"), [(Nesterov(0.7, 0.9), {"momentum": 0.9, "nesterov": True}), (SGD(0.7), {})]
)
def test_is_torch_sgd(outer, options):
    anchor = draw("anchor")
    params = [torch.nn.Parameter(a.clone()) for a in anchor]
    torch_sgd = torch.optim.SGD(params, lr=0.7, **options)
    state = outer.init(anchor)
    for round in range(1, 8):
        delta = draw("delta", round)
        outer.apply(anchor, delta, state)
        for p, d in zip(params, delta, strict=True):
            p.grad = d.clone()
        torch_sgd.step()
        assert all(torch.allclose(a, p, rtol=0, atol=1e-13) for a, p in zip(anchor, params, strict=True))


def test_steady_state_gain_of_nesterov_is_lr_over_one_less_momentum():
    outer, anchor = Nesterov(0.7, 0.9), [torch.zeros(1, dtype=torch.float64)]
    state, one = outer.init(anchor), [torch.ones(1, dtype=torch.float64)]
    for _ in range(400):
        before = anchor[0].clone()
        outer.apply(anchor, one, state)
    assert torch.allclose(before - anchor[0], torch.tensor([7.0], dtype=torch.float64))


@pytest.mark.parametrize(
    "make",
    [
        *(partial(cls, lr=lr) for cls in (Nesterov, SGD) for lr in (0, -0.7, float("inf"), float("nan"))),
        *(partial(Nesterov, momentum=momentum) for momentum in (1.0, -0.1, float("nan"))),
    ],
)
def test_bad_settings_are_refused(make):
    with pytest.raises(ValueError, match="it must be"):
        make()
