"""LayerGraph: a captured model, as the calls that its forward makes and how tensors flow between them.

::

    class Model(nn.Module):                    calls                  outputs (call, index)
        def forward(self, x, mask):
            h = self.embed(x)                  0  module embed        (0, 0)
            h = self.block(h, mask)            1  module block        (1, 0)
            return self.head(h + 1)            2  function add        (2, 0)
                                               3  module head         (3, 0)

What is computed from the model's arguments alone, such as a mask, is no call of the graph: every stage that needs it
computes it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from pipedream_hpc.errors import PipedreamError
from pipedream_hpc.model.arguments import Arguments
from pipedream_hpc.model.batch_dims import BatchDims
from pipedream_hpc.model.originals import Originals
from pipedream_hpc.model.outside_state import Place
from pipedream_hpc.model.recipe import ModelRecipe

#: One tensor that a call puts out: (number of the call, number of the output).
Key = tuple[int, int]


@dataclass(frozen=True)
class Value:
    """One tensor that a call puts out, for the example inputs.

    Attributes:
        name: name of the call; outputs after the first are numbered, as in `chunk#1`. It is the same in training and
            in evaluation, where a call may return more.
        shape: its shape.
        dtype: its dtype.
        needs_gradient: whether it depends on a trained weight, so that a gradient comes back for it.
        layer: name of the layer that produces it.
        order: its dimensions from the slowest to the fastest in memory; None for a contiguous tensor. It is sent in
            this order, and has the same strides where it arrives.
        layout: its layout; only strided tensors are sent.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    needs_gradient: bool
    layer: str = ""
    order: tuple[int, ...] | None = None
    layout: torch.layout = torch.strided

    @property
    def nbytes(self) -> int:
        """Bytes for the example inputs."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize

    @property
    def sent_shape(self) -> tuple[int, ...]:
        """Shape in which it is sent."""
        return self.shape if self.order is None else tuple(self.shape[dimension] for dimension in self.order)

    @property
    def order_back(self) -> tuple[int, ...] | None:
        """What undoes `order`."""
        if self.order is None:
            return None
        return tuple(self.order.index(dimension) for dimension in range(len(self.order)))


def memory_order(tensor: torch.Tensor) -> tuple[int, ...] | None:
    """Return a tensor's dimensions from the slowest to the fastest in memory; None if it is in the usual order."""
    if tensor.layout is not torch.strided or tensor.is_contiguous() or 0 in tensor.stride():
        return None
    strides = tensor.stride()
    order = tuple(sorted(range(tensor.dim()), key=lambda dimension: (-strides[dimension], dimension)))
    return None if order == tuple(range(tensor.dim())) else order


@dataclass(frozen=True)
class Found:
    """Where a tensor is found when a call returns.

    Attributes:
        where: "returned", or "argument" if the call wrote into a tensor that it was given.
        position: its number among the tensors that are returned or given.
        key: which tensor of the graph it is.
    """

    where: str
    position: int
    key: Key


@dataclass(frozen=True)
class Returned:
    """Stands for a tensor in the recorded return value of a call.

    Attributes:
        key: which tensor of the graph it is; None for one that was computed from the model's arguments alone.
        argument: its number among the call's arguments, if it is one of them itself.
    """

    key: Key | None
    argument: int | None


@dataclass(eq=False)
class Call:
    """One call of a module or function.

    Attributes:
        number: its position in the forward.
        name: qualified name of the module; or name of the function, numbered from the second on, as in `add_1`.
        module: the module; None for a function.
        function: the function; None for a module.
        sources: the tensors of earlier calls that it takes, in the order of the arguments.
        parameters: qualified names of the parameters that it uses.
        takes_inputs: whether it takes something that was computed from the model's arguments alone.
        found: where its outputs are found.
        values: its outputs, for the example inputs.
        returned: its return value, with a Returned in place of each tensor.
        memory: identities of the storages of its outputs.
        writes: identities of the storages that it writes into.
        flops: floating-point operations, counted and not measured.
        entered: names of the modules that run in it, once for each call of them.
        draws: whether a function draws random numbers.
        checkpoint: number of the checkpointed part that it runs again with in backward; None for none.
        differentiates: numbers of the calls that it takes gradients of, as torch.autograd.grad does.
        stays_with: numbers of the calls whose values have chosen the sizes of tensors that it takes.
    """

    number: int
    name: str
    module: nn.Module | None = None
    function: Callable[..., Any] | None = None
    sources: tuple[Key, ...] = ()
    parameters: tuple[str, ...] = ()
    takes_inputs: bool = False
    found: tuple[Found, ...] = ()
    values: tuple[Value, ...] = ()
    returned: Any = None
    memory: frozenset[int] = frozenset()
    writes: frozenset[int] = frozenset()
    flops: int = 0
    entered: tuple[str, ...] = ()
    draws: bool = False
    checkpoint: int | None = None
    differentiates: tuple[int, ...] = ()
    stays_with: tuple[int, ...] = ()

    @property
    def kind(self) -> str:
        """Class of the module, or name of the function."""
        return type(self.module).__name__ if self.module is not None else self.name.rstrip("_0123456789")


