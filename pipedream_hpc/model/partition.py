"""Partition a captured model into stages.

The module of a stage takes the model's arguments and the values it gets from earlier stages. It returns the values
that later stages use; the last stage also returns the model's output::

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

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from torch import nn

from pipedream_hpc.errors import PipedreamError
from pipedream_hpc.model.arguments import Arguments
from pipedream_hpc.model.graph import Call, Key, LayerGraph, Recording, Value, modes_restored
from pipedream_hpc.model.stage_module import StageModule
from pipedream_hpc.planning.plan import Edge

#: What crosses a boundary: a tensor of the graph, or a weight by its qualified name.
Crossing = Value | str


class Partition:
    """A captured model divided into stages.

    Args:
        graph: the captured model.
        stages: the layer numbers of every stage.

    Attributes:
        graph: the captured model.
        edges: the values that are sent over every edge between two stages. Those of one mode alone are sent empty in
            the other.

    Raises:
        PipedreamError: a layer is missing or in two stages, or a stage needs an output of a later one.
    """

    def __init__(self, graph: LayerGraph, stages: Sequence[Sequence[int]]) -> None:
        self.graph, self._last = graph, len(stages) - 1
        stage_of_layer = self._assign_layers(stages)
        of_call = {call.number: stage_of_layer[n] for n, layer in enumerate(graph.layers) for call in layer.calls}
        self._stage_of = {True: [of_call[call.number] for call in graph.training.calls]}
        self._first_names = _first_names(graph.module)
        self._home = self._assign_weights(stage_of_layer)
        self._stage_of[False] = self._assign_evaluation()
        self._crossing = self._find_all_crossing()
        self.edges: dict[Edge, tuple[Value, ...]] = {
            edge: tuple(map(self.value, crossing)) for edge, crossing in sorted(self._crossing.items())
        }

    def stage_module(self, stage: int, *, whole: bool = True) -> StageModule:
        """Create the module of a stage, of the modules of the user's model.

        Args:
            stage: number of the stage.
            whole: keep modules whole in which no boundary lies; otherwise open all that can be opened.
        """
        return StageModule(self, stage, whole=whole)

    def parameters(self, stage: int) -> list[str]:
        """Return the qualified names of the weights that belong to a stage, each under its first name."""
        return [name for name, home in self._home.items() if home == stage]

    # -- used to build stage modules ---------------------------------------------------------------------------------

    def first_name(self, name: str) -> str:
        """Return the first name of a weight that may have several."""
        return self._first_names[name]

    def stage_of(self, training: bool) -> list[int]:
        """Return the stage of every call, in training or in evaluation mode."""
        return self._stage_of[training]

    def received(self, stage: int) -> list[tuple[int, Crossing]]:
        """Return (source stage, what) for everything that a stage receives."""
        return [
            (edge.source, each)
            for edge, crossing in sorted(self._crossing.items())
            if edge.target == stage
            for each in crossing
        ]

    def sent(self, stage: int) -> list[Crossing]:
        """Return what a stage sends to later stages."""
        return _in_order(
            each for edge, found in sorted(self._crossing.items()) if edge.source == stage for each in found
        )

    def keys_of(self, crossing: Sequence[Crossing], training: bool) -> dict[Key, int]:
        """Return the positions in `crossing` by the tensors of one mode's recording."""
        position = {each.name: index for index, each in enumerate(crossing) if not isinstance(each, str)}
        return {
            (call.number, index): position[name]
            for call in self._recording(training).calls
            for index in range(len(call.values))
            if (name := self._name_of((call.number, index), training)) in position
        }

    def home(self, name: str) -> int | None:
        """Return the stage that a weight belongs to, by its first name; None if no call uses it."""
        return self._home.get(name)

    def is_last(self, stage: int) -> bool:
        return stage == self._last

    def value(self, what: Crossing) -> Value:
        """Return shape and dtype of what crosses a boundary."""
        if not isinstance(what, str):
            return what
        parameter = _parameter(self.graph.module, what)
        return Value(what, tuple(parameter.shape), parameter.dtype, parameter.requires_grad, what)

    def evaluated(self, arguments: Arguments) -> dict[Edge, tuple[Value, ...]]:
        """Return what is sent over every edge in an evaluation of other arguments, without computing it."""
        graph = self.graph
        sent = {value.name for values in self.edges.values() for value in values}
        keys = {
            name: (call.number, index)
            for call in graph.evaluation.calls
            for index in range(len(call.values))
            if (name := self._name_of((call.number, index), False)) in sent
        }
        with modes_restored(graph.module):
            shapes = {
                name: graph.shapes[False](arguments.args, arguments.kwargs, key).shape for name, key in keys.items()
            }
        return {
            edge: tuple(replace(value, shape=shapes.get(value.name, value.shape)) for value in values)
            for edge, values in self.edges.items()
        }

    # ----------------------------------------------------------------------------------------------------------------

    def _recording(self, training: bool) -> Recording:
        return self.graph.training if training else self.graph.evaluation

    def _assign_layers(self, stages: Sequence[Sequence[int]]) -> dict[int, int]:
        """Return the stage of every layer, after checking the stages."""
        layers = self.graph.layers
        stage_of: dict[int, int] = {}
        for stage, numbers in enumerate(stages):
            for number in numbers:
                if number in stage_of:
                    raise PipedreamError(f"layer '{layers[number].name}' is in stages {stage_of[number]} and {stage}")
                stage_of[number] = stage
        missing = [layer.name for number, layer in enumerate(layers) if number not in stage_of]
        if missing:
            raise PipedreamError(f"no stage has layer '{missing[0]}'")
        for producer, consumer in self.graph.edges:
            if stage_of[producer] > stage_of[consumer]:
                raise PipedreamError(
                    f"layer '{layers[consumer].name}' in stage {stage_of[consumer]} needs layer "
                    f"'{layers[producer].name}', which is in the later stage {stage_of[producer]}"
                )
        return stage_of

    def _assign_weights(self, stage_of_layer: Mapping[int, int]) -> dict[str, int]:
        """Return the stage that every weight belongs to, by the first name: the first stage that uses it."""
        home: dict[str, int] = {}
        for number, layer in enumerate(self.graph.layers):
            for name in layer.parameters:
                first = self._first_names[name]
                home[first] = min(home.get(first, stage_of_layer[number]), stage_of_layer[number])
        return home

    def _assign_evaluation(self) -> list[int]:
        """Return the stage of every call in evaluation mode: that of the same call in training."""
        training, evaluation = self.graph.training.calls, self.graph.evaluation.calls
        if len(training) == len(evaluation) and all(map(_same_call, training, evaluation)):
            return self._stage_of[True]
        numbered: dict[tuple[str, int], int] = {}
        counts: dict[str, int] = defaultdict(int)
        for call in training:
            if call.module is not None:
                numbered[call.name, counts[call.name]] = self._stage_of[True][call.number]
                counts[call.name] += 1
        counts.clear()
        stages: list[int] = []
        for call in evaluation:
            needed = [stages[number] for number, _ in call.sources]
            needed += [
                self._home[self._first_names[name]] for name in call.parameters if self._first_names[name] in self._home
            ]
            stage = max(needed, default=0)
            if call.module is not None:
                same = numbered.get((call.name, counts[call.name]))
                counts[call.name] += 1
                stage = stage if same is None else max(stage, same)
            stages.append(stage)
        return stages

    def _find_all_crossing(self) -> dict[Edge, list[Crossing]]:
        """Return what crosses every edge, in the order of the message: weights first, then what training needs."""
        found = {mode: self._find_crossing(mode) for mode in (True, False)}
        training = (
            (self.graph.training.value(each), edge.source)
            for edge, keys in found[True].items()
            for each in keys
            if type(each) is tuple
        )
        self._in_training = {value.name: (value, source) for value, source in training}
        crossing: dict[Edge, list[Crossing]] = defaultdict(list)
        for mode, of_mode in found.items():
            for edge, keys in of_mode.items():
                crossing[edge] += [self._slot(each, mode) for each in keys]
        # Every stage has an edge from an earlier stage and an edge to a later one, even if no tensor crosses it:
        # schedules order the stages by their messages.
        for stage in range(1, self._last + 1):
            if not any(edge.target == stage for edge in crossing):
                crossing[Edge(stage - 1, stage)] = []
        for stage in range(self._last):
            if not any(edge.source == stage for edge in crossing):
                crossing[Edge(stage, stage + 1)] = []
        return {edge: _in_order(each) for edge, each in crossing.items()}

    def _slot(self, what: Key | str, training: bool) -> Crossing:
        """Return under which name, and with which shape and dtype, something travels."""
        if isinstance(what, str):
            return what
        name = self._name_of(what, training)
        if name in self._in_training:
            return self._in_training[name][0]
        return replace(self._recording(training).value(what), name=name, needs_gradient=False)

    def _name_of(self, key: Key, training: bool) -> str:
        """Return the name under which a tensor of one mode's recording travels, if it does.

        What the same stage passes on in training as well travels in the same place.
        """
        value = self._recording(training).value(key)
        if training:
            return value.name
        same, source = self._in_training.get(value.name, (None, None))
        fits = same is not None and same.dtype == value.dtype and _is_within(value.shape, same.shape)
        return value.name if fits and source == self._stage_of[False][key[0]] else f"{value.name} in evaluation"

    def _find_crossing(self, training: bool) -> dict[Edge, list[Key | str]]:
        """Return what crosses every edge in one mode, weights first."""
        recording, stage_of = self._recording(training), self._stage_of[training]
        crossing: dict[Edge, set[Key | str]] = defaultdict(set)
        for call in recording.calls:
            stage = stage_of[call.number]
            for key in call.sources:
                if stage_of[key[0]] != stage:
                    crossing[Edge(stage_of[key[0]], stage)].add(key)
            for name in call.parameters:
                home = self._home.get(self._first_names[name], stage)
                if home != stage:
                    crossing[Edge(home, stage)].add(self._first_names[name])
        for key in recording.output:
            if stage_of[key[0]] != self._last:
                crossing[Edge(stage_of[key[0]], self._last)].add(key)
        for name in recording.returned_parameters:
            home = self._home.get(self._first_names[name], self._last)
            if home != self._last:
                crossing[Edge(home, self._last)].add(self._first_names[name])
        return {
            edge: sorted(found, key=lambda each: (not isinstance(each, str), each)) for edge, found in crossing.items()
        }


def _same_call(one: Call, other: Call) -> bool:
    return (one.name, one.module, one.sources, one.parameters) == (
        other.name,
        other.module,
        other.sources,
        other.parameters,
    )


def _in_order(found: Iterable[Crossing]) -> list[Crossing]:
    """Return each once, weights first."""
    once = {each if isinstance(each, str) else each.name: each for each in found}
    return sorted(once.values(), key=lambda each: not isinstance(each, str))


def _is_within(shape: Sequence[int], other: Sequence[int]) -> bool:
    return len(shape) == len(other) and all(own <= most for own, most in zip(shape, other, strict=True))


def _first_names(model: nn.Module) -> dict[str, str]:
    """Return the first name of every parameter by each of its names."""
    first: dict[int, str] = {}
    return {
        name: first.setdefault(id(parameter), name)
        for name, parameter in model.named_parameters(remove_duplicate=False)
    }


def _parameter(model: nn.Module, name: str) -> nn.Parameter:
    owner, _, key = name.rpartition(".")
    found = model.get_submodule(owner)._parameters[key]
    assert found is not None
    return found
