"""Checkpoint: what training needs to go on as if it had never stopped.

Every stage writes its own part when an epoch ends and asks nobody; rank 0 adds a manifest that says which
parts make the whole::

    checkpoints/epoch-00002/  manifest.json          epoch, units trained, names of the parts
                              stage-0.safetensors    weights, buffers, optimizer's state of stage 0
                              stage-1.safetensors

    checkpoints/epoch-00003/  manifest.json          stage-1 is missing: the job was killed here, so
                              stage-0.safetensors    this one is passed over, by name

At an epoch's end the pipe is empty, so the newest weights are all there is to keep. A folder belongs to one
run, which may take several launches; every part and manifest carries its launch's name, so that parts which
two launches wrote of the same epoch are never taken for a whole.
"""

from __future__ import annotations

import json
import re
import shutil
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar

import torch
from annotated_types import Ge, Gt
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as serialized

from pipedream_hpc.errors import PipedreamError
from pipedream_hpc.files import STRICT, atomic_write, load, make_folder, save
from pipedream_hpc.runtime.assembly import Wishes
from pipedream_hpc.runtime.checksum import checksum
from pipedream_hpc.runtime.deployment import Deployment
from pipedream_hpc.runtime.stage import Stage


@dataclass(frozen=True)
class Manifest:
    """What makes a checkpoint whole.

    Attributes:
        epoch: epochs trained.
        units: minibatches, or microbatches where they are cut, trained.
        parts: file names, one for each stage.
        launch: the start of the program that wrote it, and all its parts.
        run: what must be the same in every launch of the run, by name.
    """

    __pydantic_config__ = STRICT
    FORMAT: ClassVar[str] = "pipedream-checkpoint"
    VERSION: ClassVar[int] = 1

    epoch: Annotated[int, Gt(0)]
    units: Annotated[int, Ge(0)]
    parts: tuple[str, ...]
    launch: str
    run: dict[str, str]


class _NotWholeError(PipedreamError):
    """A checkpoint is damaged or incomplete."""


_MANIFEST = "manifest.json"


@dataclass(frozen=True)
class Position:
    """How far training has come.

    Attributes:
        epoch: epochs trained.
        units: minibatches, or microbatches where they are cut, trained.
    """

    epoch: int
    units: int


class Checkpoints:
    """The checkpoints in one folder, which all ranks see.

    Args:
        folder: made when first written to.
        deployment: the plan that the parts belong to; a checkpoint of another is refused.
        wishes: how it is trained; a checkpoint of another seed or precision is refused.
        launch: a name that no other start of the program has, the same on all ranks.
        keep: how many of the newest are kept.
    """

    def __init__(self, folder: str | Path, deployment: Deployment, wishes: Wishes, launch: str, keep: int = 2) -> None:
        self._folder, self._launch, self._keep = Path(folder), launch, keep
        plan, layers = deployment.plan, [stage.layers for stage in deployment.plan.stages]
        manner = deployment.manner
        # Where backwards are split, gradients add up in another order.
        parts = (manner.parts,) if manner.times_split else ()
        facts = (layers, deployment.layout, plan.schedule, deployment.pieces, manner.accumulate, *parts)
        self._parts = tuple(_part(stage) for stage in range(len(layers)))
        self._run = {
            "plan or schedule": f"{zlib.crc32(str(facts).encode()):08x}",
            "seed": str(wishes.seed),
            "precision": (wishes.precision or "the model's") + (" with master weights" if wishes.masters else ""),
        }

    def begin(self) -> None:
        """Make sure that a run which starts anew has the folder to itself.

        Raises:
            PipedreamError: there are checkpoints of an earlier run, or none could be written.
        """
        make_folder(self._folder)
        if found := self._found():
            raise PipedreamError(
                f"{self._folder} holds checkpoints of an earlier run, {found[0].name} the newest: "
                "go on from them with --resume (Pipeline.resume()), or give another folder"
            )

    def write_part(self, stage: Stage, position: Position) -> None:
        """Write one stage's part of the checkpoint of `position`."""
        tensors, numbers = contents_of(stage)
        tensors = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
        text = json.dumps(numbers)
        metadata = {"launch": self._launch, "numbers": text, "checksum": str(_checksum(tensors, text))}
        path = self._of(position) / _part(stage.index)
        with atomic_write(path) as file:
            file.write(serialized(tensors, metadata))

    def write_manifest(self, position: Position) -> None:
        """Say what makes the checkpoint of `position` whole, and drop those older than kept."""
        folder = self._of(position)
        save(Manifest(position.epoch, position.units, self._parts, self._launch, self._run), folder / _MANIFEST)
        for old in [each for each in self._found() if each <= folder][self._keep :]:
            shutil.rmtree(old, ignore_errors=True)

    def whole(self) -> tuple[list[Position], list[str]]:
        """Positions of the whole checkpoints, newest first, and why each of the others is passed over.

        Raises:
            PipedreamError: the folder is another run's.
        """
        positions, passed_over = [], []
        for folder in self._found():
            try:
                positions.append(self._checked(folder))
            except _NotWholeError as error:
                passed_over.append(str(error))
        return positions, passed_over

    def read_part(self, stage: Stage, position: Position) -> None:
        """Put a stage back to where it was.

        Raises:
            PipedreamError: the part does not fit the stage.
        """
        path = self._of(position) / _part(stage.index)
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            numbers = json.loads(file.metadata()["numbers"])
        try:
            put_back(stage, tensors, numbers)
        except (KeyError, ValueError, RuntimeError) as error:
            raise PipedreamError(
                f"{path}: does not fit stage {stage.index}: {error}: take the model and the "
                "optimizer that it was trained with"
            ) from None

    # ------------------------------------------------------------------

    def _of(self, position: Position) -> Path:
        return self._folder / f"epoch-{position.epoch:05d}"

    def _found(self) -> list[Path]:
        """Folders of checkpoints, newest first."""
        if not self._folder.is_dir():
            return []
        return sorted(
            (each for each in self._folder.iterdir() if re.fullmatch(r"epoch-\d{5}", each.name)), reverse=True
        )

    def _checked(self, folder: Path) -> Position:
        path = folder / _MANIFEST
        try:
            manifest = load(Manifest, path)
        except PipedreamError as error:
            raise _NotWholeError(str(error)) from None
        for fact, ours in self._run.items():
            if manifest.run.get(fact) != ours:
                was, now = ("", "") if fact == "plan or schedule" else (f", {manifest.run.get(fact)}", f", {ours},")
                raise PipedreamError(
                    f"{path} is of another {fact}{was}: take the one that it was trained with instead of this{now} "
                    "or another folder"
                )
        if self._of(Position(manifest.epoch, 0)) != folder or manifest.parts != self._parts:
            raise _NotWholeError(f"{path}: is not the manifest of this epoch and these stages")
        for name in manifest.parts:
            self._check_part(folder / name, manifest.launch)
        return Position(manifest.epoch, manifest.units)

    def _check_part(self, path: Path, launch: str) -> None:
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except FileNotFoundError:
            raise _NotWholeError(f"{path}: is missing") from None
        except (SafetensorError, OSError) as error:
            raise _NotWholeError(f"{path}: is damaged: {error}") from None
        if metadata.get("checksum") != str(_checksum(tensors, metadata.get("numbers", ""))):
            raise _NotWholeError(f"{path}: is damaged: its contents are not what was written")
        if metadata.get("launch") != launch:
            raise _NotWholeError(f"{path}: was written by another launch than its manifest")


