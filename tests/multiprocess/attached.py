"""Three replicas in loops of their own, of which one kills itself before a certain call to the wire.

    python -m tests.multiprocess.attached RANK CALL FOLDER

Who ends writes what it ended with to FOLDER/RANK: how many members, and a hash of the parameters.
"""

import os
import signal
import sys
from pathlib import Path

import torch
from torch import nn

import lowcomm
from lowcomm.comm.distributed import DistributedComm
from lowcomm.tensors import digest, rng

LOST = 2


def main() -> None:
    rank, dies_at, folder = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
    issue, num_calls = DistributedComm.issue, 0

    def struck(self, call):
        nonlocal num_calls
        num_calls += 1
        if rank == LOST and num_calls == dies_at:
            os.kill(os.getpid(), signal.SIGKILL)
        return issue(self, call)

    setattr(DistributedComm, "issue", struck)  # noqa: B010  # or mypy minds
    comm = lowcomm.connect("gloo", timeout_s=60, grace_s=5)
    model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    sync = lowcomm.attach(model, optimizer, lowcomm.DiLoCo(every=3), comm, on_loss="go_on")
    for t in range(1, 14):
        x = torch.randn(32, 8, generator=rng(0, "x", rank, t))
        optimizer.zero_grad()
        nn.functional.mse_loss(model(x).squeeze(1), x.sum(1).sin()).backward()
        optimizer.step()
        sync.step()
    sync.finish()
    (folder / str(rank)).write_text(f"{len(sync.members)} {digest(list(model.parameters()))}")
    lowcomm.disconnect()


if __name__ == "__main__":
    main()
