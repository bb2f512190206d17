"""Runs a command on N rate-limited hosts of one Linux machine, as torchrun would on N machines.

    launch/slow_network --hosts 4 --rate 10 -- lowcomm train --config run.yaml --out runs/slow
    launch/slow_network --hosts 2 --up 20 --down 100 -- python3 own_loop.py
    launch/slow_network --clean

Every host is a network namespace with one interface, eth0, on a veth pair to a bridge in a further namespace, the
switch. Nothing else of the machine is touched, and the hosts see nothing but each other. A token bucket (tc tbf) at
either end of a pair limits what its host sends (up) and receives (down). Rates are of Ethernet frames: of a full one
of 1,514 bytes TCP leaves 1,448 for the payload, 95.6 %. Links have no delay but that of their queues.

The command runs once on each host, with the variables that torchrun would set. Its output is passed on with the rank
before each line. The exit code is the largest of the ranks', where death by signal s counts as 128 + s; ranks that were
stopped because another had failed do not count. 124 says that the time limit was over, 128 + s that signal s stopped
this program, 2 that nothing was started, and 1 also that the hosts could not be made.

Needs root and iproute2 (ip, tc); no Python packages.
"""

from __future__ import annotations

import argparse
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

# Namespaces are called PREFIX-<process id>-<its start, in clock ticks>-<host>: both numbers tell a run that lives from
# one that is dead, even after the process id was given to another program.
PREFIX = "lowcomm-net"
MAX_HOSTS = 1023  # ports of a Linux bridge
SUBNET = "10.77"  # seen by nobody else
MASTER_PORT = 29500  # free: no host runs anything else

# What a bucket holds passes at once after a pause. So much of it that a processor that comes late to refill it loses
# nothing, so little that it does not matter beside a message; at least two frames.
BURST_S = 1e-3
MIN_BURST_BYTES = 4096
# How long a frame may queue before it is dropped: long enough that a few hosts that send to one at once lose none.
QUEUE_S = 0.4
# Of TCP, whatever the machine's default, so that times can be compared between machines: every kernel has reno. It also
# was the steadiest: a ring of 4 hosts at 10 Mbit/s got 9.3 to 9.4 of it, with bbr 7.5 to 9.8, with cubic 7.5 to 10.6.
CONGESTION_CONTROL = "reno"

SECONDS_TO_STOP = 5.0  # between SIGTERM and SIGKILL
POLL_S = 0.05


@dataclass(frozen=True)
class Network:
    """Hosts on a switch.

    Attributes:
        run: how the names of all its namespaces begin.
        num_hosts: from 2 to `MAX_HOSTS`.
        up_bits_per_s, down_bits_per_s: of each host.
    """

    run: str
    num_hosts: int
    up_bits_per_s: float
    down_bits_per_s: float

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
        in_switch = ["ip", "-n", self.switch]
        yield ["ip", "netns", "add", self.switch]
        yield [*in_switch, "link", "add", "bridge", "type", "bridge"]
        yield [*in_switch, "link", "set", "bridge", "up"]
        for rank in range(self.num_hosts):
            host, port = self.host(rank), f"port{rank}"
            in_host = ["ip", "-n", host]
            yield ["ip", "netns", "add", host]
            yield [*in_switch, "link", "add", port, "type", "veth", "peer", "name", "eth0", "netns", host]
            yield ["tc", "-n", host, *limit("eth0", self.up_bits_per_s)]
            yield ["tc", "-n", self.switch, *limit(port, self.down_bits_per_s)]
            yield [*in_switch, "link", "set", port, "master", "bridge", "up"]
            yield [*in_host, "address", "add", f"{self.address(rank)}/32", "dev", "eth0"]
            yield [*in_host, "link", "set", "lo", "up"]
            yield [*in_host, "link", "set", "eth0", "up"]
            yield [*in_host, "route", "add", f"{SUBNET}.0.0/16", "dev", "eth0", "congctl", CONGESTION_CONTROL]

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


