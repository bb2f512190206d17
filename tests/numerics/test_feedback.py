"""Every feedback against explicit workers in numpy, and what each promises."""

import signal
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import numpy as np
import pytest
import torch

from benchmarks import step_size
from lowcomm.codecs.absmax import Absmax
from lowcomm.comm.base import PeerLost
from lowcomm.compress.base import Compressor
from lowcomm.compress.ef21_plus import EF21Plus
from lowcomm.compress.gathered import Gathered
from lowcomm.compress.identity import Identity
from lowcomm.compress.quantized import Quantized
from lowcomm.compress.top_k import TopK
from lowcomm.feedback.econtrol import EControl
from lowcomm.feedback.ef14 import EF14
from lowcomm.feedback.ef21 import EF21
from lowcomm.feedback.ef21_sgdm import EF21SGDM
from lowcomm.feedback.ef_bv import EFBV
from lowcomm.feedback.none import NoFeedback
from lowcomm.metrics import read
from lowcomm.reduce import Reducer
from lowcomm.sim.wire.clock import Clock
from lowcomm.sim.wire.comm import World
from lowcomm.tensors import digest
from tests.multiprocess.launch import launch, write_tiny
from tests.world import run_world

NUM_RANKS, NUM_ROUNDS, KEPT = 3, 12, 4
SHAPES = [(5,), (2, 7), (), (3,)]
DIM = 23


def drifting(num_rounds=NUM_ROUNDS, num_ranks=NUM_RANKS):
    """Vectors of workers that differ and move from round to round, ``[rounds, workers, DIM]``."""
    random = np.random.default_rng(4)
    return random.normal(size=(num_ranks, DIM)) + 0.1 * random.normal(size=(num_rounds, num_ranks, DIM)).cumsum(0)


def top(x):
    """The KEPT largest magnitudes."""
    kept = np.zeros_like(x)
    largest = np.argsort(-np.abs(x))[:KEPT]
    kept[largest] = x[largest]
    return kept


@dataclass(frozen=True)
class ExactTopK(Compressor[None]):
    """`top` on every rank, in float64 on the wire."""

    elementwise: ClassVar[bool] = True
    passes_nonfinite: ClassVar[bool] = False

    def init(self, like):
        return None

    def mean(self, x, state, comm, wants_sent=True):
        sent = torch.from_numpy(top(x.numpy()))
        return sent, (yield comm.all_gather(sent)).sum(0) / len(comm.members), state

    def sent_bytes(self, shape, element_bytes, num_members):
        raise AssertionError("nobody asks")


def as_tensors(x):
    pieces = torch.from_numpy(x).split([int(np.prod(shape)) for shape in SHAPES])
    return [piece.reshape(shape) for piece, shape in zip(pieces, SHAPES, strict=True)]


def run(feedback, xs, compressor=None):
    """The estimates of a reducer ``[rounds, DIM]`` and, for each round, the states of all ranks' only bucket."""
    reducer = Reducer(compressor or ExactTopK(), feedback)

    def program(comm):
        state, found, states = reducer.init(as_tensors(xs[0][0])), [], []
        for x in xs:
            means, state = reducer.mean(as_tensors(x[comm.rank]), state, comm).result()
            found.append(torch.cat([mean.reshape(-1) for mean in means]).numpy())
            states.append(state.buckets[0].feedback)
        return np.array(found), states

    results = run_world(len(xs[0]), program)
    assert all(np.array_equal(results[0][0], found) for found, _ in results), "ranks differ"
    return results[0][0], list(zip(*[states for _, states in results], strict=True))


# ---- explicit workers -----------------------------------------------------------------------------------------------


def plain_ef14(xs, decay):
    errors, estimates = np.zeros_like(xs[0]), []
    for x in xs:
        wanted = decay * errors + x
        sent = np.array([top(w) for w in wanted])
        errors = wanted - sent
        estimates.append(sent.mean(0))
    return estimates


def plain_ef21(xs, dense_first):
    g, estimates = np.zeros_like(xs[0]), []
    for t, x in enumerate(xs):
        g = x.copy() if t == 0 and dense_first else g + np.array([top(d) for d in x - g])
        estimates.append(g.mean(0))
    return estimates


def plain_ef21_sgdm(xs, eta, dense_first):
    averages = [xs[0]]
    for x in xs[1:]:
        averages.append((1 - eta) * averages[-1] + eta * x)
    return plain_ef21(averages, dense_first)


def plain_ef_bv(xs, lam, nu, dense_first):
    h, estimates = np.zeros_like(xs[0]), []
    for t, x in enumerate(xs):
        if t == 0 and dense_first:
            h = x.copy()
            estimates.append(h.mean(0))
            continue
        sent = np.array([top(d) for d in x - h])
        estimates.append(h.mean(0) + nu * sent.mean(0))
        h = h + lam * sent
    return estimates


