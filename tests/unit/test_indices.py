"""The code of places: exact sizes, exact layouts, and back again whatever was chosen."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lowcomm.codecs.indices import INDEX_CODES, decode_indices, encode_indices, index_bytes
from lowcomm.tensors import rng


def choose(num_rows, num, kept, seed=0):
    keys = torch.rand(num_rows, num, generator=rng(seed, "places"))
    return keys.argsort(1)[:, :kept].sort(1).values


@pytest.mark.parametrize(
    ("code", "num", "kept", "bits"),
    [
        ("elias_fano", 4096, 64, 8.0),
        ("elias_fano", 4096, 128, 7.0),
        ("elias_fano", 4096, 32, 9.0),
        ("packed", 4096, 64, 12.0),
        ("packed", 1024, 16, 10.0),
        ("packed", 4097, 8, 13.0),
        ("elias_fano", 129, 8, 7.0),  # 5 * 8 + 9 bits, filled up to 7 bytes
        ("packed", 5, 5, 0.0),
        ("elias_fano", 4096, 4096, 0.0),
        ("elias_fano", 1, 1, 0.0),
        ("elias_fano", 7, 0, 0.0),
    ],
)
def test_bits_of_each_index(code, num, kept, bits):
    assert index_bytes(num, kept, code) * 8 == bits * kept
    assert encode_indices(choose(3, num, kept), num, code).shape == (3, index_bytes(num, kept, code))


@settings(max_examples=60)
@given(st.integers(1, 3), st.integers(1, 5000), st.data(), st.sampled_from(INDEX_CODES))
def test_what_was_chosen_comes_back(num_rows, num, data, code):
    kept = data.draw(st.integers(0, num))
    places = choose(num_rows, num, kept, seed=data.draw(st.integers(0, 99)))
    raw = encode_indices(places, num, code)
    assert raw.dtype == torch.uint8 and raw.shape == (num_rows, index_bytes(num, kept, code))
    assert torch.equal(decode_indices(raw, num, kept, code), places)
    if kept:
        assert index_bytes(num, kept, "elias_fano") * 8 <= kept * (2 + math.log2(num / kept)) + 8


@pytest.mark.parametrize("code", INDEX_CODES)
@pytest.mark.parametrize(("num", "kept"), [(4096, 1), (4096, 64), (1009, 300), (2**33, 3)])
def test_extremes_come_back(code, num, kept):
    """The first places and the last, whose unary parts are the shortest and the longest."""
    first = torch.arange(kept)
    places = torch.stack([first, num - kept + first])
    assert torch.equal(decode_indices(encode_indices(places, num, code), num, kept, code), places)


def test_twelve_bits_are_packed_plane_by_plane():
    first, second = 0b1010_1011_1100, 0b1101_1110_1111
    packed = encode_indices(torch.tensor([[first, second]]), 4096, "packed")[0].tolist()
    assert packed == [0b11_11_10_10, 0b11_10_11_01, 0b11_10_01_10]  # the lowest four bits of both, and so on


@pytest.mark.parametrize(("num", "kept"), [(64, 5), (100, 33), (37, 36), (4096, 64)])
def test_elias_fano_against_its_definition(num, kept):
    places = choose(1, num, kept)[0].tolist()
    low = int(math.log2(num / kept))
    bits = [(place >> i) & 1 for i in range(low) for place in places]
    rises = [0] * (kept + math.ceil(num / 2**low))
    for i, place in enumerate(places):
        rises[(place >> low) + i] = 1
    bits += rises
    expected = [sum(bit << i for i, bit in enumerate(bits[at : at + 8])) for at in range(0, len(bits), 8)]
    assert encode_indices(torch.tensor([places]), num, "elias_fano")[0].tolist() == expected
