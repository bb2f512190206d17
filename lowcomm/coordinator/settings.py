"""How a coordinator is set up: what `lowcomm coordinator` takes."""

from __future__ import annotations

import ssl
from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path

from lowcomm.participation.base import Late, Rule
from lowcomm.participation.rules import All


@dataclass(frozen=True)
class Serving:
    """How a coordinator serves one run.

    Attributes:
        rule: when a round goes on without those who are late.
        late: whether those who missed a round count for the rule ("carry"), or only come along ("drop").
        num_replicas: the first round waits until so many have joined.
        host: the address to listen on. Beyond this machine it takes a secret.
        port: 0 picks a free one.
        state: the file that outlives a restart; its folder is made.
        heartbeat_s: between two pings of each rank.
        dead_after_s: a rank that says nothing for so long, not even to a ping, is dead or stopped.
        return_s: after a restart, how long members may take to come back.
        secret_file: holds the word that ranks and readers must know; without it everybody may come in.
        tls_cert: a certificate in PEM; ranks then use wss:// and readers https://.
        tls_key: its key.
    """

    rule: Rule = All()
    late: Late = "carry"
    num_replicas: int = 1
    host: str = "127.0.0.1"
    port: int = 29600
    state: str = "coordinator.json"
    heartbeat_s: float = 1.0
    dead_after_s: float = 5.0
    return_s: float = 30.0
    secret_file: str | None = None
    tls_cert: str | None = None
    tls_key: str | None = None

    def __post_init__(self) -> None:
        if self.num_replicas < 1:
            raise ValueError(f"num_replicas is {self.num_replicas}; at least 1")
        if not 0 <= self.port < 65536:
            raise ValueError(f"port is {self.port}; from 0, which picks a free one, to 65535")
        if not 0 < self.heartbeat_s < self.dead_after_s:
            raise ValueError(
                f"heartbeat_s is {self.heartbeat_s} and dead_after_s {self.dead_after_s}; heartbeats are positive and "
                "shorter than what makes a rank dead"
            )
        if self.return_s < 0:
            raise ValueError(f"return_s is {self.return_s}; at least 0")
        if (self.tls_cert is None) != (self.tls_key is None):
            raise ValueError("tls_cert and tls_key belong together; give both or neither")
        if self.secret_file is None and not _is_this_machine(self.host):
            raise ValueError(
                f"host {self.host} lets others in, and there is no secret; give --secret_file a file with a long "
                "random word, or listen on 127.0.0.1"
            )

    def secret(self) -> str | None:
        """What the secret file holds, without white space around it."""
        if self.secret_file is None:
            return None
        try:
            word = Path(self.secret_file).read_text(encoding="utf-8").strip()
        except OSError as error:
            raise ValueError(f"secret_file {self.secret_file} cannot be read ({error.strerror})") from None
        if len(word) < 16:
            raise ValueError(f"secret_file {self.secret_file} holds {len(word)} characters; use 16 or more")
        return word

    def tls(self) -> ssl.SSLContext | None:
        """The context of a server with the certificate."""
        if self.tls_cert is None:
            return None
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        try:
            context.load_cert_chain(self.tls_cert, self.tls_key)
        except OSError as error:
            raise ValueError(f"tls_cert {self.tls_cert} with tls_key {self.tls_key} cannot be used ({error})") from None
        return context


def _is_this_machine(host: str) -> bool:
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
