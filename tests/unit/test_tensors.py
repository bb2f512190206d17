"""Lists of tensors as vectors."""

import pytest
import torch

from lowcomm.tensors import bytes_of, digest

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
