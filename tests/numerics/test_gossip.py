"""What gossip methods share: who talks to whom, averages within groups, and the bound below which replicas contract."""

from itertools import pairwise

import pytest
import torch

from lowcomm.algorithms.gasloc import GASLoC, mixed
from lowcomm.algorithms.noloco import NoLoCo, outer_step
from lowcomm.codecs.absmax import Absmax
from lowcomm.comm.metered import Meter, MeteredComm
from lowcomm.comm.solo import SoloComm
from lowcomm.compress.cast import Cast
from lowcomm.compress.identity import Identity
from lowcomm.compress.power_sgd import PowerSGD
from lowcomm.compress.quantized import Quantized
from lowcomm.compress.random_k import RandomK
from lowcomm.feedback.ef14 import EF14
from lowcomm.feedback.ef21 import EF21
from lowcomm.feedback.none import NoFeedback
from lowcomm.reduce import Reducer
from lowcomm.rounds.gossip import disagreement, group_mean, groups, largest_pull
from lowcomm.tensors import rng
from tests.compressors import DCT, Hierarchical, TopK, all_compressors, all_feedbacks
from tests.world import run_world


def means_of(x, parts):
    """For each row, the mean over its group."""
    means = torch.empty_like(x)
    for size in {len(part) for part in parts}:
        rows = torch.tensor([part for part in parts if len(part) == size])
        means[rows] = x[rows].mean(1, keepdim=True).expand(-1, size, *x.shape[1:])
    return means


def spread(x):
    return (x - x.mean(0)).square().mean().sqrt()


@pytest.mark.parametrize(
    ("num", "size", "sizes"),
    [
        (8, 2, [2, 2, 2, 2]),
        (7, 2, [2, 2, 2, 1]),
        (10, 4, [4, 4, 2]),
        (3, 4, [3]),
        (4, 4, [4]),
        (5, None, [5]),
        (1, 2, [1]),
    ],
)
def test_groups_hold_every_member_once_and_are_drawn_anew(num, size, sizes):
    members = range(10, 10 + num)
    drawn = [groups(members, size, 3, round) for round in range(1, 9)]
    for parts in drawn:
        assert [len(part) for part in parts] == sizes
        assert sorted(rank for part in parts for rank in part) == list(members)
        assert all(part == tuple(sorted(part)) for part in parts)
    assert drawn == [groups(members, size, 3, round) for round in range(1, 9)]
    assert len(sizes) == 1 or len({tuple(parts) for parts in drawn}) > 4
    assert len(sizes) == 1 or drawn != [groups(members, size, 4, round) for round in range(1, 9)]


def test_the_kth_of_a_permutation_joins_group_k_mod_their_number():
    order = torch.randperm(7, generator=rng(5, "groups", 2)).tolist()
    assert groups(range(7), 2, 5, 2) == [
        *(tuple(sorted((order[k], order[k + 3]))) for k in range(3)),
        (order[6],),
    ]


def test_everybody_meets_everybody_and_is_left_over_equally_often():
    num_met, num_alone = torch.zeros(5, 5), torch.zeros(5)
    for round in range(1, 2001):
        for part in groups(range(5), 2, 0, round):
            if len(part) == 1:
                num_alone[part[0]] += 1
            else:
                num_met[part[0], part[1]] += 1
    assert ((num_alone / 2000 - 1 / 5).abs() < 0.04).all()
    assert ((num_met[*torch.triu_indices(5, 5, 1)] / 2000 - 1 / 5).abs() < 0.04).all()


# ---- the bound ------------------------------------------------------------------------------------------------------


def test_largest_pull_in_numbers():
    expected = {2: [2.0, 1.82, 1.5, 1.02, 0.38], 4: [2.0, 2.14, 2.0, 1.57, 0.69]}
    for size, row in expected.items():
        assert [largest_pull(a, size) for a in (0.0, 0.3, 0.5, 0.7, 0.9)] == pytest.approx(row, abs=0.005)


