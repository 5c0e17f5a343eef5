"""A model given as a function that builds it: every rank keeps only what its own stages hold.

The function is called twice. It fills every tensor both times, one after the other, as it always does; but
when more than a few stand in memory, those that were not touched for longest are dropped::

                                                  ▓ in memory   ░ dropped
    to capture the model     a ▓▓▓▓▓▓░░░░░░░░
                             b    ▓▓▓▓▓▓░░░░░     afterwards weights are on the meta device: shapes, no memory
                             c       ▓▓▓▓▓▓░░
                             d          ▓▓▓▓▓

    for a stage that has b   a ▓▓▓▓▓▓░░░░░░░░
                             b    ▓▓▓▓▓▓▓▓▓▓▓──►  the stage's
                             c       ▓▓▓▓▓▓░░
                             d          ▓▓▓▓▓

So every random number is drawn in its turn, and what is kept is what it is in the whole model, bit for bit.
A function that looks back at what has been dropped is called once more with everything kept, and a warning.
"""

from __future__ import annotations

import contextlib
import copy
import ctypes
import random
import warnings
import zlib
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy
import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pipedream_hpc.errors import PipedreamError

if TYPE_CHECKING:
    from pipedream_hpc.model.graph import LayerGraph

Factory = Callable[[], nn.Module]

#: Bytes that are not kept may stand in memory, beside twice the largest tensor so far: an initialisation works
#: on a few of its size.
_SPARE = 16 << 20

#: Operations that fill their first argument and do not look at it.
_FILLING = frozenset(
    getattr(torch.ops.aten, name)
    for name in ("uniform_", "normal_", "fill_", "zero_", "copy_", "random_", "bernoulli_", "exponential_")
)

#: Functions that get at the memory of a tensor behind torch's back.
_RAW = frozenset(
    ("numpy", "__array__", "__dlpack__", "data_ptr", "untyped_storage", "storage", "__deepcopy__", "__reduce_ex__")
)


def whole(model: nn.Module | Factory) -> nn.Module:
    """The model with all its weights.

    Raises:
        PipedreamError: it is neither a module nor a function that builds one.
    """
    if isinstance(model, nn.Module):
        return model
    if not callable(model):
        raise PipedreamError(
            f"the model is of type {type(model).__name__}: give a torch.nn.Module, or a function without arguments "
            "that builds one"
        )
    built = model()
    if not isinstance(built, nn.Module):
        raise PipedreamError(
            f"the function given as model built something of type {type(built).__name__}: it should return a "
            "torch.nn.Module"
        )
    return built


def another(model: nn.Module | Factory) -> nn.Module:
    """A whole model of one's own; random number generators stay where they are."""
    if isinstance(model, nn.Module):
        return copy.deepcopy(model)
    before = _Surroundings()
    try:
        return whole(model)
    finally:
        before.put_back()


class Recipe:
    """How to make some of the tensors of a model.

    Getting one calls the function: random number generators are then where building the whole model leaves
    them, and nothing here moves them again.

    Args:
        factory: builds the model, the same every time it is called.

    Attributes:
        model: the whole model, its parameters on the meta device.
        fingerprint: of torch's random numbers after the model; the same on ranks that build the same.

    Raises:
        PipedreamError: the function does not build a module.
    """

    def __init__(self, factory: Factory) -> None:
        self._factory, self._start, self._frugal = factory, _Surroundings(), True
        self.model, construction = self._built(())
        self._start.generators = construction.generators
        named = _named(self.model)
        self._shapes = {name: tensor.shape for name, tensor in named.items()}
        self._numbers = {name: construction.number(tensor) for name, tensor in named.items()}
        _empty(self.model, construction)
        self.fingerprint = f"{zlib.crc32(torch.get_rng_state().numpy().data):08x}"

    def make(self, names: Collection[str]) -> dict[str, torch.Tensor]:
        """Parameters and buffers of the model, by name.

        Raises:
            PipedreamError: the function builds another model than the first time, or has made no such tensor.
        """
        for name in names:
            if name not in self._numbers:
                raise PipedreamError(
                    f"'{name}' is computed from a large buffer while the model is captured, which a model given as a "
                    "function does not have yet: give the built model, or compute it when the model is built"
                )
        before = _Surroundings(self._start.generators)
        try:
            made, construction = self._made_again({self._numbers[name] for name in names})
            if not all(construction.intact(made[name]) for name in names):
                made, _ = self._made_again(None)
        finally:
            before.put_back()
        return {name: made[name] for name in names}

    def _made_again(self, kept: Collection[int] | None) -> tuple[dict[str, torch.Tensor], _Construction]:
        self._start.put_back()
        model, construction = self._built(kept)
        made = _named(model)
        if {name: tensor.shape for name, tensor in made.items()} != self._shapes:
            raise PipedreamError(
                "the function given as model built another one when it was called again: it is called twice, and has "
                "to build the same"
            )
        return made, construction

    def _built(self, kept: Collection[int] | None) -> tuple[nn.Module, _Construction]:
        reason = ""
        if self._frugal and kept is not None:
            try:
                with _Construction(kept) as construction, _Watched(construction):
                    return whole(self._factory), construction
            except PipedreamError:
                raise
            except Exception as error:  # the function's own comes again, from where nothing is dropped
                reason = str(error).partition("\n")[0]
            self._start.put_back()
        with _Construction(None) as construction:
            model = whole(self._factory)
        if reason:
            self._frugal = False
            warnings.warn(f"every rank holds the whole model while it is built: {reason}", stacklevel=2)
        return model, construction


