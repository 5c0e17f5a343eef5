"""Memory that a replica of a stage takes on its device, by part.

With f minibatches in flight and v weight versions (weight stashing: v = f)::

    weights       v |w|             one slab per version (paper, section 3.3)
    gradients       |w|             one set, handed to the optimizer
    optimizer     k |w|             k depends on optimizer and dtype: OPTIMIZERS
    activations   f S               what autograd keeps from forward to backward; with recompute only
                                    the stage's input is kept, and S exists once at a time
    slots         (f + 1) a_in      activations received: one per minibatch in flight, and one ahead
                  + 2 a_out         gradients received: one in use, one ahead

Slots belong to channels. A replica has one channel to every rank of the neighbouring stages that it exchanges tensors
with. Partitioning counts one channel per side; the plan that is run counts all of them.

The current minibatch counts as in flight: on the last stage f is 1, not 0. Where backwards are split, the backward for
the weights is deferred: that of l microbatches while the backward of another one runs, and of at most q. Then f is
larger; additionally q g are kept, where g are the output gradients of the layers that defer theirs, and q times the
gradients of the other weights; recompute keeps (l + 1) S; and 2 + l gradients are received.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pipedream_hpc.errors import PipedreamError
from pipedream_hpc.files import STRICT
from pipedream_hpc.planning.profile import Bytes

if TYPE_CHECKING:  # numpy takes 0.1 s to import, which `pipedream --help` need not wait for
    import numpy as np
    import numpy.typing as npt

#: A number, or an array of numbers.
Amount = Any

#: Bytes of optimizer state per byte of weights. `-bf16` is for bfloat16 weights with, as usual in mixed
#: precision training, a float32 master copy and float32 states.
OPTIMIZERS: dict[str, float] = {
    "sgd": 0.0,
    "momentum": 1.0,
    "adam": 2.0,
    "sgd-bf16": 2.0,
    "momentum-bf16": 4.0,
    "adam-bf16": 6.0,
}


def optimizer_kind(state_bytes: int, weight_bytes: int, *, master_weights: bool = False) -> str | None:
    """Return the kind of an optimizer, one of OPTIMIZERS, that has at least this much state; None if it has more.

    Args:
        state_bytes: of its state for some weights, without a master copy.
        weight_bytes: of the weights.
        master_weights: whether weights are bfloat16 with a float32 master copy.
    """
    ratio = state_bytes / max(weight_bytes, 1)
    kind = next((kind for kind in ("sgd", "momentum", "adam") if ratio <= OPTIMIZERS[kind] + 0.01), None)
    return f"{kind}-bf16" if kind and master_weights else kind


Recompute = Literal["never", "auto", "always"]


@dataclass(frozen=True)
class MemoryParts:
    """Bytes on one device, by part; the module docstring defines the parts."""

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
    """What training keeps in memory, given its optimizer and schedule.

    Attributes:
        optimizer: one of OPTIMIZERS.
        versions: weight versions kept; None: one per minibatch in flight.
        n_microbatches: microbatches per minibatch; each has its share of the minibatch's activations.
        all_in_flight: whether all microbatches of a minibatch are in flight at once (GPipe).
    """

    optimizer: str = "momentum"
    versions: int | None = None
    n_microbatches: int = 1
    all_in_flight: bool = False

    def __post_init__(self) -> None:
        if self.optimizer not in OPTIMIZERS:
            raise PipedreamError(
                f"there is no optimizer kind '{self.optimizer}': choose one of {', '.join(OPTIMIZERS)}"
            )

    def in_flight(self, replicas: Amount, later_devices: Amount) -> npt.NDArray[np.int64]:
        """Return the number of microbatches in flight on one replica (minibatches, where they are not cut).

        Args:
            replicas: replicas of the stage.
            later_devices: number of devices that run later stages.
        """
        import numpy as np

        ahead = -(-np.asarray(later_devices) // replicas)
        own = -(-self.n_microbatches // np.asarray(replicas))
        if self.all_in_flight:
            return np.broadcast_to(own, ahead.shape).astype(np.int64)
        if self.versions is not None and self.n_microbatches > 1:
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
        unsplit_bytes: Amount = 0,
    ) -> dict[str, Amount]:
        """Return the bytes of each part, for numbers or arrays of numbers.

        Args:
            parameter_bytes: |w| of the stage.
            stash_bytes: S for a whole minibatch.
            input_bytes: a_in for a whole minibatch; 0 for the input stage, which reads its own data.
            output_bytes: a_out for a whole minibatch; 0 for the last stage.
            in_flight: result of `in_flight`.
            recompute: whether the forward is run again before the backward.
            lag: l, where backwards are split; else 0.
            waiting: q, where backwards are split; else 0.
            waiting_bytes: g for a whole minibatch.
            unsplit_bytes: bytes of the weights whose gradients are not deferred.
        """
        import numpy as np

        versions = in_flight if self.versions is None else np.minimum(self.versions, in_flight * self.n_microbatches)
        fraction, recomputed = 1 / self.n_microbatches, np.minimum(1 + lag, in_flight)
        return {
            "weights": versions * parameter_bytes,
            "gradients": parameter_bytes + waiting * unsplit_bytes,
            "optimizer": OPTIMIZERS[self.optimizer] * parameter_bytes,
            "activations": ((recomputed if recompute else in_flight) * stash_bytes + waiting * waiting_bytes)
            * fraction,
            "slots": ((in_flight + 1) * input_bytes + (2 + lag) * output_bytes) * fraction,
        }

    def total(self, **sizes: Amount) -> Amount:
        """Return the sum of all parts; arguments as for `parts`."""
        return sum(self.parts(**sizes).values())