@dataclass(eq=False)
class Scope:
    """One call of a module that was opened: its own forward ran, and the calls in it were recorded.

    Attributes:
        name: qualified name of the module.
        module: the module.
        items: the calls in it, and the calls of modules that were opened in turn, in order.
        sources: the tensors of earlier calls that it is given.
        found: where tensors of these calls are found when it returns.
        returned: its return value, with a Returned in place of each tensor.
    """

    name: str
    module: nn.Module
    items: list[Call | Scope] = field(default_factory=list)
    sources: tuple[Key, ...] = ()
    found: tuple[Found, ...] = ()
    returned: Any = None

    def calls(self) -> Iterator[Call]:
        """Yield all calls in it."""
        for item in self.items:
            if isinstance(item, Call):
                yield item
            else:
                yield from item.calls()


@dataclass(frozen=True)
class Recording:
    """What one run of the forward did, in training or in evaluation mode.

    Attributes:
        root: the call of the model itself.
        calls: all calls, in order.
        output: the tensors of calls that the model returns.
        returned_parameters: qualified names of parameters that the model itself returns.
    """

    root: Scope
    calls: tuple[Call, ...]
    output: tuple[Key, ...]
    returned_parameters: tuple[str, ...] = ()

    def value(self, key: Key) -> Value:
        """Return an output of a call."""
        return self.calls[key[0]].values[key[1]]


@dataclass(frozen=True)
class Layer:
    """Calls that always stay in one stage.

    Attributes:
        name: qualified name of its module, or of the function.
        kind: class of the module, or name of the function.
        calls: the calls, in execution order.
        parameters: qualified names of the parameters it uses.
        parameter_bytes: bytes of the trained ones.
        output_bytes: bytes of the outputs that later layers use, for the example inputs.
        output_shape: shape of the output; None if it has several.
        output_dtype: dtype of the output, such as torch.float32; None if it has several.
        flops: floating-point operations of one forward, counted and not measured.
    """

    name: str
    kind: str
    calls: tuple[Call, ...]
    parameters: tuple[str, ...]
    parameter_bytes: int
    output_bytes: int
    output_shape: tuple[int, ...] | None
    output_dtype: torch.dtype | None
    flops: int


@dataclass(frozen=True)
class Modes:
    """The modes of a model's modules.

    Attributes:
        frozen: modules that the user has set to evaluation mode in a model that trains, such as a frozen BatchNorm.
    """

    frozen: tuple[nn.Module, ...]

    @classmethod
    def of(cls, model: nn.Module) -> Modes:
        """Return those of a model as the user has left it."""
        return cls(tuple(module for module in model.modules() if model.training and not module.training))

    def set(self, model: nn.Module, training: bool) -> None:
        """Set the model to training or evaluation, by its own train()."""
        model.train(training)
        if training:
            for module in self.frozen:
                module.training = False


@contextmanager
def modes_restored(model: nn.Module) -> Iterator[None]:
    """Restore the modes of all modules when the block ends."""
    before = {module: module.training for module in model.modules()}
    try:
        yield
    finally:
        for module, mode in before.items():
            module.training = mode