def plain_econtrol(xs, eta, dense_first):
    h, e, estimates = np.zeros_like(xs[0]), np.zeros_like(xs[0]), []
    for t, x in enumerate(xs):
        sent = x - h if t == 0 and dense_first else np.array([top(w) for w in eta * e + x - h])
        e = e + x - h - sent
        h = h + sent
        estimates.append(h.mean(0))
    return estimates


CASES = [
    (EF14(), lambda xs: plain_ef14(xs, 1.0)),
    (EF14(0.95), lambda xs: plain_ef14(xs, 0.95)),
    (EFBV(0.5, 0.75), lambda xs: plain_ef_bv(xs, 0.5, 0.75, True)),
    (EFBV(0.5, 0.75, dense_first=False), lambda xs: plain_ef_bv(xs, 0.5, 0.75, False)),
    *[(EF21(dense), lambda xs, dense=dense: plain_ef21(xs, dense)) for dense in (True, False)],
    *[(EF21SGDM(0.2, dense), lambda xs, dense=dense: plain_ef21_sgdm(xs, 0.2, dense)) for dense in (True, False)],
    *[(EControl(0.3, dense), lambda xs, dense=dense: plain_econtrol(xs, 0.3, dense)) for dense in (True, False)],
    (EControl(), lambda xs: plain_econtrol(xs, KEPT / DIM, True)),  # what top-k lets through is k / d
]


@pytest.mark.parametrize(("feedback", "plain"), CASES, ids=[str(feedback) for feedback, _ in CASES])
def test_feedback_is_that_of_explicit_workers(feedback, plain):
    xs = drifting()
    found, _ = run(feedback, xs)
    assert np.abs(found - np.array(plain(xs))).max() < 1e-12


def test_memory_in_a_code_is_that_of_explicit_workers():
    codec, xs = Absmax(8, block=8), drifting()

    def kept(errors):
        return codec.decode(codec.encode(torch.from_numpy(errors)), DIM).double().numpy()

    errors, estimates = kept(np.zeros_like(xs[0])), []
    for x in xs:
        wanted = 0.95 * errors + x
        sent = np.array([top(w) for w in wanted])
        errors = kept(wanted - sent)
        estimates.append(sent.mean(0))
    found, states = run(EF14(0.95, codec), xs)
    assert np.abs(found - np.array(estimates)).max() < 1e-12
    assert states[0][0].error.dtype == torch.uint8 and states[0][0].error.numel() == codec.num_bytes(DIM)


# ---- promises -------------------------------------------------------------------------------------------------------


def test_ef14_sends_in_the_end_all_that_was_put_in():
    """Whole numbers, so that every sum is exact: what was sent and the last error are what was put in."""
    xs = (drifting() * 1000).round()
    _, states = run(EF14(), xs)
    sent = [xs[0] - np.array([s.error.numpy() for s in states[0]])]
    for t in range(1, len(xs)):
        before, after = (np.array([s.error.numpy() for s in states[i]]) for i in (t - 1, t))
        sent.append(before + xs[t] - after)
    assert all(np.count_nonzero(row) <= KEPT for rows in sent for row in rows), "more than the compressor lets through"
    found, _ = run(EF14(), xs)
    last = np.array([s.error.numpy() for s in states[-1]])
    total = (found * NUM_RANKS).round().sum(0)  # a third is not exact, three of them rounded are
    assert np.array_equal(total + last.sum(0), xs.sum((0, 1)))


@pytest.mark.parametrize(
    "same", [EControl(0.0), EFBV(1.0, 1.0), EFBV(), EF21SGDM(1.0), EFBV.best(0.3, 0.0, 0.0)], ids=str
)
def test_special_cases_are_ef21(same):
    xs = drifting()
    assert np.abs(run(same, xs)[0] - run(EF21(), xs)[0]).max() < 1e-12


def test_ef_bv_finds_the_factors_of_its_special_cases():
    assert EFBV.diana(3.0) == EFBV(0.25, 1.0)
    assert EFBV.best(0.5, 0.0, 0.0) == EFBV(1.0, 1.0)  # biased without variance: EF21
    assert EFBV.best(0.0, 3.0, 0.0) == EFBV(0.25, 1.0)  # unbiased, very many members: DIANA
    assert EFBV.best(0.5, 1.0, 0.5) == EFBV(0.4, 2 / 3)
    assert EFBV.diana(3.0, False) == EFBV(0.25, 1.0, False) and EFBV.best(0.5, 1.0, 0.5, False) == EFBV(
        0.4, 2 / 3, False
    )
    for wrong in [(1.0, 0.0, 0.0), (-0.1, 0.0, 0.0), (0.0, 1.0, 2.0), (0.0, float("inf"), 1.0)]:
        with pytest.raises(ValueError, match="no compressor"):
            EFBV.best(*wrong)


