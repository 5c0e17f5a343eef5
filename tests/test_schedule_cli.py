"""`pipedream simulate` with the options that choose schedule and machine."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pictures
import pytest
from schedules import machine
from typer.testing import CliRunner

from pipedream_hpc.cli import app
from pipedream_hpc.errors import PipedreamError
from pipedream_hpc.files import save
from pipedream_hpc.observe.trace_file import load_trace

Simulate = Callable[..., str]


@pytest.fixture
def simulate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Simulate:
    """Run `pipedream simulate` on four equal stages, 1 ms forward and 2 ms backward; what it printed."""
    monkeypatch.chdir(tmp_path)
    save(pictures.plan(1, 1, 1, 1), "plan.json")

    def run(*words: object) -> str:
        result = CliRunner().invoke(app, ["simulate", "plan.json", *map(str, words)], catch_exceptions=False)
        assert result.exit_code == 0, result.output
        return re.sub(r"\x1b\[[0-9;]*m", "", result.output)

    return run


@pytest.mark.parametrize(
    ("words", "per_minibatch", "versions", "memory"),
    [
        # Parameters are 4 MB a version, activations 250 kB a minibatch.
        (["--schedule", "1f1b"], "3 ms", "4, 3, 2, 1", "17.0 MB, 12.8 MB, 8.5 MB, 4.2 MB"),
        (["--schedule", "vertical-sync"], "3 ms", "4, 4, 4, 4", "17.0 MB, 16.8 MB, 16.5 MB, 16.2 MB"),
        # (4 + 3) / 4 of 3 ms: the bubble.
        (["--schedule", "gpipe", "--microbatches", 4], "5.25 ms", "1, 1, 1, 1", "4.2 MB, 4.2 MB, 4.2 MB, 4.2 MB"),
        (["--schedule", "2bw", "--microbatches", 8], "3 ms", "2, 2, 2, 2", "8.1 MB, 8.1 MB, 8.1 MB, 8.0 MB"),
        (["--schedule", "model-parallel"], "12 ms", "1, 1, 1, 1", "4.2 MB, 4.2 MB, 4.2 MB, 4.2 MB"),
        # Two ranks of two stages each: (2·4 + 1) / 8 of their 6 ms.
        (["--schedule", "interleaved", "--chunks", 2, "--microbatches", 4], "6.75 ms", "1, 1, 1, 1", "8.4 MB, 8.2 MB"),
    ],
)
def test_schedules(simulate: Simulate, words: list[object], per_minibatch: str, versions: str, memory: str) -> None:
    output = simulate(*words)
    assert f"{per_minibatch} per minibatch in the steady state" in output
    assert f"weight versions per stage: {versions}\n" in output
    assert re.search(rf"most memory of weights and activations per (stage|rank): {re.escape(memory)}\n", output)


def test_an_interleaved_trace_comes_back_and_is_drawn(simulate: Simulate) -> None:
    simulate("--schedule", "interleaved", "--chunks", 2, "--microbatches", 4, "--png", "a.png", "--memory-png", "b.png")
    trace = load_trace("predicted.json")
    assert trace.layout == ((0,), (1,), (0,), (1,))
    assert {(span.rank, span.stage) for span in trace.spans} == {(0, 0), (1, 1), (0, 2), (1, 3)}
    assert trace.label(1) == "rank 1 (stages 1, 3)"
    assert all(Path(name).read_bytes().startswith(b"\x89PNG") for name in ("a.png", "b.png"))


def test_a_straggler_and_a_topology(simulate: Simulate) -> None:
    assert "4.5 ms per minibatch" in simulate("--slow", "3=1.5")
    assert "6 ms per minibatch" in simulate("--slow", "3=1.5", "--slow", "0=2")
    # 250 kB at 25 MB/s take 10 ms, each way; node pairs are joined by one adapter each.
    save(machine((2, 0.0, 1e12), (2, 0.0, 25e6)), "topology.json")
    assert "10 ms per minibatch" in simulate("--topology", "topology.json", "--minibatches", 40)


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["--slow", "3"], "--slow should be RANK=TIMES, such as 3=1.5, not '3'"),
        (["--slow", "9=2"], "rank 9 cannot be 2 times as slow: name ranks 0 to 3, times from 0 to 1e9"),
        (["--schedule", "zigzag"], "there is no schedule 'zigzag': choose from 1f1b"),
        (["--microbatches", 4], "1f1b sends whole minibatches, not 4 microbatches of each"),
        (["--schedule", "2bw"], "2bw needs at least 3 microbatches to a minibatch on 1-1-1-1 ranks, not 1"),
        (["--schedule", "data-parallel"], "the plan has 4 stages"),
    ],
)
def test_what_is_refused(simulate: Simulate, words: list[object], complaint: str) -> None:
    with pytest.raises(PipedreamError) as caught:
        simulate(*words)
    assert complaint in str(caught.value)


def test_split_backwards_are_in_the_trace(simulate: Simulate) -> None:
    flush = ("--schedule", "1f1b-flush", "--microbatches", 4, "--minibatches", 2, "-o", "flush.json")
    simulate(*flush, "--split-backward", "--png", "flush.png")
    trace = load_trace("flush.json")
    late = [span for span in trace.spans if span.kind == "weight-gradient"]
    assert {stage: sum(span.stage == stage for span in late) for stage in range(4)} == {0: 0, 1: 8, 2: 8, 3: 8}
    assert Path("flush.png").stat().st_size > 1000
    simulate(*flush)
    assert not [span for span in load_trace("flush.json").spans if span.kind == "weight-gradient"]


def test_other_schedules_cannot_be_simulated_so(simulate: Simulate) -> None:
    with pytest.raises(
        PipedreamError, match="2bw runs backwards whole: leave split_backward away, or use 1f1b-flush or gpipe"
    ):
        simulate("--schedule", "2bw", "--microbatches", 4, "--split-backward")
