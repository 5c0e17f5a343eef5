"""The weight stash on a GPU: an update beside torch's own optimizers, and the switch of versions.

    python benchmarks/gpu/pool.py                   64 MB to 4 GB of weights, float32 and bfloat16 with masters
    python benchmarks/gpu/pool.py --device cpu      the same program on the CPU, to try it out

Ways take turns in one run; medians. Time is that of the stream (events), behind a pause in which the host hands
everything in, as in training, where it runs ahead; the host's own time stands beside it. GB/s counts the bytes that
a step must move, whoever takes it: weights read and written, gradient read, state read and written.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from pipedream_hpc.model.clock import clock_of
from pipedream_hpc.runtime.weights.stash import WeightStash

TENSORS = 16
PAUSE_CYCLES = 3_000_000  # some 2 ms
OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "SGD": partial(torch.optim.SGD, lr=1e-6, momentum=0.9, weight_decay=1e-4),
    "AdamW": partial(torch.optim.AdamW, lr=1e-6),
}
#: Numbers moved per weight with float32: weight, gradient and state read; weight and state written.
MOVED = {"SGD": 5, "AdamW": 7}


def weights(nbytes: int, dtype: torch.dtype) -> nn.Module:
    module = nn.Module()
    for index in range(TENSORS):
        module.register_parameter(f"w{index}", nn.Parameter(torch.zeros(nbytes // TENSORS // 4, dtype=dtype)))
    return module


def contest(kind: str, nbytes: int, device: torch.device, rounds: int) -> dict[str, list[tuple[float, float]]]:
    """Seconds (of the stream, of the host) of every way to step `nbytes` of float32, or half of that in bfloat16."""
    single = WeightStash(weights(nbytes, torch.float32), 2, OPTIMIZERS[kind], device=device)
    halves = WeightStash(weights(nbytes, torch.bfloat16), 2, OPTIMIZERS[kind], master_weights=True, device=device)
    place = [nn.Parameter(torch.zeros_like(each)) for each in single.trained]
    for each in place:
        each.grad = torch.full_like(each, 1e-3)
    fused, foreach = (OPTIMIZERS[kind](place, **{how: True}) for how in ("fused", "foreach"))
    gradients: list[torch.Tensor | None] = [each.grad for each in place]
    half_gradients: list[torch.Tensor | None] = [each.grad.bfloat16() for each in place if each.grad is not None]
    ways = {
        "copy-on-write": lambda: single.update(gradients),
        "bfloat16, masters": lambda: halves.update(half_gradients),
        "torch fused, in place": fused.step,
        "torch foreach, in place": foreach.step,
    }
    taken: dict[str, list[tuple[float, float]]] = {way: [] for way in ways}
    clock = clock_of(device)
    for turn in range(rounds + 2):
        for way, step in random.sample(list(ways.items()), len(ways)):
            if device.type == "cuda":
                torch.cuda._sleep(PAUSE_CYCLES)
            began, host_s = clock.mark(), time.perf_counter()
            step()
            host_s = time.perf_counter() - host_s
            began_s, ended_s = clock.read([began, clock.mark()])
            if turn > 1:
                taken[way].append((ended_s - began_s, host_s))
    return taken


def switch_s(nbytes: int, device: torch.device) -> float:
    """Median seconds of the host to point a module at another version."""
    stash = WeightStash(weights(nbytes, torch.float32), 2, OPTIMIZERS["SGD"], device=device)
    stash.update([None] * TENSORS)
    taken = []
    for microbatch in range(200):
        began = time.perf_counter()
        stash.acquire(microbatch, microbatch % 2)
        taken.append(time.perf_counter() - began)
        stash.release(microbatch)
    return statistics.median(taken[10:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--megabytes", type=int, nargs="+", default=[64, 512, 4096], help="of weights in float32")
    parser.add_argument("--json", type=Path, help="write what was measured")
    options = parser.parse_args()
    device = torch.device(options.device, 0) if options.device == "cuda" else torch.device("cpu")
    table = Table("", "weights", "way", "ms", "GB/s", "over torch fused", "host (µs)", title="one step, medians")
    found: dict[str, Any] = {}
    for kind in OPTIMIZERS:
        for size in options.megabytes:
            taken = contest(kind, size << 20, device, options.rounds)
            found[f"{kind} {size} MB"] = taken
            base = statistics.median(stream_s for stream_s, _ in taken["torch fused, in place"])
            for way, times in taken.items():
                median, host = (statistics.median(each) for each in zip(*times, strict=True))
                # Weight and gradient of 2 bytes each in place of 4, and a master beside them.
                moved = MOVED[kind] * 4 if way != "bfloat16, masters" else (MOVED[kind] - 3) * 4 + 2 * 4 + 2 * 2
                speed = f"{moved * (size << 20) / 4 / median / 1e9:.0f}"
                ratio = f"{median / base:.2f}"
                table.add_row(kind, f"{size} MB", way, f"{median * 1e3:.3f}", speed, ratio, f"{host * 1e6:.0f}")
    console = Console(width=110, highlight=False)
    console.print(table)
    for size in options.megabytes:
        found[f"switch {size} MB"] = switched = switch_s(size << 20, device)
        console.print(f"switch of {size} MB in {TENSORS} tensors: {switched * 1e6:.1f} µs of the host")
    if options.json:
        options.json.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
