"""What a meter counts beside the bytes of collectives, and what it keeps."""

import pytest
import torch

from lowcomm import Meter, MeteredComm, PeerLost
from lowcomm.comm.echo import EchoComm


def test_messages_between_two_and_rows_count_by_purpose():
    meter = Meter()
    comm = MeteredComm(EchoComm(3, rank=1), meter)
    comm.tagged("there").send(torch.ones(5), 2)
    comm.tagged("back").recv(torch.ones(7), 2)
    comm.tagged("swap").exchange(torch.ones(2), 2)
    comm.tagged("swap").exchange(torch.ones(2), 1)  # with oneself
    comm.tagged("rows").all_to_all(torch.ones(3, 10))
    comm.tagged("pair").sub((0, 1)).all_gather(torch.ones(3))
    counts = meter.state_dict()["by_tag"]
    assert counts.pop("rows") == [2 * 4 * 10, 2 * 4 * 10, 1]  # one of three stays here
    assert counts == {"there": [20, 0, 1], "back": [0, 28, 1], "swap": [8, 8, 1], "pair": [12, 12, 1]}
    again = Meter()
    again.load_state_dict(meter.state_dict())
    assert again.by_tag == meter.by_tag and (again.bytes_sent, again.bytes_received) == (120, 128)


class Slow(EchoComm):
    """Waits of a rank that is lost take two seconds each."""

    now_s = 0.0

    def now(self):
        return self.now_s

    def issue(self, call):
        return self if call.kind == "all_sum" else super().issue(call)

    def wait(self):
        self.now_s += 2.0
        raise PeerLost("gone", [1])


def test_a_wait_that_fails_has_taken_its_time():
    waits = []
    meter = Meter(on_wait=lambda *wait: waits.append(wait))
    comm = MeteredComm(Slow(2), meter).tagged("sums")
    for _ in range(2):
        with pytest.raises(PeerLost):
            comm.all_sum(torch.ones(1)).wait()
    comm.all_gather(torch.ones(1)).wait()
    assert meter.wait_s == 4.0 and waits == [("sums", 0.0, 2.0), ("sums", 2.0, 4.0)]
    again = Meter()
    again.load_state_dict(meter.state_dict())
    assert again.wait_s == 4.0
