"""Explain a plan: its stages, its predictions and its bottlenecks, as tables and as plain data."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from pipedream_hpc.errors import PipedreamError
from pipedream_hpc.files import atomic_write
from pipedream_hpc.observe.tables import human_bytes, human_seconds
from pipedream_hpc.planning.memory import MemoryParts
from pipedream_hpc.planning.plan import Plan, StagePlan
from pipedream_hpc.planning.what_if import Case

_GIGABIT = 1e9 / 8


def report(plan: Plan) -> dict[str, Any]:
    """Return all figures of a plan as plain data; times in seconds, sizes in bytes, per minibatch."""
    other = plan.alternatives
    return {
        "model": plan.model,
        "minibatch": plan.minibatch,
        "schedule": plan.schedule,
        "n_microbatches": plan.n_microbatches,
        "cost": plan.cost,
        "optimizer": plan.optimizer,
        "scaled": plan.scaled,
        "config": plan.config,
        "ranks": plan.ranks,
        "bottleneck_s": plan.bottleneck_s,
        "bound_s": plan.bound_s,
        "throughput": _per_second(plan.bottleneck_s),
        "samples_per_s": plan.minibatch * _per_second(plan.bottleneck_s),
        "single_device_s": plan.single_device_s,
        "speedup_vs_one": plan.speedup_vs_one,
        "speedup_vs_dp": plan.speedup_vs_data_parallel,
        "data_parallel_is_best": len(plan.stages) == 1,
        "communication_reduction": communication_reduction(plan),
        "alternatives": None
        if other is None
        else {
            "data_parallel_s": other.data_parallel_s,
            "data_parallel_memory_bytes": other.data_parallel_bytes,
            "data_parallel_fits": plan.data_parallel_fits,
            "model_parallel_s": other.model_parallel_s,
            "gpipe_s": other.flush_s,
            "1f1b_flush_s": other.flush_s,
            "flush_n_microbatches": other.n_microbatches,
            "network_bytes": other.network_bytes,
            "data_parallel_network_bytes": other.data_parallel_network_bytes,
        },
        "stages": [_stage(stage) for stage in plan.stages],
        "notes": list(plan.notes),
    }


def _stage(stage: StagePlan) -> dict[str, Any]:
    memory = None
    if stage.memory is not None:
        memory = {part: getattr(stage.memory, part) for part in MemoryParts.PARTS} | {"total": stage.memory.total}
    return {
        "layers": list(stage.layers),
        "replicas": stage.replicas,
        "ranks": list(stage.ranks),
        "forward_s": stage.forward_s,
        "backward_s": stage.backward_s,
        "weight_gradient_s": stage.weight_gradient_s,
        "compute_s": stage.compute_s,
        "sync_s": stage.sync_s,
        "boundary_s": stage.boundary_s,
        "memory_bytes": memory,
        "in_flight": stage.in_flight,
        "limit": stage.limit,
        "recompute": stage.recompute,
        "parameter_bytes": stage.parameter_bytes,
        "output_bytes": stage.output_bytes,
    }


def _per_second(seconds: float) -> float:
    return 1 / seconds if seconds else 0.0


def communication_reduction(plan: Plan) -> float | None:
    """Return the fraction of data parallelism's traffic that the plan avoids; None when unknown."""
    other = plan.alternatives
    if other is None or not other.data_parallel_network_bytes:
        return None
    return 1 - other.network_bytes / other.data_parallel_network_bytes


def stages_table(plan: Plan) -> Table:
    """Return a table with one row per stage: its time per minibatch and its memory."""
    title = f"{plan.model}: {plan.config} on {plan.ranks} devices, {plan.schedule}, cost formula {plan.cost}"
    table = Table(title=title, title_justify="left")
    for column in ("stage", "layers"):
        table.add_column(column)
    for column in ("ranks", "compute", "sync", "boundary", "limit", "in flight", "memory", "weights", "activations"):
        table.add_column(column, justify="right")
    for index, stage in enumerate(plan.stages):
        first, last = stage.layers[0], stage.layers[-1]
        memory = stage.memory
        table.add_row(
            str(index),
            f"{first} … {last} ({len(stage.layers)})" if first != last else first,
            _ranks(stage.ranks),
            human_seconds(stage.compute_s),
            human_seconds(stage.sync_s),
            human_seconds(stage.boundary_s),
            stage.limit,
            str(stage.in_flight),
            human_bytes(memory.total) if memory else "?",
            human_bytes(memory.weights + memory.gradients + memory.optimizer) if memory else "?",
            human_bytes(memory.activations + memory.slots) + (" (recompute)" if stage.recompute else "")
            if memory
            else "?",
        )
    return table


def _ranks(ranks: Sequence[int]) -> str:
    """Format ranks such as `0-14` or `0, 4, 8, 12`."""
    if len(ranks) > 2 and list(ranks) == list(range(ranks[0], ranks[0] + len(ranks))):
        return f"{ranks[0]}-{ranks[-1]}"
    shown = ", ".join(map(str, ranks[:6]))
    return shown if len(ranks) <= 6 else f"{shown}, ... ({len(ranks)})"


