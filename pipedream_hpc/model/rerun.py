"""Rerun: a stage runs the user's own forward, and computes only its own part of it.

The forward of the model runs as it is written, on every stage. A call that belongs to the stage is made; any other call
returns at once, with what the stage has received where it needs that, and with placeholders elsewhere. After its last
call the stage leaves the forward::

    def forward(self, x, mask):            stage 0                  stage 1
        mask = mask[:, None]               mask[:, None]            mask[:, None]
        h = self.embed(x)                  embed(x)                 placeholder
        h = self.block[0](h, mask)         block 0 ──► sent         received
        h = self.block[1](h, mask)         (leaves here)            block 1
        return self.head(h)                                         head ──► the model's output

So everything in between is the user's Python: branches, contexts such as no_grad, hooks, and what is computed from
the model's arguments alone. Modules in which no boundary lies run without being watched, at full speed.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.modules.module import _has_any_global_hook
from torch.overrides import TorchFunctionMode

from pipedream_hpc.errors import PipedreamError
from pipedream_hpc.model.calls import Applied, call_function, call_unwatched, is_watching, unwatched, watched
from pipedream_hpc.model.functions import function_name, place_of_user
from pipedream_hpc.model.graph import Call, Key, Notes, Recording, Returned, Scope, Value
from pipedream_hpc.model.placeholder import MARK, Placeholder, kept_of_another_forward
from pipedream_hpc.model.randomness import count_calls, is_seeding, run_drawing, seed_draw
from pipedream_hpc.model.structure import Filled, at_same_places, containers_in, map_tensors, tensors_of_value


class _Left(BaseException):
    """Leaves the forward after the last call of a stage. Not an Exception: the user's code must not catch it."""


class _ShownError(Exception):
    """A hook needs the values of the output of a call that another stage makes."""


#: Answers to questions about a tensor that are the same whenever it is asked.
_ANSWERS = (int, torch.Size, torch.dtype, torch.device, torch.layout)

_NOTHING: AbstractContextManager[Sequence[tuple[nn.Module, Any]]] = nullcontext(())

#: Key of a placeholder for one of the model's arguments.
INPUT: Key = (-1, 0)


class _Needed(BaseException):
    """The stage needs the model's arguments."""


class _Showing(TorchFunctionMode):
    """Answers functions of what is shown to a hook.

    Args:
        answer: computes a function of tensors of which some depend on calls of the graph.
    """

    def __init__(self, answer: Callable[..., Any]) -> None:
        super().__init__()
        self._answer = answer

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = tensors_of_value((args, kwargs or {}))
        marked = any(isinstance(each, nn.Parameter) or MARK in each.__dict__ for each in given)
        return self._answer(function, args, kwargs or {}) if marked else function(*args, **(kwargs or {}))


class Step:
    """One call of the forward as a stage sees it: a recorded call, or a whole module in which no boundary lies.

    Attributes:
        item: what was recorded.
        number: number of its first call in the recording.
        own: whether the stage makes the call.
        captures: (where, position, slot): outputs that are sent, by their slot among the stage's outputs.
        received: tensor of the graph -> number among the tensors that the stage receives.
        n_returned: number of tensors that were returned.
        chain: modules of an nn.Sequential that the stage calls one after the other, of which this is the first. They
            run at once; the calls that follow find their input computed already.
        shows: modules in it with hooks, which may keep what those modules return.
        done: whether the chain of a step before has made this call.
        counts: calls in it of modules that draw random numbers and are called more than once.
    """

    __slots__ = (
        "captures",
        "chain",
        "counts",
        "done",
        "draws",
        "found",
        "function",
        "item",
        "module",
        "n_returned",
        "name",
        "number",
        "own",
        "received",
        "replaces",
        "returned",
        "shows",
    )

    def __init__(self, item: Call | Scope, own: bool, slots: Mapping[Key, int], received: Mapping[Key, int]) -> None:
        self.item, self.own = item, own
        self.number = item.number if isinstance(item, Call) else next(item.calls()).number
        self.name, self.module = item.name, item.module
        self.function = item.function if isinstance(item, Call) else None
        self.draws = isinstance(item, Call) and item.draws
        self.found = item.found
        self.captures = [(each.where, each.position, slots[each.key]) for each in item.found if each.key in slots]
        keys = {each.key for each in item.found}
        self.received = {key: number for key, number in received.items() if key in keys}
        self.replaces = [each for each in item.found if each.where == "argument"]
        self.returned = item.returned
        self.shows = {each for each, _ in item.returned.shown} if isinstance(item.returned, Filled) else set()
        self.n_returned = len(_returned(item.returned))
        self.counts: Counter[str] = Counter()
        self.chain: tuple[nn.Module, ...] = ()
        self.done = False

    def as_recorded(self, returned: Any) -> list[torch.Tensor | None]:
        """Return the tensors that the call has returned, by their recorded numbers; None for one that is missing.

        A module that is kept whole may return other tensors than it did, such as a cache of the layers that it ran.
        """
        numbers = {id(each): number for number, each in enumerate(_returned(self.returned))}
        tensors: list[torch.Tensor | None] = [None] * self.n_returned
        for each, tensor in at_same_places(self.returned, returned, Returned):
            tensors[numbers[id(each)]] = tensor
        return tensors


