"""QHADOPT against its equations written out in numpy, its special cases, and libraries that have some of them."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

from lowcomm.optim.qhadopt import QHADOPT
from lowcomm.tensors import rng

NUM_STEPS = 100
INF, NAN = float("inf"), float("nan")


def gradients(num_steps=NUM_STEPS, shape=(4, 3)):
    """Some of them far out, so that they are clipped, and one zero everywhere, so that eps divides."""
    generator = rng(0, "gradients")
    found = [torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(num_steps)]
    scales = 10 ** torch.linspace(-2, 1, num_steps, dtype=torch.float64)[torch.randperm(num_steps, generator=generator)]
    found = [x * scale for x, scale in zip(found, scales, strict=True)]
    for x in found:
        x[0, 0] = 0.0
    return found


def reference(x, gs, *, lr, betas, omegas, eps=1e-6, weight_decay=0.0):
    """Spelt out, one line for each equation; yields x, the momenta and v after every call."""
    *momentum_betas, beta_v = betas
    us, v = [np.zeros_like(x) for _ in momentum_betas], np.zeros_like(x)
    for k, g in enumerate(gs):
        if k == 0:
            v = v + g * g
        else:
            x = x * (1 - lr * weight_decay)
            n = np.clip(g / np.maximum(np.sqrt(v), eps), -(k**0.25), k**0.25)
            us = [beta * u + (1 - beta) * n for beta, u in zip(momentum_betas, us, strict=True)]
            step = (1 - sum(omegas)) * n + sum(w * u for w, u in zip(omegas, us, strict=True))
            x = x - lr * step
            v = beta_v * v + (1 - beta_v) * g * g
        yield x, us, v


def start():
    return torch.linspace(-1, 1, 12, dtype=torch.float64).view(4, 3)


def trace(make, gs=None, dtype=torch.float64):
    """The parameter after each call, and the optimizer."""
    p = nn.Parameter(start().to(dtype))
    optimizer = make([p])
    seen = []
    for g in gradients() if gs is None else gs:
        p.grad = g.to(dtype)
        optimizer.step()
        seen.append(p.detach().clone())
    return seen, optimizer, p


@pytest.mark.parametrize(
    ("betas", "omega"),
    [
        ((0.999, 0.9999), 0.9),
        ((0.9, 0.99), 0.0),
        ((0.95, 0.9999), 1.0),
        ((0.9, 0.999, 0.99), (0.3, 0.5)),
        ((0.9, 0.99, 0.999, 0.95), (0.2, 0.3, 0.5)),
        ((0.99,), ()),
    ],
    ids=str,
)
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_it_is_the_reference(betas, omega, weight_decay):
    options = {"lr": 0.05, "betas": betas, "weight_decay": weight_decay}
    omegas = (omega,) if isinstance(omega, float) else omega
    expected = list(reference(start().numpy(), [g.numpy() for g in gradients()], omegas=omegas, **options))
    got, optimizer, p = trace(lambda ps: QHADOPT(ps, omega=omega, **options))
    for x, (x_expected, _, _) in zip(got, expected, strict=True):
        np.testing.assert_allclose(x.numpy(), x_expected, rtol=0, atol=1e-12)
    state, (_, us, v) = optimizer.state[p], expected[-1]
    assert list(state) == ["step", *["exp_avg", "exp_avg_2", "exp_avg_3"][: len(omegas)], "exp_avg_sq"]
    np.testing.assert_allclose(state["exp_avg_sq"].numpy(), v, rtol=1e-12, atol=1e-12)
    for name, u in zip(["exp_avg", "exp_avg_2", "exp_avg_3"], us, strict=False):
        np.testing.assert_allclose(state[name].numpy(), u, rtol=0, atol=1e-12)


def test_gradients_of_the_reference_are_clipped_and_eps_divides():
    """Else the test above would not see clipping or eps."""
    gs = [g.numpy() for g in gradients()]
    clipped = 0
    for k, (_, _, v) in enumerate(reference(start().numpy(), gs, lr=0.05, betas=(0.9, 0.99), omegas=(0.5,)), start=1):
        if k < len(gs):
            clipped += (np.abs(gs[k]) / np.maximum(np.sqrt(v), 1e-6) > k**0.25).sum()
    assert clipped > 10
    assert v[0, 0] == 0


def test_weight_1_is_the_librarys_adopt():
    """pytorch_optimizer clips by the number of calls, the authors by that of updates."""
    from pytorch_optimizer import ADOPT

    def library(ps):
        return ADOPT(ps, lr=0.01, betas=(0.95, 0.9999), clip_lambda=lambda call: (call - 1) ** 0.25, eps=1e-6)

    expected, _, _ = trace(library)
    got, _, _ = trace(lambda ps: QHADOPT(ps, lr=0.01, betas=(0.95, 0.9999), omega=1.0))
    for a, b in zip(got, expected, strict=True):
        assert torch.allclose(a, b, rtol=0, atol=1e-12)


def test_weight_0_is_sgd_on_normalised_clipped_gradients():
    """And the momentum's beta then changes nothing."""
    first, _, _ = trace(lambda ps: QHADOPT(ps, lr=0.05, betas=(0.9, 0.99), omega=0.0))
    second, _, _ = trace(lambda ps: QHADOPT(ps, lr=0.05, betas=(0.99,), omega=()))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_states_of_bfloat16_parameters_are_finer():
    """In bfloat16 the second moment could not move by its thousandth part."""
    _, optimizer, p = trace(lambda ps: QHADOPT(ps, lr=0.01), dtype=torch.bfloat16)
    rounded = [g.bfloat16().double().numpy() for g in gradients()]
    *_, (_, _, v) = reference(start().numpy(), rounded, lr=0.01, betas=(0.999, 0.9999), omegas=(0.9,))
    assert p.dtype == torch.bfloat16 and optimizer.state[p]["exp_avg_sq"].dtype == torch.float32
    np.testing.assert_allclose(optimizer.state[p]["exp_avg_sq"].numpy(), v, rtol=1e-4)


