"""Dataclass states come apart and go back into live objects, typed and in place."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

from lowcomm.state import restore, state_tree


@dataclass
class Momentum:
    buffer: list[Tensor]


@dataclass(frozen=True)
class Frozen:
    mine: Tensor
    count: int


@dataclass
class InFlight:
    start_t: int
    delta: Tensor
    inner: Momentum | None = None


@dataclass
class State:
    anchor: list[Tensor]
    outer: Any
    round: int = 0
    loss: float | None = None
    pair: tuple[Tensor, int] = field(default_factory=lambda: (torch.zeros(1), 0))
    slots: dict[str, Tensor] = field(default_factory=dict)
    in_flight: list[InFlight] = field(default_factory=list)
    residual: Frozen | None = None


def fresh() -> State:
    return State([torch.zeros(2), torch.zeros(3, dtype=torch.bfloat16)], Momentum([torch.zeros(2)]))


def trained() -> State:
    """As `fresh` after some work: values differ, lists are longer, keys and optional parts are there."""
    return State(
        anchor=[torch.ones(2), torch.ones(3, dtype=torch.bfloat16)],
        outer=Momentum([torch.tensor([1.0, 2.0])]),
        round=7,
        loss=0.5,
        pair=(torch.ones(1), 3),
        slots={"exp_avg": torch.ones(2)},
        in_flight=[InFlight(4, torch.ones(2)), InFlight(5, torch.ones(3), Momentum([torch.ones(1)]))],
        residual=Frozen(torch.ones(2), 1),
    )


@pytest.mark.parametrize("source", [fresh, trained])
@pytest.mark.parametrize("target", [fresh, trained])
def test_restore_gives_the_saved_state(source: Any, target: Any) -> None:
    tree = copy.deepcopy(state_tree(source()))
    restored = restore(target(), tree)
    assert repr(restored) == repr(source())  # repr shows every type and value of these small states


def test_restore_is_in_place() -> None:
    state = fresh()
    anchor, first, outer = state.anchor, state.anchor[0], state.outer
    assert restore(state, state_tree(trained())) is state
    assert state.anchor is anchor
    assert state.anchor[0] is first
    assert state.outer is outer
    assert first.tolist() == [1.0, 1.0]


def test_restored_tensors_share_nothing_with_the_tree() -> None:
    source, state = trained(), fresh()
    restore(state, state_tree(source))
    for x in (*source.anchor, source.slots["exp_avg"], source.in_flight[0].delta, source.pair[0]):
        x.zero_()
    assert repr(state) == repr(trained())


def test_new_tensors_stand_on_the_device() -> None:
    state = restore(fresh(), state_tree(trained()), device="meta")
    assert state.in_flight[0].delta.device.type == "meta"
    assert state.anchor[0].device.type == "cpu"


def test_frozen_states_are_replaced() -> None:
    old = Frozen(torch.zeros(2), 0)
    new = restore(old, state_tree(Frozen(torch.ones(2), 5)))
    assert (new.count, new.mine is old.mine, old.count) == (5, True, 0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.anchor.__setitem__(0, torch.zeros(5)), r"State.anchor\[0\] is torch.float32\[2\], but .*\[5\]"),
        (lambda s: s.anchor.__setitem__(0, torch.zeros(2).double()), r"State.anchor\[0\].*float64"),
        (lambda s: setattr(s, "outer", InFlight(0, torch.zeros(1))), "State.outer is a Momentum, but a InFlight was"),
        (lambda s: setattr(s, "outer", 3), "State.outer is a Momentum, but a int was"),
        (lambda s: setattr(s, "anchor", 3), "State.anchor is a list, but a int was"),
        (lambda s: setattr(s, "slots", Momentum([])), "State.slots is a dict, but a Momentum was"),
        (lambda s: s.anchor.__setitem__(0, 3), r"State.anchor\[0\] is a Tensor, but a int was"),
    ],
)
def test_other_structures_are_refused(change: Any, message: str) -> None:
    source = fresh()
    change(source)
    with pytest.raises(ValueError, match=message):
        restore(fresh(), state_tree(source))


def test_other_fields_are_refused() -> None:
    tree = state_tree(fresh())
    del tree["round"]
    with pytest.raises(ValueError, match=r"\['round'\] of State stand in only one"):
        restore(fresh(), tree)
    with pytest.raises(ValueError, match=r"\['newer'\] of State stand in only one"):
        restore(fresh(), state_tree(fresh()) | {"newer": 1})


def test_a_tuple_that_is_built_anew_is_one_and_parameters_are_filled() -> None:
    state, weight = fresh(), torch.nn.Parameter(torch.zeros(2))
    state.anchor[0], state.outer = weight, None
    restore(state, state_tree(trained()) | {"outer": ([1], (2, 3))})
    assert state.outer == ([1], (2, 3))
    assert state.anchor[0] is weight and weight.requires_grad and weight.tolist() == [1.0, 1.0]


def test_unknown_class_is_refused() -> None:
    @dataclass
    class Stranger:
        x: int

    source, state = fresh(), fresh()
    source.outer, state.outer = Stranger(1), None
    with pytest.raises(ValueError, match="State.outer was a Stranger, which no annotation"):
        restore(state, state_tree(source))
