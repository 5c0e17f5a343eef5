"""Presets: topologies with a name.

Bandwidths are one-way, in bytes per second, as one pair of devices sees them. Latencies, in seconds, are orders
of magnitude. Where the machine is available, measure it with `pipedream probe` instead.

| name             | counts          | device            | links                                  |
|------------------|-----------------|-------------------|----------------------------------------|
| cluster-a        | machines        | Titan X, 12 GB    | 25 Gb/s Ethernet                       |
| cluster-b        | machines        | V100, 16 GB       | 10 Gb/s Ethernet                       |
| sosp19-v100      | GPUs, servers   | V100, 16 GB       | PCIe 10 GB/s, 10 Gb/s Ethernet         |
| dgx-a100         | GPUs, nodes     | A100, 80 GB       | NVLink 235 GB/s, HDR 25 GB/s a GPU     |
| dgx-h100         | GPUs, nodes     | H100, 80 GB       | NVLink 370 GB/s, NDR 50 GB/s a GPU     |
| ethernet-1g      | nodes           | any               | 1 Gb/s Ethernet                        |
| ethernet-10g     | nodes           | any               | 10 Gb/s Ethernet                       |
| infiniband-hdr   | nodes           | any               | 200 Gb/s InfiniBand                    |

Sources:
    cluster-a, cluster-b: arXiv 1806.03377, section 5.1; one GPU per machine, so one level.
    sosp19-v100: Narayanan et al., SOSP 2019, Table 2, its Cluster-A: 4 V100 on PCIe per server, 10 Gb/s
        between servers; "4x4" is counts (4, 4). PCIe 3.0 x16 is 15.75 GB/s nominal; a copy through the
        host's root complex typically reaches 10 GB/s.
    dgx-a100: NVIDIA DGX A100 data sheet: NVLink 3, 12 links, 600 GB/s both ways, so 300 GB/s nominal
        one way; 8 x 200 Gb/s HDR. dgx-h100: DGX H100 data sheet: NVLink 4, 18 links, 900 GB/s both ways,
        so 450 GB/s nominal one way; 8 x 400 Gb/s NDR. A copy reaches about four fifths of the nominal
        rate: NCCL (src/graph/topo.h) assumes 20.0 and 20.6 GB/s per link, which makes 240 and 371 GB/s,
        and NVIDIA/nccl issue 1264 reports 380 GB/s measured on the H100.
    ethernet-1g, ethernet-10g, infiniband-hdr: line rate (IEEE 802.3, InfiniBand HDR 4x) over 8 bits.

On a DGX every GPU has its own network card: one message uses one card, an all-reduce among all GPUs uses
all cards at once. Their network level therefore has reduce_bandwidth = min(NVLink, GPUs per node x card)
and reduce_latency_s = 2 (m - 1) hops for the m devices; other presets leave both at None.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from pipedream_hpc.errors import PipedreamError
from pipedream_hpc.planning.topology import Level, Topology

_GIGABIT = 1e9 / 8
#: Latencies of a message from memory to memory, in seconds.
_NVLINK, _PCIE, _INFINIBAND, _ETHERNET = 3e-6, 10e-6, 2e-6, 30e-6


@dataclass(frozen=True)
class _Preset:
    """A topology without counts.

    Attributes:
        links: (level name, α in seconds, β in bytes per second), innermost level first.
        device: what one device is.
        memory_bytes: memory of one device; None when unknown.
        rails: whether each device of a node has its own outer link.
    """

    links: tuple[tuple[str, float, float], ...]
    device: str = "any"
    memory_bytes: int | None = None
    rails: bool = False


_PRESETS = {
    "cluster-a": _Preset((("network", _ETHERNET, 25 * _GIGABIT),), "Titan X", 12 * 10**9),
    "cluster-b": _Preset((("network", _ETHERNET, 10 * _GIGABIT),), "V100", 16 * 10**9),
    "sosp19-v100": _Preset(
        (("node", _PCIE, 10e9), ("network", _ETHERNET, 10 * _GIGABIT)), "V100", 16 * 10**9
    ),
    "dgx-a100": _Preset(
        (("node", _NVLINK, 235e9), ("network", _INFINIBAND, 200 * _GIGABIT)), "A100", 80 * 10**9, rails=True
    ),
    "dgx-h100": _Preset(
        (("node", _NVLINK, 370e9), ("network", _INFINIBAND, 400 * _GIGABIT)), "H100", 80 * 10**9, rails=True
    ),
    "ethernet-1g": _Preset((("network", _ETHERNET, _GIGABIT),)),
    "ethernet-10g": _Preset((("network", _ETHERNET, 10 * _GIGABIT),)),
    "infiniband-hdr": _Preset((("network", _INFINIBAND, 200 * _GIGABIT),)),
}  # fmt: skip
NAMES = tuple(_PRESETS)


def preset(name: str, counts: Sequence[int]) -> Topology:
    """Return the preset topology called `name`.

    Args:
        name: one of NAMES.
        counts: number of components that each level joins, innermost first, such as (8, 4) for four nodes
            of eight GPUs.

    Raises:
        PipedreamError: there is no such preset, the number of counts differs from its number of levels,
            or a count is less than 1.
    """
    if name not in _PRESETS:
        raise PipedreamError(f"there is no preset '{name}': choose one of {', '.join(NAMES)}")
    chosen = _PRESETS[name]
    names = [level for level, _, _ in chosen.links]
    if len(counts) != len(names):
        raise PipedreamError(
            f"field 'counts' of preset '{name}' should be {len(names)} number{'s' * (len(names) > 1)}, one for each "
            f"level ({', '.join(names)}), but is {list(counts)}"
        )
    for index, count in enumerate(counts):
        if count < 1:
            raise PipedreamError(f"field 'counts[{index}]' of preset '{name}' should be 1 or more but is {count}")
    levels = [
        Level(level, count, latency_s, bandwidth)
        for (level, latency_s, bandwidth), count in zip(chosen.links, counts, strict=True)
    ]
    if chosen.rails:
        inner, outer = levels
        devices = math.prod(counts)
        levels[-1] = Level(
            outer.name,
            outer.count,
            outer.latency_s,
            outer.bandwidth,
            reduce_latency_s=2 * (devices - 1) * outer.latency_s,
            reduce_bandwidth=min(inner.bandwidth, inner.count * outer.bandwidth),
        )
    return Topology(tuple(levels), chosen.device, chosen.memory_bytes)
