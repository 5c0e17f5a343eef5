"""Tables: a profile, a topology, a plan, measured times, memory and the result of verification."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.table import Table

from pipedream_hpc.observe.metrics import RankSplit
from pipedream_hpc.planning.memory import MemoryParts
from pipedream_hpc.planning.plan import Plan
from pipedream_hpc.planning.profile import Profile
from pipedream_hpc.planning.topology import Topology

if TYPE_CHECKING:
    from pipedream_hpc.runtime.state.memory_report import MemoryReport
    from pipedream_hpc.verification.comparison import Verdict


def human_bytes(count: float) -> str:
    """Format bytes such as `1.5 MB`, in powers of 1000."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" or count >= 100 else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def human_seconds(seconds: float) -> str:
    """Format seconds such as `2.31 ms`."""
    if seconds >= 100:
        return f"{seconds:.0f} s"
    unit, scale = next((u, k) for u, k in (("s", 1.0), ("ms", 1e3), ("µs", 1e6)) if seconds * k >= 0.9995 or u == "µs")
    return f"{seconds * scale:.3g} {unit}"


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left")
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index < 2 else "right")
    return table


def profile_table(profile: Profile) -> Table:
    """Return a table with one row per layer."""
    title = f"{profile.model} on {profile.device}, {profile.minibatch} samples per minibatch"
    table = _table(title, "layer", "kind", "forward", "backward", "output", "parameters", "stash")
    for layer in profile.layers:
        table.add_row(
            layer.name,
            layer.kind,
            human_seconds(layer.forward_s),
            human_seconds(layer.backward_s),
            human_bytes(layer.output_bytes),
            human_bytes(layer.parameter_bytes),
            human_bytes(layer.stash_bytes),
        )
    return table


def topology_table(topology: Topology) -> Table:
    """Return a table with one row per level; its caption counts the ranks' hosts and devices, where known."""
    table = _table(f"{topology.devices} devices ({topology.device})", "level", "joins", "latency", "bandwidth",
                   "all-reduce latency", "all-reduce bandwidth")  # fmt: skip
    for level in topology.levels:
        latency_s, bandwidth = level.reduce_latency_s, level.reduce_bandwidth
        table.add_row(
            level.name,
            str(level.count),
            human_seconds(level.latency_s),
            f"{human_bytes(level.bandwidth)}/s",
            "-" if latency_s is None else human_seconds(latency_s),
            "-" if bandwidth is None else f"{human_bytes(bandwidth)}/s",
        )
    known = (("hosts", topology.hosts), ("devices", topology.devices_of))
    table.caption = "\n".join(f"{what}: {_counted(names)}" for what, names in known if names) or None
    table.caption_justify = "left"
    return table


def _counted(names: tuple[str, ...], most: int = 4) -> str:
    """Format counts such as `4 x node1, 4 x node2`, in order of appearance, with at most `most` names."""
    counts = Counter(names)
    shown = [f"{count} x {name}" for name, count in list(counts.items())[:most]]
    others = f", and {len(counts) - most} more" if len(counts) > most else ""
    return ", ".join(shown) + others


def plan_table(plan: Plan, measured: list[RankSplit] | None = None) -> Table:
    """Return a table with one row per stage; with `measured` it also has the measured time per minibatch."""
    title = f"{plan.model}: {len(plan.stages)} stages on {plan.ranks} ranks ({plan.config}), {plan.schedule}"
    compute = ["predicted"] if measured is None else ["predicted", "measured"]
    table = _table(title, "stage", "layers", "ranks", *compute, "in flight", "parameters", "sent", "limit")
    for index, stage in enumerate(plan.stages):
        first, last = stage.layers[0], stage.layers[-1]
        times = [human_seconds(stage.forward_s + stage.backward_s) if plan.timed else "-"]
        if measured is not None:
            own = [each for each in measured if index in each.stages]
            times.append(
                human_seconds(plan.n_microbatches * sum(each.forward_s + each.backward_s for each in own) / len(own))
            )
        table.add_row(
            str(index),
            f"{first} … {last} ({len(stage.layers)})" if first != last else first,
            ", ".join(map(str, stage.ranks)),
            *times,
            str(stage.in_flight),
            human_bytes(stage.parameter_bytes),
            human_bytes(sent_bytes(plan, index)),
            stage.limit,
        )
    return table


def sent_bytes(plan: Plan, stage: int) -> int:
    """Return the bytes that a stage sends per minibatch: its activations, and the gradient of its input."""
    forth = plan.stages[stage].output_bytes if stage + 1 < len(plan.stages) else 0
    back = plan.stages[stage - 1].output_bytes if stage > 0 else 0
    return forth + back


def split_table(splits: list[RankSplit]) -> Table:
    """Return a table with one row per rank: how it spent its time."""
    table = _table("time per rank", "rank", "stage", "forward", "backward", "update", "reduce", "wait",
                   "send", "idle", "busy")  # fmt: skip
    for each in splits:
        kinds = (
            ("forward",),
            ("backward", "backward-input", "backward-weight"),
            ("optimizer-step",),
            ("reduce-gradients",),
            ("recv", "all-reduce-grad-norm"),
            ("send",),
            ("idle",),
        )
        shares = [
            f"{sum(each.seconds[kind] for kind in together) / each.span_s:.1%}" if each.span_s else "-"
            for together in kinds
        ]
        table.add_row(str(each.rank), ", ".join(map(str, each.stages)), *shares, f"{each.busy:.1%}")
    return table


def memory_table(memory_reports: Sequence[MemoryReport]) -> Table:
    """Return a table with two rows per rank: planned and measured memory."""
    table = _table("memory", "rank", "", *MemoryParts.PARTS, "sum", "peak")
    for each in memory_reports:
        for what, parts in (("planned", each.planned), ("measured", each.measured)):
            if parts is None:
                continue
            peak = "-" if each.peak_bytes is None or what == "planned" else human_bytes(each.peak_bytes)
            sizes = [human_bytes(getattr(parts, name)) for name in MemoryParts.PARTS]
            table.add_row(str(each.rank), what, *sizes, human_bytes(parts.total), peak)
    known = sorted({each.before_bytes for each in memory_reports if each.before_bytes is not None})
    if known:
        before = " to ".join(human_bytes(size) for size in dict.fromkeys((known[0], known[-1])))
        table.caption = f"peak of the process or its GPU; {before} of it were in use before the first minibatch"
        table.caption_justify = "left"
    return table


def verdict_table(verdict: Verdict) -> Table:
    """Return a table with one row per kind of tensor that was compared."""
    table = _table(
        "pipelined training compared with the reference", "compared", "tensors", "differ", "largest difference"
    )
    for kind, count in verdict.compared.items():
        differences = [each for each in verdict.differences if each.kind == kind]
        largest = f"{max(each.relative for each in differences):.2g} of the largest value" if differences else "-"
        table.add_row({"loss": "losses"}.get(kind, f"{kind}s"), str(count), str(len(differences)), largest)
    return table
