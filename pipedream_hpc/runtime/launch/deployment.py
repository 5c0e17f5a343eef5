"""Deployment: a plan checked against the model and the ranks it runs on."""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from pipedream_hpc.cluster.world import World
from pipedream_hpc.config import TrainConfig
from pipedream_hpc.errors import PipedreamError
from pipedream_hpc.model.arguments import Arguments
from pipedream_hpc.model.graph import LayerGraph, Value
from pipedream_hpc.model.partition import Partition
from pipedream_hpc.planning.plan import Edge, Plan, StagePlan
from pipedream_hpc.runtime.comm.channels import TensorMeta
from pipedream_hpc.runtime.launch.run_plan import RunSchedule
from pipedream_hpc.schedule import registry
from pipedream_hpc.schedule.actions import Layout
from pipedream_hpc.schedule.written import Written


@dataclass(frozen=True)
class Deployment:
    """What every rank knows about the run.

    Attributes:
        plan: the plan as it is run.
        name: the plan's name in messages.
        graph: the captured model.
        partition: the same in stages.
        layout: ranks of every stage.
        schedule: the run's schedule, for any number of minibatches.
    """

    plan: Plan
    name: str
    graph: LayerGraph
    partition: Partition
    layout: Layout
    schedule: RunSchedule

    @property
    def n_microbatches(self) -> int:
        """Microbatches per minibatch."""
        return self.schedule.n_microbatches

    @property
    def minibatches_per_loss(self) -> int:
        """Minibatches over which the loss weights of a round are shared.

        1 where microbatches are whole minibatches: there every stage averages over its own rounds.
        """
        return self.schedule.gradient_accumulation_steps if self.schedule.cuts_minibatches else 1

    @property
    def edges(self) -> tuple[Edge, ...]:
        """Pairs of stages that exchange tensors."""
        return tuple(sorted(self.partition.edges))

    @property
    def edge_tensors(self) -> Mapping[Edge, tuple[TensorMeta, ...]]:
        """The tensors that cross every edge."""
        return _metas(self.partition.edges)

    def evaluation_tensors(self, arguments: Arguments) -> Mapping[Edge, tuple[TensorMeta, ...]]:
        """Return the tensors that cross every edge when these arguments are evaluated."""
        return _metas(self.partition.evaluated(arguments))

    @property
    def ranks(self) -> int:
        """Ranks it runs on."""
        return len({rank for ranks in self.layout for rank in ranks})

    def training(self, minibatches: int) -> registry.AnySchedule | Written:
        """Return the schedule of a pass that trains.

        Raises:
            ScheduleError: the schedule does not go with the layout or with this number of minibatches.
        """
        return self.schedule.of(self.layout, minibatches, self.edges)

    def example_training(self) -> registry.AnySchedule | Written:
        """Return the shortest schedule of training that shows what its stages need."""
        return self.training(self.schedule.fewest_minibatches)

    def evaluation(self, minibatches: int) -> registry.AnySchedule:
        """Return the schedule of an evaluation."""
        return registry.make("forward-only", self.layout, minibatches * self.n_microbatches, edges=self.edges)

    def checkpoint_facts(self, config: TrainConfig) -> dict[str, str]:
        """Return what must be the same in every launch of a run, by name.

        The schedule is part of it: where backwards are split, gradients are summed in another order.
        """
        schedule, layers = self.schedule, [stage.layers for stage in self.plan.stages]
        facts = (
            layers,
            self.layout,
            schedule.name if schedule.written is None else schedule.fingerprint,
            schedule.n_microbatches,
            schedule.gradient_accumulation_steps,
        )
        masters = " with master weights" if config.master_weights else ""
        return {
            "plan or schedule": f"{zlib.crc32(str(facts).encode()):08x}",
            "seed": str(config.seed),
            "precision": (config.precision or "the model's") + masters,
        }