def limit(device: str, bits_per_s: float) -> list[str]:
    """The arguments of tc that limit what leaves through a device."""
    burst_bytes = max(MIN_BURST_BYTES, round(bits_per_s / 8 * BURST_S))
    bucket = ["rate", f"{round(bits_per_s)}bit", "burst", f"{burst_bytes}b", "latency", f"{QUEUE_S * 1e3:g}ms"]
    return ["qdisc", "add", "dev", device, "root", "tbf", *bucket]


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
            "and sch_tbf"
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


def clean() -> None:
    """Remove what dead runs left."""
    found = (re.match(rf"{PREFIX}-(\d+)-(\d+)", name) for name in namespaces(PREFIX))
    runs = {match[0]: started(int(match[1])) == match[2] for match in found if match}  # whether it lives, by run
    dead = sorted(run for run, lives in runs.items() if not lives)
    for run in dead:
        print(f"removed {', '.join(remove(run))}")
    print(f"slow_network: {len(dead)} dead runs removed, {len(runs) - len(dead)} live ones left alone")


class Signals:
    """Remembers a signal that asks this program to stop, so that nothing is left half done.

    Attributes:
        received: its number; 0 while there is none.
    """

    def __init__(self) -> None:
        self.received = 0

    def listen(self) -> None:
        """From now on; until then signals do what they always do."""
        for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(signum, self._note)

    def _note(self, signum: int, frame: Any) -> None:
        self.received = self.received or signum

    def broken_pipe(self) -> None:
        """Nobody reads our output any more: stop as if SIGPIPE had come, which Python ignores."""
        self._note(signal.SIGPIPE, None)


class Ranks:
    """The command's processes, one on each host."""

    def __init__(self, network: Network, command: Sequence[str], signals: Signals) -> None:
        self._network, self._signals = network, signals
        self._processes: list[subprocess.Popen[bytes]] = []
        self._readers: list[threading.Thread] = []
        writing = threading.Lock()
        for rank in range(network.num_hosts):
            process = subprocess.Popen(
                ["ip", "netns", "exec", network.host(rank), *command],
                env=os.environ | network.environment(rank),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                start_new_session=True,  # the terminal's Ctrl-C is for this program, which passes it on
            )
            self._processes.append(process)
            assert process.stdout is not None and process.stderr is not None
            for pipe, to in [(process.stdout, 1), (process.stderr, 2)]:
                reader = threading.Thread(target=self._pass_on, args=(pipe, rank, to, writing), daemon=True)
                reader.start()
                self._readers.append(reader)

    def codes(self) -> list[int]:
        """Exit codes of those that have ended."""
        found = [code for code in (process.poll() for process in self._processes) if code is not None]
        return [128 - code if code < 0 else code for code in found]

    def running(self) -> bool:
        """Whether any has not ended."""
        return len(self.codes()) < len(self._processes)

    def stop(self) -> None:
        """End them all, and what they started: SIGTERM, then SIGKILL."""
        deadline_s = time.monotonic() + SECONDS_TO_STOP
        kill(self._network.run, signal.SIGTERM)
        while self.running() and time.monotonic() < deadline_s:
            time.sleep(POLL_S)
        while kill(self._network.run, signal.SIGKILL) or self.running():
            time.sleep(POLL_S)
        for reader in self._readers:
            reader.join()

    def _pass_on(self, pipe: IO[bytes], rank: int, to: int, writing: threading.Lock) -> None:
        for line in pipe:
            text = f"[{rank}] ".encode() + line.removesuffix(b"\n") + b"\n"
            with writing:
                try:
                    while text:
                        text = text[os.write(to, text) :]
                except BrokenPipeError:
                    self._signals.broken_pipe()  # and read on: a rank must not block on its way out


