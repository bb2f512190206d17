"""The simulator against gloo on real links with delay: a few cells of benchmarks/network_model.py."""

import os
from dataclasses import replace

import pytest

from benchmarks.network_model import Case, rows_of, time_cells
from lowcomm.sim.wire.links import Transport
from tests.multiprocess.test_slow_network import missing

CASE = Case(3, 50.0, 20.0)
CELLS = [
    *["all_sum 4", "all_sum 4000", "all_sum 400000", "all_gather 400000", "all_to_all 400000", "broadcast 400000"],
    *["send 400000", "exchange 400000", "diloco fp32 1M", "diloco int8 1M", "diloco power_sgd 1M"],
]

pytestmark = pytest.mark.skipif(bool(missing()) and "CI" not in os.environ, reason=missing())


@pytest.mark.timeout(110)
def test_simulated_seconds_are_those_of_gloo_behind_real_delays(tmp_path):
    path = tmp_path / "cells.jsonl"
    time_cells(CASE, path, CELLS)
    rows = rows_of(CASE, path, Transport())
    assert [row.name for row in rows] == CELLS
    wrong = [f"{row.name}: {row.predicted_s:.3f} s for {row.real_s:.3f}" for row in rows if abs(row.error) > 0.25]
    assert len(wrong) <= 1, wrong  # the machine is shared
    assert sorted(abs(row.error) for row in rows)[len(rows) // 2] < 0.1, [row.error for row in rows]
    # a factor that was fitted to short-lived connections is far off
    fitted = rows_of(CASE, path, replace(Transport(), latency_factor=13.01))
    assert all(row.error > 1 for row in fitted)
