"""Schedules against their formulas at every step, and parameter groups."""

import math

import pytest
import torch
from torch import nn

from lowcomm.optim.groups import parameter_groups
from lowcomm.optim.schedule import WSD, Constant, Cosine, InverseSqrt, Linear, Schedule
from tests.refusals import refused

NUM_STEPS, PEAK = 20, 0.3


def rates(schedule: Schedule, num_steps: int, num_taken: int) -> list[float]:
    """The rate that each of ``num_taken`` optimizer steps uses."""
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=PEAK)
    scheduler = schedule.build(optimizer, num_steps)
    taken = []
    for _ in range(num_taken):
        taken.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return taken


def cosine_to_a_tenth(t: int) -> float:
    return 0.1 + 0.9 * (1 + math.cos(math.pi * (t - 4) / 16)) / 2


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        (Constant(), lambda t: 1.0),
        (Constant(4), lambda t: min(t / 4, 1.0)),
        (Linear(), lambda t: 1 - t / 20),
        (Linear(4, final=0.25), lambda t: t / 4 if t <= 4 else 1 - 0.75 * (t - 4) / 16),
        (Linear(20), lambda t: t / 20),
        (Cosine(), lambda t: (1 + math.cos(math.pi * t / 20)) / 2),
        (Cosine(4, final=0.1), lambda t: t / 4 if t <= 4 else cosine_to_a_tenth(t)),
        (WSD(4), lambda t: t / 4 if t <= 4 else 1.0 if t <= 16 else (20 - t) / 4),
        (WSD(4, final=0.5, decay_fraction=0.5), lambda t: t / 4 if t <= 4 else 1 - 0.5 * max(0, t - 10) / 10),
        (WSD(0, decay_fraction=0.18), lambda t: min(1.0, (20 - t) / 4)),  # 3.6 steps
        (WSD(0, num_decay_steps=5), lambda t: min(1.0, (20 - t) / 5)),
        (WSD(2, num_decay_steps=0), lambda t: min(t / 2, 1.0)),
        (WSD(4, decay="1-sqrt"), lambda t: t / 4 if t <= 4 else 1 - math.sqrt(max(0, t - 16) / 4)),
        (WSD(0, 0.5, "1-sqrt", 0.5), lambda t: 1 - 0.5 * math.sqrt(max(0, t - 10) / 10)),
        (InverseSqrt(), lambda t: 1 / math.sqrt(t)),
        (InverseSqrt(4), lambda t: t / 4 if t <= 4 else math.sqrt(4 / t)),
    ],
)
def test_every_step_has_the_rate_of_the_formula_and_the_last_one_stays(schedule, expected):
    wanted = [PEAK * expected(min(t, NUM_STEPS)) for t in range(1, NUM_STEPS + 15)]
    assert rates(schedule, NUM_STEPS, NUM_STEPS + 14) == pytest.approx(wanted, rel=1e-12, abs=1e-15)


def test_each_group_keeps_its_own_peak():
    groups = [{"params": [nn.Parameter(torch.zeros(1))], "lr": lr} for lr in (1.0, 0.1)]
    optimizer = torch.optim.SGD(groups)
    Linear(num_warmup_steps=2).build(optimizer, 10)
    assert [group["lr"] for group in optimizer.param_groups] == [0.5, 0.05]


@pytest.mark.parametrize("schedule", [Cosine(3, final=0.1), WSD(3), InverseSqrt(3)], ids=repr)
@pytest.mark.parametrize("num_before", [0, 2, 7, 12])
def test_a_resumed_schedule_goes_on_exactly(schedule, num_before):
    def fresh():
        optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=PEAK)
        return optimizer, schedule.build(optimizer, 10)

    optimizer, scheduler = fresh()
    for _ in range(num_before):
        optimizer.step()
        scheduler.step()
    saved = optimizer.state_dict(), scheduler.state_dict()
    optimizer, scheduler = fresh()
    optimizer.load_state_dict(saved[0])
    scheduler.load_state_dict(saved[1])
    resumed = []
    for _ in range(5):
        resumed.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    assert resumed == rates(schedule, 10, num_before + 5)[num_before:]


test_mistakes_are_told = refused(
    (lambda: Constant(-1), "num_warmup_steps is -1"),
    (lambda: Linear(final=-0.1), "final is -0.1"),
    (lambda: Cosine(final=2.0), "final is 2.0"),
    (lambda: WSD(decay_fraction=1.5), "decay_fraction is 1.5"),
    (lambda: WSD(decay="sqrt"), "decay is 'sqrt'; choose 'linear' or '1-sqrt'"),  # type: ignore[arg-type]
    (lambda: WSD(num_decay_steps=-1), "num_decay_steps is -1"),
    (lambda: rates(Constant(11), 10, 1), "num_warmup_steps 11 is more than the run's 10"),
    (lambda: rates(WSD(6, num_decay_steps=5), 10, 1), "5 steps of decay are more than the run's 10"),
    (lambda: rates(Constant(), 0, 1), "num_steps is 0"),
)


def test_only_matrices_decay_and_a_tied_weight_stands_once():
    model = nn.Sequential(nn.Embedding(5, 3), nn.LayerNorm(3), nn.Linear(3, 5), nn.Linear(5, 5))
    model[2].weight = model[0].weight
    model[3].requires_grad_(False)
    norm, head = model[1], model[2]
    matrices, vectors = parameter_groups(model)
    assert [(name, id(p)) for name, p in matrices["params"]] == [("0.weight", id(model[0].weight))]
    assert [id(p) for _, p in vectors["params"]] == [id(norm.weight), id(norm.bias), id(head.bias)]
    assert "weight_decay" not in matrices
    assert vectors["weight_decay"] == 0.0
    (everything,) = parameter_groups(model, decay_vectors=True)
    assert list(everything) == ["params"]
    assert {id(p) for _, p in everything["params"]} == {id(p) for p in model.parameters() if p.requires_grad}


def test_a_group_without_parameters_is_left_out():
    assert len(parameter_groups(nn.Linear(3, 3, bias=False))) == 1
    assert [group["weight_decay"] for group in parameter_groups(nn.LayerNorm(3))] == [0.0]
