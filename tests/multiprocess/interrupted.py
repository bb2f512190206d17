"""`lowcomm`, but one rank gets a signal at an exact moment: what a test of resuming needs.

STOP_AT="rank:where:count:signal", where `where` is "step" (as the count-th inner step of this process begins), "flush"
(at the count-th flush of a checkpoint's file), "rename" (at the count-th rename) or "call" (before the count-th call to
the wire). Without it nothing is changed.
"""

import os
import signal
import sys
from collections.abc import Callable
from typing import Any

import lowcomm.checkpoint
from lowcomm.cli import main
from lowcomm.comm.distributed import DistributedComm
from lowcomm.engine.torch_engine import TorchEngine


def strike_at(count: int, signum: int, original: Callable[..., Any]) -> Callable[..., Any]:
    """``original``, with the signal sent to this process as it is called for the count-th time."""
    calls = 0

    def struck(*args: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == count:
            os.kill(os.getpid(), signum)
        return original(*args, **options)

    return struck


if __name__ == "__main__":
    plan = os.environ.get("STOP_AT")
    if plan:
        rank, where, count, name = plan.split(":")
        if rank == os.environ["RANK"]:
            owner, attribute = {
                "step": (TorchEngine, "backward"),
                "rename": (os, "rename"),
                "call": (DistributedComm, "issue"),
                "flush": (lowcomm.checkpoint, "_flush"),
            }[where]
            struck = strike_at(int(count), signal.Signals[name], getattr(owner, attribute))
            setattr(owner, attribute, struck)
    sys.exit(main())
