"""Draws: the random numbers that the stages draw in forwards, logged, checked, and drawn again by the reference.

::

    stage 0    draw ──► generator state, numbers ─┐                     ┌─► set state ──► draw     the user's forward
    stage 1    draw ──► generator state, numbers ─┴─► by microbatch ────┤
                                                                        └─► stages agree? alike? as many as p says?

A draw is an operation of torch, or a call of a module that draws Python's or NumPy's random numbers. Nothing here knows
how the runtime seeds generators: the log has what the generators held, and the reference draws from that in the order
in which the model's own forward asks.
"""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import zip_longest
from typing import Any

import numpy
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pipedream_hpc.errors import PipedreamError
from pipedream_hpc.model.checksum import checksum
from pipedream_hpc.model.drawn import draws_numbers
from pipedream_hpc.runtime.execution.stage import Stage

#: Operations whose result is nothing but random numbers, of a distribution that does not depend on tensors.
_NUMBERS = frozenset(
    {
        *("bernoulli_.float", "bernoulli.p", "uniform_.default", "normal_.default", "exponential_.default"),
        *("geometric_.default", "cauchy_.default", "log_normal_.default", "random_.default", "random_.to"),
        *(
            "random_.from",
            "rand.default",
            "randn.default",
            "rand_like.default",
            "randn_like.default",
            "randint.default",
        ),
        *("randint.low", "randint_like.default", "randint_like.low_dtype", "randperm.default"),
    }
)
#: Numbers are expected to differ where they have so much information, in bits, that they are never equal by chance.
_ENOUGH_BITS = 64.0
#: Bound of the surprise, in nats, at how often a number is kept: by chance it is exceeded once in 10^13 draws.
_MOST_SURPRISE = 30.0


@dataclass(frozen=True)
class Draw:
    """One draw.

    Attributes:
        what: the operation with what it was asked for.
        state: of the generator before it; of Python's and NumPy's for a module that draws from these.
        generator: `cpu` or `cuda` for torch's own, `given` for one that the operation was given, `python`.
        moved: whether it has drawn anything; what Python's generators hold after a module is not drawn by it.
        numbers: checksum of the numbers; None if they have too little information to be unlike all others.
        kept: (ones, numbers, probability of a one) of a Bernoulli distribution.
        place: (number of the call in the forward, whether inside it, number of the draw there).
        where: the module or function that draws, for messages.
    """

    what: str
    state: Any
    generator: str
    moved: bool = True
    numbers: int | None = None
    kept: tuple[int, int, float] | None = None
    place: tuple[int, bool, int] = (0, False, 0)
    where: str = ""

    def same(self, other: Draw | None) -> bool:
        """Return whether another draw asks for the same and gets the same numbers."""
        if other is None or self.what != other.what:
            return False
        return self.state == other.state or not (self.moved or other.moved)

    def __str__(self) -> str:
        return f"{self.what} in {self.where}" if self.where else self.what


#: The draws of microbatches, numbered within the run, in the order of the forward.
Draws = dict[int, list[Draw]]


#: (stage, microbatch of the run) -> the draws of its forward; and of the recomputed one, if there is.
Forwards = dict[tuple[int, int], list[list[Draw]]]


