"""Streaming DiLoCo: DiLoCo in fragments that take turns, whose averages travel while training goes on (Douillard et al.
2025, arXiv:2501.18512, Algorithm 2).

After inner step t, for each fragment p of the parameters, with its own anchor, outer state and offset t_p:

    send,  when t - t_p is a multiple of H:          delta_i = anchor - local_i(t), on its way to the mean over i
    apply, `delay` inner steps after it was sent:    anchor  <- outer(anchor, mean_i delta_i)
                                                     local_i <- blend local_i(t) + (1 - blend) anchor

The delta is measured from the anchor, so what blending leaves of a replica's own steps is sent with the next one. What
it does not leave is lost: with `blend` 0 the `delay` steps between sending and applying.

With `delay` = H a delta is taken before what arrived in the same moment is applied. With `blend` 0 that is the update
which is one outer step late (arXiv:2502.12996; DiLoCoX, arXiv:2506.21263):

    Theta_i(t) = outer(Theta(t - H), mean_j delta_j(t - H)),    delta_j(t) = Theta(t - H) - local_j(t),    delta(0) = 0

When first sent, nothing is there to apply, but the anchor is loaded as in every later round.

Differs from the paper in: lines 7 and 11 of its algorithm name a replica's own earlier parameters, with which replicas
would part for good; here, as in its prose, it is the last synced fragment. `delay` may be H, which the paper excludes.
At the end of a run what is under way is applied and partial rounds are synced.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lowcomm.algorithms.anchors import anchor_of, delta
from lowcomm.algorithms.base import Algorithm
from lowcomm.algorithms.fragments import Pattern, cut, offsets
from lowcomm.algorithms.overlapped import Groups, GroupsState, Turn, in_turn
from lowcomm.algorithms.under_way import num_advances
from lowcomm.comm.base import Comm
from lowcomm.engine.base import Engine, Ready, Wanted
from lowcomm.outer.base import Outer
from lowcomm.outer.nesterov import Nesterov
from lowcomm.reduce import Reducer
from lowcomm.tensors import copy_


@dataclass
class Fragment:
    """What is kept of one fragment.

    Attributes:
        numbers: which parameters it holds.
        outers: state of the outer optimizer for each group that travels by itself; equal on all replicas.
        deltas: what averaging keeps between rounds, and the averages that have been sent and not applied.
        sent_t: the inner step of the last delta; None before the first.
        round: averages applied so far.
        is_due: the delay is over, and the next forward applies what is under way; only with `overlap`.
    """

    numbers: list[int]
    outers: list[Any]
    deltas: GroupsState
    sent_t: int | None = None
    round: int = 0
    is_due: bool = False

    def age(self, t: int) -> int:
        """Inner steps since the last delta, or since the beginning."""
        return t - (self.sent_t or 0)


@dataclass
class StreamingDiLoCoState:
    """Attributes:
    anchor: each parameter as its fragment's last round left it, float32 or better; the same sequence on all replicas.
    fragments: what is kept of each.
    """

    anchor: list[Tensor]
    fragments: list[Fragment]


@dataclass(frozen=True)
class StreamingDiLoCo(Algorithm[StreamingDiLoCoState]):
    """DiLoCo whose traffic is spread over a round and overlaps training.

    Traffic of a round: that of DiLoCo, in as many parts as there are fragments: with `Gathered` and a code of b bits a
    value (n - 1) b / 8 bytes a parameter for each of n replicas; that over `every` for each step. A part has `delay`
    inner steps to arrive before anybody waits.

    Where a compressor sends k messages in a row, the j-th sets out ceil((j - 1) delay / k) steps after the first.

    With `overlap` a fragment has parts of a backward and of a forward more: a layer's deltas set out once they are
    known, and forward waits for their mean where it uses the layer.

    Attributes:
        every: inner steps between two syncs of a fragment, H.
        delay: inner steps from sending a delta to applying the mean, from 0, which waits for it, to `every`. The paper
            has 1, and up to 5 costs little.
        delays: one for each replica, in rank order, in the place of `delay`. All send at the same steps.
        blend: how much of a replica's own parameters stays when an average is applied, from 0 to 1, which takes none.
        blocks_per_fragment: transformer blocks in a fragment; None syncs all parameters at once.
        pattern: "strided" spreads a fragment's blocks over the depth, "sequential" takes neighbours.
        first_round_guard: every fragment trains `every` steps before its first sync, as in the paper; otherwise the
            first syncs come after shorter rounds, at the offsets.
        outer: how the anchor follows the mean delta; each fragment has its own state.
        reducer: how deltas are averaged. The paper sends E3M0 to all, which is Reducer(Gathered(E3M0())).
        overlap: in the inner step after which a fragment is sent, update its parameters while backward computes the
            gradients of others, and send their deltas at once: in groups from the last parameter to the first, by the
            reducer's `bucket_bytes`. In the step after the delay, apply each group's mean right before forward uses its
            parameters, or before what asks for `consensus`. Gradients cannot be clipped by their norm then, and a delay
            is below `every`. What is sent at the end of a run does not overlap.
    """

    every: int = 100
    delay: int = 1
    delays: list[int] | None = None
    blend: float = 0.5
    blocks_per_fragment: int | None = 3
    pattern: Pattern = "strided"
    first_round_guard: bool = True
    outer: Outer = Nesterov(lr=0.4, momentum=0.9)
    reducer: Reducer = Reducer()
    overlap: bool = False

    def __post_init__(self) -> None:
        if self.every < 1:
            raise ValueError(f"every is {self.every}; a round needs at least 1 inner step")
        for delay in self._delays():
            if not 0 <= delay <= self.every:
                raise ValueError(
                    f"a delay of {delay} inner steps: it must be at least 0 and at most every, {self.every}, when the "
                    "next delta of the same fragment is sent; 1 is the paper's"
                )
            if self.overlap and delay == self.every:
                raise ValueError(
                    f"a delay of {delay} inner steps with overlap=True: then it must be below every, {self.every}, as "
                    "a delta cannot wait within backward for the average of the last one; use one step less, or set "
                    "overlap to False"
                )
        if not 0 <= self.blend <= 1:
            raise ValueError(
                f"blend is {self.blend}; it must lie within [0, 1]: 0 loads the anchor, 1 keeps the replica's own, 0.5 "
                "is usual"
            )
        if self.blocks_per_fragment is not None and self.blocks_per_fragment < 1:
            raise ValueError(
                f"blocks_per_fragment is {self.blocks_per_fragment}; it must be at least 1, or None for one fragment"
            )
        if self.pattern not in ("strided", "sequential"):
            raise ValueError(f"pattern is {self.pattern!r}; choose 'strided' or 'sequential'")

    def init(self, engine: Engine, comm: Comm) -> StreamingDiLoCoState:
        """The anchor is a copy of the parameters."""
        if self.delays is not None and len(self.delays) != len(comm.members):
            raise ValueError(
                f"delays has {len(self.delays)} entries for {len(comm.members)} replicas; give one for each"
            )
        if self.overlap and (reason := engine.needs_all_gradients()) is not None:
            raise ValueError(
                f"StreamingDiLoCo(overlap=True) updates parameters while backward goes on, but {reason}, or set "
                "overlap to False"
            )
        anchor = anchor_of(engine.slots()["param"])
        fragments = []
        for numbers in cut(engine.names(), self.blocks_per_fragment, self.pattern):
            part = [anchor[i] for i in numbers]
            outers = [self.outer.init([part[k] for k in group]) for group in self._groups().cut(part)]
            fragments.append(Fragment(numbers, outers, self._groups().init(part)))
        return StreamingDiLoCoState(anchor, fragments)

    def sends_in_backward(self) -> bool:
        """With `overlap`."""
        return self.overlap

    def during_forward(self, t: int, engine: Engine, state: StreamingDiLoCoState, comm: Comm) -> Wanted | None:
        """With `overlap`, in the step after a delay: apply each group before the first of its parameters is used."""
        due = [fragment for fragment in state.fragments if fragment.is_due]
        if not due:
            return None
        params = engine.slots()["param"]
        group_of: dict[int, tuple[Fragment, int]] = {}
        for fragment in due:
            for k, numbers in enumerate(self._numbers(fragment, state)):
                group_of |= dict.fromkeys(numbers, (fragment, k))

        def wanted(i: int) -> None:
            if i in group_of:
                self._apply_group(*group_of[i], params, state)

        return wanted

    def during_backward(self, t: int, engine: Engine, state: StreamingDiLoCoState, comm: Comm) -> Ready | None:
        """With `overlap`, before a fragment is sent: update and send each of its groups as soon as its turn has come.

        Where several fragments are sent at one step, their groups take turns by depth, the same on every rank.
        """
        due = self._due(t, state) if self.overlap else []
        if not due:
            return None
        params = engine.slots()["param"]
        turns: list[Turn] = []
        for fragment in due:

            def updated_delta(group: Sequence[int], fragment: Fragment = fragment) -> list[Tensor]:
                engine.update_part([fragment.numbers[k] for k in group])
                return self._delta(fragment, group, params, state)

            like = _part(state.anchor, fragment)
            for group, start in self._groups().turns(like, fragment.deltas, comm, updated_delta):
                turns.append(([fragment.numbers[k] for k in group], start))
        final = in_turn(sorted(turns, key=lambda turn: min(turn[0]), reverse=True))
        return lambda i, gradient: final(i)

    def after_update(self, t: int, engine: Engine, state: StreamingDiLoCoState, comm: Comm) -> None:
        """Send what is due, then apply what is due, or leave it to the next forward."""
        assert not any(fragment.is_due for fragment in state.fragments), "forward has asked for all parameters"
        params = engine.slots()["param"]
        for fragment in self._due(t, state):
            self._send(fragment, t, params, state, comm)
        for fragment in state.fragments:
            if fragment.deltas.under_way:
                # by the least delay on all ranks: the order of messages must not depend on a rank's own
                for _ in range(num_advances(self.reducer, fragment.age(t), min(self._delays()))):
                    fragment.deltas.advance()
        for fragment in state.fragments:
            if fragment.deltas.under_way and fragment.age(t) == self._delay(comm):
                if self.overlap:
                    fragment.is_due = True
                else:
                    self._apply(fragment, params, state)

    def settle(self, state: StreamingDiLoCoState) -> None:
        """Wait for the fragments under way."""
        for fragment in state.fragments:
            fragment.deltas.settle()

    def finish(self, t: int, engine: Engine, state: StreamingDiLoCoState, comm: Comm) -> None:
        """Apply what is under way, sync what replicas have kept since, and load the anchors everywhere."""
        params = engine.slots()["param"]
        self.settle(state)
        for fragment in state.fragments:
            if fragment.deltas.under_way and self._delay(comm) < self.every:
                self._apply(fragment, params, state)
            if self._has_rest(fragment, t, comm):
                self._send(fragment, t, params, state, comm)
        for fragment in state.fragments:
            if fragment.deltas.under_way:
                self._apply(fragment, params, state)
        copy_(params, state.anchor)

    def num_rounds(self, state: StreamingDiLoCoState) -> int:
        """Averages whose delay is over, those of all fragments together."""
        return sum(fragment.round + fragment.is_due for fragment in state.fragments)

    def consensus(self, engine: Engine, state: StreamingDiLoCoState) -> list[Tensor]:
        """The anchors, once what the next forward would apply has been."""
        for fragment in state.fragments:
            if fragment.is_due:
                self._apply(fragment, engine.slots()["param"], state)
        return state.anchor

    def _due(self, t: int, state: StreamingDiLoCoState) -> list[Fragment]:
        """The fragments that are sent after inner step ``t``."""
        turns = zip(state.fragments, offsets(len(state.fragments), self.every), strict=True)
        return [fragment for fragment, offset in turns if self._sends(t - offset)]

    def _sends(self, t: int) -> bool:
        """Whether a fragment is sent ``t`` steps after its offset."""
        return t % self.every == 0 and t >= (self.every if self.first_round_guard else 0)

    def _send(self, fragment: Fragment, t: int, params: list[Tensor], state: StreamingDiLoCoState, comm: Comm) -> None:
        """Take the deltas that were not sent within backward, and start their averages.

        With a delay of a whole round apply the last average after that; in the first round, load the anchor as it is.
        """
        is_late = self._delay(comm) == self.every
        means = fragment.deltas.arrived(0) if is_late and fragment.deltas.under_way else None  # without overlap, of all
        like = _part(state.anchor, fragment)
        self._groups().start(like, fragment.deltas, comm, lambda group: self._delta(fragment, group, params, state))
        fragment.sent_t = t
        if is_late:
            fragment.round += means is not None
            self._move(fragment, 0, means, params, state)

    def _delta(
        self, fragment: Fragment, group: Sequence[int], params: list[Tensor], state: StreamingDiLoCoState
    ) -> list[Tensor]:
        """What some of a fragment's parameters, by their places in it, have moved since its last sync."""
        return delta(state.anchor, params, 1.0, [fragment.numbers[k] for k in group])

    def _apply(self, fragment: Fragment, params: list[Tensor], state: StreamingDiLoCoState) -> None:
        """Wait for what is under way, and apply it."""
        for k in list(fragment.deltas.under_way):
            self._apply_group(fragment, k, params, state)

    def _apply_group(self, fragment: Fragment, k: int, params: list[Tensor], state: StreamingDiLoCoState) -> None:
        """The same for one group, unless that has been done."""
        if k in fragment.deltas.under_way:
            self._move(fragment, k, fragment.deltas.arrived(k), params, state)
            if not fragment.deltas.under_way:
                fragment.round, fragment.is_due = fragment.round + 1, False

    def _move(
        self,
        fragment: Fragment,
        k: int,
        means: list[Tensor] | None,
        params: list[Tensor],
        state: StreamingDiLoCoState,
    ) -> None:
        """Move the anchor of the k-th group, if something has come, and the replica towards it."""
        numbers = self._numbers(fragment, state)[k]
        if means is not None:
            self.outer.apply([state.anchor[i] for i in numbers], means, fragment.outers[k])
        for a, p in ((state.anchor[i], params[i]) for i in numbers):
            # to what a replica is loaded with, so that one that stands there already stays
            loaded = a.to(p.dtype).to(a.dtype)
            p.copy_(torch.lerp(p.to(a.dtype), loaded, 1 - self.blend))

    def _has_rest(self, fragment: Fragment, t: int, comm: Comm) -> bool:
        """Whether some replica holds steps that no delta has covered: the same answer on all ranks."""
        delays = self._delays()
        # where the anchor is loaded as it is, none is left of the steps up to that
        loads = self.blend == 0 and max(delays) < self.every and fragment.sent_t is not None
        return fragment.age(t) > (min(delays) if loads else 0)

    def _delays(self) -> list[int]:
        """All that occur among the replicas."""
        return [self.delay] if self.delays is None else self.delays

    def _delay(self, comm: Comm) -> int:
        """This replica's."""
        return self.delay if self.delays is None else self.delays[comm.place]

    def _groups(self) -> Groups:
        """Of the parameters of one fragment, by their places in it."""
        return Groups(self.reducer, self.overlap)

    def _numbers(self, fragment: Fragment, state: StreamingDiLoCoState) -> list[list[int]]:
        """The parameters of each of a fragment's groups."""
        return [[fragment.numbers[k] for k in group] for group in self._groups().cut(_part(state.anchor, fragment))]


def _part(xs: list[Tensor], fragment: Fragment) -> list[Tensor]:
    return [xs[i] for i in fragment.numbers]
