"""What is peculiar to sending the largest values: which ones, how exactly, in how many bytes, divided by what."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lowcomm import SoloComm, Task
from lowcomm.tensors import digest
from tests.compressors import Absmax, Float32, Quantized, SignMagnitude, TopK
from tests.conformance.test_compressors import draw
from tests.world import run_world


def sent_by(compressor, x):
    sent, mean, _ = Task(compressor.mean(x, compressor.init(x), SoloComm())).result()
    assert torch.equal(sent, mean)
    return sent


@pytest.mark.parametrize("indices", ["packed", "elias_fano"])
@pytest.mark.parametrize(
    ("num", "chunk", "kept"), [(257, 64, 5), (64, 64, 1), (30, 64, 4), (97, None, 7), (130, 13, 2)]
)
def test_the_largest_of_each_chunk(num, chunk, kept, indices):
    x = draw("normal", (num,), 0)
    expected = torch.zeros_like(x)
    size = chunk or num
    for at in range(0, num, size):
        part = range(at, min(at + size, num))
        largest = sorted(part, key=lambda i: -abs(float(x[i])))[: -(-kept * len(part) // size)]
        expected[largest] = x[largest].float().double()
    assert torch.equal(sent_by(TopK(num=kept, chunk=chunk, indices=indices), x), expected)


@settings(max_examples=60)
@given(
    num=st.integers(0, 10_000),
    density=st.floats(1e-6, 1.0),
    chunk=st.sampled_from([None, 1, 7, 64, 4096]),
    values=st.sampled_from([Float32(), Absmax(), Absmax(4, block=2), SignMagnitude(), SignMagnitude(block=4)]),
    indices=st.sampled_from(["packed", "elias_fano"]),
)
def test_never_larger_than_the_vector(num, density, chunk, values, indices):
    compressor = TopK(density, chunk=chunk, values=values, indices=indices)
    assert compressor.num_bytes(num) <= 4 * num
    if num:
        x = draw("normal", (num,), 0)
        payload = compressor.encode(x)
        assert payload.shape == (compressor.num_bytes(num),)
        (where,), (decoded,) = compressor.decode(payload[None], num)
        assert len(where) == len(decoded) >= 1
        assert (where.diff() > 0).all() and where[0] >= 0 and where[-1] < num


@pytest.mark.parametrize("num_ranks", [1, 2, 5])
def test_divided_by_those_who_sent(num_ranks):
    """`mean` times the number of those who sent a place is the sum of what was sent; nobody's place stays zero."""
    present = TopK(0.2, chunk=16, divide_by="present")

    def program(comm):
        x = draw("heavy", (203,), comm.rank)
        return Task(present.mean(x, present.init(x), comm)).result()[:2]

    results = run_world(num_ranks, program)
    assert len({digest([mean]) for _, mean in results}) == 1
    sent = torch.stack([sent for sent, _ in results])
    count = (sent != 0).sum(0)
    assert set(count.tolist()) >= {0, 1}
    assert torch.allclose(results[0][1] * count, sent.sum(0), rtol=1e-12)
    assert (results[0][1][count == 0] == 0).all()


def test_bits_of_each_parameter():
    """Density 1/64 in chunks of 4,096, as in SparseLoCo; and what travels each way of a quantised all-reduce."""
    num = 2**20
    two_bits = TopK(1 / 64, values=SignMagnitude(), indices="elias_fano")
    assert two_bits.num_bytes(num) * 8 / num == (8 + 2 + 32 / 256) / 64 <= 0.16
    assert two_bits.num_bytes(10_000_019) * 8 / 10_000_019 <= 0.16
    packed = TopK(1 / 64, values=SignMagnitude(), indices="packed")
    assert packed.num_bytes(num) * 8 / num == pytest.approx(0.219, abs=0.0025)  # 0.219 without the magnitudes
    assert two_bits.sent_bytes([1024, 1024], 4, 8) == 7 * two_bits.num_bytes(num)
    for num_ranks in (2, 4, 16):
        each_way = Quantized(Absmax(8)).sent_bytes([10_000_019], 4, num_ranks) / 2 * num_ranks / (num_ranks - 1)
        assert 8 < each_way * 8 / 10_000_019 <= 8.2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"density": 0.0}, "density=0.0"),
        ({"chunk": 0}, "chunk=0"),
        ({"num": 0}, "num=0"),
        ({"num": 65, "chunk": 64}, "num=65"),
        ({"indices": "plain"}, "indices='plain'"),
        ({"divide_by": "most"}, "divide_by='most'"),
    ],
)
def test_mistakes_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        TopK(**options)
