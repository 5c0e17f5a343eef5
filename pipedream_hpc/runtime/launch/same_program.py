"""Check that the stages run the user's program: the same output, gradients and buffers as the model by itself.

The model runs by itself, and then stage by stage, from the same state and with the same random numbers; in training
mode, where also a backward is run from all outputs, and in evaluation mode. Everything is restored afterwards.

This needs the whole model on rank 0. Where it has no room there, every stage is checked by itself (see same_stage).
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_hook

from pipedream_hpc.errors import PipedreamError
from pipedream_hpc.model.arguments import Arguments
from pipedream_hpc.model.calls import watch_modules, watched
from pipedream_hpc.model.checkpoints import checkpoints
from pipedream_hpc.model.drawn import python_generators
from pipedream_hpc.model.graph import LayerGraph, memory_order
from pipedream_hpc.model.partition import Partition
from pipedream_hpc.model.precision import Precision
from pipedream_hpc.model.preserve_state import preserve_state
from pipedream_hpc.model.randomness import DrawsOnly, seed_for, seed_modules, seeding, set_seed
from pipedream_hpc.model.rerun import Step
from pipedream_hpc.model.stage_module import StageModule, writable
from pipedream_hpc.model.structure import items_of, output_tensors

#: Gradients of a value with several users are added in another order where the users are in several stages.
_RTOL, _ATOL = 1e-3, 1e-5

Reseed = Callable[[str], None]


@dataclass
class Results:
    """What one run leaves behind.

    Attributes:
        outputs: the tensors in the model's output.
        gradients: of the parameters, by name; none in evaluation.
        buffers: of the model after the run.
    """

    outputs: list[torch.Tensor]
    gradients: dict[str, torch.Tensor]
    buffers: dict[str, torch.Tensor]


def measure_orders(graph: LayerGraph, arguments: Arguments, precision: Precision | None) -> list[list[Any]]:
    """Return the orders in memory of the outputs of all calls, in training and in evaluation (see Value.order).

    Tensors without values do not always have the strides of those that are computed.
    """
    orders: list[list[Any]] = []

    def note(step: Step, outputs: Sequence[torch.Tensor | None]) -> None:
        orders[-1].append([None if each is None else memory_order(each) for each in outputs])

    with graph.closing():
        whole = Partition(graph, [range(len(graph.layers))]).stage_module(0, whole=False)
        whole.watch_calls(note)
        for training in (True, False):
            orders.append([])
            # A forward may ask whether there are gradients, as it did when it was recorded.
            with _preserved(graph), torch.set_grad_enabled(training), (precision or nullcontext)():
                whole.train(training)
                try:
                    whole.run(arguments, [])
                except PipedreamError:
                    raise
                except Exception as error:
                    mode = "training" if training else "evaluation"
                    raise RuntimeError(
                        f"rank 0, before training: the forward of the model failed on example_inputs in {mode} mode: "
                        f"{type(error).__name__}: {error}"
                    ) from error
    return orders


def set_orders(graph: LayerGraph, orders: list[list[Any]]) -> None:
    """Take over orders that `measure_orders` has returned."""
    for recording, of_mode in zip((graph.training, graph.evaluation), orders, strict=True):
        for call, of_call in zip(recording.calls, of_mode, strict=True):
            call.values = tuple(replace(each, order=order) for each, order in zip(call.values, of_call, strict=True))


def check_same_program(
    graph: LayerGraph,
    partition: Partition,
    n_stages: int,
    arguments: Arguments,
    *,
    seed: int,
    precision: Precision | None,
) -> None:
    """Compare the model by itself with its stages.

    Args:
        graph: the captured model, with all its weights.
        partition: the model in stages.
        n_stages: number of stages.
        arguments: arguments of the model, with values.
        seed: seed of the random numbers.
        precision: context of the forwards.

    Raises:
        PipedreamError: they differ: it names the first difference.
    """
    context = precision or nullcontext
    with graph.closing():
        stages = [partition.stage_module(index) for index in range(n_stages)]
        graph.on_close.append(seed_modules(graph.module, graph.notes))
        for training in (True, False):
            run = partial(run_restored, graph, training, seed, context)
            by_itself = partial(run, partial(_alone, graph, arguments, training))
            in_stages = partial(run, partial(_staged, stages, arguments, training))
            problem = difference(by_itself(), in_stages(), training)
            if problem:
                name = _first_module(graph, training, by_itself, in_stages)
                where = f", and the first module whose output differs is '{name}'" if name else ""
                raise PipedreamError(
                    f"the stages do not compute what the model computes by itself: {problem}{where}: keep the modules "
                    "whole whose forward does more than it shows, with TrainConfig(leaf_modules=[their classes])"
                )


def _first_module(
    graph: LayerGraph, training: bool, alone: Callable[[], Results], staged: Callable[[], Results]
) -> str:
    """Run both again; return which module that is kept whole puts out something else first, or an empty string."""
    calls = (graph.training if training else graph.evaluation).calls
    names = {id(call.module): call.name for call in calls if call.module is not None}

    def outputs(run: Callable[[], Results]) -> dict[tuple[str, int], list[torch.Tensor]]:
        found: dict[tuple[str, int], list[torch.Tensor]] = {}  # by the module and the number of its call
        counts = Counter[str]()

        def note(module: nn.Module, args: Any, output: Any) -> None:
            if (name := names.get(id(module))) is not None:
                found[name, counts[name]] = [each.detach().clone() for each in output_tensors(output)]
                counts[name] += 1

        hook = register_module_forward_hook(note)
        try:
            run()
        finally:
            hook.remove()
        return found

    expected, found = outputs(alone), outputs(staged)
    for key, tensors in expected.items():
        others = found.get(key, tensors)
        if len(tensors) != len(others) or not all(map(_same, tensors, others)):
            return key[0]
    return ""


def check_microbatches(
    graph: LayerGraph, whole: Arguments, parts: Sequence[Arguments], precision: Precision | None
) -> None:
    """Refuse a model whose output for a minibatch is not that for its microbatches, one after the other.

    The model runs in evaluation mode, where no layer normalizes over samples. Examples of what is refused: inputs that
    have time as their first dimension, a mask that has one row per position.

    Raises:
        PipedreamError: they differ.
    """
    model = graph.module
    remedy = (
        "no sample may see another, and samples must be the first dimension of every input, or where "
        "TrainConfig(batch_dims={name: dimension, or None}) says; otherwise train whole minibatches (n_microbatches=1)"
    )

    def output_of(arguments: Arguments) -> Any:
        with _preserved(graph), torch.no_grad(), (precision or nullcontext)():
            graph.modes.set(model, False)
            before = _generators()
            own = graph.own(arguments)
            output = model(*own.args, **own.kwargs)
            return output, _generators() != before

    expected, draws = output_of(whole)
    try:
        found = [output_of(part)[0] for part in parts]
    except Exception as error:
        first = str(error).strip().partition("\n")[0]
        raise PipedreamError(f"the model does not accept a microbatch of example_inputs: {first}: {remedy}") from error
    for tensor, cut in _side_by_side(expected, found):
        if not tensor.dim() or any(not each.dim() for each in cut):
            if not draws:
                _warn_of_unequal(tensor, cut, parts)
            continue
        joined = [torch.cat(cut, dim) for dim in range(tensor.dim()) if _fit(tensor, cut, dim)]
        if any(_same(tensor, each) for each in joined):
            continue
        what = f"the model's output for a minibatch differs from that for its {len(parts)} microbatches"
        shapes = " and ".join(str(tuple(each.shape)) for each in cut)
        how = (
            f"by up to {_distance(tensor, joined[0]):.3g}"
            if joined
            else f"in a tensor of shape {tuple(tensor.shape)}, which is {shapes} for the microbatches"
        )
        if draws:
            how += ", as it draws random numbers in evaluation mode"
            remedy = "let it draw none there (`if self.training`), or train whole minibatches (n_microbatches=1)"
        raise PipedreamError(f"{what} {how}: {remedy}")


def _warn_of_unequal(whole: torch.Tensor, cut: Sequence[torch.Tensor], parts: Sequence[Arguments]) -> None:
    """Warn of a number of the model's, such as a loss, that is not the mean of those of microbatches of equal sizes."""
    shapes = {tuple(tensor.shape for tensor in part.tensors()) for part in parts}
    if whole.dim() or len(shapes) > 1 or not whole.is_floating_point():
        return
    mean = torch.stack([each.double() for each in cut]).mean()
    if not torch.allclose(whole.double(), mean, rtol=1e-4, atol=1e-6):
        warnings.warn(
            f"the model computes a number that is {float(whole):g} for example_inputs, but {float(mean):g} as the mean "
            f"over its {len(cut)} microbatches, such as the router loss of a mixture of experts: where it is part of "
            "the loss, microbatches train a loss of their own; n_microbatches=1 trains that of whole minibatches",
            stacklevel=2,
        )