def _part(stage: int) -> str:
    return f"stage-{stage}.safetensors"


def _checksum(tensors: Mapping[str, torch.Tensor], numbers: str) -> int:
    total = zlib.crc32(numbers.encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        total = zlib.crc32(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode(), total)
        total = checksum([tensor], total)
    return total


def contents_of(stage: Stage) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Tensors and numbers that are a stage's state.

    Raises:
        PipedreamError: the learning-rate scheduler has a state that is no plain numbers.
    """
    stage.stash.use_newest()
    tensors = {f"model.{name}": value.to("cpu", copy=True) for name, value in stage.module.state_dict().items()}
    numbers: dict[str, Any] = {"loss_scale": stage.step.scale_state(), "optimizer": None, "scheduler": None}
    optimizer, names = stage.stash.optimizer, stage.stash.trained_names
    if optimizer is not None:
        state = optimizer.state_dict()
        kept: dict[str, dict[str, Any]] = {}
        for index, entries in state["state"].items():
            for key, value in entries.items():
                if isinstance(value, torch.Tensor):
                    tensors[f"optimizer.{names[index]}.{key}"] = value.to("cpu", copy=True)
                else:
                    kept.setdefault(names[index], {})[key] = value
        numbers["optimizer"] = {"kind": _kind(optimizer), "groups": state["param_groups"], "state": kept}
    if stage.step.scheduler is not None:
        numbers["scheduler"] = stage.step.scheduler.state_dict()
    try:
        json.dumps(numbers)
    except TypeError as error:
        raise PipedreamError(
            f"the state of the optimizer or learning-rate scheduler of stage {stage.index} cannot be saved: {error}"
        ) from None
    return tensors, numbers


def put_back(stage: Stage, tensors: Mapping[str, torch.Tensor], numbers: Mapping[str, Any]) -> None:
    """Give a stage the state that `contents_of` took.

    Raises:
        KeyError, RuntimeError: something is missing or of another shape.
        ValueError: the optimizer is of another kind.
    """
    optimizer, names = stage.stash.optimizer, stage.stash.trained_names
    if optimizer is not None and (was := numbers["optimizer"]["kind"]) != _kind(optimizer):
        raise ValueError(f"it was trained with {was}, not {_kind(optimizer)}")
    stage.stash.use_newest()
    own = stage.module.state_dict()
    with torch.no_grad():
        for name, value in own.items():
            value.copy_(tensors[f"model.{name}"])
    if optimizer is not None:
        saved = numbers["optimizer"]
        state: dict[int, dict[str, Any]] = {}
        for index, name in enumerate(names):
            prefix = f"optimizer.{name}."
            entries = {key.removeprefix(prefix): value for key, value in tensors.items() if _is_state(key, prefix)}
            entries.update(saved["state"].get(name, {}))
            if entries:
                state[index] = entries
        groups = [{k: tuple(v) if k == "betas" else v for k, v in group.items()} for group in saved["groups"]]
        optimizer.load_state_dict({"state": state, "param_groups": groups})
    if stage.step.scheduler is not None:
        stage.step.scheduler.load_state_dict(dict(numbers["scheduler"]))
    stage.step.restore_scale(numbers["loss_scale"])


def _kind(optimizer: torch.optim.Optimizer) -> str:
    return f"{type(optimizer).__module__}.{type(optimizer).__qualname__}"


def _is_state(key: str, prefix: str) -> bool:
    return key.startswith(prefix) and "." not in key.removeprefix(prefix)