@dataclass
class Notes:
    """What a recording has seen besides the calls.

    Attributes:
        random: modules whose own code draws random numbers of torch.
        random_functions: those of them in which functions draw, and that are always opened.
        drawing: the functions that draw.
        python_random: modules whose own code draws random numbers of Python or NumPy.
        writes_buffers: names of buffers that are written, or replaced, in a forward.
        writes_parameters: names of weights that are written in a forward.
        renormalizes: names of the weights of nn.Embedding(max_norm=...), for which to be written again changes nothing.
        sets_attributes: modules whose attributes are set in a forward -> the names.
        outside: modules that change other state in a forward (see model/outside_state).
        places: modules that change a place of the program's state, or reach one that is changed -> these, and their
            names in messages.
        writes_inputs: whether that of training (True) or of evaluation (False) writes into the model's arguments.
        averages: whether it computes means over targets, or divides a number with a gradient, as of a loss of its own.
        checkpoints: whether parts of the forward run again in backward.
        questions: whether the forward asks for more than tensors, such as x.size(0).
        hooked: modules with forward hooks, which may keep their outputs.
    """

    random: set[str] = field(default_factory=set)
    random_functions: set[str] = field(default_factory=set)
    drawing: set[Any] = field(default_factory=set)
    python_random: set[str] = field(default_factory=set)
    writes_buffers: set[str] = field(default_factory=set)
    writes_parameters: set[str] = field(default_factory=set)
    renormalizes: set[str] = field(default_factory=set)
    sets_attributes: dict[str, set[str]] = field(default_factory=dict)
    outside: set[str] = field(default_factory=set)
    places: dict[str, dict[Place, str]] = field(default_factory=dict)
    writes_inputs: set[bool] = field(default_factory=set)
    averages: bool = False
    checkpoints: bool = False
    questions: bool = False
    hooked: set[str] = field(default_factory=set)

    def merge(self, other: Notes) -> None:
        """Add what another recording has seen."""
        self.random |= other.random
        self.random_functions |= other.random_functions
        self.drawing |= other.drawing
        self.python_random |= other.python_random
        self.writes_buffers |= other.writes_buffers
        self.writes_parameters |= other.writes_parameters
        self.renormalizes |= other.renormalizes
        for name, attributes in other.sets_attributes.items():
            self.sets_attributes.setdefault(name, set()).update(attributes)
        self.outside |= other.outside
        for name, places in other.places.items():
            self.places.setdefault(name, {}).update(places)
        self.writes_inputs |= other.writes_inputs
        self.averages |= other.averages
        self.checkpoints |= other.checkpoints
        self.questions |= other.questions
        self.hooked |= other.hooked

    def written_weights(self) -> set[str]:
        """Return the names of weights that a forward writes."""
        return self.writes_parameters | self.renormalizes

    def stateful(self) -> set[str]:
        """Return the names of modules whose forward changes their state."""
        of_buffers = {name.rpartition(".")[0] for name in self.writes_buffers}
        return of_buffers | self.sets_attributes.keys() | self.outside

    def sharing(self) -> Iterator[tuple[str, list[str]]]:
        """Yield the state that is changed and reached by several modules, and which these are."""
        shared: dict[Place, list[str]] = {}
        texts: dict[Place, str] = {}
        for name, places in self.places.items():
            for place, text in places.items():
                shared.setdefault(place, []).append(name)
                texts[place] = text
        return ((texts[place], names) for place, names in shared.items() if len(names) > 1)


@dataclass(frozen=True)
class LayerGraph:
    """A captured model.

    Attributes:
        module: the model, which owns the weights.
        layers: the layers in a topological order.
        edges: (producer, consumer) pairs of layer numbers.
        training: the forward in training mode, which the layers are made of.
        evaluation: the forward in evaluation mode.
        inputs: the model's arguments: shapes and dtypes, as tensors on the meta device.
        batch_dims: where samples are in them.
        modes: how the model is set to training and to evaluation.
        notes: what else the forward does.
        device: what the forward was recorded for.
        shapes: by mode: returns an output of a call for given arguments, without computing it.
        closed: modules that cannot be cut, and why.
        modules: the modules in the model, by qualified name.
        originals: the weights that the model had at first.
        recipe: creates the weights of a model that was given as a function; None for a built model.
        on_close: what takes hooks and watchers off the model's modules, once no stage runs any more.
    """

    module: nn.Module
    layers: tuple[Layer, ...]
    edges: tuple[tuple[int, int], ...]
    training: Recording
    evaluation: Recording
    inputs: Arguments
    batch_dims: BatchDims
    modes: Modes
    notes: Notes
    device: torch.device
    shapes: Mapping[bool, Callable[[Sequence[Any], Mapping[str, Any], Key], Value]]
    originals: Originals
    closed: Mapping[str, str] = field(default_factory=dict)
    recipe: ModelRecipe | None = None
    modules: Mapping[str, nn.Module] = field(default_factory=dict)
    on_close: list[Callable[[], None]] = field(default_factory=list)

    def own(self, arguments: Arguments) -> Arguments:
        """Return arguments for one run of the forward: copies if it writes into them."""
        return arguments.copied() if self.notes.writes_inputs else arguments

    def check_modules(self) -> None:
        """Refuse a model whose modules are others than those that were captured.

        Raises:
            PipedreamError: a module has been replaced or removed.
        """
        now = dict(self.module.named_modules())
        for name, module in self.modules.items():
            if now.get(name) is not module:
                what = "replaced" if name in now else "removed"
                raise PipedreamError(
                    f"module '{name}' of class {type(module).__name__} has been {what} since the pipeline was made: "
                    "make a new pipeline"
                )

    def close(self) -> None:
        """Leave the model's modules without hooks and watchers of this package."""
        while self.on_close:
            self.on_close.pop()()

    @contextmanager
    def closing(self) -> Iterator[None]:
        """Take hooks and watchers that the block has put on the modules off again when it ends."""
        before = len(self.on_close)
        try:
            yield
        finally:
            while len(self.on_close) > before:
                self.on_close.pop()()


def get_attribute(model: nn.Module, target: str) -> Any:
    """Return the attribute of a model with a qualified name."""
    owner, _, name = target.rpartition(".")
    return getattr(model.get_submodule(owner), name)
