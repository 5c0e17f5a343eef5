"""Run some minibatches of a user's own training both ways and compare everything that comes of it.

::

    workers      F0 F1 .. B0 U ..    losses, averaged gradients, weights ─┐
                                                                          ├──► the first that differs, by name
    reference    plain autograd      losses, averaged gradients, weights ─┘
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.func import functional_call
from torch.utils._pytree import tree_map

from pipedream_hpc.errors import PipedreamError
from pipedream_hpc.job import Job
from pipedream_hpc.model.capture import arguments_of, capture
from pipedream_hpc.model.cut import Cut
from pipedream_hpc.model.randomness import seed_for, seed_layers, set_seed
from pipedream_hpc.runtime.assembly import place_buffers
from pipedream_hpc.runtime.feed import onto
from pipedream_hpc.runtime.pipeline import Pipeline
from pipedream_hpc.verification import reference
from pipedream_hpc.verification.reference import Event, Tensors, Way

Batches = list[tuple[Any, Any]]


@dataclass(frozen=True)
class Difference:
    """A tensor that is not the same both ways.

    Attributes:
        event: kind, stage and number of what it belongs to.
        name: the parameter's.
        largest: difference of an element.
        relative: the same, as a part of the reference's largest element.
        count: elements that differ.
        of: elements in all.
    """

    event: tuple[str, int, int]
    name: str
    largest: float
    relative: float
    count: int
    of: int

    def __str__(self) -> str:
        kind, stage, number = self.event
        where = {
            "loss": f"the loss of unit {number}",
            "gradient": f"the gradient of '{self.name}' (stage {stage}) in round {number}",
            "weight": f"the weight '{self.name}' (stage {stage}) after round {number}",
        }[kind]
        return (
            f"{where}: {self.count} of {self.of} numbers differ, by {self.largest:.3g} at most "
            f"({self.relative:.3g} of the largest)"
        )


@dataclass(frozen=True)
class Verdict:
    """What came of a comparison.

    Attributes:
        compared: tensors compared, by kind.
        differences: all that differ, in the order of training.
    """

    compared: dict[str, int]
    differences: tuple[Difference, ...]

    @property
    def exact(self) -> bool:
        """Whether every bit is the same."""
        return not self.differences

    def within(self, tolerance: float) -> bool:
        """Whether no tensor differs by more than such a part of its largest element."""
        return all(each.relative <= tolerance for each in self.differences)


@contextmanager
def repeatable() -> Iterator[None]:
    """Let a GPU compute the same thing the same way each time, where torch can, as CPUs do anyway."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    if torch.cuda.is_available():
        torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])


def first_minibatches(job: Job, count: int, epochs: int, seed: int) -> list[Batches]:
    """`count` minibatches of the job for each epoch, the same on every rank."""
    found = []
    with torch.random.fork_rng(devices=[]):
        for epoch in range(epochs):
            set_seed(seed_for("verify", seed, epoch))
            found.append([pair for pair, _ in zip(job.train, range(count), strict=False)])
    return found


def by_workers(pipeline: Pipeline, epochs: Sequence[Batches]) -> list[Event]:
    """Train; what this process's stages came to, of every stage its first replica."""
    events: list[Event] = []
    units = 0
    for stage in pipeline.stages:
        if stage.replica == 0:
            stage.watch = partial(_note, events, stage.index)
    for batches in epochs:
        pipeline.fit(batches)
        for stage in pipeline.stages:
            if stage.output:
                events.extend(
                    Event("loss", stage.index, units + unit, {"loss": torch.tensor(mean, dtype=torch.float64)})
                    for unit, mean, _ in stage.tally.read()
                )
        units += len(batches) * pipeline.pieces
    return events


def _note(
    events: list[Event], stage: int, kind: str, number: int, tensors: Iterable[tuple[str, torch.Tensor | None]]
) -> None:
    copies = {name: tensor.detach().to("cpu", copy=True) for name, tensor in tensors if tensor is not None}
    events.append(Event(kind, stage, number, copies))


def by_reference(pipeline: Pipeline, job: Job, model: nn.Module, way: Way, epochs: Sequence[Batches]) -> list[Event]:
    """Train `model`, which has the first weights, in plain autograd."""
    events: list[Event] = []
    graph = capture(model, job.example, job.leaves)
    part = Cut(graph, [range(len(graph.layers))]).part(0)
    current = 0

    def seeded(_: nn.Module, unit: int) -> None:
        nonlocal current
        current = unit

    def forward(module: nn.Module, weights: Tensors, inputs: Any) -> Any:
        given = [arguments_of(inputs)[index] for index in part.inputs]
        for position in part.rewrites:
            given[position] = given[position].clone()
        return functional_call(module, weights, tuple(given))[-1]

    seed_layers(part.module, lambda name: set_seed(seed_for(pipeline.seed, current, name)))
    part.module.train()
    place = pipeline.devices[pipeline.rank].torch
    if place.type != "cpu":
        # Random masks and roundings are those of the device.
        part.module.to(place)
        place_buffers(part.module, place)
        epochs = [tree_map(lambda each: onto(each, place), batches) for batches in epochs]
    reference.train(
        part.module,
        pipeline.stage_of_parameters(),
        epochs,
        job.loss,
        job.optimizer,
        way,
        scheduler=job.scheduler,
        precision=pipeline.precision or nullcontext,
        forward=forward,
        seeded=seeded,
        note=lambda event: events.append(_on_host(event)),
    )
    return events


def _on_host(event: Event) -> Event:
    return dataclasses.replace(event, tensors={name: tensor.to("cpu") for name, tensor in event.tensors.items()})


def way_of(pipeline: Pipeline, job: Job) -> Way:
    """The way a pipeline trains in.

    Raises:
        PipedreamError: it is none that can be computed by itself.
    """
    kind = {"1f1b-rr": "1f1b"}.get(pipeline.plan.schedule, pipeline.plan.schedule)
    if kind == "naive":
        raise PipedreamError(
            "the naive schedule has no reference: its gradients are of no function; choose another --schedule"
        )
    if pipeline.scales_losses:
        raise PipedreamError("fp16 scales losses, which the reference does not: verify with --precision bf16, or none")
    clip = None if job.clip is None else (job.clip.norm, job.clip.over)
    replicas = [len(stage.ranks) for stage in pipeline.plan.stages]
    return Way(kind, replicas, pipeline.pieces, pipeline.accumulate, clip, pipeline.master_weights, pipeline.split)


def compare(workers: Iterable[Event], expected: Iterable[Event]) -> Verdict:
    """Hold what the workers came to against the reference."""
    found = {(each.kind, each.stage, each.number): each.tensors for each in workers}
    compared: dict[str, int] = {"loss": 0, "gradient": 0, "weight": 0}
    differences = []
    for event in expected:
        key = event.kind, event.stage, event.number
        tensors = found.get(key, {})
        for name, right in event.tensors.items():
            compared[event.kind] += 1
            left = tensors.get(name)
            if left is None or not torch.equal(left.to(right.dtype), right):
                differences.append(_difference(key, name, left, right))
    return Verdict(compared, tuple(differences))


def _difference(key: tuple[str, int, int], name: str, left: torch.Tensor | None, right: torch.Tensor) -> Difference:
    if left is None or left.shape != right.shape:
        return Difference(key, name, float("inf"), float("inf"), right.numel(), right.numel())
    apart = (left.double() - right.double()).abs()
    largest = float(apart.max())
    scale = float(right.double().abs().max())
    return Difference(
        key, name, largest, largest / scale if scale else float("inf"), int((apart != 0).sum()), right.numel()
    )
