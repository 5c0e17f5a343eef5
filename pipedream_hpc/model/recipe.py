"""ModelRecipe: a model given as a function, of which every rank keeps only the tensors of its own stages.

The function is called twice, and once more where the whole model is checked. Each call fills every tensor in turn, as
usual; but when too many are in memory, those that were not used for the longest time are freed::

                                                  ▓ in memory   ░ freed
    to capture the model     a ▓▓▓▓▓▓░░░░░░░░
                             b    ▓▓▓▓▓▓░░░░░     afterwards the weights are on the meta device: shapes, no memory
                             c       ▓▓▓▓▓▓░░
                             d          ▓▓▓▓▓

    for a stage that has b   a ▓▓▓▓▓▓░░░░░░░░
                             b    ▓▓▓▓▓▓▓▓▓▓▓──►  kept by the stage
                             c       ▓▓▓▓▓▓░░
                             d          ▓▓▓▓▓

All random numbers are drawn in the same order as for the whole model, so the kept tensors are bitwise equal to those
of the whole model. A function that reads a freed tensor is called again with everything kept, and a warning.
"""

from __future__ import annotations

import contextlib
import copy
import ctypes
import random
import warnings
import zlib
from collections.abc import Callable, Collection, Iterable, Iterator, Set
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy
import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pipedream_hpc.errors import PipedreamError
from pipedream_hpc.garbage import objects_made
from pipedream_hpc.model.checksum import checksum
from pipedream_hpc.model.originals import Originals
from pipedream_hpc.model.placeholder import Placeholder

#: Builds a model; called more than once, it must build the same model every time.
ModelFactory = Callable[[], nn.Module]

#: Bytes of tensors that may stay in memory without being kept, in addition to twice the largest tensor so far:
#: an initialisation works on a few tensors of that size.
_SPARE_BYTES = 16 << 20

#: Operations that overwrite their first argument without reading it.
_OVERWRITING = frozenset(
    getattr(torch.ops.aten, name)
    for name in ("uniform_", "normal_", "fill_", "zero_", "copy_", "random_", "bernoulli_", "exponential_")
)

#: Functions that access the memory of a tensor without a torch operation.
_RAW_ACCESS = frozenset(
    ("numpy", "__array__", "__dlpack__", "data_ptr", "untyped_storage", "storage", "__deepcopy__", "__reduce_ex__")
)


def build_model(model: nn.Module | ModelFactory) -> nn.Module:
    """Return the model with all its weights: itself, or what the function builds.

    Raises:
        PipedreamError: `model` is neither a module nor a function that builds one.
    """
    if isinstance(model, nn.Module):
        return model
    if not callable(model):
        raise PipedreamError(
            f"model is of type {type(model).__name__}: pass a torch.nn.Module, or a function without arguments "
            "that builds one"
        )
    built = model()
    if not isinstance(built, nn.Module):
        raise PipedreamError(
            f"the function given as model returned an object of type {type(built).__name__}: it must return a "
            "torch.nn.Module"
        )
    return built


def copy_model(model: nn.Module | ModelFactory) -> nn.Module:
    """Return an independent copy of the model with all its weights; random number generators are unchanged."""
    if isinstance(model, nn.Module):
        return copy.deepcopy(model)
    before = _GlobalState()
    try:
        return build_model(model)
    finally:
        before.restore()


