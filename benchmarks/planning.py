"""Measure the time and the memory that it takes to plan a large model whose weights nobody has.

    python benchmarks/planning.py                              48 layers of Llama's form, hidden size 4096
    python benchmarks/planning.py --layers 96 --hidden 8192
    python benchmarks/planning.py --repeat 3                   medians; memory is that of the first time

The model is built on the meta device, captured, counted, cut into stages without a profile (a number of stages,
replicas per stage, named cut points) and by the solver for clusters of 16 and 64 devices with 80 GB each. The solver
works on the counted profile, which has the layers and edges of a measured one. All steps run on one thread; where
others use the core as well, the seconds of the CPU are those that carry over. Needs transformers.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import argparse
import resource
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import transformers
from rich.table import Table
from torch import nn

from pipedream_hpc.model.capture import capture
from pipedream_hpc.model.counting import count
from pipedream_hpc.model.cut_points import first_layers
from pipedream_hpc.model.graph import LayerGraph
from pipedream_hpc.model.partition import Partition
from pipedream_hpc.observe import terminal
from pipedream_hpc.planning.plan import Plan
from pipedream_hpc.planning.profile import Profile
from pipedream_hpc.planning.resolve import resolve_plan
from pipedream_hpc.planning.solver import Request, solve
from pipedream_hpc.planning.topology import Level, Topology

STAGES = 8
TWO_NODES = Topology((Level("node", 8, 0.0, 30e9), Level("network", 2, 0.0, 3.125e9)), "GPU", 80_000_000_000)
EIGHT_NODES = Topology((Level("node", 8, 0.0, 30e9), Level("network", 8, 0.0, 3.125e9)), "GPU", 80_000_000_000)


class Steps:
    """Times the steps, and notes how much each adds to the largest resident memory of the process."""

    def __init__(self) -> None:
        self.seconds: dict[str, list[float]] = {}
        self.cpu_s: dict[str, list[float]] = {}
        self.mib: dict[str, float] = {}

    def run(self, name: str, step: Callable[[], Any]) -> Any:
        before, began, began_cpu = _peak_mib(), time.perf_counter(), time.process_time()
        result = step()
        self.seconds.setdefault(name, []).append(time.perf_counter() - began)
        self.cpu_s.setdefault(name, []).append(time.process_time() - began_cpu)
        self.mib.setdefault(name, _peak_mib() - before)
        return result


def _peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def build(layers: int, hidden: int) -> nn.Module:
    config = transformers.LlamaConfig(
        vocab_size=32000,
        num_hidden_layers=layers,
        hidden_size=hidden,
        intermediate_size=hidden * 11 // 4,
        num_attention_heads=hidden // 128,
        num_key_value_heads=hidden // 512,
        max_position_embeddings=4096,
        use_cache=False,
    )
    with torch.device("meta"):
        return transformers.LlamaForCausalLM(config)  # type: ignore[no-any-return]


def stages_of(graph: LayerGraph, plan: Plan) -> Partition:
    number = {layer.name: index for index, layer in enumerate(graph.layers)}
    partition = Partition(graph, [[number[layer] for layer in stage.layers] for stage in plan.stages])
    partition.stage_module(len(plan.stages) // 2)
    graph.close()
    return partition


def once(steps: Steps, layers: int, hidden: int) -> tuple[LayerGraph, Profile]:
    model = steps.run("build on the meta device", lambda: build(layers, hidden))
    tokens = torch.zeros(1, 2048, dtype=torch.long)
    graph = steps.run("capture", lambda: capture(model, {"input_ids": tokens, "labels": tokens}))
    profile = steps.run("count", lambda: count(graph))
    plan = steps.run(f"plan {STAGES}", lambda: resolve_plan(STAGES, lambda: profile))
    steps.run("plan " + "-".join("1" * STAGES), lambda: resolve_plan((1,) * STAGES, lambda: profile))
    names = [f"model.layers.{layers * stage // STAGES}" for stage in range(1, STAGES)]
    steps.run(
        f"plan {STAGES} with cut points",
        lambda: resolve_plan(STAGES, lambda: profile, cuts=first_layers(graph, names)),
    )
    steps.run("partition, and the module of a stage", lambda: stages_of(graph, plan))
    for name, topology in (("8 x 2", TWO_NODES), ("8 x 8", EIGHT_NODES)):
        request = Request(schedule="1f1b-flush", n_microbatches=16, recompute="auto", fewer=True)
        steps.run(f"solver, {name} devices", lambda t=topology, r=request: solve(profile, t, r))
    return graph, profile


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=48)
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--repeat", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(1)
    steps, imported_mib = Steps(), _peak_mib()
    for _ in range(options.repeat):
        graph, profile = once(steps, options.layers, options.hidden)
    weights = sum(parameter.nbytes for parameter in graph.module.parameters())
    title = f"{len(profile.layers)} layers, {weights / 1e9:.1f} GB of weights"
    table = Table("step", "seconds", "of the CPU", "MiB more", title=title)
    for name, seconds in steps.seconds.items():
        times = (f"{statistics.median(each):.2f}" for each in (seconds, steps.cpu_s[name]))
        table.add_row(name, *times, f"{steps.mib[name]:.0f}")
    console = terminal.console()
    console.print(table)
    console.print(f"largest resident memory: {_peak_mib():.0f} MiB, of which {imported_mib:.0f} MiB for imports")


if __name__ == "__main__":
    main()
