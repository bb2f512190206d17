"""What a coordinator costs with many members, and that no message crashes it.

    python -m benchmarks.coordinator --seconds 10 --num_fuzzed 100000

A coordinator in a process of its own; this process plays the members over plain sockets. Its share of a core is its CPU
time, user and system, over the wall-clock time. Loads, each of `--num_members` at 10 decisions a second:

- everyone: all arrive for each round, so 10 arrivals a second of each;
- tenth: a hundredth arrives 10 times a second and the others once a second, so that a round has about a tenth of them.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks.record import ROOT, parser, table, write_record
from lowcomm.coordinator.messages import Arrive, Ended, Join, Leave, encode
from lowcomm.participation.base import Measured

SERVE = """
import sys
from lowcomm.coordinator.server import serve
from lowcomm.coordinator.settings import Serving
from lowcomm.participation.rules import All, FirstK
rule = {"everyone": All(), "tenth": FirstK(int(sys.argv[2]))}[sys.argv[1]]
serve(Serving(rule, port=0, state=sys.argv[3], num_replicas=int(sys.argv[4]), dead_after_s=60))
"""
ROUND_S = 0.1
HELLO = (
    b"GET /rank HTTP/1.1\r\nHost: 127.0.0.1\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
    b"Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\nSec-WebSocket-Version: 13\r\n\r\n"
)
TEXT, BINARY, CLOSE, PING, PONG = 1, 2, 8, 9, 10


def frame(payload: bytes, opcode: int = TEXT) -> bytes:
    """A WebSocket frame of a client, whose mask is of zeros."""
    size = len(payload)
    head = bytes([0x80 | size]) if size < 126 else b"\xfe" + size.to_bytes(2, "big")
    return (
        bytes([0x80 | opcode]) + (head if size < 65536 else b"\xff" + size.to_bytes(8, "big")) + b"\0\0\0\0" + payload
    )


class Member(asyncio.Protocol):
    """A replica that works for a fixed time, and counts the rounds that it is told of."""

    def __init__(self, replica: int, work_s: float, latencies_s: list[float]) -> None:
        self.replica, self.work_s, self.latencies_s = replica, work_s, latencies_s
        self.round = self.epoch = self.num_arrivals = 0
        self._unread, self._is_open, self._arrived_s = b"", False, 0.0
        self._due_s = 0.0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport
        self.transport.write(HELLO)

    def data_received(self, data: bytes) -> None:
        self._unread += data
        if not self._is_open:
            head, end, self._unread = self._unread.partition(b"\r\n\r\n")
            if not end:
                self._unread = head
                return
            self._is_open = True
            joining = Join(self.replica, f"process {self.replica}", 0, 0, {"config": "same"}, "simulated", False)
            self._write(encode(joining).encode())
        while len(self._unread) >= 2:
            size, start = self._unread[1], 2
            if size >= 126:
                start = 4 if size == 126 else 10
                size = int.from_bytes(self._unread[2:start], "big")
            if len(self._unread) < start + size:
                return
            opcode, payload = self._unread[0] & 15, self._unread[start : start + size]
            self._unread = self._unread[start + size :]
            self._hear(opcode, payload)

    def _hear(self, opcode: int, payload: bytes) -> None:
        if opcode == PING:
            self._write(payload, PONG)
        elif opcode == TEXT:
            start, _, _ = payload.partition(b',"members"')
            said = json.loads(start.rstrip(b"}") + b"}")
            assert said["kind"] in ("Welcome", "View", "Lost"), said
            if said["kind"] == "Welcome":
                self.epoch = said["epoch"]
                self._due_s = self.latest_s() + self.work_s
                asyncio.get_running_loop().call_at(self._due_s, self._arrive)
            elif said["kind"] == "View":
                self.round, self.epoch = said["round"], said["epoch"]
                self.latencies_s.append(time.monotonic() - self._arrived_s)
                self._due_s = max(self._due_s + self.work_s, self.latest_s())
                asyncio.get_running_loop().call_at(self._due_s, self._arrive)

    def latest_s(self) -> float:
        """The newest multiple of a round's time, so that all arrive in step, as after an exchange."""
        return time.monotonic() // ROUND_S * ROUND_S

    def _arrive(self) -> None:
        self.num_arrivals += 1
        self._arrived_s = time.monotonic()
        said = Arrive(
            *(f"process {self.replica}", self.epoch, self.round, self.round, self.num_arrivals),
            *(1000.0 * self.num_arrivals, self.work_s, None, 0, (), Ended(self.round, 0.01, 0.02, 1000, 2.0)),
        )
        self._write(encode(said).encode())

    def _write(self, payload: bytes, opcode: int = TEXT) -> None:
        self.transport.write(frame(payload, opcode))


