"""Capture a torch model as a graph of layers.

    model ──► torch.fx records its operations ──► shapes ──► layers ──► LayerGraph
              once, without running it

A cut may go through any edges of the graph as long as data only flows forwards over it; what crosses is a
Value: a tensor, or a number that a later layer needs.
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
from pipedream_hpc.model.layers import layers_of
from pipedream_hpc.model.materialize import Factory, Recipe, whole
from pipedream_hpc.model.precision import Precision
from pipedream_hpc.model.shapes import propagate


def arguments_of(example: Any) -> tuple[Any, ...]:
    """The arguments of a model, in order: one, a sequence's, or a mapping's values."""
    if isinstance(example, Mapping):
        return tuple(example.values())
    if isinstance(example, list | tuple):
        return tuple(example)
    return (example,)


def capture(
    model: nn.Module | Factory,
    example: Any,
    leaves: Sequence[type[nn.Module]] = (),
    precision: Precision | None = None,
) -> LayerGraph:
    """Capture `model` as a graph of layers.

    Weights, BatchNorm statistics and random number generators stay as they are: shapes are
    propagated on the meta device where the model allows it.

    Args:
        model: any module that torch.fx can trace; or a function without arguments that builds it: then
            its parameters are on the meta device until `materialize` makes those of some stages.
        example: one minibatch of inputs, as large as they will get: a tensor, a sequence of
            arguments, or a mapping from the names of forward's arguments.
        leaves: module classes to keep whole instead of looking inside.
        precision: what forwards will run in, if that changes the dtypes of what layers put out.

    Raises:
        PipedreamError: the model cannot be traced, or does not take the example.
    """
    recipe = None
    if not isinstance(model, nn.Module) and callable(model):
        recipe = Recipe(model)
        model = recipe.model
    model = whole(model)
    arguments = _arguments(model, example)
    with _in_training(model):
        graph = fx.GraphModule(model, _trace(model, tuple(leaves), arguments)).graph
        _leave_out_defaults(graph, arguments)
        _follow_writes(model, graph)
        graph.eliminate_dead_code()
        inputs = tuple(node for node in graph.nodes if node.op == "placeholder")
        values = tuple(arguments[str(node.target)] for node in inputs)
        operations = propagate(model, graph, values, precision)
    (output,) = (node for node in graph.nodes if node.op == "output")
    layers, edges = layers_of(model, graph, operations)
    meta = tree_map(lambda x: torch.empty_like(x, device="meta") if isinstance(x, torch.Tensor) else x, values)
    return LayerGraph(model, layers, edges, inputs, output.args[0], meta, recipe)


def _arguments(model: nn.Module, example: Any) -> dict[str, Any]:
    """The example by the names of forward's arguments."""
    if isinstance(example, Mapping):
        return dict(example)
    given = arguments_of(example)
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
            f"{type(model).__name__}.forward takes {takes} inputs ({', '.join(names)}), but the example has "
            f"{len(given)}: give one tensor for each, as a tuple, or a mapping from their names"
        )
    return dict(zip(names, given, strict=False))


def _trace(model: nn.Module, leaves: tuple[type[nn.Module], ...], arguments: Mapping[str, Any]) -> fx.Graph:
    entered: list[str] = []

    class Tracer(fx.Tracer):
        def is_leaf_module(self, module: nn.Module, name: str) -> bool:
            if isinstance(module, leaves) or super().is_leaf_module(module, name):
                return True
            entered.append(f"'{name}' ({type(module).__name__})")
            return False

    left_away = {
        name: parameter.default
        for name, parameter in inspect.signature(model.forward).parameters.items()
        if name not in arguments and parameter.default is not parameter.empty
    }
    try:
        return Tracer().trace(model, concrete_args=left_away or None)
    except PipedreamError:
        raise
    except Exception as error:
        where = entered[-1] if entered else f"the model ({type(model).__name__})"
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise PipedreamError(
            f"cannot capture the model: tracing stopped in module {where}{_line_of(error)}: {reason}; "
            "keep that module whole with Pipeline(..., leaves=[its class]) or Job(..., leaves=[its class])"
        ) from error


@contextmanager
def _in_training(model: nn.Module) -> Iterator[None]:
    """torch.fx records what modules do in the mode they are in."""
    modes = {module: module.training for module in model.modules()}
    model.train()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def _follow_writes(model: nn.Module, graph: fx.Graph) -> None:
    """Let what comes after a write in place read its result: `h.add_(1)` by itself is then `h = h.add_(1)`.

    torch.fx notes down what returns what; a statement whose result nobody uses looks like one that does nothing.

    Raises:
        PipedreamError: nobody uses what is written into either, such as a view of something else.
    """
    place = {node: number for number, node in enumerate(graph.nodes)}
    for node in graph.nodes:
        if not _writes(model, node) or not node.args or not isinstance(node.args[0], fx.Node):
            continue
        written = node.args[0]
        for user in [user for user in written.users if place[user] > place[node]]:
            user.replace_input_with(written, node)
        if not node.users:
            raise PipedreamError(
                f"the model writes into '{written.name}' in place where its graph does not show who reads that "
                f"({node.format_node()}): assign the result, as in h = h.add(1), or keep the module whole with "
                "leaves=[ItsClass]"
            )


def _writes(model: nn.Module, node: fx.Node) -> bool:
    """Whether an operation writes into its first argument."""
    if node.op == "call_module":
        return bool(getattr(model.get_submodule(str(node.target)), "inplace", False))
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    if node.op not in ("call_method", "call_function"):
        return False
    return node.kwargs.get("inplace") is True or (name.endswith("_") and not name.endswith("__"))


def _leave_out_defaults(graph: fx.Graph, arguments: Mapping[str, Any]) -> None:
    """Take out arguments that the example leaves away; torch.fx has put their defaults in already."""
    for node in list(graph.nodes):
        if node.op == "placeholder" and str(node.target) not in arguments:
            _erase(graph, node)


def _erase(graph: fx.Graph, node: fx.Node) -> None:
    """A node and all that depends on it: checks that it has its default."""
    for user in list(node.users):
        _erase(graph, user)
    graph.erase_node(node)


def _line_of(error: Exception) -> str:
    """The last line of the traceback that is not torch's own."""
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        if "/torch/" not in frame.filename and "pipedream_hpc/model/" not in frame.filename:
            return f", {frame.filename} line {frame.lineno}"
    return ""
