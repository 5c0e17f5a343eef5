"""The terminal output and the files of a training run."""

from __future__ import annotations

import dataclasses
import io
import json
from pathlib import Path

import pictures
import pytest
from rich.console import Console

from pipedream_hpc import Step
from pipedream_hpc.cluster.device import Device
from pipedream_hpc.cluster.world import World
from pipedream_hpc.observe import terminal
from pipedream_hpc.observe.run_reporter import RunReporter
from pipedream_hpc.observe.trace_file import load_trace
from pipedream_hpc.planning.memory import MemoryParts
from pipedream_hpc.planning.plan import COUNTED
from pipedream_hpc.runtime.comm.gpu_route import Route
from pipedream_hpc.runtime.state.memory_report import MemoryReport

ROOT = World(rank=0, size=2, local_rank=0, local_size=2, host="here", cpusets=(frozenset(range(2)),) * 2)

RUN = """
    rank 0  F0 F1 .  .  B0 B0 U  B1 B1 U
    rank 1  .  F0 B0 B0 F1 B1 B1 .  .  .
    """


def run(reporter: RunReporter, *, loss: float = 0.25) -> None:
    with reporter.epoch_progress(0, [None] * 2) as on_step:
        assert on_step is None, "only a terminal shows progress"
    reporter.report_epoch(0, loss, {"accuracy": 0.9, "top-5": 0.95})


def test_counted_operations_are_no_prediction(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    reporter = RunReporter(dataclasses.replace(pictures.plan(1, 1), notes=(COUNTED,)), tmp_path, ROOT)
    run(reporter)
    reporter.finish(pictures.trace(RUN))
    assert json.loads((tmp_path / "summary.json").read_text())["predicted_minibatch_ms"] is None
    assert "(no prediction)" in " ".join(capsys.readouterr().out.split())


def test_files_and_tables(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    reporter = RunReporter(pictures.plan(1, 1), tmp_path, ROOT)
    run(reporter)
    reporter.finish(pictures.trace(RUN))
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert (summary["test"], summary["loss"], summary["epochs"]) == ({"accuracy": 0.9, "top-5": 0.95}, 0.25, 1)
    assert (summary["ranks"], summary["stages"], summary["in_flight"]) == (2, 2, [2, 1])
    assert summary["minibatch_ms"] == pytest.approx(3)
    assert summary["predicted_minibatch_ms"] == pytest.approx(3)
    assert summary["sent_bytes_per_minibatch"] == 500_000
    assert load_trace(tmp_path / "trace.json").total_microbatches == 2
    assert (tmp_path / "timeline.png").read_bytes().startswith(b"\x89PNG")
    output = capsys.readouterr().out
    assert "epoch 0  loss 0.2500  test accuracy 0.9000  test top-5 0.9500" in output
    assert "measured" in output
    assert "\x1b" not in output


def test_progress_on_a_terminal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The callback of `Pipeline.fit` moves the bar; it is gone when the epoch is over."""
    shown = io.StringIO()
    monkeypatch.setattr(terminal, "console", lambda **_: Console(file=shown, force_terminal=True, width=100))
    reporter = RunReporter(pictures.plan(1, 1), tmp_path, ROOT)
    with reporter.epoch_progress(3, [None] * 4) as on_step:
        assert on_step is not None
        for index in range(4):
            on_step(Step(index, 0.1, 10.0, lambda _: 0.5))
    assert "epoch 3" in shown.getvalue()
    assert "4/4" in shown.getvalue()


def test_gpus_are_listed_and_shared_ones_noted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Two ranks on one GPU take turns: longer times than predicted are no mistake."""
    reporter = RunReporter(pictures.plan(1, 1), tmp_path, ROOT)
    devices = [Device("cuda", "n1", 0, "H200", "GPU-1") for _ in range(2)]
    reporter.report_devices(devices, Route(staged=True, description="through host memory"))
    run(reporter)
    reporter.finish(pictures.trace(RUN))
    output = " ".join(capsys.readouterr().out.split())
    assert "rank 1: GPU 0 of node n1, H200" in output
    assert "between GPUs: through host memory" in output
    assert "2 ranks share one GPU: the prediction assumes one per rank" in output


def test_memory_is_shown_and_saved(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    reporter = RunReporter(pictures.plan(1, 1), tmp_path, ROOT)
    run(reporter)
    parts = MemoryParts(weights=4_000_000, gradients=0, optimizer=0, activations=0, slots=0)
    reporter.finish(None, [MemoryReport(0, (0,), "CPU of node n1", None, parts)])
    (saved,) = json.loads((tmp_path / "summary.json").read_text())["memory"]
    assert (saved["rank"], saved["planned"], saved["measured"]["weights"]) == (0, None, 4_000_000)
    assert "measured" in capsys.readouterr().out


def test_without_a_trace_only_the_summary_is_written(tmp_path: Path) -> None:
    reporter = RunReporter(pictures.plan(1, 1), tmp_path, ROOT)
    run(reporter, loss=float("nan"))
    reporter.finish(None)
    assert [path.name for path in tmp_path.iterdir()] == ["summary.json"]
    assert json.loads((tmp_path / "summary.json").read_text())["loss"] is None


def test_other_ranks_are_silent(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    reporter = RunReporter(pictures.plan(1, 1), tmp_path, dataclasses.replace(ROOT, rank=1))
    run(reporter)
    reporter.finish(pictures.trace(RUN))
    assert capsys.readouterr() == ("", "")
    assert not list(tmp_path.iterdir())


def test_the_report_mentions_that_ranks_share_cores(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Predictions assume a core per rank: without the note, measured times on a laptop look like a bug."""
    for cores, noted in ((2, False), (1, True)):
        reporter = RunReporter(
            pictures.plan(1, 1), tmp_path, dataclasses.replace(ROOT, cpusets=(frozenset(range(cores)),))
        )
        run(reporter)
        reporter.finish(pictures.trace(RUN))
        assert ("2 ranks share 1 cores" in capsys.readouterr().out) == noted


@pytest.mark.parametrize(
    ("trained", "line"),
    [
        (0, "there is no checkpoint yet: starting with epoch 0"),
        (2, "the checkpoint has 2 of 3 epochs: continuing with epoch 2"),
        (3, "the checkpoint has 3 of 3 epochs: nothing left to train"),
    ],
)
def test_a_resumed_run_reports_where_it_continues(
    trained: int, line: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    reporter = RunReporter(pictures.plan(1, 1), tmp_path, ROOT)
    reporter.report_resume(trained, 3)
    assert line in capsys.readouterr().out
