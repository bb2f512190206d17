"""How parameters are cut into fragments, and when each has its turn."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lowcomm.models.llama import Llama
from lowcomm.rounds.fragments import cut, offsets

DEEP = ["embed.weight", *(f"layers.{i}.{part}" for i in range(7) for part in ("a.0.weight", "b")), "head.weight"]


def blocks_of(fragment):
    return sorted({int(DEEP[i].split(".")[1]) for i in fragment})


def test_strided_fragments_spread_over_the_depth():
    *fragments, others = cut(DEEP, 3, "strided")
    assert [blocks_of(f) for f in fragments] == [[0, 3, 6], [1, 4], [2, 5]]
    assert [DEEP[i] for i in others] == ["embed.weight", "head.weight"]


def test_sequential_fragments_are_neighbours():
    *fragments, others = cut(DEEP, 3, "sequential")
    assert [blocks_of(f) for f in fragments] == [[0, 1, 2], [3, 4, 5], [6]]
    assert [DEEP[i] for i in others] == ["embed.weight", "head.weight"]


def test_blocks_are_counted_by_their_numbers_wherever_they_stand():
    names = ["layers.2.weight", "layers.0.weight", "layers.10.weight", "layers.1.weight"]
    assert cut(names, 2, "sequential") == [[1, 3], [0, 2]]
    assert cut(names, 2, "strided") == [[0, 1], [2, 3]]


def test_one_fragment_holds_everything():
    assert cut(DEEP, None, "strided") == [list(range(len(DEEP)))]
    assert cut(["weight", "bias"], 1, "strided") == [[0, 1]], "no blocks"
    assert cut(["3.weight", "0.weight"], 2, "strided") == [[0, 1]], "nothing but blocks"


@given(
    st.lists(st.sampled_from(["embed", "norm.weight", *(f"h.{i}.w" for i in range(12))]), min_size=1),
    st.integers(1, 20) | st.none(),
    st.sampled_from(["strided", "sequential"]),
)
def test_every_parameter_is_in_exactly_one_fragment(names, blocks_per_fragment, pattern):
    fragments = cut(names, blocks_per_fragment, pattern)
    assert sorted(i for fragment in fragments for i in fragment) == list(range(len(names)))
    assert all(fragment == sorted(fragment) != [] for fragment in fragments)


def test_a_real_model_has_a_fragment_of_three_layers_and_one_of_the_rest():
    names = [name for name, _ in Llama(size="1m").construct(256).named_parameters()]
    fragments = cut(names, 3, "strided")
    assert [len(f) for f in fragments] == [3 * 9, 2 * 9, 3]
    assert {names[i] for i in fragments[-1]} == {"model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"}


@pytest.mark.parametrize(("num_layers", "between"), [(24, 11), (48, 5), (108, 2)])
def test_the_published_steps_between_syncs(num_layers, between):
    """With H = 100 and three layers a fragment, the embeddings a further one."""
    names = ["embed", *(f"layers.{i}" for i in range(num_layers))]
    first, second, *_ = offsets(len(cut(names, 3, "strided")), 100)
    assert (first, second) == (0, between)


def test_offsets_are_spread_evenly_over_a_round():
    assert offsets(2, 100) == [0, 50]
    assert offsets(3, 10) == [0, 3, 6]
    assert offsets(3, 11) == [0, 3, 7], "the rest of the division is spread too"
    assert offsets(4, 1) == [0, 0, 0, 0]
