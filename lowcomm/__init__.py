"""lowcomm trains models across machines joined by slow, uneven, unreliable links."""

from lowcomm.algorithms.base import Algorithm
from lowcomm.algorithms.data_parallel import DataParallel
from lowcomm.algorithms.diloco import DiLoCo
from lowcomm.algorithms.local_sgd import LocalSGD
from lowcomm.algorithms.participation import DroppedRounds
from lowcomm.attach import Sync, attach
from lowcomm.comm.base import Comm, Late, PeerLost, Task, Work
from lowcomm.comm.distributed import DistributedComm, connect, disconnect
from lowcomm.comm.metered import Meter, MeteredComm
from lowcomm.comm.solo import SoloComm
from lowcomm.compress.cast import Cast
from lowcomm.compress.identity import Identity
from lowcomm.engine.base import Engine
from lowcomm.engine.torch_engine import TorchEngine
from lowcomm.feedback.none import NoFeedback
from lowcomm.hooks import DDPHook, FSDPHook, ddp_hook, fsdp_hook
from lowcomm.outer.nesterov import Nesterov
from lowcomm.outer.sgd import SGD
from lowcomm.reduce import Reducer

__version__ = "0.1.0"

__all__ = [
    "SGD",
    "Algorithm",
    "Cast",
    "Comm",
    "DDPHook",
    "DataParallel",
    "DiLoCo",
    "DistributedComm",
    "DroppedRounds",
    "Engine",
    "FSDPHook",
    "Identity",
    "Late",
    "LocalSGD",
    "Meter",
    "MeteredComm",
    "Nesterov",
    "NoFeedback",
    "PeerLost",
    "Reducer",
    "SoloComm",
    "Sync",
    "Task",
    "TorchEngine",
    "Work",
    "attach",
    "connect",
    "ddp_hook",
    "disconnect",
    "fsdp_hook",
]
