"""Job: everything of a training run that is the user's own."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from pipedream_hpc.errors import PipedreamError

if TYPE_CHECKING:
    from pipedream_hpc.model.materialize import Factory
    from pipedream_hpc.runtime.step import Clip, SchedulerFactory

Loss = Callable[[torch.Tensor, Any], torch.Tensor]
#: Makes the optimizer of one stage from the stage's parameters.
OptimizerFactory = Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]


def accuracy(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Fraction of samples whose largest output is at the target: (n, classes), (n,) -> ()."""
    return (output.argmax(dim=1) == target).float().mean()


@dataclass
class Job:
    """What `pipedream profile` and `pipedream train` run.

    Attributes:
        model: any module that torch.fx can trace; or, for one that is too large for every rank to hold, a
            function without arguments that builds it: each rank then keeps the weights of its own stages::

                def job(args):
                    def model():
                        torch.manual_seed(0)
                        return Transformer(layers=48)

                    return Job(model=model, ...)

        loss: mean loss of a minibatch from (output, target).
        optimizer: called once per stage with the stage's parameters, such as
            `functools.partial(torch.optim.SGD, lr=0.1)`.
        train: yields (inputs, target) minibatches and has a length, such as a DataLoader.
        example: one minibatch of inputs, as large as they will get: a tensor, a tuple of the model's
            arguments, or a mapping from their names.
        test: like `train`; evaluated after every epoch.
        metric: mean score of a test minibatch from (output, target); the accuracy by default.
        epochs: how many to train at most.
        leaves: module classes that torch.fx cannot look into and is to keep whole.
        scheduler: called with each stage's optimizer, makes its learning-rate scheduler, which is
            stepped once per minibatch.
        clip: how gradients are clipped.
    """

    model: nn.Module | Factory
    loss: Loss
    optimizer: OptimizerFactory
    train: Any
    example: Any
    test: Any = None
    metric: Loss = accuracy
    epochs: int = 1
    leaves: Sequence[type[nn.Module]] = ()
    scheduler: SchedulerFactory | None = None
    clip: Clip | None = None


def load(target: str, args: Sequence[str] = ()) -> Job:
    """Call `job(args)` of a Python file (`train.py`) or module (`package.train`).

    Raises:
        PipedreamError: there is no such file or module, or it has no function `job`, or that does
            not return a Job.
    """
    module = _module(target)
    make = getattr(module, "job", None)
    if not callable(make):
        raise PipedreamError(
            f"{target} has no function job: define `def job(args: list[str]) -> pipedream_hpc.Job` there"
        )
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
    # As `python train.py` would have it: neighbours of the file can be imported, and pickled
    # objects (data loader workers) find their classes again.
    sys.path.insert(0, str(path.parent.resolve()))
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    return module
