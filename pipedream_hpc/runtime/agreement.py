"""Agreement: what all ranks must bring, checked when training starts, before an epoch and after it."""

from __future__ import annotations

import platform
import uuid
from collections.abc import Sequence

import torch

from pipedream_hpc import __version__
from pipedream_hpc.cluster import device as devices
from pipedream_hpc.cluster.device import Device
from pipedream_hpc.cluster.world import World
from pipedream_hpc.errors import PipedreamError
from pipedream_hpc.runtime.checksum import checksum
from pipedream_hpc.runtime.deployment import Deployment
from pipedream_hpc.runtime.feed import Feed
from pipedream_hpc.runtime.handshake import agree, same
from pipedream_hpc.runtime.worker import Worker


def agree_on_devices(world: World, device: Device, *, limit_s: float) -> tuple[Device, ...]:
    """Check that ranks compute all on CPUs or each on a GPU of its own; returns the devices of all ranks.

    Raises:
        PipedreamError: names two ranks that do not go together; see cluster.device.
    """
    return devices.agreed(agree(world, devices.facts(device), limit_s=limit_s))


def agree_on_start(world: World, deployment: Deployment, seed: int, *, limit_s: float) -> str:
    """Check that ranks run the same; returns a name of this launch that no other has.

    Raises:
        PipedreamError: says about what ranks disagree, and how to mend it.
    """
    model, plan = "random numbers that the model is made of", deployment.plan
    facts = {
        "boundaries that the example leads to": [
            (each.layer, each.shape, each.dtype_name) for line in deployment.lines.values() for each in line
        ],
        "plan": str([(stage.layers, stage.ranks) for stage in plan.stages]),
        "schedule": (
            plan.schedule,
            deployment.pieces,
            deployment.manner.chunks,
            deployment.manner.accumulate,
        ),
        "parts of backwards (--split-backward, --zero-bubble)": deployment.manner.parts,
        "seed": seed,
        "version of pipedream_hpc": __version__,
        "version of torch": torch.__version__,
        "byte order": platform.machine(),
        model: getattr(deployment.graph.recipe, "fingerprint", None),
    }
    answers = agree(world, {**facts, "launch": uuid.uuid4().hex[:12]}, limit_s=limit_s)
    remedies = dict.fromkeys(facts, "start every rank with the same")
    same(answers, {**remedies, model: "call torch.manual_seed in the function that builds the model"})
    return str(answers[0]["launch"])


def agree_on_data(world: World, minibatches: int, feed: Feed, *, limit_s: float) -> None:
    """Check that ranks are about to read the same minibatches.

    Raises:
        PipedreamError: names two ranks that would read different ones.
    """
    answers = agree(world, {"minibatches": minibatches, "data": feed.fingerprint()}, limit_s=limit_s)
    same(answers, {"minibatches": "give every rank the same loader"})
    seen = [(rank, answer["data"]) for rank, answer in enumerate(answers) if answer["data"] is not None]
    for rank, data in seen:
        if data != seen[0][1]:
            raise PipedreamError(
                f"ranks {seen[0][0]} and {rank} read different first minibatches: the order of the data must "
                "depend on torch's random numbers alone (DataLoader(shuffle=True) does), not on the rank"
            )


def agree_on_checkpoints(world: World, positions: Sequence[tuple[int, int]], *, limit_s: float) -> None:
    """Check that ranks see the same whole checkpoints, given by their epochs and units.

    Raises:
        PipedreamError: names two ranks that see different ones.
    """
    answers = [answer["whole"] for answer in agree(world, {"whole": list(positions)}, limit_s=limit_s)]
    for rank, seen in enumerate(answers):
        if seen != answers[0]:
            first, other = (", ".join(str(epoch) for epoch, _ in each) or "none" for each in (answers[0], seen))
            raise PipedreamError(
                f"ranks see different checkpoints: epochs {first} on rank 0, {other} on rank {rank}: give a "
                "folder that all ranks see, with its full path"
            )


def agree_on_end(world: World, workers: Sequence[Worker], *, training: bool, limit_s: float) -> float:
    """Compare replicas after training; returns the mean score over all samples, the same on every rank.

    Raises:
        PipedreamError: names two ranks whose replicas of a stage have come to differ.
    """
    placed = [(worker.rank, stage) for worker in workers for stage in worker.stages.values()]
    facts = {
        "scores": [score for _, stage in placed if stage.output for score in stage.tally.read()],
        "weights": [
            (stage.index, rank, checksum((*stage.stash.trained, *stage.module.buffers())))
            for rank, stage in placed
            if training and stage.averager is not None
        ],
    }
    answers = agree(world, facts, limit_s=limit_s)
    first: dict[int, tuple[int, int]] = {}
    for index, rank, weights in sorted(each for answer in answers for each in answer["weights"]):
        other, expected = first.setdefault(index, (rank, weights))
        if weights != expected:
            raise PipedreamError(
                f"replicas of stage {index} have drifted apart: after this epoch the weights of ranks {other} and "
                f"{rank} differ: random numbers or data of the model must not depend on the rank"
            )
    scores = sorted(score for answer in answers for score in answer["scores"])
    samples = sum(count for _, _, count in scores)
    return sum(mean * count for _, mean, count in scores) / samples if samples else float("nan")
