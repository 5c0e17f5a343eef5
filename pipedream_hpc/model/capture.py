"""Capture a torch model as a graph of layers.

    model ──► torch.fx trace ──► shapes ──► layers ──► LayerGraph
              (the model is not run)

The graph may be cut through any edges, as long as data flows only forward over the cut. What crosses a cut is a
Value: a tensor, or a Python number that a later layer needs.
"""

from __future__ import annotations

import inspect
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import fx, nn
from torch.utils._pytree import tree_map

from pipedream_hpc.errors import PipedreamError
from pipedream_hpc.model.graph import LayerGraph
from pipedream_hpc.model.layers import group_into_layers
from pipedream_hpc.model.precision import Precision
from pipedream_hpc.model.recipe import ModelFactory, ModelRecipe, build_model
from pipedream_hpc.model.shapes import propagate_shapes


def arguments_of(inputs: Any) -> tuple[Any, ...]:
    """Return the positional arguments of a model: one value, the items of a sequence, or the values of a mapping."""
    if isinstance(inputs, Mapping):
        return tuple(inputs.values())
    if isinstance(inputs, list | tuple):
        return tuple(inputs)
    return (inputs,)


def capture(
    model: nn.Module | ModelFactory,
    example_inputs: Any,
    leaf_modules: Sequence[type[nn.Module]] = (),
    precision: Precision | None = None,
) -> LayerGraph:
    """Capture `model` as a graph of layers.

    Weights, BatchNorm statistics and random number generators are left unchanged: shapes are propagated on the meta
    device wherever the model allows it.

    Args:
        model: any module that torch.fx can trace; or a function without arguments that builds it. The parameters of
            a model given as a function are on the meta device until `materialize` creates those of some stages.
        example_inputs: one minibatch of inputs of the largest size that will occur: a tensor, a sequence of
            arguments, or a mapping from the argument names of forward.
        leaf_modules: module classes that are kept whole instead of being traced.
        precision: context of the forward passes, such as autocast, which changes the dtypes of outputs.

    Raises:
        PipedreamError: the model cannot be traced, or does not accept the example inputs.
    """
    recipe = None
    if not isinstance(model, nn.Module) and callable(model):
        recipe = ModelRecipe(model)
        model = recipe.model
    model = build_model(model)
    arguments = _arguments_by_name(model, example_inputs)
    with _training_mode(model):
        graph = fx.GraphModule(model, _trace(model, tuple(leaf_modules), arguments)).graph
        _remove_default_arguments(graph, arguments)
        _use_results_of_writes(model, graph)
        graph.eliminate_dead_code()
        inputs = tuple(node for node in graph.nodes if node.op == "placeholder")
        values = tuple(arguments[str(node.target)] for node in inputs)
        flops = propagate_shapes(model, graph, values, precision)
    (output,) = (node for node in graph.nodes if node.op == "output")
    layers, edges = group_into_layers(model, graph, flops)
    meta = tree_map(lambda x: torch.empty_like(x, device="meta") if isinstance(x, torch.Tensor) else x, values)
    return LayerGraph(model, layers, edges, inputs, output.args[0], meta, recipe)


def _arguments_by_name(model: nn.Module, example_inputs: Any) -> dict[str, Any]:
    """Return the example inputs by the argument names of forward."""
    if isinstance(example_inputs, Mapping):
        return dict(example_inputs)
    given = arguments_of(example_inputs)
    names = [
        parameter.name
        for parameter in inspect.signature(model.forward).parameters.values()
        if parameter.kind in (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD)
    ]
    required = [
        parameter.name
        for parameter in inspect.signature(model.forward).parameters.values()
        if parameter.kind in (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD)
        and parameter.default is parameter.empty
    ]
    if len(given) > len(names) or len(given) < len(required):
        takes = f"{len(required)}" if len(required) == len(names) else f"{len(required)} to {len(names)}"
        raise PipedreamError(
            f"{type(model).__name__}.forward takes {takes} inputs ({', '.join(names)}), but example_inputs has "
            f"{len(given)}: pass one tensor per input as a tuple, or a mapping from input names to tensors"
        )
    return dict(zip(names, given, strict=False))


def _trace(model: nn.Module, leaf_modules: tuple[type[nn.Module], ...], arguments: Mapping[str, Any]) -> fx.Graph:
    entered: list[str] = []

    class Tracer(fx.Tracer):
        def is_leaf_module(self, module: nn.Module, name: str) -> bool:
            if isinstance(module, leaf_modules) or super().is_leaf_module(module, name):
                return True
            entered.append(f"'{name}' ({type(module).__name__})")
            return False

    omitted = {
        name: parameter.default
        for name, parameter in inspect.signature(model.forward).parameters.items()
        if name not in arguments and parameter.default is not parameter.empty
    }
    try:
        return Tracer().trace(model, concrete_args=omitted or None)
    except PipedreamError:
        raise
    except Exception as error:
        where = entered[-1] if entered else f"the model ({type(model).__name__})"
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise PipedreamError(
            f"cannot capture the model: torch.fx cannot trace module {where}{_line_of(error)}: {reason}; "
            "keep that module whole with TrainConfig(leaf_modules=[its class])"
        ) from error


@contextmanager
def _training_mode(model: nn.Module) -> Iterator[None]:
    """Trace in training mode: torch.fx records what modules do in their current mode."""
    modes = {module: module.training for module in model.modules()}
    model.train()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def _use_results_of_writes(model: nn.Module, graph: fx.Graph) -> None:
    """Make later readers of a tensor that is written in place read the result: `h.add_(1)` becomes `h = h.add_(1)`.

    torch.fx records only returned values, so a statement whose result is unused looks like dead code.

    Raises:
        PipedreamError: nothing reads the written tensor by its own name, as when a view of another tensor is written.
    """
    place = {node: number for number, node in enumerate(graph.nodes)}
    for node in graph.nodes:
        if not _writes_in_place(model, node) or not node.args or not isinstance(node.args[0], fx.Node):
            continue
        written = node.args[0]
        for user in [user for user in written.users if place[user] > place[node]]:
            user.replace_input_with(written, node)
        if not node.users:
            raise PipedreamError(
                f"the model writes into '{written.name}' in place, and its graph does not show what reads the result "
                f"({node.format_node()}): use the result, as in h = h.add(1), or keep the module whole with "
                "TrainConfig(leaf_modules=[its class])"
            )


def _writes_in_place(model: nn.Module, node: fx.Node) -> bool:
    """Return whether an operation writes into its first argument."""
    if node.op == "call_module":
        return bool(getattr(model.get_submodule(str(node.target)), "inplace", False))
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    if node.op not in ("call_method", "call_function"):
        return False
    return node.kwargs.get("inplace") is True or (name.endswith("_") and not name.endswith("__"))


def _remove_default_arguments(graph: fx.Graph, arguments: Mapping[str, Any]) -> None:
    """Remove the placeholders of arguments that the example omits; torch.fx has already inserted their defaults."""
    for node in list(graph.nodes):
        if node.op == "placeholder" and str(node.target) not in arguments:
            _erase(graph, node)


def _erase(graph: fx.Graph, node: fx.Node) -> None:
    """Erase a node and everything that depends on it: the checks that it has its default value."""
    for user in list(node.users):
        _erase(graph, user)
    graph.erase_node(node)


def _line_of(error: Exception) -> str:
    """Return the last line of the traceback that is neither in torch nor in this package."""
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        if "/torch/" not in frame.filename and "pipedream_hpc/model/" not in frame.filename:
            return f", {frame.filename} line {frame.lineno}"
    return ""