class Process:
    """A coordinator of its own state."""

    def __init__(self, load: str, num_members: int, first_k: int) -> None:
        folder = Path(tempfile.mkdtemp())
        self.errors = (folder / "errors").open("w+")
        argv = [sys.executable, "-c", SERVE, load, str(first_k), str(folder / "state.json"), str(num_members)]
        self.process = subprocess.Popen(argv, cwd=ROOT, stdout=subprocess.PIPE, stderr=self.errors, text=True)
        assert self.process.stdout is not None
        self.port = int(self.process.stdout.readline().split("127.0.0.1:")[1].split(",")[0])

    def cpu_s(self) -> float:
        """User and system time so far."""
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(") ")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def rss_bytes(self) -> int:
        """Memory that it holds."""
        return int(Path(f"/proc/{self.process.pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    def end(self) -> str:
        """Stop it; what it wrote to its standard error."""
        assert self.process.poll() is None, "the coordinator has died"
        self.process.terminate()
        self.process.wait(10)
        self.errors.seek(0)
        return self.errors.read()


@dataclass(frozen=True)
class Row:
    """A load and what it cost."""

    load: str
    decisions_per_s: float
    arrivals_per_s: float
    members_of_a_round: float
    cores: float
    decision_ms: float
    rss_mib: float


async def measure(load: str, num_members: int, seconds: float) -> Row:
    """One load."""
    num_fast = num_members if load == "everyone" else max(1, num_members // 100)
    served = Process(load, num_members, num_fast)
    loop = asyncio.get_running_loop()
    latencies_s: list[float] = []
    members = []
    for replica in range(num_members):
        work_s = ROUND_S if replica < num_fast else 10 * ROUND_S
        _, member = await loop.create_connection(
            lambda r=replica, w=work_s: Member(r, w, latencies_s), "127.0.0.1", served.port
        )
        members.append(member)
    while members[0].round < 10:
        await asyncio.sleep(0.05)
    latencies_s.clear()
    began_s, cpu_s, first = time.monotonic(), served.cpu_s(), members[0].round
    arrived = sum(member.num_arrivals for member in members)
    await asyncio.sleep(seconds)
    took_s, num_rounds = time.monotonic() - began_s, members[0].round - first
    row = Row(
        load,
        num_rounds / took_s,
        (sum(member.num_arrivals for member in members) - arrived) / took_s,
        len(latencies_s) / num_rounds,
        (served.cpu_s() - cpu_s) / took_s,
        1e3 * statistics.median(latencies_s),
        served.rss_bytes() / 2**20,
    )
    for member in members:
        member.transport.abort()
    errors = served.end()
    assert "Traceback" not in errors, errors
    return row


def fuzzed(draw: random.Random) -> bytes:
    """Bytes for a new connection: mostly a handshake and a message that is nearly right, or nothing of the kind."""
    kind = draw.random()
    if kind < 0.05:
        return draw.randbytes(draw.randrange(1, 200))
    if kind < 0.1:
        return HELLO + draw.randbytes(draw.randrange(1, 200))
    joining = Join(draw.randrange(900, 1000), "fuzz", 0, 0, {"config": "same"}, "fuzz", False)
    arrival = Arrive("fuzz", 1, 0, 0, 1, 1.0, 1.0, Measured(1, 1.0, 1.0, 1.0), 0, (), Ended(1, 0.1, 0.2, 3, None))
    said = HELLO
    for message in draw.choices([joining, arrival, Leave("fuzz", 1, None)], k=2) if kind < 0.3 else [joining, arrival]:
        text = encode(message)
        if draw.random() < 0.8:
            fields = json.loads(text)
            fields[draw.choice(sorted(fields))] = draw.choice(ODD)
            text = json.dumps(fields)
        payload = bytearray(text.encode())
        if draw.random() < 0.3:
            for _ in range(draw.randrange(1, 6)):
                payload[draw.randrange(len(payload))] = draw.randrange(256)
        said += frame(bytes(payload), draw.choice([TEXT] * 12 + [BINARY, CLOSE, PING, PONG, 3]))
    return said + frame(b"", CLOSE)


ODD = [None, True, -1, 0, 1, 2, 2**53, 1e308, "fuzz", "", "x" * 1000, [], [0, 1], ["a"], {}, {"a": "b"}, [[[]]]]


async def fuzz(num_messages: int) -> str:
    """Send so many, each on a connection of its own, while two members go on with their rounds."""
    served = Process("everyone", 2, 2)
    loop = asyncio.get_running_loop()
    good = []
    for replica in (50, 51):  # whom no fuzzed number names
        _, member = await loop.create_connection(lambda r=replica: Member(r, ROUND_S, []), "127.0.0.1", served.port)
        good.append(member)
    draw, num_sent, began_s = random.Random(0), 0, time.monotonic()

    async def one() -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", served.port)
        writer.write(fuzzed(draw))
        with suppress(ConnectionError, TimeoutError):  # where even the close is no frame, the server waits for more
            async with asyncio.timeout(2):
                await reader.read()
        writer.transport.abort()

    while num_sent < num_messages:
        await asyncio.gather(*(one() for _ in range(50)))
        num_sent += 50
    before = good[0].round
    await asyncio.sleep(10 * ROUND_S)
    assert good[0].round > before, "the members do not get on with their rounds"
    errors = served.end()
    assert not errors, errors
    return f"{num_sent:,} messages in {time.monotonic() - began_s:.0f} s, {before:,} rounds meanwhile, no error"


def main() -> None:
    """Measure, print, and write the record."""
    flags = parser(__doc__, "coordinator")
    flags.add_argument("--num_members", type=int, default=1000)
    flags.add_argument("--seconds", type=float, default=10.0)
    flags.add_argument("--num_fuzzed", type=int, default=100_000)
    given = flags.parse_args()
    rows = []
    for load in ("tenth", "everyone"):
        rows.append(asyncio.run(measure(load, given.num_members, given.seconds)))
        print(rows[-1], flush=True)
    said = asyncio.run(fuzz(given.num_fuzzed))
    print(said)
    columns = [
        "load",
        "decisions a second",
        "arrivals a second",
        "members of a round",
        "cores",
        "ms to a decision",
        "MiB",
    ]
    cells = [[row.load, *(f"{value:.3g}" for value in list(asdict(row).values())[1:])] for row in rows]
    results = {"loads": [asdict(row) for row in rows], "fuzzed": said}
    print(write_record(given, results, f"{table(columns, cells)}\n\nFuzzed: {said}."))


if __name__ == "__main__":
    main()
