"""What an update costs: the stash writing the next weight version, as it does in training.

Small tensors cost as much as larger ones, for Python and the optimizer go through them one by one;
large ones cost by their bytes. So two updates are timed, one of the model's weights and one of as many
weights of a single number each::

    seconds = tensors · (one-number update / tensors) + bytes · (update - one-number update) / bytes
"""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Callable, Sequence

import torch
from torch import nn

from pipedream_hpc.job import OptimizerFactory
from pipedream_hpc.model.clock import clock_of
from pipedream_hpc.model.graph import LayerGraph
from pipedream_hpc.planning.profile import Profile
from pipedream_hpc.runtime.stash import WeightStash

#: More parameters than this tell no more, and would fill the memory.
_MOST_BYTES = 1 << 30


def with_updates(
    profile: Profile,
    graph: LayerGraph,
    optimizer: OptimizerFactory,
    *,
    updates: int = 10,
    between: Callable[[], None] = lambda: None,
) -> Profile:
    """`profile` with the time of `optimizer` on every layer's parameters.

    One stash of the whole model (of its first GiB) is updated, and the median shared out by tensors and
    bytes. A weight that several layers use is updated with the first of them.

    Args:
        profile: of `graph`.
        graph: the captured model; its weights are copied, not changed.
        optimizer: as a Job has it.
        updates: how many to measure.
        between: is done before each, such as a minibatch, for that sweeps the caches as in training.
    """
    parameters = dict(graph.module.named_parameters(remove_duplicate=False))
    seen: set[int] = set()
    owned: list[list[nn.Parameter]] = []
    for layer in graph.layers:
        owned.append([])
        for name in layer.parameters:
            parameter = parameters[name]
            if parameter.requires_grad and id(parameter) not in seen:
                seen.add(id(parameter))
                owned[-1].append(parameter)
    measured: list[torch.Tensor] = []
    for parameter in (each for own in owned for each in own):
        if measured and sum(each.nbytes for each in measured) + parameter.nbytes > _MOST_BYTES:
            break
        measured.append(parameter.detach())
    if not measured:
        return profile
    smallest_s = update_s(
        [torch.zeros(1, dtype=each.dtype, device=each.device) for each in measured], optimizer, updates, between
    )
    whole_s = update_s(measured, optimizer, updates, between)
    per_tensor_s = min(smallest_s, whole_s) / len(measured)
    per_byte_s = max(whole_s - smallest_s, 0.0) / sum(each.nbytes for each in measured)
    layers = tuple(
        dataclasses.replace(layer, update_s=len(own) * per_tensor_s + sum(each.nbytes for each in own) * per_byte_s)
        for layer, own in zip(profile.layers, owned, strict=True)
    )
    return dataclasses.replace(profile, layers=layers)


def update_s(
    weights: Sequence[torch.Tensor], optimizer: OptimizerFactory, updates: int, between: Callable[[], None]
) -> float:
    """Median seconds of an update of a stash of these weights, on their device."""
    device = weights[0].device
    clock = clock_of(device)
    copies = nn.Module()
    for index, weight in enumerate(weights):
        copies.register_parameter(f"p{index}", nn.Parameter(weight))
    stash = WeightStash(copies, 2, optimizer, device=device)
    taken = []
    for _ in range(updates + 2):
        between()
        gradients: list[torch.Tensor | None] = [torch.full_like(each, 1e-3) for each in stash.trained]
        began = clock.mark()
        stash.update(gradients)
        began_s, ended_s = clock.read([began, clock.mark()])
        taken.append(ended_s - began_s)
    return statistics.median(taken[2:])  # the first ones allocate the optimizer's state
