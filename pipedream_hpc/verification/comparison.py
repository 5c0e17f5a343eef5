"""Comparison: run some minibatches of a user's training in the pipeline and in the reference, and compare the results.

::

    pipeline     F0 F1 .. B0 S ..    losses, averaged gradients, weights ─┐
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
from pipedream_hpc.model.capture import capture
from pipedream_hpc.model.partition import Partition
from pipedream_hpc.model.randomness import seed_for, seed_modules, seeding, set_seed
from pipedream_hpc.runtime.execution.data import to_device
from pipedream_hpc.runtime.execution.position import PassPosition
from pipedream_hpc.runtime.pipeline import Pipeline
from pipedream_hpc.schedule import registry
from pipedream_hpc.verification import reference
from pipedream_hpc.verification.reference import Event, ReferenceConfig, Tensors

Batches = list[tuple[Any, Any]]


@dataclass(frozen=True)
class Difference:
    """A tensor that differs between pipeline and reference.

    Attributes:
        kind: `loss`, `gradient` or `weight`.
        what: what differs, for messages.
        largest: largest difference of an element.
        relative: the same, relative to the reference's largest element.
        n_different: elements that differ.
        n_elements: elements of the tensor.
    """

    kind: str
    what: str
    largest: float
    relative: float
    n_different: int
    n_elements: int

    def __str__(self) -> str:
        return (
            f"{self.what}: {self.n_different} of {self.n_elements} numbers differ, by at most {self.largest:.3g} "
            f"({self.relative:.3g} of the largest)"
        )


@dataclass(frozen=True)
class Verdict:
    """Result of a comparison.

    Attributes:
        compared: number of tensors that were compared, by kind.
        differences: all tensors that differ, in the order of training.
    """

    compared: dict[str, int]
    differences: tuple[Difference, ...]

    @property
    def exact(self) -> bool:
        """Whether every bit is the same."""
        return not self.differences

    def within(self, tolerance: float) -> bool:
        """Return whether no tensor differs by more than `tolerance` relative to its largest element."""
        return all(each.relative <= tolerance for each in self.differences)


@contextmanager
def deterministic_algorithms() -> Iterator[None]:
    """Let a GPU compute bitwise repeatable results where torch can; CPUs always do."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    if torch.cuda.is_available():
        torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])


def first_minibatches(job: Job, count: int, epochs: int, seed: int) -> list[Batches]:
    """Return `count` minibatches of the job for each epoch, the same on every rank."""
    epochs_of_batches = []
    with torch.random.fork_rng(devices=[]):
        for epoch in range(epochs):
            set_seed(seed_for("verify", seed, epoch))
            epochs_of_batches.append([pair for pair, _ in zip(job.train_loader, range(count), strict=False)])
    return epochs_of_batches


def pipeline_events(pipeline: Pipeline, epochs: Sequence[Batches]) -> list[Event]:
    """Train in the pipeline; return the events of this process's stages, of each stage's first replica."""
    events: list[Event] = []
    for epoch, batches in enumerate(epochs):
        for stage in pipeline.stages:
            if stage.replica == 0:
                stage.watch = partial(_record, events, stage.index, epoch, stage.stash.version)
        pipeline.fit(batches)
        for stage in pipeline.stages:
            if stage.is_last:
                events.extend(
                    Event(
                        "loss",
                        stage.index,
                        epoch,
                        microbatch,
                        {"loss": torch.tensor(loss, dtype=torch.float64)},
                    )
                    for microbatch, (loss, *_), _ in stage.loss_meter.read()
                )
    return events


def _record(
    events: list[Event],
    stage: int,
    epoch: int,
    first_version: int,
    kind: str,
    version: int,
    tensors: Iterable[tuple[str, torch.Tensor | None]],
) -> None:
    copies = {name: tensor.detach().to("cpu", copy=True) for name, tensor in tensors if tensor is not None}
    events.append(Event(kind, stage, epoch, version - first_version, copies))


