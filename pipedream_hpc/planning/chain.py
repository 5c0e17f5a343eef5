"""Chain: a profile seen as a row of layers with sums that the solver can ask for at once."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate

import numpy as np
import numpy.typing as npt

from pipedream_hpc.planning.profile import LayerProfile, Profile

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Chain:
    """Places to cut between layers, and prefix sums up to each.

    Position i stands before layer ends[i]; the first is the model's input, the last its output.

    Attributes:
        layers: of the profile, in topological order.
        ends: number of layers before each position.
        time_s: forward and backward time of all layers before each position.
        parameter_bytes: likewise.
        output_bytes: bytes that cross a cut at each position; 0 at both ends.
    """

    layers: tuple[LayerProfile, ...]
    ends: tuple[int, ...]
    time_s: Floats
    parameter_bytes: Floats
    output_bytes: Floats

    def __len__(self) -> int:
        """Pieces between neighbouring positions."""
        return len(self.ends) - 1


def chain_of(profile: Profile) -> Chain:
    """The places where `profile` can be cut by sending on the output of one layer.

    Behind a layer is such a place if nothing but its output is still needed there. Branches, and
    all else that stands between two such places, stay in one stage.
    """
    count = len(profile.layers)
    needed_until = list(range(count))  # last consumer of each layer's output
    for producer, consumer in profile.edges:
        needed_until[producer] = max(needed_until[producer], consumer)
    ends, earlier_needed_until = [0], -1
    for index in range(count - 1):
        if earlier_needed_until <= index < needed_until[index]:
            ends.append(index + 1)
        earlier_needed_until = max(earlier_needed_until, needed_until[index])
    ends.append(count)

    def prefix(values: list[float]) -> Floats:
        sums = [0.0, *accumulate(values)]
        return np.array([sums[end] for end in ends])

    crossing = [0.0, *(float(profile.layers[end - 1].output_bytes) for end in ends[1:-1]), 0.0]
    return Chain(
        layers=profile.layers,
        ends=tuple(ends),
        time_s=prefix([layer.forward_s + layer.backward_s for layer in profile.layers]),
        parameter_bytes=prefix([float(layer.parameter_bytes) for layer in profile.layers]),
        output_bytes=np.array(crossing),
    )
