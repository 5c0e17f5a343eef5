"""Record the calls of a model's own forward, on tensors without values.

The model's Python runs as it is. Modules that may be cut are opened: their forward runs, and each call in it is
recorded. All others are kept whole: what is inside does not matter. What a forward computes from its arguments alone,
such as a mask, is computed with their values; everything else has none, so a module whose own Python reads values, as
`if h.sum() > 0`, cannot be opened and is kept whole.
"""

from __future__ import annotations

import logging
import random
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Set
from contextlib import AbstractContextManager, contextmanager, nullcontext
from types import MappingProxyType
from typing import Any

import numpy
import torch
from torch import nn
from torch._subclasses import fake_tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.autograd.grad_mode import _unsafe_preserve_version_counter
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map
from torch.utils.flop_counter import flop_registry

from pipedream_hpc.errors import PipedreamError
from pipedream_hpc.garbage import no_collection
from pipedream_hpc.model.averages import AVERAGES_TARGETS, divisor_of, is_loss
from pipedream_hpc.model.calls import call_unwatched, watch_modules, watched
from pipedream_hpc.model.checkpoints import checkpoints
from pipedream_hpc.model.drawn import DRAWING, Drawn, draws_numbers, python_generators
from pipedream_hpc.model.functions import READS_VALUES, function_name, line_of_user
from pipedream_hpc.model.graph import (
    Call,
    Found,
    Key,
    Notes,
    Recording,
    Returned,
    Scope,
    Value,
    memory_order,
)
from pipedream_hpc.model.outside_state import Change, OutsideState, settle
from pipedream_hpc.model.placeholder import kept_of_another_forward
from pipedream_hpc.model.preserve_state import STATE, Contents, ModuleState, contents_of
from pipedream_hpc.model.ragged import Ragged, deciding
from pipedream_hpc.model.randomness import is_seeding, seeding
from pipedream_hpc.model.stand_ins import StandIns
from pipedream_hpc.model.structure import Containers, Filled, map_tensors, output_tensors, tensors_of_value
from pipedream_hpc.model.writes import memory_of, storage_id, version_of, written_by

#: Attribute of a tensor: which output of which call of which recorder it is.
MARK = "_pipedream_key"

#: A module without lists of modules in it, such as attention, is kept whole if its forward calls more functions.
_MOST_FUNCTIONS = 8


#: Lets a tensor have other memory: `tensor.data = other`.
_SET_DATA = torch.Tensor.data.__set__  # type: ignore[attr-defined]


#: Raised by functions that cannot run on tensors without values.
NEED_VALUES = (
    fake_tensor.DataDependentOutputException,
    fake_tensor.DynamicOutputShapeException,
    fake_tensor.UnsupportedOperatorException,
)


class CannotOpenError(Exception):
    """The forward of a module cannot be recorded: the module has to be kept whole.

    Attributes:
        name: qualified name of the module.
        reason: why.
        needs_values: whether it might be recorded with values: a function in it, such as nn.functional.ctc_loss or
            torch.masked_select, puts out what depends on them.
    """

    def __init__(self, name: str, reason: str, *, needs_values: bool = False) -> None:
        super().__init__(name, reason)
        self.name, self.reason, self.needs_values = name, reason, needs_values


class NeedsValuesError(Exception):
    """A module that is kept whole reads the values of tensors.

    Attributes:
        reason: the error that it raised.
    """

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


