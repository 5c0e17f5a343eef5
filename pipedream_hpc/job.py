"""Job: everything of a training run that is the user's own."""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from pipedream_hpc.config import RunConfig, ScheduleConfig, TrainConfig
from pipedream_hpc.errors import PipedreamError

if TYPE_CHECKING:
    from pipedream_hpc.model.recipe import ModelFactory

#: Computes a score from (output, target): the mean over the samples, a tensor with one number; or a pair (sum, count).
LossFn = Callable[[Any, Any], "torch.Tensor | tuple[torch.Tensor, torch.Tensor | float]"]
#: Creates the optimizer of one stage from the stage's parameters.
OptimizerFactory = Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]


def accuracy(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Return the fraction of samples whose largest output is at the target: (n, classes), (n,) -> ().

    Raises:
        PipedreamError: output or target is no tensor.
    """
    for what, value in (("output", output), ("target", target)):
        if not isinstance(value, torch.Tensor):
            raise PipedreamError(
                f"accuracy, the default metric of a Job, compares tensors, but the {what} is {type(value).__name__}: "
                "give the Job metrics of its own, such as metrics={'loss': loss_fn}"
            )
    return (output.argmax(dim=1) == target).float().mean()


@dataclass
class Job:
    """What `pipedream profile`, `pipedream train` and `pipedream verify` run.

    Attributes:
        model: any module, which is trained in place; or, for one that is too large for every rank, a function without
            arguments that builds it, so that each rank keeps the weights of its own stages only::

                def job(args):
                    def model():
                        torch.manual_seed(0)
                        return Transformer(layers=48)

                    return Job(model=model, ...)

        loss_fn: mean loss of a minibatch from (output, target), or a pair (sum, count).
        optimizer: called once per stage with the stage's parameters, such as
            `functools.partial(torch.optim.SGD, lr=0.1)`.
        train_loader: yields (inputs, target) minibatches, such as a DataLoader.
        example_inputs: one minibatch of inputs, as large as they will get: a tensor, a tuple of the model's
            arguments, or a mapping from their names.
        test_loader: evaluated after every epoch; None for no evaluation.
        metrics: computed over `test_loader`: name to mean score of a minibatch from (output, target), or to a pair
            (sum, count).
        epochs: how many to train at most.
        cut_points: qualified names of the modules that stages begin with, as in `Pipeline`; `--cut-points` replaces
            them.
        schedule: the schedule, by name or as a ScheduleConfig; None for the plan's own.
        train_config: how stages are trained. Options of the command line replace its fields.
        run_config: where it computes and what it records; options replace these fields, too.
    """

    model: nn.Module | ModelFactory
    loss_fn: LossFn
    optimizer: OptimizerFactory
    train_loader: Any
    example_inputs: Any
    test_loader: Any = None
    metrics: Mapping[str, LossFn] = dataclasses.field(default_factory=lambda: {"accuracy": accuracy})
    epochs: int = 1
    cut_points: Sequence[str] = ()
    schedule: str | ScheduleConfig | None = None
    train_config: TrainConfig = dataclasses.field(default_factory=TrainConfig)
    run_config: RunConfig = dataclasses.field(default_factory=RunConfig)


def load(target: str, args: Sequence[str] = ()) -> Job:
    """Call `job(args)` of a Python file (`train.py`) or module (`package.train`) and return its Job.

    Raises:
        PipedreamError: there is no such file or module, or it has no function `job`, or the function does
            not take the list or return a Job.
    """
    module = _module(target)
    make = getattr(module, "job", None)
    if not callable(make):
        raise PipedreamError(
            f"{target} has no function job: define `def job(args: list[str]) -> pipedream_hpc.Job` there"
        )
    try:
        inspect.signature(make).bind(list(args))
    except TypeError as error:
        raise PipedreamError(
            f"{target}: job cannot be called with one list of words, those after -- ({error}): define "
            "`def job(args: list[str]) -> pipedream_hpc.Job` there"
        ) from None
    made = make(list(args))
    if not isinstance(made, Job):
        raise PipedreamError(
            f"{target}: job(args) returned {type(made).__name__}; it should return pipedream_hpc.Job(...)"
        )
    return made


def _module(target: str) -> ModuleType:
    if not target.endswith(".py"):
        try:
            return importlib.import_module(target)
        except ModuleNotFoundError as error:
            raise PipedreamError(
                f"no module named '{error.name}': give a file such as train.py, or a module that can be imported"
            ) from None
    path = Path(target)
    if not path.is_file():
        raise PipedreamError(f"{target}: no such file: give the Python file that defines job(args)")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # As `python train.py` does: the file can import its neighbours, and pickled objects (data loader workers) find
    # their classes again.
    sys.path.insert(0, str(path.parent.resolve()))
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    return module
