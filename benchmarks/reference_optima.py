"""Compare the solver with published optima.

    python benchmarks/reference_optima.py FOLDER

FOLDER contains `reference_optima.json` and `profiles/NAME.txt`. For every row, the optimal bottleneck under
the formulas `paper2018` and `reference_code` must agree to 1e-9. Times are compared, not partitions, since
several partitions may be optimal. Exits with status 1 if a time deviates.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

from rich.table import Table

from pipedream_hpc.observe import terminal
from pipedream_hpc.planning.importer import import_profile
from pipedream_hpc.planning.solver import Request, solve
from pipedream_hpc.planning.topology import Level, Topology

MINIBATCH = {"alexnet": 256, "resnet18": 256, "vgg16": 128, "resnet50": 128, "gnmt": 64}
TOLERANCE = 1e-9


def main(folder: Path) -> int:
    rows = json.loads((folder / "reference_optima.json").read_text())["rows"]
    table = Table(
        "profile", "machines", "GB/s", "formula", "ours (ms)", "reference (ms)", "off by", "plan", "solved in"
    )
    worst = 0.0
    for row in rows:
        name = row["profile"]
        profile = import_profile(folder / "profiles" / f"{name}.txt", minibatch=MINIBATCH.get(name, 1))
        level = Level("network", row["machines"], 0.0, row["bandwidth_bytes_per_s"])
        for formula, reference in row["bottleneck_s"].items():
            began = time.perf_counter()
            plan = solve(profile, Topology((level,), device="V100"), Request(cost=formula))
            seconds = time.perf_counter() - began
            off = abs(plan.bottleneck_s / reference - 1)
            worst = max(worst, off)
            table.add_row(
                name,
                str(row["machines"]),
                f"{row['bandwidth_bytes_per_s'] / 1e9:g}",
                formula,
                f"{plan.bottleneck_s * 1e3:.4f}",
                f"{reference * 1e3:.4f}",
                f"{off:.1e}",
                plan.config if len(plan.stages) < 6 else f"{len(plan.stages)} stages",
                f"{seconds * 1e3:.0f} ms",
            )
    console = terminal.console()
    console.print(table)
    console.print(f"{table.row_count} optima, worst deviation {worst:.1e}, allowed {TOLERANCE:.0e}")
    return int(worst > TOLERANCE)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    sys.exit(main(Path(sys.argv[1])))