def second_moment_radius(momentum, pull, size, num_replicas):
    """The spectral radius of the map of (E x^2, E x d, E d^2) for random groups of many replicas, by its definition.

    With m the mean of a group that holds x, and E x = E d = 0: E m^2 = E m x = c E x^2 and E m d = c E x d, where
    another member's correlation with x is -1 / (N - 1).
    """
    c, a, g = 1 / size - (1 - 1 / size) / (num_replicas - 1), momentum, pull
    # d' = a d + g (m - x)
    dd = [g * g * (1 - c), 2 * a * g * (c - 1), a * a]
    xd = [g * (c - 1), a, 0.0]  # E x d'
    m = torch.tensor(
        [
            [1 + 2 * xd[0] + dd[0], 2 * xd[1] + dd[1], dd[2]],  # x' = x + d'
            [xd[0] + dd[0], xd[1] + dd[1], dd[2]],
            dd,
        ],
        dtype=torch.float64,
    )
    return torch.linalg.eigvals(m).abs().max()


@pytest.mark.parametrize("size", [2, 3, 4, 8])
@pytest.mark.parametrize("num", [8, 64, float("inf")])
@pytest.mark.parametrize("momentum", [0.0, 0.3, 0.5, 0.7, 0.9, 0.99])
def test_the_bound_is_where_the_second_moments_stop_to_decay(momentum, size, num):
    limit = largest_pull(momentum, size, num)
    for factor in (0.01, 0.5, 0.9, 0.999):
        assert second_moment_radius(momentum, factor * limit, size, num) < 1
    for factor in (1.001, 1.1, 2.0):
        assert second_moment_radius(momentum, factor * limit, size, num) > 1
    assert largest_pull(momentum, size) <= limit, "what is allowed without a look at the number is allowed with it"
    assert largest_pull(momentum, 8, 8) == pytest.approx(2 * (1 + momentum)), "one group of all: plain heavy ball"


def test_fastest_contraction():
    """Published in the method's notes: pull and radius that contract fastest for pairs."""
    for momentum, pull, radius in [(0.0, 1.0, 0.5), (0.3, 0.585, 0.545), (0.5, 0.3, 0.625), (0.9, 0.01, 0.905)]:
        assert float(second_moment_radius(momentum, pull, 2, float("inf"))) == pytest.approx(radius, abs=0.003)
        others = [second_moment_radius(momentum, pull * factor, 2, float("inf")) for factor in (0.7, 1.4)]
        assert min(others) > radius


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("momentum", [0.0, 0.5, 0.9])
def test_64_replicas_contract_just_below_the_bound_and_part_just_above(momentum, size):
    """By NoLoCo's own update without drift, 1,500 rounds.

    The bound is on the mean over how groups fall: hence several draws where rates are slow.
    """
    num_seeds = 3 if momentum == 0.9 else 1
    squares = torch.zeros(2)
    for seed in range(num_seeds):
        x = [torch.randn(64, 4, dtype=torch.float64, generator=rng(seed, "first")) for _ in range(2)]
        first, d = [spread(y) for y in x], [torch.zeros_like(y) for y in x]
        for round in range(1, 1501):
            parts = groups(range(64), size, seed, round)
            for i, factor in enumerate((0.95, 1.05)):
                pull = factor * largest_pull(momentum, size, 64)
                outer_step([x[i]], [d[i]], momentum, [(pull, [means_of(x[i], parts) - x[i]])])
        squares += torch.tensor([(spread(y) / s).square() for y, s in zip(x, first, strict=True)]) / num_seeds
    below, above = (0.1, 1.5) if momentum == 0.9 else (1e-6, 1e6)
    assert squares[0] < below and squares[1] > above, squares


@pytest.mark.parametrize("momentum", [0.0, 0.5])
def test_gasloc_without_drift_has_the_same_bound(momentum):
    for factor, grows in ((0.95, False), (1.05, True)):
        x = torch.randn(64, 4, dtype=torch.float64, generator=rng(0, "first"))
        first, last = spread(x), x
        for round in range(1, 501):
            mean = means_of(x, groups(range(64), 2, 0, round))
            moved = mixed([x], [mean], [last], factor * largest_pull(momentum, 2, 64), momentum)[0]
            x, last = moved, x
        assert bool(spread(x) > first * 1e3) == grows and bool(spread(x) < first / 1e3) != grows


