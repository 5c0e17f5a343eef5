"""Assembly: the workers of this process, put together from the plan and what the user wants."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from pipedream_hpc.errors import PipedreamError
from pipedream_hpc.job import Loss, OptimizerFactory
from pipedream_hpc.model.cut import Part
from pipedream_hpc.model.materialize import give_back, materialize
from pipedream_hpc.model.precision import Precision, autocast
from pipedream_hpc.runtime.averaging import Averager, Packing
from pipedream_hpc.runtime.deployment import Deployment
from pipedream_hpc.runtime.feed import Feed, Taker
from pipedream_hpc.runtime.put_off import PutOff
from pipedream_hpc.runtime.stage import Ports, Stage
from pipedream_hpc.runtime.staging import CopyStream, StagedReduction
from pipedream_hpc.runtime.stash import WeightStash
from pipedream_hpc.runtime.statistics import Statistics
from pipedream_hpc.runtime.step import Clip, LossScale, SchedulerFactory, Step
from pipedream_hpc.runtime.view import CPU
from pipedream_hpc.runtime.wiring import Wiring
from pipedream_hpc.runtime.worker import Worker
from pipedream_hpc.schedule.actions import Layout
from pipedream_hpc.schedule.kinds import AnySchedule

#: Loss scale that fp16 begins with.
_FIRST_SCALE = 65536.0


@dataclass(frozen=True)
class Wishes:
    """How stages are to be trained, whatever the plan: arguments of Pipeline of the same names.

    Raises:
        PipedreamError: there is no such precision or compiler.
    """

    loss: Loss
    optimizer: OptimizerFactory
    scheduler: SchedulerFactory | None
    clip: Clip | None
    precision: str | None
    compiler: str | None
    seed: int
    device: torch.device = CPU
    masters: bool = False

    def __post_init__(self) -> None:
        autocast(self.precision)  # says what is wrong
        if self.compiler is not None and self.compiler not in torch.compiler.list_backends(exclude_tags=()):
            known = ", ".join(sorted(torch.compiler.list_backends(exclude_tags=())))
            raise PipedreamError(f"there is no compiler '{self.compiler}': choose from {known}")

    @property
    def autocast(self) -> Precision | None:
        """What forwards run in; None for the model's own dtypes."""
        return autocast(self.precision, self.device.type)

    @property
    def first_scale(self) -> float:
        """Of losses; 1 where they are not scaled."""
        return _FIRST_SCALE if self.precision == "fp16" else 1.0

    @property
    def needs_agreement(self) -> bool:
        """Whether stages must agree about gradients before they update."""
        return (self.clip is not None and self.clip.over == "model") or self.precision == "fp16"


def assemble(deployment: Deployment, training: AnySchedule, wiring: Wiring, wishes: Wishes) -> list[Worker]:
    """The workers of this process, in the order of their ranks."""
    # In the order of the replicas, in which their gradients are added up.
    places = [
        (rank, index, replica)
        for index, ranks in enumerate(training.layout)
        for replica, rank in enumerate(ranks)
        if (index, rank) in wiring.ports
    ]
    parts = [deployment.cut.part(index) for _, index, _ in places]
    materialize(deployment.graph, [part.module for part in parts])
    stages: dict[int, list[Stage]] = {}
    for part, (rank, index, replica) in zip(parts, places, strict=True):
        stages.setdefault(rank, []).append(_stage(deployment, training, wiring, wishes, part, index, replica))
    give_back()  # the weights stand in the stashes now
    agreements = {
        rank: wiring.reduce(None, "norms", [(2, torch.float64)]) if training.agree else None for rank in sorted(stages)
    }
    return [Worker(rank, stages[rank], agreements[rank], wishes.device) for rank in sorted(stages)]


def shared_statistics(stages: Sequence[Stage], layout: Layout, wiring: Wiring) -> list[Statistics]:
    """Statistics, such as BatchNorm's, that replicas of a stage share at an epoch's end."""
    shared = []
    for stage in sorted(stages, key=lambda each: (each.index, each.replica)):
        replicas, statistics = len(layout[stage.index]), Statistics(stage.module)
        if replicas > 1 and statistics.buckets:
            statistics.share(wiring.reduce(stage.index, "statistics", statistics.buckets), replicas)
            shared.append(statistics)
    return shared


def feed_of(
    deployment: Deployment, stages: Sequence[Stage], loader: Any, wishes: Wishes, *, epoch: int, length: int
) -> Feed:
    """One pass over `loader` for those of the stages that read."""
    return Feed(
        loader,
        epoch=epoch,
        seed=wishes.seed,
        takers=[Taker(stage.replica, len(deployment.layout[stage.index])) for stage in stages if stage.reads],
        names=[str(node.target) for node in deployment.graph.inputs],
        pieces=deployment.pieces,
        accumulate=deployment.shared,
        length=length,
        example=deployment.graph.example,
        device=wishes.device,
    )


def place_buffers(module: nn.Module, device: torch.device) -> None:
    """Put on `device` all tensors of a stage that are no parameters, constants of the captured model included."""
    moved: dict[int, torch.Tensor] = {}
    for owner in module.modules():
        for held in (owner._buffers, vars(owner)):
            for name, value in held.items():
                if isinstance(value, torch.Tensor) and not isinstance(value, nn.Parameter):
                    # One that has several names stays one.
                    held[name] = moved.setdefault(id(value), value.to(device))


def _stage(
    deployment: Deployment,
    training: AnySchedule,
    wiring: Wiring,
    wishes: Wishes,
    part: Part,
    index: int,
    replica: int,
) -> Stage:
    ports: Ports = wiring.ports[index, training.layout[index][replica]]
    stash = WeightStash(
        part.module,
        training.versions(index),
        wishes.optimizer,
        overwrite=not training.stashes,
        masters=wishes.masters,
        device=wishes.device,
    )
    if wishes.device.type != "cpu":
        place_buffers(part.module, wishes.device)
    step = Step(
        stash.optimizer,
        wishes.scheduler,
        wishes.clip,
        LossScale(wishes.first_scale),
        microbatches=deployment.pieces,
        average=not deployment.cuts_minibatches,
    )
    averager = None
    if len(training.layout[index]) > 1:
        packing = Packing(stash.trained)
        reduction = wiring.reduce(index, "gradients", packing.buckets)
        if wishes.device.type == "cuda":
            # The last bucket says which parameters had a gradient: the host looks at it.
            reduction = StagedReduction(reduction, packing.buckets, CopyStream(wishes.device), on_host=1)
        averager = Averager(packing, reduction)
    return Stage(
        index,
        replica,
        part,
        deployment.cut.links,
        stash,
        step,
        averager,
        ports,
        wishes.loss,
        wishes.seed,
        put_off=PutOff(part.module, stash.trains) if training.splits(index) else None,
        recompute=deployment.plan.stages[index].recompute,
        precision=wishes.autocast or contextlib.nullcontext,
        compiler=wishes.compiler,
    )
