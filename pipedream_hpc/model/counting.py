"""Profile a captured model by counting operations, without running it."""

from __future__ import annotations

from pipedream_hpc.model.graph import Layer, LayerGraph
from pipedream_hpc.planning.profile import SPLITTABLE_KINDS, LayerProfile, Profile


def count(graph: LayerGraph, model: str = "") -> Profile:
    """Return a Profile from counted operations: the same on every machine and at every call.

    The forward time of a layer is its number of floating-point operations plus one per output value, at 1 Gflop/s;
    its backward takes twice as long. This is good enough to divide a model evenly; for a plan that takes the machine
    into account, measure the profile (see profiling.profiler).

    Args:
        graph: the captured model.
        model: name for the profile; by default the class of the model.
    """
    layers = []
    for layer in graph.layers:
        forward_s = (layer.flops + layer.output_bytes // 4) / 1e9
        layers.append(layer_profile(layer, forward_s, 2 * forward_s))
    name = model or type(graph.module).__name__
    return Profile(name, "counted", minibatch_size(graph), tuple(layers), graph.edges)


def minibatch_size(graph: LayerGraph) -> int:
    """Return the number of samples in the example inputs: those of the first tensor that has any."""
    return graph.batch_dims.n_samples(graph.inputs)


def layer_profile(
    layer: Layer,
    forward_s: float,
    backward_s: float,
    *,
    stash_bytes: int = 0,
    inner_bytes: int = 0,
    unsplit_bytes: int = 0,
) -> LayerProfile:
    """Return the LayerProfile of a captured layer with the given figures; for their meaning see LayerProfile."""
    return LayerProfile(
        name=layer.name,
        kind=layer.kind,
        forward_s=forward_s,
        backward_s=backward_s,
        output_bytes=layer.output_bytes,
        parameter_bytes=layer.parameter_bytes,
        unsplit_bytes=unsplit_bytes,
        stash_bytes=stash_bytes,
        inner_bytes=0 if layer.kind in SPLITTABLE_KINDS else inner_bytes,
        output_shape=layer.output_shape,
        output_dtype=None if layer.output_dtype is None else str(layer.output_dtype).removeprefix("torch."),
    )
