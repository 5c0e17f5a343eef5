"""Comparison: run some minibatches of a user's training in the pipeline and in the reference, and compare the results.

::

    pipeline     F0 F1 .. B0 S ..    losses, averaged gradients, weights ─┐
                                                                          ├──► the first that differs, by name
    reference    plain autograd      losses, averaged gradients, weights ─┘
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_map

from pipedream_hpc.cluster.world import World
from pipedream_hpc.config import ScheduleConfig
from pipedream_hpc.errors import PipedreamError
from pipedream_hpc.job import Job
from pipedream_hpc.model.arguments import as_tensors, bind_inputs
from pipedream_hpc.model.graph import Modes
from pipedream_hpc.model.randomness import seed_for, set_seed
from pipedream_hpc.model.recipe import tensors_of
from pipedream_hpc.model.stage_module import move_tensors
from pipedream_hpc.model.structure import map_tensors
from pipedream_hpc.runtime.execution.data import MicrobatchLoader, to_device
from pipedream_hpc.runtime.execution.position import PassPosition
from pipedream_hpc.runtime.launch.build import TrainSetup, microbatch_loader
from pipedream_hpc.runtime.launch.start import start
from pipedream_hpc.runtime.pipeline import Pipeline
from pipedream_hpc.schedule import registry
from pipedream_hpc.verification import reference
from pipedream_hpc.verification.draws import DrawLog, Draws, Forwards, Replay, merged
from pipedream_hpc.verification.reference import Event, ReferenceConfig

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
            batches = zip(job.train_loader, range(count), strict=False)
            epochs_of_batches.append([as_tensors(batch) for batch, _ in batches])
    return epochs_of_batches


def pipeline_events(pipeline: Pipeline, epochs: Sequence[Batches]) -> tuple[list[Event], Forwards]:
    """Train in the pipeline; return the events of this process's stages, of each stage's first replica, and draws."""
    events: list[Event] = []
    log = DrawLog()
    end_log = log.watch(pipeline.stages)
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
                    for microbatch, (loss, *_), _ in stage.loss.meter.read()
                )
    end_log()
    return events, log.forwards


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
    pipeline: Pipeline, job: Job, model: nn.Module, config: ReferenceConfig, epochs: Sequence[Batches], draws: Draws
) -> list[Event]:
    """Train `model`, which has the initial weights, in the reference; return the events.

    The model runs by itself, without hooks of the runtime, and draws the random numbers `draws`.
    """
    events: list[Event] = []
    device = pipeline.devices[pipeline.rank].torch
    if device.type != "cpu":
        # Dropout masks and rounding are those of the device.
        model.to(device)
        move_tensors(tensors_of(model), device)
        epochs = [tree_map(lambda each: to_device(each, device), batches) for batches in epochs]
    arguments, replay = bind_inputs(model, job.example_inputs), Replay(model, draws)
    Modes.of(model).set(model, True)

    def forward(model: nn.Module, inputs: Any) -> Any:
        given = arguments.like(map_tensors(torch.clone, inputs))  # a forward may write into its arguments
        return model(*given.args, **given.kwargs)

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
        during=replay.microbatch,
        on_event=lambda event: events.append(_on_host(event)),
    )
    return events


def draws_in_one_stage(pipeline: Pipeline, job: Job, model: nn.Module, minibatches: Batches) -> Draws:
    """Return what `model`, which has the initial weights, draws where one stage in this process has all of it."""
    n_microbatches = pipeline.n_microbatches
    schedule = ScheduleConfig("gpipe", n_microbatches) if n_microbatches > 1 else ScheduleConfig("1f1b")
    config = dataclasses.replace(
        pipeline.train_config, recompute=False, check_model=False, gradient_accumulation_steps=1
    )
    setup = TrainSetup(copy.deepcopy(job.loss_fn), job.optimizer, config)
    run = start(model, job.example_inputs, 1, (), schedule, setup, pipeline.run_config, World(0, 1, 0, 1, ""))
    log, count = DrawLog(), len(minibatches)
    log.watch(run.stages)

    def data() -> MicrobatchLoader:
        return microbatch_loader(run.deployment, run.stages, minibatches, run.setup, epoch=0, length=count)

    position = PassPosition("epoch 0", n_microbatches)
    for _ in run.passes.run(run.deployment.training(count), data, position, minibatches=count):
        pass
    run.wiring.close()
    run.deployment.graph.close()
    return merged([log.forwards])[0]


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
