"""Averages that inner steps overlap: which messages set out when."""

import pytest
import torch

from lowcomm.comm.echo import EchoComm
from lowcomm.compress.cast import Cast
from lowcomm.compress.gathered import Gathered
from lowcomm.compress.identity import Identity
from lowcomm.compress.power_sgd import PowerSGD
from lowcomm.compress.quantized import Quantized
from lowcomm.reduce import Reducer
from lowcomm.rounds.exchanges import UnderWay
from lowcomm.tensors import digest


class Waited:
    def __init__(self, work, name, log):
        self.work, self.name, self.log = work, name, log

    def wait(self):
        self.log.append(f"wait {self.name}")
        return self.work.wait()


class Recorder(EchoComm):
    """Notes which messages set out and which are waited for."""

    def __init__(self, num_members):
        super().__init__(num_members)
        self.log, self.num = [], 0

    def issue(self, call):
        name, self.num = self.num, self.num + 1
        self.log.append(f"send {name}")
        return Waited(super().issue(call), name, self.log)


def tensors():
    return [torch.linspace(-1, 1, 64).view(8, 8) * (i + 1) for i in range(3)]


def started(compressor):
    comm, reducer = Recorder(2), Reducer(compressor, bucket_bytes=256)
    return comm, UnderWay(reducer.mean(tensors(), reducer.init(tensors()), comm))


def test_second_messages_of_all_buckets_set_out_at_once():
    comm, under_way = started(Cast())
    assert comm.log == ["send 0", "send 1", "send 2"]
    under_way.advance()
    assert comm.log[3:] == ["wait 0", "send 3", "wait 1", "send 4", "wait 2", "send 5"]
    under_way.settle()
    assert comm.log[9:] == ["wait 3", "wait 4", "wait 5"]


def test_flags_are_waited_for_last():
    comm, under_way = started(Quantized())
    first = list(comm.log)
    assert sorted(first) == ["send 0", "send 1", "send 2", "send 3"]
    under_way.advance()
    assert [x for x in comm.log[4:] if x.startswith("send")] == ["send 4", "send 5", "send 6"]
    assert {x for x in comm.log[4:] if x.startswith("wait")} == {f"wait {i}" for i in range(3)}
    under_way.settle()
    assert comm.log[-1] == "wait 3"


def test_sums_that_follow_on_each_other_are_joined():
    """PowerSGD's factors of three buckets travel as one message each time; the last advance has none to send."""
    comm, under_way = started(PowerSGD(1))
    num_first = comm.num
    under_way.advance()
    assert comm.num == num_first + 1
    under_way.advance()
    assert comm.num == num_first + 1


@pytest.mark.parametrize("compressor", [Identity(), Cast(), Quantized(), Gathered(), PowerSGD(1)], ids=str)
def test_advancing_more_or_less_often_changes_no_bit(compressor):
    results = []
    for num_advances in range(4):
        _, under_way = started(compressor)
        for _ in range(num_advances):
            under_way.advance()
        under_way.settle()
        under_way.advance()
        results.append(digest(under_way.means))
    assert len(set(results)) == 1
