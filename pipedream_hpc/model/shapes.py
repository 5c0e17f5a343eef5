"""Shapes: the output shapes and FLOPs of every operation of a traced model, without running it where possible."""

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
from pipedream_hpc.model.preserve_state import preserve_state
from pipedream_hpc.model.randomness import preserve_rng_state


def propagate_shapes(
    model: nn.Module, graph: fx.Graph, arguments: tuple[Any, ...], precision: Precision | None
) -> dict[fx.Node, int]:
    """Store the shape of every node's value in node.meta, and return the floating-point operations of every node.

    Shapes are propagated on tensors without memory. A module that is kept whole may read values, which such tensors
    do not have: then the example inputs are run, and the state of the model is restored. Where autocast differs, on a
    GPU, a copy of the model is run there.
    """
    # Autocast depends on the device, so under autocast the fake tensors claim to be on the target device.
    kind = precision.kind if isinstance(precision, Autocast) else "cpu"
    device, fake_mode = ("meta", nullcontext()) if precision is None else (kind, FakeTensorMode())
    autocast = precision or nullcontext
    try:
        with fake_mode:
            fakes = tree_map(
                lambda x: torch.empty_like(x, device=device) if isinstance(x, torch.Tensor) else x, arguments
            )
            with autocast():
                return _interpret(_skeleton(model, device), graph, fakes)
    except Exception as error:  # a module of the user may raise anything on tensors without values
        without_values = error
    hint = ""
    try:
        if any(parameter.is_meta for parameter in model.parameters()):
            hint = "; a model given as a function is captured without values: if it needs them, pass the built model"
            raise without_values
        if kind != "cpu":
            on_device = tree_map(lambda x: x.to(kind) if isinstance(x, torch.Tensor) else x, arguments)
            with preserve_rng_state(torch.device(kind)), autocast():
                return _interpret(copy.deepcopy(model).to(kind), graph, on_device)
        with preserve_state(model), autocast():
            return _interpret(model, graph, arguments)
    except Exception as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        shapes = " and ".join(
            f"{tuple(leaf.shape)} and dtype {str(leaf.dtype).removeprefix('torch.')}"
            for leaf in tree_flatten(arguments)[0]
            if isinstance(leaf, torch.Tensor)
        )
        raise PipedreamError(f"the model does not accept example_inputs of shape {shapes}: {reason}{hint}") from error


def _on_meta(value: Any) -> Any:
    def without_memory(each: Any) -> Any:
        return torch.empty(each.shape, dtype=each.dtype, device="meta") if isinstance(each, torch.Tensor) else each

    with unset_fake_temporarily():
        return tree_map(without_memory, value, is_leaf=lambda each: isinstance(each, torch.Size))


def _skeleton(model: nn.Module, device: str) -> nn.Module:
    """Copy the modules, with tensors without memory: on the meta device, or fake tensors on `device`."""
    memo: dict[int, Any] = {}
    for tensor in (*model.parameters(), *model.buffers()):
        # The memo makes deepcopy use these instead of the real ones: no weight is copied.
        empty = torch.empty_like(tensor, device=device)
        memo[id(tensor)] = nn.Parameter(empty, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else empty
    return copy.deepcopy(model, memo)


def _interpret(model: nn.Module, graph: fx.Graph, arguments: tuple[Any, ...]) -> dict[fx.Node, int]:
    """Run the graph and record the output of every node in its meta; return the floating-point operations.

    `value` is the output, on the meta device; `needs_gradient` says for every leaf whether a gradient comes back;
    `memory` is the set of storages of its tensors, and `writes` the set of storages it writes into.
    """
    flops: dict[fx.Node, int] = {}
    originals = {node.name: node for node in graph.nodes}
    live: list[torch.Tensor] = []  # a storage's identity is unique only while the storage is live

    class Shapes(fx.Interpreter):
        def run_node(self, node: fx.Node) -> Any:
            args, kwargs = self.fetch_args_kwargs_from_env(node)
            before = [(tensor, tensor._version) for tensor in tensors_in((args, kwargs))]
            with FlopCounterMode(display=False) as counter:
                value = super().run_node(node)
            original = originals[node.name]  # a GraphModule may hold a copy of its graph
            flops[original] = counter.get_total_flops()
            leaves, _ = flatten(value)
            own = tensors_in(value)
            live.extend(tensor.detach() for tensor in own)
            original.meta["writes"] = {_storage_id(tensor) for tensor, version in before if tensor._version != version}
            original.meta["memory"] = {_storage_id(tensor) for tensor in own}
            original.meta["needs_gradient"] = [
                isinstance(leaf, torch.Tensor) and leaf.requires_grad and node.op != "get_attr" for leaf in leaves
            ]
            original.meta["value"] = _on_meta(value)
            return value

    with torch.enable_grad():
        module = fx.GraphModule(model, graph)
        Shapes(module).run(*arguments)
    return flops


def _storage_id(tensor: torch.Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)
