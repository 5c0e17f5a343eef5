"""Give the modules of stages their weights."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

from torch import nn

from pipedream_hpc.model.graph import LayerGraph
from pipedream_hpc.model.recipe import tensors_of


def materialize(graph: LayerGraph, modules: Iterable[nn.Module]) -> None:
    """Create the tensors of stage modules whose model was given as a function.

    A model that was captured as a built module already has its tensors: then this does nothing.

    Args:
        graph: the captured model.
        modules: stage modules cut from it.

    Raises:
        PipedreamError: the function now builds a different model than at capture.
    """
    if graph.recipe is None:
        return
    places = [[place for place in tensors_of(module) if place.tensor.is_meta] for module in modules]
    made = graph.recipe.make_tensors({place.name for each in places for place in each})
    for each in places:
        # Replicas share parameters until these are copied into a stash; buffers are always separate.
        memo: dict[int, Any] = {id(tensor): tensor for tensor in made.values() if isinstance(tensor, nn.Parameter)}
        for place in each:
            setattr(place.owner, place.attribute, copy.deepcopy(made[place.name], memo))
