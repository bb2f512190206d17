"""Lists of tensors as vectors."""

import pytest
import torch

from lowcomm.tensors import add_, buckets, bytes_of, copy_, digest, flatten, mul_, num_bytes, unflatten, zeros

EQUAL = {
    "a column of one element": (torch.tensor([[3.0, 4.0]])[:, :1], torch.tensor([[3.0]])),
    "every second of two": (torch.tensor([3.0, 4.0])[::2], torch.tensor([3.0])),
    "turned": (torch.tensor([[1.0, 2.0], [3.0, 4.0]]).t(), torch.tensor([[1.0, 3.0], [2.0, 4.0]])),
    "nothing": (torch.ones(4, 3)[:, :0], torch.ones(4, 0)),
    "a number": (torch.tensor([1.0, 5.0])[1], torch.tensor(5.0)),
}


@pytest.mark.parametrize("case", EQUAL)
def test_bytes_do_not_depend_on_strides(case):
    strided, plain = EQUAL[case]
    assert torch.equal(bytes_of(strided), bytes_of(plain))
    assert digest([strided]) == digest([plain])


def test_a_digest_tells_shapes_dtypes_bits_and_the_cut_of_a_list_apart():
    zeros = torch.zeros(4)
    lists = [[zeros], [zeros.view(2, 2)], [zeros.int()], [-zeros], [zeros[:2], zeros[:2]], [zeros, zeros[:0]], []]
    assert len({digest(xs) for xs in lists}) == len(lists)
    digest([zeros])
    zeros.resize_(8)  # whose memory nobody else holds


@pytest.mark.parametrize(("dtype", "bucket_bytes"), [(torch.float32, 16), (torch.bfloat16, 8), (torch.float64, 32)])
def test_buckets_are_filled_to_the_last_byte(dtype, bucket_bytes):
    xs = [torch.zeros(2, dtype=dtype)] * 5
    assert num_bytes(xs[:2]) == bucket_bytes
    assert buckets(xs, bucket_bytes) == [[0, 1], [2, 3], [4]] and buckets(xs, bucket_bytes - 1) == [
        [i] for i in range(5)
    ]


def test_a_flat_vector_is_a_copy():
    x = torch.ones(2, 2)
    for tensors in ([x], [x, x]):
        flat = flatten(tensors)
        x.add_(1)
        assert torch.equal(flat, torch.full((4 * len(tensors),), x[0, 0].item() - 1))


def test_the_arithmetic_of_lists():
    xs, ys = [torch.tensor([1.0, 2.0]), torch.tensor(3.0)], [torch.tensor([10.0, 20.0]), torch.tensor(30.0)]
    add_(xs, ys, alpha=2.0)
    mul_(xs, 0.5)
    assert [x.tolist() for x in xs] == [[10.5, 21.0], 31.5]
    copy_(xs, ys)
    ys[0].zero_()
    assert [x.tolist() for x in xs] == [[10.0, 20.0], 30.0]
    none = zeros(xs)
    assert [x.tolist() for x in none] == [[0.0, 0.0], 0.0] and [x.tolist() for x in xs] == [[10.0, 20.0], 30.0]


@pytest.mark.parametrize("shapes", [[(2, 3)], [(2, 3), (), (0,), (4,)]])
def test_without_values_shapes_and_dtypes_are_those_with_them(shapes):
    def shapes_on(device):
        xs = [torch.ones(shape, dtype=torch.bfloat16, device=device) for shape in shapes]
        for change in (lambda: add_(xs, xs), lambda: mul_(xs, 2.0), lambda: copy_(xs, xs)):
            change()
        flat = flatten(xs)
        lists = [[flat], zeros(xs), unflatten(flat, xs), unflatten(flat.float(), xs)]
        return [[(x.shape, x.dtype, x.is_contiguous()) for x in found] for found in lists]

    assert shapes_on("meta") == shapes_on("cpu")