def test_a_restored_optimizer_goes_on_exactly():
    gs = gradients()
    expected, _, _ = trace(lambda ps: QHADOPT(ps, lr=0.05), gs)
    _, optimizer, p = trace(lambda ps: QHADOPT(ps, lr=0.05), gs[:40])
    saved = copy.deepcopy(optimizer.state_dict())
    q = nn.Parameter(p.detach().clone())
    fresh = QHADOPT([q], lr=0.3)
    fresh.load_state_dict(saved)
    for g, x in zip(gs[40:], expected[40:], strict=True):
        q.grad = g
        fresh.step()
        assert torch.equal(q, x)


def test_groups_have_options_of_their_own_and_parameters_without_gradient_stay():
    a, b, c = (nn.Parameter(start()) for _ in range(3))
    optimizer = QHADOPT([{"params": [a, c]}, {"params": [b], "betas": (0.9, 0.8, 0.99), "omega": (0.1, 0.2)}], lr=0.05)
    for g in gradients():
        a.grad, b.grad = g.clone(), g.clone()
        optimizer.step()
    for p, options in [(a, {}), (b, {"betas": (0.9, 0.8, 0.99), "omega": (0.1, 0.2)})]:
        alone, _, _ = trace(lambda ps, options=options: QHADOPT(ps, lr=0.05, **options))
        assert torch.equal(p, alone[-1])
    assert torch.equal(c, start()) and not optimizer.state.get(c)
    assert optimizer.step(lambda: 2.5) == 2.5


def test_each_parameter_is_clipped_by_its_own_number_of_calls():
    a, b = (nn.Parameter(start()) for _ in range(2))
    optimizer, gs = QHADOPT([a, b], lr=0.05), gradients()
    for k, g in enumerate(gs):
        a.grad, b.grad = g.clone(), gs[k - 5].clone() if k >= 5 else None
        optimizer.step()
    for p, num in ((a, len(gs)), (b, len(gs) - 5)):
        alone, _, _ = trace(lambda ps: QHADOPT(ps, lr=0.05), gs[:num])
        assert torch.equal(p, alone[-1])


def test_it_steps_without_values_and_on_odd_shapes():
    for device in ("meta", "cpu"):
        ps = [nn.Parameter(torch.ones(shape, device=device)) for shape in ((), (0, 3), (5,), (2, 3, 4))]
        optimizer = QHADOPT(ps, weight_decay=0.1)
        for _ in range(3):
            for p in ps:
                p.grad = torch.ones_like(p)
            optimizer.step()
        assert all(optimizer.state[p]["exp_avg"].shape == p.shape for p in ps)
        assert all(optimizer.state[p]["step"].device.type == "cpu" for p in ps)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": -1.0}, "lr=-1.0"),
        ({"betas": (0.9, 1.0)}, "at least 0 and below 1"),
        ({"betas": (0.9,)}, "give 2 of them"),
        ({"omega": (0.5, 0.4)}, "give 3 of them"),
        ({"omega": 1.1}, "the sum at most 1"),
        ({"omega": -0.1}, "each must be at least 0"),
        ({"eps": 0.0}, "eps=0.0"),
        ({"weight_decay": -0.1}, "weight_decay=-0.1"),
        *[({name: value}, f"{name}={value}.*finite") for name in ("lr", "eps", "weight_decay") for value in (INF, NAN)],
        *[({"betas": (0.9, value)}, "at least 0 and below 1") for value in (INF, NAN)],
    ],
)
def test_mistakes_are_told_and_a_refused_group_changes_nothing(options, message):
    """Of all parameters, of one group, and of a group that comes later."""
    p, q = (nn.Parameter(torch.ones(2)) for _ in range(2))
    with pytest.raises(ValueError, match=message):
        QHADOPT([p], **options)
    with pytest.raises(ValueError, match=message):
        QHADOPT([{"params": [p]}, {"params": [q], **options}])
    optimizer = QHADOPT([p], lr=0.05)
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(ValueError, match=message):
        optimizer.add_param_group({"params": [q], **options})
    assert optimizer.state_dict() == before
    optimizer.add_param_group({"params": [q], "omega": 0.5})  # nothing of the refused one is left
    assert optimizer.param_groups[1]["lr"] == 0.05


def test_options_of_a_group_are_checked_together_with_the_constructors():
    """Two weights need three betas, whoever gives which."""
    p, q = (nn.Parameter(torch.ones(2)) for _ in range(2))
    optimizer = QHADOPT([p], betas=(0.9, 0.99, 0.999), omega=(0.1, 0.2))
    with pytest.raises(ValueError, match="give 2 of them"):
        optimizer.add_param_group({"params": [q], "omega": 0.3})
    optimizer.add_param_group({"params": [q], "omega": (0.3, 0.4)})


def test_sparse_gradients_are_refused():
    embedding = nn.Embedding(4, 2, sparse=True)
    embedding(torch.tensor([1])).sum().backward()
    with pytest.raises(ValueError, match="dense gradients"):
        QHADOPT(embedding.parameters()).step()
