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


class _Files:
    """Safetensors files, of which only what is asked for is read. They hold tensors only.

    Args:
        path: a file, the index of several, or the folder of either.
        stack: closes the files.
    """

    extra: Mapping[str, Any] = {}

    def __init__(self, path: Path, stack: ExitStack) -> None:
        path = _in_folder(path) if path.is_dir() else path
        if path.suffix != ".json":
            file = _opened(path, stack)
            self._file_of = dict.fromkeys(file.keys(), file)
            return
        placed = _read_index(path)
        named = f", which {path} names"
        files = {name: _opened(path.parent / name, stack, named) for name in sorted(set(placed.values()))}
        held = {name: set(file.keys()) for name, file in files.items()}
        for tensor, name in placed.items():
            if tensor not in held[name]:
                raise PipedreamError(f"{path}: '{tensor}' is not in {name}: save the weights again")
        self._file_of = {tensor: files[name] for tensor, name in placed.items()}

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: tuple(file.get_slice(name).get_shape()) for name, file in self._file_of.items()}

    def read(self, name: str) -> torch.Tensor:
        tensor: torch.Tensor = self._file_of[name].get_tensor(name)
        return tensor


def _in_folder(folder: Path) -> Path:
    """Return the index in a folder, or its only safetensors file."""
    for pattern in ("*.safetensors.index.json", "*.safetensors"):
        found = sorted(folder.glob(pattern))
        if len(found) == 1:
            return found[0]
        if found:
            raise PipedreamError(f"{folder} has {found[0].name} and {found[1].name}: say which, by the whole path")
    raise PipedreamError(f"{folder} has no safetensors file: give one, or the folder of one, or a dict of tensors")


def _read_index(path: Path) -> dict[str, str]:
    """Return the file name of each tensor that an index lists."""
    try:
        placed = json.loads(path.read_bytes())["weight_map"]
    except FileNotFoundError:
        raise PipedreamError(f"{path}: {_NO_FILE}") from None
    except (OSError, ValueError, KeyError, TypeError):
        placed = None
    if not isinstance(placed, dict) or not all(isinstance(name, str) for name in placed.values()):
        raise PipedreamError(f"{path}: is not the index of safetensors files: it has no 'weight_map' of file names")
    return placed


_NO_FILE = "no such file: give a safetensors file, the index of several, or their folder"


def _opened(path: Path, stack: ExitStack, named: str = "") -> Any:
    try:
        return stack.enter_context(safe_open(path, framework="pt"))
    except FileNotFoundError:
        raise PipedreamError(f"{path}{named}: {_NO_FILE}") from None
    except (SafetensorError, OSError) as error:
        raise PipedreamError(
            f"{path}: cannot be read as a safetensors file: {error}: a file that torch.save wrote is read with "
            "torch.load, and its dict given"
        ) from None


def load_full_state_dict(
    graph: LayerGraph,
    stages: Sequence[StageState],
    weights: Mapping[str, torch.Tensor] | str | Path,
    *,
    keeps_unused: bool = True,
    check_only: bool = False,
) -> None:
    """Set the newest weights and the buffers of `stages`; optimizers keep their state.

    A weight with several names may be given under any of them. dtypes are converted as torch's copy_ does.

    Args:
        graph: the captured model.
        stages: of this process.
        weights: tensors by the user's own names; or a safetensors file, the index of several, or the folder of either,
            of which only these stages' tensors are read.
        keeps_unused: whether this rank keeps, for state_dict, what no stage uses of a model given as a function.
        check_only: change nothing.

    Raises:
        PipedreamError: a name is missing or unknown, or a shape differs; nothing is changed then.
    """
    with ExitStack() as stack:
        source: _Source
        if isinstance(weights, str | Path):
            source, where = _Files(Path(weights), stack), str(weights)
        elif isinstance(weights, Mapping):
            source, where = _Dict(weights), "the state dict"
        else:
            raise PipedreamError(
                f"load_state_dict takes a dict of tensors, or a safetensors file, index or folder, not "
                f"{type(weights).__name__}"
            )
        given_as = _given_names(graph, source.shapes(), where)
        if check_only:
            return
        for stage in stages:
            _load_stage(stage, source, given_as)
            for name, module in extra_states(stage.module).items():
                if name in source.extra:
                    module.set_extra_state(source.extra[name])
        _load_unused(graph, stages, source, given_as, keeps_unused)


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


def _load_unused(
    graph: LayerGraph, stages: Sequence[StageState], source: _Source, given_as: Mapping[str, str], keeps: bool
) -> None:
    """Set what no stage uses, in the user's own model, or in what is kept of one that was given as a function."""
    model = graph.module
    parameters = dict(model.named_parameters(remove_duplicate=False))
    used = {id(parameters[name]) for layer in graph.layers for name in layer.parameters}
    if graph.recipe is not None:
        unused = [name for name, parameter in parameters.items() if keeps and id(parameter) not in used]
        graph.recipe.loaded.update(
            (name, source.read(given_as[name]).to("cpu", parameters[name].dtype, copy=True)) for name in unused
        )
        return
    held = {name for stage in stages for name in stage.module.state_dict()}
    with torch.no_grad():
        for name, parameter in parameters.items():
            if id(parameter) not in used and name not in held and name in given_as:
                parameter.copy_(source.read(given_as[name]))


def _named(names: Iterable[str]) -> str:
    first, *rest = names
    return f"'{first}'" + (f" and {len(rest)} more" if rest else "")
