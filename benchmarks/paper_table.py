"""Compare the plans of `pipedream partition` with Table 1 of the paper (arXiv 1806.03377).

    python benchmarks/paper_table.py PROFILES

PROFILES is a folder with the published `vgg16.txt`, `resnet50.txt` and `gnmt.txt`. They were measured on a V100
and are scaled here to 32 images per minibatch and, for the Titan X of cluster A, to 1.6 times the compute
time. Planned speed-ups are those of the steady state; the paper reports measured times to an accuracy.
Inception-v3 has no published profile: its operations are counted and converted at 6 Tflop/s on a V100.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from rich.table import Table

from pipedream_hpc.model.capture import capture
from pipedream_hpc.model.counting import count
from pipedream_hpc.observe import terminal
from pipedream_hpc.observe.explain import communication_reduction
from pipedream_hpc.planning.importer import import_profile
from pipedream_hpc.planning.presets import preset
from pipedream_hpc.planning.profile import Profile
from pipedream_hpc.planning.scale import scale_profile
from pipedream_hpc.planning.solver import Request, solve
from pipedream_hpc.zoo import inception_v3

#: Operations per second: as counted profiles assume, and as assumed for fp32 convolutions on a V100.
COUNTED_FLOPS, V100_FLOPS = 1e9, 6e12
MINIBATCH = {"vgg16": 128, "resnet50": 128, "gnmt": 64}


@dataclass(frozen=True)
class Row:
    """The paper's results: replicas per stage, speed-up over one machine and over BSP, communication reduction."""

    profile: str
    cluster: str
    machines: int
    config: str = "-"
    over_one: str = "-"
    over_bsp: str = "-"
    less: str = "-"


ROWS = (
    Row("vgg16", "a", 4, "2-1-1", "3.14x", "2.13x", "90%"),
    Row("vgg16", "a", 8, "7-1", "7.04x", "2.99x", "95%"),
    Row("vgg16", "a", 16, "9-5-1-1", "9.86x", "3.00x", "91%"),
    Row("vgg16", "b", 8, "7-1", "6.98x", "5.12x", "95%"),
    Row("inception_v3", "a", 8, "8", "7.66x", "1.00x", "0%"),
    Row("inception_v3", "b", 8, "7-1", "6.88x", "1.45x", "47%"),
    Row("resnet50", "a", 8),
    Row("resnet50", "b", 8),
    Row("gnmt", "a", 8),
    Row("gnmt", "b", 8),
)


def main(folder: Path) -> None:
    console = terminal.console()
    for cost in ("ring", "paper2018"):
        table = Table(
            "model", "machines", "planned", "paper", "over one", "paper", "over BSP", "paper", "less traffic", "paper",
            title=f"cost formula {cost}", title_justify="left",
        )  # fmt: skip
        for row in ROWS:
            samples = 32 if row.profile != "gnmt" else None
            profile = scale_profile(
                v100(folder, row.profile), minibatch=samples, compute=1.6 if row.cluster == "a" else 1.0
            )
            plan = solve(profile, preset(f"cluster-{row.cluster}", [row.machines]), Request(cost=cost))
            over_bsp, less = plan.speedup_vs_data_parallel, communication_reduction(plan)
            table.add_row(
                row.profile,
                f"{row.machines} {row.cluster.upper()}",
                plan.config,
                row.config,
                f"{plan.speedup_vs_one:.2f}x",
                row.over_one,
                "-" if over_bsp is None else f"{over_bsp:.2f}x",
                row.over_bsp,
                "-" if less is None else f"{less:.0%}",
                row.less,
            )
        console.print(table)


@cache
def v100(folder: Path, model: str) -> Profile:
    """Return the published profile, or a counted one if there is none."""
    if model != "inception_v3":
        return import_profile(folder / f"{model}.txt", minibatch=MINIBATCH[model])
    with torch.device("meta"):
        images = torch.empty(32, 3, 299, 299)
        return scale_profile(count(capture(inception_v3(), images), model), compute=COUNTED_FLOPS / V100_FLOPS)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    main(Path(sys.argv[1]))
