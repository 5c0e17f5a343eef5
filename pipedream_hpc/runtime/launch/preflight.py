"""Preflight: what all ranks must have in common, checked at launch.

Every check names two ranks that differ, before anything collective depends on them.
"""

from __future__ import annotations

import dataclasses
import platform
import uuid
import warnings
from collections.abc import Iterable, Sequence
from typing import Any

import torch

from pipedream_hpc.cluster import device as devices
from pipedream_hpc.cluster.device import Device
from pipedream_hpc.cluster.world import World
from pipedream_hpc.config import TrainConfig
from pipedream_hpc.errors import PipedreamError
from pipedream_hpc.model.checksum import checksum
from pipedream_hpc.model.graph import LayerGraph
from pipedream_hpc.runtime.comm.handshake import exchange, require_equal
from pipedream_hpc.runtime.launch.deployment import Deployment
from pipedream_hpc.runtime.weights.stash import WeightStash
from pipedream_hpc.version import VERSION

_MODEL = "random numbers that the model is made of"
_WEIGHTS = "weights and buffers of the model"


def check_devices(world: World, device: Device, *, limit_s: float) -> tuple[Device, ...]:
    """Check that all ranks compute on CPUs, or each on a GPU of its own; return the devices of all ranks.

    Raises:
        PipedreamError: names two ranks that do not go together; see cluster.device.
    """
    return devices.validate_devices(exchange(world, devices.device_info(device), limit_s=limit_s))


def check_launch(world: World, deployment: Deployment, config: TrainConfig, *, limit_s: float) -> str:
    """Check that all ranks run the same; return a name of this launch that no other launch has.

    Raises:
        PipedreamError: says in what ranks differ, and how to fix it.
    """
    plan, schedule = deployment.plan, deployment.schedule
    facts: dict[str, Any] = {
        "plan": str([(stage.layers, stage.ranks) for stage in plan.stages]),
        "schedule": (
            f"{schedule.name}, n_microbatches={schedule.n_microbatches}, chunks={schedule.chunks}, "
            f"gradient_accumulation_steps={schedule.gradient_accumulation_steps}"
            + (f", checksum {schedule.fingerprint}" if schedule.fingerprint else "")
        ),
        # After plan and schedule, on which it depends.
        "boundary tensors that the example leads to": [
            (each.layer, each.shape, each.dtype_name) for edge in deployment.edge_tensors.values() for each in edge
        ],
        "seed": config.seed,
        "training options": ", ".join(
            f"{field.name}={getattr(config, field.name)}" for field in dataclasses.fields(config) if field.metadata
        ),
        "version of pipedream_hpc": VERSION,
        "version of torch": torch.__version__,
        "byte order": platform.machine(),
        _MODEL: getattr(deployment.graph.recipe, "fingerprint", None),
        _WEIGHTS: _weights(deployment.graph) if config.check_model and world.size > 1 else None,
    }
    answers = exchange(world, {**facts, "launch": uuid.uuid4().hex[:12]}, limit_s=limit_s)
    remedies = dict.fromkeys(facts, "start every rank with the same")
    remedies[_MODEL] = "call torch.manual_seed in the function that builds the model"
    remedies[_WEIGHTS] = (
        "call torch.manual_seed before the model is built, or give TrainConfig(check_model=False) if its weights are "
        "loaded afterwards"
    )
    require_equal(answers, remedies)
    return str(answers[0]["launch"])


def _weights(graph: LayerGraph) -> str | None:
    """Return a checksum of the parameters and buffers of a built model."""
    if graph.recipe is not None:
        return None
    return f"checksum {checksum([*graph.module.parameters(), *graph.module.buffers()]):08x}"


def check_checkpoints(world: World, positions: Sequence[tuple[int, int]], *, limit_s: float) -> None:
    """Check that all ranks see the same complete checkpoints, given by (epochs, microbatches).

    Raises:
        PipedreamError: names two ranks that see different ones.
    """
    answers = [answer["complete"] for answer in exchange(world, {"complete": list(positions)}, limit_s=limit_s)]
    for rank, seen in enumerate(answers):
        if seen != answers[0]:
            first, other = (", ".join(str(epoch) for epoch, _ in each) or "none" for each in (answers[0], seen))
            raise PipedreamError(
                f"ranks see different checkpoints: epochs {first} on rank 0, {other} on rank {rank}: give a "
                "folder that all ranks see, with its full path"
            )


def warn_of_empty_groups(world: World, stashes: Iterable[WeightStash], *, limit_s: float) -> None:
    """Warn of a parameter group that is empty in every stage, as where parameters were chosen by identity. Collective.

    Args:
        world: all ranks.
        stashes: those of this rank.
        limit_s: seconds that a rank waits for another.
    """
    optimizers = [each.optimizer for each in stashes if each.optimizer is not None]
    own = [[len(group["params"]) for group in each.param_groups] for each in optimizers]
    answers = exchange(world, {"groups": own}, limit_s=limit_s)
    sizes = [each for answer in answers for each in answer["groups"]]
    if not world.is_root or len({len(each) for each in sizes}) != 1:  # factories may leave empty groups out
        return
    empty = [number for number, of_stages in enumerate(zip(*sizes, strict=True)) if not any(of_stages)]
    if empty:
        warnings.warn(
            f"parameter group {empty[0]} of the optimizer is empty in every stage: the parameters that optimizer is "
            "given are other objects than those that the model had before the pipeline was made; choose them by "
            "qualified_name, or by identity within that function",
            stacklevel=2,
        )
