"""Options of a run, in three groups. `Pipeline` and `Job` take them; the command line is generated from them.

A field with `option(...)` metadata is an option of the command line as well: the flag, the type, the default and the
help text come from here and nowhere else (see cli/options.py).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from numbers import Real
from typing import TYPE_CHECKING, Any, TypeAlias

from pipedream_hpc.errors import PipedreamError
from pipedream_hpc.schedule import registry

if TYPE_CHECKING:  # torch takes a second to import, which `pipedream --help` need not wait for
    from torch import nn
    from torch.optim import Optimizer
    from torch.optim.lr_scheduler import LRScheduler

#: Creates the learning-rate scheduler of one stage from its optimizer.
LRSchedulerFactory: TypeAlias = "Callable[[Optimizer], LRScheduler]"

#: What forwards can be run in under autocast.
PRECISIONS = ("bf16", "fp16")


def option(
    help: str, *, flag: str | None = None, choices: tuple[str, ...] = (), default: str | None = None
) -> dict[str, Any]:
    """Return the metadata of a field that is an option of the command line.

    Args:
        help: one line for `--help`.
        flag: the flag, where it is not the field's name with dashes.
        choices: the values that are accepted, for the help text.
        default: the default on the command line in words, where it is not the field's.
    """
    return {"help": help, "flag": flag, "choices": choices, "default": default}


@dataclass(frozen=True)
class ScheduleConfig:
    """Which schedule runs the plan, and how it cuts minibatches.

    Attributes:
        name: one of `schedule.registry.NAMES`, or the file of a written schedule; None for the plan's own.
        n_microbatches: microbatches per minibatch, for schedules that cut minibatches; None for the plan's number
            with the plan's own schedule, and 1 with another.
        chunks: stages per rank, for the interleaved schedule.

    Raises:
        PipedreamError: a number is less than 1.
    """

    name: str | None = dataclasses.field(
        default=None,
        metadata=option(
            "The schedule, instead of the plan's; or the file of a written schedule.",
            flag="--schedule",
            choices=registry.TRAINING_NAMES,
        ),
    )
    n_microbatches: int | None = dataclasses.field(
        default=None,
        metadata=option(f"Microbatches per minibatch, for {', '.join(registry.CUTTING_NAMES)}."),
    )
    chunks: int = dataclasses.field(default=1, metadata=option("Stages on each rank, for the schedule interleaved."))

    def __post_init__(self) -> None:
        _at_least_one("n_microbatches", self.n_microbatches)
        _at_least_one("chunks", self.chunks)

    @classmethod
    def of(cls, schedule: str | ScheduleConfig | None) -> ScheduleConfig:
        """Return `schedule` as a ScheduleConfig; a text is its name.

        Raises:
            PipedreamError: it is neither.
        """
        if schedule is None or isinstance(schedule, str):
            return cls(schedule)
        if isinstance(schedule, ScheduleConfig):
            return schedule
        raise PipedreamError(
            f"schedule is {type(schedule).__name__}; it should be a name such as '1f1b', or a ScheduleConfig"
        )


@dataclass(frozen=True)
class TrainConfig:
    """How stages are trained, whatever the plan and the schedule.

    Attributes:
        gradient_accumulation_steps: minibatches per replica that one optimizer step learns from.
        precision: "bf16" or "fp16" to run forwards under autocast; fp16 scales the loss. None for the model's dtypes.
        master_weights: keep a float32 master of every bfloat16 weight. SGD, Adam and AdamW step the master, and the
            weight is the master, rounded. For models with bfloat16 weights (`model.bfloat16()`).
        clip_grad_norm: the largest norm of the gradients; longer gradients are scaled down to it. None for no clipping.
        clip_grad_over: the norm is that of each "stage", or of the whole "model" (synchronous schedules only).
        recompute: run forwards again before backwards instead of keeping activations; None for what the plan says of
            each stage.
        compile_backend: a backend of torch.compile, such as "inductor", that compiles every stage.
        deterministic: average the gradients of replicas in a fixed order, so that every run computes the same bits;
            otherwise MPI chooses the order.
        seed: the order of the data and the masks of dropout depend on it and on nothing else.
        check_model: before training, run example_inputs through the model by itself and through the stages, and
            refuse to train if they differ. It takes rank 0 the time of about five minibatches. A model given as a
            function is built on rank 0 for it, if there is room; if not, every rank checks its own stages.
        lr_scheduler: creates a stage's learning-rate scheduler from its optimizer; it advances once per minibatch:
            `functools.partial(torch.optim.lr_scheduler.StepLR, step_size=100)`.
        leaf_modules: module classes that are kept whole: no boundary between stages lies in them. One, or several.
        batch_dims: name of an input, or "target" -> the dimension that its samples are along; None for one that has no
            samples, such as a mask over positions, which every microbatch gets whole; 0 for a list with an item for
            each sample. All others have their samples along the first dimension. What is in nested inputs is named by
            its key, or by a path: "states.0", "target.boxes".

    Raises:
        PipedreamError: a value is not one of those that are accepted.
    """

    gradient_accumulation_steps: int = dataclasses.field(
        default=1, metadata=option("Minibatches per replica that one optimizer step learns from.")
    )
    precision: str | None = dataclasses.field(
        default=None,
        metadata=option(
            "Compute forwards in this precision, by torch's autocast; weights stay as they are.", choices=PRECISIONS
        ),
    )
    master_weights: bool = dataclasses.field(
        default=False, metadata=option("Keep a float32 master of every bfloat16 weight.")
    )
    clip_grad_norm: float | None = dataclasses.field(
        default=None, metadata=option("Largest norm of the gradients; larger gradients are scaled down to it.")
    )
    clip_grad_over: str = dataclasses.field(
        default="stage",
        metadata=option(
            "Whose norm that is: each stage's by itself, or the whole model's.", choices=("stage", "model")
        ),
    )
    recompute: bool | None = dataclasses.field(
        default=None,
        metadata=option(
            "Run forwards again before backwards instead of keeping what they computed, to save memory; "
            "by default what the plan says."
        ),
    )
    compile_backend: str | None = dataclasses.field(
        default=None, metadata=option("A backend of torch.compile, such as inductor, that compiles every stage.")
    )
    deterministic: bool = dataclasses.field(
        default=True, metadata=option("Average the gradients of replicas in a fixed order.")
    )
    seed: int = dataclasses.field(
        default=0, metadata=option("Seed of the order of the data and of the masks of dropout.")
    )
    check_model: bool = dataclasses.field(
        default=True, metadata=option("Compare the stages with the model by itself before training.")
    )
    lr_scheduler: LRSchedulerFactory | None = None
    leaf_modules: tuple[type[nn.Module], ...] = ()
    batch_dims: Mapping[str, int | None] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        _at_least_one("gradient_accumulation_steps", self.gradient_accumulation_steps)
        _one_of("precision", self.precision, (*PRECISIONS, None))
        _one_of("clip_grad_over", self.clip_grad_over, ("stage", "model"))
        if self.clip_grad_norm is not None and not _is_positive(self.clip_grad_norm):
            raise PipedreamError(
                f"clip_grad_norm should be a positive number, or None for no clipping, not {self.clip_grad_norm!r}"
            )
        if not isinstance(self.seed, int):
            raise PipedreamError(f"seed should be an integer, not {self.seed!r}")
        if self.lr_scheduler is not None and not callable(self.lr_scheduler):
            raise PipedreamError(
                f"lr_scheduler is {type(self.lr_scheduler).__name__}; it should be a function of the optimizer: "
                "functools.partial(torch.optim.lr_scheduler.StepLR, step_size=100)"
            )
        if self.compile_backend is not None:
            import torch

            backends = sorted(torch.compiler.list_backends(exclude_tags=()))
            _one_of("compile_backend", self.compile_backend, (*backends, None))
        for name in ("master_weights", "deterministic", "check_model"):
            if not isinstance(value := getattr(self, name), bool):
                raise PipedreamError(f"{name} should be True or False, not {value!r}")
        object.__setattr__(self, "leaf_modules", _module_classes(self.leaf_modules))
        if not isinstance(self.batch_dims, Mapping):
            raise PipedreamError(
                f"batch_dims is {self.batch_dims!r}; it should map names of inputs to dimensions, or to None: "
                "batch_dims={'tokens': 1, 'mask': None}"
            )
        for name, dim in self.batch_dims.items():
            if not isinstance(name, str) or isinstance(dim, bool) or not (dim is None or isinstance(dim, int)):
                raise PipedreamError(
                    f"batch_dims maps {name!r} to {dim!r}; it should map names of inputs to dimensions, or to None"
                )

    @property
    def needs_global_grad_norm(self) -> bool:
        """Whether all stages exchange the norm of their gradients before an optimizer step."""
        return self.precision == "fp16" or (self.clip_grad_norm is not None and self.clip_grad_over == "model")


@dataclass(frozen=True)
class RunConfig:
    """Where a run computes, and what it records.

    Attributes:
        device: "cpu", "cuda", or "auto" for a GPU where torch sees one and the core was built for it. A rank takes the
            GPU of its local rank. Two ranks on one GPU are refused unless PIPEDREAM_SHARE_GPUS=1 is set.
        stall_limit_s: seconds that a rank waits for another one before it reports a stall and stops.
        trace: record spans for `Pipeline.last_trace`.

    Raises:
        PipedreamError: a value is not one of those that are accepted.
    """

    device: str = dataclasses.field(
        default="auto",
        metadata=option("Where to compute; auto: a GPU where there is one.", choices=("auto", "cpu", "cuda")),
    )
    stall_limit_s: float = dataclasses.field(
        default=300.0, metadata=option("Seconds that a rank waits for another before it reports a stall and stops.")
    )
    trace: bool = dataclasses.field(
        default=False, metadata=option("Record what ran when; writes trace.json and timeline.png.", default="on")
    )

    def __post_init__(self) -> None:
        _one_of("device", self.device, ("auto", "cpu", "cuda"))
        if not _is_positive(self.stall_limit_s):
            raise PipedreamError(f"stall_limit_s should be a positive number of seconds, not {self.stall_limit_s!r}")


def _module_classes(given: Any) -> tuple[type[nn.Module], ...]:
    """Return the classes that were given as `leaf_modules`: one, or several."""
    classes = tuple(given) if isinstance(given, Iterable) and not isinstance(given, str | type) else (given,)
    for each in classes:
        from torch import nn

        if not (isinstance(each, type) and issubclass(each, nn.Module)):
            what = repr(each) if isinstance(each, str) else f"an object of type {type(each).__name__}"
            raise PipedreamError(f"leaf_modules has {what}; it should be a list of classes: leaf_modules=[MyBlock]")
    return classes


def _is_positive(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool) and 0 < float(value) < math.inf


def _at_least_one(name: str, value: Any) -> None:
    if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
        raise PipedreamError(f"{name} should be an integer of at least 1, not {value!r}")


def _one_of(name: str, value: Any, accepted: tuple[Any, ...]) -> None:
    if value not in accepted:
        words = ", ".join(f"'{each}'" for each in accepted if each is not None)
        none = " or None" if None in accepted else ""
        raise PipedreamError(f"{name} should be one of {words}{none}, not {value!r}")
