"""StageModule: what one stage has of the user's model, and how it runs it.

A stage has no copies: it runs the user's own modules. The tree of its weights and buffers has the user's names::

    model            stage 0         stage 1
    ├─ embed         embed
    ├─ blocks        blocks          blocks
    │  ├─ 0          └─ 0            │
    │  └─ 1                          └─ 1
    └─ head                          head
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from pipedream_hpc.model.arguments import Arguments
from pipedream_hpc.model.calls import Applied, watch_modules
from pipedream_hpc.model.checkpoints import checkpoints
from pipedream_hpc.model.graph import Call, LayerGraph, modes_restored
from pipedream_hpc.model.originals import Originals
from pipedream_hpc.model.outside_state import OutsideState
from pipedream_hpc.model.placeholder import Placeholder
from pipedream_hpc.model.preserve_state import Contents, contents_restored
from pipedream_hpc.model.randomness import seeding_from_here
from pipedream_hpc.model.recipe import TensorPlace, tensors_of
from pipedream_hpc.model.rerun import INPUT, StageForward, Step, steps_of
from pipedream_hpc.model.structure import map_tensors

if TYPE_CHECKING:
    from pipedream_hpc.model.partition import Partition

#: (container, key) of an entry that refers to a parameter: in a module's `_parameters`, or in the list of weights that
#: a recurrent layer keeps as well.
Entry = tuple[Any, Any]


class _Part(nn.Module):
    """Holds a stage's weights and buffers of one module of the user's, under the module's name."""


class StageTree(_Part):
    """The weights and buffers of a stage, under the user's names.

    Attributes:
        extra: the user's modules in the stage that have a state besides (get_extra_state), by the name of that state.
    """

    def __init__(self) -> None:
        super().__init__()
        self.extra: dict[str, nn.Module] = {}


