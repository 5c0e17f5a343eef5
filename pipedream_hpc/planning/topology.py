"""Topology: the available devices and the links between them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar

from annotated_types import Ge

from pipedream_hpc.errors import PipedreamError
from pipedream_hpc.files import STRICT
from pipedream_hpc.planning.profile import LONGEST_S, Bytes, Count, Seconds

#: Lower limit of bandwidths, in bytes per second: quotients by larger bandwidths stay finite.
SLOWEST = 1e-3
Bandwidth = Annotated[float, Ge(SLOWEST)]

#: Upper limit of the count of a level that is given as text.
MOST_PER_LEVEL = 1 << 20


@dataclass(frozen=True)
class Level:
    """`count` components of the level below, joined by links of one kind.

    A message of n bytes takes latency_s + n / bandwidth seconds (the α-β model). A measured all-reduce
    of n bytes among the m devices of this level and the levels below takes
    reduce_latency_s + 2 (m - 1) / m * n / reduce_bandwidth seconds (a ring).

    Attributes:
        name: `node` joins the devices of one node, `network` joins the nodes, ...
        count: number of components joined.
        latency_s: α in seconds.
        bandwidth: β in bytes per second, one way.
        reduce_latency_s: time of an all-reduce of zero bytes, in seconds; None: derive it from α and β.
        reduce_bandwidth: bytes per second that every device sends during an all-reduce; None: derive it from α and β.

    Raises:
        ValueError: only one of the two reduce_ fields is given.
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
    """Levels of links, innermost first: devices of a node, then nodes, ...

    Attributes:
        levels: innermost first; the number of devices is the product of their counts.
        device: kind of device, such as `cpu` or the GPU's name.
        device_memory_bytes: memory of one device; None when unknown.
        hosts: host name of every rank when measured, else empty.
        devices_of: name of every rank's device when measured, else empty.

    Raises:
        ValueError: there is no level; the length of hosts or devices_of is not the number of devices.
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
        """Bandwidth of the slowest level, in bytes per second."""
        return min(level.bandwidth for level in self.levels)

    @property
    def latency_s(self) -> float:
        """Latency of the slowest level, in seconds."""
        return max(level.latency_s for level in self.levels)

    def level_between(self, a: int, b: int) -> int:
        """Return the index of the innermost level that contains both ranks; ranks are numbered node by node.

        Raises:
            ValueError: there is no device for one of the ranks.
        """
        if not 0 <= max(a, b) < self.devices:
            raise ValueError(f"rank {max(a, b)} has no device: the levels multiply to {self.devices}")
        level, size = 0, self.levels[0].count
        while a // size != b // size:
            level += 1
            size *= self.levels[level].count
        return level


def parse_counts(devices: str) -> tuple[int, ...]:
    """Return the counts of the levels that `--devices` lists, innermost first: `8x2` is two nodes of eight devices.

    Raises:
        PipedreamError: the text is not a list of counts.
    """
    counts = []
    for word in devices.lower().split("x"):
        if not word.isascii() or not word.isdigit() or not 0 < int(word) <= MOST_PER_LEVEL:
            raise PipedreamError(
                f"--devices should be a number such as 16, or one number per level such as 8x2, each from 1 to "
                f"{MOST_PER_LEVEL}, not '{devices}'"
            )
        counts.append(int(word))
    return tuple(counts)


def parse_topology(counts: Sequence[int], bandwidth: str, latency: str | None = None, *, device: str) -> Topology:
    """Return the topology that `--bandwidth` and `--latency` describe.

    Args:
        counts: count of every level, innermost first.
        bandwidth: bytes per second of every level, separated by commas.
        latency: seconds per message of every level, separated by commas; None: no latency.
        device: kind of device.

    Raises:
        PipedreamError: a text is not one number per level, or a number is out of range.
    """
    bandwidths = _parse_numbers("--bandwidth", bandwidth, len(counts))
    latencies = [0.0] * len(counts) if latency is None else _parse_numbers("--latency", latency, len(counts))
    if min(bandwidths) < SLOWEST:
        raise PipedreamError(f"--bandwidth should be at least {SLOWEST:g} bytes per second, but is {min(bandwidths):g}")
    if not all(0 <= latency_s <= LONGEST_S for latency_s in latencies):
        raise PipedreamError(f"--latency should be from 0 to {LONGEST_S:g} seconds, not '{latency}'")
    names = ["network"] if len(counts) == 1 else ["node", "network", *(f"level{i}" for i in range(2, len(counts)))]
    levels = (Level(*each) for each in zip(names, counts, latencies, bandwidths, strict=True))
    return Topology(tuple(levels), device=device)


def _parse_numbers(option: str, text: str, count: int) -> list[float]:
    try:
        values = [float(word) for word in text.split(",")]
    except ValueError:
        raise PipedreamError(f"{option} should be numbers separated by commas, not '{text}'") from None
    if len(values) != count or not all(value < float("inf") for value in values):
        raise PipedreamError(f"{option} should be {count} number{'s' * (count > 1)}, one per level, not '{text}'")
    return values
