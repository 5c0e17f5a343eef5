"""Topology: the devices there are and the links that join them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, ClassVar

from annotated_types import Gt

from pipedream_hpc.files import STRICT
from pipedream_hpc.planning.profile import Bytes, Count, Seconds

Bandwidth = Annotated[float, Gt(0)]


@dataclass(frozen=True)
class Level:
    """`count` components of the level below, joined by links of one kind.

    A message of n bytes takes latency_s + n / bandwidth seconds (the α-β model).

    Attributes:
        name: `node` for the devices of one node, `network` for the nodes, ...
        count: components joined.
        latency_s: α in seconds.
        bandwidth: bytes per second, one way.
    """

    __pydantic_config__ = STRICT

    name: str
    count: Count
    latency_s: Seconds
    bandwidth: Bandwidth


@dataclass(frozen=True)
class Topology:
    """Levels from the inside out: devices in a node first, then nodes, ...

    Attributes:
        levels: innermost first; the number of devices is the product of their counts.
        device: what one device is, such as `cpu` or the GPU's name.
        device_memory_bytes: memory of one device; None when unknown.
        hosts: host name of every rank when measured, else empty.
    """

    __pydantic_config__ = STRICT
    FORMAT: ClassVar[str] = "pipedream-topology"
    VERSION: ClassVar[int] = 1

    levels: tuple[Level, ...]
    device: str
    device_memory_bytes: Bytes | None = None
    hosts: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not self.levels:
            raise ValueError("a topology needs at least one level")
        if self.hosts and len(self.hosts) != self.devices:
            raise ValueError(f"hosts names {len(self.hosts)} ranks but the levels multiply to {self.devices}")

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