class ModelRecipe:
    """Creates any tensors of a model by calling the function that builds it.

    Creating a recipe calls the function once: the random number generators then have the state they would have after
    building the whole model, and no method of the recipe changes them again.

    Args:
        factory: builds the model, the same every time it is called.

    Attributes:
        model: the whole model, with its parameters on the meta device.
        originals: the parameters that it was built with.
        fingerprint: checksum of torch's random state after the model was built; equal on ranks that build the same.
        loaded: values that weights without a stage have been given since, by name.
        checksums: of tensors that were made before, by name, on this or another rank: they must be made alike.

    Raises:
        PipedreamError: the function does not build a module, or returns one that exists already.
    """

    def __init__(self, factory: ModelFactory) -> None:
        self._factory, self._start, self._may_free = factory, _GlobalState(), True
        self.checksums: dict[str, int] = {}
        self.loaded: dict[str, torch.Tensor] = {}
        with objects_made() as made:
            self.model, construction = self._build(())
        _refuse_existing(self.model, made)
        require_values(self.model)
        self._start.generators = construction.generators
        tensors = _by_name(self.model)
        self._shapes = {name: tensor.shape for name, tensor in tensors.items()}
        self._numbers = {name: construction.number(tensor) for name, tensor in tensors.items()}
        self.originals = Originals(self.model)
        _move_to_meta(self.model, construction)
        self.fingerprint = f"{zlib.crc32(torch.get_rng_state().numpy().data):08x}"

    def make_tensors(self, names: Collection[str]) -> dict[str, torch.Tensor]:
        """Return parameters and buffers of the model by name.

        Raises:
            PipedreamError: the function builds a different model than before, or creates no such tensor.
        """
        for name in names:
            if name not in self._numbers:
                raise PipedreamError(
                    f"'{name}' is computed from a large buffer while the model is captured, and the buffers of a model "
                    "given as a function have no values yet: pass the built model, or compute it in the function"
                )
        before = _GlobalState(self._start.generators)
        try:
            made, construction = self._build_again({self._numbers[name] for name in names})
            if not all(construction.intact(made[name]) for name in names):
                made, _ = self._build_again(None)
        finally:
            before.restore()
        for name in (each for each in self._numbers if each in names):
            if name in self.checksums and checksum([made[name]]) != self.checksums[name]:
                raise PipedreamError(
                    f"the function given as model built '{name}' with other values than for the check on rank 0: seed "
                    "all random numbers in it, NumPy's and Python's too, or pass the built model; or give "
                    "TrainConfig(check_model=False) if weights are loaded afterwards"
                )
        return {name: made[name] for name in names}

    def _build_again(self, kept: Collection[int] | None) -> tuple[dict[str, torch.Tensor], _ConstructionMode]:
        self._start.restore()
        model, construction = self._build(kept)
        made = _by_name(model)
        if any(tensor.is_meta for tensor in made.values()):
            raise PipedreamError(
                "the function given as model returns again what it built before, as with functools.cache: it must "
                "build a new model at each call, or pass the built model"
            )
        if {name: tensor.shape for name, tensor in made.items()} != self._shapes:
            raise PipedreamError(
                "the function given as model built a different model when it was called again: it is called two or "
                "three times, and must build the same model each time"
            )
        return made, construction

    def _build(self, kept: Collection[int] | None) -> tuple[nn.Module, _ConstructionMode]:
        reason = ""
        if self._may_free and kept is not None:
            try:
                with _ConstructionMode(kept) as construction, _RawAccessMode(construction):
                    return build_model(self._factory), construction
            except PipedreamError:
                raise
            except Exception as error:  # an error of the function itself is raised again below, where nothing is freed
                reason = str(error).partition("\n")[0]
            self._start.restore()
        with _ConstructionMode(None) as construction:
            model = build_model(self._factory)
        if reason:
            self._may_free = False
            warnings.warn(f"every rank holds the whole model while it is built: {reason}", stacklevel=2)
        return model, construction


def require_values(model: nn.Module) -> None:
    """Refuse a model without values, before it is trained.

    Raises:
        PipedreamError: a tensor of the model is on the meta device.
    """
    for place in tensors_of(model):
        if place.tensor.is_meta:
            raise PipedreamError(
                f"'{place.name}' of the model is on the meta device and has no values: build the model on the CPU, or "
                "pass a function that builds it there"
            )


def _refuse_existing(model: nn.Module, made: Set[int]) -> None:
    """Refuse a model with weights in modules that existed before the function was called: they would lose them.

    Args:
        model: what the function returned.
        made: identities of the objects that it made.
    """
    for place in tensors_of(model):
        if id(place.owner) not in made:
            what = f"model with '{place.name}', of a module" if id(model) in made else "model"
            raise PipedreamError(
                f"the function given as model returns a {what} that was made before: pass the model itself, or make "
                "all of it in the function"
            )


