"""RunReporter: the terminal output and the files of a training run."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
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
    from pipedream_hpc.runtime.comm.gpu_route import Route
    from pipedream_hpc.runtime.pipeline import Step
    from pipedream_hpc.runtime.state.memory_report import MemoryReport


class RunReporter:
    """Reports a training run on rank 0: a progress bar on a terminal, plain lines in a log. Silent on other ranks.

    Args:
        plan: the plan that is run.
        out: folder for trace.json, timeline.png and summary.json.
        world: the ranks of the job.
    """

    def __init__(self, plan: Plan, out: Path, world: World) -> None:
        self._plan, self._out, self._is_root = plan, out, world.is_root
        oversubscribed = world.size > 1 and world.local_size > world.node_cores
        self._shared = f"{world.local_size} ranks share {world.node_cores} cores" if oversubscribed else ""
        self._console = terminal.console(quiet=not world.is_root)
        if world.is_root:
            make_folder(out)
        self._began = time.perf_counter()
        self._scores: dict[str, float] = {}
        self._loss = float("nan")
        self._epochs = 0
        self._epoch_s = 0.0
        self._console.print(plan_table(plan))

    def report_devices(self, devices: Sequence[Device], route: Route) -> None:
        """Print the GPU of every rank, and how tensors travel between GPUs; nothing for CPUs."""
        for rank, device in enumerate(devices):
            if device.kind == "cuda":
                self._console.print(f"rank {rank}: {device}", highlight=False)
        if devices[0].kind == "cuda":
            gpus = len({device.uuid for device in devices})
            shared = "one GPU" if gpus == 1 else f"{gpus} GPUs"
            self._shared = f"{len(devices)} ranks share {shared}" if gpus < len(devices) else ""
        if route.description:
            self._console.print(f"between GPUs: {route.description}", highlight=False)

    def report_resume(self, trained: int, epochs: int) -> None:
        """Print how many of the epochs the checkpoint has, and where training continues."""
        if not trained:
            self._console.print("there is no checkpoint yet: starting with epoch 0")
            return
        next_step = "nothing left to train" if trained >= epochs else f"continuing with epoch {trained}"
        self._console.print(f"the checkpoint has {trained} of {epochs} epochs: {next_step}")

    @contextmanager
    def epoch_progress(self, number: int, loader: Any) -> Iterator[Callable[[Step], None] | None]:
        """Show the progress of one epoch; yield the callback for `Pipeline.fit`, None where nothing is shown."""
        began = time.perf_counter()
        if not (self._is_root and self._console.is_terminal):
            yield None
        else:
            columns = (TextColumn("epoch {task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
            with Progress(*columns, console=self._console, transient=True) as progress:
                task = progress.add_task(str(number), total=len(loader))
                yield lambda step: progress.update(task, completed=step.index + 1)
        self._epoch_s = time.perf_counter() - began

    def report_epoch(self, epoch: int, loss: float, scores: Mapping[str, float]) -> None:
        """Print one line about an epoch."""
        self._loss, self._scores, self._epochs = loss, dict(scores), epoch + 1
        tested = "".join(f"  test {name} {score:.4f}" for name, score in scores.items())
        self._console.print(f"epoch {epoch}  loss {loss:.4f}{tested}  {self._epoch_s:.2f} s")

    def finish(self, trace: Trace | None, memory_reports: Sequence[MemoryReport] = ()) -> None:
        """Print tables of the last epoch and of memory, and write the files; without a trace only summary.json."""
        if not self._is_root:
            return
        plan, finite = self._plan, math.isfinite(self._loss)
        sent = sum(sent_bytes(plan, stage) for stage in range(len(plan.stages)))
        summary: dict[str, Any] = {
            "test": self._scores,
            "loss": self._loss if finite else None,  # JSON has no NaN
            "epochs": self._epochs,
            "ranks": plan.ranks,
            "stages": len(plan.stages),
            "replicas": plan.config,
            "seconds": round(time.perf_counter() - self._began, 3),
            "predicted_minibatch_ms": round(plan.bottleneck_s * 1e3, 4) if plan.timed else None,
            "in_flight": [stage.in_flight for stage in plan.stages],
            "sent_bytes_per_minibatch": sent,
        }
        if memory_reports:
            summary["memory"] = [dataclasses.asdict(each) for each in memory_reports]
        files = ["summary.json"]
        if trace is not None:
            splits, per_minibatch = split(trace), minibatch_s(trace)
            summary["minibatch_ms"] = round(per_minibatch * 1e3, 4)
            summary["bubble"] = round(bubble(splits), 4)
            self._console.print(plan_table(plan, splits))
            self._console.print(split_table(splits))
            predicted = f"{human_seconds(plan.bottleneck_s)} predicted" if plan.timed else "no prediction"
            self._console.print(
                f"{human_seconds(per_minibatch)} per minibatch measured in the steady state "
                f"({predicted}), {human_bytes(sent)} sent per minibatch, "
                f"bubble {bubble(splits):.1%}"
            )
            if self._shared and plan.timed:
                self._console.print(
                    f"{self._shared}: the prediction assumes one per rank, so expect longer measured times"
                )
            save_trace(trace, self._out / "trace.json")
            draw(trace, self._out / "timeline.png")
            files = ["trace.json (opens in Perfetto)", "timeline.png", *files]
        if memory_reports:
            self._console.print(memory_table(memory_reports))
        write_json(self._out / "summary.json", summary)
        self._console.print(f"written to {self._out}: {', '.join(files)}")