class StageModule:
    """The module of one stage, and what it takes and returns.

    Attributes:
        module: the weights and buffers of the stage, under the user's names. It is not called.
        modules: the user's modules that run in this stage, those in them included.
        entries: name of each weight of the stage -> where modules refer to it.
        reads_inputs: whether it needs the model's arguments.
        stage_inputs: (source stage, value) for every value from an earlier stage, by stage, then in model order.
        stage_outputs: values that later stages use, in model order.
        is_last: whether it is the last stage, which returns the model's output.
        written_inputs: positions of stage inputs that the stage writes into in place.
        state: (container, key) of what forwards change, besides running statistics.
        runs_modules_in_backward: whether an autograd.Function of the stage calls modules, as reversible layers do.
        takes_gradients: whether forwards take gradients of their own, in evaluation as well.
        bound: what the entries point at; replicas in one process have it in common (see WeightStash).
    """

    def __init__(self, partition: Partition, stage: int, *, whole: bool = True) -> None:
        self._partition, self._stage, self._whole = partition, stage, whole
        self._graph: LayerGraph = partition.graph
        self._model = self._graph.module
        received = partition.received(stage)
        self.is_last = partition.is_last(stage)
        self.stage_inputs = tuple((source, partition.value(each)) for source, each in received)
        self._sent = partition.sent(stage)
        self.stage_outputs = tuple(partition.value(each) for each in self._sent)
        self._steps: list[Step] = []  # in both modes
        self._opened: set[int] = set()
        self._entries = entries_by_weight(self._model)
        self._forwards = {mode: self._forward(mode) for mode in (True, False)}
        self._running = self._forwards[True]
        self.modules = self._own_modules()
        self.module, self.entries = self._tree()
        self._borrowed = [
            (position, self._entries_of(each)) for position, (_, each) in enumerate(received) if isinstance(each, str)
        ]
        self._sent_weights = [(slot, each) for slot, each in enumerate(self._sent) if isinstance(each, str)]
        self.written_inputs = self._find_written(received)
        self._nothing = map_tensors(
            lambda _: Placeholder.make(INPUT), (self._graph.inputs.args, self._graph.inputs.kwargs)
        )
        # A number or a text of the minibatch may decide or scale anything anywhere.
        self.reads_inputs = self._graph.inputs.has_values() or self._needs_inputs()
        self._outside: dict[str, nn.Module] = {}  # modules that change more than what they hold, and those in them
        self.state = self._find_state()
        self.runs_modules_in_backward = any(
            step.own and isinstance(step.function, Applied) and isinstance(step.item, Call) and step.item.entered
            for step in self._steps
        )
        self.takes_gradients = any(step.own and step.function is torch.autograd.grad for step in self._steps)
        self.bound: list[Any] = [None]
        self._checkpoints = self._graph.notes.checkpoints
        self._private: list[tuple[dict[str, Any], dict[str, Any]]] = []

    def _needs_inputs(self) -> bool:
        needed = []
        with modes_restored(self._model), contents_restored(self._model):
            for training, forward in self._forwards.items():
                self._graph.modes.set(self._model, training)
                needed.append(forward.needs_inputs(*self._nothing))
        return any(needed)

    def train(self, training: bool) -> None:
        """Set the user's model to training or evaluation."""
        self._graph.modes.set(self._model, training)
        self._running = self._forwards[training]

    def run(self, arguments: Arguments | None, received: Sequence[torch.Tensor]) -> tuple[list[Any], Any]:
        """Run the stage's part of the forward; modules hold borrowed weights during the call.

        Args:
            arguments: the model's arguments; None if the stage does not need them.
            received: the stage inputs.

        Returns:
            the stage outputs, where None is what this mode does not compute; and the model's output, in the last stage.
        """
        args, kwargs = self._nothing
        if arguments is not None:
            own = self._graph.own(arguments)
            args, kwargs = own.args, own.kwargs
        if self._borrowed or self._private or self._checkpoints:
            borrowed = [(*entry, received[position]) for position, entries in self._borrowed for entry in entries]
            with self._holding(borrowed), checkpoints(self._checkpointed) if self._checkpoints else nullcontext():
                outputs, returned = self._running(args, kwargs, received)
        else:  # entering contexts takes microseconds
            outputs, returned = self._running(args, kwargs, received)
        for slot, name in self._sent_weights:
            container, key = self.entries[name][0]
            outputs[slot] = container[key]
        return outputs, returned

    @contextmanager
    def _holding(self, weights: Sequence[tuple[Any, Any, Any]]) -> Iterator[None]:
        """Let modules refer to these weights, given as (container, key, weight), and to the stage's own buffers."""
        before = [(container, key, container[key]) for container, key, _ in weights]
        for container, key, weight in weights:
            container[key] = weight
        for real, own in self._private:
            before += [(real, key, real[key]) for key in own]
            real.update(own)
        try:
            yield
        finally:
            for real, own in self._private:
                own.update((key, real[key]) for key in own)
            for container, key, value in reversed(before):
                container[key] = value

    @contextmanager
    def _checkpointed(self, arguments: Any) -> Iterator[Callable[[Any], AbstractContextManager[None]]]:
        """Make a part of the forward run again, in backward, on the weights and with the draws of now."""
        borrowed = [entries for _, entries in self._borrowed]
        entries = [entry for each in (*self.entries.values(), *borrowed) for entry in each]
        weights = [(container, key, container[key]) for container, key in entries]
        seeded = seeding_from_here()
        with self._running.checkpointed(arguments) as calls:

            @contextmanager
            def again(arguments: Any) -> Iterator[None]:
                with self._holding(weights), seeded(), calls(arguments):
                    yield

            yield again

    def move_tensors(self, device: torch.device) -> None:
        """Move all tensors that the stage needs besides its weights to a device, on which it will compute."""
        for forward in self._forwards.values():
            forward.device = device
        move_tensors(self.other_tensors().values(), device)

    def move_weights(self, device: torch.device) -> None:
        """Move the stage's weights to a device, before a stash holds them."""
        for (container, key), *_ in self.entries.values():
            container[key].data = container[key].data.to(device)

    def _find_state(self) -> list[tuple[dict[str, Any], str]]:
        """Return where the stage's modules hold what their forwards change, but for running statistics.

        The statistics of a normalization layer are not read in training.
        """
        notes, found = self._graph.notes, list[tuple[dict[str, Any], str]]()
        for name, module in self._model.named_modules():
            if module not in self._own and id(module) not in self._opened:
                continue
            changed = {key for key in module._buffers if (f"{name}.{key}" if name else key) in notes.writes_buffers}
            if changed and not getattr(module, "track_running_stats", False):
                found += [(self.module.get_submodule(name)._buffers, key) for key in sorted(changed)]
            found += [(vars(module), key) for key in sorted(notes.sets_attributes.get(name, ())) if key in vars(module)]
            if name in notes.outside:
                self._outside.update(
                    (f"{name}.{path}" if path else name, each) for path, each in module.named_modules()
                )
        return [*found, (self._outside, "")] if self._outside else found

    def keep_state(self) -> list[Any]:
        """Return the state that a forward is about to change; the forward changes copies of its tensors.

        So what autograd saves of one microbatch is not changed by the next one, and the forward can run again from the
        same state.
        """
        kept: list[Any] = []
        for held, key in self.state:
            if held is self._outside:
                kept.append(OutsideState(self._model, self._outside))
                continue
            value = held[key]
            if isinstance(value, torch.Tensor):
                held[key] = value.clone()
            elif not isinstance(value, int | float):
                value = Contents(value)
                value.replace_tensors()
            kept.append(value)
        return kept

    @contextmanager
    def state_of(self, kept: list[Any]) -> Iterator[None]:
        """Run a forward again from the state that it began with."""
        now = [
            OutsideState(self._model, self._outside)
            if held is self._outside
            else Contents(held[key])
            if isinstance(value, Contents)
            else held[key]
            for (held, key), value in zip(self.state, kept, strict=True)
        ]
        for (held, key), value in zip(self.state, kept, strict=True):
            if isinstance(value, OutsideState):
                value.restore()
            elif isinstance(value, Contents):
                value.restore()
                value.replace_tensors()
            else:
                held[key] = value.clone() if isinstance(value, torch.Tensor) else value
        try:
            yield
        finally:
            for (held, key), value in zip(self.state, now, strict=True):
                if isinstance(value, Contents | OutsideState):
                    value.restore()
                else:
                    held[key] = value

    @property
    def place(self) -> tuple[int, bool, str]:
        """Where the forward is that runs (see StageForward.place)."""
        return self._running.place

    def drawing_python(self) -> dict[str, nn.Module]:
        """Return the modules of this stage whose own code draws random numbers of Python or NumPy, by name."""
        drawing = self._graph.notes.python_random
        return {name: module for name, module in self._model.named_modules() if module in self._own and name in drawing}

    def stateful_modules(self) -> list[str]:
        """Return the names of modules that run in this stage and keep state of their own from forward to forward."""
        notes = self._graph.notes
        return [
            name
            for name, module in self._model.named_modules()
            if module in self._own and name in notes.stateful() and not getattr(module, "track_running_stats", False)
        ]

    def add_loss(self, loss_fn: Any) -> None:
        """Give the stage the weights and buffers of a loss that is a module, under the name `loss_fn`."""
        if not isinstance(loss_fn, nn.Module):
            return
        by_weight = entries_by_weight(loss_fn)
        known = {id(container[key]): name for name, ((container, key), *_) in self.entries.items()}
        for path, module in loss_fn.named_modules():
            name = f"loss_fn.{path}" if path else "loss_fn"
            own = {
                key: each
                for key, each in module._parameters.items()
                if each is not None and id(each) not in self._entries
            }
            if not own and not module._buffers:
                continue
            part = _part_at(self.module, name)
            part._parameters.update(own)
            part._buffers = module._buffers
            part._non_persistent_buffers_set = module._non_persistent_buffers_set
            for key, each in own.items():
                first = known.setdefault(id(each), f"{name}.{key}")
                entries = self.entries.setdefault(first, list(by_weight[id(each)]))
                entries.append((part._parameters, key))
        for weight, entries in by_weight.items():
            if weight in known and weight in self._entries:  # a weight of the model that the loss has as well
                self.entries[known[weight]] += entries

    def weights_of_others(self) -> dict[int, str]:
        """Return the weights and buffers of other stages, as they are in the model now: identity -> name."""
        own = set(self.entries) | {place.name for place in self.other_tensors().values()}
        named = [*self._model.named_parameters(), *self._model.named_buffers()]
        return {id(each): name for name, each in named if name not in own}

    @property
    def originals(self) -> Originals:
        """The weights that the user's model had at first."""
        return self._graph.originals

    def name_of(self, leaf: torch.Tensor) -> str:
        """Return a text that names a leaf of autograd's graph that is none of the stage's weights."""
        for name, parameter in self._model.named_parameters():
            if parameter is leaf:
                return f"'{name}'"
        original = self.originals.name_of(leaf)
        return f"a tensor of shape {tuple(leaf.shape)}" if original is None else f"'{original}'"

    def watch_calls(self, after: Callable[[Step, Sequence[torch.Tensor | None]], None] | None) -> None:
        """Call `after` with every call of the stage and its outputs (see StageForward.after); None to end it."""
        for forward in self._forwards.values():
            forward.after = after

    def compile(self, backend: str) -> None:
        """Compile the modules that run in this stage with a backend of torch.compile."""
        compiled: dict[tuple[nn.Module, ...], Callable[..., Any]] = {}
        for step in self._steps:
            if not step.own or step.module is None or step.done:
                continue
            modules = step.chain or (step.module,)
            if modules not in compiled:
                called = nn.Sequential(*modules) if step.chain else step.module
                called.train(step.module.training)
                compiled[modules] = torch.compile(called, backend=backend)
            for forward in self._forwards.values():
                forward.replacements[id(step)] = compiled[modules]

    def running_stats(self) -> list[torch.Tensor]:
        """Return this stage's buffers of the layers that track running statistics."""
        names = {name: module for name, module in self._model.named_modules() if module in self._own}
        return [
            buffer
            for name, module in names.items()
            if getattr(module, "track_running_stats", False)
            for buffer in self.module.get_submodule(name)._buffers.values()
            if buffer is not None
        ]

    def share_with(self, other: StageModule) -> None:
        """Run the same modules as `other`, a replica in the same process, with buffers of its own."""
        self.bound = other.bound
        for each in (self, other):
            if not each._private:
                each._separate_state()

    def _separate_state(self) -> None:
        """Give the stage buffers of its own."""
        for name, module in self._model.named_modules():
            if module._buffers and (module in self._own or id(module) in self._opened):
                part = self.module.get_submodule(name)
                part._buffers = {k: None if each is None else each.clone() for k, each in module._buffers.items()}
                self._private.append((module._buffers, part._buffers))
        self.state = self._find_state()

    def other_tensors(self) -> dict[str, TensorPlace]:
        """Return the tensors of the user's modules that the stage needs besides its weights, by name."""
        return {
            place.name: place
            for place in tensors_of(self._model)
            if not isinstance(place.tensor, nn.Parameter)
            and (place.owner in self._own or id(place.owner) not in self._elsewhere)
        }

    # ----------------------------------------------------------------------------------------------------------------

    def _forward(self, training: bool) -> StageForward:
        partition, graph = self._partition, self._graph
        recording = graph.training if training else graph.evaluation
        slots = partition.keys_of(self._sent, training)
        received = partition.keys_of([each for _, each in partition.received(self._stage)], training)
        steps, opened = steps_of(
            recording,
            partition.stage_of(training),
            self._stage,
            slots,
            received,
            graph.notes,
            whole=self._whole,
        )
        called = [step.module for step in steps if step.module is not None]
        containers = [module for module in graph.module.modules() if id(module) in opened]
        # Those that example_inputs does not reach, too: if a minibatch reaches one, its weights are in no stage.
        known = opened | {id(inner) for each in called for inner in each.modules()}
        others = [module for module in graph.module.modules() if id(module) not in known]
        graph.on_close.append(watch_modules([*called, *containers, *others]))
        self._steps += steps
        self._opened |= opened
        return StageForward(
            graph.module,
            steps,
            opened,
            len(self._sent),
            is_last=self.is_last,
            functions=any(step.function is not None for step in steps)
            or graph.notes.questions
            or bool(graph.notes.random_functions),
            drawing=frozenset(graph.notes.drawing),
            shapes=graph.shapes[training],
            device=graph.device,
        )

    def _own_modules(self) -> tuple[nn.Module, ...]:
        own: dict[nn.Module, None] = {}
        elsewhere: set[int] = set()
        for step in self._steps:
            called = [] if step.module is None else list(step.module.modules())
            if step.function is not None and isinstance(step.item, Call):
                called += map(self._model.get_submodule, step.item.entered)
            if step.own:
                own.update(dict.fromkeys(called))
            else:
                elsewhere.update(map(id, called))
        self._own, self._elsewhere = own, elsewhere
        return tuple(own)

    def _tree(self) -> tuple[StageTree, dict[str, list[Entry]]]:
        """Return the tree of weights and buffers, and the entries of the weights."""
        partition, model = self._partition, self._model
        root = StageTree()
        entries: dict[str, list[Entry]] = {}
        for path, module in model.named_modules():
            weights = {}
            for key, parameter in module._parameters.items():
                name = partition.first_name(f"{path}.{key}" if path else key) if parameter is not None else ""
                home = partition.home(name) if name else None
                if parameter is None:
                    continue
                if home == self._stage or (home is None and module in self._own):
                    weights[key] = parameter
                    entries.setdefault(name, [])
            here = module in self._own or id(module) not in self._elsewhere
            if here and type(module).get_extra_state is not nn.Module.get_extra_state:
                root.extra[f"{path}._extra_state" if path else "_extra_state"] = module
            buffers = {} if id(module) in self._elsewhere and module not in self._own else module._buffers
            if not weights and not buffers:
                continue
            part = _part_at(root, path)
            part._parameters.update(weights)
            part._buffers = buffers
            part._non_persistent_buffers_set = module._non_persistent_buffers_set
        parts = entries_by_weight(root)
        for name in entries:
            entries[name] = [*self._entries_of(name), *parts[id(self._model_parameter(name))]]
        return root, entries

    def _model_parameter(self, name: str) -> nn.Parameter:
        owner, _, key = name.rpartition(".")
        found = self._model.get_submodule(owner)._parameters[key]
        assert found is not None
        return found

    def _entries_of(self, name: str) -> list[Entry]:
        """Return where the user's modules refer to a weight."""
        return self._entries[id(self._model_parameter(name))]

    def _find_written(self, received: Sequence[tuple[int, Any]]) -> frozenset[int]:
        """Return the positions of stage inputs that calls of the stage write into."""
        calls, stage_of = self._graph.training.calls, self._partition.stage_of(True)
        written = {memory for call in calls if stage_of[call.number] == self._stage for memory in call.writes}
        keys = self._partition.keys_of([each for _, each in received], True)
        return frozenset(position for key, position in keys.items() if calls[key[0]].memory & written)


def move_tensors(places: Iterable[TensorPlace], device: torch.device) -> None:
    """Move tensors that are no parameters to a device."""
    moved: dict[int, torch.Tensor] = {}
    for place in places:
        if isinstance(place.tensor, nn.Parameter):
            continue
        # A tensor with several names stays one tensor.
        value = moved.setdefault(id(place.tensor), place.tensor.to(device))
        place.container[place.attribute] = value


def _part_at(root: nn.Module, path: str) -> nn.Module:
    part = root
    for name in path.split(".") if path else ():
        if name not in part._modules:
            part._modules[name] = _Part()
        found = part._modules[name]
        assert found is not None
        part = found
    return part


def entries_by_weight(model: nn.Module) -> dict[int, list[Entry]]:
    """Return where modules refer to each parameter, by its identity."""
    found: dict[int, list[Entry]] = {}
    for module in model.modules():
        for key, parameter in module._parameters.items():
            if parameter is not None:
                found.setdefault(id(parameter), []).append((module._parameters, key))
        # Recurrent layers look their weights up in a list of their own.
        for position, parameter in enumerate(getattr(module, "_flat_weights", None) or ()):
            if parameter is not None:
                found.setdefault(id(parameter), []).append((module._flat_weights, position))
    return found


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
