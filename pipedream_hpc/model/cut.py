"""Cut a captured model into stage modules."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import fx, nn

from pipedream_hpc.errors import PipedreamError
from pipedream_hpc.model.capture import LayerGraph


def stage_module(graph: LayerGraph, first: int, last: int) -> fx.GraphModule:
    """The layers `first` to `last` (exclusive) as a module of their own.

    It shares modules and parameters with the captured model, under the same qualified names.
    """
    layers = graph.layers[first:last]
    inside = {node for layer in layers for node in layer.nodes}
    stage = fx.Graph()
    entry = stage.placeholder("boundary")
    copies: dict[fx.Node, fx.Node] = {}

    def source(node: fx.Node) -> fx.Node:
        if node.op == "get_attr" and node not in copies:
            # A weight fetched by an earlier stage's operations is fetched again here.
            copies[node] = stage.get_attr(str(node.target))
        return copies.get(node, entry)  # else it is the one tensor that is alive at the cut

    for layer in layers:
        for node in layer.nodes:
            if node not in copies:  # a weight may have been fetched already, for an earlier use
                copies[node] = stage.node_copy(node, source)
    stage.output(copies[layers[-1].nodes[-1]])
    module = fx.GraphModule(graph.module, stage)
    module.meta["rewrites_input"] = any(_in_place(graph.module, node) for node in inside)
    return module


def check_ties(graph: LayerGraph, cuts: Sequence[tuple[int, int]]) -> None:
    """Refuse a cut that puts one parameter into two stages.

    Raises:
        PipedreamError: names the parameter, the layers and the stages.
    """
    home: dict[int, tuple[int, str]] = {}
    for stage, (first, last) in enumerate(cuts):
        for layer in graph.layers[first:last]:
            for name in layer.parameters:
                key = id(graph.module.get_parameter(name))
                other, holder = home.setdefault(key, (stage, layer.name))
                if other != stage:
                    raise PipedreamError(
                        f"parameter '{name}' is used by layer '{holder}' in stage {other} and by layer "
                        f"'{layer.name}' in stage {stage}: plan both layers into one stage"
                    )


def _in_place(model: nn.Module, node: fx.Node) -> bool:
    """Whether an operation writes into its input, as ReLU(inplace=True) does."""
    if node.op == "call_module":
        return any(getattr(m, "inplace", False) for m in model.get_submodule(str(node.target)).modules())
    name = str(node.target) if node.op == "call_method" else getattr(node.target, "__name__", "")
    in_place_name = name.endswith("_") and not name.endswith("__")
    return bool(node.kwargs.get("inplace", False)) or in_place_name or name in _AUGMENTED


#: x += y and its kin, as torch.fx records them.
_AUGMENTED = {f"i{name}" for name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "and", "or", "xor")}


def enter(leaf: torch.Tensor) -> torch.Tensor:
    """`leaf` for a stage that writes into its input; see Enter."""
    entered: torch.Tensor = Enter.apply(leaf)  # type: ignore[no-untyped-call]
    return entered


class Enter(torch.autograd.Function):
    """Let a stage write into its input.

    The boundary tensor is a leaf, so that its gradient can be sent back, and autograd forbids
    writing into leaves and their views. This hands the same memory on as an ordinary tensor.
    Backward is the identity.
    """

    @staticmethod
    def forward(ctx: object, leaf: torch.Tensor) -> torch.Tensor:
        alias = torch.empty(0, dtype=leaf.dtype, device=leaf.device)
        return alias.set_(leaf.untyped_storage(), leaf.storage_offset(), leaf.shape, leaf.stride())

    @staticmethod
    def backward(ctx: object, gradient: torch.Tensor) -> torch.Tensor:
        return gradient
