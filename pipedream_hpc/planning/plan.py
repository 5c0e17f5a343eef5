"""Plan: which layers run where, and what that should cost."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar

from annotated_types import Ge

from pipedream_hpc.files import STRICT
from pipedream_hpc.planning.memory import MemoryParts
from pipedream_hpc.planning.profile import Bytes, Count, Seconds

Rank = Annotated[int, Ge(0)]


def warm_up(replicas: Sequence[int], stage: int) -> int:
    """Forwards a replica of `stage` runs before its first backward, given the replicas per stage.

    Enough to keep everything downstream busy: ceil(ranks after the stage / its replicas). For the
    input stage it is the paper's NOAM (section 3.2) less one, since NOAM counts the minibatch at work.
    """
    return -(-sum(replicas[stage + 1 :]) // replicas[stage])


#: Note of plans made without measurements.
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
        compute_s: of the whole stage: (forward_s + backward_s + update_s, + forward_s with recompute) /
            replicas, since each of them updates once in as many minibatches.
        sync_s: gradient synchronisation of the replicas.
        boundary_s: sending its output on and getting the gradient back; 0 for the last stage.
        in_flight: minibatches (with microbatches: those) alive on one replica.
        parameter_bytes: trainable parameters of one version.
        output_bytes: activations sent on per minibatch; the last stage's are not sent.
        output_shape: of one whole minibatch; None when several tensors cross or the profile did not say.
        output_dtype: such as `float32`; None likewise.
        limit: which of `compute`, `sync`, `boundary` this stage waits for.
        memory: bytes on one device, by part; None when not known.
        recompute: whether the forward is run again before the backward, instead of keeping activations.
        update_s: measured time of one update on one replica; 0 when not known.
        read_s: measured time to read a minibatch of data, where the stage reads any. Simulations count
            it with the forward; the cost formulas do not: a loader with workers takes it off the rank.
        beside_s: measured time of what the stage does per minibatch beside its layers; counted likewise.
        stash_bytes: what a minibatch in flight holds from forward to backward: activations, or with recompute
            the stage's input; 0 when not known.
        weight_gradient_s: about what the gradients of weights take of backward_s; 0 when not known.
        waiting_bytes: what a minibatch whose weights' gradients are put off holds for it beside its activations:
            gradients of layers' outputs; 0 when not known.
        outside_bytes: bytes of parameters whose gradients are not put off, and wait for those that are; 0 likewise.
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
    beside_s: Seconds = 0.0
    stash_bytes: Bytes = 0
    weight_gradient_s: Seconds = 0.0
    waiting_bytes: Bytes = 0
    outside_bytes: Bytes = 0

    def __post_init__(self) -> None:
        if not self.layers:
            raise ValueError("a stage needs at least one layer")
        if not self.ranks:
            raise ValueError("a stage needs at least one rank")
        if self.weight_gradient_s > self.backward_s:
            raise ValueError(
                f"weight_gradient_s: {self.weight_gradient_s} s are part of backward_s, {self.backward_s} s"
            )

    @property
    def replicas(self) -> int:
        return len(self.ranks)


@dataclass(frozen=True)
class Alternatives:
    """What else the same devices could do, in seconds per minibatch.

    Attributes:
        data_parallel_s: the whole model on every device.
        data_parallel_bytes: memory that takes on one device.
        model_parallel_s: the plan's stages, one minibatch at a time.
        flush_s: the plan's stages with GPipe or 1F1B-flush: (m + stages - 1) / m times as long for m
            microbatches.
        microbatches: that m.
        network_bytes: what the plan sends over links per minibatch, all devices together.
        data_parallel_network_bytes: what data parallelism sends.
    """

    __pydantic_config__ = STRICT

    data_parallel_s: Seconds
    data_parallel_bytes: Bytes
    model_parallel_s: Seconds
    flush_s: Seconds
    microbatches: Count
    network_bytes: Bytes
    data_parallel_network_bytes: Bytes


@dataclass(frozen=True)
class Plan:
    """Stages in order, every rank in exactly one of them.

    Attributes:
        model: name of the profiled model.
        minibatch: samples per minibatch the figures are for.
        schedule: name of the schedule, such as `1f1b`.
        cost: name of the cost formula the plan was made with.
        stages: input stage first.
        bottleneck_s: predicted seconds per minibatch in the steady state: the slowest stage or boundary.
        single_device_s: seconds per minibatch of the whole model on one device.
        bound_s: no plan of the kinds that were weighed is faster; bottleneck_s when it is the optimum.
        microbatches: pieces a minibatch is passed on in.
        optimizer: kind that the memory figures are for; one of planning.memory.OPTIMIZERS.
        alternatives: what else the devices could do; None when not computed.
        scaled: how the profile's figures were changed, such as `compute x1.6`; empty if not at all.
        notes: what a person should know about how the plan came about.
        memory_bytes: of one device, the limit that was planned for; None without one.
    """

    __pydantic_config__ = STRICT
    FORMAT: ClassVar[str] = "pipedream-plan"
    VERSION: ClassVar[int] = 1

    model: str
    minibatch: Count
    schedule: str
    cost: str
    stages: tuple[StagePlan, ...]
    bottleneck_s: Seconds
    single_device_s: Seconds
    bound_s: Seconds = 0.0
    microbatches: Count = 1
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
        """Whether its times are seconds, rather than operations counted."""
        return COUNTED not in self.notes

    @property
    def data_parallel_fits(self) -> bool:
        """Whether data parallelism would keep within the memory that was planned for."""
        other = self.alternatives
        return other is None or self.memory_bytes is None or other.data_parallel_bytes <= self.memory_bytes

    @property
    def ranks(self) -> int:
        """Ranks the plan runs on."""
        return sum(stage.replicas for stage in self.stages)

    @property
    def speedup_vs_one(self) -> float:
        """How many times as fast as one device; 0 if nothing takes any time."""
        return self.single_device_s / self.bottleneck_s if self.bottleneck_s else 0.0

    @property
    def speedup_vs_data_parallel(self) -> float | None:
        """How many times as fast as data parallelism on the same devices; None when not known."""
        if self.alternatives is None or not self.bottleneck_s:
            return None
        return self.alternatives.data_parallel_s / self.bottleneck_s

    @property
    def layout(self) -> tuple[tuple[int, ...], ...]:
        """Ranks of every stage: the part of a plan that schedules need."""
        return tuple(stage.ranks for stage in self.stages)

    @property
    def straight(self) -> bool:
        """Whether no stage is replicated."""
        return all(stage.replicas == 1 for stage in self.stages)

    @property
    def config(self) -> str:
        """Replicas per stage as the paper writes it, such as `2-1-1`."""
        return "-".join(str(stage.replicas) for stage in self.stages)

    def stage_of(self, rank: int) -> int:
        """Index of the stage that `rank` works on."""
        return next(index for index, stage in enumerate(self.stages) if rank in stage.ranks)
