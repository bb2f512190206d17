"""Timings that others have published, against what the simulator says.

Both tables are those of DT-FM (arXiv:2206.01288), `results/` of its tc_cluster_setting: AWS p3.2xlarge whose network tc
delayed (what each host sends, so one way) and limited; means of a few runs, in units of 2^20 bytes.
"""

from statistics import mean

import pytest

from lowcomm.sim.wire.collectives import Ring, Transfer, TwoShot
from lowcomm.sim.wire.gloo import Gloo
from lowcomm.sim.wire.links import Links, Transport
from lowcomm.sim.wire.network import Network
from tests.sim.fake_clock import FakeClock

MIB = 2**20
# one-way seconds, and bits per second
LINKS = [(0.001, 5e9), (0.005, 2e9), (0.010, 1e9), (0.050, 1e9)]
# seconds of gloo's all-reduce by MiB and number of hosts, on the second and third of these links; on the first, and
# without tc, this gloo of 2021 got no more than 4.9 Gbit/s out of the host
GLOO = {
    (128, 4): (1.517, 2.993), (128, 8): (1.814, 3.582), (128, 16): (1.950, 3.873), (128, 32): (1.992, 3.940),
    (256, 4): (2.989, 5.909), (256, 8): (3.562, 6.999), (256, 16): (3.861, 7.636), (256, 32): (4.029, 7.816),
}  # fmt: skip
# seconds over NCCL by form and MiB: a row for each of the links, a column for 4, 8 and 16 hosts
NCCL = {
    ("ring", 256): [(0.71, 0.87, 1.52), (1.77, 2.50, 4.72), (4.06, 5.14, 8.22), (7.57, 8.27, 28.63)],
    ("ring", 1024): [(3.15, 3.81, 4.88), (7.23, 8.23, 8.82), (16.87, 17.21, 18.56), (29.83, 33.46, 36.26)],
    ("sharded", 256): [(0.80, 0.87, 1.00), (2.35, 2.60, 2.88), (4.23, 5.16, 6.39), (4.77, 6.07, 7.27)],
    ("sharded", 1024): [(2.92, 3.40, 4.24), (7.58, 9.52, 10.11), (16.18, 20.17, 22.64), (18.48, 21.69, 26.76)],
    ("central", 256): [(1.09, 1.10, 1.28), (2.86, 3.29, 2.99), (5.55, 5.87, 7.41), (6.65, 7.73, 10.87)],
    ("central", 1024): [(3.88, 4.28, 4.52), (10.14, 10.66, 11.75), (14.10, 21.26, 23.41), (20.56, 23.52, 28.67)],
}
# one set for all of them; the windows are open, as the benchmark warms up
OF_NCCL = Transport(latency_factor=0.5, bandwidth_factor=0.84, window_bytes=4e6, initial_window_bytes=None)


def seconds(transfers, num_hosts, latency_s, bits_per_s, transport):
    rates, clock = [bits_per_s] * num_hosts, FakeClock()
    network = Network(clock, Links(rates, rates, lambda a, b: latency_s, transport=transport))
    for x in transfers:
        network.send(x.source, x.to, x.num_bytes, lambda: None, x.num_latencies, x.turns)
    return clock.run()


def test_gloo_takes_the_time_that_others_measured():
    errors = []
    for (size, num_hosts), row in GLOO.items():
        transfers = Gloo().transfers("all_sum", tuple(range(num_hosts)), size * MIB)
        for (latency_s, bits_per_s), measured_s in zip(LINKS[1:3], row, strict=True):
            predicted_s = seconds(transfers, num_hosts, latency_s, bits_per_s, Transport())
            errors.append(predicted_s / measured_s - 1)
    assert mean(map(abs, errors)) < 0.09 and max(map(abs, errors)) < 0.12


def chain(num_hosts, num_bytes):
    """One phase of NCCL's reduce or broadcast: through all hosts, chunk after chunk; two latencies fit, not n - 1."""
    return [Transfer(i, i + 1, num_bytes, 2) for i in range(num_hosts - 1)]


def of_form(form, num_hosts, num_bytes, *links):
    """One synchronisation."""
    if form == "central":
        return 2 * seconds(chain(num_hosts, num_bytes), num_hosts, *links)
    schedule = Ring() if form == "ring" else TwoShot()
    transfers = schedule.transfers("all_sum", tuple(range(num_hosts)), num_bytes)
    return seconds(transfers, num_hosts, *links)


@pytest.mark.parametrize("form", ["ring", "sharded", "central"])
@pytest.mark.parametrize("size", [256, 1024])
def test_nccl_takes_the_time_that_others_measured(form, size):
    # what is called a synchronisation of S there is one of S / n for each of the n hosts, one after the other
    errors = []
    for links, row in zip(LINKS, NCCL[form, size], strict=True):
        for num_hosts, measured_s in zip((4, 8, 16), row, strict=True):
            once_s = of_form(form, num_hosts, size * MIB // num_hosts, *links, OF_NCCL)
            errors.append(abs(num_hosts * once_s / measured_s - 1))
    assert mean(errors) < 0.14
