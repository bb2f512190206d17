"""The time of an inner step on this machine, for `lowcomm.sim.cluster.compute.Measured`."""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median

import torch

from lowcomm.assemble import Assembled
from lowcomm.comm.echo import EchoComm
from lowcomm.comm.metered import Meter, MeteredComm

_NUM_TIMED = 5


def measured_step_s(
    build: Callable[[MeteredComm], Assembled], num_replicas: int, timer: Callable[[], float] = time.perf_counter
) -> float:
    """Seconds of one replica's inner step: the median of five, after one to warm up.

    A step is the gradients of a batch and the update, with torch's present number of threads. Reading the batch and the
    algorithm's own work do not count. The replica is thrown away and torch's random state restored, so a simulation
    goes on as if it had been told the time.

    Args:
        build: assembles the replica.
        timer: seconds since some fixed moment.
    """
    seconds = []
    with torch.random.fork_rng(devices=[]):
        replica = build(MeteredComm(EchoComm(num_replicas), Meter())).replica
        for _ in range(1 + _NUM_TIMED):
            batch = replica.stream.next().to(replica.device)
            start_s = timer()
            replica.engine.backward(batch)
            replica.engine.update()
            if replica.device.type == "cuda":
                torch.cuda.synchronize(replica.device)  # the host is done with a step long before the GPU is
            seconds.append(timer() - start_s)
    return median(seconds[1:])
