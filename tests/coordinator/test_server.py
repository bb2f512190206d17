"""The web application: who gets in, what ranks and readers are told, and that it is on disk before."""

from __future__ import annotations

import asyncio
import base64
import json
import random
import re
from pathlib import Path
from typing import Any

import pytest

from lowcomm.coordinator import messages as m
from lowcomm.coordinator.server import Connection, Server
from lowcomm.coordinator.settings import Serving
from lowcomm.participation.meeting import View
from lowcomm.participation.rules import FirstK
from tests.coordinator.ranks import ARRIVE, JOIN, Rank, joined, served, soon

SECRET = "correct horse battery staple"


def test_rounds_are_decided(tmp_path: Path) -> None:
    async def run() -> None:
        async with served(tmp_path, num_replicas=2) as (server, client):
            ranks = [await joined(client, replica) for replica in range(2)]
            for number in range(1, 4):
                for rank in ranks:
                    await rank.arrive(number - 1, 100.0 * number)
                for rank in ranks:
                    assert await rank.hear() == View(2, number, (0, 1), (100.0,) * 2, (number - 1,) * 2)
            await ranks[1].say(m.Leave("p1", ranks[1].epoch, m.Ended(3, 0.1, 0.2, 10, 1.0)))
            await soon(lambda: server.session.meeting.present == (0,))
            await ranks[0].arrive(3, 400.0)
            assert (await ranks[0].hear()).members == (0,)

    asyncio.run(run())


def test_nothing_is_told_before_it_is_on_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told = []
    send = Server._send

    async def checked(server: Server, connection: Connection, text: str) -> None:
        kept = json.loads((tmp_path / "state.json").read_text())
        said = json.loads(text)
        if said["kind"] == "View":
            assert json.loads(kept["view"])["round"] >= said["round"]
        if said["kind"] == "Welcome":
            assert connection.member is not None
            assert kept["incarnations"][str(connection.member.replica)] == connection.member.incarnation
        told.append(said["kind"])
        await send(server, connection, text)

    monkeypatch.setattr(Server, "_send", checked)

    async def run() -> None:
        async with served(tmp_path) as (_, client):
            rank = await joined(client, 0)
            for number in range(3):
                await rank.arrive(number, 100.0 * (number + 1))
                assert (await rank.hear()).round == number + 1

    asyncio.run(run())
    assert told == ["Welcome", "View", "View", "View"]


def test_members_hear_of_the_lost_and_the_curious_of_rounds(tmp_path: Path) -> None:
    async def run() -> None:
        async with served(tmp_path, rule=FirstK(2), num_replicas=3) as (_, client):
            ranks = [await joined(client, replica, notices=replica == 2) for replica in range(3)]
            for rank in ranks[:2]:
                await rank.arrive(0)
            assert (await ranks[0].hear()).members == (0, 1)
            assert isinstance(await ranks[1].hear(), View)
            assert (await ranks[2].hear()).round == 1
            await ranks[1].socket.close()
            assert await ranks[0].hear() == m.Lost(1, (1,))
            await ranks[0].arrive(0, broke=1, lost=(1,))
            assert (await ranks[0].hear()).members == (0,)

    asyncio.run(run())


def test_who_is_refused_is_told_why_and_cut_off(tmp_path: Path) -> None:
    async def run() -> None:
        async with served(tmp_path) as (server, client):
            await joined(client, 0)
            for text in ("{}", "\0", m.encode(ARRIVE), m.encode(m.Join(1, "p1", 0, 0, {}, "host", False))):
                rank = Rank(await client.ws_connect("/rank"), 1)
                await rank.socket.send_str(text)
                refused = await rank.hear()
                assert isinstance(refused, m.Refused) and refused.reason and refused.final
                assert await rank.hear() is None
            binary = Rank(await client.ws_connect("/rank"), 1)
            await binary.socket.send_bytes(m.encode(JOIN).encode())
            assert "texts" in (await binary.hear()).reason
            large = Rank(await client.ws_connect("/rank"), 1)
            await large.socket.send_str("x" * (m.MOST_BYTES + 1))
            assert await large.hear() in (None, m.Refused("messages are texts, not ERROR", True))
            await soon(lambda: len(server._connections) == 1)
            assert server.session.meeting.present == (0,)
            assert server.history.num_refused == 6

    asyncio.run(run())


def test_who_never_joins_is_cut_off(tmp_path: Path) -> None:
    async def run() -> None:
        async with served(tmp_path, heartbeat_s=0.05, dead_after_s=0.2) as (server, client):
            socket = await client.ws_connect("/rank")
            rank = await joined(client, 0)  # whose pongs keep it in
            reading = asyncio.create_task(rank.hear())
            assert (await socket.receive(5)).data is None
            await asyncio.sleep(0.3)
            assert server.session.meeting.present == (0,)
            reading.cancel()

    asyncio.run(run())


