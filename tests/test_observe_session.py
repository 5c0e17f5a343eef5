"""What a training run leaves behind."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pictures
import pytest

from pipedream_hpc.cluster.world import World
from pipedream_hpc.observe.session import Session
from pipedream_hpc.observe.trace_file import load_trace
from pipedream_hpc.planning.plan import COUNTED

ROOT = World(rank=0, size=2, local_rank=0, local_size=2, host="here", cpusets=(frozenset(range(2)),) * 2)

RUN = """
    rank 0  F0 F1 .  .  B0 B0 U  B1 B1 U
    rank 1  .  F0 B0 B0 F1 B1 B1 .  .  .
    """


def run(session: Session, *, loss: float = 0.25) -> None:
    with session.epoch(0, 2) as on_minibatch:
        on_minibatch(1, 2)
        on_minibatch(2, 2)
    session.say(0, loss, 0.9)


def test_counted_operations_are_no_prediction(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    session = Session(dataclasses.replace(pictures.plan(1, 1), notes=(COUNTED,)), tmp_path, ROOT)
    run(session)
    session.finish(pictures.trace(RUN))
    assert json.loads((tmp_path / "summary.json").read_text())["predicted_minibatch_ms"] is None
    assert "(nothing was predicted)" in " ".join(capsys.readouterr().out.split())


def test_files_and_tables(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    session = Session(pictures.plan(1, 1), tmp_path, ROOT)
    run(session)
    session.finish(pictures.trace(RUN))
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert (summary["test_accuracy"], summary["loss"], summary["epochs"]) == (0.9, 0.25, 1)
    assert (summary["ranks"], summary["stages"], summary["in_flight"]) == (2, 2, [2, 1])
    assert summary["minibatch_ms"] == pytest.approx(3)
    assert summary["predicted_minibatch_ms"] == pytest.approx(3)
    assert summary["sent_bytes_per_minibatch"] == 500_000
    assert load_trace(tmp_path / "trace.json").minibatches == 2
    assert (tmp_path / "timeline.png").read_bytes().startswith(b"\x89PNG")
    output = capsys.readouterr().out
    assert "epoch 0  loss 0.2500  test accuracy 0.9000" in output
    assert "measured" in output
    assert "\x1b" not in output


def test_without_a_trace_there_is_a_summary(tmp_path: Path) -> None:
    session = Session(pictures.plan(1, 1), tmp_path, ROOT)
    run(session, loss=float("nan"))
    session.finish(None)
    assert [path.name for path in tmp_path.iterdir()] == ["summary.json"]
    assert json.loads((tmp_path / "summary.json").read_text())["loss"] is None


def test_other_ranks_are_silent(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    session = Session(pictures.plan(1, 1), tmp_path, dataclasses.replace(ROOT, rank=1))
    run(session)
    session.finish(pictures.trace(RUN))
    assert capsys.readouterr() == ("", "")
    assert not list(tmp_path.iterdir())


def test_says_when_ranks_share_cores(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Predictions are for a core per rank: without the word, a laptop's figures look like a bug."""
    for cores, said in ((2, False), (1, True)):
        session = Session(pictures.plan(1, 1), tmp_path, dataclasses.replace(ROOT, cpusets=(frozenset(range(cores)),)))
        run(session)
        session.finish(pictures.trace(RUN))
        assert ("2 ranks share 1 cores" in capsys.readouterr().out) == said
