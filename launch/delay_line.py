"""Holds every packet between the hosts of a slow network for the latency of its path.

    delay_line.py DEVICE      (started by slow_network, in the namespace of its switch)

Linux can do this itself (netem), but few kernels of small machines have it. Here the switch routes what the hosts send
into a TUN device; this program reads it there, keeps it for as long as its source and destination are apart, and
writes it back, whereupon the switch routes it on to its destination. Packets keep their order on each path. The device
passes segments of up to 64 KiB whole (TSO), so that one processor carries gigabits a second.

The first line of its input is JSON: for each pair of addresses, "10.77.0.1 10.77.0.2", the seconds one way. It says
"ready" when it listens. At SIGTERM it ends and says what it did: packets, bytes, seconds of processor time, and
the latest that a packet left.
"""

from __future__ import annotations

import fcntl
import json
import os
import select
import signal
import struct
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from heapq import heappop, heappush
from typing import Any

# linux/if_tun.h
TUNSETIFF, TUNSETOFFLOAD = 0x400454CA, 0x400454D0
IFF_TUN, IFF_NO_PI, IFF_VNET_HDR = 0x0001, 0x1000, 0x4000
TUN_F_CSUM, TUN_F_TSO4 = 0x01, 0x02
# Of what is read, a virtio_net_hdr of 10 bytes and an IPv4 packet: where source and destination stand.
PATH = slice(10 + 12, 10 + 20)
MAX_BYTES = 10 + 65_535
NUM_AT_ONCE = 64


def open_device(name: str) -> int:
    """A descriptor of a TUN device that passes large segments whole."""
    device = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    fcntl.ioctl(device, TUNSETIFF, struct.pack("16sH", name.encode(), IFF_TUN | IFF_NO_PI | IFF_VNET_HDR))
    fcntl.ioctl(device, TUNSETOFFLOAD, TUN_F_CSUM | TUN_F_TSO4)
    return device


class DelayLine:
    """Packets on their way.

    Args:
        device: where they come from and go to.
        latency_s: by the eight bytes of source and destination address; what has no latency here is dropped.

    Attributes:
        num_packets, num_bytes: carried so far.
        latest_s: by how much a packet left too late at worst.
    """

    def __init__(self, device: int, latency_s: Mapping[bytes, float]) -> None:
        self.num_packets = self.num_bytes = 0
        self.latest_s = 0.0
        self._device, self._latency_s = device, latency_s
        self._held: list[tuple[float, int, bytes]] = []
        self._num_read = 0

    def turn(self) -> None:
        """Wait for the next packet to come or to be due, and carry what is there."""
        now_s = time.monotonic()
        wait_s = max(0.0, self._held[0][0] - now_s) if self._held else None
        if select.select([self._device], [], [], wait_s)[0]:
            self._take_in()
        self._let_out()

    def _take_in(self) -> None:
        for _ in range(NUM_AT_ONCE):
            try:
                packet = os.read(self._device, MAX_BYTES)
            except BlockingIOError:
                return
            latency_s = self._latency_s.get(packet[PATH])
            if latency_s is not None:
                self._num_read += 1
                heappush(self._held, (time.monotonic() + latency_s, self._num_read, packet))

    def _let_out(self) -> None:
        held, now_s = self._held, time.monotonic()
        while held and held[0][0] <= now_s:
            due_s, _, packet = heappop(held)
            self.latest_s = max(self.latest_s, now_s - due_s)
            self.num_packets += 1
            self.num_bytes += len(packet)
            with suppress(OSError):  # a host that is gone
                os.write(self._device, packet)


class Stopped(Exception):
    """SIGTERM came."""


def stop(signum: int, frame: Any) -> None:
    """The handler of SIGTERM."""
    raise Stopped


def main(name: str) -> None:
    """Carry packets of the device of this name until SIGTERM."""
    signal.signal(signal.SIGTERM, stop)
    latencies = json.loads(sys.stdin.readline())
    path = {bytes(map(int, key.replace(" ", ".").split("."))): float(x) for key, x in latencies.items()}
    line = DelayLine(open_device(name), path)
    with suppress(PermissionError):  # without this the ranks' arithmetic delays packets: `latest_s` tells
        os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1))
    print("ready", flush=True)
    start_s = time.monotonic()
    try:
        while True:
            line.turn()
    except Stopped:
        seconds = time.monotonic() - start_s
        print(
            f"{line.num_packets} packets, {line.num_bytes / 1e6:.1f} MB in {seconds:.1f} s, "
            f"{time.process_time():.2f} s of processor time, at most {line.latest_s * 1e3:.2f} ms late",
            flush=True,
        )


if __name__ == "__main__":
    main(*sys.argv[1:])