def record(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    keep_whole: Callable[[nn.Module, str], bool],
    *,
    training: bool = True,
    precision: Callable[[], AbstractContextManager[Any]] = nullcontext,
    device: torch.device = torch.device("cpu"),  # noqa: B008 - a constant
    real: bool = False,
    partial: bool = False,
    watch: bool = True,
) -> tuple[Recording, Notes]:
    """Run the forward in the model's present mode; the model and all generators are left as they were.

    It runs twice if it changes more than what modules are known to hold.

    Args:
        model: the user's model.
        args: its positional arguments, with values.
        kwargs: its keyword arguments.
        keep_whole: tells by module and qualified name whether a module is kept whole.
        training: whether the present mode is that of training.
        precision: context of the forward.
        device: the device that tensors without values are on.
        real: compute with values, for modules that need them even when kept whole.
        partial: instead of an error return what was recorded until then.
        watch: look for what the forward changes besides its modules.

    Raises:
        CannotOpenError: the forward of a module that is not kept whole cannot be recorded.
        NeedsValuesError: a module that is kept whole reads values.
        PipedreamError: the forward uses a tensor of an earlier one.
    """

    def run(
        recorder: _Recorder, start: Callable[[], list[Change]], known: Mapping[str, Set[str]] = MappingProxyType({})
    ) -> Recording:
        with (
            _unchanged(model, recorder.notes) as recorder.outside,
            seeding(None),
            torch.enable_grad(),
            precision(),
        ):
            recorder.suspects, recorder.known = start(), known
            return recorder.run(args, kwargs)

    recorder = _Recorder(model, keep_whole, device, real, training)
    # What does not run without values is tried again with values: no reason to print a traceback.
    logging.getLogger("torch._subclasses.fake_tensor").setLevel(logging.CRITICAL)
    try:
        recording = run(recorder, list)
    except (CannotOpenError, NeedsValuesError):
        if not partial:
            raise
        return recorder.recording(), recorder.notes
    if recorder.changes and watch:
        # What changes in the second forward, too, is no cache that the first one has filled.
        again = _Recorder(model, keep_whole, device, real, training)
        try:
            run(again, recorder.changes_settled, recorder.notes.sets_attributes)
        except (CannotOpenError, NeedsValuesError):
            if again.blamed:
                raise  # else numbers without the caches that they tell of
        recorder.notes.merge(again.notes)
    if recorder.notes.places:
        _find_readers(model, recorder, recording)
    return recording, recorder.notes


def _find_readers(model: nn.Module, recorder: _Recorder, recording: Recording) -> None:
    """Note which modules reach what others change.

    Raises:
        CannotOpenError: an opened one does: its code runs in every stage, and the other in one.
    """
    places = recorder.notes.places
    changed = {place: (name, text) for name, of_module in places.items() for place, text in of_module.items()}
    for name in recorder.opened:
        for place in changed.keys() & OutsideState(model, {name: model.get_submodule(name)}).places():
            by, text = changed[place]
            raise CannotOpenError(name, f"its forward reads {text}, which the forward of '{by}' changes")
    for name, module in {call.name: call.module for call in recording.calls if call.module is not None}.items():
        inner = {f"{name}.{path}" if path else name: each for path, each in module.named_modules()}
        for place in changed.keys() & OutsideState(model, inner).places():
            places.setdefault(name, {})[place] = changed[place][1]


