"""A coordinator and ranks as processes of their own: what tests of them start.

python -m tests.multiprocess.coordinated serve STATE PORT [NUM_REPLICAS]
python -m tests.multiprocess.coordinated rank URL REPLICA NUM_ROUNDS PAUSE_S
"""

from __future__ import annotations

import sys
import time

from lowcomm.coordinator.client import Access, Coordinator
from lowcomm.coordinator.server import serve
from lowcomm.coordinator.settings import Serving
from lowcomm.participation.base import Arrival
from lowcomm.participation.meeting import View

HEARTBEAT_S, DEAD_AFTER_S = 0.25, 1.0


def rank(url: str, replica: int, num_rounds: int, pause_s: float) -> list[View]:
    """Take part in rounds until the newest is ``num_rounds``, then leave; what was decided."""
    views: list[View] = []
    seat = Coordinator(Access(url, patience_s=60), replica, {"config": "same"})
    version, step = 0, 0
    while version < num_rounds:
        step += 1
        view = seat.arrive(Arrival(replica, 0.0, version, step, 10.0 * step))
        views.append(view)
        time.sleep(pause_s)
        version = view.round
        seat.ended(version, 0.0, pause_s, 100, 1.0)
    seat.leave()
    return views


if __name__ == "__main__":
    if sys.argv[1] == "serve":
        state, port, num_replicas = sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
        given = Serving(
            port=port, state=state, num_replicas=num_replicas, heartbeat_s=HEARTBEAT_S, dead_after_s=DEAD_AFTER_S
        )
        serve(given)
    else:
        rank(sys.argv[2], int(sys.argv[3]), int(sys.argv[4]), float(sys.argv[5]))
