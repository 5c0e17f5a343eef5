"""LayerGraph: a captured model."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import fx, nn
from torch.utils._pytree import tree_flatten

from pipedream_hpc.model.recipe import ModelRecipe

Kind = Literal["tensor", "int", "float", "bool", "size"]


@dataclass(frozen=True)
class Value:
    """One output of an operation that other operations may use.

    Attributes:
        name: name of the operation; the outputs of an operation with several are numbered, as in `chunk#1`.
        kind: a tensor, or a Python number or size, which crosses a cut as a tensor too.
        shape: shape for the example inputs.
        dtype: dtype in which it is sent; int64 or float64 for numbers.
        needs_gradient: whether it depends on a trained weight, so that a gradient comes back for it.
        layer: name of the layer that produces it.
    """

    name: str
    kind: Kind
    shape: tuple[int, ...]
    dtype: torch.dtype
    needs_gradient: bool
    layer: str = ""

    @property
    def nbytes(self) -> int:
        """Bytes for the example inputs."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize


@dataclass(frozen=True)
class Layer:
    """Operations that always stay in one stage.

    Attributes:
        name: qualified name of its module, or of the operation when it is a function.
        kind: class of the module, or name of the function.
        nodes: the operations, in execution order.
        parameters: qualified names of the parameters it uses.
        parameter_bytes: bytes of the trained ones.
        output_bytes: bytes of the outputs that later layers use, for the example inputs.
        output_shape: shape of the output; None if it has several.
        output_dtype: dtype of the output, such as torch.float32; None if it has several.
        flops: floating-point operations of one forward, counted and not measured.
    """

    name: str
    kind: str
    nodes: tuple[fx.Node, ...]
    parameters: tuple[str, ...]
    parameter_bytes: int
    output_bytes: int
    output_shape: tuple[int, ...] | None
    output_dtype: torch.dtype | None
    flops: int


@dataclass(frozen=True)
class LayerGraph:
    """A captured model.

    Attributes:
        module: the model, which owns the weights.
        layers: the layers in a topological order.
        edges: (producer, consumer) pairs of layer numbers.
        inputs: the model's arguments, as placeholders of the graph.
        output: the model's return value, in terms of graph nodes.
        example_inputs: shapes and dtypes of the arguments, as tensors on the meta device.
        recipe: creates the weights of a model that was given as a function; None for a built model.
    """

    module: nn.Module
    layers: tuple[Layer, ...]
    edges: tuple[tuple[int, int], ...]
    inputs: tuple[fx.Node, ...]
    output: Any
    example_inputs: tuple[Any, ...]
    recipe: ModelRecipe | None = None


def values_of(node: fx.Node) -> list[Value | None]:
    """Return the outputs of a node, leaf by leaf; None for a constant that cannot be sent."""
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
    """Return the leaves and the structure of a nested value; a torch.Size is one leaf."""
    return tree_flatten(value, is_leaf=lambda each: isinstance(each, torch.Size))


def is_input(node: fx.Node) -> bool:
    """Return whether a node is an argument of the model or an attribute, and so follows no operation."""
    return node.op in ("placeholder", "get_attr")


def tensors_in(value: Any) -> list[torch.Tensor]:
    """Return the tensors in nested tuples, lists and dicts."""
    return [leaf for leaf in tree_flatten(value)[0] if isinstance(leaf, torch.Tensor)]


def parameters_of(model: nn.Module, node: fx.Node) -> Iterator[tuple[str, nn.Parameter]]:
    """Yield the parameters that an operation uses, with their qualified names."""
    if node.op == "call_module":
        for inner, parameter in model.get_submodule(str(node.target)).named_parameters():
            yield f"{node.target}.{inner}", parameter
    for source in (node, *node.all_input_nodes):
        if source.op == "get_attr":
            value = get_attribute(model, str(source.target))
            if isinstance(value, nn.Parameter):
                yield str(source.target), value


def get_attribute(model: nn.Module, target: str) -> Any:
    """Return the attribute of a model with a qualified name."""
    owner, _, name = target.rpartition(".")
    return getattr(model.get_submodule(owner), name)
