"""Whatever the tensors and the buckets, every tensor comes back averaged, and alike on all ranks."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lowcomm.compress.cast import Cast
from lowcomm.compress.dct import DCT
from lowcomm.compress.hierarchical import Hierarchical
from lowcomm.compress.identity import Identity
from lowcomm.compress.power_sgd import PowerSGD
from lowcomm.compress.random_k import RandomK
from lowcomm.compress.top_k import TopK
from lowcomm.feedback.econtrol import EControl
from lowcomm.feedback.ef14 import EF14
from lowcomm.feedback.ef21 import EF21
from lowcomm.feedback.ef21_sgdm import EF21SGDM
from lowcomm.feedback.ef_bv import EFBV
from lowcomm.reduce import Reducer
from lowcomm.tensors import buckets, digest, flatten, num_bytes, rng
from tests.world import run_world

SHAPES = st.lists(st.sampled_from([(), (0,), (1,), (3,), (2, 5), (7, 1, 3), (13,), (0, 4)]), min_size=1, max_size=8)
DTYPES = st.sampled_from([torch.float32, torch.float64, torch.bfloat16])


def tensors(shapes, dtypes, seed, rank):
    generator = rng(seed, "tensors", rank)
    drawn = [torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes]
    return [x.to(dtype) for x, dtype in zip(drawn, dtypes, strict=True)]


@settings(max_examples=60)
@given(
    shapes=SHAPES,
    data=st.data(),
    bucket_bytes=st.sampled_from([1, 7, 24, 64, 100, 10_000]),
    num_ranks=st.sampled_from([1, 2, 3, 5, 8]),
    compressor=st.sampled_from([Identity(), Cast("float16"), Cast("bfloat16")]),
)
def test_every_tensor_comes_back_averaged(shapes, data, bucket_bytes, num_ranks, compressor):
    dtypes = data.draw(st.lists(DTYPES, min_size=len(shapes), max_size=len(shapes)))
    lists = [tensors(shapes, dtypes, 0, rank) for rank in range(num_ranks)]
    reducer = Reducer(compressor, bucket_bytes=bucket_bytes)

    def program(comm):
        mine, like = lists[comm.rank], [torch.zeros_like(x) for x in lists[comm.rank]]
        before = digest(mine)
        means, _ = reducer.mean(mine, reducer.init(mine), comm).result()
        assert digest(mine) == before, "the input was modified"
        values = [x.clone() for x in mine]
        made, _ = reducer.mean(like, reducer.init(like), comm, lambda places: [values[i] for i in places]).result()
        assert digest(made) == digest(means)
        return means

    results = run_world(num_ranks, program)
    for i, (shape, dtype) in enumerate(zip(shapes, dtypes, strict=True)):
        expected = torch.stack([xs[i].double() for xs in lists]).mean(0)
        coarsest = (
            torch.bfloat16 if compressor == Cast("bfloat16") else torch.float16 if compressor != Identity() else dtype
        )
        eps = max(torch.finfo(dtype).eps, torch.finfo(coarsest).eps)
        for means in results:
            assert means[i].shape == torch.Size(shape) and means[i].dtype == dtype
            assert torch.allclose(means[i].double(), expected, rtol=2 * eps, atol=8 * eps)
            assert digest([means[i]]) == digest([results[0][i]]), "ranks differ"


@given(shapes=SHAPES, data=st.data(), bucket_bytes=st.integers(1, 200))
def test_buckets_partition_and_keep_their_limit(shapes, data, bucket_bytes):
    dtypes = data.draw(st.lists(DTYPES, min_size=len(shapes), max_size=len(shapes)))
    xs = tensors(shapes, dtypes, 0, 0)
    groups = buckets(xs, bucket_bytes)
    assert sorted(i for group in groups for i in group) == list(range(len(xs)))
    for group in groups:
        assert len({xs[i].dtype for i in group}) == 1
        assert len(group) == 1 or num_bytes([xs[i] for i in group]) <= bucket_bytes


def test_stacks_of_one_shape_keep_the_limit_too():
    like = [torch.zeros(4, 5), torch.zeros(3), *[torch.zeros(4, 5)] * 4]
    for limit, num_buckets in [(80, 6), (160, 4), (400, 2)]:
        assert len(Reducer(PowerSGD(), bucket_bytes=limit).init(like).buckets) == num_buckets


def test_empty_list_and_bad_bucket_are_refused():
    with pytest.raises(ValueError, match="empty"):
        flatten([])
    with pytest.raises(ValueError, match="bucket_bytes"):
        Reducer(bucket_bytes=0)


def test_rng_depends_on_its_purpose_alone():
    def draw(*key):
        return torch.rand(4, generator=rng(*key)).tolist()

    torch.manual_seed(5)
    before = torch.get_rng_state()
    assert draw(0, "a", 1) == draw(0, "a", 1)
    others = [draw(0, "a", 2), draw(0, "b", 1), draw(1, "a", 1), draw(0, "a", "1"), draw(0, "a/int:1")]
    assert all(x != draw(0, "a", 1) for x in others)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("feedback", [EF21(), EF21SGDM(), EFBV(), EControl()], ids=lambda x: type(x).__name__)
def test_a_mean_over_those_that_sent_is_not_added_up(feedback):
    present = TopK(divide_by="present")
    islands = Hierarchical(2, present, Identity()), Hierarchical(2, Identity(), present)
    for compressor in (present, DCT(present), RandomK(0.5, present), *islands):
        with pytest.raises(ValueError, match="divide_by='all'"):
            Reducer(compressor, feedback)
        Reducer(compressor, EF14())
