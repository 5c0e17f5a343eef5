"""Placement: which devices a stage gets, and which links its replicas use.

Devices form a row, node by node, and the stages of a pipeline occupy consecutive runs of it. Either one
pipeline runs along all devices, or a copy of it runs along each node (each switch, ...), and its stages
are replicated over the copies. Two nodes of four devices::

    one row of 8               0 0 0 0 0 0 1 1        6-2: stage 1 shares a node with stage 0
                              └─node──┘└─node──┘
    two rows of 4              0 0 0 1  0 0 0 1       6-2: boundaries stay inside the nodes
                              └─row───┘└─row───┘

The recursion over whole nodes (SOSP 2019, section 3.1) cannot produce the first kind, such as 15-1 on
4 x 4. Round robin keeps minibatch k in row k mod copies from the first stage to the last.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate
from operator import mul
from typing import Any

import numpy as np
import numpy.typing as npt

from pipedream_hpc.planning.topology import Topology

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class DeviceRow:
    """A row of devices; the topology consists of `copies` equal rows.

    Attributes:
        topology: the topology.
        devices: number of devices in one row: those of one component of some level.
        copies: number of rows; devices * copies is the number of all devices.
    """

    topology: Topology
    devices: int
    copies: int

    def spans(self, first: Any, last: Any) -> list[Ints]:
        """Return how many components a stage on devices first to last - 1 of every row spans, by level.

        Returns:
            For each level the largest number of its components that the stage uses within one component of
            the next level; 1 where all replicas are within one component. Arrays of the arguments' shape.
        """
        first, last = np.broadcast_arrays(np.asarray(first), np.asarray(last))
        spans, size = [], 1
        for level in self.topology.levels:
            if size * level.count <= self.devices:
                a, b, full = first // size, (last - 1) // size, level.count
                apart = b // full - a // full
                ends = np.maximum(full - a % full, b % full + 1)
                spans.append(np.where(apart == 0, b - a + 1, np.where(apart == 1, ends, full)))
            else:  # the level joins several rows
                spans.append(np.full(first.shape, level.count))
            size *= level.count
        return spans

    def shares(self, first: Any, last: Any, *, output: bool) -> list[Floats]:
        """Return the fraction of a row's boundary traffic that goes through the busiest link, by level.

        The stage on devices first to last - 1 exchanges tensors with the previous stage, or with `output`
        the next one. Only the nearest device of that stage is known here; the result is exact if the other
        stage ends within the nearest device's component. The other stage's side is computed separately.

        Returns:
            For each level a number from 0 to 1; 0 where the traffic does not use that level.
        """
        first, last = np.broadcast_arrays(np.asarray(first), np.asarray(last))
        nearest = last if output else first - 1
        replicas = last - first
        shares, size = [], 1
        for level in self.topology.levels:
            outer = size * level.count
            if outer > self.devices:
                shares.append(np.zeros(first.shape))
                continue
            # The stage's devices in the nearest device's component of this level, and of the level below.
            low, high = np.maximum(first, nearest // outer * outer), np.minimum(last, (nearest // outer + 1) * outer)
            near = np.maximum(
                np.minimum(last, (nearest // size + 1) * size) - np.maximum(first, nearest // size * size), 0
            )
            crossing = np.maximum(high - low, 0) - near
            # If both stages are in one component, its single link carries everything that crosses. Otherwise
            # each of the stage's components carries what its own replicas send.
            busiest = np.where(near > 0, crossing, _most_in_one(low, high, size))
            shares.append(busiest / replicas)
            size = outer
        return shares

    def ranks(self, first: int, last: int) -> tuple[int, ...]:
        """Return the ranks of the stage on devices first to last - 1 of every row, in round-robin order."""
        return tuple(row * self.devices + device for device in range(first, last) for row in range(self.copies))


def device_rows(topology: Topology) -> list[DeviceRow]:
    """Return all kinds of rows: the whole topology first, then its components, largest first.

    Rows of one device are omitted: one stage on the whole row is the same.
    """
    sizes = set(accumulate((level.count for level in topology.levels), mul)) - {1}
    return [DeviceRow(topology, size, topology.devices // size) for size in sorted(sizes, reverse=True)] or [
        DeviceRow(topology, 1, 1)
    ]


def _most_in_one(first: Ints, last: Ints, size: int) -> Ints:
    """Return the largest number of the devices first to last - 1 within one component of `size` devices."""
    a, b = first // size, (last - 1) // size
    ends = np.maximum((a + 1) * size - first, last - b * size)
    return np.where(last <= first, 0, np.where(a == b, last - first, np.where(b - a == 1, ends, size)))
