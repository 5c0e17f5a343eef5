"""What an update costs: the stash writing the next weight version, as it does in training."""

from __future__ import annotations

import dataclasses
import statistics
import time

import torch
from torch import nn

from pipedream_hpc.job import OptimizerFactory
from pipedream_hpc.planning.profile import Profile
from pipedream_hpc.runtime.stash import WeightStash

#: More parameters than this tell no more, and would fill the memory.
_MOST_BYTES = 1 << 30


def with_updates(profile: Profile, model: nn.Module, optimizer: OptimizerFactory, *, updates: int = 10) -> Profile:
    """`profile` with the time of `optimizer` on every layer's parameters.

    One stash of the whole model (of its first GiB) is updated, and the median shared out by bytes.

    Args:
        profile: of `model`.
        model: its weights are copied, not changed.
        optimizer: as a Job has it.
        updates: how many to measure.
    """
    copies, size = nn.Module(), 0
    for index, parameter in enumerate({id(p): p for p in model.parameters() if p.requires_grad}.values()):
        if size and size + parameter.nbytes > _MOST_BYTES:
            break
        copies.register_parameter(f"p{index}", nn.Parameter(parameter.detach()))
        size += parameter.nbytes
    if not size:
        return profile
    stash = WeightStash(copies, 2, optimizer)
    taken = []
    for _ in range(updates + 2):
        gradients: list[torch.Tensor | None] = [torch.full_like(each, 1e-3) for each in stash.trained]
        began = time.perf_counter()
        stash.update(gradients)
        taken.append(time.perf_counter() - began)
    per_byte_s = statistics.median(taken[2:]) / size  # the first ones allocate the optimizer's state
    layers = tuple(dataclasses.replace(layer, update_s=layer.parameter_bytes * per_byte_s) for layer in profile.layers)
    return dataclasses.replace(profile, layers=layers)
