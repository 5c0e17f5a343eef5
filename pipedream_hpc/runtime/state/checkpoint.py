"""Checkpoints: everything that training needs to continue as if it had never stopped.

At the end of an epoch every stage writes its own file, without communication; rank 0 adds a manifest that lists the
files of a complete checkpoint::

    checkpoints/epoch-00002/  manifest.json          epoch, microbatches trained, names of the files
                              stage-0.safetensors    weights, buffers, optimizer state of stage 0
                              stage-1.safetensors

    checkpoints/epoch-00003/  manifest.json          stage-1 is missing, because the job was killed:
                              stage-0.safetensors    this checkpoint is skipped, with a warning that says why

At the end of an epoch no microbatch is in flight, so the newest weights are all there is to save. A folder belongs to
one run, which may take several launches; every file has the name of its launch, so that files that two launches wrote
for the same epoch are never taken for one checkpoint.
"""

from __future__ import annotations

import io
import json
import pickle
import re
import shutil
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar

import torch
from annotated_types import Ge
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as serialize

from pipedream_hpc.errors import PipedreamError
from pipedream_hpc.files import STRICT, atomic_write, load, make_folder, save
from pipedream_hpc.model.checksum import checksum
from pipedream_hpc.runtime.state.full_state_dict import extra_states
from pipedream_hpc.runtime.weights.fused import LIKE_WEIGHTS
from pipedream_hpc.runtime.weights.stage_state import StageState


@dataclass(frozen=True)
class Manifest:
    """Contents of a complete checkpoint.

    Attributes:
        epoch: epochs trained.
        n_microbatches: microbatches trained.
        files: file names, one for each stage.
        launch: the launch of the program that wrote the manifest and all its files.
        run: facts that must be the same in every launch of the run, by name.
    """

    __pydantic_config__ = STRICT
    FORMAT: ClassVar[str] = "pipedream-checkpoint"
    VERSION: ClassVar[int] = 3

    epoch: Annotated[int, Ge(0)]
    n_microbatches: Annotated[int, Ge(0)]
    files: tuple[str, ...]
    launch: str
    run: dict[str, str]


class _IncompleteError(PipedreamError):
    """A checkpoint is damaged or incomplete."""


_MANIFEST = "manifest.json"

#: The tensor in a stage's file that holds what is no tensor.
_VALUES = "values"


@dataclass(frozen=True)
class Position:
    """Progress of training.

    Attributes:
        epoch: epochs trained.
        n_microbatches: microbatches trained.
    """

    epoch: int
    n_microbatches: int


