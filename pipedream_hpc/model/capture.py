"""Capture a torch model as a chain of layers.

torch.fx records the model's operations once, without running it. The operations are then grouped
into layers: a layer ends wherever exactly one tensor is alive, because there, and only there, a
pipeline can be cut by sending that one tensor on::

    conv ── relu ──┬── conv ── relu ── conv ──┬── add ── relu ── pool
         |      |  └──────────────────────────┘      |       |
        cut    cut       (two tensors alive)        cut     cut

A residual block so becomes one layer; a plain chain has one layer per module.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

import torch
from torch import fx, nn
from torch.utils.flop_counter import FlopCounterMode

from pipedream_hpc.errors import PipedreamError
from pipedream_hpc.model.untouched import untouched


@dataclass(frozen=True)
class Layer:
    """A run of operations that ends in a single tensor.

    Attributes:
        name: qualified name of its module, or of the operation when it is a function.
        kind: class of the module, or name of the function.
        nodes: the operations, in execution order.
        parameters: qualified names of the parameters it uses.
        parameter_bytes: bytes of those that are trained.
        output_shape: for the captured example, first dimension the minibatch.
        output_dtype: such as torch.float32.
        operations: floating-point operations of one forward, counted, not measured.
    """

    name: str
    kind: str
    nodes: tuple[fx.Node, ...]
    parameters: tuple[str, ...]
    parameter_bytes: int
    output_shape: tuple[int, ...]
    output_dtype: torch.dtype
    operations: int

    @property
    def output_bytes(self) -> int:
        """Bytes of the output for the captured example."""
        return torch.Size(self.output_shape).numel() * self.output_dtype.itemsize


@dataclass(frozen=True)
class LayerGraph:
    """A captured model: the module that owns the weights, and its layers in order."""

    module: nn.Module
    layers: tuple[Layer, ...]
    input_shape: tuple[int, ...]
    input_dtype: torch.dtype


def capture(model: nn.Module, example: torch.Tensor, leaves: Sequence[type[nn.Module]] = ()) -> LayerGraph:
    """Capture `model` as a chain of layers.

    Weights, BatchNorm statistics and random number generators stay as they are: shapes are
    propagated on the meta device where the model allows it.

    Args:
        model: takes one tensor, returns one tensor.
        example: one minibatch of inputs, as large as they will get.
        leaves: module classes to keep whole instead of looking inside.

    Raises:
        PipedreamError: the model cannot be traced, or has several inputs or outputs.
    """
    graph = fx.GraphModule(model, _trace(model, tuple(leaves))).graph
    graph.eliminate_dead_code()
    inputs = [node for node in graph.nodes if node.op == "placeholder"]
    if len(inputs) != 1:
        names = ", ".join(node.name for node in inputs)
        raise PipedreamError(
            f"{type(model).__name__}.forward takes {len(inputs)} inputs ({names}); "
            "a pipeline feeds one tensor: wrap the model so that forward takes exactly one"
        )
    operations = _propagate(model, graph, example)
    layers = tuple(_layer(model, nodes, sum(operations[node] for node in nodes)) for nodes in _segments(model, graph))
    _uniquely_named(layers)
    return LayerGraph(model, layers, tuple(example.shape), example.dtype)


def _trace(model: nn.Module, leaves: tuple[type[nn.Module], ...]) -> fx.Graph:
    entered: list[str] = []

    class Tracer(fx.Tracer):
        def is_leaf_module(self, module: nn.Module, name: str) -> bool:
            if isinstance(module, leaves) or super().is_leaf_module(module, name):
                return True
            entered.append(f"'{name}' ({type(module).__name__})")
            return False

    try:
        return Tracer().trace(model)
    except PipedreamError:
        raise
    except Exception as error:
        where = entered[-1] if entered else f"the model ({type(model).__name__})"
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise PipedreamError(
            f"cannot capture the model: tracing stopped in module {where}: {reason}; "
            "keep that module whole with Pipeline(..., leaves=[its class]) or Job(..., leaves=[its class])"
        ) from error


def _propagate(model: nn.Module, graph: fx.Graph, example: torch.Tensor) -> dict[fx.Node, int]:
    """Give every node its value's shape (in node.meta) and return its floating-point operations.

    Shapes are propagated on the meta device. A module kept whole may look at values, which meta
    tensors have none of: then the example itself is run, and the model put back as it was.
    """
    try:
        return _interpret(_skeleton(model), graph, torch.empty_like(example, device="meta"))
    except Exception:  # whatever a user's module raises without values
        pass
    try:
        with untouched(model):
            return _interpret(model, graph, example)
    except Exception as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise PipedreamError(
            f"the model does not take the example input of shape {tuple(example.shape)} and "
            f"dtype {str(example.dtype).removeprefix('torch.')}: {reason}"
        ) from error


def _skeleton(model: nn.Module) -> nn.Module:
    """A copy of the modules with their tensors on the meta device."""
    memo: dict[int, Any] = {}
    for tensor in (*model.parameters(), *model.buffers()):
        # The memo makes deepcopy take these in place of the real ones: no weight is ever copied.
        ghost = torch.empty_like(tensor, device="meta")
        memo[id(tensor)] = nn.Parameter(ghost, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else ghost
    return copy.deepcopy(model, memo)


def _interpret(model: nn.Module, graph: fx.Graph, example: torch.Tensor) -> dict[fx.Node, int]:
    operations: dict[fx.Node, int] = {}
    originals = {node.name: node for node in graph.nodes}

    class Shapes(fx.Interpreter):
        def run_node(self, node: fx.Node) -> Any:
            with FlopCounterMode(display=False) as counter:
                value = super().run_node(node)
            original = originals[node.name]  # a GraphModule may hold a copy of its graph
            operations[original] = counter.get_total_flops()
            original.meta["value"] = value.to("meta") if isinstance(value, torch.Tensor) else value
            return value

    with torch.no_grad():
        Shapes(fx.GraphModule(model, graph)).run(example)
    return operations


def _segments(model: nn.Module, graph: fx.Graph) -> list[tuple[fx.Node, ...]]:
    """Split the operations wherever exactly one float tensor is alive."""
    segments: list[tuple[fx.Node, ...]] = []
    current: list[fx.Node] = []
    pending: dict[fx.Node, int] = {}  # value alive -> uses still to come
    for node in graph.nodes:
        if node.op == "output":
            returned = node.args[0]
            if not isinstance(returned, fx.Node):
                raise PipedreamError(
                    f"{type(model).__name__}.forward returns {type(returned).__name__}; "
                    "a pipeline ends in one tensor: return it alone"
                )
            break
        # Weights fetched by name are fetched anew wherever they are used; they never cross a cut.
        for source in node.all_input_nodes:
            if source.op != "get_attr":
                pending[source] -= 1
                if not pending[source]:
                    del pending[source]
        if node.op != "get_attr":
            pending[node] = len(node.users)
        if node.op == "placeholder":
            continue
        current.append(node)
        value = node.meta["value"]
        if list(pending) == [node] and isinstance(value, torch.Tensor) and value.is_floating_point():
            segments.append(tuple(current))
            current = []
    if current:
        raise PipedreamError(
            f"{type(model).__name__}.forward ends in '{current[-1].name}', which is no single float tensor"
        )
    return segments


def _layer(model: nn.Module, nodes: tuple[fx.Node, ...], operations: int) -> Layer:
    modules = [str(node.target) for node in nodes if node.op == "call_module"]
    if len(nodes) == 1 and modules:
        name, kind = modules[0], type(model.get_submodule(modules[0])).__name__
    else:
        # A block is known by the deepest module that holds all of it, a function by its own name.
        columns = zip(*(target.split(".") for target in modules), strict=False)
        prefix = [parts[0] for parts in takewhile(lambda parts: len(set(parts)) == 1, columns)]
        prefix = prefix if len(modules) > 1 else []
        name = ".".join(prefix) or nodes[-1].name
        kind = type(model.get_submodule(name)).__name__ if prefix else nodes[-1].name.rstrip("_0123456789")
    parameters: dict[str, nn.Parameter] = {}
    for node in nodes:
        if node.op == "call_module":
            for inner, parameter in model.get_submodule(str(node.target)).named_parameters():
                parameters[f"{node.target}.{inner}"] = parameter
        for source in (node, *node.all_input_nodes):
            if source.op == "get_attr":
                owner, _, attribute = str(source.target).rpartition(".")
                value = getattr(model.get_submodule(owner), attribute)
                if isinstance(value, nn.Parameter):
                    parameters[str(source.target)] = value
    value = nodes[-1].meta["value"]
    return Layer(
        name=name,
        kind=kind,
        nodes=nodes,
        parameters=tuple(parameters),
        parameter_bytes=sum(p.nbytes for p in {id(p): p for p in parameters.values()}.values() if p.requires_grad),
        output_shape=tuple(value.shape),
        output_dtype=value.dtype,
        operations=operations,
    )


def _uniquely_named(layers: tuple[Layer, ...]) -> None:
    """A module called twice makes two layers: the later ones are told apart by a number."""
    seen: dict[str, int] = {}
    for layer in layers:
        seen[layer.name] = seen.get(layer.name, 0) + 1
        if seen[layer.name] > 1:
            object.__setattr__(layer, "name", f"{layer.name}@{seen[layer.name]}")