def _generators() -> Any:
    """Return what changes when a forward draws random numbers."""
    devices = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []  # type: ignore[no-untyped-call]
    return [each.tolist() for each in (torch.get_rng_state(), *devices)], python_generators()


def _side_by_side(whole: Any, parts: Sequence[Any]) -> list[tuple[torch.Tensor, list[torch.Tensor]]]:
    """Return every tensor of an output for a minibatch, with those for its microbatches in the same place.

    A list with an item for each sample, or for each image of one, has those of the microbatches one after the other.
    """
    if isinstance(whole, torch.Tensor):
        return [(whole, list(parts))] if all(isinstance(each, torch.Tensor) for each in parts) else []
    if isinstance(whole, list | tuple) and all(isinstance(each, list | tuple) for each in parts):
        lengths = [len(each) for each in parts]
        if sum(lengths) == len(whole) and set(lengths) != {len(whole)}:
            items = [item for each in parts for item in each]
            return [found for item, other in zip(whole, items, strict=True) for found in _side_by_side(item, [other])]
    inner, *others = (dict(items_of(each, objects=False)) for each in (whole, *parts))
    shared = [key for key in inner if all(key in each for each in others)]
    return [found for key in shared for found in _side_by_side(inner[key], [each[key] for each in others])]


def _preserved(graph: LayerGraph) -> AbstractContextManager[None]:
    return preserve_state(graph.module, graph.notes.written_weights())


