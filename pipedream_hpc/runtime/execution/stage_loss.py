"""Stage loss: what a stage does with the loss of its microbatches.

::

    in the output stage   output, target ──► compute ──► scores ──► record ──► loss meter, published losses
                                                            └─────► root ──► what backward starts from
    in every stage        microbatches of a round ──► divisor ──► what the sum of their gradients is divided by
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from pipedream_hpc.errors import PipedreamError
from pipedream_hpc.job import LossFn
from pipedream_hpc.runtime.comm.tensor_view import is_shared
from pipedream_hpc.runtime.execution.data import MicrobatchLoader
from pipedream_hpc.runtime.execution.loss_means import LossMeans
from pipedream_hpc.runtime.execution.loss_meter import LossMeter
from pipedream_hpc.runtime.execution.others_weights import OthersTensors
from pipedream_hpc.runtime.execution.run_losses import RunLosses
from pipedream_hpc.runtime.execution.score import Score, ScoreFn, read_score
from pipedream_hpc.runtime.execution.whole_loss import WholeLoss
from pipedream_hpc.runtime.weights.optimizer_step import StageOptimizer

_NULL_CONTEXT: AbstractContextManager[Any] = nullcontext()


class StageLoss:
    """The losses of a pass, or its metrics in an evaluation.

    Microbatches are numbered within the pass.

    Args:
        loss_fn: mean loss, or its sum and count, from (output, target); used by the output stage only.
        losses: publishes the losses of this rank, and reads those of other ranks.
        optimizer: knows the loss scale, and what a round of means is divided by.
        weights_of_others: returns the weights that a loss must not read: identity -> name.
        means: checks the means of the output stage's losses, where minibatches are cut.
        whole: compares the losses of some minibatches with those of their microbatches.
        pools: whether an optimizer step learns from several microbatches, in any stage.

    Attributes:
        meter: the scores of the pass.
    """

    def __init__(
        self,
        loss_fn: LossFn,
        losses: RunLosses,
        optimizer: StageOptimizer,
        *,
        weights_of_others: Callable[[], Mapping[int, str]],
        means: LossMeans | None = None,
        whole: WholeLoss | None = None,
        pools: bool = False,
    ) -> None:
        self.meter, self.means = LossMeter(), means
        self._loss_fn, self._losses, self._optimizer = loss_fn, losses, optimizer
        self._weights_of_others = weights_of_others
        self._whole, self._pools = whole, pools
        self._score_fn: ScoreFn = self._loss
        self._data: MicrobatchLoader | None = None
        self._training = True
        self._first_microbatch = 0  # number, within the run, of the first microbatch of the pass
        self._publishes = False
        self._computed = False  # whether the pass has a score
        # Whether the loss is a pair (sum, count), once that is known; it is so for the whole run.
        self._counted: bool | None = None
        self._n_stepped = 0  # microbatches of the pass that an optimizer step has learned from
        self._initial_gradients: dict[float, torch.Tensor] = {}  # by the weight of the loss

    def begin(
        self,
        data: MicrobatchLoader,
        *,
        training: bool,
        first_microbatch: int,
        score_fn: ScoreFn | None,
        publish: bool,
    ) -> None:
        """Prepare for one pass; arguments as for Stage.begin."""
        self._data, self._score_fn, self._training = data, score_fn or self._loss, training
        self._first_microbatch, self._publishes = first_microbatch, publish
        self._n_stepped, self._computed = 0, False
        self.meter = LossMeter()
        if self.means is not None:
            self.means.begin()

    def end(self) -> None:
        """End the pass."""
        self._data = None

    def watch(self, microbatch: int) -> LossMeans | None:
        """Return what to enter around the model's forward; None for nothing."""
        return self._needed(microbatch) if self.means is not None and self.means.in_forward else None

    def _needed(self, microbatch: int) -> LossMeans | None:
        means = self.means if self._training else None
        return means if means is not None and means.is_needed(microbatch) else None

    def compute(self, microbatch: int, output: Any, *, again: bool = False) -> Sequence[Score]:
        """Compute the scores of the model's output for a microbatch.

        Args:
            microbatch: its number.
            output: the model's output.
            again: whether the forward has been run before.

        Raises:
            PipedreamError: the loss function returns no score, or reads weights of other stages; or the loss of a
                minibatch is not the mean of its microbatches' losses.
        """
        assert self._data is not None
        target, samples = self._data.target(microbatch), self._data.samples(microbatch)
        # The check takes time, so only the first microbatch of a pass has it.
        forbidden = _NULL_CONTEXT if self._computed else OthersTensors(self._weights_of_others())
        watched, seeing = None if again else self._needed(microbatch), _NULL_CONTEXT
        if watched is not None and watched.is_alike(microbatch, output, target, samples):
            watched = None
        if watched is not None:
            watched.end_forward()
            seeing = watched if watched.must_see(output, target) else _NULL_CONTEXT
        with seeing, forbidden:
            scores = self._score_fn(output, target)
        self._computed = True
        if watched is not None:
            watched.end(microbatch, samples, compare=scores[0].count is None)  # a pair says what it counts
        if self._whole is not None and self._training and not again:
            self._whole.add(microbatch, output, target, samples, scores[0])
        return scores

    def record(self, microbatch: int, scores: Sequence[Score]) -> None:
        """Record the scores of a microbatch, and publish the loss if other ranks ask for it.

        Raises:
            PipedreamError: the loss is a pair (sum, count) for some microbatches and a number for others.
        """
        assert self._data is not None
        samples = self._data.samples(microbatch)
        self.meter.add(microbatch, scores, samples)
        if not self._training:
            return
        counted = scores[0].count is not None
        # The first one tells all stages whether the loss is counted, also one that is refused here: they wait for it.
        if self._publishes or (self._pools and (counted or self._counted is None)):
            self._losses.publish(self._first_microbatch + microbatch, scores[0], samples)
        if self._counted not in (None, counted):
            raise PipedreamError(
                "the loss is a pair (sum, count) for some microbatches and one number for others: return the same form "
                "for every microbatch"
            )
        self._counted = counted

    def root(self, microbatch: int, loss: Score) -> tuple[torch.Tensor, torch.Tensor]:
        """Return what backward starts from, and the gradient that it starts with, which is read-only."""
        assert self._data is not None
        weight = self._optimizer.loss_scale
        if loss.count is None:
            weight *= self._data.weight(microbatch)
        # A single microbatch per step needs no divisor: its mean has the gradient.
        root = loss.sum if loss.sum is not None and self._pools else loss.mean
        return root, self._initial_gradient(weight, root)

    def drop_if_shared(self, gradient: torch.Tensor) -> None:
        """Do not use an initial gradient again if, after its backward, a parameter's gradient has its memory."""
        if is_shared(gradient):
            # The parameter's gradient will be added to, or scaled, in place.
            self._initial_gradients.clear()

    def divisor(self, n_microbatches: int) -> float:
        """Return what the sum of a round's gradients is divided by.

        Call it after the forwards of the round. Where the loss is counted, it waits for the losses of other ranks.
        """
        begin = self._n_stepped
        if self._counted is None and self._pools:
            self._counted = self._losses.ask(self._first_microbatch, begin).counted
        if not self._counted or not self._pools:
            return self._optimizer.count(n_microbatches)
        counts = (self._losses.ask(self._first_microbatch, begin + each).weight for each in range(n_microbatches))
        return sum(counts) or 1.0  # of nothing all gradients are 0

    def end_round(self, n_microbatches: int) -> None:
        """End a round: the next optimizer step learns from other microbatches."""
        self._n_stepped += n_microbatches

    def _loss(self, output: Any, target: Any) -> Sequence[Score]:
        return (read_score(self._loss_fn(output, target), "the loss"),)

    def _initial_gradient(self, weight: float, loss: torch.Tensor) -> torch.Tensor:
        """Return the initial gradient that scales the loss by `weight` without a multiplication."""
        gradient = self._initial_gradients.get(weight)
        if gradient is None or gradient.dtype != loss.dtype:
            # Microbatches of full size share one, until the loss scale changes; smaller ones have other weights.
            if len(self._initial_gradients) > 16:
                self._initial_gradients.clear()
            gradient = self._initial_gradients[weight] = torch.full_like(loss, weight, requires_grad=False)
        return gradient
