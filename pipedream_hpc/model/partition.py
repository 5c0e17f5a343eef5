"""Partition a captured model into stages.

The module of a stage takes those arguments of the model that it uses and the values it gets from earlier stages. It
returns the values that later stages use; the last stage also returns the model's output::

    input ──► stage 0 ──┬── a ──► stage 1 ──── b ────► stage 2 ──► output
                        └────────────── a ──────────────┘
    stage_inputs                  a (from 0)           a (from 0), b (from 1)
    stage_outputs       a         b

A value that several stages use is sent directly to each of them, and skips the stages between.

A weight that several stages use belongs to the first of them. It is sent to the others like an activation, and its
gradients come back like theirs. So under any schedule there is one copy of the weight, one optimizer state, and one
version per minibatch.
"""

from __future__ import annotations

import copy
import operator
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx, nn
from torch.utils._pytree import tree_unflatten

from pipedream_hpc.errors import PipedreamError
from pipedream_hpc.model.graph import (
    LayerGraph,
    Value,
    flatten,
    get_attribute,
    is_input,
    parameters_of,
    values_of,
)
from pipedream_hpc.model.randomness import RANDOM
from pipedream_hpc.planning.plan import Edge


@dataclass(frozen=True)
class StageModule:
    """The module of one stage, and what it takes and returns.

    Attributes:
        module: takes the inputs, then the stage inputs (use `run`); returns a tuple of the stage outputs, followed by
            the model's output in the last stage.
        inputs: numbers of the model's arguments that the stage takes.
        stage_inputs: (source stage, value) for every value from an earlier stage, by stage, then in model order.
        stage_outputs: values that later stages use, in model order.
        is_last: whether it is the last stage, which returns the model's output.
        written_inputs: positions among inputs and stage inputs that the stage writes into in place.
        borrowed_weights: position of a stage input that is a weight of another stage -> the (parameter dict, name)
            pairs under which the modules of this stage hold it.
    """

    module: fx.GraphModule
    inputs: tuple[int, ...]
    stage_inputs: tuple[tuple[int, Value], ...]
    stage_outputs: tuple[Value, ...]
    is_last: bool
    written_inputs: frozenset[int]
    borrowed_weights: dict[int, tuple[tuple[dict[str, Any], str], ...]] = field(default_factory=dict)

    def run(self, arguments: Sequence[Any], call: Callable[..., Any] | None = None) -> tuple[Any, ...]:
        """Call the module; its submodules hold the borrowed weights during the call.

        Args:
            arguments: the inputs, then the stage inputs.
            call: called instead of the module, such as a compiled form of it.
        """
        for position, holders in self.borrowed_weights.items():
            for parameters, name in holders:
                parameters[name] = arguments[position]
        try:
            returned: tuple[Any, ...] = (self.module if call is None else call)(*arguments)
        finally:
            for holders in self.borrowed_weights.values():
                for parameters, name in holders:
                    parameters[name] = None
        return returned


