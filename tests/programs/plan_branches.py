"""Plan a model of 1,300 layers that branches heavily, within 2 GiB.

python plan_branches.py blocks|lanes|random|skips
"""

import itertools
import random
import resource
import sys

from pipedream_hpc.planning.profile import LayerProfile, Profile
from pipedream_hpc.planning.solver import Request, solve
from pipedream_hpc.planning.topology import Level, Topology

LAYERS = 1300


def blocks() -> list[tuple[int, int]]:
    """100 blocks of 4 branches of 3 layers, each joined by one layer, as in Inception."""
    edges = []
    for first in range(0, LAYERS - 13, 13):
        for branch in range(4):
            chain = [first, *(first + 1 + 3 * branch + step for step in range(3)), first + 13]
            edges += list(itertools.pairwise(chain))
    return edges


def lanes() -> list[tuple[int, int]]:
    """13 chains of nearly 100 layers side by side, between the first and the last layer."""
    edges = []
    for lane in range(13):
        chain = [0, *range(1 + lane, LAYERS - 1, 13), LAYERS - 1]
        edges += list(itertools.pairwise(chain))
    return edges


def drawn() -> list[tuple[int, int]]:
    """Every layer uses up to 3 of the 20 before it."""
    generator = random.Random(0)
    return [
        (source, layer)
        for layer in range(1, LAYERS)
        for source in sorted({layer - generator.randint(1, min(layer, 20)) for _ in range(generator.randint(1, 3))})
    ]


def skips() -> list[tuple[int, int]]:
    """A chain whose every layer also feeds the one 37 layers on."""
    return [(n, n + 1) for n in range(LAYERS - 1)] + [(n, n + 37) for n in range(LAYERS - 37)]


def main() -> None:
    resource.setrlimit(resource.RLIMIT_AS, (6 << 30, 6 << 30))
    generator = random.Random(1)
    edges = {"blocks": blocks, "lanes": lanes, "random": drawn, "skips": skips}[sys.argv[1]]()
    layers = tuple(
        LayerProfile(
            name=f"l{n}",
            kind="layer",
            forward_s=generator.random() * 1e-3,
            backward_s=generator.random() * 2e-3,
            output_bytes=generator.randint(1, 1 << 20),
            parameter_bytes=generator.randint(0, 1 << 22),
            stash_bytes=1 << 18,
            output_shape=None,
            output_dtype=None,
        )
        for n in range(LAYERS)
    )
    profile = Profile("branches", "test", 32, layers, tuple(sorted(set(edges))))
    topology = Topology((Level("node", 8, 0.0, 30e9), Level("switch", 2, 0.0, 3e9)), "test")
    plan = solve(profile, topology, Request())
    placed = [name for stage in plan.stages for name in stage.layers]
    assert sorted(placed) == sorted(layer.name for layer in layers), "every layer once"
    stage_of = {name: index for index, stage in enumerate(plan.stages) for name in stage.layers}
    assert all(stage_of[f"l{a}"] <= stage_of[f"l{b}"] for a, b in edges), "data flows forwards"
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    assert peak < 2048, f"{peak:.0f} MiB"
    replicas = "-".join(str(stage.replicas) for stage in plan.stages)
    print(f"{replicas}: {plan.bottleneck_s / plan.bound_s - 1:.1%} above the bound, {peak:.0f} MiB")


if __name__ == "__main__":
    main()
