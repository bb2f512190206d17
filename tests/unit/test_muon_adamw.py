"""Which parameters are Muon's, and that the two optimizers behave as one."""

import copy

import pytest
import torch
from torch import nn

from lowcomm.config import Optimizer, Run
from lowcomm.models.llama import Llama
from lowcomm.optim.groups import parameter_groups
from lowcomm.optim.muon_adamw import MuonAdamW, is_hidden
from lowcomm.optim.schedule import Linear
from lowcomm.sim.record.timing import shapes_of
from tests.refusals import refused

PATH = "lowcomm.optim.muon_adamw.MuonAdamW"


def llama():
    return Llama(size="500k", num_layers=2, dim=24).build(32, seed=0)


def give_gradients(model, seed=0):
    generator = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        p.grad = torch.randn(p.shape, generator=generator)


@pytest.mark.parametrize(
    ("name", "shape", "expected"),
    [
        ("model.layers.3.mlp.up_proj.weight", (4, 3), True),
        ("transformer.h.11.attn.c_attn.weight", (4, 3), True),
        ("0.weight", (4, 3), True),
        ("model.layers.3.norm.weight", (4,), False),
        ("model.layers.3.experts.weight", (2, 4, 3), False),
        ("model.embed_tokens.weight", (4, 3), False),
        ("lm_head.weight", (4, 3), False),
        ("block3.weight", (4, 3), False),
    ],
)
def test_hidden_is_a_matrix_in_a_numbered_block(name, shape, expected):
    assert is_hidden(name, torch.empty(shape)) == expected


def test_every_matrix_of_a_block_is_muons_and_all_else_adamws():
    model = llama()
    optimizer = MuonAdamW(parameter_groups(model))
    muons = {name for group in optimizer.param_groups if group["hidden"] for name in group["param_names"]}
    others = {name for group in optimizer.param_groups if not group["hidden"] for name in group["param_names"]}
    assert muons == {name for name, p in model.named_parameters() if ".layers." in name and p.ndim == 2}
    assert len(muons) == 2 * 7 and len(muons) + len(others) == len(list(model.parameters()))
    assert {"model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"} <= others
    # matrices of both kinds decay, vectors do not
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.01, 0.01, 0.0]
    give_gradients(model)
    optimizer.step()
    states = {name: sorted(optimizer.state[p]) for name, p in model.named_parameters()}
    assert all(states[name] == ["momentum_buffer"] for name in muons)
    assert all(states[name] == ["exp_avg", "exp_avg_sq", "step"] for name in others)


def test_a_group_may_say_itself_what_is_hidden():
    model = nn.Sequential(nn.Embedding(5, 3), nn.Linear(3, 3, bias=False), nn.Linear(3, 5, bias=False))
    named = list(model.named_parameters())
    optimizer = MuonAdamW([{"params": [named[0], named[2]], "hidden": False, "lr": 0.5}, {"params": [named[1]]}])
    assert [(group["param_names"], group["lr"]) for group in optimizer.param_groups] == [
        (["1.weight"], 0.02),
        (["0.weight", "2.weight"], 0.5),
    ]


def test_muon_alone_is_torchs():
    ours, theirs = (nn.Sequential(nn.Linear(4, 3, bias=False), nn.Linear(3, 6, bias=False)) for _ in range(2))
    theirs.load_state_dict(ours.state_dict())
    a = MuonAdamW(ours.named_parameters(), lr=0.1, weight_decay=0.2, adjust_lr_fn="match_rms_adamw")
    b = torch.optim.Muon(theirs.parameters(), lr=0.1, weight_decay=0.2, adjust_lr_fn="match_rms_adamw")
    for seed in range(3):
        for model, optimizer in ((ours, a), (theirs, b)):
            give_gradients(model, seed)
            optimizer.step()
    assert all(torch.equal(p, q) for p, q in zip(ours.parameters(), theirs.parameters(), strict=True))


def test_a_schedule_moves_all_groups_and_loading_keeps_it_in_force():
    model = llama()
    optimizer = MuonAdamW(parameter_groups(model), lr=0.5, adamw_lr=0.25)
    schedule = Linear(num_warmup_steps=0).build(optimizer, 4)
    give_gradients(model)
    optimizer.step()
    schedule.step()
    rates = [group["lr"] for group in optimizer.param_groups]
    assert rates == [0.25, 0.125, 0.125]
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for _ in range(2):
        optimizer.step()
        schedule.step()
    before = [p.detach().clone() for p in model.parameters()]
    assert [group["lr"] for group in optimizer.param_groups] == [0.0, 0.0, 0.0]
    optimizer.step()
    assert all(torch.equal(p, q) for p, q in zip(before, model.parameters(), strict=True)), "the rate is 0"


def test_parameters_without_gradients_are_left_as_they_are():
    model = llama()
    optimizer = MuonAdamW(parameter_groups(model))
    left_alone = {"model.layers.1.mlp.up_proj.weight", "lm_head.weight"}
    give_gradients(model)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for name, p in model.named_parameters():
        if name in left_alone:
            p.grad = None
    optimizer.step()
    assert {name for name, p in model.named_parameters() if torch.equal(p, before[name])} == left_alone


