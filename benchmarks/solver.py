"""Measure the time and the memory that the solver takes.

    python benchmarks/solver.py [PROFILES]

PROFILES is a folder of published profiles (*.txt); each is planned for 16 devices on one level and for
two nodes of eight. In addition it plans synthetic models: a chain of 1,000 layers on 1,024 devices (one
level, and eight nodes of 128), with and without a memory limit, and twenty blocks of parallel
branches. Times are medians of three runs on one thread.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import itertools
import random
import resource
import statistics
import sys
import time
from pathlib import Path

from rich.table import Table

from pipedream_hpc.observe import terminal
from pipedream_hpc.observe.tables import human_seconds
from pipedream_hpc.planning.importer import import_profile
from pipedream_hpc.planning.profile import LayerProfile, Profile
from pipedream_hpc.planning.solver import Request, solve
from pipedream_hpc.planning.solver.cuts import cuts_of
from pipedream_hpc.planning.topology import Level, Topology

FLAT_16 = Topology((Level("network", 16, 0.0, 3.125e9),), "V100")
TWO_NODES = Topology((Level("node", 8, 0.0, 30e9), Level("network", 2, 0.0, 3.125e9)), "V100")
FLAT_1024 = Topology((Level("network", 1024, 0.0, 3.125e9),), "synthetic")
EIGHT_NODES = Topology((Level("node", 128, 0.0, 30e9), Level("network", 8, 0.0, 3.125e9)), "synthetic")


def layer(name: str, numbers: random.Random) -> LayerProfile:
    return LayerProfile(
        name, "Synthetic", numbers.uniform(0, 1e-3), numbers.uniform(0, 2e-3),
        numbers.randrange(10**6), numbers.randrange(10**7), numbers.randrange(10**6),
    )  # fmt: skip


def chain(length: int) -> Profile:
    numbers = random.Random(1)
    layers = tuple(layer(f"l{index}", numbers) for index in range(length))
    return Profile(f"chain of {length}", "synthetic", 1, layers, tuple(itertools.pairwise(range(length))))


def branching(blocks: int, branches: int, depth: int) -> Profile:
    """Return a sequence of blocks, each with parallel branches between a first and a last layer."""
    numbers = random.Random(2)
    layers: list[LayerProfile] = []
    edges: list[tuple[int, int]] = []
    for _ in range(blocks):
        begin, end = len(layers), len(layers) + branches * depth + 1
        if begin:
            edges.append((begin - 1, begin))
        for branch in range(branches):
            edges += itertools.pairwise([begin, *(begin + 1 + branch * depth + step for step in range(depth)), end])
        layers += [layer(f"l{index}", numbers) for index in range(begin, end + 1)]
    name = f"{blocks} blocks of {branches} x {depth}"
    return Profile(name, "synthetic", 1, tuple(layers), tuple(sorted(edges)))


def main(folder: Path | None) -> None:
    cases = [(chain(1000), FLAT_1024, Request()), (chain(1000), EIGHT_NODES, Request())]
    cases += [(chain(1000), EIGHT_NODES, Request(memory_bytes=2_000_000_000))]
    cases += [(branching(20, 4, 4), topology, Request()) for topology in (FLAT_16, TWO_NODES)]
    for file in sorted(folder.glob("*.txt")) if folder else ():
        profile = import_profile(file, minibatch=1)
        cases += [(profile, FLAT_16, Request()), (profile, TWO_NODES, Request())]
    table = Table(
        "model", "layers", "cuts", "devices", "memory limit", "seconds", "plan", "per minibatch", "above bound"
    )
    for profile, topology, request in cases:
        times = []
        for _ in range(3):
            began = time.perf_counter()
            plan = solve(profile, topology, request)
            times.append(time.perf_counter() - began)
        table.add_row(
            profile.model,
            str(len(profile.layers)),
            str(len(cuts_of(profile))),
            "x".join(str(level.count) for level in topology.levels),
            f"{request.memory_bytes / 1e6:.0f} MB" if request.memory_bytes else "",
            f"{statistics.median(times):.2f}",
            plan.config if len(plan.stages) < 6 else f"{len(plan.stages)} stages",
            human_seconds(plan.bottleneck_s),
            f"{plan.bottleneck_s / plan.bound_s - 1:.1%}" if plan.bound_s else "",
        )
    console = terminal.console()
    console.print(table)
    console.print(f"largest resident memory: {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024:.0f} MiB")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else None)
