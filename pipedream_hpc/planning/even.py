"""Even: a plan from nothing but the numbers of replicas, such as 2-1-1."""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import accumulate

from pipedream_hpc.errors import PipedreamError
from pipedream_hpc.planning.plan import Plan, StagePlan, warm_up
from pipedream_hpc.planning.profile import Profile


def replicas_of(config: str) -> tuple[int, ...] | None:
    """The replicas per stage of a configuration as the paper writes it; None if it is none."""
    if not re.fullmatch(r"[1-9]\d*(-[1-9]\d*)*", config):
        return None
    return tuple(int(count) for count in config.split("-"))


def even(profile: Profile, replicas: Sequence[int]) -> Plan:
    """Runs of layers, one for each stage, so that the slowest stage per replica is as fast as can be.

    Raises:
        PipedreamError: there are more stages than layers.
    """
    layers, stages = profile.layers, len(replicas)
    if stages > len(layers):
        raise PipedreamError(
            f"{profile.model} has {len(layers)} layers and cannot be cut into {stages} stages: ask for fewer"
        )
    times = [0.0, *accumulate(layer.work_s for layer in layers)]
    # best[k][end]: the slowest of the first k stages when they end before layer `end`, and where the k-th begins.
    best: list[dict[int, tuple[float, int]]] = [{0: (0.0, 0)}]
    for number, count in enumerate(replicas, start=1):
        row: dict[int, tuple[float, int]] = {}
        for end in range(number, len(layers) - (stages - number) + 1):
            row[end] = min(
                (max(slowest, (times[end] - times[begin]) / count), begin)
                for begin, (slowest, _) in best[-1].items()
                if begin < end
            )
        best.append(row)
    ends, end = [], len(layers)
    for row in reversed(best[1:]):
        ends.append(end)
        end = row[end][1]
    bounds = [0, *reversed(ends)]
    made, rank = [], 0
    for index, count in enumerate(replicas):
        own = layers[bounds[index] : bounds[index + 1]]
        forward_s, backward_s = sum(x.forward_s for x in own), sum(x.backward_s for x in own)
        made.append(
            StagePlan(
                layers=tuple(layer.name for layer in own),
                ranks=tuple(range(rank, rank + count)),
                forward_s=forward_s,
                backward_s=backward_s,
                weight_gradient_s=sum(x.weight_gradient_s for x in own),
                waiting_bytes=sum(x.waiting_bytes for x in own),
                outside_bytes=sum(x.outside_bytes for x in own),
                compute_s=(forward_s + backward_s) / count,
                sync_s=0.0,
                boundary_s=0.0,
                in_flight=warm_up(replicas, index) + 1,
                parameter_bytes=sum(layer.parameter_bytes for layer in own),
                output_bytes=own[-1].output_bytes,
                output_shape=None,
                output_dtype=None,
                limit="compute",
            )
        )
        rank += count
    return Plan(
        model=profile.model,
        minibatch=profile.minibatch,
        schedule="1f1b" if all(count == 1 for count in replicas) else "1f1b-rr",
        cost="ring",
        stages=tuple(made),
        bottleneck_s=max(stage.compute_s for stage in made),
        single_device_s=profile.total_s,
    )