def release_memory() -> None:
    """Return freed memory to the system: glibc keeps that of tensors below 32 MiB, and often cannot reuse it."""
    with contextlib.suppress(OSError, AttributeError):  # another libc
        ctypes.CDLL(None).malloc_trim(0)


class TensorPlace(NamedTuple):
    """Where a module holds a tensor.

    Attributes:
        name: qualified name of the tensor in the model.
        owner: the module that holds it.
        attribute: name of the tensor in `owner`.
        tensor: the tensor itself.
    """

    name: str
    owner: nn.Module
    attribute: str
    tensor: torch.Tensor

    @property
    def container(self) -> dict[str, Any]:
        """The dict of `owner` that holds a tensor that is no parameter."""
        return self.owner._buffers if self.attribute in self.owner._buffers else vars(self.owner)


def tensors_of(model: nn.Module) -> Iterator[TensorPlace]:
    """Yield all places of parameters, buffers and tensors that are plain attributes."""
    for path, module in list(model.named_modules(remove_duplicate=False)):
        for held in (module._parameters, module._buffers, vars(module)):
            for key, value in list(held.items()):
                if isinstance(value, torch.Tensor) and not isinstance(value, Placeholder):
                    yield TensorPlace(f"{path}.{key}" if path else key, module, key, value)


def _by_name(model: nn.Module) -> dict[str, torch.Tensor]:
    return {place.name: place.tensor for place in tensors_of(model)}


def _move_to_meta(model: nn.Module, construction: _ConstructionMode) -> None:
    """Replace parameters, and all other tensors that were freed, by tensors on the meta device."""
    replaced: dict[int, torch.Tensor] = {}
    for _, owner, attribute, tensor in list(tensors_of(model)):
        is_parameter = isinstance(tensor, nn.Parameter)
        if is_parameter or not construction.intact(tensor):
            meta = torch.empty_like(tensor, device="meta", requires_grad=False)
            # A tensor with two names stays one tensor.
            replaced.setdefault(id(tensor), nn.Parameter(meta, tensor.requires_grad) if is_parameter else meta)
            setattr(owner, attribute, replaced[id(tensor)])


class _GlobalState:
    """The state that the values of a model under construction depend on: random generators and number of threads."""

    def __init__(self, generators: Iterable[tuple[torch.Generator, torch.Tensor]] = ()) -> None:
        self.generators = [(generator, generator.get_state()) for generator, _ in generators]
        self._torch, self._python, self._numpy = torch.get_rng_state(), random.getstate(), numpy.random.get_state()
        self._threads = torch.get_num_threads()  # decompositions differ in the last bit

    def restore(self) -> None:
        for generator, state in self.generators:
            generator.set_state(state)
        torch.set_rng_state(self._torch)
        random.setstate(self._python)
        numpy.random.set_state(self._numpy)
        torch.set_num_threads(self._threads)


@dataclass
class _Allocation:
    """The memory of a tensor that was created during construction."""

    number: int
    storage: torch.UntypedStorage
    nbytes: int
    intact: bool = True