class Checkpoints:
    """The checkpoints in one folder, which all ranks see.

    Args:
        folder: created when it is first written to.
        n_stages: number of stages of the plan.
        run: facts that must be the same in every launch of the run, such as the seed, by name; a checkpoint with
            other facts is refused.
        launch: a name that no other launch of the program has, the same on all ranks.
        keep: number of newest checkpoints that are kept.
    """

    def __init__(self, folder: str | Path, n_stages: int, run: Mapping[str, str], launch: str, keep: int = 2) -> None:
        self._folder, self._launch, self._keep = Path(folder), launch, keep
        self._files = tuple(_file_name(stage) for stage in range(n_stages))
        self._run = dict(run)

    def begin(self) -> None:
        """Create the folder for a new run.

        Raises:
            PipedreamError: it has checkpoints of an earlier run, or cannot be written to.
        """
        make_folder(self._folder)
        if found := self._found():
            raise PipedreamError(
                f"{self._folder} holds checkpoints of an earlier run, the newest is {found[0].name}: resume from them "
                "with --resume (Pipeline.resume()), or give another folder"
            )

    def write_stage(self, stage: StageState, position: Position) -> None:
        """Write the file of one stage."""
        tensors, values = stage_contents(stage)
        tensors = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
        tensors[_VALUES] = _packed(values, stage.index)
        metadata = {"launch": self._launch, "checksum": str(_checksum(tensors))}
        with atomic_write(self._folder_of(position) / _file_name(stage.index)) as file:
            file.write(serialize(tensors, metadata))

    def write_manifest(self, position: Position) -> None:
        """Write the manifest, after the files of all stages or before, and delete the oldest checkpoints."""
        folder = self._folder_of(position)
        manifest = Manifest(position.epoch, position.n_microbatches, self._files, self._launch, self._run)
        save(manifest, folder / _MANIFEST)
        for old in [each for each in self._found() if each <= folder][self._keep :]:
            shutil.rmtree(old, ignore_errors=True)

    def complete(self) -> tuple[list[Position], list[str]]:
        """Return the positions of complete checkpoints, newest first, and for each other one why it is skipped.

        Raises:
            PipedreamError: the folder belongs to another run, or to a version with another format; or it is there, but
                something else than a folder of checkpoints. An empty one may be that of a run that was stopped early.
        """
        self._refuse_other()
        positions, skipped = [], []
        for folder in self._found():
            try:
                positions.append(self._check(folder))
            except _IncompleteError as error:
                skipped.append(str(error))
        return positions, skipped

    def read_stage(self, stage: StageState, position: Position) -> None:
        """Restore a stage from its file.

        Raises:
            PipedreamError: the file does not fit the stage.
        """
        path = self._folder_of(position) / _file_name(stage.index)
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        try:
            restore_stage(stage, tensors, _unpacked(tensors.pop(_VALUES)))
        except (
            PipedreamError,
            KeyError,
            TypeError,
            ValueError,
            RuntimeError,
            EOFError,
            pickle.UnpicklingError,
        ) as error:
            raise PipedreamError(
                f"{path}: does not fit stage {stage.index}: {str(error).partition(chr(10))[0]}: use the model and the "
                "optimizer of the run that wrote it"
            ) from None

    # ------------------------------------------------------------------

    def _refuse_other(self) -> None:
        """Refuse to resume from what exists and holds no checkpoints."""
        folder = self._folder
        if folder.is_dir():
            names = sorted(each.name for each in folder.iterdir())
            if not names or self._found():
                return
            more = f" and {len(names) - 1} more" if names[1:] else ""
            where = f"holds no checkpoints, but '{names[0]}'{more}"
            if (folder / _MANIFEST).exists():
                where = "is one checkpoint"
        elif folder.exists():
            where = "is no folder"
        else:
            return
        raise PipedreamError(
            f"{folder} {where}: resume from the folder that save_checkpoint (--checkpoints) was given, or from a new "
            "or empty one"
        )

    def _folder_of(self, position: Position) -> Path:
        return self._folder / f"epoch-{position.epoch:05d}"

    def _found(self) -> list[Path]:
        """Return the folders of checkpoints, newest first."""
        if not self._folder.is_dir():
            return []
        return sorted(
            (each for each in self._folder.iterdir() if re.fullmatch(r"epoch-\d{5}", each.name)), reverse=True
        )

    def _check(self, folder: Path) -> Position:
        """Return the position of a complete checkpoint."""
        path = folder / _MANIFEST
        _check_version(path)
        try:
            manifest = load(Manifest, path)
        except PipedreamError as error:
            raise _IncompleteError(str(error)) from None
        for fact, own in self._run.items():
            if manifest.run.get(fact) != own:
                values = "" if fact == "plan or schedule" else f" ({manifest.run.get(fact)}, here {own})"
                raise PipedreamError(
                    f"{path} was written with another {fact}{values}: resume with the same, or give another folder"
                )
        if self._folder_of(Position(manifest.epoch, 0)) != folder or manifest.files != self._files:
            raise _IncompleteError(f"{path}: is not the manifest of this epoch and these stages")
        for name in manifest.files:
            self._check_file(folder / name, manifest.launch)
        return Position(manifest.epoch, manifest.n_microbatches)

    def _check_file(self, path: Path, launch: str) -> None:
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except FileNotFoundError:
            raise _IncompleteError(f"{path}: is missing") from None
        except (SafetensorError, OSError) as error:
            raise _IncompleteError(f"{path}: is damaged: {error}") from None
        if metadata.get("checksum") != str(_checksum(tensors)):
            raise _IncompleteError(f"{path}: is damaged: its checksum is wrong")
        if metadata.get("launch") != launch:
            raise _IncompleteError(f"{path}: was written by another launch than its manifest")


def _check_version(path: Path) -> None:
    """Refuse a manifest of another format version; a damaged one is found out later."""
    try:
        version = json.loads(path.read_bytes()).get("version")
    except (OSError, ValueError, AttributeError):
        return
    if isinstance(version, int) and version != Manifest.VERSION:
        raise PipedreamError(
            f"{path} has format version {version}, but this pipedream reads version {Manifest.VERSION}: resume with "
            "the pipedream that wrote it, or give another folder"
        )


def _file_name(stage: int) -> str:
    return f"stage-{stage}.safetensors"


def _packed(values: Mapping[str, Any], stage: int) -> torch.Tensor:
    """Return values as bytes that torch.load reads without running code.

    They are not JSON, which has no integer keys, tuples or tensors, as schedulers and optimizers have.

    Raises:
        PipedreamError: they hold an object that would run code.
    """
    file = io.BytesIO()
    what = f"the state of the optimizer, the learning-rate scheduler or a module's get_extra_state of stage {stage}"
    try:
        torch.save(dict(values), file)
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        raise PipedreamError(f"{what} cannot be saved: {error}") from None
    file.seek(0)
    if unsafe := torch.serialization.get_unsafe_globals_in_checkpoint(file):
        raise PipedreamError(
            f"{what} holds an object of {unsafe[0]}, which cannot be saved: let it hold numbers, texts, tensors, "
            "lists, tuples and dicts"
        )
    return torch.frombuffer(bytearray(file.getvalue()), dtype=torch.uint8)


def _unpacked(packed: torch.Tensor) -> dict[str, Any]:
    values: dict[str, Any] = torch.load(io.BytesIO(packed.numpy().tobytes()), weights_only=True)
    return values


