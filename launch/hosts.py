"""Hosts of a slow network: network namespaces of one Linux machine, joined by a switch.

Every host is a network namespace with one interface, eth0, on a veth pair to a further namespace, the switch. A token
bucket (tc tbf) at either end of a pair limits what its host sends (up) and receives (down). Without latencies the
switch is a bridge. With them it is a router that sends everything through `launch/delay_line.py` once.
"""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

# Namespaces are called PREFIX-<process id>-<its start, in clock ticks>-<host>: both numbers tell a run that lives from
# one that is dead, even after the process id was given to another program.
PREFIX = "lowcomm-net"
MAX_HOSTS = 1023  # ports of a Linux bridge
SUBNET = "10.77"  # seen by nobody else
MASTER_PORT = 29500  # free: no host runs anything else

# What a bucket holds passes at once after a pause. So much of it that a processor that comes late to refill it loses
# nothing, so little that it does not matter beside a message; at least two frames.
BURST_S = 1e-3
DELAYED_BURST_S = 2e-3  # where there are latencies, beside which that is little
MIN_BURST_BYTES = 4096
# How long a frame may queue before it is dropped: long enough that a few hosts that send to one at once lose none.
QUEUE_S = 0.4
# Of TCP, whatever the machine's default, so that times can be compared between machines: every kernel has reno. It also
# was the steadiest: a ring of 4 hosts at 10 Mbit/s got 9.3 to 9.4 of it, with bbr 7.5 to 9.8, with cubic 7.5 to 10.6.
CONGESTION_CONTROL = "reno"
# How much TCP may hand over as one segment, which the delay line then carries whole. A bucket cuts what is longer than
# its burst, into ten times as many packets.
SEGMENT_SHARE = 0.8  # of a burst
MIN_SEGMENT_BYTES, MAX_SEGMENT_BYTES = 3_300, 65_536

GATEWAY = "10.78.0.1"  # the switch, when it routes
DELAY = "delay"  # its device through which everything goes once
TABLE = "77"  # the routes of what comes from a host

MAX_LATENCY_S = 10.0
POLL_S = 0.05


