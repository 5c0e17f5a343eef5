"""Plan: which layers run on which ranks, and the predicted cost."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar, NamedTuple

from annotated_types import Ge

from pipedream_hpc.files import STRICT
from pipedream_hpc.planning.memory import MemoryParts
from pipedream_hpc.planning.profile import Bytes, Count, Seconds

Rank = Annotated[int, Ge(0)]


class Edge(NamedTuple):
    """An edge between two stages: activations go from source to target, gradients from target to source."""

    source: int
    target: int


def warm_up(replicas: Sequence[int], stage: int) -> int:
    """Return how many forwards a replica of `stage` runs before its first backward, given the replicas per stage.

    It is ceil(ranks of later stages / replicas of the stage), which keeps all later stages busy. For the
    input stage it is the paper's NOAM (section 3.2) minus one, since NOAM also counts the current minibatch.
    """
    return -(-sum(replicas[stage + 1 :]) // replicas[stage])


#: Note of plans that were made without measurements.
COUNTED = "made from counted operations: times are proportions, not seconds"


@dataclass(frozen=True)
class StagePlan:
    """One stage: a set of layers and the ranks that hold a replica of it.

    Times are seconds per minibatch.

    Attributes:
        layers: names of its layers, in order.
        ranks: one rank per replica, in round-robin order.
        forward_s: measured forward time of one minibatch on one replica.
        backward_s: measured backward time of one minibatch on one replica, without recompute.
        compute_s: compute time of the whole stage: (forward_s + backward_s + update_s, with recompute plus
            forward_s once more) / replicas, since each replica updates once per `replicas` minibatches.
        sync_s: gradient synchronisation of the replicas.
        boundary_s: sending the output and receiving its gradient; 0 for the last stage.
        in_flight: minibatches in flight on one replica; microbatches, where minibatches are cut.
        parameter_bytes: bytes of the trainable parameters, one version.
        output_bytes: bytes of the activations sent to the next stage per minibatch; the last stage sends none.
        output_shape: shape of the output for a whole minibatch; None when several tensors cross or it is unknown.
        output_dtype: dtype of the output, such as `float32`; None in the same cases.
        limit: which of `compute`, `sync`, `boundary` takes longest.
        memory: bytes on one device, by part; None when unknown.
        recompute: whether the forward is run again before the backward, instead of keeping activations.
        update_s: measured time of one optimizer step on one replica; 0 when unknown.
        read_s: measured time of reading a minibatch of data, where the stage reads any. Simulations add it
            to the forward. The cost formulas do not: a loader with workers reads in other processes.
        overhead_s: measured time per minibatch that the stage spends outside its layers; only simulations count it.
        stash_bytes: bytes that a minibatch in flight keeps from forward to backward: activations, or with
            recompute the stage's input; 0 when unknown.
        weight_gradient_s: estimated part of backward_s that the gradients of weights take; 0 when unknown.
        waiting_bytes: bytes that a minibatch with a deferred backward for the weights keeps in addition to its
            activations: gradients of layer outputs; 0 when unknown.
        unsplit_bytes: bytes of the parameters whose gradients are not deferred while those of others are; 0 when
            unknown.
    """

    __pydantic_config__ = STRICT

    layers: tuple[str, ...]
    ranks: tuple[Rank, ...]
    forward_s: Seconds
    backward_s: Seconds
    compute_s: Seconds
    sync_s: Seconds
    boundary_s: Seconds
    in_flight: Count
    parameter_bytes: Bytes
    output_bytes: Bytes
    output_shape: tuple[int, ...] | None
    output_dtype: str | None
    limit: str
    memory: MemoryParts | None = None
    recompute: bool = False
    update_s: Seconds = 0.0
    read_s: Seconds = 0.0
    overhead_s: Seconds = 0.0
    stash_bytes: Bytes = 0
    weight_gradient_s: Seconds = 0.0
    waiting_bytes: Bytes = 0
    unsplit_bytes: Bytes = 0

    def __post_init__(self) -> None:
        if not self.layers:
            raise ValueError("a stage needs at least one layer")
        if not self.ranks:
            raise ValueError("a stage needs at least one rank")
        if self.weight_gradient_s > self.backward_s:
            raise ValueError(
                f"weight_gradient_s: {self.weight_gradient_s} s cannot exceed backward_s, which is {self.backward_s} s"
            )

    @property
    def replicas(self) -> int:
        return len(self.ranks)


@dataclass(frozen=True)
class Alternatives:
    """Predictions for other ways to train on the same devices; times are seconds per minibatch.

    Attributes:
        data_parallel_s: data parallelism, with the whole model on every device.
        data_parallel_bytes: memory that data parallelism takes on one device.
        model_parallel_s: the plan's stages, one minibatch at a time.
        flush_s: the plan's stages with GPipe or 1F1B-flush: (m + stages - 1) / m times as long for m
            microbatches.
        n_microbatches: that m.
        network_bytes: bytes that the plan sends over links per minibatch, summed over devices.
        data_parallel_network_bytes: bytes that data parallelism sends over links per minibatch.
    """

    __pydantic_config__ = STRICT

    data_parallel_s: Seconds
    data_parallel_bytes: Bytes
    model_parallel_s: Seconds
    flush_s: Seconds
    n_microbatches: Count
    network_bytes: Bytes
    data_parallel_network_bytes: Bytes


@dataclass(frozen=True)
class Plan:
    """Stages in order, every rank in exactly one of them.

    Attributes:
        model: name of the profiled model.
        minibatch: samples per minibatch that the predictions are for.
        schedule: name of the schedule, such as `1f1b`.
        cost: name of the cost formula the plan was made with.
        stages: the stages, input stage first.
        bottleneck_s: predicted seconds per minibatch in the steady state: the slowest stage or boundary.
        single_device_s: seconds per minibatch of the whole model on one device.
        bound_s: lower bound on bottleneck_s over all plans considered; equal to it if the plan is optimal.
        n_microbatches: microbatches per minibatch.
        optimizer: optimizer kind that the memory predictions are for; one of planning.memory.OPTIMIZERS.
        alternatives: predictions for other ways to train; None when not computed.
        scaled: how the profile was scaled, such as `compute x1.6`; empty if it was not.
        notes: remarks for the user on how the plan was made.
        memory_bytes: memory limit of one device that the plan respects; None without a limit.
    """

    __pydantic_config__ = STRICT
    FORMAT: ClassVar[str] = "pipedream-plan"
    VERSION: ClassVar[int] = 2

    model: str
    minibatch: Count
    schedule: str
    cost: str
    stages: tuple[StagePlan, ...]
    bottleneck_s: Seconds
    single_device_s: Seconds
    bound_s: Seconds = 0.0
    n_microbatches: Count = 1
    optimizer: str = "momentum"
    alternatives: Alternatives | None = None
    scaled: str = ""
    notes: tuple[str, ...] = ()
    memory_bytes: Bytes | None = None

    def __post_init__(self) -> None:
        if not self.stages:
            raise ValueError("a plan needs at least one stage")
        ranks = sorted(rank for stage in self.stages for rank in stage.ranks)
        if ranks != list(range(len(ranks))):
            raise ValueError(f"stages: the ranks should be 0 to {len(ranks) - 1}, each once, but are {ranks}")

    @property
    def timed(self) -> bool:
        """Whether times are measured seconds rather than counted operations."""
        return COUNTED not in self.notes

    @property
    def data_parallel_fits(self) -> bool:
        """Whether data parallelism would respect the plan's memory limit."""
        other = self.alternatives
        return other is None or self.memory_bytes is None or other.data_parallel_bytes <= self.memory_bytes

    @property
    def ranks(self) -> int:
        """Number of ranks that the plan runs on."""
        return sum(stage.replicas for stage in self.stages)

    @property
    def speedup_vs_one(self) -> float:
        """Speed-up over one device; 0 if nothing takes any time."""
        return self.single_device_s / self.bottleneck_s if self.bottleneck_s else 0.0

    @property
    def speedup_vs_data_parallel(self) -> float | None:
        """Speed-up over data parallelism on the same devices; None when unknown."""
        if self.alternatives is None or not self.bottleneck_s:
            return None
        return self.alternatives.data_parallel_s / self.bottleneck_s

    @property
    def layout(self) -> tuple[tuple[int, ...], ...]:
        """Ranks of every stage: the part of a plan that schedules use."""
        return tuple(stage.ranks for stage in self.stages)

    @property
    def straight(self) -> bool:
        """Whether every stage has one replica."""
        return all(stage.replicas == 1 for stage in self.stages)

    @property
    def config(self) -> str:
        """Replicas per stage in the paper's notation, such as `2-1-1`."""
        return "-".join(str(stage.replicas) for stage in self.stages)

    def stage_of(self, rank: int) -> int:
        """Return the index of the stage that `rank` holds a replica of."""
        return next(index for index, stage in enumerate(self.stages) if rank in stage.ranks)