def added_later(model, **options):
    """Blocks 0 and the rest are there from the start; block 1, all kinds of it, in a group that comes later."""
    later = [(name, p) for name, p in model.named_parameters() if ".layers.1." in name]
    names = {name for name, _ in later}
    optimizer = MuonAdamW([(name, p) for name, p in model.named_parameters() if name not in names], **options)
    optimizer.add_param_group({"params": later, "weight_decay": 0.5})
    return optimizer


def given_at_once(model, **options):
    """The same groups, all of them from the start."""
    parts = [[], []]
    for name, p in model.named_parameters():
        parts[".layers.1." in name].append((name, p))
    return MuonAdamW([{"params": parts[0]}, {"params": parts[1], "weight_decay": 0.5}], **options)


def steps(model, optimizer, seeds):
    for seed in seeds:
        give_gradients(model, seed)
        optimizer.step()
    return [p.detach().clone() for p in model.parameters()]


OPTIONS = {"lr": 0.3, "momentum": 0.5, "adjust_lr_fn": "match_rms_adamw", "adamw_lr": 0.03, "betas": (0.8, 0.7)}


def test_a_group_that_comes_later_is_trained_as_one_of_the_start():
    """Split alike and with the constructor's options; once it went to neither optimizer."""
    one, other = llama(), llama()
    optimizer = added_later(one, **OPTIONS)
    assert [group["hidden"] for group in optimizer.param_groups] == [True, False, True, False]
    got, expected = steps(one, optimizer, range(3)), steps(other, given_at_once(other, **OPTIONS), range(3))
    assert all(torch.equal(p, q) for p, q in zip(got, expected, strict=True))
    assert not any(torch.equal(p, q) for p, q in zip(got, llama().parameters(), strict=True))


def test_with_a_group_that_came_later_it_is_saved_and_copied():
    """A copy takes further groups too."""
    model = llama()
    optimizer = added_later(model, **OPTIONS)
    steps(model, optimizer, range(2))
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    restored = llama()
    restored.load_state_dict(saved[0])
    fresh = added_later(restored)
    fresh.load_state_dict(saved[1])
    copied = copy.deepcopy((model, optimizer))
    expected = steps(model, optimizer, range(2, 4))
    for got in (steps(restored, fresh, range(2, 4)), steps(*copied, range(2, 4))):
        assert all(torch.equal(p, q) for p, q in zip(got, expected, strict=True))
    for x in (optimizer, copied[1]):
        x.add_param_group({"params": [("layers.7", nn.Parameter(torch.ones(2, 3)))]})
        assert (x.param_groups[-1]["lr"], x.param_groups[-1]["momentum"]) == (0.3, 0.5)


@pytest.mark.parametrize(
    ("group", "message"),
    [
        (lambda model, new: {"params": [new]}, "give .name, parameter. pairs"),
        (lambda model, new: {"params": [("layers.9", new), *list(model.named_parameters())[:1]]}, "more than one"),
        (lambda model, new: {"params": [("x", new[0].detach())], "hidden": True}, "only supports 2D"),
        (lambda model, new: {"params": [("layers.9", new.bfloat16().detach())], "nesterov": False}, "nesterov to True"),
    ],
    ids=["no name", "held already", "not a matrix", "bfloat16"],
)
def test_a_refused_group_changes_nothing(group, message):
    """Also when its matrices were fine and a parameter of AdamW's was not."""
    one, other = llama(), llama()
    optimizer, new = MuonAdamW(parameter_groups(one)), nn.Parameter(torch.ones(2, 3))
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(ValueError, match=message):
        optimizer.add_param_group(group(one, new))
    assert optimizer.state_dict() == before
    got, expected = steps(one, optimizer, range(2)), steps(other, MuonAdamW(parameter_groups(other)), range(2))
    assert all(torch.equal(p, q) for p, q in zip(got, expected, strict=True))


def test_a_config_names_it_and_shapes_alone_suffice():
    run = Run(Llama(size="500k"), optimizer=Optimizer(PATH, {"lr": 0.02, "betas": [0.9, 0.99]}), num_steps=10)
    shapes = shapes_of(run, 1)
    assert shapes.states == {}, "no state is there for every parameter"
    assert [shapes.lr(t) for t in (0, 10)] == pytest.approx([0.02, 0.0], abs=1e-3)


test_mistakes_are_told = refused(
    (lambda: MuonAdamW(nn.Linear(3, 3).named_parameters()), "no hidden matrix"),
    (
        lambda: MuonAdamW([{"params": list(nn.Sequential(nn.Linear(3, 3)).parameters())}]),
        "give .name, parameter. pairs",
    ),
    (lambda: MuonAdamW(llama().named_parameters(), momentum=1.0), "momentum=1.0"),
    (lambda: MuonAdamW(llama().named_parameters(), adamw_lr=0.0), "adamw_lr=0.0"),
    (lambda: MuonAdamW(llama().bfloat16().named_parameters(), nesterov=False), "nesterov to True"),
)
