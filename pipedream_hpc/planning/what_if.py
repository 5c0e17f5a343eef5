"""What-if analysis: plans for fewer machines and for other network bandwidths."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from pipedream_hpc.errors import PipedreamError
from pipedream_hpc.planning.plan import Plan
from pipedream_hpc.planning.profile import Profile
from pipedream_hpc.planning.solver import Request, solve
from pipedream_hpc.planning.solver.cuts import cuts_of
from pipedream_hpc.planning.topology import Topology

#: Networks in bytes per second: 1, 10, 25 and 100 Gb/s.
NETWORKS = (0.125e9, 1.25e9, 3.125e9, 12.5e9)


@dataclass(frozen=True)
class Case:
    """One cell of the what-if table.

    Attributes:
        devices: total number of devices.
        bandwidth: bandwidth of the outermost level, in bytes per second.
        plan: plan for these devices and this bandwidth; None if there is none.
        why_not: why there is no plan; empty if there is one.
    """

    devices: int
    bandwidth: float
    plan: Plan | None
    why_not: str = ""


def what_if(profile: Profile, topology: Topology, request: Request) -> list[Case]:
    """Plan for 1, 2, 4, ... components of the outermost level, with its own bandwidth and each one of NETWORKS.

    Returns:
        The cases, sorted by devices, then by bandwidth.
    """
    cuts = cuts_of(profile)
    *inner, outer = topology.levels
    counts = sorted({*(1 << power for power in range(outer.count.bit_length())), outer.count})
    cases = []
    for count in counts:
        for bandwidth in sorted({*NETWORKS, outer.bandwidth}):
            level = dataclasses.replace(
                outer, count=count, bandwidth=bandwidth, reduce_latency_s=None, reduce_bandwidth=None
            )
            outermost = outer if (count, bandwidth) == (outer.count, outer.bandwidth) else level
            varied = Topology((*inner, outermost), topology.device, topology.device_memory_bytes)
            try:
                cases.append(Case(varied.devices, bandwidth, solve(profile, varied, request, cuts=cuts)))
            except PipedreamError as error:
                cases.append(Case(varied.devices, bandwidth, None, str(error)))
    return cases
