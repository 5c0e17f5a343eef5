"""Full state dict: gather the whole model's weights from the stages of all ranks."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from pipedream_hpc.cluster.world import World
from pipedream_hpc.model.graph import LayerGraph
from pipedream_hpc.runtime.weights.stage_state import StageState


def full_state_dict(world: World, graph: LayerGraph, stages: Iterable[StageState]) -> dict[str, Any]:
    """Return the newest weights and buffers of the whole model on the CPU, under the model's own names.

    Collective. Rank 0 gets the whole model, other ranks an empty dict.

    Args:
        world: all ranks.
        graph: the captured model.
        stages: the stages that this process holds.
    """
    own: dict[str, Any] = {}
    for stage in stages:
        if stage.replica == 0:
            stage.stash.use_newest()
            state = stage.module.state_dict()
            own.update((name, value.detach().to("cpu", copy=True)) for name, value in state.items())
            own.update((name, each.get_extra_state()) for name, each in extra_states(stage.module).items())
    if world.comm is not None and world.size > 1:
        gathered = world.comm.gather(own, root=0)
        own = {name: value for state in gathered or () for name, value in state.items()}
    return _complete(graph, own) if world.rank == 0 else {}


def extra_states(module: nn.Module) -> dict[str, nn.Module]:
    """Return the modules of a stage that have a state besides weights and buffers, by the name of that state."""
    extra: dict[str, nn.Module] = getattr(module, "extra", {})
    return extra


def _complete(graph: LayerGraph, own: dict[str, Any]) -> dict[str, Any]:
    """Add the tensors that no stage uses, and all names of weights with several."""
    for name, names in _aliases(graph).items():
        known = next((each for each in names if each in own), None)
        if name not in own and known is not None:
            own[name] = own[known]
    full: dict[str, Any] = graph.module.state_dict()  # it also has the versions of modules, which some need to load it
    full.update((name, own.get(name, value)) for name, value in list(full.items()))
    if graph.recipe is not None:
        unused = {name for name, value in full.items() if isinstance(value, torch.Tensor) and value.is_meta}
        loaded = {name: value for name, value in graph.recipe.loaded.items() if name in unused}
        made = graph.recipe.make_tensors(unused - loaded.keys()) if unused - loaded.keys() else {}
        full.update((name, value.detach()) for name, value in {**made, **loaded}.items())
    return full


def _aliases(graph: LayerGraph) -> dict[str, list[str]]:
    """Return all names of each parameter, by each of its names."""
    names: dict[int, list[str]] = defaultdict(list)
    for name, parameter in graph.module.named_parameters(remove_duplicate=False):
        names[id(parameter)].append(name)
    return {name: group for group in names.values() for name in group}