@pytest.mark.parametrize("momentum", [0.0, 0.5, 0.9])
def test_gasloc_in_one_group_of_all_contracts_just_below_the_bound_and_parts_just_above(momentum):
    """Nobody meets by chance there, so the bound is exact for any number of replicas."""
    limit = largest_pull(momentum, float("inf"))
    assert limit == pytest.approx(2 * (1 + momentum)) and limit == pytest.approx(largest_pull(momentum, 5, 5))
    for factor, grows in ((0.99, False), (1.01, True)):
        x = torch.randn(5, 4, dtype=torch.float64, generator=rng(0, "first"))
        first, last = spread(x), x
        for _ in range(1000):
            moved = mixed([x], [x.mean(0).expand_as(x)], [last], factor * limit, momentum)[0]
            x, last = moved, x
        assert bool(spread(x) > first * 1e3) == grows and bool(spread(x) < first / 1e3) != grows


@pytest.mark.parametrize(
    ("num", "size", "alpha", "beta", "gamma", "expected"),
    [
        (64, 2, 0.5, 0.7, 0.7, 1.11),
        (16, 2, 0.5, 0.7, 0.7, 1.02),
        (64, 2, 0.3, 0.7, 0.7, 0.88),
        (64, 2, 0.0, 0.7, 0.7, 0.72),
        (64, 4, 0.5, 0.7, 0.7, 0.57),
    ],
)
def test_stationary_disagreement(num, size, alpha, beta, gamma, expected):
    """Published in the method's notes: each round's inner steps move every replica by noise of standard deviation 1."""
    x, generator = torch.zeros(num, 64, dtype=torch.float64), rng(0, "noise")
    d, squares = torch.zeros_like(x), []
    for round in range(1, 301):
        parts = groups(range(num), size, 0, round)
        delta = torch.randn(x.shape, dtype=torch.float64, generator=generator)
        outer_step([x], [d], alpha, [(beta, [means_of(delta, parts)]), (gamma, [means_of(x, parts) - x])])
        if round > 60:
            squares.append(spread(x).square())
    assert torch.stack(squares).mean().sqrt() == pytest.approx(expected, abs=0.01)


# ---- averages within groups -----------------------------------------------------------------------------------------

LIKE = [(3, 4), (5,), (2, 3)]


def brought(rank, round):
    generator = rng(7, "brought", rank, round)
    return [torch.randn(shape, generator=generator) for shape in LIKE]


def rounds_of(reducer, size, num_rounds):
    """A program: the means and the bytes sent of each round."""

    def program(comm):
        metered = MeteredComm(comm, Meter())
        state, found = reducer.init(brought(comm.rank, 0)), []
        for round in range(1, num_rounds + 1):
            before = metered.meter.bytes_sent
            xs = brought(comm.rank, round)
            means, state = group_mean(reducer, xs, state, metered, size, 1, round).result()
            found.append((means, metered.meter.bytes_sent - before))
        return found

    return program


REDUCERS = [
    Reducer(bucket_bytes=32),
    Reducer(Cast(), bucket_bytes=32),
    Reducer(Quantized(Absmax(4, block=8)), EF14()),
    Reducer(Quantized(Absmax(8, block=8)), EF21()),
    Reducer(RandomK(0.5), EF14(0.5)),
    Reducer(RandomK(0.5), EF21(dense_first=False)),
    Reducer(PowerSGD(1, min_compression=1), EF14()),
]


