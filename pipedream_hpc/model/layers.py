"""Group the operations of a traced model into layers, which always stay in one stage.

Every operation that is a module, has weights or combines several tensors starts a layer. Cheap operations join the
layer they follow, and so do operations that only read sizes::

    conv ── relu ──┬── conv+relu ── conv ──┬── add+relu ── pool
                   └───────────────────────┘
    layers   0  1         2           3           4          5        edges 0-1 1-2 2-3 3-4 1-4 4-5

A layer always ends where a single tensor is live between two operations, so a plain chain has one layer per module.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import takewhile

import torch
from torch import fx, nn

from pipedream_hpc.model.graph import Layer, is_input, parameters_of, tensors_in, values_of


def group_into_layers(
    model: nn.Module, graph: fx.Graph, flops: Mapping[fx.Node, int]
) -> tuple[tuple[Layer, ...], tuple[tuple[int, int], ...]]:
    """Return the layers in a topological order, and the edges between them.

    Args:
        model: the traced model.
        graph: its graph, with shapes propagated (see shapes).
        flops: floating-point operations of every node.
    """
    groups = _Grouping(graph).run()
    layers = [_layer(model, nodes, sum(flops[n] for n in nodes), _output_nodes(nodes)) for nodes in groups]
    return _with_unique_names(layers), _edges(groups)


class _Grouping:
    """Groups operations into layers, by union-find."""

    def __init__(self, graph: fx.Graph) -> None:
        self._nodes = [node for node in graph.nodes if not is_input(node) and node.op != "output"]
        self._place = {node: index for index, node in enumerate(self._nodes)}
        self._leader = list(range(len(self._nodes)))  # of each node's group

    def run(self) -> list[tuple[fx.Node, ...]]:
        """Return the operations of every layer, in a topological order of the layers."""
        self._join_written()
        blocks = self._blocks()
        for block in blocks:
            self._join_cheap(block)
        groups: dict[int, list[fx.Node]] = {}
        for index, node in enumerate(self._nodes):
            groups.setdefault(self._find(index), []).append(node)
        return self._ordered([tuple(nodes) for nodes in groups.values()])

    def _blocks(self) -> list[list[fx.Node]]:
        """Return the runs of operations between points where a single float tensor is live."""
        blocks, current = [], []
        pending: dict[fx.Node, int] = {}  # live value -> uses still to come
        for node in self._nodes:
            for source in node.all_input_nodes:
                if source in pending:
                    pending[source] -= 1
                    if not pending[source]:
                        del pending[source]
            pending[node] = len(node.users)
            current.append(node)
            value = node.meta["value"]
            if list(pending) == [node] and isinstance(value, torch.Tensor) and value.is_floating_point():
                blocks.append(current)
                current = []
        return [*blocks, current] if current else blocks

    def _join_cheap(self, block: list[fx.Node]) -> None:
        computing = [node for node in block if _moves_data(node)]
        if len(computing) == 1:
            self._join(block)
            return
        for node in block:
            sources = [source for source in node.all_input_nodes if not is_input(source)]
            if not sources:
                # Made of arguments and constants only: it joins its first user.
                user = min((self._place[user] for user in node.users if user in self._place), default=None)
                if not _moves_data(node) or not any(s.op == "placeholder" for s in node.all_input_nodes):
                    self._join([node, self._nodes[user]] if user is not None else [node])
                continue
            tensors = [source for source in sources if tensors_in(source.meta["value"])]
            if not _moves_data(node):
                self._join([node, (tensors or sources)[-1]])
            elif len(tensors) == 1 and _is_cheap(node) and self._only_follower(node, tensors[0]):
                self._join([node, tensors[0]])

    def _only_follower(self, node: fx.Node, source: fx.Node) -> bool:
        """Return whether `node` is the only user of `source`, besides operations that only read sizes."""
        return all(user is node or not _moves_data(user) for user in source.users if user.op != "output")

    def _join_written(self) -> None:
        """Join the operations that read a tensor before and after it is written in place.

        This is not needed where every operation has a single user: then no one can observe the difference.
        """
        writers = [node for node in self._nodes if node.meta["writes"]]
        for writer in writers:
            for memory in writer.meta["writes"]:
                seen = [node for node in self._nodes[: self._place[writer]] if memory in node.meta["memory"]]
                if any(len(node.users) > 1 for node in seen):
                    first = self._place[seen[0]]
                    self._join(self._nodes[first : self._place[writer] + 1])

    def _ordered(self, groups: list[tuple[fx.Node, ...]]) -> list[tuple[fx.Node, ...]]:
        """Return the groups in a topological order; groups that need each other are merged until there is one."""
        while True:
            of = {node: index for index, nodes in enumerate(groups) for node in nodes}
            needs: list[set[int]] = [set() for _ in groups]
            for node in self._nodes:
                needs[of[node]].update(of[s] for s in node.all_input_nodes if s in of and of[s] != of[node])
            order: list[int] = []
            left = sorted(range(len(groups)), key=lambda index: self._place[groups[index][0]])
            while left:
                free = next((index for index in left if not needs[index] & set(left)), None)
                if free is None:
                    break
                left.remove(free)
                order.append(free)
            if not left:
                return [groups[index] for index in order]
            together = sorted((node for index in left for node in groups[index]), key=self._place.__getitem__)
            groups = [groups[index] for index in order] + [tuple(together)]

    def _find(self, index: int) -> int:
        while self._leader[index] != index:
            self._leader[index] = self._leader[self._leader[index]]
            index = self._leader[index]
        return index

    def _join(self, nodes: Sequence[fx.Node]) -> None:
        first, *others = (self._find(self._place[node]) for node in nodes)
        for other in others:
            self._leader[self._find(other)] = first = self._find(first)


#: Functions and methods that take almost no time.
_CHEAP = frozenset(
    (
        *("relu", "relu_", "leaky_relu", "gelu", "silu", "elu", "selu", "sigmoid", "tanh", "softplus", "hardtanh"),
        *("softmax", "log_softmax", "dropout", "masked_fill", "masked_fill_", "neg", "exp", "log", "sqrt", "rsqrt"),
        *("add", "sub", "mul", "div", "truediv", "pow", "mean", "sum", "float", "to", "type_as", "clone", "detach"),
        *("view", "reshape", "flatten", "permute", "transpose", "t", "contiguous", "squeeze", "unsqueeze", "expand"),
        *("chunk", "split", "getitem"),
    )
)


def _is_cheap(node: fx.Node) -> bool:
    if node.op == "call_module":
        return False
    return not any(source.op == "get_attr" for source in node.all_input_nodes) and _function_name(node) in _CHEAP


def _function_name(node: fx.Node) -> str:
    return str(node.target) if node.op == "call_method" else getattr(node.target, "__name__", str(node.target))


def _moves_data(node: fx.Node) -> bool:
    """Return whether an operation produces tensors; the others select one of several, or read sizes."""
    if not tensors_in(node.meta["value"]):
        return False
    picks = node.op == "call_function" and _function_name(node) == "getitem"
    return not (picks and any(not isinstance(s.meta["value"], torch.Tensor) for s in node.all_input_nodes[:1]))


def _edges(groups: Sequence[tuple[fx.Node, ...]]) -> tuple[tuple[int, int], ...]:
    of = {node: index for index, nodes in enumerate(groups) for node in nodes}
    pairs = {
        (of[source], of[node])
        for node in of
        for source in node.all_input_nodes
        if source in of and of[source] != of[node]
    }
    return tuple(sorted(pairs))


def _output_nodes(nodes: Sequence[fx.Node]) -> list[fx.Node]:
    """Return the operations of a layer that other layers or the model's output use."""
    own = set(nodes)
    return [node for node in nodes if any(user not in own for user in node.users)]