class _Recorder:
    """The watcher that records."""

    def __init__(
        self,
        model: nn.Module,
        keep_whole: Callable[[nn.Module, str], bool],
        device: torch.device,
        real: bool,
        training: bool,
    ) -> None:
        self._model, self._keep_whole, self._device, self._training = model, keep_whole, device, training
        with no_collection():  # the first mode imports torch's compiler, which takes half as long again with it
            self._fake = None if real else FakeTensorMode(allow_non_fake_inputs=True)
        self.notes = Notes()
        self._names = {id(module): name for name, module in reversed(list(model.named_modules()))}
        self._scopes: list[Scope] = []
        self._calls: list[Call] = []
        self._function_names: Counter[str] = Counter()
        self._module_calls: Counter[str] = Counter()
        self._within: list[str] = []  # names of the modules whose code runs, also of those in modules kept whole
        self._in_call = False
        self._whole = ""  # name of the module whose call is being recorded
        self._graph: dict[Any, int] = {}  # number of the call that put out what has this node in autograd's graph
        self._checkpoint: int | None = None  # number of the checkpointed part that runs
        self._generators = python_generators()
        self._entered: list[str] = []  # by the call that is being recorded
        self._shown: list[tuple[nn.Module, Any]] = []  # to hooks of modules in it
        self._used: list[str] = []  # by functions in it: parameters, as a hook may use those of a module around it
        self._live: list[Any] = []  # a storage's identity is unique only while the storage is live
        self._stand_ins = StandIns(model, self._fake, device)
        self._parameters = self._stand_ins.parameters
        self._local = self._stand_ins.buffers  # and other tensors that depend on no call, but have no values
        self._drawn = Drawn()
        self._ragged = Ragged()
        self._asked: tuple[tuple[int, ...], str] = ((), "")  # by the model's own forward: sizes of which, and where
        self._overwritten: dict[str, tuple[nn.Parameter, torch.Tensor, torch.Tensor]] = {}  # what they were
        self._contents: dict[str, dict[str, Contents]] = {}  # of the modules that are open
        self._owned: dict[int, tuple[str, str]] = {}  # ("buffer", "weight", "attribute" or "tensor", name) by storage
        self.outside: OutsideState
        self._outside_tensors: dict[int, int] = {}  # identity by storage
        self.known: Mapping[str, Set[str]] = {}  # attributes that modules are known to set
        self.suspects: list[Change] = []  # places that an earlier forward has changed
        self.blamed = False  # whether an opened module has changed one of them
        self.changes: list[Change] = []  # those that this one has
        self.changes_settled: Callable[[], list[Change]] = list
        self.opened: list[str] = []

    def run(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Recording:
        model = self._model
        for each in tensors_of_value((args, kwargs)):  # a recording before may have written into them
            vars(each).pop(MARK, None)
        undo = watch_modules(model.modules())
        try:
            with self._stand_ins.held():
                self._note_owners((args, kwargs))
                with watched(self), checkpoints(self._checkpointed):
                    returned = model(*args, **kwargs)
                self.changes = self.outside.changes()
                self.changes_settled = settle(self.changes)
                self.notes.writes_parameters |= {
                    name for name, each in model.named_parameters() if storage_id(each) not in self._owned
                }
        finally:
            undo()
            for weight, memory, values in self._overwritten.values():
                weight.data = memory.copy_(values)
        tensors = output_tensors(returned)
        output = tuple(key for each in tensors if (key := self._mark(each)) is not None)
        parameters = [self._parameters[id(each)] for each in tensors if id(each) in self._parameters]
        return self.recording(tuple(dict.fromkeys(output)), tuple(dict.fromkeys(parameters)))

    def recording(self, output: tuple[Key, ...] = (), parameters: tuple[str, ...] = ()) -> Recording:
        """Return the calls that have been recorded so far."""
        root = self._scopes[0] if self._scopes else Scope("", self._model, list(self._calls))
        return Recording(root, tuple(self._calls), output, parameters)

    # -- what calls are made -----------------------------------------------------------------------------------------

    def module(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        name = self._names.get(id(module), type(module).__name__)
        if not all(map(is_seeding, module._forward_hooks.values())):
            self.notes.hooked.add(name)
        if self._in_call:
            with self._inside(name):
                returned = call_unwatched(module, args, kwargs)
            if name in self.notes.hooked:
                self._shown.append((module, returned))
            return returned
        if self._keep_whole(module, name):
            self._look_at_asked()
            return self._record(Call(0, name, module=module), module._call_impl, args, kwargs)
        self._look_at_asked()
        scope = Scope(name, module)
        self.opened.append(name)
        if self._scopes:
            self._scopes[-1].items.append(scope)
        first = len(self._calls)
        self._scopes.append(scope)
        given, containers = tensors_of_value((args, kwargs)), Containers((args, kwargs))
        before = [self._mark(each) for each in given]
        scope.sources = tuple(key for key in before if key is not None)
        attributes, buffers = dict(vars(module)), dict(module._buffers)
        self._look_at_contents()
        self._contents[name] = contents_of(module)
        try:
            with self._inside(name):
                returned = call_unwatched(module, args, kwargs)
                self._look_at_contents()
        except (CannotOpenError, NeedsValuesError, PipedreamError):
            raise
        except Exception as error:
            if isinstance(error, NEED_VALUES):
                reason = f"what its forward computes depends on values ({line_of_user(error)})"
                raise CannotOpenError(name, reason, needs_values=True) from error
            raise CannotOpenError(name, _first_line(error)) from error
        finally:
            self._contents.pop(name, None)
            if len(self._scopes) > 1:
                self._scopes.pop()
        changed = [
            key
            for key, value in vars(module).items()
            if key in attributes and value is not attributes[key] and isinstance(attributes[key], STATE)
        ]
        changed += [key for key, value in module._buffers.items() if value is not buffers.get(key)]
        if changed:
            raise CannotOpenError(name, f"its forward sets '{changed[0]}'")
        if name and not scope.items and scope.sources:
            # What it does with its argument, other than to return it, is to be done in one stage only.
            raise CannotOpenError(name, "its forward calls no module or function")
        functions = sum(isinstance(item, Call) and item.function is not None for item in scope.items)
        if name and functions > _MOST_FUNCTIONS and not any(map(is_list, module.modules())):
            raise CannotOpenError(name, f"its forward calls {functions} functions")
        if name in self.notes.python_random:
            raise CannotOpenError(name, "its forward draws random numbers of Python or NumPy")
        scope.returned, found = self._describe(containers.filled(returned), given)
        inner = range(first, len(self._calls))
        written = [
            Found("argument", position, key)
            for position, (each, old) in enumerate(zip(given, before, strict=True))
            if (key := self._mark(each)) is not None and key != old and key[0] in inner
        ]
        arguments = {id(each) for each in given}
        scope.found = (
            *(
                Found("returned", position, key)
                for position, (each, key) in enumerate(found)
                if key is not None and key[0] in inner and id(each) not in arguments
            ),
            *written,
        )
        return returned

    def function(self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        self.notes.averages |= function in AVERAGES_TARGETS
        if self._in_call:
            returned = function(*args, **kwargs)
            self._note_average(function, args, kwargs, returned)
            if tensors_of_value(returned):  # and not a question, such as p.dtype
                given = tensors_of_value((args, kwargs))
                self._used += [self._parameters[id(each)] for each in given if id(each) in self._parameters]
            return returned
        given = tensors_of_value((args, kwargs))
        if function == _SET_DATA and id(args[0]) in self._parameters:
            raise CannotOpenError(self._scopes[-1].name, f"its forward writes weight '{self._parameters[id(args[0])]}'")
        tracked = [each for each in given if self._mark(each) is not None or id(each) in self._parameters]
        without_values = [each for each in given if id(each) in self._local]
        name = function_name(function)
        if not tracked:
            if name in DRAWING:
                self._note_draw(function)
            if without_values:
                return self._computed_locally(function, args, kwargs)
            # With values, what depends on weights is told by autograd.
            if any(isinstance(each, FakeTensor) or each.grad_fn is not None for each in given):
                raise CannotOpenError(self._within[-1], f"{name} uses a tensor that no module has returned")
            with _Writes(self) if any(storage_id(each) in self._owned for each in given) else nullcontext():
                returned, reads = self._drawn.call(function, args, kwargs, lambda: function(*args, **kwargs))
            if reads:
                reason = f"its Python decides by random numbers that it draws ({line_of_user()})"
                raise CannotOpenError(self._within[-1], reason)
            return returned
        if name in READS_VALUES:
            raise CannotOpenError(self._within[-1], f"its Python reads the values of a tensor ({line_of_user()})")
        if asked := self._ragged.are_asked(function, given):
            self._asked = asked, f"its Python asks how many values were chosen ({line_of_user()})"
            if self._within[-1]:
                raise CannotOpenError(self._within[-1], self._asked[1])
        if function == torch.Tensor.backward:
            raise CannotOpenError(self._within[-1], "its forward calls backward()")
        returned = self._record(Call(0, name, function=function), function, args, kwargs)
        self._note_average(function, args, kwargs, returned)
        return returned

    # ----------------------------------------------------------------------------------------------------------------

    def _note_average(
        self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any], returned: Any
    ) -> None:
        if is_loss(returned) and divisor_of(function, args, kwargs) is not None:
            self.notes.averages = True

    def _look_at_asked(self) -> None:
        """Refuse to open the model if its own forward calls a module after it has asked how many values were chosen."""
        if self._asked[0] and self._scopes[-1].name == "":
            raise CannotOpenError("", self._asked[1])

    def _computed_locally(self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """Run a function of buffers that have no values yet: every stage will compute it from their values."""
        name = function_name(function)
        if name in READS_VALUES:
            raise CannotOpenError(self._within[-1], f"its Python reads the values of a buffer ({line_of_user()})")
        with unwatched_functions(self):
            args, kwargs = self._to_fakes(args, kwargs)
            with self._fake or nullcontext(), _Writes(self):
                returned = function(*args, **kwargs)
        self._local.update((id(each), each) for each in tensors_of_value(returned))
        return returned

    @contextmanager
    def _checkpointed(self, arguments: Any) -> Iterator[None]:
        """Note which calls run again together in backward; there is none after a recording."""
        self.notes.checkpoints = True
        before = self._checkpoint
        if before is None:
            self._checkpoint = len(self._calls)
        try:
            yield
        finally:
            self._checkpoint = before

    def _note_draw(self, function: Callable[..., Any]) -> None:
        """Note that the forward of an opened module draws random numbers by a function.

        Such a module is opened under every plan, so that what it draws does not depend on the plan; or, if all that is
        in it is kept whole, it is kept whole itself.
        """
        scope = self._scopes[-1]
        if scope.name and all(
            self._keep_whole(child, f"{scope.name}.{name}") and not is_list(child)
            for name, child in scope.module.named_children()
        ):
            raise CannotOpenError(scope.name, f"it draws random numbers ({function_name(function)})")
        self.notes.random_functions.add(scope.name)
        self.notes.drawing.add(function)

    def _record(self, call: Call, run: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """Run a call without values, and record it if it puts out tensors."""
        if call.module is not None:
            self._look_at_contents()
        self._whole = call.name if call.module is not None else self._within[-1]
        with unwatched_functions(self):
            returned = self._record_unwatched(call, run, args, kwargs)
        if call.module is not None:
            # What hooks of it have changed is no doing of the open modules.
            for name, contents in self._contents.items():
                if any(each.changed() for each in contents.values()):
                    self._contents[name] = contents_of(self._model.get_submodule(name))
            for change in filter(Change.again, self.suspects):
                self._note_change(call.name, change)
        return returned

    def _note_change(self, name: str, change: Change) -> None:
        """Note that a module that is kept whole has changed something."""
        text = change.text
        if change.holder.where.weight and name:  # a model that is kept whole has one stage, and one version
            raise PipedreamError(
                f"the forward of '{name}' sets {text}, but each version of a weight is another tensor: set an "
                "attribute of the module instead"
            )
        if not change.is_in(self.known):
            self.notes.outside.add(name)
        self.notes.places.setdefault(name, {})[change.place] = text

    def _look_at_contents(self) -> None:
        """Refuse to open a module whose own code has changed numbers or tensors that are not its arguments."""
        for change in filter(Change.again, self.suspects if self._scopes else ()):
            self.blamed = True
            raise CannotOpenError(self._scopes[-1].name, f"its forward changes {change.text}")
        for contents in self._contents.values():
            for key, each in contents.items():
                if each.changed(collected=False):
                    raise CannotOpenError(self._scopes[-1].name, f"its forward changes what '{key}' holds")

    def _record_unwatched(
        self, call: Call, run: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> Any:
        originals = tensors_of_value((args, kwargs))
        given_containers = Containers((args, kwargs))
        args, kwargs = self._to_fakes(args, kwargs)
        containers = Containers((args, kwargs))
        given = tensors_of_value((args, kwargs))
        versions = [version_of(each) for each in given]
        counter = _Dispatch(self)
        self._entered, self._used, self._shown = [], [], []
        inside = self._inside(call.name) if call.module is not None else nullcontext()
        try:
            with inside, self._fake or nullcontext(), counter:
                returned = run(*args, **kwargs)
        except Exception as error:
            if call.module is None:
                raise
            raise NeedsValuesError(_first_line(error)) from error
        written = [
            position
            for position, (each, version) in enumerate(zip(given, versions, strict=True))
            if version_of(each) != version
        ]
        # What was written into stays the object that the forward holds. What is returned as it was given, as by dropout
        # in evaluation, becomes another: the call has an output of its own, as in training.
        originals_of = {
            id(new): old if position in written else None
            for position, (new, old) in enumerate(zip(given, originals, strict=True))
        }

        def output(each: torch.Tensor) -> torch.Tensor:
            if id(each) not in originals_of:
                return each
            old = originals_of[id(each)]
            return each.view_as(each) if old is None else old

        filled = containers.filled(returned, self._shown) if call.module is not None else returned
        with self._fake or nullcontext():
            filled = map_tensors(output, filled)
        returned = filled
        if isinstance(filled, Filled):
            filled.put_into(given_containers.found)
            returned = filled.returned
        if call.module is None and not tensors_of_value(returned) and not written:
            self.notes.questions = True
            return returned  # a question, such as x.size(0)
        number = len(self._calls)
        arguments = {id(each): position for position, each in reversed(list(enumerate(originals)))}
        outputs: list[tuple[Found, torch.Tensor]] = []
        for position, each in enumerate(tensors_of_value(filled)):
            if id(each) not in arguments and all(each is not other for _, other in outputs):
                outputs.append((Found("returned", position, (number, len(outputs))), each))
        for position in written:
            if all(originals[position] is not other for _, other in outputs):
                outputs.append((Found("argument", position, (number, len(outputs))), originals[position]))
        call.number = number
        if call.function is not None:
            call.name = self._numbered(call.name)
        call.checkpoint = self._checkpoint
        if call.function is torch.autograd.grad:
            call.differentiates = self._calls_between(*args[:2], **kwargs)
        self._graph.update((each.grad_fn, number) for _, each in outputs if each.grad_fn is not None)
        call.draws = call.function is not None and counter.draws
        if call.draws:
            self._note_draw(run)
        call.entered = tuple(self._entered)
        marks = [self._mark(each) for each in originals]
        call.stays_with = (*self._ragged.sources(originals), *self._asked[0])
        call.sources = tuple(dict.fromkeys(key for key in marks if key is not None))
        call.parameters = self._parameters_of(call, originals)
        call.takes_inputs = any(
            key is None and id(each) not in self._parameters for key, each in zip(marks, originals, strict=True)
        )
        for found, each in outputs:
            object.__setattr__(each, MARK, (self, found.key))
        call.found = tuple(found for found, _ in outputs)
        chose = call.function is not None and any(
            self._mark(each) is not None or all(each is not other for other in originals) for each in counter.deciding
        )
        self._ragged.note(call, originals, [each for found, each in outputs if found.where == "returned"], chose)
        values = [given[found.position] if found.where == "argument" else each for found, each in outputs]
        name = call.name
        if call.module is not None:
            self._module_calls[name] += 1
            count = self._module_calls[name]
            name = (name or type(call.module).__name__) + (f"@{count}" if count > 1 else "")
        call.values = tuple(
            Value(
                f"{name}#{index}" if index else name,
                tuple(value.shape),
                value.dtype,
                value.requires_grad,
                order=memory_order(value),
                layout=value.layout,
            )
            for index, value in enumerate(values)
        )
        call.memory = frozenset(map(storage_id, values))
        call.writes = frozenset(storage_id(given[position]) for position in written)
        self._live += [memory_of(each) for each in [*values, *(given[position] for position in written)]]
        call.returned, _ = self._describe(filled, originals)
        call.flops = counter.flops
        self._calls.append(call)
        if self._scopes:
            self._scopes[-1].items.append(call)
        return returned

    def _calls_between(self, outputs: Any, inputs: Any, **_: Any) -> tuple[int, ...]:
        """Return the calls by which some tensors were computed from others, and those that put these out.

        The others may become leaves of autograd's graph there: h.detach().requires_grad_().
        """
        todo = [each.grad_fn for each in tensors_of_value(outputs)]
        found = [each.grad_fn for each in tensors_of_value(inputs)]
        seen = set(found)
        while todo:
            node = todo.pop()
            if node is not None and node not in seen:
                seen.add(node)
                found.append(node)
                todo += [each for each, _ in node.next_functions]
        return tuple(self._graph[node] for node in found if node in self._graph)

    def _describe(self, returned: Any, given: list[torch.Tensor]) -> tuple[Any, list[tuple[torch.Tensor, Key | None]]]:
        """Return the return value with a Returned in place of each tensor; and the tensors with their keys."""
        arguments = {id(each): position for position, each in reversed(list(enumerate(given)))}
        found: list[tuple[torch.Tensor, Key | None]] = []

        def stand_in(tensor: torch.Tensor) -> Returned:
            found.append((tensor, self._mark(tensor)))
            return Returned(self._mark(tensor), arguments.get(id(tensor)))

        return map_tensors(stand_in, returned), found

    def _parameters_of(self, call: Call, given: list[torch.Tensor]) -> tuple[str, ...]:
        direct = [self._parameters[id(each)] for each in given if id(each) in self._parameters]
        inner = [] if call.module is None else [name for name, _ in call.module.named_parameters(call.name)]
        if call.function is not None:  # an autograd.Function may call modules
            modules = [(name, self._model.get_submodule(name)) for name in call.entered]
            inner += [each for name, module in modules for each, _ in module.named_parameters(name, recurse=False)]
        return tuple(dict.fromkeys([*inner, *direct, *self._used]))

    def _numbered(self, name: str) -> str:
        self._function_names[name] += 1
        count = self._function_names[name]
        return name if count == 1 else f"{name}_{count - 1}"

    def _to_fakes(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return the arguments with tensors without values in place of those that the forward has computed."""
        if self._fake is None:
            return args, dict(kwargs)
        mode, made = self._fake, {}

        def fake(value: Any) -> Any:
            if not isinstance(value, torch.Tensor) or isinstance(value, FakeTensor):
                return value
            if id(value) not in made:
                made[id(value)] = mode.from_tensor(value, static_shapes=True)
            return made[id(value)]

        new_args, new_kwargs = tree_map(fake, (tuple(args), dict(kwargs)))
        return new_args, new_kwargs

    def _mark(self, tensor: torch.Tensor) -> Key | None:
        """Return which output of which call a tensor is; None for one that depends on no call.

        Raises:
            PipedreamError: it was put out in another forward.
        """
        recorder, key = getattr(tensor, "__dict__", {}).get(MARK, (self, None))
        if recorder is not self:
            raise kept_of_another_forward()
        return key  # type: ignore[no-any-return]

    @contextmanager
    def _inside(self, name: str) -> Iterator[None]:
        """Note that the code of a module runs, and whether it draws Python's or NumPy's random numbers itself."""
        self._look_at_generators()
        self._within.append(name)
        self._entered.append(name)
        try:
            yield
        finally:
            self._look_at_generators()
            self._within.pop()

    def _look_at_generators(self) -> None:
        """Blame the module whose code has just run for a change of Python's or NumPy's generator."""
        now = python_generators()
        if now != self._generators and self._within:
            self.notes.python_random.add(self._within[-1])
        self._generators = now

    def _note_owners(self, arguments: Any) -> None:
        """Note whose memory is written if an operation writes it: a view's is that of its base."""
        for tensor in tensors_of_value(arguments):
            for each in (tensor, *self._to_fakes((tensor,), {})[0]):
                self._owned.setdefault(storage_id(each), ("input", ""))
                self._live.append(memory_of(each))
        weights, buffers = self._model.named_parameters(), self._model.named_buffers()
        for kind, named in (("weight", weights), ("buffer", buffers)):
            for name, tensor in named:
                for each in (tensor, *self._to_fakes((tensor,), {})[0]):
                    self._owned.setdefault(storage_id(each), (kind, name))
                    self._live.append(memory_of(each))
        for path, module in self._model.named_modules():
            for key, contents in contents_of(module).items():
                for tensor in filter(lambda each: each.is_leaf, contents.tensors):
                    for each in (tensor, *self._to_fakes((tensor,), {})[0]):
                        self._owned.setdefault(storage_id(each), ("attribute", f"{path}.{key}"))
                        self._live.append(memory_of(each))
        for tensor, where in self.outside.tensors:
            if tensor.is_leaf and not tensor.is_meta:
                self._owned.setdefault(storage_id(tensor), ("tensor", where.text))
                self._outside_tensors[storage_id(tensor)] = id(tensor)

    def note_draw(self) -> None:
        """Note that an operation inside a call draws random numbers."""
        if self._within:
            self.notes.random.add(self._within[-1])

    def note_writes(self, function: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Note which buffers and weights an operation is about to write.

        Raises:
            CannotOpenError: an opened module writes them itself: every stage would, as each runs its forward.
        """
        for each in written_by(function, args, kwargs):
            kind, name = self._owned.get(storage_id(each), ("", ""))
            if kind == "input":
                self.notes.writes_inputs.add(self._training)
                continue
            if kind == "weight" and self._fake is None and name not in self._overwritten:
                weight = self._model.get_parameter(name)
                self._overwritten[name] = weight, weight.data, weight.detach().clone()
            if function is torch.ops.aten.embedding_renorm_.default:
                self.notes.renormalizes.add(name)
                continue
            if kind and self._scopes and self._within[-1] == self._scopes[-1].name:
                what = name if kind == "tensor" else f"{kind} '{name.lstrip('.')}'"
                raise CannotOpenError(self._scopes[-1].name, f"its forward writes {what}")
            if storage_id(each) in self._outside_tensors:
                self.notes.places.setdefault(self._whole, {})[self._outside_tensors[storage_id(each)], ""] = name
            if kind == "tensor":
                self.notes.outside.add(self._whole)
            elif kind == "attribute":
                path, _, key = name.rpartition(".")
                self.notes.sets_attributes.setdefault(path, set()).add(key)
            elif kind:
                (self.notes.writes_buffers if kind == "buffer" else self.notes.writes_parameters).add(name)


class _Writes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Tells the recorder what is written."""

    def __init__(self, recorder: _Recorder) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._recorder = recorder

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self._recorder.note_writes(function, args, kwargs or {})
        return function(*args, **(kwargs or {}))


class _Dispatch(_Writes):  # type: ignore[no-untyped-call]
    """Counts floating-point operations, and tells the recorder about random numbers and writes."""

    def __init__(self, recorder: _Recorder) -> None:
        super().__init__(recorder)
        self.flops, self.draws = 0, False
        self.deciding: list[torch.Tensor] = []  # about the sizes of other tensors, by their values

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        returned = super().__torch_dispatch__(function, types, args, kwargs)
        self.deciding += deciding(function, args, kwargs or {})
        if draws_numbers(function, args, kwargs or {}):
            self._recorder.note_draw()
            self.draws = True
        count = flop_registry.get(function._overloadpacket)
        if count is not None:
            self.flops += count(*args, **(kwargs or {}), out_val=returned)
        return returned


@contextmanager
def unwatched_functions(recorder: _Recorder) -> Iterator[None]:
    """Record no functions in the block; modules only report when their code runs."""
    recorder._in_call = True
    try:
        yield
    finally:
        recorder._in_call = False


@contextmanager
def _unchanged(model: nn.Module, notes: Notes) -> Iterator[OutsideState]:
    """Restore the state of all modules, and of all generators; note which modules had changed theirs."""
    state = ModuleState(model)
    python, numbers = random.getstate(), numpy.random.get_state()
    # A stage asks for shapes in its forward, after which buffers are what autograd has saved: also by their versions.
    buffers = tuple(each for each in model.buffers() if not each.is_meta and not each.is_inference())
    with _unsafe_preserve_version_counter(buffers), torch.random.fork_rng(devices=[], enabled=True):
        # A path that depends on random numbers is recorded the same in every process.
        torch.default_generator.manual_seed(0)
        random.seed(0)
        numpy.random.seed(0)
        try:
            yield state.outside
        finally:
            random.setstate(python)
            numpy.random.set_state(numbers)
            for name, before in state.changed_attributes().items():
                # An attribute that was None, or not there, is a cache, and no state.
                kept = {key for key, value in before.items() if isinstance(value, STATE)}
                kept |= {key for key in before if state.holds_others(name, key)}
                if kept:
                    notes.sets_attributes.setdefault(name, set()).update(kept)
            notes.writes_buffers |= state.changed_buffers()
            state.restore()


def is_list(module: nn.Module) -> bool:
    """Return whether a module is a list of several modules, such as the blocks of a transformer."""
    return isinstance(module, nn.Sequential | nn.ModuleList | nn.ModuleDict) and len(module) > 1


def _first_line(error: Exception) -> str:
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__