@pytest.mark.parametrize("reducer", REDUCERS, ids=str)
@pytest.mark.parametrize("size", [2, 3])
def test_a_group_gets_one_mean_though_others_were_its_members_before(reducer, size):
    """With five ranks somebody is left out every round, and its counters lag behind."""
    num_rounds, drawn = 6, [groups(range(5), size, 1, round) for round in range(1, 7)]
    found = run_world(5, rounds_of(reducer, size, num_rounds))
    for round, parts in enumerate(drawn, 1):
        for part in parts:
            means = [found[rank][round - 1][0] for rank in part]
            for other in means[1:]:
                assert all(map(torch.equal, means[0], other)), "members hold one mean"
            if len(part) == 1:
                assert all(map(torch.equal, means[0], brought(part[0], round))), "who is alone rounds nothing"
            elif isinstance(reducer.compressor, Identity | Cast):
                for i, mean in enumerate(means[0]):
                    exact = torch.stack([brought(rank, round)[i] for rank in part]).mean(0)
                    assert torch.allclose(mean, exact, rtol=2**-6, atol=2**-6)


def test_stateless_reducers_pay_nothing_for_new_partners_and_ef21_a_whole_average():
    sizes = sum(torch.Size(shape).numel() for shape in LIKE)
    for feedback in (NoFeedback(), EF14()):
        rounds = run_world(4, rounds_of(Reducer(feedback=feedback), 2, 4))[0]
        assert [num_bytes for _, num_bytes in rounds] == [4 * sizes] * 4
    for num_ranks in (2, 4):
        rounds = run_world(num_ranks, rounds_of(Reducer(feedback=EF21()), 2, 4))[0]
        mine = [next(p for p in groups(range(num_ranks), 2, 1, r) if 0 in p) for r in range(1, 5)]
        changed = [False, *(a != b for a, b in pairwise(mine))]
        # the average and one number more, which says whether a member is fresh
        assert [num_bytes for _, num_bytes in rounds] == [4 * sizes + (4 * sizes + 4) * new for new in changed]
        assert any(changed) == (num_ranks > 2)


def test_disagreement_is_the_root_mean_square_distance_to_the_mean():
    found = run_world(3, lambda comm: disagreement(brought(comm.rank, 0), comm))
    stacked = torch.stack([torch.cat([x.reshape(-1) for x in brought(rank, 0)]) for rank in range(3)]).double()
    assert all(x == pytest.approx(float(spread(stacked)), rel=1e-12) for x in found)
    assert disagreement(brought(0, 0), SoloComm()) == 0
    assert max(run_world(4, lambda comm: disagreement(brought(0, 0), comm))) == 0


def first_error(reducer):
    """The share of parameters' energy that a first round gets wrong."""
    x = torch.randn(48, 64, generator=rng(0, "parameters"))
    (mean,), _ = reducer.mean([x], reducer.init([x]), SoloComm()).result()
    return float((mean - x).square().sum() / x.square().sum())


@pytest.mark.parametrize("compressor", [*all_compressors(), Hierarchical(1, outer=TopK()), DCT(RandomK(0.5))], ids=str)
def test_what_averages_parameters_themselves_refuses_reducers_that_leave_some_out(compressor):
    for feedback in (NoFeedback(), *all_feedbacks()):
        try:
            reducer = Reducer(compressor, feedback)
        except ValueError:
            continue
        makers = [lambda: NoLoCo(reducer=reducer), lambda: GASLoC(reducer=reducer)]  # noqa: B023
        makers.append(lambda: NoLoCo(gamma=0.5, anchors=reducer))  # noqa: B023
        begins_whole = feedback.keeps_mean and feedback.is_dense(feedback.init(torch.zeros(1)))
        if begins_whole or compressor.keeps_values():
            assert first_error(reducer) < 0.5
            for make in makers:
                make()
        else:
            for make in makers:
                with pytest.raises(
                    ValueError, match="leaves out a part, with .*: what is not sent would become 0; take"
                ):
                    make()
        NoLoCo(gamma=0.5, reducer=reducer)  # sends deltas


def test_the_remedy_is_in_the_message():
    sparse = Reducer(TopK(0.1), EF14())
    with pytest.raises(ValueError, match=r"EF21\(\) as feedback; or give gamma a number, and deltas are sent"):
        NoLoCo(reducer=sparse)
    assert first_error(sparse) > 0.3
