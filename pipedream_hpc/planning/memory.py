"""Memory of a device that holds a replica of a stage, by part.

With f minibatches in flight and v weight versions (weight stashing: v = f)::

    weights       v |w|             one slab per version (paper, section 3.3)
    gradients       |w|             one set, handed to the optimizer
    optimizer     k |w|             k by kind and dtype: OPTIMIZERS
    activations   f S               what autograd keeps from forward to backward; with recompute
                                    the stage's input stays instead, and S exists once at a time
    slots         (f + 1) a_in      activations received: those in flight, and one ahead
                  + 2 a_out         gradients received: one at work, one ahead

Slots are those of a channel, and a replica has one with every rank of the next stage, or the one before, that it talks
to. Partitioning counts one; what is run counts all.

The current minibatch counts as in flight: on the last stage f is 1, not 0. Where backwards are split, and the weights'
gradients of l units wait while another's backward runs, and of q at most, f is larger; q g are kept as well, g being
the gradients of outputs of layers that put theirs off, and q times the gradients of the other weights; recompute keeps
(l + 1) S; and 2 + l gradients are received.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
import numpy.typing as npt

from pipedream_hpc.errors import PipedreamError
from pipedream_hpc.files import STRICT
from pipedream_hpc.planning.profile import Bytes

#: A number, or an array of them.
Amount = Any

#: Bytes of optimizer state per byte of weights. `-bf16` holds bfloat16 weights and, as all mixed
#: precision training does, a float32 copy of them and float32 states.
OPTIMIZERS: dict[str, float] = {
    "sgd": 0.0,
    "momentum": 1.0,
    "adam": 2.0,
    "sgd-bf16": 2.0,
    "momentum-bf16": 4.0,
    "adam-bf16": 6.0,
}

Recompute = Literal["never", "auto", "always"]


@dataclass(frozen=True)
class MemoryParts:
    """Bytes on one device, by part; see the head of this module."""

    __pydantic_config__ = STRICT
    PARTS: ClassVar[tuple[str, ...]] = ("weights", "gradients", "optimizer", "activations", "slots")

    weights: Bytes
    gradients: Bytes
    optimizer: Bytes
    activations: Bytes
    slots: Bytes

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.optimizer + self.activations + self.slots


@dataclass(frozen=True)
class MemoryRule:
    """What a way of training keeps in memory.

    Attributes:
        optimizer: one of OPTIMIZERS.
        versions: weight versions kept; None: as many as minibatches in flight.
        microbatches: pieces a minibatch is passed on in; each has that part of its activations.
        all_in_flight: whether all microbatches of a minibatch are in flight at once (GPipe).
    """

    optimizer: str = "momentum"
    versions: int | None = None
    microbatches: int = 1
    all_in_flight: bool = False

    def __post_init__(self) -> None:
        if self.optimizer not in OPTIMIZERS:
            raise PipedreamError(
                f"there is no optimizer kind '{self.optimizer}': choose one of {', '.join(OPTIMIZERS)}"
            )

    def in_flight(self, replicas: Amount, behind: Amount) -> npt.NDArray[np.int64]:
        """Minibatches (or microbatches) alive on one replica.

        Args:
            replicas: of the stage.
            behind: devices that run later stages.
        """
        ahead = -(-np.asarray(behind) // replicas)
        own = -(-self.microbatches // np.asarray(replicas))
        if self.all_in_flight:
            return np.broadcast_to(own, ahead.shape).astype(np.int64)
        if self.versions is not None and self.microbatches > 1:
            return np.asarray(np.minimum(ahead + 1, own) if self.versions == 1 else ahead + 1)
        return np.asarray(ahead + 1)

    def parts(
        self,
        *,
        parameter_bytes: Amount,
        stash_bytes: Amount,
        input_bytes: Amount,
        output_bytes: Amount,
        in_flight: Amount,
        recompute: bool,
        lag: int = 0,
        waiting: int = 0,
        waiting_bytes: Amount = 0,
        outside_bytes: Amount = 0,
    ) -> dict[str, Amount]:
        """Bytes by part, for numbers or arrays of them.

        Args:
            parameter_bytes: |w| of the stage.
            stash_bytes: S for a whole minibatch.
            input_bytes: a_in for a whole minibatch; 0 for the input stage, which reads its data itself.
            output_bytes: a_out likewise; 0 for the last stage.
            in_flight: see `in_flight`.
            recompute: whether the forward is run again before the backward.
            lag: l, where backwards are split.
            waiting: q, likewise.
            waiting_bytes: g for a whole minibatch, where backwards are split.
            outside_bytes: of weights whose gradients are not put off, where others' are.
        """
        versions = in_flight if self.versions is None else np.minimum(self.versions, in_flight * self.microbatches)
        piece, held = 1 / self.microbatches, np.minimum(1 + lag, in_flight)
        return {
            "weights": versions * parameter_bytes,
            "gradients": parameter_bytes + waiting * outside_bytes,
            "optimizer": OPTIMIZERS[self.optimizer] * parameter_bytes,
            "activations": ((held if recompute else in_flight) * stash_bytes + waiting * waiting_bytes) * piece,
            "slots": ((in_flight + 1) * input_bytes + (2 + lag) * output_bytes) * piece,
        }

    def total(self, **sizes: Amount) -> Amount:
        """All parts together; arguments as for `parts`."""
        return sum(self.parts(**sizes).values())
