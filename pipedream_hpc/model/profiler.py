"""Measure every layer of a captured model on this device."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass, field

import torch
from torch import fx

from pipedream_hpc.errors import PipedreamError
from pipedream_hpc.model.capture import Layer, LayerGraph
from pipedream_hpc.model.cut import enter, stage_module
from pipedream_hpc.model.untouched import untouched
from pipedream_hpc.planning.profile import LayerProfile, Profile


@dataclass
class _Samples:
    forward_s: list[float] = field(default_factory=list)
    backward_s: list[float] = field(default_factory=list)
    stash_bytes: int = 0


def measure(
    graph: LayerGraph, example: torch.Tensor, *, minibatches: int = 20, warm_up: int = 3, model: str = ""
) -> Profile:
    """Time forward and backward of every layer (the paper's section 3.1).

    Each layer is run by itself on what the layer before it put out, so that its time, its output
    and what autograd stashes for its backward are its own. The times kept are medians. Weights,
    gradients, BatchNorm statistics and random number generators are left as they were.

    Args:
        graph: the captured model.
        example: one minibatch of real inputs.
        minibatches: how many to measure (the paper: 1,000 on a GPU; tens settle on a quiet machine).
        warm_up: minibatches run before, not counted.
        model: the name to note down; the model's class by default.

    Raises:
        PipedreamError: `minibatches` is less than 1, or the example has not the captured shape.
    """
    if minibatches < 1:
        raise PipedreamError(f"minibatches to profile should be at least 1, not {minibatches}")
    if tuple(example.shape) != graph.input_shape or example.dtype != graph.input_dtype:
        raise PipedreamError(
            f"the example has shape {tuple(example.shape)} and {example.dtype}, but the model was "
            f"captured with {graph.input_shape} and {graph.input_dtype}: use the same example for both"
        )
    modules = [stage_module(graph, index, index + 1) for index in range(len(graph.layers))]
    samples = [_Samples() for _ in modules]
    with untouched(graph.module):
        for turn in range(warm_up + minibatches):
            _one_minibatch(modules, samples, example, counted=turn >= warm_up)
    return Profile(
        model=model or type(graph.module).__name__,
        device="cpu",
        minibatch=example.shape[0],
        layers=tuple(_summary(layer, sample) for layer, sample in zip(graph.layers, samples, strict=True)),
        edges=tuple((index, index + 1) for index in range(len(graph.layers) - 1)),
    )


def count(graph: LayerGraph, model: str = "") -> Profile:
    """A Profile by counting instead of measuring: the same on every machine and at every call.

    A layer's time is its number of floating-point operations plus one for every output value, at
    1 Gflop/s, and its backward takes twice its forward. Good enough to cut a model evenly; for a
    plan that knows the machine use `measure`.
    """
    layers = []
    for layer in graph.layers:
        forward_s = (layer.operations + torch.Size(layer.output_shape).numel()) / 1e9
        layers.append(_profile(layer, forward_s, 2 * forward_s, stash_bytes=0))
    edges = tuple((index, index + 1) for index in range(len(layers) - 1))
    name = model or type(graph.module).__name__
    return Profile(name, "counted", graph.input_shape[0], tuple(layers), edges)


def _one_minibatch(
    modules: list[fx.GraphModule], samples: list[_Samples], example: torch.Tensor, *, counted: bool
) -> None:
    value = example
    for index, (module, sample) in enumerate(zip(modules, samples, strict=True)):
        # The first layer needs no gradient of its input, just as in training. A layer that writes
        # into its input gets a copy: the value is also the stash of the layer before.
        entry = value.detach().clone().requires_grad_(index > 0 and value.is_floating_point())
        kept: dict[int, int] = {}
        own = {parameter.untyped_storage().data_ptr() for parameter in module.parameters()}

        def keep(tensor: torch.Tensor, kept: dict[int, int] = kept, own: set[int] = own) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in own:
                kept[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            began = time.perf_counter()
            output = module(enter(entry) if module.meta["rewrites_input"] else entry)
            forward_s = time.perf_counter() - began
        backward_s = 0.0
        if output.requires_grad:
            gradient = torch.full_like(output, 1.0 / output.numel())
            began = time.perf_counter()
            output.backward(gradient)
            backward_s = time.perf_counter() - began
        for parameter in module.parameters():
            parameter.grad = None
        if counted:
            sample.forward_s.append(forward_s)
            sample.backward_s.append(backward_s)
            sample.stash_bytes = max(sample.stash_bytes, sum(kept.values()))
        value = output.detach()


def _summary(layer: Layer, sample: _Samples) -> LayerProfile:
    forward_s = statistics.median(sample.forward_s)
    return _profile(layer, forward_s, statistics.median(sample.backward_s), sample.stash_bytes)


def _profile(layer: Layer, forward_s: float, backward_s: float, stash_bytes: int) -> LayerProfile:
    return LayerProfile(
        name=layer.name,
        kind=layer.kind,
        forward_s=forward_s,
        backward_s=backward_s,
        output_bytes=layer.output_bytes,
        parameter_bytes=layer.parameter_bytes,
        stash_bytes=stash_bytes,
        output_shape=layer.output_shape,
        output_dtype=str(layer.output_dtype).removeprefix("torch."),
    )
