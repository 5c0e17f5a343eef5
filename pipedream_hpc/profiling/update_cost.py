"""Measure the time of an optimizer step: the weight stash writing the next version, as in training.

Python and the optimizer process tensors one by one, so each small tensor costs the same; large tensors cost by their
bytes. Two updates are timed: one of the model's weights, and one of as many weights of one element each::

    seconds = tensors · (one-element update / tensors) + bytes · (update - one-element update) / bytes
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
from pipedream_hpc.planning.memory import optimizer_kind
from pipedream_hpc.planning.profile import Profile
from pipedream_hpc.runtime.weights.stash import WeightStash

#: Updates of more parameter bytes would only fill the memory: the time per byte is the same.
_MAX_BYTES = 1 << 30


def add_update_times(
    profile: Profile,
    graph: LayerGraph,
    optimizer: OptimizerFactory,
    *,
    updates: int = 10,
    between: Callable[[], None] = lambda: None,
    master_weights: bool = False,
) -> Profile:
    """Return `profile` with the time of an update of every layer's parameters, and the kind of the optimizer.

    One stash with all parameters of the model (at most 1 GiB) is updated, and the median time is divided among the
    layers by tensors and bytes. A weight that several layers use is counted with the first of them.

    Args:
        profile: profile of `graph`.
        graph: the captured model; its weights are copied, not changed.
        optimizer: creates the optimizer, as in Job.
        updates: number of updates to measure.
        between: called before each update, such as a minibatch, which evicts the weights from the caches as training
            does.
        master_weights: whether training will keep float32 masters of bfloat16 weights.
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
    names = {id(parameter): name for name, parameter in graph.module.named_parameters()}
    measured: list[nn.Parameter] = []
    for parameter in (each for own in owned for each in own):
        if measured and sum(each.nbytes for each in measured) + parameter.nbytes > _MAX_BYTES:
            break
        measured.append(_like(parameter, parameter.detach(), names[id(parameter)]))
    if not measured:
        return profile
    smallest_s, _ = measure_update(
        [_like(each, torch.zeros(1, dtype=each.dtype, device=each.device)) for each in measured],
        optimizer,
        updates,
        between,
    )
    whole_s, state_bytes = measure_update(measured, optimizer, updates, between)
    per_tensor_s = min(smallest_s, whole_s) / len(measured)
    n_bytes = sum(each.nbytes for each in measured)
    per_byte_s = max(whole_s - smallest_s, 0.0) / n_bytes
    layers = tuple(
        dataclasses.replace(layer, update_s=len(own) * per_tensor_s + sum(each.nbytes for each in own) * per_byte_s)
        for layer, own in zip(profile.layers, owned, strict=True)
    )
    kind = optimizer_kind(state_bytes, n_bytes, master_weights=master_weights)
    return dataclasses.replace(profile, layers=layers, optimizer=kind)


def _like(parameter: nn.Parameter, values: torch.Tensor, name: str | None = None) -> nn.Parameter:
    """Create a parameter of these values with the attributes of another, and its name in the model."""
    made = nn.Parameter(values)
    vars(made).update(vars(parameter) if name is None else {"qualified_name": name, **vars(parameter)})
    return made


def measure_update(
    weights: Sequence[nn.Parameter], optimizer: OptimizerFactory, updates: int, between: Callable[[], None]
) -> tuple[float, int]:
    """Return the median seconds of an update of a stash of these weights, on their device, and its state's bytes."""
    device = weights[0].device
    clock = clock_of(device)
    copies = nn.Module()
    for index, weight in enumerate(weights):
        copies.register_parameter(f"p{index}", weight)
    stash = WeightStash(copies, 2, optimizer, device=device)
    seconds = []
    for _ in range(updates + 2):
        between()
        gradients: list[torch.Tensor | None] = [torch.full_like(each, 1e-3) for each in stash.trained]
        began = clock.mark()
        stash.update(gradients)
        began_s, ended_s = clock.read([began, clock.mark()])
        seconds.append(ended_s - began_s)
    state = stash.optimizer.state.values() if stash.optimizer is not None else ()
    tensors = (value for of_weight in state for value in of_weight.values() if isinstance(value, torch.Tensor))
    # Numbers of steps do not count.
    state_bytes = sum(each.nbytes for each in tensors if each.dim())
    return statistics.median(seconds[2:]), state_bytes  # the first two allocate the optimizer's state
