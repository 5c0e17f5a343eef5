"""Step: what is done with the gradients of a round before and around the optimizer's own step.

    gradients ──► unscale ──► clip ──► optimizer.step ──► learning rates move on

Learning-rate schedulers count minibatches, whatever the replicas: a stage of two replicas learns from
two minibatches at a time, and its scheduler takes two steps. So every stage has, for one minibatch,
the learning rate that plain training would have.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch.optim.lr_scheduler import LRScheduler

from pipedream_hpc.runtime.stash import WeightStash
from pipedream_hpc.schedule.actions import Schedule

#: Makes the learning-rate scheduler of one stage; it is stepped once per minibatch.
SchedulerFactory = Callable[[torch.optim.Optimizer], LRScheduler]


@dataclass(frozen=True)
class Clip:
    """Gradient clipping by norm.

    Attributes:
        norm: the largest norm that is left as it is.
        over: the gradients of each stage by itself, or of all stages together.
    """

    norm: float
    over: Literal["stage", "model"] = "stage"


class LossScale:
    """Dynamic loss scaling for fp16 (Micikevicius et al., ICLR 2018, section 3.2).

    Args:
        initial: factor on the loss at first; 1 for no scaling at all.
        growth_interval: rounds without overflow after which it is doubled.
    """

    def __init__(self, initial: float = 1.0, growth_interval: int = 2000) -> None:
        self.value, self._growth_interval, self.good = initial, growth_interval, 0
        self.dynamic = initial != 1.0

    def after(self, overflow: bool) -> None:
        """A round is over on all stages."""
        if not self.dynamic:
            return
        self.good = 0 if overflow else self.good + 1
        if overflow:
            self.value = max(self.value / 2, 1.0)
        elif self.good == self._growth_interval:
            self.value, self.good = self.value * 2, 0


class Step:
    """The update of one stage.

    Args:
        optimizer: the stage's; None if it trains nothing.
        scheduler: makes its learning-rate scheduler.
        clip: how gradients are clipped.
        loss_scale: of fp16.
        microbatches: units to a minibatch; learning-rate schedulers advance once per minibatch.
        average: whether gradients of a round's units are averaged, or come weighted from the loss.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer | None,
        scheduler: SchedulerFactory | None,
        clip: Clip | None,
        loss_scale: LossScale,
        *,
        microbatches: int,
        average: bool,
    ) -> None:
        self.scheduler = scheduler(optimizer) if scheduler is not None and optimizer is not None else None
        self._optimizer, self._clip, self._scale = optimizer, clip, loss_scale
        self._microbatches, self._average = microbatches, average
        self._agreed: tuple[float, bool] | None = None

    def scale_state(self) -> list[float]:
        """The loss scale and how many rounds it has held, for checkpoints."""
        return [self._scale.value, self._scale.good]

    def restore_scale(self, state: Sequence[float]) -> None:
        """Back to what `scale_state` gave."""
        self._scale.value, self._scale.good = float(state[0]), int(state[1])

    @property
    def loss_scale(self) -> float:
        """Factor on the loss."""
        return self._scale.value

    def count(self, schedule: Schedule, stage: int, round: int) -> int:
        """What the sum of the round's gradients is divided by."""
        return _units(schedule, stage, round) if self._average else 1

    def measure(self, gradients: Sequence[torch.Tensor | None]) -> tuple[float, bool]:
        """Sum of squares of the round's gradients, and whether one is not finite."""
        squares = [gradient.double().pow(2).sum() for gradient in gradients if gradient is not None]
        # Read out together: on a GPU every reading waits for the stream.
        total = math.fsum(torch.stack(squares).tolist()) if squares else 0.0
        return total, not math.isfinite(total)

    def agreed(self, squares: float, overflow: bool) -> None:
        """What all stages together measured."""
        self._agreed = (squares, overflow)

    def apply(
        self, stash: WeightStash, gradients: list[torch.Tensor | None], schedule: Schedule, stage: int, round: int
    ) -> int:
        """Make the next version; returns its number."""
        squares, overflow = self._agreed or (0.0, False)
        self._agreed = None
        if overflow and self._scale.dynamic:
            self._scale.after(True)
            made = stash.skip_update()
        else:
            self._prepare(gradients, squares)
            made = stash.update(gradients)
            self._scale.after(False)
        if self.scheduler is not None:
            for _ in range(-(-_units(schedule, stage, round) // self._microbatches)):
                _advance(self.scheduler)
        return made

    def _prepare(self, gradients: Sequence[torch.Tensor | None], squares: float) -> None:
        present = [gradient for gradient in gradients if gradient is not None]
        if self._scale.value != 1.0:
            for gradient in present:
                gradient.div_(self._scale.value)
        if self._clip is None:
            return
        if self._clip.over == "stage":
            if any(gradient.is_cuda for gradient in present):
                _clip_on_device(present, self._clip.norm)
                return
            squares, _ = self.measure(present)
            norm = math.sqrt(squares)
        else:
            norm = math.sqrt(squares) / self._scale.value
        if norm > self._clip.norm:
            for gradient in present:
                gradient.mul_(self._clip.norm / (norm + 1e-6))


def _clip_on_device(gradients: Sequence[torch.Tensor], norm: float) -> None:
    """Scale down what is longer than `norm`, without telling the host how long it was."""
    squares = torch.stack([gradient.double().pow(2).sum() for gradient in gradients]).sum()
    factor = (norm / (squares.sqrt() + 1e-6)).where(squares.sqrt() > norm, 1.0)
    for gradient in gradients:
        gradient.mul_(factor.to(gradient.dtype))


def _units(schedule: Schedule, stage: int, round: int) -> int:
    per_update = schedule.per_update(stage)
    return min(per_update, schedule.minibatches - round * per_update)


def _advance(scheduler: LRScheduler) -> None:
    with warnings.catch_warnings():
        # The step was the stash's; torch looks for a call of optimizer.step.
        warnings.filterwarnings("ignore", message="Detected call of `lr_scheduler.step")
        scheduler.step()
