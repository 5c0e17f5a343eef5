"""LayerGraph: a captured model, the noun that all of this room is about."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import fx, nn
from torch.utils._pytree import tree_flatten

from pipedream_hpc.model.materialize import Recipe

Kind = Literal["tensor", "int", "float", "bool", "size"]


@dataclass(frozen=True)
class Value:
    """What one operation puts out and others may need.

    Attributes:
        name: the operation's, and of an operation that puts out several the number of this one.
        kind: a tensor, or a python number or size, which crosses a cut as a tensor all the same.
        shape: for the captured example.
        dtype: as it travels; int64 or float64 for numbers.
        needs_gradient: whether it depends on a trained weight, so that a gradient comes back.
        layer: name of the layer it comes from.
    """

    name: str
    kind: Kind
    shape: tuple[int, ...]
    dtype: torch.dtype
    needs_gradient: bool
    layer: str = ""

    @property
    def nbytes(self) -> int:
        """Bytes for the captured example."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize


@dataclass(frozen=True)
class Layer:
    """Operations that always stay together.

    Attributes:
        name: qualified name of its module, or of the operation when it is a function.
        kind: class of the module, or name of the function.
        nodes: the operations, in execution order.
        parameters: qualified names of the parameters it uses.
        parameter_bytes: bytes of those that are trained.
        output_bytes: bytes of what later layers use of it, for the captured example.
        output_shape: of a single tensor that is put out; None where there are several.
        output_dtype: such as torch.float32; None likewise.
        operations: floating-point operations of one forward, counted, not measured.
    """

    name: str
    kind: str
    nodes: tuple[fx.Node, ...]
    parameters: tuple[str, ...]
    parameter_bytes: int
    output_bytes: int
    output_shape: tuple[int, ...] | None
    output_dtype: torch.dtype | None
    operations: int


@dataclass(frozen=True)
class LayerGraph:
    """A captured model.

    Attributes:
        module: the model, which owns the weights.
        layers: in an order in which they can run.
        edges: (producer, consumer) pairs of layer numbers.
        inputs: the model's arguments, as placeholders of the graph.
        returned: what the model returns, in terms of operations.
        example: shapes and dtypes of the arguments, as tensors on the meta device.
        recipe: how to make the weights of a model that was given as a function; see materialize.
    """

    module: nn.Module
    layers: tuple[Layer, ...]
    edges: tuple[tuple[int, int], ...]
    inputs: tuple[fx.Node, ...]
    returned: Any
    example: tuple[Any, ...]
    recipe: Recipe | None = None


def leaves_of(node: fx.Node) -> list[Value | None]:
    """What a node puts out, leaf by leaf; None for what cannot travel and is the same every time."""
    leaves, _ = flatten(node.meta["value"])
    flags = node.meta["needs_gradient"]
    layer = node.meta.get("layer", "")
    found: list[Value | None] = []
    for index, leaf in enumerate(leaves):
        name = node.name if len(leaves) == 1 else f"{node.name}#{index}"
        if isinstance(leaf, torch.Tensor):
            found.append(Value(name, "tensor", tuple(leaf.shape), leaf.dtype, flags[index], layer))
        elif isinstance(leaf, torch.Size):
            found.append(Value(name, "size", (len(leaf),), torch.int64, False, layer))
        elif isinstance(leaf, bool):
            found.append(Value(name, "bool", (), torch.int64, False, layer))
        elif isinstance(leaf, int):
            found.append(Value(name, "int", (), torch.int64, False, layer))
        elif isinstance(leaf, float):
            found.append(Value(name, "float", (), torch.float64, False, layer))
        else:
            found.append(None)
    return found


def flatten(value: Any) -> tuple[list[Any], Any]:
    """Leaves and structure; a torch.Size is one leaf."""
    return tree_flatten(value, is_leaf=lambda each: isinstance(each, torch.Size))


def is_input(node: fx.Node) -> bool:
    """Whether a node needs no operation before it: an argument of the model, or something it owns."""
    return node.op in ("placeholder", "get_attr")


def tensors_in(value: Any) -> list[torch.Tensor]:
    """The tensors of a nest of tuples, lists and dicts."""
    return [leaf for leaf in tree_flatten(value)[0] if isinstance(leaf, torch.Tensor)]


def parameters_of(model: nn.Module, node: fx.Node) -> Iterator[tuple[str, nn.Parameter]]:
    """Qualified names and parameters that an operation uses."""
    if node.op == "call_module":
        for inner, parameter in model.get_submodule(str(node.target)).named_parameters():
            yield f"{node.target}.{inner}", parameter
    for source in (node, *node.all_input_nodes):
        if source.op == "get_attr":
            value = attribute(model, str(source.target))
            if isinstance(value, nn.Parameter):
                yield str(source.target), value


def attribute(model: nn.Module, target: str) -> Any:
    """What stands under a qualified name."""
    owner, _, name = target.rpartition(".")
    return getattr(model.get_submodule(owner), name)
