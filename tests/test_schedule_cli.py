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

#: Four stages on two ranks.
INTERLEAVED = ["--schedule", "interleaved", "--chunks", 2]


@pytest.fixture
def simulate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Simulate:
    """Run `pipedream simulate` on four equal stages, 1 ms forward and 2 ms backward; return what it printed."""
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
        # Parameters take 4 MB per version, activations 250 kB per minibatch.
        (["--schedule", "1f1b"], "3 ms", "4, 3, 2, 1", "17.0 MB, 12.8 MB, 8.5 MB, 4.2 MB"),
        (["--schedule", "vertical-sync"], "3 ms", "4, 4, 4, 4", "17.0 MB, 16.8 MB, 16.5 MB, 16.2 MB"),
        # (4 + 3) / 4 of 3 ms: the bubble.
        (["--schedule", "gpipe", "--n-microbatches", 4], "5.25 ms", "1, 1, 1, 1", "4.2 MB, 4.2 MB, 4.2 MB, 4.2 MB"),
        (["--schedule", "2bw", "--n-microbatches", 8], "3 ms", "2, 2, 2, 2", "8.1 MB, 8.1 MB, 8.1 MB, 8.0 MB"),
        (["--schedule", "model-parallel"], "12 ms", "1, 1, 1, 1", "4.2 MB, 4.2 MB, 4.2 MB, 4.2 MB"),
        # Two ranks of two stages each: (2·4 + 1) / 8 of their 6 ms.
        (
            ["--schedule", "interleaved", "--chunks", 2, "--n-microbatches", 4],
            "6.75 ms",
            "1, 1, 1, 1",
            "8.4 MB, 8.2 MB",
        ),
    ],
)
def test_schedules(simulate: Simulate, words: list[object], per_minibatch: str, versions: str, memory: str) -> None:
    output = simulate(*words)
    assert f"{per_minibatch} per minibatch in the steady state" in output
    assert f"weight versions per stage: {versions}\n" in output
    assert re.search(rf"most memory of weights and activations per (stage|rank): {re.escape(memory)}\n", output)


def test_an_interleaved_trace_comes_back_and_is_drawn(simulate: Simulate) -> None:
    simulate(
        "--schedule", "interleaved", "--chunks", 2, "--n-microbatches", 4, "--png", "a.png", "--memory-png", "b.png"
    )
    trace = load_trace("predicted.json")
    assert trace.layout == ((0,), (1,), (0,), (1,))
    assert {(span.rank, span.stage) for span in trace.spans} == {(0, 0), (1, 1), (0, 2), (1, 3)}
    assert trace.label(1) == "rank 1 (stages 1, 3)"
    assert all(Path(name).read_bytes().startswith(b"\x89PNG") for name in ("a.png", "b.png"))


def test_a_straggler_and_a_topology(simulate: Simulate) -> None:
    assert "4.5 ms per minibatch" in simulate("--slow", "3=1.5")
    assert "6 ms per minibatch" in simulate("--slow", "3=1.5", "--slow", "0=2")
    # 250 kB at 25 MB/s take 10 ms, each way; node pairs are joined by one adapter each. Minibatches leave after 10 ms,
    # which the link takes, and 16 ms, in turn: then stage 1 has no other forward until a gradient comes back.
    save(machine((2, 0.0, 1e12), (2, 0.0, 25e6)), "topology.json")
    assert "13 ms per minibatch" in simulate("--topology", "topology.json", "--minibatches", 40)


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["--slow", "3"], "--slow should be RANK=TIMES, such as 3=1.5, not '3'"),
        (["--slow", "9=2"], "rank 9 cannot be 2 times as slow: name ranks 0 to 3, times from 0 to 1e9"),
        (["--schedule", "zigzag"], "there is no schedule 'zigzag': choose from 1f1b"),
        (["--n-microbatches", 4], "1f1b passes whole minibatches and does not cut them into 4 microbatches"),
        (["--schedule", "2bw"], "2bw needs at least 3 microbatches per minibatch on 1-1-1-1 ranks, not 1"),
        (["--schedule", "data-parallel"], "the plan has 4 stages"),
    ],
)
def test_what_is_refused(simulate: Simulate, words: list[object], complaint: str) -> None:
    with pytest.raises(PipedreamError) as caught:
        simulate(*words)
    assert complaint in str(caught.value)


def test_a_schedule_goes_to_a_file_and_comes_back(simulate: Simulate) -> None:
    text = simulate("--schedule", "zb-h1", "--n-microbatches", 4, "--minibatches", 2, "--text")
    assert text.startswith("pipedream-schedule 1\nlayout 0 | 1 | 2 | 3\nn_microbatches 4\nrank 0: 0F0v0 0SEND_F0>1r1 ")
    assert not Path("predicted.json").exists(), "nothing was simulated"
    Path("my.schedule").write_text(text)
    # Repeated ten times: 20 minibatches, which is what simulations run by default.
    assert simulate("--schedule", "my.schedule") == simulate("--schedule", "zb-h1", "--n-microbatches", 4)
    assert load_trace("predicted.json").total_microbatches == 80
    assert simulate("--schedule", "my.schedule", "--minibatches", 2, "--text") == text


def test_a_file_is_proved_before_it_is_simulated(simulate: Simulate) -> None:
    text = simulate("--minibatches", 3, "--text")
    Path("my.schedule").write_text(text.replace("2B0v0l 2SEND_B0>1r1 2STEP1n1", "2B0v0l 2STEP1n1 2SEND_B0>1r2"))
    with pytest.raises(PipedreamError, match=r"my.schedule, line 6, column \d+: '2SEND_B0>1r2': stage 1 is not on"):
        simulate("--schedule", "my.schedule")
    Path("my.schedule").write_text(text.replace("2B0v0l", "2B0v0"))
    with pytest.raises(PipedreamError, match=r"rank 2 \(stage 2\) at 2STEP1n1 .*: no backward of round 0 is marked as"):
        simulate("--schedule", "my.schedule")
    Path("my.schedule").write_text(text)
    with pytest.raises(PipedreamError, match=r"describes 3 minibatches and cannot be repeated for 4: use a multiple"):
        simulate("--schedule", "my.schedule", "--minibatches", 4)
    with pytest.raises(PipedreamError, match=r"my.schedule says itself which stages a rank holds: leave chunks out"):
        simulate("--schedule", "my.schedule", "--chunks", 2)


def test_split_backwards_are_in_the_trace(simulate: Simulate) -> None:
    numbers = ("--n-microbatches", 4, "--minibatches", 2)
    simulate("--schedule", "zb-h1", *numbers, "--png", "zb-h1.png")
    trace = load_trace("predicted.json")
    for kind in ("backward-input", "backward-weight"):
        split = [span.stage for span in trace.spans if span.kind == kind]
        assert [split.count(stage) for stage in range(4)] == [0, 8, 8, 8]
    assert Path("zb-h1.png").stat().st_size > 1000
    simulate("--schedule", "1f1b-flush", *numbers)
    assert not [span for span in load_trace("predicted.json").spans if span.kind == "backward-weight"]