def test_no_secret_no_entry(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text(SECRET + "\n")

    def bearer(word: str) -> dict[str, str]:
        return {"Authorization": f"Bearer {word}"}

    def basic(text: str) -> dict[str, str]:
        return {"Authorization": f"Basic {base64.b64encode(text.encode()).decode()}"}

    async def run() -> None:
        async with served(tmp_path, secret_file=str(tmp_path / "secret")) as (server, client):
            for path in ("/", "/status.json", "/metrics", "/rank", "/nowhere"):
                wrong: list[dict[str, Any]] = [{}, {"params": {"token": ""}}, {"params": {"token": SECRET[:-1]}}]
                wrong += [{"headers": bearer(SECRET + "x")}, {"headers": bearer("")}, {"headers": basic("user:no")}]
                wrong += [
                    {"headers": {"Authorization": value}} for value in ("Basic !", "Basic", "Bearer \xff", SECRET)
                ]
                wrong += [{"headers": bearer("no"), "params": {"token": SECRET}}]
                for given in wrong:
                    assert (await client.get(path, **given)).status == 401, (path, given)
            assert server.history.num_refused == 5 * 11
            right: list[dict[str, Any]] = [{"params": {"token": SECRET}}, {"headers": bearer(SECRET)}]
            for given in [*right, {"headers": basic(f"me:{SECRET}")}]:
                assert (await client.get("/status.json", **given)).status == 200
            socket = await client.ws_connect("/rank", headers=bearer(SECRET))
            await socket.send_str(m.encode(JOIN))
            assert "Welcome" in (await socket.receive(5)).data

    asyncio.run(run())


def test_a_page_of_elsewhere_cannot_play_a_rank(tmp_path: Path) -> None:
    async def run() -> None:
        async with served(tmp_path) as (_, client):
            assert (await client.get("/rank", headers={"Origin": "http://evil.example"})).status == 403

    asyncio.run(run())


def test_metrics_are_in_the_format_of_prometheus(tmp_path: Path) -> None:
    async def run() -> str:
        async with served(tmp_path) as (_, client):
            rank = await joined(client, 3)
            await rank.arrive(0)
            await rank.hear()
            answer = await client.get("/metrics")
            assert answer.headers["Content-Type"].startswith("text/plain; version=0.0.4")
            return await answer.text()

    text = asyncio.run(run())
    number = r"-?\d+(\.\d+)?(e[+-]?\d+)?"
    named: set[str] = set()
    for line in text.splitlines():
        if line.startswith("#"):
            found = re.fullmatch(r"# TYPE (lowcomm_\w+) (gauge|counter)", line)
            assert found and found[1] not in named, line
            named.add(found[1])
        else:
            sample = re.fullmatch(rf'(lowcomm_\w+)(\{{replica="\d+"\}})? {number}', line)
            assert sample and sample[1] in named, line
    assert text.endswith("\n")
    assert "\nlowcomm_round 1.0\n" in text and '\nlowcomm_replica_tokens_total{replica="3"} 100.0\n' in text


def test_a_disk_that_is_full_ends_the_coordinator(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def run() -> None:
        async with served(tmp_path) as (server, client):
            rank = await joined(client, 0)

            def full(state: Any) -> None:
                raise OSError("no space left on device")

            monkeypatch.setattr(server._file, "save", full)
            await rank.arrive(0)
            done, _ = await asyncio.wait(server.tasks, timeout=5, return_when=asyncio.FIRST_COMPLETED)
            assert isinstance(done.pop().exception(), OSError)

    asyncio.run(run())


def test_one_coordinator_a_state(tmp_path: Path) -> None:
    async def run() -> None:
        async with served(tmp_path):
            with pytest.raises(ValueError, match="another coordinator uses"):
                Server(Serving(state=str(tmp_path / "state.json")))
        async with served(tmp_path) as (server, _):
            assert server.session.meeting.epoch == 2

    asyncio.run(run())


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"meeting": 1}', "\udcff"])
def test_a_state_that_is_none_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "state.json").write_text(text, errors="surrogateescape")
    with pytest.raises(ValueError, match="holds no state of a coordinator"):
        Server(Serving(state=str(tmp_path / "state.json")))


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"host": "0.0.0.0"}, "secret"),
        ({"port": 70000}, "port"),
        ({"heartbeat_s": 5.0}, "heartbeats"),
        ({"tls_cert": "a"}, "together"),
        ({"num_replicas": 0}, "at least 1"),
        ({"return_s": -1.0}, "at least 0"),
    ],
)
def test_settings_that_make_no_sense(options: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        Serving(**options)


def test_fuzzed_messages_crash_nothing(tmp_path: Path) -> None:
    """Over real connections: random texts and bytes, and messages with a field changed; benchmarks/ has many more."""
    draw, messages = random.Random(0), list[m.FromRank]([JOIN, ARRIVE, m.Leave("p5", 1, None)])
    values: list[Any] = [None, -1, 0, 3, 1e300, "p0", "", [], [0, 0], {}, True, 2**60]

    async def run() -> None:
        async with served(tmp_path, num_replicas=2) as (server, client):
            for number in range(300):
                rank = await joined(client, 5) if number % 2 else Rank(await client.ws_connect("/rank"), 5)
                said = json.loads(m.encode(draw.choice(messages)))
                said["incarnation"] = "p5" if draw.random() < 0.7 else said["incarnation"]
                said[draw.choice(sorted(said))] = draw.choice(values)
                said["epoch"] = rank.epoch if draw.random() < 0.7 else said["epoch"]
                kind = draw.random()
                if kind < 0.2:
                    await rank.socket.send_bytes(draw.randbytes(40))
                elif kind < 0.4:
                    await rank.socket.send_str(draw.randbytes(40).decode("latin1"))
                else:
                    await rank.socket.send_str(json.dumps(said))
                rank.socket._response.close()
            assert all(not task.done() for task in server.tasks)
            await soon(lambda: not server._connections)
            ranks = [await joined(client, replica) for replica in range(2)]
            for rank in ranks:
                await rank.arrive(server.session.meeting.round)
            assert (await ranks[0].hear()).members == (0, 1)

    asyncio.run(run())
