"""Measure every layer of a captured model on this device."""

from __future__ import annotations

import dataclasses
import statistics
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_flatten

from pipedream_hpc.errors import PipedreamError
from pipedream_hpc.model.capture import arguments_of
from pipedream_hpc.model.clock import clock_of
from pipedream_hpc.model.clocked import Clocked
from pipedream_hpc.model.cut import Cut, Part, enter
from pipedream_hpc.model.graph import Layer, LayerGraph, parameters_of
from pipedream_hpc.model.precision import Precision
from pipedream_hpc.model.untouched import untouched
from pipedream_hpc.planning.profile import PRODUCTS, LayerProfile, Profile


def measure(
    graph: LayerGraph,
    example: Any,
    *,
    minibatches: int = 20,
    warm_up: int = 3,
    model: str = "",
    loss: Callable[[Any], torch.Tensor] | None = None,
    precision: Precision | None = None,
    device: torch.device = torch.device("cpu"),  # noqa: B008 - as good as a constant
    name: str = "cpu",
) -> Profile:
    """Time forward and backward of every layer (the paper's section 3.1).

    Whole minibatches are run with a clock between the layers (model.clocked); what autograd stashes is
    looked at afterwards, layer by layer. The times kept are medians. Weights, gradients, BatchNorm
    statistics and random number generators are left as they were.

    Args:
        graph: the captured model.
        example: one minibatch of real inputs, in the captured form.
        minibatches: how many to measure (the paper: 1,000 on a GPU; tens settle on a quiet machine).
        warm_up: minibatches run before, not counted.
        model: the name to note down; the model's class by default.
        loss: of the model's output for this example; it is counted with the last layer.
        precision: what forwards run in; the graph was captured for the same.
        device: where model and example are. Times on a GPU are between events on its stream.
        name: the device's.

    Raises:
        PipedreamError: `minibatches` is less than 1, or the example has not the captured shape.
    """
    if minibatches < 1:
        raise PipedreamError(f"minibatches to profile should be at least 1, not {minibatches}")
    arguments = _checked(graph, example)
    forward_s: list[list[float]] = []
    backward_s: list[list[float]] = []
    with untouched(graph.module):
        clocked = Clocked(graph, loss, precision, clock_of(device))
        for turn in range(warm_up + minibatches):
            clocked.run(arguments)
            if turn >= warm_up:
                forward_s.append(clocked.forward_s)
                backward_s.append(clocked.backward_s)
        stashed = _stashed_by_layer(graph, arguments, loss, precision)
    forward, backward = (
        [statistics.median(of_layer) for of_layer in zip(*rows, strict=True)] for rows in (forward_s, backward_s)
    )
    return Profile(
        model=model or type(graph.module).__name__,
        device=name,
        minibatch=_minibatch(graph),
        layers=tuple(
            _profile(layer, took_s, back_s, sizes)
            for layer, took_s, back_s, sizes in zip(graph.layers, forward, backward, stashed, strict=True)
        ),
        edges=graph.edges,
    )


def one_minibatch(
    graph: LayerGraph,
    example: Any,
    loss: Callable[[Any], torch.Tensor] | None = None,
    precision: Precision | None = None,
) -> Callable[[], None]:
    """A function that runs one minibatch and leaves no trace but in the caches.

    What a stage does between two minibatches is to be measured between two minibatches: again and again
    by itself, with all it needs in the cache, an update of a small model takes a third of the time.
    """
    clocked, arguments = Clocked(graph, loss, precision), _checked(graph, example)

    def run() -> None:
        with untouched(graph.module):
            clocked.run(arguments)

    return run


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
    layers = tuple(
        dataclasses.replace(
            same[0],
            forward_s=statistics.fmean(each.forward_s for each in same),
            backward_s=statistics.fmean(each.backward_s for each in same),
            update_s=statistics.fmean(each.update_s for each in same),
        )
        for same in zip(*(profile.layers for profile in profiles), strict=True)
    )
    return dataclasses.replace(
        profiles[0],
        layers=layers,
        read_s=statistics.fmean(profile.read_s for profile in profiles),
        beside_s=statistics.fmean(profile.beside_s for profile in profiles),
    )


