"""Actions: everything that a rank can do. A schedule is nothing but one sequence of actions per rank.

The worker, the emulator, the simulator, the verifier, the text form and the timeline interpret the same actions. An
action holds everything that an interpreter needs; none of them asks the schedule again.

Words used here and in all schedules:

minibatch     one item of the user's loader.
microbatch    what a stage runs: a part of a minibatch, or a whole one where the schedule does not cut them.
round         the microbatches that one optimizer step of a stage learns from, over all its replicas.
version       the weights of a stage after so many optimizer steps; version 0 is what it held when the schedule began.

All are counted from 0 within one schedule. Where minibatches are cut into m microbatches, microbatch k is part k mod m
of minibatch k div m.

Actions are not frozen, though nobody may change one: a simulation makes millions, and a frozen dataclass takes four
times as long to make.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, Protocol

from pipedream_hpc.errors import PipedreamError

Payload = Literal["activation", "gradient"]

#: Ranks of every stage, input stage first; replica r of stage s is layout[s][r]. A rank may hold several stages
#: (interleaved 1F1B); then it has the same replica number in all of them.
Layout = tuple[tuple[int, ...], ...]


class ScheduleError(PipedreamError):
    """A schedule that must not be launched: it would hang, use the wrong weights, or cannot be made."""


@dataclass(slots=True, unsafe_hash=True)
class Recv:
    """Wait until the activation or gradient of a microbatch has arrived from a rank of another stage."""

    stage: int
    microbatch: int
    payload: Payload
    peer_stage: int
    peer_rank: int

    def __str__(self) -> str:
        return f"receive {self.payload} {self.microbatch} from rank {self.peer_rank}"


@dataclass(slots=True, unsafe_hash=True)
class Send:
    """Send the activation or gradient of a microbatch to a rank of another stage."""

    stage: int
    microbatch: int
    payload: Payload
    peer_stage: int
    peer_rank: int

    def __str__(self) -> str:
        return f"send {self.payload} {self.microbatch} to rank {self.peer_rank}"


@dataclass(slots=True, unsafe_hash=True)
class Forward:
    """Run the stage forward for a microbatch.

    Attributes:
        stage: which stage.
        microbatch: which microbatch.
        version: weight version to run on.
        split: whether its backward comes in two parts, BackwardInput and BackwardWeight.
    """

    stage: int
    microbatch: int
    version: int
    split: bool = False

    def __str__(self) -> str:
        return f"forward of microbatch {self.microbatch} on version {self.version}"


@dataclass(slots=True, unsafe_hash=True)
class Backward:
    """Run the stage backward for a microbatch. Gradients of weights add up until the stage's next OptimizerStep.

    Attributes:
        stage: which stage.
        microbatch: which microbatch.
        version: weight version to run on; the one of its forward, unless the schedule stashes no weights.
        last: whether the gradients of the round are complete on this rank after it.
    """

    stage: int
    microbatch: int
    version: int
    last: bool = False

    def __str__(self) -> str:
        return f"backward of microbatch {self.microbatch} on version {self.version}"


@dataclass(slots=True, unsafe_hash=True)
class BackwardInput:
    """Compute the gradient of the stage's input only, for which the stage before waits.

    The first part of a split backward (Qi et al., Zero Bubble Pipeline Parallelism, ICLR 2024).
    """

    stage: int
    microbatch: int
    version: int

    def __str__(self) -> str:
        return f"input backward of microbatch {self.microbatch} on version {self.version}"


@dataclass(slots=True, unsafe_hash=True)
class BackwardWeight:
    """Compute the gradients of the stage's weights, the second part of a split backward; the microbatch is done.

    Attributes:
        stage: which stage.
        microbatch: which microbatch.
        version: weight version of its forward.
        last: whether the gradients of the round are complete on this rank after it.
    """

    stage: int
    microbatch: int
    version: int
    last: bool = False

    def __str__(self) -> str:
        return f"weight backward of microbatch {self.microbatch} on version {self.version}"


@dataclass(slots=True, unsafe_hash=True)
class ReduceGradients:
    """Average the gradients of a round over the replicas of the stage.

    Every replica takes part, even one that had no microbatch in a short round.

    Attributes:
        stage: which stage.
        round: which round.
        n_microbatches: microbatches of the round over all replicas, by which the sum is divided.
    """

    stage: int
    round: int
    n_microbatches: int

    def __str__(self) -> str:
        return f"reduce the gradients of round {self.round} over {_counted(self.n_microbatches)}"


@dataclass(slots=True, unsafe_hash=True)
class AllReduceGradNorm:
    """Sum the squared gradient norm and the overflows of a round over all ranks of all stages.

    By this norm all stages clip alike, and no stage updates where one overflowed. Possible only where no microbatch is
    in flight between two rounds. A rank does it once a round, for all stages that it holds.
    """

    stage: int
    round: int
    n_microbatches: int

    def __str__(self) -> str:
        return f"all-reduce the gradient norm of round {self.round} over {_counted(self.n_microbatches)}"


@dataclass(slots=True, unsafe_hash=True)
class OptimizerStep:
    """Apply the gradients of a round to the newest version of the stage, which makes the next version.

    Attributes:
        stage: which stage.
        version: the version that is made, by round `version - 1`.
        n_microbatches: microbatches of the round over all replicas.
    """

    stage: int
    version: int
    n_microbatches: int

    def __str__(self) -> str:
        return f"optimizer step to version {self.version} over {_counted(self.n_microbatches)}"


Action = (
    Recv
    | Send
    | Forward
    | Backward
    | BackwardInput
    | BackwardWeight
    | ReduceGradients
    | AllReduceGradNorm
    | OptimizerStep
)


def _counted(n_microbatches: int) -> str:
    return f"{n_microbatches} microbatch{'es' * (n_microbatches != 1)}"


class Schedule(Protocol):
    """The actions of every rank, in order: a pure function of layout and number of microbatches."""

    @property
    def layout(self) -> Layout: ...

    @property
    def total_microbatches(self) -> int:
        """Microbatches that pass through the pipeline."""
        ...

    @property
    def training(self) -> bool:
        """Whether there are backwards and optimizer steps."""
        ...

    @property
    def newest(self) -> bool:
        """Whether every forward is promised to run on the newest version of its stage."""
        ...

    @property
    def stashes(self) -> bool:
        """Whether every backward is promised to run on the version of its forward."""
        ...

    def sources(self, stage: int) -> tuple[int, ...]:
        """Stages that send activations to `stage`, nearest first."""
        ...

    def targets(self, stage: int) -> tuple[int, ...]:
        """Stages that `stage` sends activations to, nearest first."""
        ...

    def round_size(self, stage: int, round: int) -> int:
        """Microbatches of a round of `stage`, over all its replicas."""
        ...

    def actions(self, rank: int) -> Iterator[Action]:
        """The actions of `rank`, in the order they are carried out."""
        ...

    def in_flight(self, stage: int) -> int:
        """Most microbatches between forward and end of backward at once, on a replica of `stage`."""
        ...

    def versions(self, stage: int) -> int:
        """Weight slabs that a replica of `stage` needs: so many newest versions are kept."""
        ...

    def splits(self, stage: int) -> bool:
        """Whether any backward in `stage` is split."""
        ...

    def lag(self, stage: int) -> int:
        """Most microbatches of a replica of `stage` that wait for BackwardWeight while another's backward runs."""
        ...

    def waiting(self, stage: int) -> int:
        """Most microbatches of a replica of `stage` that wait for BackwardWeight at once."""
        ...