class DrawLog:
    """What the stages of one process draw.

    Attributes:
        forwards: what they have drawn.
    """

    def __init__(self) -> None:
        self.forwards: Forwards = {}

    def watch(self, stages: Iterable[Stage]) -> Callable[[], None]:
        """Log the draws of stages; return a function that ends it."""
        watched, python = list(stages), {}
        for stage in watched:
            stage.around_forward = partial(self._forward, stage)
            stage.stage_module.watch_calls(lambda step, outputs: None)  # it then tells where its forward is
            python.update(stage.stage_module.drawing_python())  # replicas in one process share modules
        handles = [
            handle
            for name, module in python.items()
            for handle in _around(module, partial(self._note_python, f"Python's random numbers in '{name}'"))
        ]

        def end() -> None:
            for stage in watched:
                stage.around_forward = None
                stage.stage_module.watch_calls(None)
            for handle in handles:
                handle.remove()

        return end

    @contextmanager
    def _forward(self, stage: Stage, microbatch: int) -> Iterator[None]:
        self._stage, self._counts = stage, Counter[tuple[int, bool]]()
        self._draws: list[Draw] = []
        self.forwards.setdefault((stage.index, microbatch), []).append(self._draws)
        with _Mode(self._note):
            yield

    def _note(self, function: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        generator, kind = _generator_of(function, args, kwargs)
        before = _state_of(generator)
        returned = function(*args, **kwargs)
        moved = _state_of(generator) != before
        place, where = self._place()
        what, numbers, kept = _described(function, args, kwargs, returned)
        self._draws.append(Draw(what, before, kind, moved, numbers, kept, place, where))
        return returned

    def _note_python(self, what: str, when: str) -> None:
        place, where = self._place()
        state = random.getstate(), _numpy_state()
        self._draws.append(Draw(f"{what}, {when}", state, "python", when == "before", place=place, where=where))

    def _place(self) -> tuple[tuple[int, bool, int], str]:
        call, inside, name = self._stage.stage_module.place
        self._counts[call, inside] += 1
        return (call, inside, self._counts[call, inside]), f"'{name}'" if name else ""


class _Mode(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Passes operations that draw to a function, which runs them."""

    def __init__(self, run: Callable[[Any, Sequence[Any], Mapping[str, Any]], Any]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._run = run

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if not draws_numbers(function, args, kwargs) or any(map(_without_values, tree_leaves((args, kwargs)))):
            return function(*args, **kwargs)
        return self._run(function, args, kwargs)


def _without_values(value: Any) -> bool:
    return isinstance(value, FakeTensor) or (isinstance(value, torch.Tensor) and value.is_meta)


def _around(module: nn.Module, note: Callable[[str], None]) -> list[Any]:
    """Call note("before") and note("after") around every call of a module; return the handles of the hooks.

    A stage also shows the outputs of other stages' calls to hooks: those calls have not begun here.
    """
    running: list[int] = []

    def before(*_: Any) -> None:
        running.append(1)
        note("before")

    def after(*_: Any) -> None:
        if running:
            running.pop()
            note("after")

    return [module.register_forward_pre_hook(before), module.register_forward_hook(after)]


def _generator_of(function: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[torch.Generator, str]:
    names = [argument.name for argument in function._schema.arguments]
    named = {**dict(zip(names, args, strict=False)), **kwargs}
    if named.get("generator") is not None:
        return named["generator"], "given"
    tensors = (each.device for each in tree_leaves((args, kwargs)) if isinstance(each, torch.Tensor))
    device = torch.device(next(tensors, None) or named.get("device") or "cpu")
    if device.type != "cuda":
        return torch.default_generator, "cpu"
    return torch.cuda.default_generators[torch.cuda.current_device() if device.index is None else device.index], "cuda"


def _state_of(generator: torch.Generator) -> bytes:
    return generator.get_state().numpy().tobytes()


def _set_state(generator: torch.Generator, state: bytes) -> None:
    generator.set_state(torch.frombuffer(bytearray(state), dtype=torch.uint8))


def _numpy_state() -> tuple[Any, ...]:
    state: Any = numpy.random.get_state()
    return (state[0], state[1].tobytes(), *state[2:])


def _set_python_states(states: Any) -> None:
    python, (kind, keys, *rest) = states
    random.setstate(python)
    numpy.random.set_state((kind, numpy.frombuffer(keys, dtype=numpy.uint32), *rest))


def _described(
    function: Any, args: Sequence[Any], kwargs: Mapping[str, Any], returned: Any
) -> tuple[str, int | None, tuple[int, int, float] | None]:
    """Return what a draw is, in words; the checksum of its numbers; and how many of them are ones."""
    name = str(function).removeprefix("aten.")
    tensors = [each for each in tree_leaves(returned) if isinstance(each, torch.Tensor)]
    options = [f"{each:g}" for each in args[1:] if isinstance(each, float)]
    shape = tuple(tensors[0].shape) if tensors else ()
    what = f"{name.partition('.')[0]} of shape {shape}" + (f" with {', '.join(options)}" if options else "")
    numbers = tensors[1] if name.startswith("native_dropout.") else tensors[0] if name in _NUMBERS else None
    if numbers is None:
        return what, None, None
    kept, n = None, numbers.numel()
    if numbers is not tensors[0] or name.startswith("bernoulli"):
        probability = 1 - args[1] if numbers is not tensors[0] else args[1] if len(args) > 1 else kwargs.get("p", 0.5)
        kept = (int(numbers.count_nonzero()), n, float(probability))
        bits = n * _entropy([kept[0], n - kept[0]])
    elif numbers.is_floating_point():
        bits = 8.0 * n  # at least: bfloat16 has no more
    else:
        bits = n * _entropy(torch.unique(numbers, return_counts=True)[1].tolist())
    return what, checksum([numbers]) if bits >= _ENOUGH_BITS else None, kept


def _entropy(counts: Sequence[int]) -> float:
    """Return the information of one of some numbers, in bits, from how often each of them occurs."""
    total = sum(counts)
    return -sum(count / total * math.log2(count / total) for count in counts if count)


# -- what is wrong with them -------------------------------------------------------------------------------------------


def merged(of_processes: Iterable[Forwards]) -> tuple[Draws, list[str]]:
    """Return the draws of all processes by microbatch, and what is wrong where several stages make the same draw.

    What a forward draws from its arguments alone, every stage draws that runs so far.
    """
    found: dict[int, dict[tuple[int, bool, int], tuple[int, Draw]]] = {}
    problems = []
    forwards = sorted((each for own in of_processes for each in own.items()), key=lambda item: item[0])
    for (stage, microbatch), (first, *again) in forwards:
        for repeated in again:
            different = next((a or b for a, b in zip_longest(first, repeated) if not a or not a.same(b)), None)
            if different is not None:
                problems.append(
                    f"stage {stage} draws other random numbers when it runs the forward of microbatch {microbatch} of "
                    f"the run again: {different}"
                )
        places = found.setdefault(microbatch, {})
        for draw in first:
            other, known = places.setdefault(draw.place, (stage, draw))
            if not known.same(draw):
                problems.append(
                    f"stages {other} and {stage} draw different random numbers where the forward of microbatch "
                    f"{microbatch} of the run draws once: {known} and {draw}"
                )
    draws = {
        microbatch: [draw for _, (_, draw) in sorted(places.items(), key=lambda item: item[0])]
        for microbatch, places in sorted(found.items())
    }
    return draws, problems


def problems_of(draws: Draws) -> Iterator[str]:
    """Yield what is wrong with random numbers by themselves: draws that are alike, and masks that keep too many."""
    first: dict[Any, tuple[int, Draw]] = {}
    for microbatch, of_microbatch in draws.items():
        for draw in of_microbatch:
            # From the same state come the same numbers, even if they are too few to tell.
            keys: list[Any] = [(draw.generator, draw.state)] if draw.moved else []
            keys += [draw.numbers] if draw.numbers is not None else []
            for key in keys:
                other, known = first.setdefault(key, (microbatch, draw))
                if known is not draw:
                    yield (
                        f"two draws are the same random numbers: {known} in microbatch {other} of the run, and {draw} "
                        f"in microbatch {microbatch}"
                    )
                    break
    rates: dict[tuple[str, float], list[int]] = {}
    for draw in (each for of_microbatch in draws.values() for each in of_microbatch):
        if draw.kept is not None:
            ones, n, probability = draw.kept
            total = rates.setdefault((draw.where, probability), [0, 0])
            total[0], total[1] = total[0] + ones, total[1] + n
    for (where, probability), (ones, n) in rates.items():
        if _surprise(ones, n, probability) > _MOST_SURPRISE:
            yield f"{ones} of {n} numbers are kept in {where}, with a probability of {probability:g}"


def _surprise(ones: int, n: int, probability: float) -> float:
    """Return the Chernoff bound of the probability of so many ones, or of more extreme counts, as -ln."""
    if n == 0:
        return 0.0
    total = 0.0
    for count, expected in ((ones, probability), (n - ones, 1 - probability)):
        if count:
            total += count * math.log(count / n / expected) if expected > 0 else math.inf
    return total


def plan_problem(draws: Draws, alone: Draws) -> str | None:
    """Return what is different in the draws of the same microbatches in one stage; None if nothing is.

    Args:
        draws: of the stages.
        alone: of a run of the same model in one stage, of some of the microbatches.
    """
    for microbatch, expected in alone.items():
        for draw, other in zip_longest(draws.get(microbatch, []), expected):
            if draw is None or not draw.same(other):
                return (
                    f"random numbers depend on the plan: in microbatch {microbatch} of the run the stages draw "
                    f"{draw or 'nothing more'}, and the model in one stage draws {other or 'nothing more'}"
                    + (" from another state" if draw and other and draw.what == other.what else "")
                )
    return None


# -- the reference -----------------------------------------------------------------------------------------------------


class Replay:
    """Lets a model by itself draw the random numbers that were drawn before.

    Args:
        model: the model.
        draws: what it is to draw.
    """

    def __init__(self, model: nn.Module, draws: Draws) -> None:
        self._draws, self._microbatch = draws, 0
        self._todo: list[Draw] = []
        self._at: dict[bytes, int] = {}
        self._n_drawn = 0
        python = {draw.what for each in draws.values() for draw in each if draw.generator == "python"}
        for name, module in model.named_modules():
            what = f"Python's random numbers in '{name}'"
            if f"{what}, before" in python:
                _around(module, partial(self._draw_python, what))

    @contextmanager
    def microbatch(self, number: int) -> Iterator[None]:
        """Draw what microbatch `number` of the run has drawn, in its forward; and again where backward asks for it.

        Raises:
            PipedreamError: the model does not draw what was drawn before.
        """
        self._microbatch, self._todo, self._n_drawn = number, self._draws.get(number, []), 0
        self._at = {draw.state: index for index, draw in enumerate(self._todo) if draw.generator != "python"}
        self._prepare(0)
        with _Mode(self._draw):
            yield
        if self._n_drawn < len(self._todo):
            raise self._other(None)

    def _draw(self, function: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        generator, kind = _generator_of(function, args, kwargs)
        index = self._n_drawn
        if index < len(self._todo):
            self._n_drawn += 1
        else:
            # The backward of activation checkpointing, which has restored the state that the forward began with.
            index = self._at.get(_state_of(generator), len(self._todo))
        draw = self._todo[index] if index < len(self._todo) else None
        if draw is None or draw.generator == "python":
            raise self._other(_described(function, args, kwargs, torch.empty(0))[0])
        _set_state(generator, draw.state)
        returned = function(*args, **kwargs)
        what = _described(function, args, kwargs, returned)[0]
        if (what, kind) != (draw.what, draw.generator):
            raise self._other(what, draw)
        self._prepare(index + 1)
        return returned

    def _prepare(self, index: int) -> None:
        """Give torch's generator the state that the next draw needs; activation checkpointing keeps it."""
        draw = self._todo[index] if index < len(self._todo) else None
        if draw is not None and draw.generator in ("cpu", "cuda"):
            _set_state(torch.default_generator if draw.generator == "cpu" else _cuda_generator(), draw.state)

    def _draw_python(self, what: str, when: str) -> None:
        draw = self._todo[self._n_drawn] if self._n_drawn < len(self._todo) else None
        if draw is None or draw.what != f"{what}, {when}":
            raise self._other(f"{what}, {when}", draw)
        _set_python_states(draw.state)
        self._n_drawn += 1
        self._prepare(self._n_drawn)

    def _other(self, what: str | None, draw: Draw | None = None) -> PipedreamError:
        expected = draw or (self._todo[self._n_drawn] if self._n_drawn < len(self._todo) else None)
        return PipedreamError(
            f"in microbatch {self._microbatch} of the run the model by itself draws {what or 'nothing more'}, where "
            f"its stages draw {expected or 'nothing more'}: compiled modules and the model's own generators cannot be "
            "verified"
        )


def _cuda_generator() -> torch.Generator:
    return torch.cuda.default_generators[torch.cuda.current_device()]