def weighted_ef21(xs, weights, compress):
    """EF21-W as it is written: each worker follows its x / (n w), the estimate is the weighted sum."""
    n = len(weights)
    scaled = xs / (n * weights)[:, None]
    g, estimates = scaled[0].copy(), [(weights[:, None] * scaled[0]).sum(0)]
    for x in scaled[1:]:
        g = g + np.array([compress(d) for d in x - g])
        estimates.append((weights[:, None] * g).sum(0))
    return np.array(estimates)


def test_ef21_w_is_ef21_for_compressors_that_commute_with_factors():
    xs = drifting()
    weights = np.array(step_size.ef21_w_weights([0.5, 3.0, 1.0]))
    assert weights.tolist() == [0.5 / 4.5, 3.0 / 4.5, 1.0 / 4.5]
    found, _ = run(EF21(), xs)
    assert np.abs(weighted_ef21(xs, weights, top) - found).max() < 1e-12
    on_grid = weighted_ef21(xs, weights, lambda x: np.where(x == 0, 0, 2.0 ** np.round(np.log2(np.abs(x) + 1e-300))))
    assert np.abs(on_grid - found).max() > 1e-3, "a fixed grid does not commute"


@pytest.mark.parametrize(
    "make",
    [
        *(partial(cls, eta) for cls, eta in [(EF14, -0.1), (EF14, 1.1), (EControl, -0.1), (EControl, 1.1)]),
        *(partial(cls, eta) for cls, eta in [(EF21SGDM, 0.0), (EF21SGDM, 1.1), (EFBV, 0.0), (EFBV, 1.1)]),
        *(partial(EFBV, 1.0, nu) for nu in (0.0, 1.1)),
    ],
)
def test_options_out_of_range_are_refused(make):
    with pytest.raises(ValueError, match="must lie within"):
        make()


# ---- the mean that all can follow -----------------------------------------------------------------------------------

TRACKING = [EF21(), EF21(False), EF21SGDM(0.2), EFBV(0.5, 0.75), EControl(0.2), EControl()]


def known(feedback_state):
    return getattr(feedback_state, "known", feedback_state)


@pytest.mark.parametrize("compressor", [ExactTopK(), TopK(num=3, chunk=8), Quantized(Absmax(4, block=8))], ids=str)
@pytest.mark.parametrize("feedback", TRACKING, ids=str)
def test_ours_is_the_mean_of_mine_after_every_round(feedback, compressor):
    for states in run(feedback, drifting(), compressor)[1]:
        mine = torch.stack([known(state).mine for state in states])
        assert len({digest([known(state).ours]) for state in states}) == 1
        assert (mine.mean(0) - known(states[0]).ours).abs().max() < 1e-13


def elastic(reducer, num_rounds=14):
    """Three ranks average once a second; rank 1 is lost after 3.5 s and there again, with nothing, after 7.5 s.

    The states of each round's members by rank.
    """
    xs = drifting(num_rounds + 1)
    clock = Clock(isolate_torch=False)
    world = World(clock)
    seen = [{} for _ in range(num_rounds + 1)]

    def program(rank):
        comm, state, returns = world.comm(rank, range(NUM_RANKS)), reducer.init(as_tensors(xs[0][rank])), 0
        is_fresh = world.incarnation(rank) > 0
        while clock.now < num_rounds:
            if not is_fresh:
                clock.sleep(1.0)
            if is_fresh or world.incarnation(1) != returns:
                comm, returns, is_fresh = world.comm(rank, range(NUM_RANKS)), world.incarnation(1), False
                state = reducer.resync(state, comm).result()
                seen[int(clock.now)][rank] = state.buckets[0]
                continue
            x = as_tensors(xs[int(clock.now)][rank])
            try:
                _, state = reducer.mean(x, state, comm).result()
            except PeerLost as lost:
                comm = comm.sub([r for r in comm.members if r not in lost.ranks])
                state = reducer.resync(state, comm).result()
            seen[int(clock.now)][rank] = state.buckets[0]

    for rank in range(NUM_RANKS):
        clock.spawn(rank, partial(program, rank))
    clock.at(3.5, partial(world.crash, 1))
    clock.at(7.5, lambda: world.rejoin(1, partial(program, 1)))
    clock.run()
    members = [sorted(states) for states in seen[1:]]
    assert members == [[0, 1, 2]] * 3 + [[0, 2]] * 4 + [[0, 1, 2]] * (num_rounds - 7)
    return seen[1:]


