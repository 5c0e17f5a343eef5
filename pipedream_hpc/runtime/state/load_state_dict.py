"""Load weights and buffers by the user's own names into the stages of this process."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open

from pipedream_hpc.errors import PipedreamError
from pipedream_hpc.model.graph import LayerGraph
from pipedream_hpc.runtime.state.full_state_dict import extra_states
from pipedream_hpc.runtime.weights.stage_state import StageState


class _Source(Protocol):
    """Tensors by name, read one by one; and what modules have besides, where the source can hold it."""

    extra: Mapping[str, Any]

    def shapes(self) -> dict[str, tuple[int, ...]]: ...
    def read(self, name: str) -> torch.Tensor: ...


class _Dict:
    def __init__(self, tensors: Mapping[str, torch.Tensor]) -> None:
        self.extra: Mapping[str, Any] = {
            name: value for name, value in tensors.items() if name.rpartition(".")[2] == "_extra_state"
        }
        self._tensors = {name: tensor for name, tensor in tensors.items() if name not in self.extra}
        for name, tensor in self._tensors.items():
            if not isinstance(tensor, torch.Tensor):
                raise PipedreamError(f"'{name}' in the state dict is {type(tensor).__name__}, not a tensor")

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: tuple(tensor.shape) for name, tensor in self._tensors.items()}

    def read(self, name: str) -> torch.Tensor:
        return self._tensors[name]


class _File:
    """A safetensors file, of which only what is asked for is read. It holds tensors only."""

    extra: Mapping[str, Any] = {}

    def __init__(self, path: Path, stack: ExitStack) -> None:
        try:
            self._file = stack.enter_context(safe_open(path, framework="pt"))
        except FileNotFoundError:
            raise PipedreamError(f"{path}: no such file: give a safetensors file, or a dict of tensors") from None
        except (SafetensorError, OSError) as error:
            raise PipedreamError(f"{path}: cannot be read as a safetensors file: {error}") from None

    def shapes(self) -> dict[str, tuple[int, ...]]:
        names = self._file.keys()
        return {name: tuple(self._file.get_slice(name).get_shape()) for name in names}

    def read(self, name: str) -> torch.Tensor:
        tensor: torch.Tensor = self._file.get_tensor(name)
        return tensor


class _Shards:
    """Several safetensors files with an index, as `save_pretrained` writes them.

    The index is JSON, and its "weight_map" maps names of tensors to the files in the same folder that have them.
    """

    extra: Mapping[str, Any] = {}

    def __init__(self, index: Path, stack: ExitStack) -> None:
        try:
            file_of = json.loads(index.read_text())["weight_map"]
            names = dict.fromkeys(file_of.values())
            files = {name: _File(index.parent / name, stack) for name in names}
        except FileNotFoundError:
            raise PipedreamError(f"{index}: no such file: give a safetensors file, or the index of several") from None
        except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
            raise PipedreamError(
                f"{index}: should be an index of safetensors files, with their names in 'weight_map': "
                f"{type(error).__name__}: {error}"
            ) from None
        shapes = {name: file.shapes() for name, file in files.items()}
        for tensor, name in file_of.items():
            if tensor not in shapes[name]:
                raise PipedreamError(f"{index}: says that '{tensor}' is in {name}, which does not have it")
        self._file_of = {tensor: files[name] for tensor, name in file_of.items()}
        self._shapes = {tensor: shapes[name][tensor] for tensor, name in file_of.items()}

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return self._shapes

    def read(self, name: str) -> torch.Tensor:
        return self._file_of[name].read(name)


#: What `save_pretrained` writes into a folder: one file, or an index of several.
_IN_FOLDER = ("model.safetensors", "model.safetensors.index.json")


def _open(path: Path, stack: ExitStack) -> _Source:
    if path.is_dir():
        found = [path / name for name in _IN_FOLDER if (path / name).is_file()]
        if not found:
            raise PipedreamError(f"{path}: has neither {' nor '.join(_IN_FOLDER)}: give the file itself")
        path = found[0]
    return _Shards(path, stack) if path.suffix == ".json" else _File(path, stack)


def load_full_state_dict(
    graph: LayerGraph,
    stages: Sequence[StageState],
    weights: Mapping[str, torch.Tensor] | str | Path,
    *,
    check_only: bool = False,
) -> None:
    """Set the newest weights and the buffers of `stages`; optimizers keep their state.

    A weight with several names may be given under any of them. dtypes are converted as torch's copy_ does.

    Args:
        graph: the captured model.
        stages: of this process.
        weights: tensors by the user's own names; or a safetensors file, the index of several, or the folder that
            `save_pretrained` wrote, of which only these stages' tensors are read.
        check_only: change nothing.

    Raises:
        PipedreamError: a name is missing or unknown, or a shape differs; nothing is changed then.
    """
    with ExitStack() as stack:
        source: _Source
        if isinstance(weights, str | Path):
            source, where = _open(Path(weights), stack), str(weights)
        elif isinstance(weights, Mapping):
            source, where = _Dict(weights), "the state dict"
        else:
            raise PipedreamError(
                "load_state_dict takes a dict of tensors, a safetensors file, the index of several, or their folder, "
                f"not {type(weights).__name__}"
            )
        given_as = _given_names(graph, source.shapes(), where)
        if check_only:
            return
        for stage in stages:
            _load_stage(stage, source, given_as)
            for name, module in extra_states(stage.module).items():
                if name in source.extra:
                    module.set_extra_state(source.extra[name])
        _load_unused(graph, stages, source, given_as)


def state_dict_problem(graph: LayerGraph, weights: Mapping[str, torch.Tensor] | str | Path) -> str | None:
    """Return in one sentence why `weights` cannot be loaded into the model; None if they can."""
    try:
        load_full_state_dict(graph, (), weights, check_only=True)
    except PipedreamError as error:
        return str(error)
    return None


def _given_names(graph: LayerGraph, given: Mapping[str, tuple[int, ...]], where: str) -> dict[str, str]:
    """Return the name under which each of the model's tensors is given; refuse what does not fit the model."""
    model = graph.module
    tensors = {name: value for name, value in model.state_dict().items() if isinstance(value, torch.Tensor)}
    expected = {name: tuple(value.shape) for name, value in tensors.items()}
    names_of: dict[int, list[str]] = defaultdict(list)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names_of[id(parameter)].append(name)
    given_as = {name: name for name in expected if name in given}
    for names in names_of.values():
        found = next((name for name in names if name in given), None)
        if found is not None:
            given_as.update((name, found) for name in names if name not in given)
    missing, unknown = sorted(expected.keys() - given_as.keys()), sorted(given.keys() - expected.keys())
    if missing or unknown:
        parts = [f"{what} {_named(names)}" for what, names in (("lacks", missing), ("has unknown", unknown)) if names]
        raise PipedreamError(f"{where} {' and '.join(parts)}: load the state dict of this model")
    for name, other in given_as.items():
        if given[other] != expected[name]:
            raise PipedreamError(
                f"'{other}' in {where} has shape {given[other]}, but the model's has {expected[name]}: load the state "
                "dict of this model"
            )
    return given_as


