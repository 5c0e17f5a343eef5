"""Measuring: the Profile of a job on this device, as it will train.

::

    capture ──► layers clocked ──► update by tensors and bytes ──► reading ──► rehearsal ──► Profile
                model.profiler     update_cost                     here        sums of a real stage
"""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_map

from pipedream_hpc.cluster.device import Device
from pipedream_hpc.cluster.heap import keep_freed_memory
from pipedream_hpc.cluster.world import World
from pipedream_hpc.job import Job
from pipedream_hpc.model.capture import capture
from pipedream_hpc.model.materialize import whole
from pipedream_hpc.model.precision import autocast
from pipedream_hpc.model.profiler import averaged, measure, one_minibatch
from pipedream_hpc.planning.profile import Profile
from pipedream_hpc.runtime.assembly import place_buffers
from pipedream_hpc.runtime.feed import onto
from pipedream_hpc.runtime.rehearsal import calibrated, rehearse
from pipedream_hpc.runtime.update_cost import with_updates
from pipedream_hpc.runtime.view import CPU


def profile_of(
    job: Job,
    world: World,
    *,
    minibatches: int,
    model: str = "",
    precision: str | None = None,
    device: Device | None = None,
) -> Profile:
    """Measure a job; on several ranks all at the same time, and the mean is kept.

    Collective. The model is left as it was.

    Args:
        job: model, loss, optimizer and data.
        world: the ranks that measure.
        minibatches: how many to measure; medians are kept.
        model: the name to note down; the model's class by default.
        precision: as Pipeline takes it.
        device: to measure on; the CPU by default.

    Raises:
        PipedreamError: the model cannot be captured, or `minibatches` is less than 1.
    """
    place, name = (CPU, "cpu") if device is None or device.kind == "cpu" else (device.torch, device.name)
    if place.type == "cpu":
        keep_freed_memory()  # as in training
    forwards = autocast(precision, place.type)
    graph = capture(whole(job.model), job.example, job.leaves, forwards)
    target, example = (_on(value, place) for value in (_target(job), job.example))
    loss = None if target is None else lambda output: job.loss(output, target)
    together = world.comm.Barrier if world.comm is not None else lambda: None
    with _moved(graph.module, place):
        together()
        measured = measure(
            graph,
            example,
            minibatches=minibatches,
            model=model,
            loss=loss,
            precision=forwards,
            device=place,
            name=name,
        )
        between = one_minibatch(graph, example, loss, forwards)
        measured = with_updates(measured, graph, job.optimizer, between=between)
        data, read_s = _read(job, minibatches + 1, between)
        measured = dataclasses.replace(measured, read_s=read_s)
    together()
    if loss is not None and (rehearsed := rehearse(graph, job, data, precision=precision, device=place)):
        measured = calibrated(measured, rehearsed)
    return averaged(world.comm.allgather(measured)) if world.comm is not None and world.size > 1 else measured


def _on(value: Any, place: torch.device) -> Any:
    return value if place.type == "cpu" else tree_map(lambda each: onto(each, place), value)


@contextmanager
def _moved(model: nn.Module, place: torch.device) -> Iterator[None]:
    """The model on a GPU for a while; on the CPU it stays as it is."""
    if place.type == "cpu":
        yield
        return
    model.to(place)
    place_buffers(model, place)
    try:
        yield
    finally:
        model.to(CPU)
        place_buffers(model, CPU)
        torch.cuda.empty_cache()


def _target(job: Job) -> Any:
    """The target of the job's first minibatch, if it is as large as the example; the loss is measured with it."""
    with torch.random.fork_rng(devices=[]):
        pair = next(iter(job.train), None)
    if not isinstance(pair, list | tuple) or len(pair) != 2:
        return None
    shapes = [tensor.shape[0] for tensor in (job.example, pair[1]) if isinstance(tensor, torch.Tensor) and tensor.dim()]
    return pair[1] if len(shapes) == 2 and shapes[0] == shapes[1] else None


def _read(job: Job, count: int, between: Callable[[], None]) -> tuple[list[Any], float]:
    """The job's first minibatches, and the median seconds to read one, with `between` done before each.

    A loader with processes of its own reads beside the computation: that takes no time.
    """
    pairs: list[Any] = []
    taken = []
    with torch.random.fork_rng(devices=[]):
        source = iter(job.train)
        while len(pairs) < count:
            between()
            began_s = time.perf_counter()
            pair = next(source, None)
            if pair is None:
                break
            taken.append(time.perf_counter() - began_s)
            pairs.append(pair)
    beside = getattr(job.train, "num_workers", 0) > 0
    return pairs, 0.0 if beside or len(taken) < 2 else statistics.median(taken[1:])