class Partition:
    """A captured model divided into stages.

    Args:
        graph: the captured model.
        stages: the layer numbers of every stage.

    Attributes:
        edges: the values that are sent over every edge between two stages.

    Raises:
        PipedreamError: a layer is missing or in two stages, or a stage needs an output of a later one.
    """

    def __init__(self, graph: LayerGraph, stages: Sequence[Sequence[int]]) -> None:
        self._graph, self._last = graph, len(stages) - 1
        self._stage_of = self._assign_nodes(stages)
        self._order = {node: i for i, node in enumerate(n for layer in graph.layers for n in layer.nodes)}
        self._owner, self._users = self._assign_weights()
        self._crossing = self._find_crossing()
        self.edges: dict[Edge, tuple[Value, ...]] = {}
        for edge, nodes in sorted(self._crossing.items()):
            self.edges[edge] = tuple(value for node in self._in_order(nodes) for value in self._values(node))

    def stage_module(self, stage: int, *, isolated: bool = True) -> StageModule:
        """Create the module of a stage.

        Args:
            stage: number of the stage.
            isolated: copy module objects and buffers; otherwise use those of the model.
        """
        return _Builder(self, stage, isolated).build()

    def parameters(self, stage: int) -> list[str]:
        """Return the qualified names of the weights that belong to a stage, each under its first name."""
        first: dict[int, str] = {}
        for layer in self._graph.layers:
            for node in layer.nodes:
                for name, parameter in parameters_of(self._graph.module, node):
                    first.setdefault(id(parameter), name)
        return [name for key, name in first.items() if self._owner[key][0] == stage]

    # -- used by _Builder ----------------------------------------------

    @property
    def graph(self) -> LayerGraph:
        return self._graph

    def nodes(self, stage: int) -> list[fx.Node]:
        """Return the operations of a stage, in model order."""
        return [n for layer in self._graph.layers for n in layer.nodes if self._stage_of[n] == stage]

    def nodes_received(self, stage: int) -> list[tuple[int, fx.Node]]:
        """Return (source stage, operation or weight) for everything that a stage receives."""
        return [
            (edge.source, node)
            for edge, nodes in sorted(self._crossing.items())
            if edge.target == stage
            for node in self._in_order(nodes)
        ]

    def nodes_sent(self, stage: int) -> list[fx.Node]:
        """Return the operations and weights of a stage that later stages use."""
        return self._in_order({n for edge, nodes in self._crossing.items() if edge.source == stage for n in nodes})

    def is_last(self, stage: int) -> bool:
        return stage == self._last

    def owner_of(self, parameter: nn.Parameter) -> tuple[int, fx.Node | None]:
        """Return the stage a weight belongs to, and the node that represents it where it is sent."""
        return self._owner[id(parameter)]

    # ------------------------------------------------------------------

    def _assign_nodes(self, stages: Sequence[Sequence[int]]) -> dict[fx.Node, int]:
        """Return the stage of every operation, after checking the stages."""
        layers = self._graph.layers
        stage_of: dict[int, int] = {}
        for stage, numbers in enumerate(stages):
            for number in numbers:
                if number in stage_of:
                    raise PipedreamError(f"layer '{layers[number].name}' is in stages {stage_of[number]} and {stage}")
                stage_of[number] = stage
        missing = [layer.name for number, layer in enumerate(layers) if number not in stage_of]
        if missing:
            raise PipedreamError(f"no stage has layer '{missing[0]}'")
        for producer, consumer in self._graph.edges:
            if stage_of[producer] > stage_of[consumer]:
                raise PipedreamError(
                    f"layer '{layers[consumer].name}' in stage {stage_of[consumer]} needs layer "
                    f"'{layers[producer].name}', which is in the later stage {stage_of[producer]}"
                )
        return {node: stage_of[number] for number, layer in enumerate(layers) for node in layer.nodes}

    def _assign_weights(self) -> tuple[dict[int, tuple[int, fx.Node | None]], dict[int, set[int]]]:
        """Return the owner of every weight, and the stages that use it; both by the identity of the parameter."""
        owner: dict[int, tuple[int, fx.Node | None]] = {}
        users: dict[int, set[int]] = defaultdict(set)
        names: dict[int, str] = {}
        for layer in self._graph.layers:
            for node in layer.nodes:
                for name, parameter in parameters_of(self._graph.module, node):
                    users[id(parameter)].add(self._stage_of[node])
                    names.setdefault(id(parameter), name)
        scratch = fx.Graph()
        for key, stages in users.items():
            weight: fx.Node | None = None
            if len(stages) > 1:
                weight = scratch.get_attr(names[key])
                parameter = get_attribute(self._graph.module, names[key])
                weight.meta.update(
                    value=parameter.detach().to("meta"),
                    needs_gradient=[parameter.requires_grad],
                    layer=names[key],
                    memory=set(),
                )
                self._stage_of[weight] = min(stages)
                self._order[weight] = -len(names) + len(owner)  # weights come first
            owner[key] = (min(stages), weight)
        return owner, users

    def _find_crossing(self) -> dict[Edge, set[fx.Node]]:
        """Return the operations and weights that cross every edge."""
        crossing: dict[Edge, set[fx.Node]] = defaultdict(set)
        for layer in self._graph.layers:
            for node in layer.nodes:
                for source in node.all_input_nodes:
                    if not is_input(source) and self._stage_of[source] != self._stage_of[node]:
                        crossing[Edge(self._stage_of[source], self._stage_of[node])].add(source)
        for source in returned_nodes(self._graph.output):
            if not is_input(source) and self._stage_of[source] != self._last:
                crossing[Edge(self._stage_of[source], self._last)].add(source)
        for key, (home, weight) in self._owner.items():
            for stage in self._users[key] - {home}:
                assert weight is not None
                crossing[Edge(home, stage)].add(weight)
        # Every stage has an edge from an earlier stage and an edge to a later one, even if no tensor crosses it:
        # schedules order the stages by their messages.
        for stage in range(1, self._last + 1):
            if not any(edge.target == stage for edge in crossing):
                crossing[Edge(stage - 1, stage)] = set()
        for stage in range(self._last):
            if not any(edge.source == stage for edge in crossing):
                crossing[Edge(stage, stage + 1)] = set()
        return dict(crossing)

    def _in_order(self, nodes: set[fx.Node]) -> list[fx.Node]:
        return sorted(nodes, key=lambda node: (self._order.get(node, -1), node.name))

    def _values(self, node: fx.Node) -> list[Value]:
        return [value for value in values_of(node) if value is not None]


