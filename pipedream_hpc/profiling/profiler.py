"""Measure every layer of a captured model on this device."""

from __future__ import annotations

import dataclasses
import statistics
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from pipedream_hpc.errors import PipedreamError
from pipedream_hpc.model.arguments import Arguments
from pipedream_hpc.model.clock import clock_of
from pipedream_hpc.model.counting import layer_profile, minibatch_size
from pipedream_hpc.model.graph import Layer, LayerGraph, get_attribute
from pipedream_hpc.model.partition import Partition
from pipedream_hpc.model.precision import Precision
from pipedream_hpc.model.preserve_state import preserve_state
from pipedream_hpc.model.stage_module import StageModule, writable
from pipedream_hpc.model.structure import tensors_of_value
from pipedream_hpc.planning.profile import SPLITTABLE_KINDS, Profile
from pipedream_hpc.profiling.clocked import ClockedModel


def measure(
    graph: LayerGraph,
    example_inputs: Any,
    *,
    minibatches: int = 20,
    warm_up: int = 3,
    model: str = "",
    loss_fn: Callable[[Any], torch.Tensor] | None = None,
    precision: Precision | None = None,
    device: torch.device = torch.device("cpu"),  # noqa: B008 - a constant
    device_name: str = "cpu",
) -> Profile:
    """Time forward and backward of every layer (PipeDream paper, section 3.1).

    Whole minibatches are run with a time stamp after each layer (see clocked); then the bytes that autograd stashes
    are measured layer by layer. The times are medians. Weights, gradients, BatchNorm statistics and random number
    generators are left unchanged.

    Args:
        graph: the captured model.
        example_inputs: one minibatch of real inputs, of the captured shapes.
        minibatches: number of minibatches to measure (paper: 1,000 on a GPU; tens suffice on a quiet machine).
        warm_up: number of minibatches to run before, which are not counted.
        model: name for the profile; by default the class of the model.
        loss_fn: loss of the model's output for this example; it is counted with the last layer.
        precision: context of the forward passes; the same as at capture.
        device: device of the model and the inputs. On a GPU, times are measured between events on its stream.
        device_name: name of the device for the profile.

    Raises:
        PipedreamError: `minibatches` is less than 1, or the inputs do not have the captured shapes.
    """
    if minibatches < 1:
        raise PipedreamError(f"minibatches is {minibatches}: profile at least 1")
    arguments = _checked_arguments(graph, example_inputs)
    forward_s: list[list[float]] = []
    backward_s: list[list[float]] = []
    with preserve_state(graph.module, graph.notes.written_weights()):
        clocked = ClockedModel(graph, loss_fn, precision, clock_of(device))
        for index in range(warm_up + minibatches):
            clocked.run(arguments)
            if index >= warm_up:
                forward_s.append(clocked.forward_s)
                backward_s.append(clocked.backward_s)
        memory = _measure_memory(graph, arguments, loss_fn, precision)
    forward, backward = (
        [statistics.median(of_layer) for of_layer in zip(*rows, strict=True)] for rows in (forward_s, backward_s)
    )
    return Profile(
        model=model or type(graph.module).__name__,
        device=device_name,
        minibatch=minibatch_size(graph),
        layers=tuple(
            layer_profile(layer, layer_forward_s, layer_backward_s, **dataclasses.asdict(layer_memory))
            for layer, layer_forward_s, layer_backward_s, layer_memory in zip(
                graph.layers, forward, backward, memory, strict=True
            )
        ),
        edges=graph.edges,
    )


def one_minibatch(
    graph: LayerGraph,
    example_inputs: Any,
    loss_fn: Callable[[Any], torch.Tensor] | None = None,
    precision: Precision | None = None,
) -> Callable[[], None]:
    """Return a function that runs one minibatch and changes nothing but the contents of the caches.

    Work that a stage does between two minibatches has to be measured between two minibatches: repeated by itself,
    with everything in the cache, an update of a small model takes a third of the time.
    """
    clocked, arguments = ClockedModel(graph, loss_fn, precision), _checked_arguments(graph, example_inputs)

    def run() -> None:
        with preserve_state(graph.module, graph.notes.written_weights()):
            clocked.run(arguments)

    return run


def _checked_arguments(graph: LayerGraph, example_inputs: Any) -> Arguments:
    """Return the arguments of the model; raise PipedreamError if they do not have the captured shapes."""

    def described(arguments: Arguments) -> str:
        return " and ".join(f"{tuple(tensor.shape)} of {tensor.dtype}" for tensor in arguments.tensors())

    arguments = graph.inputs.like(example_inputs)
    if described(arguments) != described(graph.inputs):
        raise PipedreamError(
            f"example_inputs has shape {described(arguments)}, but the model was captured with "
            f"{described(graph.inputs)}: use the same example_inputs for both"
        )
    return arguments


def average(profiles: Sequence[Profile]) -> Profile:
    """Return the mean of the profiles that several ranks measured of one model at the same time."""
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
        overhead_s=statistics.fmean(profile.overhead_s for profile in profiles),
    )


