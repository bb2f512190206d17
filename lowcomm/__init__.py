"""lowcomm trains models across machines joined by slow, uneven, unreliable links."""

from lowcomm.algorithms.base import Algorithm, step
from lowcomm.algorithms.composed import After, Then
from lowcomm.algorithms.data_parallel import DataParallel
from lowcomm.algorithms.demo import DeMo
from lowcomm.algorithms.des_loc import DESLOC
from lowcomm.algorithms.diloco import DiLoCo
from lowcomm.algorithms.eager_diloco import EagerDiLoCo
from lowcomm.algorithms.gasloc import GASLoC
from lowcomm.algorithms.local_sgd import LocalSGD
from lowcomm.algorithms.noloco import NoLoCo
from lowcomm.algorithms.savic import SAVIC
from lowcomm.algorithms.sparta import SPARTA
from lowcomm.algorithms.streaming_diloco import StreamingDiLoCo
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
from lowcomm.optim.muon_adamw import MuonAdamW
from lowcomm.optim.qhadopt import QHADOPT
from lowcomm.optim.scaled_sgd import ScaledSGD
from lowcomm.outer.nesterov import Nesterov
from lowcomm.outer.sgd import SGD
from lowcomm.reduce import Reducer
from lowcomm.rounds.participation import DroppedRounds
from lowcomm.rounds.qsr import QSR

__version__ = "0.1.0"

__all__ = [
    "DESLOC",
    "QHADOPT",
    "QSR",
    "SAVIC",
    "SGD",
    "SPARTA",
    "After",
    "Algorithm",
    "Cast",
    "Comm",
    "DDPHook",
    "DataParallel",
    "DeMo",
    "DiLoCo",
    "DistributedComm",
    "DroppedRounds",
    "EagerDiLoCo",
    "Engine",
    "FSDPHook",
    "GASLoC",
    "Identity",
    "Late",
    "LocalSGD",
    "Meter",
    "MeteredComm",
    "MuonAdamW",
    "Nesterov",
    "NoFeedback",
    "NoLoCo",
    "PeerLost",
    "Reducer",
    "ScaledSGD",
    "SoloComm",
    "StreamingDiLoCo",
    "Sync",
    "Task",
    "Then",
    "TorchEngine",
    "Work",
    "attach",
    "connect",
    "ddp_hook",
    "disconnect",
    "fsdp_hook",
    "step",
]