def _load_stage(stage: StageState, source: _Source, given_as: Mapping[str, str]) -> None:
    stage.stash.use_newest()
    parameters = {name for name, _ in stage.module.named_parameters(remove_duplicate=False)}
    own = stage.module.state_dict()
    # A weight with several names in the stage is read once.
    stage.stash.load_state({name: source.read(given_as[name]) for name, _ in stage.module.named_parameters()})
    with torch.no_grad():
        for name, buffer in own.items():
            if name not in parameters:
                buffer.copy_(source.read(given_as[name]))


def _load_unused(graph: LayerGraph, stages: Sequence[StageState], source: _Source, given_as: Mapping[str, str]) -> None:
    """Set what no stage uses, in the user's own model; a model given as a function has no values to set."""
    if graph.recipe is not None:
        return
    model = graph.module
    parameters = dict(model.named_parameters(remove_duplicate=False))
    used = {id(parameters[name]) for layer in graph.layers for name in layer.parameters}
    held = {name for stage in stages for name in stage.module.state_dict()}
    with torch.no_grad():
        for name, parameter in parameters.items():
            if id(parameter) not in used and name not in held and name in given_as:
                parameter.copy_(source.read(given_as[name]))


def _named(names: Iterable[str]) -> str:
    first, *rest = names
    return f"'{first}'" + (f" and {len(rest)} more" if rest else "")