def _fit(whole: torch.Tensor, parts: Sequence[torch.Tensor], dim: int) -> bool:
    """Return whether `parts` joined along a dimension have the shape of `whole`."""
    shapes = [list(each.shape) for each in (whole, *parts)]
    sizes = [shape.pop(dim) for shape in shapes if len(shape) == whole.dim()]
    return len(sizes) == len(shapes) and sum(sizes[1:]) == sizes[0] and all(each == shapes[0] for each in shapes)


def run_restored(
    graph: LayerGraph, training: bool, seed: int, precision: Any, run: Callable[[Reseed], list[torch.Tensor]]
) -> Results:
    """Run forward and, in training, backward; return the results, and restore the model's state."""
    model = graph.module
    with _preserved(graph):
        graph.modes.set(model, training)
        set_seed(seed_for(seed, "check"))
        with torch.set_grad_enabled(training), precision():
            outputs = run(lambda name: set_seed(seed_for(seed, "check", name)))
        # No copies: what is restored are other gradients, and those of a large model take much memory.
        gradients = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
        return Results(
            [each.detach().clone() for each in outputs],
            gradients,
            {name: buffer.clone() for name, buffer in model.named_buffers() if not buffer.is_meta},
        )


def seed_gradients(outputs: list[torch.Tensor]) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Return the outputs that have a gradient, and fixed gradients for them."""
    roots = [each for each in outputs if each.requires_grad]
    generator = torch.Generator().manual_seed(0)
    return roots, [torch.randn(each.shape, generator=generator).to(each) / max(each.numel(), 1) for each in roots]


def _alone(graph: LayerGraph, arguments: Arguments, training: bool, reseed: Reseed) -> list[torch.Tensor]:
    recording = graph.training if training else graph.evaluation
    whole = {id(call.module) for call in recording.calls if call.module is not None}
    draws = graph.notes.drawing
    undo = watch_modules(graph.module.modules()) if draws else lambda: None
    watcher = DrawsOnly(whole, draws)
    try:
        with (
            watched(watcher) if draws else nullcontext(),
            checkpoints(watcher.checkpointed) if graph.notes.checkpoints else nullcontext(),
            seeding(reseed),
        ):
            own = graph.own(arguments)
            outputs = output_tensors(graph.module(*own.args, **own.kwargs))
        roots, gradients = seed_gradients(outputs)
        if training and roots:
            torch.autograd.backward(roots, gradients)
    finally:
        undo()
    return outputs


def _staged(stages: list[StageModule], arguments: Arguments, training: bool, reseed: Reseed) -> list[torch.Tensor]:
    sent: dict[str, torch.Tensor] = {}
    leaves: list[list[torch.Tensor]] = []
    returned: list[list[Any]] = []
    output = None
    for stage in stages:
        stage.train(training)
        gradients = training or stage.takes_gradients
        own = [
            sent[value.name].detach().clone().requires_grad_(gradients and value.needs_gradient)
            if value.name in sent
            else torch.empty(0)
            for _, value in stage.stage_inputs
        ]
        given = [
            writable(leaf) if position in stage.written_inputs and leaf.requires_grad else leaf
            for position, leaf in enumerate(own)
        ]
        with seeding(reseed):  # a stage counts the calls of the stages before it itself
            outputs, output = stage.run(arguments if stage.reads_inputs else None, given)
        leaves.append(own)
        returned.append(outputs)
        sent.update(
            (value.name, each) for value, each in zip(stage.stage_outputs, outputs, strict=True) if each is not None
        )
    found = output_tensors(output)
    if training:
        _backward(stages, leaves, returned, found)
    return found


def _backward(
    stages: list[StageModule], leaves: list[list[torch.Tensor]], returned: list[list[Any]], output: list[torch.Tensor]
) -> None:
    arrived: dict[str, list[torch.Tensor]] = {}
    for stage, own, outputs in zip(reversed(stages), reversed(leaves), reversed(returned), strict=True):
        roots, gradients = seed_gradients(output) if stage.is_last else ([], [])
        for value, each in zip(stage.stage_outputs, outputs, strict=True):
            if each is not None and each.requires_grad:
                for gradient in reversed(arrived.get(value.name, ())):
                    roots.append(each)
                    gradients.append(gradient)
        if roots:
            torch.autograd.backward(roots, gradients)
        for (_, value), leaf in zip(stage.stage_inputs, own, strict=True):
            if leaf.grad is not None:
                arrived.setdefault(value.name, []).append(leaf.grad)


def difference(
    alone: Results, staged: Results, training: bool, who: tuple[str, str] = ("the model", "the stages")
) -> str:
    """Return in words what differs first; empty if nothing does.

    Args:
        alone: the results that are right.
        staged: the results that are compared with them.
        training: whether they are of training.
        who: whose results they are.
    """
    mode = "in training" if training else "in evaluation"
    if len(alone.outputs) != len(staged.outputs):
        return f"{mode} {who[0]} returns {len(alone.outputs)} tensors, and {who[1]} {len(staged.outputs)}"
    for number, (expected, found) in enumerate(zip(alone.outputs, staged.outputs, strict=True)):
        if not _same(expected, found):
            which = "the output" if len(alone.outputs) == 1 else f"output {number}"
            return f"{mode} {which} differs by up to {_distance(expected, found):.3g}"
    finite = (each.nan_to_num(0.0, 0.0, 0.0) for each in alone.gradients.values() if each.numel())
    most = max((float(each.abs().max()) for each in finite), default=0.0)
    for what, one, other in (
        ("gradient of", alone.gradients, staged.gradients),
        ("buffer", alone.buffers, staged.buffers),
    ):
        for name in one.keys() | other.keys():
            if name not in one or name not in other:
                return f"{mode} only {who[0] if name in one else who[1]} computed the {what} '{name}'"
        for name, expected in one.items():
            if not _same(expected, other[name], most if what == "gradient of" else 0.0):
                return f"{mode} the {what} '{name}' differs by up to {_distance(expected, other[name]):.3g}"
    return ""


def _same(expected: torch.Tensor, found: torch.Tensor, most: float = 0.0) -> bool:
    """Return whether a tensor was found, up to the order of sums.

    Args:
        expected: what should be found.
        found: what was found.
        most: largest of all gradients: one that is zero but for rounding has rounding errors of their size.
    """
    if expected.shape != found.shape or expected.dtype != found.dtype:
        return False
    if expected.is_sparse or found.is_sparse:
        expected, found = expected.to_dense(), found.to_dense()
    if torch.equal(expected, found) or not expected.is_floating_point():
        return torch.equal(expected, found)
    scale = float(expected.nan_to_num(0.0, 0.0, 0.0).abs().max()) if expected.numel() else 0.0
    smallest = _ATOL * max(scale, 1e-6) + torch.finfo(expected.dtype).eps * most
    return torch.allclose(expected, found, rtol=_RTOL, atol=smallest, equal_nan=True)


def _distance(expected: torch.Tensor, found: torch.Tensor) -> float:
    if expected.shape != found.shape:
        return float("inf")
    return float((expected.to(torch.float64) - found.to(torch.float64)).abs().max()) if expected.numel() else 0.0
