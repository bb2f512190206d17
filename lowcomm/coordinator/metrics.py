"""The coordinator's state in the text format of Prometheus.

Every number of the status is a metric, those of replicas with a label: what is called ``num_x`` is the counter
``x_total``, all else a gauge, with seconds in full.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any


def text(status: Mapping[str, Any]) -> str:
    """The metrics of what readers are shown."""
    samples: dict[str, list[str]] = {}

    def add(owner: str, values: Mapping[str, Any], label: str) -> None:
        for key, value in values.items():
            if isinstance(value, int | float):
                name = f"{key[4:]}_total" if key.startswith("num_") else re.sub(r"_s$", "_seconds", key)
                samples.setdefault(f"lowcomm_{owner}{name}", []).append(f"{label} {float(value)!r}")

    add("", status, "")
    for row in status["replicas"]:
        label = f'{{replica="{row["replica"]}"}}'
        add("replica_", {key: value for key, value in row.items() if key != "replica"}, label)
        add("replica_", {"present": row["state"] != "gone"}, label)
    lines = []
    for name, found in samples.items():
        lines += [f"# TYPE {name} {'counter' if name.endswith('_total') else 'gauge'}"]
        lines += [name + sample for sample in found]
    return "\n".join(lines) + "\n"