def count(graph: LayerGraph, model: str = "") -> Profile:
    """A Profile by counting instead of measuring: the same on every machine and at every call.

    A layer's time is its number of floating-point operations plus one for every output value, at
    1 Gflop/s, and its backward takes twice its forward. Good enough to cut a model evenly; for a
    plan that knows the machine use `measure`.
    """
    layers = []
    for layer in graph.layers:
        forward_s = (layer.operations + layer.output_bytes // 4) / 1e9
        layers.append(_profile(layer, forward_s, 2 * forward_s, _Sizes(0, 0)))
    name = model or type(graph.module).__name__
    return Profile(name, "counted", _minibatch(graph), tuple(layers), graph.edges)


def _stashed_by_layer(
    graph: LayerGraph,
    arguments: tuple[Any, ...],
    loss: Callable[[Any], torch.Tensor] | None,
    precision: Precision | None,
) -> list[_Sizes]:
    """Run each layer by itself on what the layers before it put out, to see what it keeps.

    What the loss stashes counts with the last layer: of a language model as much as its output.
    """
    cut = Cut(graph, [[index] for index in range(len(graph.layers))])
    values: dict[str, torch.Tensor] = {}
    sizes = []
    used = Counter(id(each) for layer in graph.layers for each in _parameters(graph, layer))
    for index, layer in enumerate(graph.layers):
        part = cut.part(index, isolated=False)
        # A layer that writes into its input gets a copy: the value is also the stash of the layer before.
        entries = [
            values[value.name].detach().clone().requires_grad_(value.needs_gradient) for _, value in part.entries
        ]
        given = [*(arguments[index] for index in part.inputs), *entries]
        for position in part.rewrites:
            given[position] = enter(given[position]) if given[position].requires_grad else given[position].clone()
        with (precision or nullcontext)():
            kept, single, returned = _weighed(part, given, loss)
        own = [each for each in _parameters(graph, layer) if each.requires_grad]
        outside = [each for each in own if id(each) not in single or used[id(each)] > 1]
        sizes.append(dataclasses.replace(kept, outside_bytes=sum(each.nbytes for each in outside)))
        values.update((value.name, exit.detach()) for value, exit in zip(part.exits, returned, strict=False))
    return sizes


def _parameters(graph: LayerGraph, layer: Layer) -> list[nn.Parameter]:
    """Of a layer, each once."""
    return list({id(each): each for node in layer.nodes for _, each in parameters_of(graph.module, node)}.values())


@dataclass(frozen=True)
class _Sizes:
    """What a layer keeps.

    Attributes:
        stash_bytes: that autograd keeps from its forward to its backward, without the weights.
        inner_bytes: that products in it put out.
        outside_bytes: of weights that anything but a single product uses.
    """

    stash_bytes: int
    inner_bytes: int
    outside_bytes: int = 0


def _weighed(
    part: Part, given: list[Any], loss: Callable[[Any], torch.Tensor] | None
) -> tuple[_Sizes, set[int], tuple[Any, ...]]:
    """What this layer keeps, the weights (by identity) that a single product in it uses, and what it returns."""
    put_out = 0
    put_off: set[int] = set()  # weights, by identity, of products that can put them off
    kept: dict[int, int] = {}
    own = {parameter.untyped_storage().data_ptr() for parameter in part.module.parameters()}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = _allocated(storage)
        return tensor

    def count_out(module: nn.Module, given: Any, out: Any) -> None:
        nonlocal put_out
        put_out += out.nbytes if isinstance(out, torch.Tensor) else 0
        # As runtime.put_off has it: not under checkpointing, where others look after what is saved, or nothing is.
        saving = torch._C._autograd._top_saved_tensors_default_hooks(False)
        watched = torch.is_grad_enabled() and saving is not None and saving[0] is keep
        weights = {id(each) for each in module._parameters.values() if each is not None}
        if watched and len(given) == 1 and given[0].requires_grad and put_off.isdisjoint(weights):
            put_off.update(weights)

    products = [module for module in part.module.modules() if type(module).__name__ in PRODUCTS]
    with ExitStack() as hooks, torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        for module in products:
            hooks.callback(module.register_forward_hook(count_out).remove)
        returned = part.run(given)
        if part.output and loss is not None:
            loss(returned[-1])
    uses = _uses([each for each in returned if isinstance(each, torch.Tensor)])
    single = {each for each in put_off if uses[each] == 1}
    return _Sizes(sum(kept.values()), put_out), single, returned


def _uses(results: Sequence[torch.Tensor]) -> Counter[int]:
    """How often parameters, by identity, are used on the way to `results`."""
    found: Counter[int] = Counter()
    todo = [result.grad_fn for result in results if result.grad_fn is not None]
    seen = set(todo)
    while todo:
        for node, _ in todo.pop().next_functions:
            if node is None:
                continue
            if hasattr(node, "variable"):
                found[id(node.variable)] += 1
            elif node not in seen:
                seen.add(node)
                todo.append(node)
    return found


def _allocated(storage: torch.UntypedStorage) -> int:
    """Bytes that a storage takes: torch gives out a GPU's memory in blocks of 512 bytes."""
    return -(-storage.nbytes() // 512) * 512 if storage.device.type == "cuda" else storage.nbytes()


def _profile(layer: Layer, forward_s: float, backward_s: float, sizes: _Sizes) -> LayerProfile:
    return LayerProfile(
        name=layer.name,
        kind=layer.kind,
        forward_s=forward_s,
        backward_s=backward_s,
        output_bytes=layer.output_bytes,
        parameter_bytes=layer.parameter_bytes,
        outside_bytes=sizes.outside_bytes,
        stash_bytes=sizes.stash_bytes,
        inner_bytes=0 if layer.kind in PRODUCTS else sizes.inner_bytes,
        output_shape=layer.output_shape,
        output_dtype=None if layer.output_dtype is None else str(layer.output_dtype).removeprefix("torch."),
    )