class _ConstructionMode(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Numbers the tensors created while it is active, and frees those that were not used for the longest time.

    Args:
        kept: numbers of the tensors that are never freed; None: nothing is freed.

    Attributes:
        generators: generators of the user that were drawn from, with their states before that.
    """

    def __init__(self, kept: Collection[int] | None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.generators: list[tuple[torch.Generator, torch.Tensor]] = []
        self._kept, self._count, self._bytes, self._largest, self._freed = kept, 0, 0, 0, 0
        self._made: dict[int, _Allocation] = {}  # by storage; holding it keeps its identity unique
        self._outside: dict[int, torch.UntypedStorage] = {}  # created before
        self._recent: dict[int, _Allocation] = {}  # may be freed; most recently used last

    def number(self, tensor: torch.Tensor) -> int:
        """Return the sequence number of the tensor's allocation; -1 if it was created elsewhere."""
        memory = self._made.get(_key(tensor))
        return -1 if memory is None else memory.number

    def intact(self, tensor: torch.Tensor) -> bool:
        """Return whether a tensor still has its values."""
        memory = self._made.get(_key(tensor))
        return memory is None or memory.intact

    def pin(self, tensor: torch.Tensor) -> None:
        """Never free a tensor from now on."""
        self._require_intact(tensor)
        memory = self._recent.pop(_key(tensor), None)
        self._bytes -= memory.nbytes if memory else 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        self._record_generator(kwargs.get("generator"))
        if self._kept is None:
            return function(*args, **kwargs)
        with torch._C.DisableTorchFunction():  # accesses from here are not accesses of the model
            return self._run_numbered(function, args, kwargs)

    def _run_numbered(self, function: Any, args: Any, kwargs: Any) -> Any:
        given = [each for each in tree_leaves((args, kwargs)) if isinstance(each, torch.Tensor)]
        for tensor in given:
            if _key(tensor) not in self._made:
                self._outside.setdefault(_key(tensor), tensor.untyped_storage())
            self._touch(tensor)
        overwritten = args[0] if function.overloadpacket in _OVERWRITING else None
        for tensor in given:
            if not function.is_view and tensor is not overwritten:
                self._require_intact(tensor)
        result = function(*args, **kwargs)
        if overwritten is not None and _key(overwritten) in self._made and _owns_storage(overwritten):
            self._made[_key(overwritten)].intact = True
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self._record(tensor, outside=function.overloadpacket is torch.ops.aten.set_)
        self._free({_key(tensor) for tensor in (*given, *tree_leaves(result)) if isinstance(tensor, torch.Tensor)})
        return result

    def _record_generator(self, generator: torch.Generator | None) -> None:
        if generator is not None and all(generator is not known for known, _ in self.generators):
            self.generators.append((generator, generator.get_state()))

    def _record(self, tensor: torch.Tensor, *, outside: bool) -> None:
        key, storage = _key(tensor), tensor.untyped_storage()
        if key in self._made or key in self._outside:
            return
        if outside or tensor.device.type != "cpu" or not storage.resizable():
            self._outside[key] = storage
            return
        memory = self._made[key] = _Allocation(self._count, storage, storage.nbytes())
        self._count += 1
        assert self._kept is not None
        if memory.number not in self._kept:
            self._recent[key] = memory
            self._bytes += memory.nbytes
            self._largest = max(self._largest, memory.nbytes)

    def _touch(self, tensor: torch.Tensor) -> None:
        """Mark a tensor as just used; if it was freed, allocate its memory again, without its values."""
        memory = self._recent.pop(_key(tensor), None)
        if memory is None:
            memory = self._made.get(_key(tensor))
            if memory is None or memory.storage.nbytes() == memory.nbytes:
                return
            memory.storage.resize_(memory.nbytes)
            self._bytes += memory.nbytes
        self._recent[_key(tensor)] = memory

    def _require_intact(self, tensor: torch.Tensor) -> None:
        if not self.intact(tensor):
            raise RuntimeError(f"it reads a tensor of shape {tuple(tensor.shape)} that it created much earlier")

    def _free(self, in_use: set[int]) -> None:
        allowed = _SPARE_BYTES + 2 * self._largest
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
        if self._freed > _SPARE_BYTES:
            release_memory()
            self._freed = 0


class _RawAccessMode(TorchFunctionMode):
    """Pins tensors whose memory is accessed without a torch operation, which _ConstructionMode cannot see."""

    def __init__(self, construction: _ConstructionMode) -> None:
        super().__init__()
        self._construction = construction

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(function, "__name__", "") in _RAW_ACCESS and args and isinstance(args[0], torch.Tensor):
            self._construction.pin(args[0])
        return function(*args, **(kwargs or {}))


def _key(tensor: torch.Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def _owns_storage(tensor: torch.Tensor) -> bool:
    """Return whether a tensor covers all of its storage."""
    return tensor.is_contiguous() and tensor.nbytes == tensor.untyped_storage().nbytes()
