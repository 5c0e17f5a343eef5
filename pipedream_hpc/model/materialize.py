"""Give the modules of stages their weights."""

from __future__ import annotations

from collections.abc import Iterable

from pipedream_hpc.model.graph import LayerGraph
from pipedream_hpc.model.stage_module import Entry, StageModule


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
