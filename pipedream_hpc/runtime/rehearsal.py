"""Rehearsal: some minibatches trained by two real stages in this process.

A clock between the layers (model.clocked) does not see what stages do beside them: messages, versions, seeds
of random layers, gradients taken over, Python. On layers of microseconds that is a good part of the time::

    clocked     layer 0 │ layer 1 │ layer 2 │                   shares: which layer takes how much of it
    rehearsed   ├ forward ┤ ├ forward ┤├ backward ┤├ update ┤ ├ backward ┤├ update ┤
                         ◦ ◦                                 ◦                        what is left between them
"""

from __future__ import annotations

import dataclasses
import itertools
import statistics
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from pipedream_hpc.cluster.world import World
from pipedream_hpc.job import Job
from pipedream_hpc.model.graph import LayerGraph
from pipedream_hpc.model.randomness import generators_kept
from pipedream_hpc.planning.profile import LayerProfile, Profile
from pipedream_hpc.runtime.assembly import Wishes, assemble, feed_of
from pipedream_hpc.runtime.deployment import deploy
from pipedream_hpc.runtime.emulator import emulate
from pipedream_hpc.runtime.manner import Manner, resolve
from pipedream_hpc.runtime.view import CPU
from pipedream_hpc.runtime.wiring import local_wiring
from pipedream_hpc.schedule.trace import Span

#: Whatever was started, every rank rehearses by itself.
_ALONE = World(0, 1, 0, 1, "")


@dataclass(frozen=True)
class Rehearsal:
    """Median seconds of a minibatch in training.

    Attributes:
        forward_s: of the forwards of all stages, with the loss.
        backward_s: of the backwards.
        update_s: of the updates.
        beside_s: of all that a stage does beside those, to exchange a tensor included.
    """

    forward_s: float
    backward_s: float
    update_s: float
    beside_s: float


def rehearse(
    graph: LayerGraph,
    job: Job,
    data: Sequence[Any],
    *,
    precision: str | None = None,
    device: torch.device = CPU,
) -> Rehearsal | None:
    """Train minibatches of the job in two even stages; None where there are fewer than two.

    A model of a single layer is one stage. Weights are copied, and the model is left as it was.

    Args:
        graph: the captured model, built.
        job: whose loss and optimizer are taken.
        data: (inputs, target) pairs, already read; the first one is not counted.
        precision: as Pipeline takes it.
        device: what the stages compute on.
    """
    if len(data) < 2:
        return None
    clip = job.clip if job.clip is not None and job.clip.over == "stage" else None
    wishes = Wishes(job.loss, job.optimizer, job.scheduler, clip, precision, None, 0, device)
    # Where stages must agree there is no 1F1B: flushing after every minibatch costs as much where all take turns.
    manner = Manner("1f1b-flush" if wishes.needs_agreement else "1f1b", 1, agree=wishes.needs_agreement)
    wanted = tuple([1] * min(len(graph.layers), 2))
    deployment = deploy(resolve(wanted, "the rehearsal", graph, manner), "the rehearsal", graph, manner, _ALONE)
    training = deployment.training(len(data))
    workers = assemble(deployment, training, local_wiring(training, deployment.lines, device), wishes)
    stages = [stage for worker in workers for stage in worker.stages.values()]
    with generators_kept(device):
        feed = feed_of(deployment, stages, data, wishes, epoch=0, length=len(data))
        for worker in workers:
            worker.begin(training, feed, 0, 0, score=None, trace=True)
        for _ in emulate(workers, training):
            pass
        for worker in workers:
            worker.end()
    return _figures([span for worker in workers for span in worker.spans(0)], len(stages))


def _figures(spans: Sequence[Span], stages: int) -> Rehearsal:
    """Medians of what ran in one process; the first minibatch does not count."""
    durations: dict[tuple[str, int], list[float]] = defaultdict(list)
    for span in spans:
        durations[span.kind, span.stage].append(span.end_s - span.start_s)
    by_kind: dict[str, float] = defaultdict(float)
    for (kind, _), taken in durations.items():
        by_kind[kind] += statistics.median(taken[1:])
    in_turn = sorted(spans, key=lambda span: span.start_s)
    between_s = statistics.median(after.start_s - before.end_s for before, after in itertools.pairwise(in_turn))
    computed = ("forward", "backward", "update")
    other_s = sum(seconds for kind, seconds in by_kind.items() if kind not in computed)
    # Each kind of action in each stage, and what is between it and the next, once per minibatch.
    beside_s = (other_s + between_s * len(durations)) / stages
    return Rehearsal(by_kind["forward"], by_kind["backward"], by_kind["update"], beside_s)


def calibrated(profile: Profile, rehearsal: Rehearsal) -> Profile:
    """`profile` with the sums of the rehearsal; each layer keeps its share of them."""

    def times(rehearsed_s: float, clocked_s: float) -> float:
        return rehearsed_s / clocked_s if clocked_s else 1.0

    forward = times(rehearsal.forward_s, sum(layer.forward_s for layer in profile.layers))
    backward = times(rehearsal.backward_s, sum(layer.backward_s for layer in profile.layers))
    update = times(rehearsal.update_s, sum(layer.update_s for layer in profile.layers))

    def scaled(layer: LayerProfile) -> LayerProfile:
        return dataclasses.replace(
            layer,
            forward_s=layer.forward_s * forward,
            backward_s=layer.backward_s * backward,
            update_s=layer.update_s * update,
        )

    return dataclasses.replace(profile, layers=tuple(map(scaled, profile.layers)), beside_s=rehearsal.beside_s)
