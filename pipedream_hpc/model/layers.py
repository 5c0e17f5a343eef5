"""Group the calls of a captured model into layers, which always stay in one stage.

Every call of a module, of a function with weights or of one that combines several tensors starts a layer. Cheap
functions join the layer they follow::

    conv ── relu ──┬── conv+relu ── conv ──┬── add+relu ── pool
                   └───────────────────────┘
    layers   0  1         2           3           4          5        edges 0-1 1-2 2-3 3-4 1-4 4-5

A layer always ends where a single tensor is live between two calls, so a plain chain has one layer per module.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterable, Mapping, Sequence
from itertools import takewhile

from torch import nn

from pipedream_hpc.model.graph import Call, Layer, Recording


def group_into_layers(
    model: nn.Module, recording: Recording, stateful: Collection[str], sharing: Iterable[Collection[str]] = ()
) -> tuple[tuple[Layer, ...], tuple[tuple[int, int], ...]]:
    """Return the layers in a topological order, and the edges between them.

    Args:
        model: the captured model.
        recording: its forward in training mode.
        stateful: qualified names of modules whose forward changes their state; all calls of such a module are in one
            layer.
        sharing: names of modules that change and reach the same state; all their calls are in one layer, too.
    """
    groups = _Grouping(recording, [*({name} for name in stateful), *sharing]).run()
    parameters = dict(model.named_parameters(remove_duplicate=False))
    layers = [_layer(model, recording, calls, parameters) for calls in groups]
    if layers and recording.returned_parameters:
        # A weight that the model itself returns is the output stage's, unless a call uses it.
        used = {id(parameters[name]) for layer in layers for name in layer.parameters}
        returned = [name for name in recording.returned_parameters if id(parameters[name]) not in used]
        layers[-1] = _with_parameters(layers[-1], returned, parameters)
    return _with_unique_names(layers), _edges(groups)


class _Grouping:
    """Groups calls into layers, by union-find."""

    def __init__(self, recording: Recording, together: Sequence[Collection[str]]) -> None:
        self._calls, self._together = recording.calls, together
        self._leader = list(range(len(self._calls)))  # of each call's group
        self._sources = [sorted({number for number, _ in call.sources}) for call in self._calls]
        self._users: list[list[int]] = [[] for _ in self._calls]
        for call in self._calls:
            for source in self._sources[call.number]:
                self._users[source].append(call.number)
        self._returned = {number for number, _ in recording.output}

    def run(self) -> list[tuple[Call, ...]]:
        """Return the calls of every layer, in a topological order of the layers."""
        self._join_written()
        self._join_stateful()
        self._join_inseparable()
        for block in self._blocks():
            self._join_cheap(block)
        groups: dict[int, list[Call]] = {}
        for call in self._calls:
            groups.setdefault(self._find(call.number), []).append(call)
        return self._ordered([tuple(calls) for calls in groups.values()])

    def _blocks(self) -> list[list[int]]:
        """Return the runs of calls between points where a single float tensor is live."""
        blocks, current = [], []
        pending: dict[int, int] = {}  # live call -> uses still to come
        for call in self._calls:
            for source in self._sources[call.number]:
                if source in pending:
                    pending[source] -= 1
                    if not pending[source]:
                        del pending[source]
            pending[call.number] = len(self._users[call.number]) + (call.number in self._returned)
            current.append(call.number)
            single = len(call.values) == 1 and call.values[0].dtype.is_floating_point
            if list(pending) == [call.number] and single:
                blocks.append(current)
                current = []
        return [*blocks, current] if current else blocks

    def _join_cheap(self, block: list[int]) -> None:
        if len(block) == 1:
            return  # between two single tensors: a layer of its own
        for number in block:
            call, sources = self._calls[number], self._sources[number]
            if sources and not self._users[number] and number not in self._returned:
                self._join([number, sources[-1]])  # only its shape is used
            elif not sources:
                # Made of weights and constants only: it joins its first user.
                if call.module is None and not call.takes_inputs and self._users[number]:
                    self._join([number, self._users[number][0]])
            elif len(sources) == 1 and _is_cheap(call) and self._users[sources[0]] == [number]:
                self._join([number, sources[0]])

    def _join_written(self) -> None:
        """Join the calls that read a tensor before and after it is written in place.

        This is not needed where every call has a single user: then no one can observe the difference.
        """
        for writer in self._calls:
            for memory in writer.writes:
                seen = [call.number for call in self._calls[: writer.number] if memory in call.memory]
                if any(len(self._users[number]) > 1 for number in seen):
                    self._join(range(seen[0], writer.number + 1))

    def _join_stateful(self) -> None:
        """Join all calls of modules whose forwards change the same state: the state is in one stage."""
        for names in self._together:
            numbers = [call.number for call in self._calls if call.module is not None and call.name in names]
            if len(numbers) > 1:
                self._join(range(numbers[0], numbers[-1] + 1))

    def _join_inseparable(self) -> None:
        """Join the calls that run again together in backward, those that the forward takes gradients of, and those
        that take tensors of sizes that values have chosen.
        """
        parts: dict[int, list[int]] = {}
        for call in self._calls:
            if call.checkpoint is not None:
                parts.setdefault(call.checkpoint, []).append(call.number)
            self._join([call.number, *call.differentiates, *call.stays_with])
        for numbers in parts.values():
            self._join(numbers)

    def _ordered(self, groups: list[tuple[Call, ...]]) -> list[tuple[Call, ...]]:
        """Return the groups in a topological order; groups that need each other are merged until there is one."""
        while True:
            of = {call.number: index for index, calls in enumerate(groups) for call in calls}
            needs: list[set[int]] = [set() for _ in groups]
            for call in self._calls:
                needs[of[call.number]].update(of[s] for s in self._sources[call.number] if of[s] != of[call.number])
            order: list[int] = []
            left = sorted(range(len(groups)), key=lambda index: groups[index][0].number)
            while left:
                free = next((index for index in left if not needs[index] & set(left)), None)
                if free is None:
                    break
                left.remove(free)
                order.append(free)
            if not left:
                return [groups[index] for index in order]
            together = sorted((call for index in left for call in groups[index]), key=lambda call: call.number)
            groups = [groups[index] for index in order] + [tuple(together)]

    def _find(self, index: int) -> int:
        while self._leader[index] != index:
            self._leader[index] = self._leader[self._leader[index]]
            index = self._leader[index]
        return index

    def _join(self, numbers: Sequence[int]) -> None:
        first, *others = (self._find(number) for number in numbers)
        for other in others:
            self._leader[self._find(other)] = first = self._find(first)


#: Functions and methods that take almost no time.
_CHEAP = frozenset(
    (
        *("relu", "relu_", "leaky_relu", "gelu", "silu", "elu", "selu", "sigmoid", "tanh", "softplus", "hardtanh"),
        *("softmax", "log_softmax", "dropout", "masked_fill", "masked_fill_", "neg", "exp", "log", "sqrt", "rsqrt"),
        *("add", "sub", "mul", "div", "truediv", "pow", "mean", "sum", "float", "to", "type_as", "clone", "detach"),
        *("view", "reshape", "flatten", "permute", "transpose", "t", "contiguous", "squeeze", "unsqueeze", "expand"),
        *("chunk", "split", "getitem", "iadd", "imul", "add_", "mul_", "radd", "rmul", "rsub"),
    )
)


def _is_cheap(call: Call) -> bool:
    return call.module is None and not call.parameters and call.kind in _CHEAP


def _edges(groups: Sequence[tuple[Call, ...]]) -> tuple[tuple[int, int], ...]:
    of = {call.number: index for index, calls in enumerate(groups) for call in calls}
    pairs = {
        (of[source], index)
        for index, calls in enumerate(groups)
        for call in calls
        for source, _ in call.sources
        if of[source] != index
    }
    return tuple(sorted(pairs))


def _layer(model: nn.Module, recording: Recording, calls: tuple[Call, ...], named: Mapping[str, nn.Parameter]) -> Layer:
    modules = [call.name for call in calls if call.module is not None]
    if len(modules) == 1:
        name, kind = modules[0], type(model.get_submodule(modules[0])).__name__
        name = name or kind
    else:
        # A block is named after the deepest module that contains all of it, a function after itself.
        columns = zip(*(target.split(".") for target in modules), strict=False)
        prefix = [parts[0] for parts in takewhile(lambda parts: len(set(parts)) == 1, columns)]
        name = ".".join(prefix) or calls[0].name
        kind = type(model.get_submodule(name)).__name__ if prefix else calls[0].kind
    own = {call.number for call in calls}
    shown = {key for call in recording.calls if call.number not in own for key in call.sources if key[0] in own}
    shown.update(key for key in recording.output if key[0] in own)
    values = [recording.value(key) for key in sorted(shown)]
    single = values[0] if len(values) == 1 else None
    layer = Layer(
        name=name,
        kind=kind,
        calls=calls,
        parameters=(),
        parameter_bytes=0,
        output_bytes=sum(value.nbytes for value in values),
        output_shape=None if single is None else single.shape,
        output_dtype=None if single is None else single.dtype,
        flops=sum(call.flops for call in calls),
    )
    return _with_parameters(layer, [name for call in calls for name in call.parameters], named)


def _with_parameters(layer: Layer, names: Sequence[str], named: Mapping[str, nn.Parameter]) -> Layer:
    """Return the layer with these parameters as well."""
    every = tuple(dict.fromkeys([*layer.parameters, *names]))
    distinct = {id(named[name]): named[name] for name in every}
    nbytes = sum(parameter.nbytes for parameter in distinct.values() if parameter.requires_grad)
    return dataclasses.replace(layer, parameters=every, parameter_bytes=nbytes)


def _with_unique_names(layers: list[Layer]) -> tuple[Layer, ...]:
    """Number the layers of a module that is called more than once, as in `fc@2`."""
    seen: dict[str, int] = {}
    named = []
    for layer in layers:
        seen[layer.name] = seen.get(layer.name, 0) + 1
        name = layer.name if seen[layer.name] == 1 else f"{layer.name}@{seen[layer.name]}"
        for call in layer.calls:
            call.values = tuple(dataclasses.replace(value, layer=name) for value in call.values)
        named.append(dataclasses.replace(layer, name=name))
    return tuple(named)