class _Builder:
    """Creates the module of one stage."""

    def __init__(self, partition: Partition, stage: int, isolated: bool) -> None:
        self._partition, self._stage = partition, stage
        self._root = _isolated_copy(partition.graph.module) if isolated else partition.graph.module
        self._graph = fx.Graph()
        self._copies: dict[fx.Node, Any] = {}

    def build(self) -> StageModule:
        partition, graph = self._partition, self._graph
        is_last = partition.is_last(self._stage)
        nodes = partition.nodes(self._stage)
        returned = returned_nodes(partition.graph.output) if is_last else []
        used = {source for node in nodes for source in node.all_input_nodes} | set(returned)
        inputs = tuple(index for index, node in enumerate(partition.graph.inputs) if node in used)
        memories: list[set[int]] = []
        for index in inputs:
            node = partition.graph.inputs[index]
            self._copies[node] = graph.placeholder(node.name)
            memories.append(node.meta["memory"])
        stage_inputs, weights = self._add_stage_inputs(memories, len(inputs))
        for node in nodes:
            self._copies[node] = graph.node_copy(node, self._copy_of)
        self._mark_random_functions(nodes)
        stage_outputs, sent = self._add_stage_outputs()
        output = (fx.map_arg(partition.graph.output, self._copy_of),) if is_last else ()
        graph.output((*sent, *output))
        module = fx.GraphModule(self._root, graph)
        borrowed = {position: self._take_holders(module, node) for position, node in weights.items()}
        written = {memory for node in nodes for memory in node.meta["writes"]}
        written_inputs = frozenset(position for position, memory in enumerate(memories) if memory & written)
        return StageModule(module, inputs, tuple(stage_inputs), tuple(stage_outputs), is_last, written_inputs, borrowed)

    def _copy_of(self, node: fx.Node) -> Any:
        """Return the copy of a node in the graph of this stage."""
        if node.op == "get_attr" and node not in self._copies:
            # The operations of an earlier stage have fetched this weight; fetch it here, or take the one received.
            value = get_attribute(self._partition.graph.module, str(node.target))
            if isinstance(value, nn.Parameter):
                home, sent = self._partition.owner_of(value)
                if sent is not None and home != self._stage:
                    return self._copies[sent]
            self._copies[node] = self._graph.get_attr(str(node.target))
        return self._copies[node]

    def _add_stage_inputs(
        self, memories: list[set[int]], position: int
    ) -> tuple[list[tuple[int, Value]], dict[int, fx.Node]]:
        """Add a placeholder for every received value; return the values, and the weights by position.

        Args:
            memories: storages of the arguments so far; those of the stage inputs are appended.
            position: number of arguments so far.
        """
        graph = self._graph
        stage_inputs: list[tuple[int, Value]] = []
        weights: dict[int, fx.Node] = {}
        for source, node in self._partition.nodes_received(self._stage):
            copies: list[Any] = []
            leaves, structure = flatten(node.meta["value"])
            for leaf, value in zip(leaves, values_of(node), strict=True):
                if value is None:
                    copies.append(leaf)
                    continue
                if node.op == "get_attr":
                    weights[position] = node
                received: Any = graph.placeholder(f"from_{source}_{value.name}".replace("#", "_").replace(".", "_"))
                stage_inputs.append((source, value))
                memories.append(node.meta["memory"])
                position += 1
                if value.kind != "tensor":
                    received = graph.call_function(_from_tensor, (received, value.kind))
                copies.append(received)
            single = len(copies) == 1 and leaves[0] is node.meta["value"]
            self._copies[node] = copies[0] if single else graph.call_function(_unflatten(structure), tuple(copies))
        return stage_inputs, weights

    def _add_stage_outputs(self) -> tuple[list[Value], list[fx.Node]]:
        """Return the values that are sent, and the nodes of this stage's graph that compute them."""
        graph, stage_outputs, sent = self._graph, [], []
        for node in self._partition.nodes_sent(self._stage):
            here = self._copy_of(node)
            leaves, _ = flatten(node.meta["value"])
            single = len(leaves) == 1 and leaves[0] is node.meta["value"]
            items = None if single else graph.call_function(_leaves, (here,))
            for index, value in enumerate(values_of(node)):
                if value is None:
                    continue
                item = here if items is None else graph.call_function(operator.getitem, (items, index))
                if value.kind != "tensor":
                    item = graph.call_function(_to_tensor, (item, value.kind))
                stage_outputs.append(value)
                sent.append(item)
        return stage_outputs, sent

    def _take_holders(self, module: fx.GraphModule, node: fx.Node) -> tuple[tuple[dict[str, Any], str], ...]:
        """Find where this stage's modules hold a weight of another stage, and set these places to None."""
        weight = get_attribute(self._partition.graph.module, str(node.target))
        found = []
        for owner in module.modules():
            for name, parameter in owner._parameters.items():
                if parameter is weight:
                    found.append((owner._parameters, name))
        for parameters, name in found:
            parameters[name] = None
        return tuple(found)

    def _mark_random_functions(self, nodes: Sequence[fx.Node]) -> None:
        """Store the name in the whole model on every function that draws random numbers."""
        for node in nodes:
            if node.op == "call_function" and getattr(node.target, "__name__", "") in RANDOM:
                self._copies[node].meta["random"] = node.name


