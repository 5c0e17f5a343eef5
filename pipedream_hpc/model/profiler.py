"""Measure every layer of a captured model on this device."""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils._pytree import tree_flatten

from pipedream_hpc.errors import PipedreamError
from pipedream_hpc.model.capture import Layer, LayerGraph, arguments_of
from pipedream_hpc.model.cut import Cut, Part, enter
from pipedream_hpc.model.untouched import untouched
from pipedream_hpc.planning.profile import LayerProfile, Profile


@dataclass
class _Samples:
    forward_s: list[float] = field(default_factory=list)
    backward_s: list[float] = field(default_factory=list)
    stash_bytes: int = 0


def measure(
    graph: LayerGraph,
    example: Any,
    *,
    minibatches: int = 20,
    warm_up: int = 3,
    model: str = "",
    loss: Callable[[Any], torch.Tensor] | None = None,
) -> Profile:
    """Time forward and backward of every layer (the paper's section 3.1).

    Each layer is run by itself on what the layer before it put out, so that its time, its output
    and what autograd stashes for its backward are its own. The times kept are medians. Weights,
    gradients, BatchNorm statistics and random number generators are left as they were.

    Args:
        graph: the captured model.
        example: one minibatch of real inputs, in the captured form.
        minibatches: how many to measure (the paper: 1,000 on a GPU; tens settle on a quiet machine).
        warm_up: minibatches run before, not counted.
        model: the name to note down; the model's class by default.
        loss: of the model's output for this example; it is counted with the last layer.

    Raises:
        PipedreamError: `minibatches` is less than 1, or the example has not the captured shape.
    """
    if minibatches < 1:
        raise PipedreamError(f"minibatches to profile should be at least 1, not {minibatches}")
    arguments = _checked(graph, example)
    cut = Cut(graph, [[index] for index in range(len(graph.layers))])
    parts = [cut.part(index, isolated=False) for index in range(len(graph.layers))]
    samples = [_Samples() for _ in parts]
    with untouched(graph.module):
        for turn in range(warm_up + minibatches):
            # What autograd stashes is looked at while warming up: looking takes time.
            _one_minibatch(parts, samples, arguments, loss, counted=turn >= warm_up)
    return Profile(
        model=model or type(graph.module).__name__,
        device="cpu",
        minibatch=_minibatch(graph),
        layers=tuple(_summary(layer, sample) for layer, sample in zip(graph.layers, samples, strict=True)),
        edges=graph.edges,
    )


def _checked(graph: LayerGraph, example: Any) -> tuple[Any, ...]:
    """The example's arguments, which must be of the captured shapes."""

    def described(value: Any) -> str:
        tensors = [leaf for leaf in tree_flatten(value)[0] if isinstance(leaf, torch.Tensor)]
        return " and ".join(f"{tuple(tensor.shape)} of {tensor.dtype}" for tensor in tensors)

    arguments = (
        tuple(example[str(node.target)] for node in graph.inputs)
        if isinstance(example, Mapping)
        else arguments_of(example)
    )
    if described(arguments) != described(graph.example):
        raise PipedreamError(
            f"the example has shape {described(arguments)}, but the model was captured with "
            f"{described(graph.example)}: use the same example for both"
        )
    return arguments


def _minibatch(graph: LayerGraph) -> int:
    """Samples in the captured example."""
    tensors = [leaf for leaf in tree_flatten(graph.example)[0] if isinstance(leaf, torch.Tensor) and leaf.dim()]
    return int(tensors[0].shape[0]) if tensors else 1


def averaged(profiles: Sequence[Profile]) -> Profile:
    """The mean of what several ranks measured of the same model at the same time."""
    first = profiles[0]
    layers = tuple(
        dataclasses.replace(
            same[0],
            forward_s=statistics.fmean(each.forward_s for each in same),
            backward_s=statistics.fmean(each.backward_s for each in same),
            update_s=statistics.fmean(each.update_s for each in same),
        )
        for same in zip(*(profile.layers for profile in profiles), strict=True)
    )
    return dataclasses.replace(first, layers=layers)


def count(graph: LayerGraph, model: str = "") -> Profile:
    """A Profile by counting instead of measuring: the same on every machine and at every call.

    A layer's time is its number of floating-point operations plus one for every output value, at
    1 Gflop/s, and its backward takes twice its forward. Good enough to cut a model evenly; for a
    plan that knows the machine use `measure`.
    """
    layers = []
    for layer in graph.layers:
        forward_s = (layer.operations + layer.output_bytes // 4) / 1e9
        layers.append(_profile(layer, forward_s, 2 * forward_s, stash_bytes=0))
    name = model or type(graph.module).__name__
    return Profile(name, "counted", _minibatch(graph), tuple(layers), graph.edges)


def _one_minibatch(
    parts: list[Part],
    samples: list[_Samples],
    arguments: tuple[Any, ...],
    loss: Callable[[Any], torch.Tensor] | None,
    *,
    counted: bool,
) -> None:
    values: dict[str, torch.Tensor] = {}
    for part, sample in zip(parts, samples, strict=True):
        # A layer that writes into its input gets a copy: the value is also the stash of the layer before.
        entries = [
            values[value.name].detach().clone().requires_grad_(value.needs_gradient) for _, value in part.entries
        ]
        given = [*(arguments[index] for index in part.inputs), *entries]
        for position in part.rewrites:
            given[position] = enter(given[position]) if given[position].requires_grad else given[position].clone()
        if not counted:
            sample.stash_bytes = max(sample.stash_bytes, _stashed_bytes(part, given))
        began = time.perf_counter()
        returned = part.run(given)
        if part.output and loss is not None:
            returned = (*returned[:-1], loss(returned[-1]))
        forward_s = time.perf_counter() - began
        outputs = [leaf for leaf in tree_flatten(returned)[0] if isinstance(leaf, torch.Tensor)]
        trained = [output for output in outputs if output.requires_grad]
        backward_s = 0.0
        if trained:
            gradients = [torch.full_like(output, 1.0 / max(output.numel(), 1)) for output in trained]
            began = time.perf_counter()
            torch.autograd.backward(trained, gradients)
            backward_s = time.perf_counter() - began
        for parameter in part.module.parameters():
            parameter.grad = None
        if counted:
            sample.forward_s.append(forward_s)
            sample.backward_s.append(backward_s)
        values.update((value.name, exit.detach()) for value, exit in zip(part.exits, returned, strict=False))


def _stashed_bytes(part: Part, given: list[Any]) -> int:
    """What autograd keeps from this layer's forward to its backward, without the weights."""
    kept: dict[int, int] = {}
    own = {parameter.untyped_storage().data_ptr() for parameter in part.module.parameters()}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    def copied(value: Any) -> Any:
        return value.detach().clone().requires_grad_(value.requires_grad) if isinstance(value, torch.Tensor) else value

    copies = [copied(each) for each in given]
    for position in part.rewrites:
        copies[position] = enter(copies[position]) if copies[position].requires_grad else copies[position]
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        alive = part.run(copies)
    del alive
    return sum(kept.values())


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
        output_dtype=None if layer.output_dtype is None else str(layer.output_dtype).removeprefix("torch."),
    )