def sentences(plan: Plan) -> list[str]:
    """Return sentences with the plan's predictions, compared with other ways to train on the same devices."""
    lines = [
        f"{human_seconds(plan.bottleneck_s)} per minibatch of {plan.minibatch} predicted, "
        f"{plan.minibatch * _per_second(plan.bottleneck_s):.4g} samples/s, {plan.speedup_vs_one:.2f}x one device"
    ]
    if plan.bound_s < plan.bottleneck_s * (1 - 1e-6):
        slower = plan.bottleneck_s / plan.bound_s - 1 if plan.bound_s else float("inf")
        lines.append(f"the problem was too large for an exact solution: at most {slower:.1%} slower than the optimum")
    other = plan.alternatives
    if other is not None and plan.ranks > 1:
        if len(plan.stages) == 1:
            lines.append("use data parallelism: no pipeline on these devices is faster")
        else:
            baselines = [
                ("data parallelism" + (" (does not fit)" * (not plan.data_parallel_fits)), other.data_parallel_s)
            ]
            if plan.schedule not in ("gpipe", "1f1b-flush"):
                baselines.append((f"GPipe or 1F1B-flush (m = {other.n_microbatches})", other.flush_s))
            baselines.append(("model parallelism", other.model_parallel_s))
            speedups = ", ".join(
                f"{seconds * _per_second(plan.bottleneck_s):.2f}x over {name}" for name, seconds in baselines
            )
            reduction = communication_reduction(plan)
            traffic = "" if reduction is None else f"; {_compared(reduction)} communication than data parallelism"
            lines.append(f"speed-up on the same devices: {speedups}{traffic}")
    if plan.scaled:
        lines.append(f"the profile was scaled: {plan.scaled}")
    lines += plan.notes
    return lines


def what_if_table(cases: Sequence[Case]) -> Table:
    """Return a table with one row per number of devices and one column per bandwidth.

    A cell has the replicas per stage, the speed-up over one device and, in brackets, over data parallelism.
    """
    bandwidths = sorted({case.bandwidth for case in cases})
    table = Table(title="what if: plan, speed-up over one device (over data parallelism)", title_justify="left")
    table.add_column("devices", justify="right")
    for bandwidth in bandwidths:
        table.add_column(f"{bandwidth / _GIGABIT:g} Gb/s")
    for devices in sorted({case.devices for case in cases}):
        row = {case.bandwidth: case for case in cases if case.devices == devices}
        table.add_row(str(devices), *(_cell(row[bandwidth]) for bandwidth in bandwidths))
    return table


def _cell(case: Case) -> str:
    if case.plan is None:
        return "does not fit" if "does not fit" in case.why_not else "none"
    config = case.plan.config if len(case.plan.stages) <= 5 else f"{len(case.plan.stages)} stages"
    over = case.plan.speedup_vs_data_parallel
    return f"{config}  {case.plan.speedup_vs_one:.2f}x" + ("" if over is None else f" ({over:.2f}x)")


def what_if_report(cases: Sequence[Case]) -> list[dict[str, Any]]:
    """Return the what-if table as plain data."""
    return [
        {
            "devices": case.devices,
            "bandwidth": case.bandwidth,
            "config": case.plan.config if case.plan else None,
            "bottleneck_s": case.plan.bottleneck_s if case.plan else None,
            "speedup_vs_one": case.plan.speedup_vs_one if case.plan else None,
            "speedup_vs_dp": case.plan.speedup_vs_data_parallel if case.plan else None,
            "why_not": case.why_not or None,
        }
        for case in cases
    ]


def draw_what_if(cases: Sequence[Case], path: str | Path) -> None:
    """Plot the speed-up over one device against the number of devices as PNG, with data parallelism dashed.

    Raises:
        PipedreamError: no case has a plan.
    """
    if all(case.plan is None for case in cases):
        raise PipedreamError(f"there is no plan to draw: {cases[0].why_not}" if cases else "there is no plan to draw")

    from matplotlib import colormaps
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5.5), facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    axis = figure.add_subplot()
    bandwidths = sorted({case.bandwidth for case in cases})
    most = max(case.devices for case in cases)
    axis.plot([1, most], [1, most], color="#bbbbbb", linewidth=1, label="ideal")
    for index, bandwidth in enumerate(bandwidths):
        drawn = [case for case in cases if case.bandwidth == bandwidth and case.plan is not None]
        colour = colormaps["viridis"](0.85 * index / max(1, len(bandwidths) - 1))
        devices = [case.devices for case in drawn]
        plans = [case.plan for case in drawn if case.plan is not None]
        axis.plot(devices, [plan.speedup_vs_one for plan in plans], color=colour, marker="o", markersize=4,
                  label=f"{bandwidth / _GIGABIT:g} Gb/s")  # fmt: skip
        compared = [plan for plan in plans if plan.alternatives is not None and plan.alternatives.data_parallel_s]
        baseline = [p.single_device_s / p.alternatives.data_parallel_s for p in compared if p.alternatives is not None]
        axis.plot(devices[: len(baseline)], baseline, color=colour, linestyle=(0, (4, 3)), linewidth=1)
    axis.plot([], [], color="#666666", linestyle=(0, (4, 3)), linewidth=1, label="data parallelism")
    axis.set_xscale("log", base=2)
    axis.set_yscale("log", base=2)
    ticks = sorted({case.devices for case in cases})
    axis.set_xticks(ticks, [str(tick) for tick in ticks])
    axis.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axis.set_xlabel("devices")
    axis.set_ylabel("speed-up over one device")
    plan = next(case.plan for case in cases if case.plan is not None)
    axis.set_title(f"{plan.model}, {plan.minibatch} samples per minibatch", loc="left", fontweight="bold")
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)
    axis.legend(frameon=False)
    with atomic_write(path) as file:
        figure.savefig(file, format="png", dpi=130)


def _compared(reduction: float) -> str:
    """Format a reduction such as `85% less` or `1.6 times more`."""
    return f"{reduction:.0%} less" if reduction >= 0 else f"{-reduction:.1f} times more"
