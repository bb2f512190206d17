"""Runs a command on N rate-limited hosts of one Linux machine, as torchrun would on N machines.

    launch/slow_network --hosts 4 --rate 10 -- lowcomm train --config run.yaml --out runs/slow
    launch/slow_network --hosts 2 --up 20 --down 100 -- python3 own_loop.py
    launch/slow_network --hosts 4 --rate 100 --latency_ms 20 -- lowcomm train --config run.yaml --out runs/far
    launch/slow_network --clean

Hosts are namespaces (launch/hosts.py): nothing else of the machine is touched, and they see nothing but each other.
Rates are of Ethernet frames: of a full one of 1,514 bytes TCP leaves 1,448 for the payload, 95.6 %. Latencies are real:
launch/delay_line.py holds every packet. Without them links have no delay but that of their queues.

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
from collections.abc import Sequence
from typing import IO, Any

from launch.hosts import POLL_S, PREFIX, Network, ip, kill, latencies, namespaces, remove, started

SECONDS_TO_STOP = 5.0  # between SIGTERM and SIGKILL


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
    """The command's processes, one on each host, and the delay line between them."""

    def __init__(self, network: Network, command: Sequence[str], signals: Signals) -> None:
        self._network, self._signals = network, signals
        self._line = network.start_delay_line()
        self._processes: list[subprocess.Popen[bytes]] = []
        self._readers: list[threading.Thread] = []
        writing = threading.Lock()
        for rank in range(network.num_hosts):
            process = subprocess.Popen(
                ["ip", "netns", "exec", network.host(rank), *command],
                env=os.environ | network.environment(rank) | self._of_line(),
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

    def cut_off(self) -> bool:
        """Whether the delay line has ended, so that no packet arrives any more."""
        return self._line is not None and self._line_is_over()

    def _line_is_over(self) -> bool:
        return self._line is None or self._line.poll() is not None

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
        while (self.running() or not self._line_is_over()) and time.monotonic() < deadline_s:
            time.sleep(POLL_S)
        while kill(self._network.run, signal.SIGKILL) or self.running():
            time.sleep(POLL_S)
        for reader in self._readers:
            reader.join()
        if self._line is not None:
            assert self._line.stdout is not None
            say(f"the delay line carried {self._line.stdout.read().strip() or 'nothing: it was killed'}")

    def _of_line(self) -> dict[str, str]:
        """Where a benchmark on the hosts can see how busy the delay line is: its process."""
        return {} if self._line is None else {"SLOW_NETWORK_DELAY_LINE": str(self._line.pid)}

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
        if ranks.cut_off():
            say("the delay line ended before the ranks; they are stopped")
            return 1
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
    flags.add_argument(
        "--latency_ms",
        help="one way: 20 between any two; 5,10,20 of each host to the switch; 0,20;30,0 from row to column",
    )
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
        latency_s = None if given.latency_ms is None else latencies(given.latency_ms, given.hosts)
        run_name = f"{PREFIX}-{os.getpid()}-{started(os.getpid())}"
        network = Network(run_name, given.hosts, up * 1e6, down * 1e6, latency_s)
        require(given.command)
        signals = Signals()
        signals.listen()
        return run(network, given.command, given.time_limit_s, given.grace_s, signals)
    except (ValueError, RuntimeError) as error:
        say(f"error: {error}")
        return 2 if isinstance(error, ValueError) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