def steps_of(
    recording: Recording,
    stage_of: Sequence[int],
    stage: int,
    slots: Mapping[Key, int],
    received: Mapping[Key, int],
    notes: Notes,
    *,
    whole: bool = True,
) -> tuple[list[Step], set[int]]:
    """Return the calls of the forward as a stage sees them, and the identities of the modules that are opened.

    Args:
        recording: the calls of the forward.
        stage_of: stage of every call.
        stage: the stage.
        slots: number among the stage's outputs of every tensor that it sends.
        received: number among the received tensors of every tensor that it receives.
        notes: what else the forward does. Modules in which functions draw random numbers are opened even where no
            boundary lies in them.
        whole: keep modules whole in which no boundary lies.
    """
    never_whole = notes.random_functions
    entered = Counter(name for call in recording.calls for name in call.entered)
    numbered = {name for name, count in entered.items() if count > 1 and name in notes.random | notes.python_random}
    users: dict[Key, list[int]] = {}
    for call in recording.calls:
        for key in call.sources:
            users.setdefault(key, []).append(call.number)
    steps: list[Step] = []
    opened: set[int] = set()

    def is_whole(scope: Scope) -> bool:
        numbers = {call.number for call in scope.calls()}
        if not whole or not numbers or len({stage_of[number] for number in numbers}) > 1 or scope.name in never_whole:
            return False
        if any(scope.name == "" or name.startswith(f"{scope.name}.") for name in never_whole):
            return False
        shown = {each.key for each in scope.found}
        used = (
            key
            for number in numbers
            for index in range(len(recording.calls[number].values))
            if (key := (number, index)) in recording.output or any(user not in numbers for user in users.get(key, ()))
        )
        return all(key in shown for key in used)

    def has_hooks(scope: Scope) -> bool:
        return any(name.startswith(f"{scope.name}.") for name in notes.hooked)

    runs: list[tuple[int, int]] = []  # steps of an nn.Sequential's own children, from the first to after the last

    def add(scope: Scope) -> None:
        opened.add(id(scope.module))
        begin = len(steps)
        for item in scope.items:
            if isinstance(item, Scope) and not is_whole(item):
                add(item)
                continue
            first = item if isinstance(item, Call) else next(item.calls())
            own = stage_of[first.number] == stage
            if (
                isinstance(item, Scope)
                and own
                and not all(stage_of[k[0]] == stage or k in received for k in item.sources)
            ):
                add(item)  # it is given a tensor of which it needs the shape alone
            elif isinstance(item, Scope) and not own and (_computes_from_arguments(item) or has_hooks(item)):
                # What it computes from the model's arguments alone, and what hooks in it keep, can only be had by
                # opening it.
                add(item)
            else:
                steps.append(Step(item, own, slots, received))
        if whole and is_plain_sequential(scope.module) and len(steps) - begin == len(scope.items):
            runs.append((begin, len(steps)))

    if is_whole(recording.root):
        steps.append(Step(recording.root, True, slots, received))
    else:
        add(recording.root)
    for first, last in runs:
        _join_chain(steps[first:last])
    for step in steps:
        calls = [step.item] if isinstance(step.item, Call) else step.item.calls()
        step.counts.update(name for call in calls for name in call.entered if name in numbered)
    return steps, opened


