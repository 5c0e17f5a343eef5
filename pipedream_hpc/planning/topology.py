"""Topology: the devices there are and the links that join them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, ClassVar

from annotated_types import Ge

from pipedream_hpc.files import STRICT
from pipedream_hpc.planning.profile import Bytes, Count, Seconds

#: Bytes per second; what is divided by no less stays finite.
SLOWEST = 1e-3
Bandwidth = Annotated[float, Ge(SLOWEST)]


@dataclass(frozen=True)
class Level:
    """`count` components of the level below, joined by links of one kind.

    A message of n bytes takes latency_s + n / bandwidth seconds (the α-β model). An all-reduce of n
    bytes among the m devices of this level and all below takes, if it was measured,
    reduce_latency_s + 2 (m - 1) / m * n / reduce_bandwidth seconds (a ring).

    Attributes:
        name: `node` for the devices of one node, `network` for the nodes, ...
        count: components joined.
        latency_s: α in seconds.
        bandwidth: bytes per second, one way.
        reduce_latency_s: seconds of an all-reduce of nothing; None: as point to point.
        reduce_bandwidth: bytes per second out of every device; None: as point to point.

    Raises:
        ValueError: of the two reduce_ fields only one is given.
    """

    __pydantic_config__ = STRICT

    name: str
    count: Count
    latency_s: Seconds
    bandwidth: Bandwidth
    reduce_latency_s: Seconds | None = None
    reduce_bandwidth: Bandwidth | None = None

    def __post_init__(self) -> None:
        if (self.reduce_latency_s is None) != (self.reduce_bandwidth is None):
            raise ValueError("reduce_latency_s and reduce_bandwidth go together: give both or neither")


@dataclass(frozen=True)
class Topology:
    """Levels from the inside out: devices in a node first, then nodes, ...

    Attributes:
        levels: innermost first; the number of devices is the product of their counts.
        device: what one device is, such as `cpu` or the GPU's name.
        device_memory_bytes: memory of one device; None when unknown.
        hosts: host name of every rank when measured, else empty.
        devices_of: name of every rank's device when measured, else empty.

    Raises:
        ValueError: there is no level; hosts or devices_of name another number of ranks than there are.
    """

    __pydantic_config__ = STRICT
    FORMAT: ClassVar[str] = "pipedream-topology"
    VERSION: ClassVar[int] = 1

    levels: tuple[Level, ...]
    device: str
    device_memory_bytes: Bytes | None = None
    hosts: tuple[str, ...] = ()
    devices_of: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not self.levels:
            raise ValueError("a topology needs at least one level")
        for field, names in (("hosts", self.hosts), ("devices_of", self.devices_of)):
            if names and len(names) != self.devices:
                raise ValueError(f"{field} names {len(names)} ranks but the levels multiply to {self.devices}")

    @property
    def devices(self) -> int:
        """Number of devices: the product of the levels' counts."""
        return math.prod(level.count for level in self.levels)

    @property
    def bandwidth(self) -> float:
        """Bandwidth of the slowest level, in bytes per second: what a flat plan may count on."""
        return min(level.bandwidth for level in self.levels)

    @property
    def latency_s(self) -> float:
        """Latency of the slowest level, in seconds."""
        return max(level.latency_s for level in self.levels)

    def level_between(self, a: int, b: int) -> int:
        """Index of the innermost level that holds both ranks, which are numbered node by node.

        Raises:
            ValueError: a rank that there is no device for.
        """
        if not 0 <= max(a, b) < self.devices:
            raise ValueError(f"rank {max(a, b)} has no device: the levels multiply to {self.devices}")
        level, size = 0, self.levels[0].count
        while a // size != b // size:
            level += 1
            size *= self.levels[level].count
        return level
