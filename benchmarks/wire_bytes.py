"""Holds the byte counts of `MeteredComm` against the kernel's: what gloo really puts on the wire.

    python -m benchmarks.wire_bytes

Ranks talk over the loopback interface of a network namespace of their own, so its counter holds their traffic alone:
payloads, TCP/IP headers and acknowledgements. The script starts itself again inside of one, which needs Linux with
util-linux and iproute2, and root or permission to make user namespaces.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from multiprocessing import Manager
from pathlib import Path
from typing import Any

import torch
from torch.multiprocessing.spawn import spawn

from benchmarks.record import parser, table, write_record
from lowcomm.comm.distributed import connect, disconnect
from lowcomm.comm.metered import Meter, MeteredComm

INSIDE = "WIRE_BYTES_IN_A_NAMESPACE"


@dataclass(frozen=True)
class Row:
    """Bytes of one exchange, all ranks together.

    Attributes:
        payload_bytes: of one rank's tensor.
        metered_bytes: sent, as `MeteredComm` counts.
        kernel_bytes: seen by the loopback interface, with headers.
        ratio: kernel over metered.
    """

    op: str
    num_ranks: int
    payload_bytes: int
    metered_bytes: float
    kernel_bytes: float
    ratio: float


def exchange(op: str, comm: MeteredComm, payload_bytes: int) -> None:
    """One exchange of this many bytes on each rank; a broadcast comes from the first."""
    n = len(comm.members)
    x = torch.ones(payload_bytes // 4)
    exchanges: dict[str, Callable[[], Any]] = {
        "all_sum": lambda: comm.all_sum(x).wait(),
        "all_gather": lambda: comm.all_gather(x).wait(),
        "all_to_all": lambda: comm.all_to_all(x.view(n, -1)).wait(),
        "broadcast": lambda: comm.broadcast(x, comm.members[0]).wait(),
    }
    exchanges[op]()


def loopback_bytes() -> int:
    """Received on the loopback interface since it came up."""
    lines = Path("/proc/net/dev").read_text(encoding="ascii").splitlines()
    return next(int(line.split(":")[1].split()[0]) for line in lines if line.strip().startswith("lo:"))


def count(op: str, num_times: int, comm: MeteredComm, payload_bytes: int) -> tuple[float, float]:
    """Metered and kernel bytes of ``num_times`` exchanges, all ranks together; the latter hold one meeting, some KB."""
    meeting = comm.tagged("meeting")
    comm.meter.by_tag.clear()
    meeting.all_sum(torch.ones(1)).wait()  # what came before has arrived everywhere
    before = loopback_bytes()
    meeting.all_sum(torch.ones(1)).wait()  # nobody starts before all have looked
    for _ in range(num_times):
        exchange(op, comm, payload_bytes)
    metered = meeting.all_sum(torch.tensor(comm.meter.by_tag["sync"].bytes_sent)).wait()
    return float(metered.item()), float(loopback_bytes() - before)


def run_rank(rank: int, num_ranks: int, given: argparse.Namespace, results: Any) -> None:
    """One rank's part; rank 0 leaves the rows in ``results``."""
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(num_ranks), GLOO_SOCKET_IFNAME="lo")
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(29500 + num_ranks))
    comm = MeteredComm(connect("gloo", timeout_s=120), Meter())
    for op in given.ops:
        for payload in given.payload_bytes:
            size = payload // (4 * num_ranks) * 4 * num_ranks
            exchange(op, comm, size)  # connections are opened at first use
            metered, kernel = (total / given.times for total in count(op, given.times, comm, size))
            if rank == 0:
                results.append(Row(op, num_ranks, size, metered, kernel, kernel / metered))
    disconnect()


def main() -> None:
    """Measure in a namespace of one's own, print, record."""
    flags = parser(__doc__, "wire_bytes")
    flags.add_argument("--ranks", type=int, nargs="+", default=[2, 3, 4])
    flags.add_argument("--ops", nargs="+", default=["all_sum", "all_gather", "all_to_all", "broadcast"])
    flags.add_argument("--payload_bytes", type=int, nargs="+", default=[2**16, 2**22, 2**25])
    flags.add_argument("--times", type=int, default=10, help="exchanges that are averaged")
    given = flags.parse_args()
    if os.environ.get(INSIDE) != "1":
        enter_namespace()

    with Manager() as shared:
        found = shared.list()
        for num_ranks in given.ranks:
            spawn(run_rank, (num_ranks, given, found), num_ranks)
        rows: list[Row] = list(found)
    columns = ("op", "ranks", "payload", "metered", "kernel", "kernel / metered")
    cells = []
    for x in rows:
        counts = (f"{b:,.0f}" for b in (x.payload_bytes, x.metered_bytes, x.kernel_bytes))
        cells.append((x.op, str(x.num_ranks), *counts, f"{x.ratio:.4f}"))
    summary = (
        "Bytes of one exchange among gloo ranks on one machine, all ranks together: as `MeteredComm` counts what is "
        "sent, and as the kernel counts on a loopback interface of their own, headers and acknowledgements included "
        f"(mean of {given.times}).\n\n{table(columns, cells)}"
    )
    print(summary)
    print(f"record: {write_record(given, [asdict(row) for row in rows], summary)}")


def enter_namespace() -> None:
    """Replace this process by itself inside a network namespace whose loopback interface is up."""
    unshare = ["unshare", "-n"] if os.geteuid() == 0 else ["unshare", "-rn"]
    again = [sys.executable, "-m", "benchmarks.wire_bytes", *sys.argv[1:]]
    command = [*unshare, "sh", "-c", 'ip link set lo up && exec "$@"', "sh", *again]
    os.execvpe(command[0], command, os.environ | {INSIDE: "1"})


if __name__ == "__main__":
    main()
