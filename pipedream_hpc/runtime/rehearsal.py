"""Rehearsal: some minibatches trained by one real stage that holds the whole model.

A clock between the layers (model.clocked) does not see what a stage does beside them: versions, seeds of
random layers, gradients taken over, Python. On layers of microseconds that is a good part of the time::

    clocked     layer 0 │ layer 1 │ layer 2 │                 shares: which layer takes how much of it
    rehearsed   ├── forward ──┤ ├── backward ──┤ ├ update ┤   sums, and what is left between them
                                                            ◄─ one minibatch ─►
"""

from __future__ import annotations

import dataclasses
import itertools
import statistics
from dataclasses import dataclass

import torch

from pipedream_hpc.job import Job
from pipedream_hpc.model.cut import Cut
from pipedream_hpc.model.graph import LayerGraph
from pipedream_hpc.model.profiler import count
from pipedream_hpc.planning.even import even
from pipedream_hpc.planning.profile import LayerProfile, Profile
from pipedream_hpc.runtime.assembly import Wishes, assemble
from pipedream_hpc.runtime.deployment import Deployment, Manner
from pipedream_hpc.runtime.emulator import emulate
from pipedream_hpc.runtime.feed import Feed, Taker
from pipedream_hpc.runtime.wiring import local_wiring


@dataclass(frozen=True)
class Rehearsal:
    """Median seconds of a minibatch in training, the whole model in one stage.

    Attributes:
        forward_s: of a forward, with the loss.
        backward_s: of a backward.
        update_s: of an update.
        beside_s: from a minibatch's end to the next one's, without those three.
    """

    forward_s: float
    backward_s: float
    update_s: float
    beside_s: float


def rehearse(graph: LayerGraph, job: Job, *, minibatches: int, precision: str | None = None) -> Rehearsal | None:
    """Train `minibatches` of the job in one stage; None where its data has fewer than two.

    Weights are copied, and the model is left as it was. The data is read before: that takes no time here.

    Args:
        graph: the captured model, built.
        job: whose loss, optimizer and data are taken.
        minibatches: how many; the first one is not counted.
        precision: as Pipeline takes it.
    """
    with torch.random.fork_rng(devices=[]):
        data = list(itertools.islice(job.train, minibatches + 1))
    if len(data) < 2:
        return None
    clip = job.clip if job.clip is not None and job.clip.over == "stage" else None
    wishes = Wishes(job.loss, job.optimizer, job.scheduler, clip, precision, False, None, seed=0)
    # Where stages must agree there is no 1F1B: flushing after every minibatch costs one stage nothing.
    schedule = "1f1b-flush" if wishes.needs_agreement else "1f1b"
    manner = Manner(schedule, 1, agree=wishes.needs_agreement)
    plan = dataclasses.replace(even(count(graph), (1,)), schedule=schedule)
    cut = Cut(graph, [range(len(graph.layers))])
    deployment = Deployment(plan, "the rehearsal", graph, cut, ((0,),), manner)
    training = deployment.training(len(data))
    (worker,) = assemble(deployment, training, local_wiring(training, deployment.lines), wishes)
    with torch.random.fork_rng(devices=[]):
        feed = Feed(
            data,
            epoch=0,
            seed=0,
            takers=[Taker(0, 1)],
            names=[str(node.target) for node in graph.inputs],
            pieces=1,
            accumulate=1,
            length=len(data),
        )
        worker.begin(training, feed, 0, 0, score=None, trace=True)
        for _ in emulate([worker], training):
            pass
        worker.end()
    spans = worker.spans(0)

    def median_s(kind: str) -> float:
        return statistics.median([span.end_s - span.start_s for span in spans if span.kind == kind][1:])

    forward_s, backward_s, update_s = median_s("forward"), median_s("backward"), median_s("update")
    ends = [span.end_s for span in spans if span.kind == "update"]
    whole_s = statistics.median(after - before for before, after in itertools.pairwise(ends))
    return Rehearsal(forward_s, backward_s, update_s, max(whole_s - forward_s - backward_s - update_s, 0.0))


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
