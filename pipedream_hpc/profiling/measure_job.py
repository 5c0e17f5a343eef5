"""Measure the Profile of a job on this device, as it will train.

::

    capture ──► clocked layers ──► update by tensors and bytes ──► reading ──► calibration ──► Profile
                profiler           update_cost                     here        calibrate
"""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_map

from pipedream_hpc.cluster.device import Device
from pipedream_hpc.cluster.heap import keep_freed_memory
from pipedream_hpc.cluster.world import World
from pipedream_hpc.job import Job
from pipedream_hpc.model.arguments import as_tensors
from pipedream_hpc.model.batch_dims import TARGET, BatchDims
from pipedream_hpc.model.capture import capture
from pipedream_hpc.model.graph import LayerGraph
from pipedream_hpc.model.precision import autocast
from pipedream_hpc.model.recipe import build_model, tensors_of
from pipedream_hpc.model.stage_module import move_tensors
from pipedream_hpc.planning.profile import Profile
from pipedream_hpc.profiling.calibrate import apply_calibration, calibrate
from pipedream_hpc.profiling.profiler import average, measure, one_minibatch
from pipedream_hpc.profiling.update_cost import add_update_times
from pipedream_hpc.runtime.comm.tensor_view import CPU
from pipedream_hpc.runtime.execution.data import to_device
from pipedream_hpc.runtime.execution.score import read_score


def measure_job(
    job: Job,
    world: World,
    *,
    minibatches: int,
    model: str = "",
    device: Device | None = None,
) -> Profile:
    """Measure a job; several ranks measure at the same time, and the mean is returned.

    Collective. The model is left unchanged.

    Args:
        job: provides model, loss, optimizer and data.
        world: the ranks that measure.
        minibatches: number of minibatches to measure; medians are kept.
        model: name for the profile; by default the class of the model.
        device: device to measure on; the CPU by default.

    Raises:
        PipedreamError: the model cannot be captured, or `minibatches` is less than 1.
    """
    job = dataclasses.replace(job, example_inputs=as_tensors(job.example_inputs))
    place, name = (CPU, "cpu") if device is None or device.kind == "cpu" else (device.torch, device.name)
    if place.type == "cpu":
        keep_freed_memory()  # as in training
    forward_context = autocast(job.train_config.precision, place.type)
    config = job.train_config
    graph = capture(
        build_model(job.model),
        job.example_inputs,
        config.leaf_modules,
        forward_context,
        batch_dims=BatchDims(config.batch_dims),
    )
    target, example_inputs = tree_map(
        lambda each: to_device(each, place), (_first_target(job, graph), job.example_inputs)
    )
    loss_fn = None if target is None else lambda output: read_score(job.loss_fn(output, target), "the loss").mean
    barrier = world.comm.Barrier if world.comm is not None else lambda: None
    with _moved_to(graph.module, place):
        barrier()
        profile = measure(
            graph,
            example_inputs,
            minibatches=minibatches,
            model=model,
            loss_fn=loss_fn,
            precision=forward_context,
            device=place,
            device_name=name,
        )
        between = one_minibatch(graph, example_inputs, loss_fn, forward_context)
        profile = add_update_times(profile, graph, job.optimizer, between=between, master_weights=config.master_weights)
        data, read_s = _read(job, minibatches + 1, between)
        profile = dataclasses.replace(profile, read_s=read_s)
    barrier()
    if loss_fn is not None and (calibration := calibrate(graph, job, data, device=place)):
        profile = apply_calibration(profile, calibration)
    return average(world.comm.allgather(profile)) if world.comm is not None and world.size > 1 else profile


@contextmanager
def _moved_to(model: nn.Module, place: torch.device) -> Iterator[None]:
    """Hold the model on a GPU during the block; on the CPU, do nothing."""
    if place.type == "cpu":
        yield
        return
    model.to(place)
    move_tensors(list(tensors_of(model)), place)
    try:
        yield
    finally:
        model.to(CPU)
        move_tensors(list(tensors_of(model)), CPU)
        torch.cuda.empty_cache()


def _first_target(job: Job, graph: LayerGraph) -> Any:
    """Return the target of the job's first minibatch, for the loss; None if its size is not that of the example."""
    with torch.random.fork_rng(devices=[]):
        minibatch = as_tensors(next(iter(job.train_loader), None))
    if isinstance(minibatch, Mapping):
        return job.example_inputs  # a mapping is inputs and target in one
    if not isinstance(minibatch, list | tuple) or len(minibatch) != 2:
        return None
    target, dims = minibatch[1], graph.batch_dims
    return target if dims.sizes({TARGET: target}) == {dims.n_samples(graph.inputs)} else None


def _read(job: Job, count: int, between: Callable[[], None]) -> tuple[list[Any], float]:
    """Read the job's first minibatches; return them and the median seconds to read one.

    The time is 0 for a loader with worker processes, which reads during the computation.

    Args:
        job: provides the data loader.
        count: number of minibatches to read.
        between: called before each.
    """
    pairs: list[Any] = []
    seconds = []
    with torch.random.fork_rng(devices=[]):
        source = iter(job.train_loader)
        while len(pairs) < count:
            between()
            began_s = time.perf_counter()
            pair = next(source, None)
            if pair is None:
                break
            seconds.append(time.perf_counter() - began_s)
            pairs.append(pair)
    has_workers = getattr(job.train_loader, "num_workers", 0) > 0
    return pairs, 0.0 if has_workers or len(seconds) < 2 else statistics.median(seconds[1:])
