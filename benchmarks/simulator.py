"""Measure how long the simulator takes on one core.

    python benchmarks/simulator.py

The limit is 10 s for 4,096 ranks x 64 microbatches. Exits with 1 if a row takes longer.
"""

from __future__ import annotations

import sys
import time

from rich.console import Console
from rich.table import Table

from pipedream_hpc.planning.plan import Plan, StagePlan
from pipedream_hpc.planning.topology import Level, Topology
from pipedream_hpc.schedule import registry
from pipedream_hpc.schedule.interleaved import folded
from pipedream_hpc.schedule.simulator import simulate

RANKS, MICROBATCHES, ALLOWED_S = 4096, 64, 10.0
#: Schedule, stages, replicas of each, microbatches per minibatch, chunks per rank.
CASES = [
    ("1f1b", 4096, 1, 1, 1),
    ("1f1b", 64, 64, 1, 1),
    ("vertical-sync", 4096, 1, 1, 1),
    ("1f1b-flush", 4096, 1, 64, 1),
    ("zb-h1", 4096, 1, 64, 1),
    ("gpipe", 4096, 1, 64, 1),
    ("interleaved", 64, 1, 64, 2),
    ("data-parallel", 1, 4096, 1, 1),
]


def plan_of(stages: int, replicas: int) -> Plan:
    """Return a plan of equal stages, ranks numbered stage by stage."""
    made = [
        StagePlan((f"l{i}",), tuple(range(i * replicas, (i + 1) * replicas)), 1e-3, 2e-3, 3e-3 / replicas, 0.0, 0.0,
                  1, 4_000_000, 1_000_000, None, None, "compute")
        for i in range(stages)
    ]  # fmt: skip
    return Plan("equal", 1, "1f1b", "paper2018", tuple(made), 3e-3, 3e-3 * stages)


def main() -> int:
    table = Table("schedule", "stages x replicas", "microbatches", "spans", "simulated", "took", "per span")
    cluster = Topology((Level("node", 8, 1e-6, 1e11), Level("network", RANKS // 8, 5e-6, 2.5e10)), "benchmark")
    slowest_s = 0.0
    for name, stages, replicas, n_microbatches, chunks in CASES:
        plan = plan_of(stages * chunks, replicas)
        layout = folded(plan.layout, chunks) if chunks > 1 else plan.layout
        schedule = registry.make(name, layout, MICROBATCHES, n_microbatches=n_microbatches)
        began = time.perf_counter()
        trace = simulate(schedule, plan, cluster, n_microbatches=n_microbatches).trace
        took_s = time.perf_counter() - began
        slowest_s = max(slowest_s, took_s)
        ends_s = max(span.end_s for span in trace.spans)
        table.add_row(name, f"{stages} x {replicas}", str(MICROBATCHES), f"{len(trace.spans):,}", f"{ends_s:.3f} s",
                      f"{took_s:.2f} s", f"{took_s / len(trace.spans) * 1e6:.2f} µs")  # fmt: skip
    console = Console()
    console.print(table)
    console.print(f"slowest {slowest_s:.2f} s, allowed {ALLOWED_S:g} s")
    return int(slowest_s > ALLOWED_S)


if __name__ == "__main__":
    sys.exit(main())