@dataclass(frozen=True)
class Network:
    """Hosts on a switch.

    Attributes:
        run: how the names of all its namespaces begin.
        num_hosts: from 2 to `MAX_HOSTS`.
        up_bits_per_s, down_bits_per_s: of each host.
        latency_s: one way, from row to column; the diagonal counts for nothing. None: no more than that of queues.
    """

    run: str
    num_hosts: int
    up_bits_per_s: float
    down_bits_per_s: float
    latency_s: Sequence[Sequence[float]] | None = None

    def __post_init__(self) -> None:
        if not 2 <= self.num_hosts <= MAX_HOSTS:
            raise ValueError(
                f"--hosts is {self.num_hosts}; a network has at least 2 hosts, and a bridge at most {MAX_HOSTS} ports"
            )
        for name, rate in [("up", self.up_bits_per_s), ("down", self.down_bits_per_s)]:
            if not (rate > 0 and math.isfinite(rate)):
                raise ValueError(
                    f"the rate {name} is {rate / 1e6:g} Mbit/s; it must be positive and finite: give --rate MBITS, or "
                    "--up and --down"
                )

    @property
    def switch(self) -> str:
        """The namespace of the bridge."""
        return f"{self.run}-switch"

    def host(self, rank: int) -> str:
        """The namespace of a host."""
        return f"{self.run}-{rank}"

    def address(self, rank: int) -> str:
        """Of a host's eth0."""
        high, low = divmod(rank + 1, 256)
        return f"{SUBNET}.{high}.{low}"

    def commands(self) -> Iterator[list[str]]:
        """What brings it up."""
        yield ["ip", "netns", "add", self.switch]
        yield from self._bridge() if self.latency_s is None else self._router()
        burst_s = BURST_S if self.latency_s is None else DELAYED_BURST_S
        for rank in range(self.num_hosts):
            host, port = self.host(rank), f"port{rank}"
            in_host, in_switch = ["ip", "-n", host], ["ip", "-n", self.switch]
            yield ["ip", "netns", "add", host]
            yield [*in_switch, "link", "add", port, "type", "veth", "peer", "name", "eth0", "netns", host]
            yield ["tc", "-n", host, *limit("eth0", self.up_bits_per_s, burst_s)]
            yield ["tc", "-n", self.switch, *limit(port, self.down_bits_per_s, burst_s)]
            yield [*in_host, "address", "add", f"{self.address(rank)}/32", "dev", "eth0"]
            yield [*in_host, "link", "set", "lo", "up"]
            yield [*in_host, "link", "set", "eth0", "up"]
            if self.latency_s is None:
                yield [*in_switch, "link", "set", port, "master", "bridge", "up"]
                way: list[str] = []
            else:
                yield [*in_host, "link", "set", "eth0", "gso_max_size", str(segment_bytes(self.up_bits_per_s))]
                yield [*in_switch, "link", "set", port, "gso_max_size", str(segment_bytes(self.down_bits_per_s)), "up"]
                yield [*in_switch, "address", "add", f"{GATEWAY}/32", "dev", port]
                yield [*in_switch, "route", "add", f"{self.address(rank)}/32", "dev", port]
                way = ["via", GATEWAY, "onlink"]
            yield [*in_host, "route", "add", f"{SUBNET}.0.0/16", *way, "dev", "eth0", "congctl", CONGESTION_CONTROL]

    def _bridge(self) -> Iterator[list[str]]:
        in_switch = ["ip", "-n", self.switch]
        yield [*in_switch, "link", "add", "bridge", "type", "bridge"]
        yield [*in_switch, "link", "set", "bridge", "up"]

    def _router(self) -> Iterator[list[str]]:
        """What comes from a host goes to the delay line, what comes from there to its host."""
        in_switch = ["ip", "-n", self.switch]
        filters = [f"net.ipv4.conf.{which}.rp_filter=0" for which in ("all", "default")]  # packets come by another way
        redirects = [f"net.ipv4.conf.{which}.send_redirects=0" for which in ("all", "default")]
        settings = ["net.ipv4.ip_forward=1", *filters, *redirects]
        yield ["ip", "netns", "exec", self.switch, "sysctl", "-q", "-w", *settings]
        yield [*in_switch, "tuntap", "add", "dev", DELAY, "mode", "tun", "vnet_hdr"]
        yield [*in_switch, "link", "set", DELAY, "txqueuelen", "10000", "up"]
        yield [*in_switch, "rule", "add", "iif", DELAY, "lookup", "main", "priority", "10"]
        yield [*in_switch, "route", "add", "default", "dev", DELAY, "table", TABLE]
        yield [*in_switch, "rule", "add", "to", f"{SUBNET}.0.0/16", "lookup", TABLE, "priority", "11"]

    def start_delay_line(self) -> subprocess.Popen[str] | None:
        """The program that holds the packets, when there are latencies; it ends when its namespace is cleared.

        Raises:
            RuntimeError: when it cannot start.
        """
        if self.latency_s is None:
            return None
        path = {
            f"{self.address(a)} {self.address(b)}": self.latency_s[a][b]
            for a in range(self.num_hosts)
            for b in range(self.num_hosts)
            if a != b
        }
        program = [sys.executable, str(Path(__file__).with_name("delay_line.py")), DELAY]
        line = subprocess.Popen(
            ["ip", "netns", "exec", self.switch, *program],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        assert line.stdin is not None and line.stdout is not None
        with suppress(BrokenPipeError):
            line.stdin.write(json.dumps(path) + "\n")
            line.stdin.flush()
        if line.stdout.readline() != "ready\n":
            raise RuntimeError("the delay line did not start; latencies need a kernel with TUN devices (CONFIG_TUN)")
        return line

    def environment(self, rank: int) -> dict[str, str]:
        """What torchrun would set on a host."""
        return {
            "RANK": str(rank),
            "WORLD_SIZE": str(self.num_hosts),
            "LOCAL_RANK": "0",
            "LOCAL_WORLD_SIZE": "1",
            "MASTER_ADDR": self.address(0),
            "MASTER_PORT": str(MASTER_PORT),
            "GLOO_SOCKET_IFNAME": "eth0",
            "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"),
        }