@dataclass(frozen=True)
class _LayerMemory:
    """The memory of a layer.

    Attributes:
        stash_bytes: bytes that autograd keeps from forward to backward, without the weights.
        inner_bytes: output bytes of the modules of SPLITTABLE_KINDS in the layer.
        unsplit_bytes: bytes of the weights that are not used by exactly one such module.
    """

    stash_bytes: int
    inner_bytes: int
    unsplit_bytes: int = 0


def _measure_memory(
    graph: LayerGraph,
    arguments: Arguments,
    loss_fn: Callable[[Any], torch.Tensor] | None,
    precision: Precision | None,
) -> list[_LayerMemory]:
    """Run each layer by itself on the outputs of the layers before it, and measure what it keeps.

    The stash of the loss is counted with the last layer: in a language model it is as large as the output.
    """
    partition = Partition(graph, [[index] for index in range(len(graph.layers))])
    values: dict[str, torch.Tensor] = {}
    memory = []
    uses = Counter(id(each) for layer in graph.layers for each in _parameters(graph, layer))
    for index, layer in enumerate(graph.layers):
        stage = partition.stage_module(index)
        # A layer that writes into its input gets a copy: the layer before may have stashed the value.
        stage_inputs = [
            values[value.name].detach().clone().requires_grad_(value.needs_gradient) for _, value in stage.stage_inputs
        ]
        for position in stage.written_inputs:
            if stage_inputs[position].requires_grad:
                stage_inputs[position] = writable(stage_inputs[position])
        with (precision or nullcontext)():
            kept, used_once, returned = _run_and_measure(stage, arguments, stage_inputs, loss_fn)
        trained = [each for each in _parameters(graph, layer) if each.requires_grad]
        unsplit = [each for each in trained if id(each) not in used_once or uses[id(each)] > 1]
        memory.append(dataclasses.replace(kept, unsplit_bytes=sum(each.nbytes for each in unsplit)))
        values.update(
            (value.name, output.detach())
            for value, output in zip(stage.stage_outputs, returned, strict=True)
            if output is not None
        )
    return memory


def _parameters(graph: LayerGraph, layer: Layer) -> list[nn.Parameter]:
    """Return the parameters of a layer, each once."""
    return list({id(each): each for each in (get_attribute(graph.module, name) for name in layer.parameters)}.values())


def _run_and_measure(
    stage: StageModule,
    arguments: Arguments,
    stage_inputs: list[torch.Tensor],
    loss_fn: Callable[[Any], torch.Tensor] | None,
) -> tuple[_LayerMemory, set[int], list[Any]]:
    """Run a layer; return its memory, the ids of weights that one splittable module uses once, and its outputs."""
    inner_bytes = 0
    deferrable: set[int] = set()  # identities of weights whose gradient a split backward can defer
    kept: dict[int, int] = {}
    own = {parameter.untyped_storage().data_ptr() for parameter in stage.module.parameters()}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.layout is not torch.strided:
            return tensor  # a sparse constant has no storage of its own
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = _allocated_bytes(storage)
        return tensor

    def on_forward(module: nn.Module, given: Any, out: Any) -> None:
        nonlocal inner_bytes
        inner_bytes += out.nbytes if isinstance(out, torch.Tensor) else 0
        # The same condition as in runtime.execution.split_backward: not under checkpointing, where nothing is saved
        # or other hooks handle the saved tensors.
        hooks = torch._C._autograd._top_saved_tensors_default_hooks(False)
        saves = torch.is_grad_enabled() and hooks is not None and hooks[0] is keep
        leaves = [each for each in module._parameters.values() if each is not None]
        weights = set(map(id, leaves))
        hooked = any(each._backward_hooks for each in leaves)
        if saves and len(given) == 1 and given[0].requires_grad and not hooked and deferrable.isdisjoint(weights):
            deferrable.update(weights)

    splittable = [module for module in stage.modules if type(module).__name__ in SPLITTABLE_KINDS]
    with ExitStack() as hooks, torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        for module in splittable:
            hooks.callback(module.register_forward_hook(on_forward).remove)
        returned, output = stage.run(arguments, stage_inputs)
        loss = loss_fn(output) if stage.is_last and loss_fn is not None else output
    uses = _count_uses([each for each in (*returned, *tensors_of_value(loss)) if each is not None])
    used_once = {each for each in deferrable if uses[each] == 1}
    return _LayerMemory(sum(kept.values()), inner_bytes), used_once, returned


def _count_uses(results: Sequence[torch.Tensor]) -> Counter[int]:
    """Count how often every parameter, by identity, is used in the autograd graph of `results`."""
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


def _allocated_bytes(storage: torch.UntypedStorage) -> int:
    """Return the bytes allocated for a storage: torch allocates a GPU's memory in blocks of 512 bytes."""
    return -(-storage.nbytes() // 512) * 512 if storage.device.type == "cuda" else storage.nbytes()
