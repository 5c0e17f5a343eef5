"""Session: what a person sees of a training run, and the files it leaves."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from pipedream_hpc.cluster.world import World
from pipedream_hpc.files import make_folder, write_json
from pipedream_hpc.observe import terminal
from pipedream_hpc.observe.metrics import bubble, minibatch_s, split
from pipedream_hpc.observe.tables import human_bytes, human_seconds, memory_table, plan_table, sent_bytes, split_table
from pipedream_hpc.observe.timeline import draw
from pipedream_hpc.observe.trace_file import save_trace
from pipedream_hpc.planning.plan import Plan
from pipedream_hpc.schedule.trace import Trace

if TYPE_CHECKING:
    from pipedream_hpc.cluster.device import Device
    from pipedream_hpc.runtime.footprint import Footprint
    from pipedream_hpc.runtime.route import Route


class Session:
    """Reports on rank 0 and is silent elsewhere: a progress bar on a terminal, plain lines in a log.

    Args:
        plan: what is run.
        out: folder for trace.json, timeline.png and summary.json.
        world: the ranks it runs on.
    """

    def __init__(self, plan: Plan, out: Path, world: World) -> None:
        self._plan, self._out, self._is_root = plan, out, world.is_root
        crowded = world.size > 1 and world.local_size > world.node_cores
        self._shared = f"{world.local_size} ranks share {world.node_cores} cores" if crowded else ""
        self._console = terminal.console(quiet=not world.is_root)
        if world.is_root:
            make_folder(out)
        self._began = time.perf_counter()
        self._accuracy: float | None = None
        self._loss = float("nan")
        self._epochs = 0
        self._epoch_s = 0.0
        self._console.print(plan_table(plan))

    def devices(self, devices: Sequence[Device], route: Route) -> None:
        """One line about the GPU of every rank, and one about how tensors get from one to another; none about CPUs."""
        for rank, device in enumerate(devices):
            if device.kind == "cuda":
                self._console.print(f"rank {rank}: {device}", highlight=False)
        if devices[0].kind == "cuda":
            gpus = len({device.uuid for device in devices})
            shared = "one GPU" if gpus == 1 else f"{gpus} GPUs"
            self._shared = f"{len(devices)} ranks share {shared}" if gpus < len(devices) else ""
        if route.words:
            self._console.print(f"between GPUs: {route.words}", highlight=False)

    def resumed(self, trained: int, wanted: int) -> None:
        """One line about what a checkpoint spares."""
        if not trained:
            self._console.print("there is no checkpoint yet: begins with epoch 0")
            return
        left = "nothing is left to do" if trained >= wanted else f"goes on with epoch {trained}"
        self._console.print(f"{trained} of {wanted} epochs are in the checkpoint: {left}")

    @contextmanager
    def epoch(self, number: int, minibatches: int) -> Iterator[Callable[[int, int], None]]:
        """Around one epoch of training; yields the callback for `Pipeline.fit`."""
        began = time.perf_counter()
        columns = (
            TextColumn("epoch {task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
        )
        shown = self._is_root and self._console.is_terminal
        with Progress(*columns, console=self._console, transient=True, disable=not shown) as progress:
            task = progress.add_task(str(number), total=minibatches)
            yield lambda done, _: progress.update(task, completed=done)
        self._epoch_s = time.perf_counter() - began

    def say(self, epoch: int, loss: float, accuracy: float | None) -> None:
        """One line about an epoch."""
        self._loss, self._accuracy, self._epochs = loss, accuracy, epoch + 1
        tested = "" if accuracy is None else f"  test accuracy {accuracy:.4f}"
        self._console.print(f"epoch {epoch}  loss {loss:.4f}{tested}  {self._epoch_s:.2f} s")

    def finish(self, trace: Trace | None, footprints: Sequence[Footprint] = ()) -> None:
        """Tables of the last epoch and of memory, and the files; without a trace, the summary alone."""
        if not self._is_root:
            return
        plan, finite = self._plan, math.isfinite(self._loss)
        sent = sum(sent_bytes(plan, stage) for stage in range(len(plan.stages)))
        summary: dict[str, Any] = {
            "test_accuracy": self._accuracy,
            "loss": self._loss if finite else None,  # JSON knows no NaN
            "epochs": self._epochs,
            "ranks": plan.ranks,
            "stages": len(plan.stages),
            "replicas": plan.config,
            "seconds": round(time.perf_counter() - self._began, 3),
            "predicted_minibatch_ms": round(plan.bottleneck_s * 1e3, 4) if plan.timed else None,
            "in_flight": [stage.in_flight for stage in plan.stages],
            "sent_bytes_per_minibatch": sent,
        }
        if footprints:
            summary["memory"] = [dataclasses.asdict(each) for each in footprints]
        written = ["summary.json"]
        if trace is not None:
            splits, per_minibatch = split(trace), minibatch_s(trace)
            summary["minibatch_ms"] = round(per_minibatch * 1e3, 4)
            summary["bubble"] = round(bubble(splits), 4)
            self._console.print(plan_table(plan, splits))
            self._console.print(split_table(splits))
            predicted = f"{human_seconds(plan.bottleneck_s)} predicted" if plan.timed else "nothing was predicted"
            self._console.print(
                f"{human_seconds(per_minibatch)} per minibatch measured in the steady state "
                f"({predicted}), {human_bytes(sent)} sent per minibatch, "
                f"bubble {bubble(splits):.1%}"
            )
            if self._shared and plan.timed:
                self._console.print(f"{self._shared}: predictions take every rank to have its own, so expect more")
            save_trace(trace, self._out / "trace.json")
            draw(trace, self._out / "timeline.png")
            written = ["trace.json (opens in Perfetto)", "timeline.png", *written]
        if footprints:
            self._console.print(memory_table(footprints))
        write_json(self._out / "summary.json", summary)
        self._console.print(f"written to {self._out}: {', '.join(written)}")