def reference_events(
    pipeline: Pipeline, job: Job, model: nn.Module, config: ReferenceConfig, epochs: Sequence[Batches]
) -> list[Event]:
    """Train `model`, which has the initial weights, in the reference; return the events."""
    events: list[Event] = []
    graph = capture(model, job.example_inputs, pipeline.train_config.leaf_modules)
    whole = Partition(graph, [range(len(graph.layers))]).stage_module(0)
    seed_modules(model, graph.notes)
    current = 0

    def reseed(name: str) -> None:
        set_seed(seed_for(pipeline.train_config.seed, current, name))

    class Whole(nn.Module):
        """The model as one stage, so that functional_call finds its weights."""

        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, inputs: Any) -> Any:
            with seeding(reseed):
                return whole.run(graph.inputs.like(inputs), [])[1]

    def before_forward(_: nn.Module, microbatch: int) -> None:
        nonlocal current
        current = microbatch

    def forward(_: nn.Module, weights: Tensors, inputs: Any) -> Any:
        named = {f"model.{name}": value for name, value in weights.items()}
        return functional_call(wrapped, named, (inputs,))

    wrapped = Whole()
    whole.train(True)
    device = pipeline.devices[pipeline.rank].torch
    if device.type != "cpu":
        # Dropout masks and rounding are those of the device.
        model.to(device)
        whole.move_tensors(device)
        epochs = [tree_map(lambda each: to_device(each, device), batches) for batches in epochs]
    reference.train(
        model,
        pipeline.stage_of_parameters(),
        epochs,
        job.loss_fn,
        job.optimizer,
        config,
        lr_scheduler=pipeline.train_config.lr_scheduler,
        precision=pipeline.precision or nullcontext,
        forward=forward,
        before_forward=before_forward,
        on_event=lambda event: events.append(_on_host(event)),
    )
    return events


def _on_host(event: Event) -> Event:
    return dataclasses.replace(event, tensors={name: tensor.to("cpu") for name, tensor in event.tensors.items()})


def reference_config_of(pipeline: Pipeline) -> ReferenceConfig:
    """Return the way in which a pipeline trains.

    Raises:
        PipedreamError: the reference cannot train in this way.
    """
    schedule = {"1f1b-rr": "1f1b"}.get(pipeline.plan.schedule, pipeline.plan.schedule)
    if schedule not in registry.NAMES:
        raise PipedreamError(
            f"{schedule} is a written schedule, and the reference has no equation for it: verify a schedule by name, "
            "and compare the weights that the two train"
        )
    if schedule == "naive":
        raise PipedreamError(
            "the naive schedule has no reference, because its gradients are those of no function: choose another "
            "--schedule"
        )
    if pipeline.train_config.precision == "fp16":
        raise PipedreamError(
            "fp16 scales losses, which the reference does not: verify with --precision bf16 or without --precision"
        )
    config = pipeline.train_config
    clip = None if config.clip_grad_norm is None else (config.clip_grad_norm, config.clip_grad_over)
    replicas = [len(stage.ranks) for stage in pipeline.plan.stages]
    return ReferenceConfig(
        schedule,
        replicas,
        pipeline.n_microbatches,
        config.gradient_accumulation_steps,
        clip,
        config.master_weights,
        config.batch_dims,
    )


def compare(actual: Iterable[Event], expected: Iterable[Event], n_microbatches: int = 1) -> Verdict:
    """Compare the events of the pipeline with those of the reference.

    Args:
        actual: of the pipeline, in any order.
        expected: of the reference, in the order of training.
        n_microbatches: microbatches per minibatch, for messages.
    """
    found = {(each.kind, each.stage, each.epoch, each.number): each.tensors for each in actual}
    compared: dict[str, int] = {"loss": 0, "gradient": 0, "weight": 0}
    differences = []
    for event in expected:
        tensors = found.get((event.kind, event.stage, event.epoch, event.number), {})
        for name, reference_tensor in event.tensors.items():
            compared[event.kind] += 1
            tensor = tensors.get(name)
            if tensor is None or not torch.equal(tensor.to(reference_tensor.dtype), reference_tensor):
                differences.append(
                    _difference(event.kind, _what(event, name, n_microbatches), tensor, reference_tensor)
                )
    return Verdict(compared, tuple(differences))


def _what(event: Event, name: str, n_microbatches: int) -> str:
    """Return what a tensor is, such as `the weight '3.bias' (stage 1) after epoch 0, round 2`."""
    epoch = f"epoch {event.epoch}"
    if event.kind == "loss":
        return f"the loss of {PassPosition(epoch, n_microbatches).of_microbatch(event.number)}"
    of, when = ("gradient of", "in") if event.kind == "gradient" else ("weight", "after")
    return f"the {of} '{name}' (stage {event.stage}) {when} {epoch}, round {event.number}"


def _difference(kind: str, what: str, tensor: torch.Tensor | None, reference_tensor: torch.Tensor) -> Difference:
    n_elements = reference_tensor.numel()
    if tensor is None or tensor.shape != reference_tensor.shape:
        return Difference(kind, what, float("inf"), float("inf"), n_elements, n_elements)
    differences = (tensor.double() - reference_tensor.double()).abs()
    largest, scale = float(differences.max()), float(reference_tensor.double().abs().max())
    relative = largest / scale if scale else float("inf")
    return Difference(kind, what, largest, relative, int((differences != 0).sum()), n_elements)
