"""Compare copy-on-write updates of the weight pool with torch's optimizers, and time the switch of versions.

    python benchmarks/optimizer.py                 1 MB to 1 GB of weights; some minutes
    python benchmarks/optimizer.py --large         also 4 GB, if there is enough memory
    python benchmarks/optimizer.py --plot FILE.png

Three methods of one optimizer step take turns in one run:

    copy-on-write   reads the newest slab, writes a free one
    in place        torch with fused=True on one slab: keeps no version, so it is the minimum cost of a step
    copy, step      a weight stash with torch alone: copy the slab, then torch with foreach=True

Each runs with 1 thread and with all threads, and the better median is kept; ratios are medians of the ratios within a
turn. The order changes from turn to turn, and the caches are filled with other data before each step, as other
minibatches do between two updates.

A step is bound by memory bandwidth. These are the 4-byte elements moved per weight where nothing fits into a cache; a
store reads its cache line first, unless the line was read anyway or the store bypasses the caches:

                       in place           copy-on-write, plain stores     streaming stores
    SGD, momentum      p g m → p m = 5    p g m (p') → p' m = 6   1.20    p g m → p' m = 5        1.00
    Adam, AdamW        p g m v → p m v    p g m v (p') → p' m v           p g m v → p' m v
                       = 7                = 8                     1.14    = 7                     1.00

So stores to the target slab are streaming where a step moves more than 32 MiB; below that, streaming would keep the
new weights out of the caches, where the next forward reads them. Two columns measure both kinds of stores.

The last two columns only move the bytes (csrc/benchmarks/moves.cpp, on x86-64): those of a step in place, relative to
torch's step, and those of a step with streaming stores, relative to the former. No step can be much faster than these.

Required: copy-on-write within 1.05 of in place; nothing allocated after warm-up (page faults per step); a switch of
versions below 50 µs at any size. Exits with 1 if a median is above its limit.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import platform
import random
import resource
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import cycle
from pathlib import Path
from typing import Any

import torch
from launch import built
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import nn
from torch.nn.utils import skip_init

from pipedream_hpc.core import load_weights
from pipedream_hpc.runtime.weights.fused import FusedStep, fused_from
from pipedream_hpc.runtime.weights.stash import WeightStash

MB = 1 << 20
SIZES_MB = (1, 4, 16, 64, 256, 1024)
LARGE_MB = 4096
TENSORS = 16
MIN_TURNS = 15
ALLOWED_RATIO, ALLOWED_SWITCH_S = 1.05, 50e-6
OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "SGD": partial(torch.optim.SGD, lr=1e-6, momentum=0.9, weight_decay=1e-4),
    "Adam": partial(torch.optim.Adam, lr=1e-6),
    "AdamW": partial(torch.optim.AdamW, lr=1e-6),
}
#: Buffers of the size of the weights that each optimizer needs: two slabs, gradient, state.
BUFFERS = {"SGD": 4, "Adam": 5, "AdamW": 5}
OURS, PLAIN, STREAMED, IN_PLACE, COPY_STEP = "copy-on-write", "plain stores", "streamed", "in place", "copy, step"
BYTES_IN_PLACE, BYTES_STREAMED = "bytes in place", "bytes streamed"


class Comparison:
    """All methods of a step on the same memory: they share slabs, gradients and state.

    Attributes:
        methods: name -> function that takes one step.
    """

    def __init__(self, kind: str, nbytes: int, with_copy: bool, moves: ctypes.CDLL | None) -> None:
        pool = load_weights().WeightPool(nbytes, 2)
        share = nbytes // TENSORS // 4
        self.slabs = [
            [torch.frombuffer(pool.slab(slab), dtype=torch.float32, count=share, offset=4 * share * i)
             for i in range(TENSORS)]
            for slab in (0, 1)
        ]  # fmt: skip
        for slab in self.slabs:
            for each in slab:
                each.uniform_(-1, 1)
        gradients = [torch.empty_like(each).uniform_(-1, 1) for each in self.slabs[0]]
        make = OPTIMIZERS[kind]
        ours = make([nn.Parameter(each) for each in self.slabs[0]])
        self._optimizer, self._turn = ours, cycle(((0, 1), (1, 0)))
        self.gradients = gradients
        self.copy_on_write(None)
        in_place = make([nn.Parameter(each) for each in self.slabs[0]], fused=True)
        copied = make([nn.Parameter(each) for each in self.slabs[1]], foreach=True)
        for other in (in_place, copied):
            for own, theirs, gradient in zip(_parameters(ours), _parameters(other), gradients, strict=True):
                theirs.grad = gradient
                for key, value in ours.state[own].items():
                    other.state[theirs][key] = value.clone() if key == "step" else value
        self.methods: dict[str, Callable[[], Any]] = {
            OURS: partial(self.copy_on_write, None),
            PLAIN: partial(self.copy_on_write, False),
            STREAMED: partial(self.copy_on_write, True),
            IN_PLACE: in_place.step,
        }
        if with_copy:
            self.methods[COPY_STEP] = partial(self._copy_step, copied)
        if moves is not None:
            states = [[value for key, value in ours.state[p].items() if key != "step"] for p in _parameters(ours)]
            first, *second = map(_addresses, zip(*states, strict=True))
            old, new = map(_addresses, self.slabs)
            rest = (_addresses(gradients), first, second[0] if second else None, TENSORS, share)
            self.methods[BYTES_IN_PLACE] = partial(self._move, moves, old, old, *rest)
            self.methods[BYTES_STREAMED] = partial(self._move, moves, old, new, *rest)

    def copy_on_write(self, streaming: bool | None) -> None:
        """Take a copy-on-write step with streaming or plain stores; None: by size, as in training."""
        source, target = next(self._turn)
        step = fused_from(self._optimizer)
        assert isinstance(step, FusedStep)
        step.streaming = streaming
        step.step(self.slabs[source], self.slabs[target], self.gradients)

    def _copy_step(self, optimizer: torch.optim.Optimizer) -> None:
        for target, source in zip(self.slabs[1], self.slabs[0], strict=True):
            target.copy_(source)
        optimizer.step()

    def _move(self, moves: ctypes.CDLL, *arguments: Any) -> None:
        *arrays, tensors, count = arguments
        moves.move_bytes(*arrays, ctypes.c_size_t(tensors), ctypes.c_size_t(count), torch.get_num_threads())


def _addresses(tensors: Iterable[torch.Tensor]) -> ctypes.Array[ctypes.c_void_p]:
    found = [each.data_ptr() for each in tensors]
    return (ctypes.c_void_p * len(found))(*found)


def _parameters(optimizer: torch.optim.Optimizer) -> Iterator[nn.Parameter]:
    return (parameter for group in optimizer.param_groups for parameter in group["params"])


@dataclass(frozen=True)
class Timing:
    """The times of a method at the number of threads with the best median.

    Attributes:
        turns: seconds of every turn.
        threads: number of threads.
    """

    turns: tuple[float, ...]
    threads: int

    @property
    def median(self) -> float:
        return statistics.median(self.turns)

    def over(self, other: Timing) -> float:
        """Return the ratio to another; turn by turn if both ran in the same turns, which cancels slow variations."""
        if self.threads != other.threads:
            return self.median / other.median
        return statistics.median(own / theirs for own, theirs in zip(self.turns, other.turns, strict=True))

    def __str__(self) -> str:
        return f"{self.median * 1e3:.2f} ({self.threads})"


def best_of(comparison: Comparison, seconds: float) -> tuple[dict[str, Timing], float]:
    """Time every method at its best number of threads; return also the page faults per copy-on-write step."""
    best: dict[str, Timing] = {}
    faults, steps = 0, 0
    other_data = torch.zeros(64 * MB // 4)
    all_threads = torch.get_num_threads()
    for threads in sorted({1, all_threads}):
        torch.set_num_threads(threads)
        samples: dict[str, list[float]] = {method: [] for method in comparison.methods}
        until = None
        while until is None or len(samples[OURS]) < MIN_TURNS or time.perf_counter() < until:
            for method, step in random.sample(list(comparison.methods.items()), len(comparison.methods)):
                other_data.add_(1)
                before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
                began = time.perf_counter()
                step()
                step_s = time.perf_counter() - began
                if until is not None:  # the first turn is warm-up
                    samples[method].append(step_s)
                    if method == OURS:
                        faults += resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
                        steps += 1
            until = until or time.perf_counter() + seconds
        for method, turns in samples.items():
            timing = Timing(tuple(turns), threads)
            if method not in best or timing.median < best[method].median:
                best[method] = timing
    torch.set_num_threads(all_threads)
    return best, faults / steps


def switch_seconds(nbytes: int) -> float:
    """Return the median seconds to switch a module with TENSORS weights to another version."""
    width = int((nbytes / TENSORS / 4) ** 0.5)
    module = nn.Sequential(*(skip_init(nn.Linear, width, width, bias=False) for _ in range(TENSORS)))
    stash = WeightStash(module, 2, partial(torch.optim.SGD, lr=0.0))
    stash.update([None] * TENSORS)
    seconds = []
    for microbatch in range(400):
        began = time.perf_counter()
        stash.acquire(microbatch, microbatch % 2)
        seconds.append(time.perf_counter() - began)
        stash.release(microbatch)
    return statistics.median(seconds[10:])


def free_bytes() -> int:
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def main() -> int:
    parser = argparse.ArgumentParser(description="Compare copy-on-write updates with torch's optimizers.")
    parser.add_argument("--large", action="store_true", help="also measure 4 GB of weights")
    parser.add_argument(
        "--seconds", type=float, default=3.0, help="time for each optimizer, size and number of threads"
    )
    parser.add_argument("--plot", type=Path, help="write a figure of the ratios")
    options = parser.parse_args()
    sizes = (*SIZES_MB, LARGE_MB) if options.large else SIZES_MB
    moves = ctypes.CDLL(str(built("bench_moves", library=True))) if platform.machine() == "x86_64" else None
    console = Console(width=148, highlight=False)
    steps = Table("", "weights", "copy-on-write", "in place", "ratio", "copy, step", "ratio", "plain stores",
                  "streamed", "faults", "bytes alone", "bytes streamed",
                  title="one step, best median in ms (threads)")  # fmt: skip
    switches = Table("weights", "switch", title=f"switch of {TENSORS} tensors to another version")
    ratios: dict[str, dict[int, dict[str, float]]] = {}
    slowest = 0.0
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task("steps", total=len(OPTIMIZERS) * len(sizes))
        for kind in OPTIMIZERS:
            for size in sizes:
                nbytes = size * MB
                if free_bytes() < (BUFFERS[kind] + 0.5) * nbytes:
                    steps.add_row(kind, f"{size} MB", "not enough memory")
                    continue
                # foreach allocates one or two temporaries of the size of the weights.
                comparison = Comparison(
                    kind, nbytes, with_copy=free_bytes() > (BUFFERS[kind] + 3) * nbytes, moves=moves
                )
                found, faults = best_of(comparison, options.seconds)
                del comparison
                over = {method: timing.over(found[IN_PLACE]) for method, timing in found.items()}
                slowest = max(slowest, over[OURS])
                ratios.setdefault(kind, {})[size] = over
                copied = found.get(COPY_STEP)
                steps.add_row(kind, f"{size} MB", str(found[OURS]), str(found[IN_PLACE]), f"{over[OURS]:.2f}",
                              str(copied) if copied else "no memory",
                              f"{found[OURS].over(copied):.2f}" if copied else "",
                              str(found[PLAIN]), str(found[STREAMED]), f"{faults:.1f}",
                              f"{over[BYTES_IN_PLACE]:.2f}" if moves else "",
                              f"{found[BYTES_STREAMED].over(found[BYTES_IN_PLACE]):.2f}" if moves else "")  # fmt: skip
                progress.advance(task)
    slowest_switch = 0.0
    for size in sizes:
        switch_s = switch_seconds(size * MB)
        slowest_switch = max(slowest_switch, switch_s)
        switches.add_row(f"{size} MB", f"{switch_s * 1e6:.1f} µs")
    console.print(steps, switches)
    console.print(
        f"slowest ratio to in place {slowest:.2f}, allowed {ALLOWED_RATIO}; "
        f"slowest switch {slowest_switch * 1e6:.1f} µs, allowed {ALLOWED_SWITCH_S * 1e6:g} µs"
    )
    if options.plot:
        plot(ratios, options.plot)
    return int(slowest > ALLOWED_RATIO or slowest_switch > ALLOWED_SWITCH_S)


def plot(ratios: dict[str, dict[int, dict[str, float]]], path: Path) -> None:
    """Draw the time of each method relative to the step in place, by size."""
    figure = Figure(figsize=(4 * len(ratios), 3.5), layout="constrained")
    for axes, (kind, by_size) in zip(figure.subplots(1, len(ratios), sharey=True, squeeze=False)[0], ratios.items(),
                                     strict=True):  # fmt: skip
        for method in (OURS, PLAIN, STREAMED, COPY_STEP):
            points = [(size, found[method]) for size, found in by_size.items() if method in found]
            axes.plot(*zip(*points, strict=True), marker="o", label=method, linewidth=2.5 if method == OURS else 1)
        axes.axhline(1, color="grey", linewidth=1)
        axes.axhline(ALLOWED_RATIO, color="grey", linewidth=1, linestyle=":")
        axes.set(xscale="log", yscale="log", xlabel="weights (MB)", title=kind)
        axes.set_yticks([0.5, 1, 2, 4, 8, 16], ["½", "1", "2", "4", "8", "16"])
        axes.minorticks_off()
    figure.axes[0].set_ylabel("time relative to torch's fused step in place")
    figure.axes[-1].legend()
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    sys.exit(main())
