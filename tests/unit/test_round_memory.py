"""What a round takes beyond the state that lasts, counted by tensors: at most so many times the model in float32."""

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lowcomm.codecs.absmax import Absmax
from lowcomm.codecs.e3m0 import E3M0
from lowcomm.codecs.sign_magnitude import SignMagnitude
from lowcomm.comm.echo import EchoComm
from lowcomm.compress.cast import Cast
from lowcomm.compress.gathered import Gathered
from lowcomm.compress.identity import Identity
from lowcomm.compress.power_sgd import PowerSGD
from lowcomm.compress.quantized import Quantized
from lowcomm.compress.top_k import TopK
from lowcomm.feedback.ef14 import EF14
from lowcomm.outer.nesterov import Nesterov
from lowcomm.reduce import Reducer
from lowcomm.tensors import num_bytes, rng

NUM, SIDE = 32, 128
TWO_BITS = TopK(num=64, chunk=4096, values=SignMagnitude())


class Peak(TorchDispatchMode):
    """The most bytes at a time in tensors that operations have made, those of ``kept`` aside."""

    def __init__(self, kept):
        super().__init__()
        self.most = 0
        self._kept = {x.untyped_storage()._cdata for x in kept}
        self._live = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        for x in tree_leaves(made):
            if isinstance(x, torch.Tensor) and not x.is_meta and x.untyped_storage()._cdata not in self._kept:
                storage = x.untyped_storage()
                self._live[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        self._live = {key: entry for key, entry in self._live.items() if not entry[0].expired()}
        self.most = max(self.most, sum(size for _, size in self._live.values()))
        return made


def round_of(reducer, comm):
    """Extra bytes of DiLoCo's second round, in multiples of the model."""
    params = [torch.randn(SIDE, SIDE, generator=rng(0, i)) for i in range(NUM)]
    anchor, outer = [p.clone() for p in params], Nesterov()
    state, buffers = reducer.init(anchor), outer.init(anchor)

    def values(places):
        return [anchor[i] - params[i] for i in places]

    for _ in range(2):
        for p in params:
            p.add_(0.01)
        memory = [bucket.feedback.error for bucket in state.buckets if bucket.feedback is not None]
        with Peak([*params, *anchor, *buffers.buffer, *memory]) as peak:
            means, state = reducer.mean(anchor, state, comm, values).result()
            outer.apply(anchor, means, buffers)
            torch._foreach_copy_(params, anchor)
        del means
    return peak.most / num_bytes(params)


@pytest.mark.parametrize(
    ("compressor", "most"),
    [
        *((x, 1.25) for x in (Identity(), Cast(), Quantized(Absmax(8)), Quantized(Absmax(4)), Gathered(E3M0()))),
        *((x, 2.25) for x in (TWO_BITS, PowerSGD(4))),
    ],
    ids=str,
)
@pytest.mark.parametrize("together", [1, 3], ids="{} tensors a bucket".format)
def test_without_a_memory(compressor, most, together):
    reducer = Reducer(compressor, bucket_bytes=together * 4 * SIDE**2)
    assert round_of(reducer, EchoComm(2)) <= most


@pytest.mark.parametrize(
    "compressor", [Identity(), Cast(), Quantized(Absmax(8)), Quantized(Absmax(4)), TWO_BITS, PowerSGD(4)], ids=str
)
@pytest.mark.parametrize("together", [1, 2], ids="{} tensors a bucket".format)
def test_with_one(compressor, together):
    reducer = Reducer(compressor, EF14(), bucket_bytes=together * 4 * SIDE**2)
    assert round_of(reducer, EchoComm(2)) <= 2.25