def _checksum(tensors: Mapping[str, torch.Tensor]) -> int:
    total = 0
    for name in sorted(tensors):
        tensor = tensors[name]
        total = zlib.crc32(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode(), total)
        total = checksum([tensor], total)
    return total


def stage_contents(stage: StageState) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Return the state of a stage: tensors by name, and other values."""
    stage.stash.use_newest()
    tensors = {f"model.{name}": value.to("cpu", copy=True) for name, value in stage.module.state_dict().items()}
    values: dict[str, Any] = {
        "loss_scale": stage.optimizer.loss_scale_state(),
        "optimizer": None,
        "lr_scheduler": None,
        "extra_state": {name: each.get_extra_state() for name, each in extra_states(stage.module).items()},
    }
    optimizer, names = stage.stash.optimizer, stage.stash.optimizer_names
    if optimizer is not None:
        state = optimizer.state_dict()
        plain: dict[str, dict[str, Any]] = {}
        for index, entries in state["state"].items():
            for key, value in entries.items():
                if isinstance(value, torch.Tensor):
                    tensors[f"optimizer.{names[index]}.{key}"] = value.to("cpu", copy=True)
                else:
                    plain.setdefault(names[index], {})[key] = value
        values["optimizer"] = {"type": _type_name(optimizer), "groups": state["param_groups"], "state": plain}
    if stage.optimizer.lr_scheduler is not None:
        values["lr_scheduler"] = stage.optimizer.lr_scheduler.state_dict()
    return tensors, values


def restore_stage(stage: StageState, tensors: Mapping[str, torch.Tensor], values: Mapping[str, Any]) -> None:
    """Restore the state that `stage_contents` returned.

    Raises:
        KeyError, RuntimeError, PipedreamError: a tensor is missing or has another shape.
        ValueError: the optimizer is of another type.
    """
    optimizer, names = stage.stash.optimizer, stage.stash.optimizer_names
    if optimizer is not None and (saved_type := values["optimizer"]["type"]) != _type_name(optimizer):
        raise ValueError(f"it was trained with {saved_type}, not {_type_name(optimizer)}")
    stage.stash.use_newest()
    saved = {name: tensors[f"model.{name}"] for name in stage.module.state_dict()}
    _compare(stage, saved, tensors)
    stage.stash.load_state(saved)
    parameters = {name for name, _ in stage.module.named_parameters(remove_duplicate=False)}
    with torch.no_grad():
        for name, value in stage.module.state_dict().items():
            if name not in parameters:
                value.copy_(saved[name])
    for name, module in extra_states(stage.module).items():
        module.set_extra_state(values["extra_state"][name])
    if optimizer is not None:
        saved_optimizer = values["optimizer"]
        state: dict[int, dict[str, Any]] = {}
        for index, name in enumerate(names):
            prefix = f"optimizer.{name}."
            entries = {key.removeprefix(prefix): value for key, value in tensors.items() if _is_state(key, prefix)}
            entries.update(saved_optimizer["state"].get(name, {}))
            if entries:
                state[index] = entries
        optimizer.load_state_dict({"state": state, "param_groups": saved_optimizer["groups"]})
    if stage.optimizer.lr_scheduler is not None:
        stage.optimizer.lr_scheduler.load_state_dict(dict(values["lr_scheduler"]))
    stage.optimizer.load_loss_scale_state(values["loss_scale"])


def _compare(stage: StageState, saved: Mapping[str, torch.Tensor], tensors: Mapping[str, torch.Tensor]) -> None:
    """Compare shapes and dtypes before anything is copied: copies broadcast, and a fused step reads beyond the end.

    Args:
        stage: what is to be restored.
        saved: weights and buffers by name.
        tensors: all tensors of the file.

    Raises:
        PipedreamError: one differs.
    """
    own = stage.module.state_dict()
    weights = {f"optimizer.{name}.": own[name].shape for name in stage.stash.optimizer_names}
    pairs = [(f"'{name}'", _text(saved[name].shape, saved[name].dtype), _text(each.shape, each.dtype))
             for name, each in own.items()]  # fmt: skip
    for key, tensor in tensors.items():
        prefix, _, entry = key.rpartition(".")
        if entry in LIKE_WEIGHTS and (shape := weights.get(f"{prefix}.")) is not None:
            pairs.append((f"the optimizer's {entry} of '{prefix.removeprefix('optimizer.')}'",
                          _text(tensor.shape), _text(shape)))  # fmt: skip
    for what, found, expected in pairs:
        if found != expected:
            raise PipedreamError(f"{what} has {found}, but this model's has {expected}")


def _text(shape: torch.Size, dtype: torch.dtype | None = None) -> str:
    return f"shape {tuple(shape)}" + ("" if dtype is None else f" and dtype {str(dtype).removeprefix('torch.')}")


def _type_name(optimizer: torch.optim.Optimizer) -> str:
    return f"{type(optimizer).__module__}.{type(optimizer).__qualname__}"


def _is_state(key: str, prefix: str) -> bool:
    return key.startswith(prefix) and "." not in key.removeprefix(prefix)
