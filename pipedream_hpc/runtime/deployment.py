"""Deployment: a plan held against the model and the ranks it is to run on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pipedream_hpc.cluster.world import World
from pipedream_hpc.errors import PipedreamError
from pipedream_hpc.model.cut import Cut
from pipedream_hpc.model.graph import LayerGraph
from pipedream_hpc.planning.plan import Plan, StagePlan
from pipedream_hpc.runtime.manner import Manner, layout_of
from pipedream_hpc.runtime.transport import Boundary
from pipedream_hpc.schedule import kinds
from pipedream_hpc.schedule.actions import Layout, Links


@dataclass(frozen=True)
class Deployment:
    """What every rank has to know.

    Attributes:
        plan: the plan, with the schedule and number of microbatches that are to be run.
        name: what it is called in messages.
        graph: the captured model.
        cut: the same in stages.
        layout: ranks of every stage.
        manner: in which manner it is run.
    """

    plan: Plan
    name: str
    graph: LayerGraph
    cut: Cut
    layout: Layout
    manner: Manner

    @property
    def pieces(self) -> int:
        """Units that a minibatch is cut into."""
        return self.plan.microbatches

    @property
    def shared(self) -> int:
        """Minibatches among which the losses of an update are shared out.

        1 where units are whole minibatches: there every stage averages over the units of its own rounds.
        """
        return self.manner.accumulate if self.cuts_minibatches else 1

    @property
    def cuts_minibatches(self) -> bool:
        """Whether units are microbatches."""
        return kinds.takes_microbatches(self.plan.schedule)

    @property
    def links(self) -> Links:
        """Stages that talk to each other."""
        return tuple(sorted(self.cut.links))

    @property
    def lines(self) -> dict[tuple[int, int], tuple[Boundary, ...]]:
        """What travels from which stage to which."""
        return {
            (source, target): tuple(
                Boundary(value.layer or value.name, source, value.shape, value.dtype, value.needs_gradient)
                for value in values
            )
            for (source, target), values in self.cut.links.items()
        }

    @property
    def ranks(self) -> int:
        """Ranks it runs on."""
        return len({rank for ranks in self.layout for rank in ranks})

    def training(self, minibatches: int) -> kinds.AnySchedule:
        """The schedule of an epoch.

        Raises:
            ScheduleError: the plan's schedule does not go with its layout or microbatches.
        """
        return kinds.make(
            self.plan.schedule,
            self.layout,
            minibatches * self.pieces,
            microbatches=self.plan.microbatches,
            links=self.links,
            accumulate=self.manner.accumulate,
            agree=self.manner.agree,
            split=self.manner.split,
            zero_bubble=self.manner.zero_bubble,
        )

    def evaluation(self, minibatches: int) -> kinds.AnySchedule:
        """The schedule of an evaluation."""
        return kinds.make("forward-only", self.layout, minibatches * self.pieces, links=self.links)


def deploy(plan: Plan, name: str, graph: LayerGraph, manner: Manner, world: World) -> Deployment:
    """Hold a plan against model and ranks.

    Raises:
        PipedreamError: the plan's layers are not the model's, the workers cannot run it, or not on the
            ranks that were started.
    """
    if plan.schedule == "forward-only":
        raise PipedreamError("the forward-only schedule trains nothing: choose another, such as 1f1b")
    if manner.chunks > 1 and plan.schedule != "interleaved":
        raise PipedreamError(f"{plan.schedule} has one stage per rank, not {manner.chunks} chunks: use interleaved")
    stages = _layers_of(plan, graph, name)
    deployment = Deployment(plan, name, graph, Cut(graph, stages), layout_of(plan, plan.schedule, manner), manner)
    deployment.training(0)  # says what is wrong
    if world.size not in (1, deployment.ranks):
        raise PipedreamError(
            f"{name} is for {deployment.ranks} ranks, but {world.size} were started: "
            f"start {deployment.ranks} (mpirun -n {deployment.ranks} ...) or plan for {world.size} "
            f"(pipedream partition --devices {world.size})"
        )
    return deployment


def _layers_of(plan: Plan, graph: LayerGraph, name: str) -> list[list[int]]:
    """Layer numbers of every stage."""
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
    shape, dtype = last.output_shape, str(last.output_dtype).removeprefix("torch.")
    if (stage.output_shape[1:], stage.output_dtype) != (shape[1:], dtype):
        raise PipedreamError(
            f"{wrong}: layer '{stage.layers[-1]}' (stage {index}) puts out {stage.output_dtype} {stage.output_shape} "
            f"in the plan and {dtype} {shape} in the model: {remedy}, with the --precision of the training"
        )
