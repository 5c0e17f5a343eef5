"""Capture a torch model as a graph of layers.

torch.fx records the model's operations once, without running it. Every operation that is a module, has
weights or joins several tensors is a layer; what follows one and is cheap stands in its layer, and so
does everything that only asks for sizes::

    conv ── relu ──┬── conv+relu ── conv ──┬── add+relu ── pool
                   └───────────────────────┘
    layers   0  1         2           3           4          5        edges 0-1 1-2 2-3 3-4 1-4 4-5

Where a single tensor is alive between two operations, a layer always ends, so a plain chain has one
layer per module. A cut may go through any edges as long as data only flows forwards over it; what
crosses is a Value: a tensor, or a number that a later layer needs.
"""

from __future__ import annotations

import copy
import inspect
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from itertools import takewhile
from typing import Any, Literal

import torch
from torch import fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.utils._pytree import tree_flatten, tree_map
from torch.utils.flop_counter import FlopCounterMode

from pipedream_hpc.errors import PipedreamError
from pipedream_hpc.model.materialize import Factory, Recipe, whole
from pipedream_hpc.model.precision import Precision
from pipedream_hpc.model.untouched import untouched

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
        graph.eliminate_dead_code()
        inputs = tuple(node for node in graph.nodes if node.op == "placeholder")
        values = tuple(arguments[str(node.target)] for node in inputs)
        operations = _propagate(model, graph, values, precision)
    groups = _Groups(graph).found()
    (output,) = (node for node in graph.nodes if node.op == "output")
    layers = _named([_layer(model, nodes, sum(operations[n] for n in nodes), _leaving(nodes)) for nodes in groups])
    meta = tree_map(lambda x: torch.empty_like(x, device="meta") if isinstance(x, torch.Tensor) else x, values)
    return LayerGraph(model, layers, _edges(groups), inputs, output.args[0], meta, recipe)


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


def _propagate(
    model: nn.Module, graph: fx.Graph, arguments: tuple[Any, ...], precision: Precision | None
) -> dict[fx.Node, int]:
    """Give every node its value's shape (in node.meta) and return its floating-point operations.

    Shapes are propagated without memory. A module kept whole may look at values, which such tensors
    have none of: then the example itself is run, and the model put back as it was.
    """
    # Autocast goes by the device, so under it tensors have to say that they are on the CPU.
    device, pretending = ("meta", nullcontext()) if precision is None else ("cpu", FakeTensorMode())
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


def _tensors(value: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_flatten(value)[0] if isinstance(leaf, torch.Tensor)]


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
            before = [(tensor, tensor._version) for tensor in _tensors((args, kwargs))]
            with FlopCounterMode(display=False) as counter:
                value = super().run_node(node)
            original = originals[node.name]  # a GraphModule may hold a copy of its graph
            operations[original] = counter.get_total_flops()
            leaves, _ = flatten(value)
            own = _tensors(value)
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


class _Groups:
    """Sort operations into layers."""

    def __init__(self, graph: fx.Graph) -> None:
        self._nodes = [node for node in graph.nodes if not is_input(node) and node.op != "output"]
        self._place = {node: index for index, node in enumerate(self._nodes)}
        self._leader = list(range(len(self._nodes)))  # union-find

    def found(self) -> list[tuple[fx.Node, ...]]:
        """The layers' operations, layers in an order in which they can run."""
        self._join_rewritten()
        blocks = self._blocks()
        for block in blocks:
            self._join_cheap(block)
        groups: dict[int, list[fx.Node]] = {}
        for index, node in enumerate(self._nodes):
            groups.setdefault(self._find(index), []).append(node)
        return self._ordered([tuple(nodes) for nodes in groups.values()])

    def _blocks(self) -> list[list[fx.Node]]:
        """Runs of operations between points where a single float tensor is alive."""
        blocks, current = [], []
        pending: dict[fx.Node, int] = {}  # value alive -> uses still to come
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
                # Made of arguments and constants alone: belongs to who uses it first.
                user = min((self._place[user] for user in node.users if user in self._place), default=None)
                if not _moves_data(node) or not any(s.op == "placeholder" for s in node.all_input_nodes):
                    self._join([node, self._nodes[user]] if user is not None else [node])
                continue
            tensors = [source for source in sources if _tensors(source.meta["value"])]
            if not _moves_data(node):
                self._join([node, (tensors or sources)[-1]])
            elif len(tensors) == 1 and _is_cheap(node) and self._only_follower(node, tensors[0]):
                self._join([node, tensors[0]])

    def _only_follower(self, node: fx.Node, source: fx.Node) -> bool:
        """Whether nothing but `node`, and questions for sizes, uses `source`, which stands in the same block."""
        return all(user is node or not _moves_data(user) for user in source.users if user.op != "output")

    def _join_rewritten(self) -> None:
        """Keep together what sees a tensor before and after it is written into in place.

        No need where each has a single user: then nobody can see the difference.
        """
        writers = [node for node in self._nodes if node.meta["writes"]]
        for writer in writers:
            for memory in writer.meta["writes"]:
                seen = [node for node in self._nodes[: self._place[writer]] if memory in node.meta["memory"]]
                if any(len(node.users) > 1 for node in seen):
                    first = self._place[seen[0]]
                    self._join(self._nodes[first : self._place[writer] + 1])

    def _ordered(self, groups: list[tuple[fx.Node, ...]]) -> list[tuple[fx.Node, ...]]:
        """By their last operation that others wait for; joined until no two groups need each other."""
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


#: Functions and methods that take next to no time, or follow their input at once wherever it is.
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
    """Whether an operation makes tensors; the rest picks one out of several, or asks for sizes."""
    if not _tensors(node.meta["value"]):
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


def _leaving(nodes: Sequence[fx.Node]) -> list[fx.Node]:
    """Operations of a layer that others use, the model's own output among them."""
    own = set(nodes)
    return [node for node in nodes if any(user not in own for user in node.users)]


def _layer(model: nn.Module, nodes: tuple[fx.Node, ...], operations: int, leaving: list[fx.Node]) -> Layer:
    modules = [str(node.target) for node in nodes if node.op == "call_module"]
    anchor = next((node for node in nodes if _moves_data(node)), nodes[-1])
    if len(modules) == 1:
        name, kind = modules[0], type(model.get_submodule(modules[0])).__name__
    else:
        # A block is known by the deepest module that holds all of it, a function by its own name.
        columns = zip(*(target.split(".") for target in modules), strict=False)
        prefix = [parts[0] for parts in takewhile(lambda parts: len(set(parts)) == 1, columns)]
        name = ".".join(prefix) or anchor.name
        kind = type(model.get_submodule(name)).__name__ if prefix else anchor.name.rstrip("_0123456789")
    parameters = {name: parameter for node in nodes for name, parameter in parameters_of(model, node)}
    values = [value for node in leaving for value in leaves_of(node) if value is not None]
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
        operations=operations,
    )


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


def _named(layers: list[Layer]) -> tuple[Layer, ...]:
    """A module called twice makes two layers: the later ones are told apart by a number."""
    seen: dict[str, int] = {}
    for layer in layers:
        name = layer.name
        seen[name] = seen.get(name, 0) + 1
        if seen[name] > 1:
            object.__setattr__(layer, "name", f"{name}@{seen[name]}")
        for node in layer.nodes:
            node.meta["layer"] = layer.name
    return tuple(layers)
