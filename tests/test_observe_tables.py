"""Tables show the figures of plans and traces in readable units."""

from __future__ import annotations

from dataclasses import replace

import pictures
import pytest
from rich.console import Console
from rich.table import Table

from pipedream_hpc.observe import terminal
from pipedream_hpc.observe.metrics import split
from pipedream_hpc.observe.tables import (
    human_bytes,
    human_seconds,
    plan_table,
    sent_bytes,
    split_table,
)


def text(table: Table) -> str:
    """Return `table` as a batch log shows it."""
    console = Console(width=160, markup=False)
    with console.capture() as captured:
        console.print(table)
    return captured.get()


@pytest.mark.parametrize(
    ("count", "shown"),
    [(0, "0 B"), (999, "999 B"), (1000, "1.0 kB"), (123_456, "123 kB"), (4_200_000, "4.2 MB"), (3e15, "3000.0 TB")],
)
def test_bytes(count: float, shown: str) -> None:
    assert human_bytes(count) == shown


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [(0, "0 µs"), (2.5e-6, "2.5 µs"), (0.00231, "2.31 ms"), (0.9999, "1 s"), (1.25, "1.25 s"), (1234, "1234 s")],
)
def test_seconds(seconds: float, shown: str) -> None:
    assert human_seconds(seconds) == shown


def test_a_plan_with_measured_times() -> None:
    plan = pictures.plan(1, 1)
    measured = split(
        pictures.trace(
            """
            rank 0  F0 .  .  .  .  B0 B0 B0
            rank 1  .  F0 F0 B0 B0 .  .  .
            """
        )
    )
    first, second = (line for line in text(plan_table(plan, measured)).splitlines() if "block" in line)
    # predicted 1 + 2 ms each; measured 1 + 3 and 2 + 2
    for cell in ("block0[a] … block0[b] (2)", "3 ms", "4 ms", " 2 ", "4.0 MB", "250 kB", "compute"):
        assert cell in first
    assert "4 ms" in second
    # Times of microbatches are multiplied by their number per minibatch.
    thirds = [
        line for line in text(plan_table(replace(plan, n_microbatches=3), measured)).splitlines() if "block" in line
    ]
    assert ["12 ms" in line for line in thirds] == [True, True]


def test_sent_bytes_are_activations_and_input_gradients() -> None:
    plan = pictures.plan(1, 1, 1)
    assert [sent_bytes(plan, stage) for stage in range(3)] == [250_000, 500_000, 250_000]


def test_the_percentages_of_a_rank_add_up_to_100() -> None:
    table = text(split_table(split(pictures.trace("rank 0  F0 S0 R0 R0 B0 B0 B0 U  .  .\nrank 1  " + "F0 " * 10))))
    row = next(line for line in table.splitlines() if "10.0%" in line)
    shares = [float(word.rstrip("%")) for word in row.split() if word.endswith("%")]
    assert sum(shares[:-1]) == pytest.approx(100)
    assert shares[-1] == pytest.approx(50)  # forward, backward, update


def test_a_log_gets_plain_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    monkeypatch.setattr(terminal, "watched_terminal", lambda: None)
    console = terminal.console()
    assert not console.is_terminal
    assert console.width == 120
    with console.capture() as captured:
        console.print("layer [bold]x[/bold] :smile: 12")
    assert captured.get() == "layer [bold]x[/bold] :smile: 12\n"
