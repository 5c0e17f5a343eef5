"""Give the modules of stages their weights."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from pipedream_hpc.model.checksum import checksum
from pipedream_hpc.model.graph import LayerGraph
from pipedream_hpc.model.recipe import release_memory, tensors_of
from pipedream_hpc.model.stage_module import Entry, StageModule, entries_by_weight


def materialize(graph: LayerGraph, stages: Iterable[StageModule]) -> None:
    """Create the tensors of stage modules whose model was given as a function.

    A model that was captured as a built module already has its tensors: then this does nothing.

    Args:
        graph: the captured model.
        stages: stage modules cut from it.

    Raises:
        PipedreamError: the function now builds a different model than at capture.
    """
    if graph.recipe is None:
        return
    stages = list(stages)
    entries: dict[str, list[Entry]] = {}
    for stage in stages:
        for name, where in stage.entries.items():
            entries.setdefault(name, []).extend(where)
    others = {name: place for stage in stages for name, place in stage.other_tensors().items() if place.tensor.is_meta}
    meta = [name for name, where in entries.items() if where[0][0][where[0][1]].is_meta]
    made = graph.recipe.make_tensors({*meta, *others})
    for name in meta:
        for container, key in entries[name]:
            container[key] = made[name]
    for name, place in others.items():
        setattr(place.owner, place.attribute, made[name])


@contextmanager
def materialized(graph: LayerGraph) -> Iterator[None]:
    """Hold all tensors of a model that was given as a function during the block; its memory is free again afterwards.

    Whatever the function builds from now on must have the same values.

    Raises:
        PipedreamError: the function now builds a different model than at capture.
    """
    if graph.recipe is None:
        yield
        return
    places = [place for place in tensors_of(graph.module) if place.tensor.is_meta]
    entries = entries_by_weight(graph.module)
    made = graph.recipe.make_tensors({place.name for place in places})
    before: list[tuple[Any, Any, Any]] = []
    for place in places:
        is_weight = isinstance(place.tensor, nn.Parameter)
        for container, key in entries[id(place.tensor)] if is_weight else [(place.container, place.attribute)]:
            before.append((container, key, container[key]))
            container[key] = made[place.name]
    graph.recipe.checksums.update((name, checksum([tensor])) for name, tensor in made.items())
    made.clear()
    try:
        yield
    finally:
        for container, key, tensor in reversed(before):
            container[key] = tensor
        release_memory()