def materialize(graph: LayerGraph, modules: Iterable[nn.Module]) -> None:
    """Give the modules of stages their weights.

    A model that was captured as it is has them already: then nothing is done.

    Args:
        graph: the captured model.
        modules: cut from it.

    Raises:
        PipedreamError: the function that builds the model builds another one than it was captured from.
    """
    if graph.recipe is None:
        return
    places = [[place for place in _tensors_of(module) if place[3].is_meta] for module in modules]
    made = graph.recipe.make({name for each in places for name, _, _, _ in each})
    for each in places:
        # Replicas share weights until they stand in a stash; buffers are their own.
        memo: dict[int, Any] = {id(tensor): tensor for tensor in made.values() if isinstance(tensor, nn.Parameter)}
        for name, owner, key, _ in each:
            setattr(owner, key, copy.deepcopy(made[name], memo))


def give_back() -> None:
    """Hand freed memory back to the system: glibc keeps that of tensors below 32 MiB, and often cannot use it again."""
    with contextlib.suppress(OSError, AttributeError):  # another libc
        ctypes.CDLL(None).malloc_trim(0)


def _tensors_of(model: nn.Module) -> Iterator[tuple[str, nn.Module, str, torch.Tensor]]:
    """(qualified name, module, attribute, tensor): parameters, buffers, and what is a mere attribute."""
    for path, module in list(model.named_modules(remove_duplicate=False)):
        for held in (module._parameters, module._buffers, vars(module)):
            for key, value in list(held.items()):
                if isinstance(value, torch.Tensor):
                    yield f"{path}.{key}" if path else key, module, key, value


def _named(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor for name, _, _, tensor in _tensors_of(model)}


def _empty(model: nn.Module, construction: _Construction) -> None:
    """Put parameters, and whatever else was dropped, on the meta device."""
    ghosts: dict[int, torch.Tensor] = {}
    places = list(_tensors_of(model))
    for _, owner, key, tensor in places:
        parameter = isinstance(tensor, nn.Parameter)
        if parameter or not construction.intact(tensor):
            ghost = torch.empty_like(tensor, device="meta", requires_grad=False)
            # What stands under two names does so afterwards.
            ghosts.setdefault(id(tensor), nn.Parameter(ghost, tensor.requires_grad) if parameter else ghost)
            setattr(owner, key, ghosts[id(tensor)])


class _Surroundings:
    """What the numbers of a model under construction depend on, as it stands now."""

    def __init__(self, generators: Iterable[tuple[torch.Generator, torch.Tensor]] = ()) -> None:
        self.generators = [(generator, generator.get_state()) for generator, _ in generators]
        self._torch, self._python, self._numpy = torch.get_rng_state(), random.getstate(), numpy.random.get_state()
        self._threads = torch.get_num_threads()  # decompositions differ in the last bit

    def put_back(self) -> None:
        for generator, state in self.generators:
            generator.set_state(state)
        torch.set_rng_state(self._torch)
        random.setstate(self._python)
        numpy.random.set_state(self._numpy)
        torch.set_num_threads(self._threads)


@dataclass
class _Memory:
    """The memory of a tensor that was made during construction."""

    number: int
    storage: torch.UntypedStorage
    nbytes: int
    intact: bool = True


