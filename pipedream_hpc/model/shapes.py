"""Shapes: what every operation of a traced model puts out, found without running it where the model allows."""

from __future__ import annotations

import copy
from contextlib import nullcontext
from typing import Any

import torch
from torch import fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.utils._pytree import tree_flatten, tree_map
from torch.utils.flop_counter import FlopCounterMode

from pipedream_hpc.errors import PipedreamError
from pipedream_hpc.model.graph import flatten, tensors_in
from pipedream_hpc.model.precision import Autocast, Precision
from pipedream_hpc.model.randomness import generators_kept
from pipedream_hpc.model.untouched import untouched


def propagate(
    model: nn.Module, graph: fx.Graph, arguments: tuple[Any, ...], precision: Precision | None
) -> dict[fx.Node, int]:
    """Give every node its value's shape (in node.meta) and return its floating-point operations.

    Shapes are propagated without memory. A module kept whole may look at values, which such tensors
    have none of: then the example itself is run, and the model put back as it was; on a GPU, where
    autocast goes its own ways, by a copy of the model.
    """
    # Autocast goes by the device, so under it tensors have to say that they are where they will be.
    kind = precision.kind if isinstance(precision, Autocast) else "cpu"
    device, pretending = ("meta", nullcontext()) if precision is None else (kind, FakeTensorMode())
    autocast = precision or nullcontext
    try:
        with pretending:
            ghosts = tree_map(
                lambda x: torch.empty_like(x, device=device) if isinstance(x, torch.Tensor) else x, arguments
            )
            with autocast():
                return _interpret(_skeleton(model, device), graph, ghosts)
    except Exception as error:  # whatever a user's module raises without values
        without_values = error
    remedy = ""
    try:
        if any(parameter.is_meta for parameter in model.parameters()):
            remedy = "; given as a function it is captured without values: if it needs them, give the built model"
            raise without_values
        if kind != "cpu":
            there = tree_map(lambda x: x.to(kind) if isinstance(x, torch.Tensor) else x, arguments)
            with generators_kept(torch.device(kind)), autocast():
                return _interpret(copy.deepcopy(model).to(kind), graph, there)
        with untouched(model), autocast():
            return _interpret(model, graph, arguments)
    except Exception as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        shapes = " and ".join(
            f"{tuple(leaf.shape)} and dtype {str(leaf.dtype).removeprefix('torch.')}"
            for leaf in tree_flatten(arguments)[0]
            if isinstance(leaf, torch.Tensor)
        )
        raise PipedreamError(
            f"the model does not take the example input of shape {shapes}: {reason}{remedy}"
        ) from error


def _on_meta(value: Any) -> Any:
    def ghost(each: Any) -> Any:
        return torch.empty(each.shape, dtype=each.dtype, device="meta") if isinstance(each, torch.Tensor) else each

    with unset_fake_temporarily():
        return tree_map(ghost, value, is_leaf=lambda each: isinstance(each, torch.Size))


def _skeleton(model: nn.Module, device: str) -> nn.Module:
    """A copy of the modules with tensors without memory: on the meta device, or on one that is pretended."""
    memo: dict[int, Any] = {}
    for tensor in (*model.parameters(), *model.buffers()):
        # The memo makes deepcopy take these in place of the real ones: no weight is ever copied.
        ghost = torch.empty_like(tensor, device=device)
        memo[id(tensor)] = nn.Parameter(ghost, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else ghost
    return copy.deepcopy(model, memo)


def _interpret(model: nn.Module, graph: fx.Graph, arguments: tuple[Any, ...]) -> dict[fx.Node, int]:
    """Run the graph and note down in every node's meta what it puts out.

    `value` is that, on the meta device; `needs_gradient` says of every leaf whether a gradient comes back;
    `memory` which storages its tensors stand in, and `writes` which it writes into.
    """
    operations: dict[fx.Node, int] = {}
    originals = {node.name: node for node in graph.nodes}
    alive: list[torch.Tensor] = []  # a storage's identity is good for as long as it lives

    class Shapes(fx.Interpreter):
        def run_node(self, node: fx.Node) -> Any:
            args, kwargs = self.fetch_args_kwargs_from_env(node)
            before = [(tensor, tensor._version) for tensor in tensors_in((args, kwargs))]
            with FlopCounterMode(display=False) as counter:
                value = super().run_node(node)
            original = originals[node.name]  # a GraphModule may hold a copy of its graph
            operations[original] = counter.get_total_flops()
            leaves, _ = flatten(value)
            own = tensors_in(value)
            alive.extend(tensor.detach() for tensor in own)
            original.meta["writes"] = {_memory(tensor) for tensor, version in before if tensor._version != version}
            original.meta["memory"] = {_memory(tensor) for tensor in own}
            original.meta["needs_gradient"] = [
                isinstance(leaf, torch.Tensor) and leaf.requires_grad and node.op != "get_attr" for leaf in leaves
            ]
            original.meta["value"] = _on_meta(value)
            return value

    with torch.enable_grad():
        module = fx.GraphModule(model, graph)
        Shapes(module).run(*arguments)
    return operations


def _memory(tensor: torch.Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)