@pytest.mark.parametrize("feedback", TRACKING, ids=str)
def test_a_member_lost_and_back_leaves_ours_the_mean_of_mine(feedback):
    rounds = elastic(Reducer(ExactTopK(), feedback))
    for states in rounds:
        mine = torch.stack([known(state.feedback).mine for state in states.values()])
        for state in states.values():
            assert (mine.mean(0) - known(state.feedback).ours).abs().max() < 1e-13
            assert not known(state.feedback).is_new
    assert known(rounds[7][1].feedback).mine.abs().max() == 0, "a fresh member starts from zero"
    assert known(rounds[-1][1].feedback).mine.abs().max() > 0


def test_a_member_lost_and_back_is_known_to_all_in_ef21_plus():
    for states in elastic(Reducer(EF21Plus(TopK(num=4, chunk=None)))):
        rows = torch.stack([state.compressor.mine for _, state in sorted(states.items())])
        assert all(torch.equal(state.compressor.known, rows) for state in states.values())


@pytest.mark.parametrize("feedback", [EF21(), EF21SGDM(), EFBV(), EControl()], ids=str)
def test_members_that_meet_before_the_first_round_still_begin_with_a_dense_one(feedback):
    xs = drifting(1)

    def program(comm):
        reducer = Reducer(ExactTopK(), feedback)
        state = reducer.resync(reducer.init(as_tensors(xs[0][0])), comm).result()
        means, _ = reducer.mean(as_tensors(xs[0][comm.rank]), state, comm).result()
        return torch.cat([mean.reshape(-1) for mean in means]).numpy()

    assert np.abs(run_world(NUM_RANKS, program)[0] - xs[0].mean(0)).max() < 1e-15


# ---- EF21+ ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dense_first", [True, False])
@pytest.mark.parametrize("inner", [TopK(num=KEPT, chunk=None, values=Absmax(8, block=1)), Gathered(Absmax(4, block=8))])
def test_ef21_plus_is_that_of_explicit_workers(inner, dense_first):
    xs = drifting()
    xs[6] = -3 * xs[5]  # a leap, after which it is better to start afresh

    def compress(x):
        if isinstance(inner, TopK):
            (places,), (values,) = inner.decode(inner.encode(torch.from_numpy(x))[None], DIM)
            return np.bincount(places.numpy(), values.double().numpy(), minlength=DIM)
        return inner.codec.decode(inner.codec.encode(torch.from_numpy(x)[None]), DIM)[0].double().numpy()

    g, estimates, num_whole = np.zeros_like(xs[0]), [], 0
    for t, x in enumerate(xs):
        if t == 0 and dense_first:
            g = x.copy()
        else:
            for i in range(NUM_RANKS):
                whole, change = compress(x[i]), g[i] + compress(x[i] - g[i])
                is_whole = ((x[i] - whole) ** 2).sum() < ((x[i] - change) ** 2).sum()
                num_whole += is_whole
                g[i] = whole if is_whole else change
        estimates.append(g.mean(0))
    found, _ = run(NoFeedback(), xs, EF21Plus(inner, dense_first))
    assert np.abs(found - np.array(estimates)).max() < 1e-12
    assert 0 < num_whole < NUM_ROUNDS * NUM_RANKS, "both candidates must win once"


def test_ef21_plus_refuses_what_it_cannot_decode():
    for inner in [Identity(), Gathered(Absmax(stochastic=True)), TopK(divide_by="present")]:
        with pytest.raises(ValueError, match="EF21Plus"):
            EF21Plus(inner)


# ---- through the command line ---------------------------------------------------------------------------------------


@pytest.mark.timeout(200)
def test_a_run_with_feedback_that_is_interrupted_ends_like_one_that_is_not(tmp_path):
    """Each rank's own memory is in its checkpoint; killed in the round after one."""
    config = write_tiny(tmp_path)
    reducer = ["--algorithm.reducer.compressor", "TopK", "--algorithm.reducer.feedback", "EF21SGDM"]
    flags = ["train", "--config", str(config), *reducer, "--algorithm.every", "4", "--num_steps", "20", "--out"]
    assert launch([*flags, str(tmp_path / "whole")]).codes == [0, 0]
    struck = launch([*flags, str(tmp_path / "broken")], stop_at="1:step:14:SIGKILL")
    assert struck.codes == [1, -signal.SIGKILL]
    again = launch([*flags, str(tmp_path / "broken"), "--resume"])
    assert again.codes == [0, 0], again.errors
    whole, broken = ((tmp_path / name / "final.safetensors").read_bytes() for name in ("whole", "broken"))
    assert whole == broken
    resumed = [r["t"] for r in read(tmp_path / "broken" / "metrics.jsonl") if r["kind"] == "step"]
    assert resumed == list(range(1, 21))