def _layer(model: nn.Module, nodes: tuple[fx.Node, ...], flops: int, outputs: list[fx.Node]) -> Layer:
    modules = [str(node.target) for node in nodes if node.op == "call_module"]
    anchor = next((node for node in nodes if _moves_data(node)), nodes[-1])
    if len(modules) == 1:
        name, kind = modules[0], type(model.get_submodule(modules[0])).__name__
    else:
        # A block is named after the deepest module that contains all of it, a function after itself.
        columns = zip(*(target.split(".") for target in modules), strict=False)
        prefix = [parts[0] for parts in takewhile(lambda parts: len(set(parts)) == 1, columns)]
        name = ".".join(prefix) or anchor.name
        kind = type(model.get_submodule(name)).__name__ if prefix else anchor.name.rstrip("_0123456789")
    parameters = {name: parameter for node in nodes for name, parameter in parameters_of(model, node)}
    values = [value for node in outputs for value in values_of(node) if value is not None]
    tensors = [value for value in values if value.kind == "tensor"]
    single = tensors[0] if len(tensors) == 1 else None
    return Layer(
        name=name,
        kind=kind,
        nodes=nodes,
        parameters=tuple(parameters),
        parameter_bytes=sum(p.nbytes for p in {id(p): p for p in parameters.values()}.values() if p.requires_grad),
        output_bytes=sum(value.nbytes for value in tensors),
        output_shape=None if single is None else single.shape,
        output_dtype=None if single is None else single.dtype,
        flops=flops,
    )


def _with_unique_names(layers: list[Layer]) -> tuple[Layer, ...]:
    """Number the layers of a module that is called more than once, as in `fc@2`."""
    seen: dict[str, int] = {}
    for layer in layers:
        name = layer.name
        seen[name] = seen.get(name, 0) + 1
        if seen[name] > 1:
            object.__setattr__(layer, "name", f"{name}@{seen[name]}")
        for node in layer.nodes:
            node.meta["layer"] = layer.name
    return tuple(layers)
