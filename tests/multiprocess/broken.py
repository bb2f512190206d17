"""What ranks hear of others that are slow or gone, and who sent what came first; for test_broken.

Usage: torchrun --nproc_per_node=3 ... tests/multiprocess/broken.py OUT
"""

import os
import sys
import time
from pathlib import Path

import torch

import lowcomm

TIMEOUT_S = 5


def heard(call):
    """The name of what waiting raises; the call itself raises nothing."""
    work = call()
    try:
        work.wait()
    except (lowcomm.Late, lowcomm.PeerLost) as error:
        return type(error).__name__
    return "the message"


if __name__ == "__main__":
    out = Path(sys.argv[1])
    comm, x = lowcomm.connect("gloo", timeout_s=TIMEOUT_S), torch.ones(3)
    results: dict[str, object] = {}
    if comm.rank == 1:
        comm.sub((1, 2)).send(x, 2).wait()
    if comm.rank == 2:
        pair = comm.sub((1, 2))
        results["source"] = pair.recv(x).wait()[0]
        start = time.monotonic()
        results["slow"] = [heard(lambda: pair.all_sum(x)), heard(lambda: comm.sub((0, 2)).all_sum(x))]
        results["slow_s"] = time.monotonic() - start
        (out / "go on").touch()
    while not (out / "go on").exists():
        time.sleep(0.05)
    if comm.rank == 1:
        os._exit(0)
    if comm.rank == 2:
        calls = {
            "recv": lambda: comm.recv(x, 1),
            "send": lambda: comm.send(x, 1),
            "exchange": lambda: comm.exchange(x, 1),
            "all_to_all": lambda: comm.all_to_all(x.expand(3, *x.shape)),
            "broadcast": lambda: comm.broadcast(x, 1),
            "all_gather": lambda: comm.all_gather(x),
            "all_sum": lambda: comm.all_sum(x),
        }
        results["gone"] = {name: heard(call) for name, call in calls.items()}
        torch.save(results, out / "heard.pt")
    lowcomm.disconnect()