def burst_bytes(bits_per_s: float, burst_s: float) -> int:
    """What a bucket of this rate holds."""
    return max(MIN_BURST_BYTES, round(bits_per_s / 8 * burst_s))


def limit(device: str, bits_per_s: float, burst_s: float) -> list[str]:
    """The arguments of tc that limit what leaves through a device."""
    burst = f"{burst_bytes(bits_per_s, burst_s)}b"
    bucket = ["rate", f"{round(bits_per_s)}bit", "burst", burst, "latency", f"{QUEUE_S * 1e3:g}ms"]
    return ["qdisc", "add", "dev", device, "root", "tbf", *bucket]


def segment_bytes(bits_per_s: float) -> int:
    """What a device of this rate takes at once before the delay line."""
    share = round(burst_bytes(bits_per_s, DELAYED_BURST_S) * SEGMENT_SHARE)
    return min(MAX_SEGMENT_BYTES, max(MIN_SEGMENT_BYTES, share))


def latencies(text: str, num_hosts: int) -> list[list[float]]:
    """Seconds from each host to each other, of one way in milliseconds.

    Args:
        text: "20": between any two; "5,10,20": from each host to the switch, so that the ways from and to it add up;
            "0,20;30,0": from each (a row) to each.

    Raises:
        ValueError: for anything else.
    """
    try:
        rows = [[float(x) / 1e3 for x in row.split(",")] for row in text.split(";")]
    except ValueError:
        rows = []
    if len(rows) == 1 and len(rows[0]) == 1:
        rows = rows * num_hosts
        rows = [row * num_hosts for row in rows]
    elif len(rows) == 1:
        rows = [[a + b for b in rows[0]] for a in rows[0]]
    if len(rows) != num_hosts or any(len(row) != num_hosts for row in rows):
        raise ValueError(
            f"--latency_ms {text!r} is neither one number, nor one for each of {num_hosts} hosts (5,10,20), nor a row "
            "for each host (0,20;30,0)"
        )
    if any(not 0 <= x <= MAX_LATENCY_S for row in rows for x in row):
        raise ValueError(f"--latency_ms {text!r}: each must be from 0 to {MAX_LATENCY_S * 1e3:g}")
    return rows


def ip(*command: str) -> str:
    """Run one command of iproute2, out of reach of the terminal's Ctrl-C; its output.

    Raises:
        RuntimeError: with what it said, when it fails.
    """
    done = subprocess.run(command, capture_output=True, text=True, start_new_session=True)
    if done.returncode:
        raise RuntimeError(
            f"`{' '.join(command)}` failed: {done.stderr.strip()}. Making namespaces and limiting rates needs the "
            "capabilities SYS_ADMIN and NET_ADMIN (in a container: a privileged one) and a kernel with veth, bridge "
            "and sch_tbf; with latencies also TUN devices and policy routing"
        )
    return done.stdout


def namespaces(run: str) -> list[str]:
    """The namespaces of a run that exist."""
    names = [line.split()[0] for line in ip("ip", "netns", "list").splitlines() if line.strip()]
    return [name for name in names if name.startswith(f"{run}-")]


def kill(run: str, signum: int) -> bool:
    """Send a signal to all processes on the hosts of a run; whether there are any."""
    found = [int(pid) for name in namespaces(run) for pid in ip("ip", "netns", "pids", name).split()]
    for pid in found:
        with suppress(ProcessLookupError):
            os.kill(pid, signum)
    return bool(found)


def remove(run: str) -> list[str]:
    """End what still runs on the hosts of a run and delete its namespaces, and all that lies in them; their names."""
    while kill(run, signal.SIGKILL):
        time.sleep(POLL_S)
    found = namespaces(run)
    for name in found:
        ip("ip", "netns", "delete", name)
    return found


def started(pid: int) -> str | None:
    """When a process started, in clock ticks since the machine did; None when it has ended."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8")
    except (FileNotFoundError, ProcessLookupError):
        return None
    fields = stat.rpartition(")")[2].split()  # after the name, which may hold anything
    return None if fields[0] in "ZX" else fields[19]