class _Construction(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Numbers the tensors that are made while it is on, and drops those that were not touched for longest.

    Args:
        kept: numbers of those that are never dropped; None: all.

    Attributes:
        generators: of the user's own, drawn from, and the states they had before.
    """

    def __init__(self, kept: Collection[int] | None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.generators: list[tuple[torch.Generator, torch.Tensor]] = []
        self._kept, self._count, self._bytes, self._largest, self._freed = kept, 0, 0, 0, 0
        self._made: dict[int, _Memory] = {}  # by storage; held, so that no other gets its identity
        self._outside: dict[int, torch.UntypedStorage] = {}  # was there before
        self._recent: dict[int, _Memory] = {}  # that may be dropped, those touched last at the end

    def number(self, tensor: torch.Tensor) -> int:
        """When the memory of a tensor was made among all; -1 if it was not made here."""
        memory = self._made.get(_key(tensor))
        return -1 if memory is None else memory.number

    def intact(self, tensor: torch.Tensor) -> bool:
        """Whether a tensor has its values."""
        memory = self._made.get(_key(tensor))
        return memory is None or memory.intact

    def pin(self, tensor: torch.Tensor) -> None:
        """Do not drop a tensor from now on."""
        self._need(tensor)
        memory = self._recent.pop(_key(tensor), None)
        self._bytes -= memory.nbytes if memory else 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        self._note_generator(kwargs.get("generator"))
        if self._kept is None:
            return function(*args, **kwargs)
        with torch._C.DisableTorchFunction():  # what is looked at here is not got at by the model
            return self._numbered(function, args, kwargs)

    def _numbered(self, function: Any, args: Any, kwargs: Any) -> Any:
        given = [each for each in tree_leaves((args, kwargs)) if isinstance(each, torch.Tensor)]
        for tensor in given:
            if _key(tensor) not in self._made:
                self._outside.setdefault(_key(tensor), tensor.untyped_storage())
            self._touch(tensor)
        filled = args[0] if function.overloadpacket in _FILLING else None
        for tensor in given:
            if not function.is_view and tensor is not filled:
                self._need(tensor)
        result = function(*args, **kwargs)
        if filled is not None and _key(filled) in self._made and _is_all(filled):
            self._made[_key(filled)].intact = True
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self._note(tensor, outside=function.overloadpacket is torch.ops.aten.set_)
        self._drop({_key(tensor) for tensor in (*given, *tree_leaves(result)) if isinstance(tensor, torch.Tensor)})
        return result

    def _note_generator(self, generator: torch.Generator | None) -> None:
        if generator is not None and all(generator is not known for known, _ in self.generators):
            self.generators.append((generator, generator.get_state()))

    def _note(self, tensor: torch.Tensor, *, outside: bool) -> None:
        key, storage = _key(tensor), tensor.untyped_storage()
        if key in self._made or key in self._outside:
            return
        if outside or tensor.device.type != "cpu" or not storage.resizable():
            self._outside[key] = storage
            return
        memory = self._made[key] = _Memory(self._count, storage, storage.nbytes())
        self._count += 1
        assert self._kept is not None
        if memory.number not in self._kept:
            self._recent[key] = memory
            self._bytes += memory.nbytes
            self._largest = max(self._largest, memory.nbytes)

    def _touch(self, tensor: torch.Tensor) -> None:
        """Give a dropped tensor memory again, if not its values."""
        memory = self._recent.pop(_key(tensor), None)
        if memory is None:
            memory = self._made.get(_key(tensor))
            if memory is None or memory.storage.nbytes() == memory.nbytes:
                return
            memory.storage.resize_(memory.nbytes)
            self._bytes += memory.nbytes
        self._recent[_key(tensor)] = memory

    def _need(self, tensor: torch.Tensor) -> None:
        if not self.intact(tensor):
            raise RuntimeError(f"it looks back at a tensor of shape {tuple(tensor.shape)} that it has made before")

    def _drop(self, in_use: set[int]) -> None:
        allowed = _SPARE + 2 * self._largest
        if self._bytes <= allowed:
            return
        for key in [key for key in self._recent if key not in in_use]:
            if self._bytes <= allowed:
                break
            memory = self._recent.pop(key)
            memory.storage.resize_(0)
            memory.intact = False
            self._bytes -= memory.nbytes
            self._freed += memory.nbytes
        if self._freed > _SPARE:
            give_back()
            self._freed = 0


class _Watched(TorchFunctionMode):
    """Tells a construction whose memory is got at in ways that it does not see."""

    def __init__(self, construction: _Construction) -> None:
        super().__init__()
        self._construction = construction

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(function, "__name__", "") in _RAW and args and isinstance(args[0], torch.Tensor):
            self._construction.pin(args[0])
        return function(*args, **(kwargs or {}))


def _key(tensor: torch.Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def _is_all(tensor: torch.Tensor) -> bool:
    """Whether a tensor has all of its memory to itself."""
    return tensor.is_contiguous() and tensor.nbytes == tensor.untyped_storage().nbytes()
