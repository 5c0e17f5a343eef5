"""Optimizer step of one stage: what is done with the gradients of a round.

    gradients ──► unscale ──► clip ──► optimizer step ──► learning-rate scheduler

Learning-rate schedulers count minibatches, whatever the number of replicas: a stage with two replicas learns from two
minibatches at a time, and its scheduler takes two steps. So every stage has, for one minibatch, the learning rate that
training in one process would have.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence

import torch
from torch.optim.lr_scheduler import ChainedScheduler, LRScheduler, OneCycleLR, ReduceLROnPlateau, SequentialLR

from pipedream_hpc.config import LRSchedulerFactory
from pipedream_hpc.errors import PipedreamError
from pipedream_hpc.runtime.weights.stash import WeightStash


class LossScale:
    """Dynamic loss scaling for fp16 (Micikevicius et al., ICLR 2018, section 3.2).

    Args:
        initial: first factor on the loss; 1 for no scaling at all.
        growth_interval: rounds without overflow after which the factor is doubled.
    """

    def __init__(self, initial: float = 1.0, growth_interval: int = 2000) -> None:
        self.value, self._growth_interval, self.rounds_without_overflow = initial, growth_interval, 0
        self.dynamic = initial != 1.0

    def update(self, *, overflow: bool) -> None:
        """Adjust the factor after a round, by whether a gradient overflowed in any stage."""
        if not self.dynamic:
            return
        self.rounds_without_overflow = 0 if overflow else self.rounds_without_overflow + 1
        if overflow:
            self.value = max(self.value / 2, 1.0)
        elif self.rounds_without_overflow == self._growth_interval:
            self.value, self.rounds_without_overflow = self.value * 2, 0


class StageOptimizer:
    """Unscales and clips the gradients of one stage, takes the optimizer step and advances the learning rate.

    Args:
        optimizer: the stage's optimizer; None if the stage trains nothing.
        lr_scheduler: creates the learning-rate scheduler from the optimizer; None for a constant learning rate.
        loss_scale: factor on the loss, for fp16.
        clip_grad_norm: largest norm of the gradients; None for no clipping.
        clip_grad_over: whether that is the norm of each "stage" by itself or of the whole "model".
        n_microbatches: microbatches per minibatch; the learning-rate scheduler advances once per minibatch.
        average: whether to divide by the number of microbatches in a round; otherwise their losses are weighted.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer | None,
        lr_scheduler: LRSchedulerFactory | None = None,
        loss_scale: LossScale | None = None,
        *,
        clip_grad_norm: float | None = None,
        clip_grad_over: str = "stage",
        n_microbatches: int = 1,
        average: bool = True,
    ) -> None:
        self.lr_scheduler: LRScheduler | None = None
        if lr_scheduler is not None and optimizer is not None:
            made: object = lr_scheduler(optimizer)
            if not isinstance(made, LRScheduler):
                raise PipedreamError(
                    f"lr_scheduler(optimizer) returned {type(made).__name__}; it should return a scheduler: "
                    "functools.partial(torch.optim.lr_scheduler.StepLR, step_size=100)"
                )
            self.lr_scheduler = made
            if isinstance(made, ReduceLROnPlateau):
                raise PipedreamError(
                    "ReduceLROnPlateau steps by a metric, but learning rates advance once per minibatch: use a "
                    "scheduler of steps, such as StepLR or LambdaLR"
                )
        self._scale = loss_scale or LossScale()
        self._clip_norm, self._clip_over = clip_grad_norm, clip_grad_over
        self._n_microbatches, self._average = n_microbatches, average
        #: Learning rate of the first parameter group in the last step; None before it, or without an optimizer.
        self.lr: float | None = None
        self._model_norm: tuple[float, bool] | None = None  # (squared norm, overflow)

    @property
    def loss_scale(self) -> float:
        """Factor on the loss."""
        return self._scale.value

    def loss_scale_state(self) -> list[float]:
        """Return the loss scale and its rounds without overflow, for a checkpoint."""
        return [self._scale.value, self._scale.rounds_without_overflow]

    def load_loss_scale_state(self, state: Sequence[float]) -> None:
        """Restore what `loss_scale_state` returned."""
        self._scale.value, self._scale.rounds_without_overflow = float(state[0]), int(state[1])

    def count(self, n_microbatches: int) -> int:
        """Return the divisor for the sum of a round's gradients.

        Args:
            n_microbatches: microbatches in the round, over all replicas.
        """
        return n_microbatches if self._average else 1

    def squared_norm(self, gradients: Sequence[torch.Tensor | None]) -> tuple[float, bool]:
        """Return the squared norm of the gradients, and whether a gradient overflowed."""
        squares = [_sum_of_squares(gradient) for gradient in gradients if gradient is not None]
        # Read all at once: on a GPU every read waits for the stream.
        total = math.fsum(torch.stack(squares).tolist()) if squares else 0.0
        return total, not math.isfinite(total)

    def set_model_norm(self, squared_norm: float, *, overflow: bool) -> None:
        """Set the squared norm over all stages for the next step, and whether a gradient overflowed in any stage."""
        self._model_norm = (squared_norm, overflow)

    def check_steps(self, minibatches: int) -> None:
        """Refuse a learning-rate scheduler that ends before so many further minibatches are trained.

        Raises:
            PipedreamError: it does.
        """
        left = steps_left(self.lr_scheduler)
        if minibatches > left:
            raise PipedreamError(
                f"the learning rates of {type(self.lr_scheduler).__name__} end after {left:g} more minibatches, but "
                f"{minibatches} are to be trained: create it for the minibatches of all epochs, such as "
                "total_steps=epochs * len(loader)"
            )

    def apply(self, stash: WeightStash, gradients: list[torch.Tensor | None], n_microbatches: int) -> int:
        """Write the next weight version and return its number.

        Args:
            stash: the stage's weights.
            gradients: averaged over the round; they are changed.
            n_microbatches: microbatches in the round, over all replicas.
        """
        if stash.optimizer is not None:
            self.lr = float(stash.optimizer.param_groups[0]["lr"])
        squared_norm, overflow = self._model_norm or (0.0, False)
        self._model_norm = None
        if overflow and self._scale.dynamic:
            self._scale.update(overflow=True)
            version = stash.skip_update()
        else:
            self._unscale_and_clip(gradients, squared_norm)
            version = stash.update(gradients)
            self._scale.update(overflow=False)
        if self.lr_scheduler is not None:
            for _ in range(-(-n_microbatches // self._n_microbatches)):
                _advance(self.lr_scheduler)
        return version

    def _unscale_and_clip(self, gradients: Sequence[torch.Tensor | None], model_squared_norm: float) -> None:
        present = [gradient for gradient in gradients if gradient is not None]
        if self._scale.value != 1.0:
            for gradient in present:
                gradient.div_(self._scale.value)
        if self._clip_norm is None:
            return
        if self._clip_over == "stage":
            if any(gradient.is_cuda for gradient in present):
                _clip_on_device(present, self._clip_norm)
                return
            norm = math.sqrt(self.squared_norm(present)[0])
        else:
            norm = math.sqrt(model_squared_norm) / self._scale.value
        if norm > self._clip_norm:
            for gradient in present:
                gradient.mul_(self._clip_norm / (norm + 1e-6))


def _sum_of_squares(gradient: torch.Tensor) -> torch.Tensor:
    """Return the sum of the squares of a gradient's numbers, or of their absolute values, as float64."""
    parts = torch.view_as_real(gradient.resolve_conj()) if gradient.is_complex() else gradient
    return parts.double().pow(2).sum()


def _clip_on_device(gradients: Sequence[torch.Tensor], max_norm: float) -> None:
    """Clip gradients to `max_norm` without reading their norm on the host."""
    norm = torch.stack([_sum_of_squares(gradient) for gradient in gradients]).sum().sqrt()
    factor = (max_norm / (norm + 1e-6)).where(norm > max_norm, 1.0)
    for gradient in gradients:
        gradient.mul_(factor.to(gradient.dtype))


def _advance(lr_scheduler: LRScheduler) -> None:
    with warnings.catch_warnings():
        # The stash may take the step itself; torch looks for a call of optimizer.step.
        warnings.filterwarnings("ignore", message="Detected call of `lr_scheduler.step")
        try:
            lr_scheduler.step()
        except ValueError as error:
            raise PipedreamError(
                f"{type(lr_scheduler).__name__} takes no step after {lr_scheduler.last_epoch - 1}: {error}: create "
                "lr_scheduler for as many steps as there are minibatches in all epochs"
            ) from error


def steps_left(lr_scheduler: object) -> float:
    """Return the steps that a learning-rate scheduler still takes; infinite if none of torch's has an end in it."""
    if isinstance(lr_scheduler, OneCycleLR):
        return int(lr_scheduler.total_steps - lr_scheduler.last_epoch)
    if isinstance(lr_scheduler, ChainedScheduler):
        return min(map(steps_left, lr_scheduler._schedulers))
    if isinstance(lr_scheduler, SequentialLR):
        begins = [0, *lr_scheduler._milestones]
        for each, begin, end in zip(lr_scheduler._schedulers, begins, [*begins[1:], math.inf], strict=True):
            last = begin + each.total_steps if isinstance(each, OneCycleLR) else math.inf
            if last < end - 1:
                return last - lr_scheduler.last_epoch
    return math.inf