def returned_nodes(returned: Any) -> list[fx.Node]:
    """Return the operations in the return value of a model."""
    found: list[fx.Node] = []

    def note(node: fx.Node) -> fx.Node:
        found.append(node)
        return node

    fx.map_arg(returned, note)
    return found


def _isolated_copy(model: nn.Module) -> nn.Module:
    """Copy the module objects and buffers; the parameters stay those of the model."""
    memo: dict[int, Any] = {id(parameter): parameter for parameter in model.parameters()}
    return copy.deepcopy(model, memo)


def _leaves(value: Any) -> list[Any]:
    return flatten(value)[0]


def _unflatten(structure: Any) -> Callable[..., Any]:
    def rebuild(*leaves: Any) -> Any:
        return tree_unflatten(list(leaves), structure)

    return rebuild


def _to_tensor(value: Any, kind: str) -> torch.Tensor:
    return torch.tensor(
        list(value) if kind == "size" else value, dtype=torch.float64 if kind == "float" else torch.int64
    )


def _from_tensor(tensor: torch.Tensor, kind: str) -> Any:
    """Return the number or torch.Size that was sent as a tensor."""
    if kind == "size":
        return torch.Size(tensor.tolist())
    return {"int": int, "float": float, "bool": bool}[kind](tensor.item())


def writable(leaf: torch.Tensor) -> torch.Tensor:
    """Return an alias of `leaf` that a stage may write into; see _WritableAlias."""
    alias: torch.Tensor = _WritableAlias.apply(leaf)  # type: ignore[no-untyped-call, unused-ignore]
    return alias


class _WritableAlias(torch.autograd.Function):
    """Lets a stage write into its input in place.

    A stage input is a leaf, so that its gradient can be sent back, and autograd forbids writing into leaves and their
    views. The alias is an ordinary tensor over the same memory. Backward is the identity.
    """

    @staticmethod
    def forward(ctx: object, leaf: torch.Tensor) -> torch.Tensor:
        alias = torch.empty(0, dtype=leaf.dtype, device=leaf.device)
        return alias.set_(leaf.untyped_storage(), leaf.storage_offset(), leaf.shape, leaf.stride())

    @staticmethod
    def backward(ctx: object, gradient: torch.Tensor) -> torch.Tensor:
        return gradient