def deploy(plan: Plan, name: str, graph: LayerGraph, schedule: RunSchedule, world: World) -> Deployment:
    """Check a plan against model and ranks.

    Args:
        plan: as it is run.
        name: its name in messages.
        graph: the captured model.
        schedule: the run's.
        world: the ranks that were started.

    Raises:
        PipedreamError: the plan's layers are not the model's, the workers cannot run it, or not on the
            ranks that were started.
    """
    if schedule.name == "forward-only":
        raise PipedreamError("the forward-only schedule trains nothing: choose another, such as 1f1b")
    partition = Partition(graph, _layers_of(plan, graph, name))
    for (source, target), values in partition.edges.items():
        for value in values:
            if value.layout is not torch.strided:
                raise PipedreamError(
                    f"'{value.layer or value.name}' puts out a tensor of layout {value.layout}, which stage {source} "
                    f"cannot send to stage {target}: keep both in one stage (pipedream partition --together A,B), or "
                    "let a dense tensor cross"
                )
    deployment = Deployment(plan, name, graph, partition, schedule.layout(plan), schedule)
    if schedule.written is not None:
        schedule.written.check_against(deployment.layout, deployment.edges)
    deployment.training(0)  # raises what does not go together
    if world.size not in (1, deployment.ranks):
        raise PipedreamError(
            f"{name} is for {deployment.ranks} ranks, but {world.size} were started: "
            f"start {deployment.ranks} (mpirun -n {deployment.ranks} ...) or plan for {world.size} "
            f"(pipedream partition --devices {world.size})"
        )
    return deployment


def _metas(edges: Mapping[Edge, Sequence[Value]]) -> Mapping[Edge, tuple[TensorMeta, ...]]:
    return {
        edge: tuple(
            TensorMeta(value.layer or value.name, edge.source, value.sent_shape, value.dtype, value.needs_gradient)
            for value in values
        )
        for edge, values in edges.items()
    }


def _layers_of(plan: Plan, graph: LayerGraph, name: str) -> list[list[int]]:
    """Return the layer numbers of every stage."""
    remedy = "profile and partition this model again (pipedream profile, pipedream partition)"
    wrong = f"{name} was made for another model"
    number = {layer.name: index for index, layer in enumerate(graph.layers)}
    planned = [layer for stage in plan.stages for layer in stage.layers]
    for index, stage in enumerate(plan.stages):
        for layer in stage.layers:
            if layer not in number:
                raise PipedreamError(f"{wrong}: layer '{layer}' of stage {index} is not in the model: {remedy}")
    missing = [layer.name for layer in graph.layers if layer.name not in set(planned)]
    if missing or len(planned) != len(graph.layers):
        which = f", '{missing[0]}' among those it lacks" if missing else ""
        raise PipedreamError(f"{wrong}: it has {len(planned)} layers, the model {len(graph.layers)}{which}: {remedy}")
    stages = [sorted(number[layer] for layer in stage.layers) for stage in plan.stages]
    for index, (stage, layers) in enumerate(zip(plan.stages, stages, strict=True)):
        _check_stage(index, stage, graph, layers, wrong, remedy)
    return stages


def _check_stage(
    index: int,
    stage: StagePlan,
    graph: LayerGraph,
    layers: Sequence[int],
    wrong: str,
    remedy: str,
) -> None:
    parameter_bytes = sum(graph.layers[layer].parameter_bytes for layer in layers)
    if parameter_bytes != stage.parameter_bytes:
        raise PipedreamError(
            f"{wrong}: stage {index} ('{stage.layers[0]}' to '{stage.layers[-1]}') has {stage.parameter_bytes} bytes "
            f"of parameters in the plan and {parameter_bytes} in the model: {remedy}"
        )
    last = graph.layers[layers[-1]]
    if stage.output_shape is None or last.output_shape is None or stage.layers[-1] != last.name:
        return
    # What crosses may be the output of any of its layers, where others follow in branches, or of an earlier stage's.
    outputs = {
        (layer.output_shape[1:], str(layer.output_dtype).removeprefix("torch."))
        for layer in graph.layers[: layers[-1] + 1]
        if layer.output_shape is not None
    }
    shape, dtype = last.output_shape, str(last.output_dtype).removeprefix("torch.")
    if (stage.output_shape[1:], stage.output_dtype) not in outputs:
        raise PipedreamError(
            f"{wrong}: layer '{stage.layers[-1]}' (stage {index}) puts out {stage.output_dtype} {stage.output_shape} "
            f"in the plan and {dtype} {shape} in the model: {remedy}, with the --precision of the training"
        )
