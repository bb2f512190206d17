"""Streaming DiLoCo: DiLoCo in fragments that are synced in turn, overlapping communication with training (Douillard et
al. 2025, arXiv:2501.18512, Algorithm 2).

After inner step t, for each fragment p of the parameters, with its own anchor, outer state and offset t_p:

    send,  when t - t_p is a multiple of H:          delta_i = anchor - local_i(t), averaged over i
    apply, `delay` inner steps after it was sent:    anchor  <- outer(anchor, mean_i delta_i)
                                                     local_i <- blend local_i(t) + (1 - blend) anchor

The delta is measured from the anchor, so the local steps that blending keeps are sent with the next delta. What it does
not keep is lost: with `blend` 0, the `delay` steps between sending and applying.

With `delay` = H a delta is taken before the average that arrives at the same step is applied. With `blend` 0 this is
the update delayed by one outer step (arXiv:2502.12996; DiLoCoX, arXiv:2506.21263):

    Theta_i(t) = outer(Theta(t - H), mean_j delta_j(t - H)),    delta_j(t) = Theta(t - H) - local_j(t),    delta(0) = 0

At the first sending there is no average to apply, but the anchor is loaded as in later rounds.

Differs from the paper in: lines 7 and 11 of its algorithm use a replica's own earlier parameters, with which replicas
would diverge; here, as in its text, it is the last synced fragment. `delay` may be H, which the paper excludes. At the
end of a run pending averages are applied and partial rounds synced.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor

from lowcomm.comm.base import Comm
from lowcomm.engine.base import Engine
from lowcomm.outer.base import Outer
from lowcomm.outer.nesterov import Nesterov
from lowcomm.reduce import Reducer
from lowcomm.rounds.anchors import anchor_of, delta
from lowcomm.rounds.base import Rounds, RoundsState
from lowcomm.rounds.exchanges import Exchange, Sending
from lowcomm.rounds.fragments import Pattern, cut, offsets
from lowcomm.rounds.participation import check_number, counted
from lowcomm.rounds.qsr import check_every
from lowcomm.tensors import mix


@dataclass
class Fragment:
    """The state of one fragment.

    Attributes:
        numbers: indices of its parameters.
        outer: state of the outer optimizer; equal on all replicas.
        sent_t: the inner step of the last delta; None before the first.
        round: averages applied so far.
    """

    numbers: list[int]
    outer: Any
    sent_t: int | None = None
    round: int = 0


@dataclass
class StreamingDiLoCoState(RoundsState):
    """Attributes:
    anchor: the parameters after their fragment's last round, float32 or better; the same sequence on all replicas.
    fragments: the state of each.
    """

    anchor: list[Tensor]
    fragments: list[Fragment]


@dataclass(frozen=True)
class StreamingDiLoCo(Rounds[StreamingDiLoCoState]):
    """DiLoCo with its traffic spread over the round and overlapped with training.

    Traffic of a round: as DiLoCo, in one part per fragment. With `Gathered` and a code of b bits a value, (n - 1) b / 8
    bytes a parameter for each of n replicas. A part has `delay` inner steps to arrive.

    If a compressor sends k messages in sequence, the j-th is sent ceil((j - 1) delay / k) steps after the first.

    With `overlap` a fragment also has part of a backward pass: a layer's deltas are sent as soon as they are final.

    Attributes:
        every: inner steps between two syncs of a fragment, H.
        delay: inner steps from sending a delta to applying the mean, from 0 (blocking) to `every`. The paper uses 1; up
            to 5 costs little.
        delays: one `delay` for each replica, in rank order. All send at the same steps.
        blend: share of the local parameters kept when an average is applied, from 0 to 1, which ignores the average.
        blocks_per_fragment: transformer blocks in a fragment; None syncs all parameters at once.
        pattern: "strided" spreads a fragment's blocks over the depth, "sequential" takes neighbours.
        first_round_guard: train `every` steps before a fragment's first sync, as in the paper; otherwise first syncs
            come at the offsets, after shorter rounds.
        outer: the outer optimizer; each fragment has its own state.
        reducer: how deltas are averaged. The paper's is Reducer(Gathered(E3M0())).
        overlap: in the step that sends a fragment, update its parameters during backward and send their deltas at once,
            in groups of the reducer's `bucket_bytes` from the last parameter to the first. Excludes clipping by the
            gradient norm. The end of a run does not overlap.
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
        check_every(self.every)
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

    def begin(self, engine: Engine, comm: Comm) -> StreamingDiLoCoState:
        """The anchor is a copy of the parameters."""
        check_number("delays", self.delays, comm.members)
        anchor = anchor_of(engine.slots()["param"])
        fragments, kept = [], {}
        for k, numbers in enumerate(cut(engine.names(), self.blocks_per_fragment, self.pattern)):
            part = [anchor[i] for i in numbers]
            fragments.append(Fragment(numbers, self.outer.init(part)))
            kept[str(k)] = self.keep(part)
        return StreamingDiLoCoState(anchor, fragments, kept=kept, replicas=counted(comm.members, self.delays))

    def is_due(self, t: int, state: StreamingDiLoCoState) -> bool:
        """Whether a fragment is sent after step ``t``."""
        return bool(self._due(t, state))

    def loads(self, t: int, state: StreamingDiLoCoState) -> bool:
        """Whether any replica blends a fragment after step ``t``."""
        delays, sent = self._delays(), [fragment.sent_t for fragment in state.fragments]
        sends_and_loads = 0 in delays or self.every in delays
        return (sends_and_loads and self.is_due(t, state)) or any(s is not None and t - s in delays for s in sent)

    def round(self, t: int, engine: Engine, state: StreamingDiLoCoState, comm: Comm) -> list[Sending]:
        """The deltas of the fragments that are due."""
        return [self._sending(k, engine, state, comm) for k in self._due(t, state)]

    def commit(self, t: int, engine: Engine, state: StreamingDiLoCoState, sent: Exchange, means: list[Tensor]) -> None:
        """Step the fragment's anchor, then blend it into the local parameters."""
        fragment = state.fragments[int(sent.slot)]
        self.outer.apply([state.anchor[i] for i in fragment.numbers], means, fragment.outer)
        self._blend(fragment, engine, state)
        fragment.round += 1

    def departed(self, t: int, engine: Engine, state: StreamingDiLoCoState, sent: Exchange, has_arrived: bool) -> None:
        """With `delay` = `every`, load the unchanged anchor if no average arrived, as the delta has been taken."""
        fragment = state.fragments[int(sent.slot)]
        fragment.sent_t = t
        if sent.due_t - sent.sent_t == self.every and not has_arrived:
            self._blend(fragment, engine, state)

    def drains_first(self, state: StreamingDiLoCoState, comm: Comm) -> bool:
        """Not with `delay` = `every`: deltas are then taken before pending averages are applied, as in every round."""
        return self._delay(state, comm) < self.every

    def rest(self, t: int, engine: Engine, state: StreamingDiLoCoState, comm: Comm) -> list[Sending] | None:
        """Deltas of the fragments for which some replica has unsent steps; the same on all ranks."""
        delays = self._delays()
        rest = []
        for k, fragment in enumerate(state.fragments):
            # where the anchor is loaded as it is, none is left of the steps up to that
            loads = self.blend == 0 and max(delays) < self.every and fragment.sent_t is not None
            since = state.begun_t if fragment.sent_t is None else fragment.sent_t
            if t - since > (min(delays) if loads else 0):
                rest.append(self._sending(k, engine, state, comm))
        return rest

    def num_rounds(self, state: StreamingDiLoCoState) -> int:
        """Averages applied so far, over all fragments."""
        return sum(fragment.round for fragment in state.fragments)

    def stands(self, engine: Engine, state: StreamingDiLoCoState) -> list[Tensor]:
        """The anchors."""
        return state.anchor

    def _due(self, t: int, state: StreamingDiLoCoState) -> list[int]:
        """The fragments sent after inner step ``t``."""
        first = self.every if self.first_round_guard else 0
        ages = [t - state.begun_t - offset for offset in offsets(len(state.fragments), self.every)]
        return [k for k, age in enumerate(ages) if age % self.every == 0 and age >= first]

    def _sending(self, k: int, engine: Engine, state: StreamingDiLoCoState, comm: Comm) -> Sending:
        numbers, params = state.fragments[k].numbers, engine.slots()["param"]
        anchor, local = [state.anchor[i] for i in numbers], [params[i] for i in numbers]
        moved = partial(delta, anchor, local, 1.0)
        delay = self._delay(state, comm)
        # by the least delay on all ranks: the order of messages must not depend on a rank's own
        return Sending(str(k), self.reducer, anchor, moved, numbers, delay, pace=min(self._delays()))

    def _blend(self, fragment: Fragment, engine: Engine, state: StreamingDiLoCoState) -> None:
        """Blend the anchor into the replica's fragment."""
        params = engine.slots()["param"]
        for a, p in ((state.anchor[i], params[i]) for i in fragment.numbers):
            # to what a replica is loaded with, so that one that stands there already stays
            loaded = a.to(p.dtype).to(a.dtype)
            p.copy_(mix(p.to(a.dtype), loaded, 1 - self.blend))

    def _delays(self) -> list[int]:
        """The delays of all replicas."""
        return [self.delay] if self.delays is None else self.delays

    def _delay(self, state: StreamingDiLoCoState, comm: Comm) -> int:
        """The delay of this replica."""
        return self.delay if self.delays is None else self.delays[state.replicas.index(comm.rank)]
