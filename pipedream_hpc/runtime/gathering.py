"""Gathering: the whole model's weights from the stages of all ranks."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from pipedream_hpc.cluster.world import World
from pipedream_hpc.model.graph import LayerGraph
from pipedream_hpc.runtime.stage import Stage


def whole_state(world: World, graph: LayerGraph, stages: Iterable[Stage]) -> dict[str, torch.Tensor]:
    """Newest weights and buffers of the whole model on the CPU, under the model's own names.

    Collective. The whole on rank 0, empty elsewhere.

    Args:
        world: all ranks.
        graph: the captured model.
        stages: that this process holds.
    """
    own: dict[str, torch.Tensor] = {}
    for stage in stages:
        if stage.replica == 0:
            stage.stash.use_newest()
            state = stage.module.state_dict()
            own.update((name, value.detach().to("cpu", copy=True)) for name, value in state.items())
    if world.comm is not None and world.size > 1:
        parts = world.comm.gather(own, root=0)
        own = {name: value for part in parts or () for name, value in part.items()}
    return _completed(graph, own) if world.rank == 0 else {}


def _completed(graph: LayerGraph, own: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Also what no stage uses, and further names of weights that have several."""
    model, recipe = graph.module, graph.recipe
    names: dict[int, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if name in own:
            names.setdefault(id(parameter), name)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if name not in own and id(parameter) in names:
            own[name] = own[names[id(parameter)]]
    whole = {name: own.get(name, value) for name, value in model.state_dict().items()}
    missing = [name for name, value in whole.items() if value.is_meta]
    made = recipe.make(missing) if recipe and missing else {}
    return {**whole, **{name: value.detach() for name, value in made.items()}}
