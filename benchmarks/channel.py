"""Compare the core's channel with plain C MPI on two ranks: latency, bandwidth, and overlap with compute.

    python benchmarks/channel.py                  builds the program (csrc/benchmarks), starts two ranks
    python benchmarks/channel.py --plot channel.png

First a ping-pong through the core, including its header checks, takes turns with one by MPI_Send and MPI_Recv. The
table shows medians of times, and of the ratios within a turn. Plain MPI alternates between two receive buffers, as the
channel has two slots. Then 64 MiB are sent each way, through the core and with Isend, compute, Wait:

    behind a span of compute        both ranks compute until 200 ms have passed
    beside an amount of work        both ranks do a fixed amount of work that takes 200 ms without a transfer: shows
                                    what copying takes from compute

Required: bandwidth at least 0.95 of plain MPI's from 256 KiB on, latency at most 1.3 times plain MPI's at 4 KiB, and
95 % of a transfer hidden behind compute.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path
from typing import Any

from launch import built, on_two_ranks
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

SIZES = (64, 4 << 10, 16 << 10, 64 << 10, 256 << 10, 1 << 20, 4 << 20, 64 << 20)
LARGE, COMPUTE_S = 64 << 20, 0.2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=24)
    parser.add_argument("--plot", type=Path, help="write a figure")
    options = parser.parse_args()
    program = str(built("bench_channel"))
    # One core per rank: the program does not pin its threads, so the launcher binds the ranks.
    pingpong = on_two_ranks([program, "latency", str(options.turns), *map(str, SIZES)], bind="core")
    overlap = on_two_ranks([program, "overlap", str(options.turns), str(LARGE), str(COMPUTE_S)], bind="core")
    times = {(each["way"], each["size"]): each["seconds"] for each in pingpong}
    latency = Table("payload", "core (µs)", "plain C MPI (µs)", "time", "bandwidth", title="one way, medians")
    for size in SIZES:
        core, plain = (statistics.median(times[route, size]) for route in ("core", "plain"))
        # Ratios within a turn: the speed of the machine varies between turns.
        ratio = statistics.median(a / b for a, b in zip(times["core", size], times["plain", size], strict=True))
        latency.add_row(f"{size:,}", f"{core * 1e6:.2f}", f"{plain * 1e6:.2f}", f"{ratio:.2f} x", f"{1 / ratio:.2f} x")
    found = {(each["measured"], each["way"]): statistics.median(each["seconds"]) for each in overlap}
    hidden = Table("64 MiB each way", "core (ms)", "Isend, Wait (ms)", title="time until both ranks are done, medians")
    for what in ("transfer alone", "behind a span of compute", "beside an amount of work"):
        hidden.add_row(what, *(f"{found[what, route] * 1e3:.1f}" for route in ("core", "plain")))
    hidden.add_row("the work alone", *[f"{found['work alone', 'neither'] * 1e3:.1f}"] * 2)
    shares = [hidden_share(found, route) for route in ("core", "plain")]
    hidden.add_row("hidden behind the span", *(f"{share:.1%}" for share in shares))
    Console(width=100, highlight=False).print(latency, hidden)
    if options.plot:
        draw(times, found, options.plot)


def hidden_share(found: dict[tuple[str, str], float], route: str) -> float:
    """Return the fraction of the transfer that is hidden behind the span of compute."""
    extra = found["behind a span of compute", route] - COMPUTE_S
    return max(0.0, min(1.0, 1 - extra / found["transfer alone", "plain"]))


def draw(times: dict[tuple[str, int], list[float]], found: dict[tuple[str, str], float], path: Path) -> None:
    """Draw bandwidth over size, and the overlap."""
    figure = Figure(figsize=(9, 3.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    for route, label in (("core", "channel"), ("plain", "plain C MPI")):
        medians = [statistics.median(times[route, size]) for size in SIZES]
        left.loglog(
            SIZES, [size / median / 1e9 for size, median in zip(SIZES, medians, strict=True)], "o-", label=label
        )
    left.set(xlabel="payload (bytes)", ylabel="GB/s, one way")
    left.legend()
    bars: dict[str, Any] = {"core": "channel", "plain": "Isend, compute, Wait"}
    right.barh(
        list(bars.values()), [found["behind a span of compute", route] * 1e3 for route in bars], color="tab:blue"
    )
    right.axvline(COMPUTE_S * 1e3, color="tab:gray", linestyle="--")
    right.set(xlabel="ms until both ranks are done", xlim=(150, None), title="64 MiB each way behind 200 ms")
    figure.savefig(path, dpi=130)


if __name__ == "__main__":
    main()
