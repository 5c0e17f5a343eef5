"""Even plans: a plan made from the number of replicas per stage alone, such as 2-1-1."""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import accumulate

from pipedream_hpc.errors import PipedreamError
from pipedream_hpc.planning.plan import Plan, StagePlan, warm_up
from pipedream_hpc.planning.profile import Profile


def parse_replicas(text: str) -> tuple[int, ...] | None:
    """Return the replicas per stage that `text` lists, such as `2-1-1`; None if it is not such a list."""
    if not re.fullmatch(r"[1-9][0-9]{0,8}(-[1-9][0-9]{0,8})*", text):
        return None
    return tuple(int(count) for count in text.split("-"))


def even_plan(profile: Profile, replicas: Sequence[int]) -> Plan:
    """Cut the layers into contiguous stages that minimise the slowest stage's compute per replica.

    Raises:
        PipedreamError: there are more stages than layers.
    """
    return plan_with_cuts(profile, replicas, _even_cuts(profile, replicas))


def _even_cuts(profile: Profile, replicas: Sequence[int]) -> list[int]:
    """Return the first layer of every stage but the first."""
    layers, n_stages = profile.layers, len(replicas)
    if n_stages > len(layers):
        raise PipedreamError(
            f"{profile.model} has {len(layers)} layers and cannot be cut into {n_stages} stages: use fewer stages"
        )
    times = [0.0, *accumulate(layer.work_s for layer in layers)]
    # best[k][end]: the time of the slowest of the first k stages if they end before layer `end`, and the first
    # layer of stage k.
    best: list[dict[int, tuple[float, int]]] = [{0: (0.0, 0)}]
    for number, count in enumerate(replicas, start=1):
        by_end: dict[int, tuple[float, int]] = {}
        for end in range(number, len(layers) - (n_stages - number) + 1):
            by_end[end] = min(
                (max(slowest, (times[end] - times[begin]) / count), begin)
                for begin, (slowest, _) in best[-1].items()
                if begin < end
            )
        best.append(by_end)
    ends, end = [], len(layers)
    for by_end in reversed(best[1:]):
        ends.append(end)
        end = by_end[end][1]
    return ends[:0:-1]


def plan_with_cuts(profile: Profile, replicas: Sequence[int], cuts: Sequence[int]) -> Plan:
    """Return the plan of contiguous stages with these replicas.

    Args:
        profile: costs of the layers.
        replicas: of every stage.
        cuts: number of the first layer of every stage but the first, in ascending order.
    """
    layers, bounds = profile.layers, [0, *cuts, len(profile.layers)]
    stages, rank = [], 0
    for index, count in enumerate(replicas):
        own = layers[bounds[index] : bounds[index + 1]]
        forward_s, backward_s = sum(x.forward_s for x in own), sum(x.backward_s for x in own)
        stages.append(
            StagePlan(
                layers=tuple(layer.name for layer in own),
                ranks=tuple(range(rank, rank + count)),
                forward_s=forward_s,
                backward_s=backward_s,
                weight_gradient_s=sum(x.weight_gradient_s for x in own),
                waiting_bytes=sum(x.waiting_bytes for x in own),
                unsplit_bytes=sum(x.unsplit_bytes for x in own),
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
        stages=tuple(stages),
        bottleneck_s=max(stage.compute_s for stage in stages),
        single_device_s=profile.total_s,
    )
