"""Cut a captured model into stages.

A stage's module takes the model's arguments it uses and what comes from earlier stages, and returns what
later stages use; the last one returns the model's output as well::

    input ──► stage 0 ──┬── a ──► stage 1 ──── b ────► stage 2 ──► output
                        └────────────── a ──────────────┘
              exits a             entries a, exits b   entries a (from stage 0), b (from stage 1)

What several stages use is sent to each of them directly, whatever stages stand between.

A weight that several stages use belongs to the first of them; it travels to the others like an
activation, and its gradient comes back with theirs. So there is one copy of it, one optimizer, and for
every minibatch one version, whatever the schedule.
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
    attribute,
    flatten,
    is_input,
    leaves_of,
    parameters_of,
)
from pipedream_hpc.model.randomness import RANDOM

Links = dict[tuple[int, int], tuple[Value, ...]]


@dataclass(frozen=True)
class Part:
    """One stage of a cut model.

    Attributes:
        module: called with inputs and entries (by `run`); returns a tuple of the exits, and the
            model's output behind them if this is the last stage.
        inputs: which of the model's arguments it takes.
        entries: (stage it comes from, value), by stage, then in the order of the model.
        exits: what later stages use, in the order of the model.
        output: whether it returns the model's output.
        rewrites: positions among inputs and entries that the stage writes into in place.
        borrowed: position of an entry that is a weight -> where the modules of this stage hold it.
    """

    module: fx.GraphModule
    inputs: tuple[int, ...]
    entries: tuple[tuple[int, Value], ...]
    exits: tuple[Value, ...]
    output: bool
    rewrites: frozenset[int]
    borrowed: dict[int, tuple[tuple[dict[str, Any], str], ...]] = field(default_factory=dict)

    def run(self, arguments: Sequence[Any], call: Callable[..., Any] | None = None) -> tuple[Any, ...]:
        """Call the module with inputs and entries; its modules use the borrowed weights meanwhile.

        Args:
            arguments: inputs, then entries.
            call: instead of the module, such as a compiled form of it.
        """
        for position, holders in self.borrowed.items():
            for entries, key in holders:
                entries[key] = arguments[position]
        try:
            returned: tuple[Any, ...] = (self.module if call is None else call)(*arguments)
        finally:
            for holders in self.borrowed.values():
                for entries, key in holders:
                    entries[key] = None
        return returned


class Cut:
    """A model cut into stages.

    Args:
        graph: the captured model.
        stages: the layer numbers of every stage.

    Attributes:
        links: what is sent from which stage to which.

    Raises:
        PipedreamError: a layer is missing or in two stages, or a stage needs what a later one makes.
    """

    def __init__(self, graph: LayerGraph, stages: Sequence[Sequence[int]]) -> None:
        self._graph, self._last = graph, len(stages) - 1
        self._stage_of = self._sorted_out(stages)
        self._order = {node: i for i, node in enumerate(n for layer in graph.layers for n in layer.nodes)}
        self._owner, self._users = self._weights()
        self._wanted = self._crossing()
        self.links: Links = {}
        for (source, target), found in sorted(self._wanted.items()):
            self.links[source, target] = tuple(value for node in self._in_order(found) for value in self._values(node))

    def part(self, stage: int, *, isolated: bool = True) -> Part:
        """The module of a stage.

        Args:
            isolated: with module objects and buffers of its own; otherwise those of the model.
        """
        return _Builder(self, stage, isolated).part()

    def parameters(self, stage: int) -> list[str]:
        """Qualified names of the weights that belong to a stage, each under its first name."""
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
        """Operations of a stage, in the order of the model."""
        return [n for layer in self._graph.layers for n in layer.nodes if self._stage_of[n] == stage]

    def entering(self, stage: int) -> list[tuple[int, fx.Node]]:
        """(stage it comes from, operation or weight) for all that a stage gets."""
        return [
            (source, node)
            for (source, target), found in sorted(self._wanted.items())
            if target == stage
            for node in self._in_order(found)
        ]

    def leaving(self, stage: int) -> list[fx.Node]:
        """Operations and weights of a stage that later stages use."""
        return self._in_order({n for (source, _), found in self._wanted.items() if source == stage for n in found})

    def is_last(self, stage: int) -> bool:
        return stage == self._last

    def owner_of(self, parameter: nn.Parameter) -> tuple[int, fx.Node | None]:
        """The stage a weight belongs to, and the node that stands for it where it is sent."""
        return self._owner[id(parameter)]

    # ------------------------------------------------------------------

    def _sorted_out(self, stages: Sequence[Sequence[int]]) -> dict[fx.Node, int]:
        layers = self._graph.layers
        place: dict[int, int] = {}
        for stage, numbers in enumerate(stages):
            for number in numbers:
                if number in place:
                    raise PipedreamError(f"layer '{layers[number].name}' is in stages {place[number]} and {stage}")
                place[number] = stage
        missing = [layer.name for number, layer in enumerate(layers) if number not in place]
        if missing:
            raise PipedreamError(f"no stage has layer '{missing[0]}'")
        for producer, consumer in self._graph.edges:
            if place[producer] > place[consumer]:
                raise PipedreamError(
                    f"layer '{layers[consumer].name}' in stage {place[consumer]} needs layer "
                    f"'{layers[producer].name}', which is in the later stage {place[producer]}"
                )
        return {node: place[number] for number, layer in enumerate(layers) for node in layer.nodes}

    def _weights(self) -> tuple[dict[int, tuple[int, fx.Node | None]], dict[int, set[int]]]:
        """Where every weight belongs, and which stages use it."""
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
                parameter = attribute(self._graph.module, names[key])
                weight.meta.update(
                    value=parameter.detach().to("meta"),
                    needs_gradient=[parameter.requires_grad],
                    layer=names[key],
                    memory=set(),
                )
                self._stage_of[weight] = min(stages)
                self._order[weight] = -len(names) + len(owner)  # weights first
            owner[key] = (min(stages), weight)
        return owner, users

    def _crossing(self) -> dict[tuple[int, int], set[fx.Node]]:
        wanted: dict[tuple[int, int], set[fx.Node]] = defaultdict(set)
        for layer in self._graph.layers:
            for node in layer.nodes:
                for source in node.all_input_nodes:
                    if not is_input(source) and self._stage_of[source] != self._stage_of[node]:
                        wanted[self._stage_of[source], self._stage_of[node]].add(source)
        for source in returned_nodes(self._graph.returned):
            if not is_input(source) and self._stage_of[source] != self._last:
                wanted[self._stage_of[source], self._last].add(source)
        for key, (home, weight) in self._owner.items():
            for stage in self._users[key] - {home}:
                assert weight is not None
                wanted[home, stage].add(weight)
        # Every stage hears from one before it and tells one behind it, if only the time.
        for stage in range(1, self._last + 1):
            if not any(target == stage for _, target in wanted):
                wanted[stage - 1, stage] = set()
        for stage in range(self._last):
            if not any(source == stage for source, _ in wanted):
                wanted[stage, stage + 1] = set()
        return dict(wanted)

    def _in_order(self, nodes: set[fx.Node]) -> list[fx.Node]:
        return sorted(nodes, key=lambda node: (self._order.get(node, -1), node.name))

    def _values(self, node: fx.Node) -> list[Value]:
        return [value for value in leaves_of(node) if value is not None]


class _Builder:
    """Makes the module of one stage."""

    def __init__(self, cut: Cut, stage: int, isolated: bool) -> None:
        self._cut, self._stage = cut, stage
        self._root = _isolated(cut.graph.module) if isolated else cut.graph.module
        self._made = fx.Graph()
        self._copies: dict[fx.Node, Any] = {}

    def part(self) -> Part:
        cut, stage, made = self._cut, self._stage, self._made
        nodes = cut.nodes(stage)
        returned = returned_nodes(cut.graph.returned) if cut.is_last(stage) else []
        used = {source for node in nodes for source in node.all_input_nodes} | set(returned)
        inputs = tuple(index for index, node in enumerate(cut.graph.inputs) if node in used)
        memories: list[set[int]] = []
        for index in inputs:
            node = cut.graph.inputs[index]
            self._copies[node] = made.placeholder(node.name)
            memories.append(node.meta["memory"])
        entries, weights = self._entries(memories, len(inputs))
        for node in nodes:
            self._copies[node] = made.node_copy(node, self._source)
        self._seed_functions(nodes)
        exits, leaving = self._exits()
        output = (fx.map_arg(cut.graph.returned, self._source),) if cut.is_last(stage) else ()
        made.output((*leaving, *output))
        module = fx.GraphModule(self._root, made)
        borrowed = {position: self._holders(module, node) for position, node in weights.items()}
        written = {memory for node in nodes for memory in node.meta["writes"]}
        rewrites = frozenset(position for position, memory in enumerate(memories) if memory & written)
        return Part(module, inputs, tuple(entries), tuple(exits), cut.is_last(stage), rewrites, borrowed)

    def _source(self, node: fx.Node) -> Any:
        if node.op == "get_attr" and node not in self._copies:
            # A weight fetched by an earlier stage's operations is fetched again here.
            value = attribute(self._cut.graph.module, str(node.target))
            if isinstance(value, nn.Parameter):
                home, sent = self._cut.owner_of(value)
                if sent is not None and home != self._stage:
                    return self._copies[sent]
            self._copies[node] = self._made.get_attr(str(node.target))
        return self._copies[node]

    def _entries(self, memories: list[set[int]], position: int) -> tuple[list[tuple[int, Value]], dict[int, fx.Node]]:
        entries: list[tuple[int, Value]] = []
        weights: dict[int, fx.Node] = {}
        made = self._made
        for source, node in self._cut.entering(self._stage):
            pieces: list[Any] = []
            leaves, structure = flatten(node.meta["value"])
            for leaf, value in zip(leaves, leaves_of(node), strict=True):
                if value is None:
                    pieces.append(leaf)
                    continue
                if node.op == "get_attr":
                    weights[position] = node
                piece: Any = made.placeholder(f"from_{source}_{value.name}".replace("#", "_").replace(".", "_"))
                entries.append((source, value))
                memories.append(node.meta["memory"])
                position += 1
                if value.kind != "tensor":
                    piece = made.call_function(_number, (piece, value.kind))
                pieces.append(piece)
            whole = len(pieces) == 1 and leaves[0] is node.meta["value"]
            self._copies[node] = pieces[0] if whole else made.call_function(_rebuilding(structure), tuple(pieces))
        return entries, weights

    def _exits(self) -> tuple[list[Value], list[fx.Node]]:
        made, exits, leaving = self._made, [], []
        for node in self._cut.leaving(self._stage):
            here = self._source(node)
            leaves, _ = flatten(node.meta["value"])
            whole = len(leaves) == 1 and leaves[0] is node.meta["value"]
            parts = None if whole else made.call_function(_leaves, (here,))
            for index, value in enumerate(leaves_of(node)):
                if value is None:
                    continue
                piece = here if parts is None else made.call_function(operator.getitem, (parts, index))
                if value.kind != "tensor":
                    piece = made.call_function(_as_tensor, (piece, value.kind))
                exits.append(value)
                leaving.append(piece)
        return exits, leaving

    def _holders(self, module: fx.GraphModule, node: fx.Node) -> tuple[tuple[dict[str, Any], str], ...]:
        """Where this stage's modules hold a weight of another stage; empties these places."""
        weight = attribute(self._cut.graph.module, str(node.target))
        found = []
        for owner in module.modules():
            for key, parameter in owner._parameters.items():
                if parameter is weight:
                    found.append((owner._parameters, key))
        for entries, key in found:
            entries[key] = None
        return tuple(found)

    def _seed_functions(self, nodes: Sequence[fx.Node]) -> None:
        """Mark functions that draw random numbers by their name in the whole model."""
        for node in nodes:
            if node.op == "call_function" and getattr(node.target, "__name__", "") in RANDOM:
                self._copies[node].meta["random"] = node.name


def returned_nodes(returned: Any) -> list[fx.Node]:
    """Operations in what a model returns."""
    found: list[fx.Node] = []

    def note(node: fx.Node) -> fx.Node:
        found.append(node)
        return node

    fx.map_arg(returned, note)
    return found


def _isolated(model: nn.Module) -> nn.Module:
    """A copy of the module objects with the model's own weights, and buffers of its own."""
    memo: dict[int, Any] = {id(parameter): parameter for parameter in model.parameters()}
    return copy.deepcopy(model, memo)


def _leaves(value: Any) -> list[Any]:
    return flatten(value)[0]


def _rebuilding(structure: Any) -> Callable[..., Any]:
    def rebuild(*leaves: Any) -> Any:
        return tree_unflatten(list(leaves), structure)

    return rebuild


def _as_tensor(value: Any, kind: str) -> torch.Tensor:
    return torch.tensor(
        list(value) if kind == "size" else value, dtype=torch.float64 if kind == "float" else torch.int64
    )


def _number(tensor: torch.Tensor, kind: str) -> Any:
    """The number, or torch.Size, that travelled as a tensor."""
    if kind == "size":
        return torch.Size(tensor.tolist())
    return {"int": int, "float": float, "bool": bool}[kind](tensor.item())


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
