"""The coordinator's state in the text format of Prometheus."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# name, kind, help, and where it stands in the status; those of replicas carry a label
_OF_THE_RUN = (
    ("epoch", "gauge", "The epoch, which grows with each change of members and each restart.", "epoch"),
    ("round", "gauge", "The newest round.", "round"),
    ("rounds_total", "counter", "Rounds decided since this coordinator started.", "num_rounds"),
    ("sent_bytes_total", "counter", "Bytes that replicas sent in rounds.", "num_bytes"),
    ("tokens_total", "counter", "Tokens that rounds took up.", "num_tokens"),
    ("tokens_per_second", "gauge", "Tokens of the last 20 rounds over their time.", "tokens_per_s"),
    ("refused_total", "counter", "Messages and processes that were refused.", "num_refused"),
    ("up_seconds", "gauge", "Since this coordinator started.", "up_s"),
)
_OF_A_REPLICA = (
    ("replica_rounds_total", "counter", "Rounds that it took part in.", "num_rounds"),
    ("replica_late_total", "counter", "Rounds decided without it while it was present.", "num_late"),
    ("replica_tokens_total", "counter", "Tokens of it that rounds took up.", "tokens"),
    ("replica_sent_bytes_total", "counter", "Bytes that it sent in rounds.", "bytes"),
    ("replica_version", "gauge", "The last round whose result it holds.", "version"),
    ("replica_step", "gauge", "Inner steps that it has done.", "step"),
    ("replica_loss", "gauge", "Its last loss.", "loss"),
    ("replica_work_seconds", "gauge", "Its work for the last round.", "work_s"),
    ("replica_first_byte_seconds", "gauge", "To the first byte of the last exchange.", "first_byte_s"),
    ("replica_exchange_seconds", "gauge", "The last exchange.", "done_s"),
    ("replica_slow_work_rounds", "gauge", "Rounds in a row in which its work was an outlier.", "slow_work"),
    ("replica_slow_link_rounds", "gauge", "Rounds in a row in which its exchange was an outlier.", "slow_link"),
)


def text(status: Mapping[str, Any]) -> str:
    """The metrics of a status of `History`, with the epoch and round of the session."""
    lines = []
    for name, kind, meaning, key in _OF_THE_RUN:
        lines += [*_head(name, kind, meaning), f"lowcomm_{name} {float(status[key])!r}"]
    states = [row["state"] for row in status["replicas"]]
    lines += _head("replicas", "gauge", "Replicas by what they do.")
    lines += [f'lowcomm_replicas{{state="{state}"}} {states.count(state)}' for state in ("working", "waiting", "gone")]
    for name, kind, meaning, key in _OF_A_REPLICA:
        lines += _head(name, kind, meaning)
        lines += [
            f'lowcomm_{name}{{replica="{row["replica"]}"}} {float(row[key])!r}'
            for row in status["replicas"]
            if row[key] is not None
        ]
    return "\n".join(lines) + "\n"


def _head(name: str, kind: str, meaning: str) -> list[str]:
    return [f"# HELP lowcomm_{name} {meaning}", f"# TYPE lowcomm_{name} {kind}"]