def run(network: Network, command: Sequence[str], time_limit_s: float, grace_s: float, signals: Signals) -> int:
    """Bring the network up, run the command on every host, take all down again; the exit code."""
    try:
        for words in network.commands():
            ip(*words)
        ranks = Ranks(network, command, signals)
        try:
            return wait(ranks, time_limit_s, grace_s, signals)
        finally:
            ranks.stop()
    finally:
        remove(network.run)


def wait(ranks: Ranks, time_limit_s: float, grace_s: float, signals: Signals) -> int:
    """Until all ranks have ended, or there is a reason to stop the others; the exit code."""
    deadline_s = time.monotonic() + time_limit_s
    failed_s = math.inf
    while ranks.running():
        now_s = time.monotonic()
        if signals.received:
            return 128 + signals.received
        if now_s > deadline_s:
            say(f"the time limit of {time_limit_s:g} s is over; the ranks are stopped")
            return 124
        failed_s = min(failed_s, now_s) if any(ranks.codes()) else failed_s
        if now_s > failed_s + grace_s:
            say(f"a rank failed and others still run after {grace_s:g} s; they are stopped")
            break
        time.sleep(POLL_S)
    return max(ranks.codes())


def say(text: str) -> None:
    """A line of this program's own."""
    print(f"slow_network: {text}", file=sys.stderr, flush=True)


def require(command: Sequence[str]) -> None:
    """Check that the machine can do it.

    Raises:
        ValueError: saying what is missing.
    """
    missing = [tool for tool in ("ip", "tc") if shutil.which(tool) is None]
    if missing:
        raise ValueError(f"{' and '.join(missing)} cannot be found; install iproute2 (Linux only)")
    if os.geteuid() != 0:
        raise ValueError(f"user {os.geteuid()} may not make network namespaces; run this as root (sudo)")
    if command and shutil.which(command[0]) is None:
        raise ValueError(f"the command {command[0]!r} cannot be found; give its path, or a name on root's PATH")


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The flags; all from the first word that is no flag is the command."""
    flags = argparse.ArgumentParser(
        prog="slow_network", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    flags.add_argument("--hosts", type=int, help="how many")
    flags.add_argument("--rate", type=float, help="Mbit/s of each host, both ways")
    flags.add_argument("--up", type=float, help="Mbit/s that each host sends; --rate by default")
    flags.add_argument("--down", type=float, help="Mbit/s that each host receives; --rate by default")
    flags.add_argument("--time_limit_s", type=float, default=math.inf, help="until the ranks are stopped; no limit")
    flags.add_argument("--grace_s", type=float, default=10.0, help="that ranks have to end after one failed; inf: all")
    flags.add_argument("--clean", action="store_true", help="remove what dead runs left, and do nothing else")
    flags.add_argument("command", nargs=argparse.REMAINDER, help="and its arguments, after --")
    given = flags.parse_args(argv)
    given.command = given.command[given.command[:1] == ["--"] :]
    return given


def main(argv: Sequence[str]) -> int:
    """Do what the flags say; the exit code."""
    given = parse(argv)
    try:
        if given.clean:
            require([])
            clean()
            return 0
        up, down = (given.rate if rate is None else rate for rate in (given.up, given.down))
        if given.hosts is None or up is None or down is None:
            raise ValueError("the network is not described; give --hosts N and --rate MBITS (or both --up and --down)")
        if not given.command:
            raise ValueError("there is no command; give one after --, such as -- lowcomm train --config run.yaml")
        if not (given.time_limit_s > 0 and given.grace_s >= 0):
            raise ValueError(
                f"--time_limit_s {given.time_limit_s:g} must be positive, --grace_s {given.grace_s:g} at least 0"
            )
        network = Network(f"{PREFIX}-{os.getpid()}-{started(os.getpid())}", given.hosts, up * 1e6, down * 1e6)
        require(given.command)
        signals = Signals()
        signals.listen()
        return run(network, given.command, given.time_limit_s, given.grace_s, signals)
    except (ValueError, RuntimeError) as error:
        say(f"error: {error}")
        return 2 if isinstance(error, ValueError) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
