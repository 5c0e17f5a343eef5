"""Placement: which devices a stage gets, and which links its replicas then use.

Devices stand in a row, node by node, and the stages of a pipeline take runs of it one after the
other. Either the pipeline runs along all devices, or a copy of it along each node (each switch,
...), its stages replicated over the copies. Two nodes of four devices::

    one row of 8               0 0 0 0 0 0 1 1        6-2: stage 1 shares a node with stage 0
                              └─node──┘└─node──┘
    two rows of 4              0 0 0 1  0 0 0 1       6-2: boundaries stay inside the nodes
                              └─row───┘└─row───┘

Whole-node recursion (SOSP 2019, section 3.1) cannot reach the first: 15-1 on 4 x 4 is one of them.
Round robin keeps minibatch k in row k mod copies from the first stage to the last.
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
class Row:
    """A row of `devices`, of which the topology has `copies` side by side.

    Attributes:
        topology: what it is a part of.
        devices: in one row: the devices of one component of some level.
        copies: devices * copies are all there are.
    """

    topology: Topology
    devices: int
    copies: int

    def spans(self, first: Any, last: Any) -> list[Ints]:
        """How wide a stage on devices first to last - 1 of every row is, by level.

        Returns:
            For each level the most of its components that are in use within one component of the
            next level; 1 where all replicas are within one. Arrays of the arguments' shape.
        """
        first, last = np.broadcast_arrays(np.asarray(first), np.asarray(last))
        spans, size = [], 1
        for level in self.topology.levels:
            if size * level.count <= self.devices:
                a, b, full = first // size, (last - 1) // size, level.count
                apart = b // full - a // full
                ends = np.maximum(full - a % full, b % full + 1)
                spans.append(np.where(apart == 0, b - a + 1, np.where(apart == 1, ends, full)))
            else:  # the rows stand beside each other
                spans.append(np.full(first.shape, level.count))
            size *= level.count
        return spans

    def shares(self, first: Any, last: Any, *, output: bool) -> list[Floats]:
        """Which part of a row's boundary traffic goes through the busiest link, by level.

        The stage on devices first to last - 1 exchanges tensors with the stage before it, or with
        `output` the one behind it, of which only the nearest device is known here: exact if that
        stage ends within the nearest device's component, and the other stage asks for itself.

        Returns:
            For each level a number in 0 to 1; 0 where the traffic does not use that level.
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
            # The stage's devices in the nearest device's component of this level and of the one within.
            low, high = np.maximum(first, nearest // outer * outer), np.minimum(last, (nearest // outer + 1) * outer)
            near = np.maximum(
                np.minimum(last, (nearest // size + 1) * size) - np.maximum(first, nearest // size * size), 0
            )
            crossing = np.maximum(high - low, 0) - near
            # A component that both stages are in has one way out for all that crosses; otherwise each
            # of the stage's own components carries what its replicas send.
            busiest = np.where(near > 0, crossing, _most_in_one(low, high, size))
            shares.append(busiest / replicas)
            size = outer
        return shares

    def ranks(self, first: int, last: int) -> tuple[int, ...]:
        """Ranks of the stage on devices first to last - 1 of every row, in round-robin order."""
        return tuple(row * self.devices + device for device in range(first, last) for row in range(self.copies))


def rows_of(topology: Topology) -> list[Row]:
    """All rows: the whole topology first, then its components, the largest first.

    Rows of one device are left out: all of them together are one stage of the whole row.
    """
    sizes = set(accumulate((level.count for level in topology.levels), mul)) - {1}
    return [Row(topology, size, topology.devices // size) for size in sorted(sizes, reverse=True)] or [
        Row(topology, 1, 1)
    ]


def _most_in_one(first: Ints, last: Ints, size: int) -> Ints:
    """The most devices that first to last - 1 have in one component of `size` devices."""
    a, b = first // size, (last - 1) // size
    ends = np.maximum((a + 1) * size - first, last - b * size)
    return np.where(last <= first, 0, np.where(a == b, last - first, np.where(b - a == 1, ends, size)))