class StageForward:
    """Runs the part of the model's forward that belongs to one stage, in one mode.

    Args:
        model: the user's model; the modules of `steps` are watched (see calls.watch_modules).
        steps: the calls of the forward as the stage sees them.
        opened: identities of the modules that are opened.
        n_outputs: number of tensors that the stage sends.
        is_last: whether it returns the model's output.
        functions: whether any function is to be watched, besides modules.
        drawing: functions that draw random numbers.
        shapes: returns an output of a call for given arguments, without computing it.
        device: what the stage computes on.
    """

    def __init__(
        self,
        model: nn.Module,
        steps: list[Step],
        opened: set[int],
        n_outputs: int,
        *,
        is_last: bool,
        functions: bool,
        drawing: frozenset[Any],
        shapes: Callable[[Sequence[Any], Mapping[str, Any], Key], Value],
        device: torch.device,
    ) -> None:
        self._drawing, self._shapes, self.device = drawing, shapes, device
        self._given: tuple[Sequence[Any], Mapping[str, Any]] = ((), {})
        self._values: dict[Key, Value] = {}  # of placeholders, for this minibatch
        self._answers: dict[tuple[Any, ...], Any] = {}  # to questions about placeholders
        self._model, self._steps, self._opened, self._is_last = model, steps, opened, is_last
        self._functions, self._n_outputs = functions, n_outputs
        self._applies = any(isinstance(step.function, Applied) for step in steps)
        own = [number for number, step in enumerate(steps) if step.own]
        self._end = len(steps) if is_last or not own else own[-1] + 1
        self._placeholders: dict[Key, Placeholder] = {}
        self._position = 0
        self._trying = self._making = False
        self._run: Any = None  # of the forward: what its tensors are marked with
        self._fake = FakeTensorMode(allow_non_fake_inputs=True)
        self._n_checkpointed = 0  # checkpointed parts that run, one in another
        self._n_draws = 0
        self._n_received = len({number for step in steps for number in step.received.values()})
        self._received: Sequence[torch.Tensor] = ()
        self._outputs: list[Any] = []
        self._aliases: dict[int, tuple[Any, Any]] = {}
        self._direct = None if functions else _direct_chain(model, steps)
        #: Called instead of the modules of a step, such as a compiled form of them, by the step's identity.
        self.replacements: dict[int, Callable[..., Any]] = {}
        #: Called after every step of the stage, with the step and its outputs; None for one that it has not returned.
        self.after: Callable[[Step, Sequence[torch.Tensor | None]], None] | None = None

    def __call__(
        self, args: Sequence[Any], kwargs: Mapping[str, Any], received: Sequence[torch.Tensor]
    ) -> tuple[list[Any], Any]:
        """Run it; return the tensors to send, and the model's output in the last stage.

        Args:
            args: the model's positional arguments.
            kwargs: its keyword arguments.
            received: tensors from earlier stages.
        """
        if self._direct is not None and self.after is None and not self.replacements and not self._trying:
            steps, number = self._direct
            if (number is not None or len(args) == 1) and not _has_hooks(self._model):
                value = args[0] if number is None else received[number]
                for step in steps:
                    value = step.module(value)  # type: ignore[misc]
                outputs: list[Any] = [None] * self._n_outputs
                for *_, slot in steps[-1].captures:
                    outputs[slot] = value
                return outputs, value if self._is_last else None
        self._n_draws, self._making, self._run = 0, False, object()
        self._position, self._received, self._outputs = 0, received, [None] * self._n_outputs
        self._aliases, self._given, self._values = {}, (args, kwargs), {}
        if self._functions:
            for tensor in received:
                setattr(tensor, MARK, self._run)
        returned = None
        try:
            if self._end == 0 and not self._is_last:
                return self._outputs, None
            with self._watched():
                returned = self._model(*args, **kwargs)
        except _Left:
            pass
        outputs, self._outputs, self._received = self._outputs, [], ()
        self._aliases, self._given = {}, ((), {})
        return outputs, returned

    def needs_inputs(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
        """Return whether the stage needs the model's arguments, and not only passes them on to other stages' calls.

        Args:
            args: placeholders for the positional arguments.
            kwargs: placeholders for the keyword arguments.
        """
        functions, self._functions, self._trying = self._functions, True, True
        try:
            self(args, kwargs, [Placeholder.make(None)] * self._n_received)
        except _Needed:
            return True
        finally:
            self._functions, self._trying = functions, False
        return False

    @contextmanager
    def checkpointed(self, arguments: Any) -> Iterator[Callable[[Any], AbstractContextManager[None]]]:
        """Make a part of the forward run again from here in backward (see checkpoints.Begin)."""
        watching = is_watching(self)
        marked = [MARK in each.__dict__ for each in tensors_of_value(arguments)]
        here = self._here()

        @contextmanager
        def again(arguments: Any) -> Iterator[None]:
            for each, is_marked in zip(tensors_of_value(arguments), marked, strict=True):
                if is_marked:
                    setattr(each, MARK, here[0])
            now, outputs = self._here(), self._outputs
            self._go(here)
            self._outputs = [None] * self._n_outputs
            self._n_checkpointed += 1
            try:
                with self._watched() if watching else nullcontext():
                    yield
            finally:
                self._n_checkpointed -= 1
                self._outputs = outputs
                self._go(now)

        self._n_checkpointed += 1
        try:
            yield again
        finally:
            self._n_checkpointed -= 1
        if watching:
            self._leave()

    def _here(self) -> tuple[Any, ...]:
        """Return where in the forward it is."""
        now = self._run, self._position, self._n_draws, self._received
        return *now, dict(self._aliases), self._given, self._values

    def _go(self, where: tuple[Any, ...]) -> None:
        self._run, self._position, self._n_draws, self._received = where[:4]
        self._aliases, self._given, self._values = where[4:]

    def _watched(self) -> AbstractContextManager[None]:
        return watched(self, functions=self._functions, applied=self._applies)

    def _leave(self) -> None:
        """Leave the forward after the last call of the stage; not from within what runs again in backward."""
        if self._position >= self._end and not self._is_last and not self._n_checkpointed:
            raise _Left

    @property
    def place(self) -> tuple[int, bool, str]:
        """Where the forward is: number of the call that comes next or is being made, whether it is, and its name.

        While calls are watched; otherwise a stage may run modules without counting them.
        """
        position = self._position - self._making
        if position >= len(self._steps):
            return sys.maxsize, False, ""
        step = self._steps[position]
        return step.number, self._making, step.name if self._making else ""

    # -- the watcher -------------------------------------------------------------------------------------------------

    def module(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        step = self._steps[self._position] if self._position < len(self._steps) else None
        if step is None or step.module is not module:
            if id(module) in self._opened:
                return call_unwatched(module, args, kwargs)
            name = next((name for name, each in self._model.named_modules() if each is module), "")
            raise self._other_path(f"module '{name}'")
        self._position += 1
        if not step.own or self._trying:
            return self._skip(step, args, kwargs)
        users = args, kwargs
        if self._aliases:
            args, kwargs = self._with_aliases(users)
        if step.done:
            return self._made(step, args[0], args, kwargs)
        self._making = True
        with unwatched(), _shown_in(step.shows) if step.shows else _NOTHING as shown:
            returned = self.replacements.get(id(step), module._call_impl)(*args, **kwargs)
            for following in step.chain[1:] if step.chain and id(step) not in self.replacements else ():
                returned = following(returned)
        if self._aliases and isinstance(step.returned, Filled):  # it was given copies of the dicts and lists
            step.returned.taken_from(containers_in((args, kwargs)), None).put_into(containers_in(users))
        return self._made(step, returned, args, kwargs, shown)

    def function(self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        if not self._is_marked(args) and not (kwargs and self._is_marked(tuple(kwargs.values()))):
            if self._drawing and function in self._drawing:
                returned, drew = run_drawing(self._n_draws, lambda: function(*args, **kwargs))
                self._n_draws += drew
                return returned
            return call_function(function, args, kwargs)
        step = self._steps[self._position] if self._position < len(self._steps) else None
        if step is None or step.function != function:
            return self._question(function, args, kwargs)
        self._position += 1
        if step.draws:
            self._draw()
        if not step.own or self._trying:
            return self._skip(step, args, kwargs)
        if self._aliases:
            args, kwargs = self._with_aliases((args, kwargs))
        self._making = True
        try:
            returned = call_function(function, args, kwargs)
        except RuntimeError as error:
            if function is not torch.autograd.grad:
                raise
            raise PipedreamError(
                f"torch.autograd.grad in the model's forward failed in a stage: {error}: let a module of its own "
                "compute what gradients are taken of, and take them"
            ) from error
        return self._made(step, returned, args, kwargs)

    # ----------------------------------------------------------------------------------------------------------------

    def _made(
        self,
        step: Step,
        returned: Any,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        shown: Sequence[tuple[nn.Module, Any]] = (),
    ) -> Any:
        """Keep what is sent of a call that was made, and mark its outputs."""
        self._making = False
        filled = returned
        if isinstance(step.returned, Filled):
            filled = step.returned.taken_from(containers_in((args, kwargs)), returned, shown)
        if step.captures or self._functions or self.after is not None:
            tensors: Sequence[torch.Tensor | None]
            tensors = [filled] if isinstance(filled, torch.Tensor) else tensors_of_value(filled)
            if len(tensors) != step.n_returned:
                arguments = {id(each) for each in tensors_of_value((args, kwargs))}
                for tensor in tensors if isinstance(step.item, Call) else ():
                    if id(tensor) not in arguments:
                        setattr(tensor, MARK, self._run)
                tensors = step.as_recorded(filled)
            given = tensors_of_value((args, kwargs)) if step.replaces else []
            for where, position, slot in step.captures:
                output = tensors[position] if where == "returned" else given[position]
                if isinstance(output, nn.Parameter):  # what is sent is an output of autograd's graph, not a leaf of it
                    with unwatched():
                        output = output.view_as(output)
                self._outputs[slot] = output
                if output is None:
                    raise PipedreamError(
                        f"'{step.name}' has not returned all that it did with example_inputs, and a later stage needs "
                        "it: cut elsewhere"
                    )
            if self._functions or self.after is not None:
                outputs = [
                    tensors[found.position] if found.where == "returned" else given[found.position]
                    for found in step.found
                ]
                for output in outputs:
                    # A weight that is returned as it is, as by weight.to(device), is one in every forward.
                    if output is not None and not isinstance(output, nn.Parameter):
                        setattr(output, MARK, self._run)
                if self.after is not None:
                    with unwatched():
                        self.after(step, outputs)
        self._leave()
        return returned

    def _skip(self, step: Step, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """Return what stands for the outputs of a call that another stage makes."""
        if step.counts and not self._trying:
            count_calls(step.counts)
        if self._trying and step.own:
            if any(isinstance(each, Placeholder) and each.key == INPUT for each in tensors_of_value((args, kwargs))):
                raise _Needed
            if self._position >= self._end and not self._is_last:
                raise _Left
        given: list[torch.Tensor] | None = None
        if step.replaces:
            given = tensors_of_value((args, kwargs))
            for found in step.replaces:
                old = given[found.position]
                setattr(old, MARK, self._run)
                self._aliases[id(old)] = (old, self._stand_in(step, found.key))
        if isinstance(step.returned, Returned) and step.returned.argument is None and step.returned.key is not None:
            returned = self._stand_in(step, step.returned.key)
            if step.module is not None and step.module._forward_hooks:
                self._show_to_hooks(step.module, args, kwargs, returned)
            return returned
        if given is None:
            given = tensors_of_value((args, kwargs))

        def fill(each: Any) -> Any:
            if each.argument is not None:
                old = given[each.argument]
                return self._aliases.get(id(old), (old, old))[1]
            return self._stand_in(step, each.key)

        returned = fill_template(fill, step.returned)
        if isinstance(returned, Filled):
            returned.put_into(containers_in((args, kwargs)))
            for module, each in returned.shown:
                self._show_to_hooks(module, (), {}, each)
            returned = returned.returned
        if step.module is not None and step.module._forward_hooks:
            self._show_to_hooks(step.module, args, kwargs, returned)
        return returned

    def _show_to_hooks(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], returned: Any
    ) -> None:
        """Let hooks that keep a module's output, as for a loss of routers, have what stands for it."""
        for number, hook in list(module._forward_hooks.items()):  # hooks may take themselves off
            if is_seeding(hook):
                continue
            with suppress(_ShownError), _Showing(self._shown):
                if number in module._forward_hooks_with_kwargs:
                    hook(module, args, kwargs, returned)
                else:
                    hook(module, args, returned)

    def _shown(self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """Return what stands for a function of what another stage has; the stage of the hook's module computes it."""
        if self._trying:
            raise _Needed  # for the shapes
        try:
            args, kwargs = map_tensors(self._without_values, (args, kwargs))
            with self._fake:
                answer = function(*args, **kwargs)
        except Exception as error:
            raise _ShownError from error
        return map_tensors(lambda each: Placeholder.make(None, each), answer)

    def _stand_in(self, step: Step, key: Key | None) -> Any:
        number = None if key is None else step.received.get(key)
        if number is not None and not self._trying:
            return self._received[number]
        assert key is not None
        if key not in self._placeholders:
            self._placeholders[key] = Placeholder.make(key)
        placeholder = self._placeholders[key]
        setattr(placeholder, MARK, self._run)
        return placeholder

    def _with_aliases(self, value: Any) -> Any:
        return map_tensors(lambda each: self._aliases.get(id(each), (each, each))[1], value)

    def _draw(self) -> None:
        if not self._trying:
            seed_draw(self._n_draws)
        self._n_draws += 1

    def _question(self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """Answer a question about a tensor, such as x.size(0); a placeholder's size follows from the minibatch's."""
        if self._trying:
            raise _Needed
        # A tensor without values takes most of a millisecond to make, and forwards ask the same of every microbatch.
        asked = None
        if args and isinstance(args[0], Placeholder) and not kwargs and all(isinstance(each, int) for each in args[1:]):
            asked = (function, self._value_of(args[0]), self.device, *args[1:])
            if asked in self._answers:
                return self._answers[asked]
        if any(isinstance(each, Placeholder) for each in tensors_of_value((args, kwargs))):
            args, kwargs = map_tensors(self._without_values, (args, kwargs))
        answer = function(*args, **kwargs)
        if tensors_of_value(answer):
            raise self._other_path(f"a function {function_name(function)}")
        if asked is not None and isinstance(answer, _ANSWERS):
            self._answers[asked] = answer
        return answer

    def _without_values(self, tensor: torch.Tensor) -> torch.Tensor:
        if not isinstance(tensor, Placeholder):
            return tensor
        if tensor.without_values is not None:
            return tensor.without_values
        value = self._value_of(tensor)
        with self._fake:
            return torch.empty(value.shape, dtype=value.dtype, device=self.device, requires_grad=value.needs_gradient)

    def _value_of(self, placeholder: Placeholder) -> Value:
        """Return what the call that a placeholder stands for puts out for this minibatch."""
        key = placeholder.key
        assert key is not None
        if key not in self._values:
            self._values[key] = self._shapes(*self._given, key)
        return self._values[key]

    def _is_marked(self, values: Sequence[Any]) -> bool:
        """Return whether a tensor among some arguments depends on a call of the graph.

        Raises:
            PipedreamError: on a call of an earlier run.
        """
        marked = False
        for each in values:
            if isinstance(each, torch.Tensor):
                run = each.__dict__.get(MARK)
                if run is None:
                    marked = marked or isinstance(each, nn.Parameter)
                elif run is self._run or run is True:
                    marked = True
                else:
                    raise kept_of_another_forward()
            elif isinstance(each, list | tuple) and self._is_marked(each):
                marked = True
        return marked

    def _other_path(self, what: str) -> PipedreamError:
        expected = self._steps[self._position].name if self._position < len(self._steps) else "the end"
        where, kind = place_of_user()
        return PipedreamError(
            f"the model's forward took another path than with example_inputs: {where} called {what} where "
            f"'{expected}' had been called: keep the module that decides whole, such as by "
            f"TrainConfig(leaf_modules=[{kind}])"
        )


@contextmanager
def _shown_in(modules: Iterable[nn.Module]) -> Iterator[Sequence[tuple[nn.Module, Any]]]:
    """Yield (module, what it returns) for modules in a call, once they have returned it."""
    shown: list[tuple[nn.Module, Any]] = []

    def note(module: nn.Module, args: Any, returned: Any) -> None:
        shown.append((module, returned))

    handles = [module.register_forward_hook(note) for module in modules]
    try:
        yield shown
    finally:
        for handle in handles:
            handle.remove()


def is_plain_sequential(module: nn.Module) -> bool:
    """Return whether a module passes its argument through its children, one after the other, and nothing else."""
    return type(module).forward is nn.Sequential.forward and "forward" not in vars(module)


def _direct_chain(model: nn.Module, steps: Sequence[Step]) -> tuple[Sequence[Step], int | None] | None:
    """Return the calls of a stage that are children of an nn.Sequential and all that the stage does, if they are.

    Nothing else runs in such a forward, so that the stage need not rerun it.

    Returns:
        the calls, and the number of the received tensor that the first one takes; None for the model's argument.
    """
    own = [number for number, step in enumerate(steps) if step.own]
    if not own or type(model) is not nn.Sequential or not is_plain_sequential(model):
        return None  # a class of its own may do more when it is called
    if [step.module for step in steps] != list(model):
        return None
    first, last = own[0], own[-1]
    calls = steps[first : last + 1]
    shown = (step.module for step in steps if not step.own and step.module is not None)
    if any(not is_seeding(hook) for module in shown for hook in module._forward_hooks.values()):
        return None
    if any(isinstance(step.returned, Filled) for step in steps):
        return None
    if len(calls) != len(own) or any(step.counts for step in steps) or any(step.captures for step in calls[:-1]):
        return None
    if not isinstance(calls[-1].returned, Returned):
        return None  # several tensors
    if first == 0:
        return calls, None
    given = steps[first - 1]
    if len(given.received) != 1 or not isinstance(given.returned, Returned):
        return None
    (number,) = given.received.values()
    return calls, number


def _has_hooks(module: nn.Module) -> bool:
    own = module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    return bool(own) or _has_any_global_hook()  # type: ignore[no-untyped-call]


def _join_chain(steps: Sequence[Step]) -> None:
    """Let the first of some children of an nn.Sequential that the stage calls run those that follow as well."""
    chain: list[Step] = []
    for step in [*steps, None]:
        plain = step is not None and not isinstance(step.returned, Filled)
        if step is not None and plain and step.own and step.module is not None and step.function is None:
            chain.append(step)
            if step.captures:
                _link(chain)
                chain = []
            continue
        _link(chain)
        chain = []


def _link(chain: list[Step]) -> None:
    if len(chain) > 1 and not any(step.captures for step in chain[:-1]):
        chain[0].chain = tuple(step.module for step in chain if step.module is not None)
        for step in chain[1:]:
            step.done = True


def _computes_from_arguments(scope: Scope) -> bool:
    """Return whether a module returns a tensor that depends on no call of the graph."""
    return any(each.key is None and each.argument is None for each in _returned(scope.returned))


def _returned(template: Any) -> list[Returned]:
    """Return what stands for tensors in a recorded return value, in order."""
    found: list[Returned] = []

    def note(each: Returned) -> Returned:
        found.append(each)
        return each

    fill_template(note, template)
    return found


def fill_template(fill: Callable[[Any], Any], template: Any) -> Any:
    """Return a recorded return value with fill(each) in place of every Returned."""
    return map_tensors(fill, template, leaf=Returned)
