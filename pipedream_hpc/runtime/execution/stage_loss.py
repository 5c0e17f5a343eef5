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
        losses: of the run.
        optimizer: knows the loss scale, and how many microbatches a round counts.
        of_others: names the weights that a loss must not read, by identity.
        means: checks the means of the output stage's losses, where minibatches are cut.
        whole: compares the loss of the first minibatch with those of its microbatches.
        pools: whether rounds have several microbatches, in any stage.

    Attributes:
        meter: the scores of the pass.
    """

    def __init__(
        self,
        loss_fn: LossFn,
        losses: RunLosses,
        optimizer: StageOptimizer,
        *,
        of_others: Callable[[], Mapping[int, str]],
        means: LossMeans | None = None,
        whole: WholeLoss | None = None,
        pools: bool = False,
    ) -> None:
        self.meter, self.means = LossMeter(), means
        self._loss_fn, self._losses, self._optimizer, self._of_others = loss_fn, losses, optimizer, of_others
        self._whole, self._pools = whole, pools
        self._score_fn: ScoreFn = self._loss
        self._data: MicrobatchLoader | None = None
        self._training = True
        self._first_microbatch = 0  # number, within the run, of the first microbatch of the pass
        self._publishes = False
        self._computed = False  # whether the pass has a score
        self._counted: bool | None = None  # whether the loss is a pair (sum, count), once that is known
        self._n_stepped = 0  # microbatches of the pass that an optimizer step has learned from
        self._gradients: dict[float, torch.Tensor] = {}  # initial ones, by weight

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
        """End the pass.

        Raises:
            PipedreamError: the loss of its only minibatch is not the mean of those of its microbatches.
        """
        if self._whole is not None and self._training:
            self._whole.compare()
        self._data = None

    def watch(self, microbatch: int) -> LossMeans | None:
        """Return what notes the means of a microbatch, in the model's forward and in its loss; None if nothing does."""
        watched = self.means if self._training else None
        return watched if watched is not None and watched.is_needed(microbatch) else None

    def compute(
        self, microbatch: int, output: Any, *, watched: LossMeans | None = None, again: bool = False
    ) -> Sequence[Score]:
        """Compute the scores of the model's output for a microbatch.

        Args:
            microbatch: its number.
            output: of the model.
            watched: what `watch` returned, where it has noted the model's forward.
            again: whether the forward has been run before.

        Raises:
            PipedreamError: the loss function returns no score, reads weights of others, or is no mean that a minibatch
                is made up from.
        """
        assert self._data is not None
        target, samples = self._data.target(microbatch), self._data.samples(microbatch)
        forbidden = _NULL_CONTEXT if self._computed else OthersTensors(self._of_others())
        if watched is not None:
            watched.end_forward()
        with watched or _NULL_CONTEXT, forbidden:
            scores = self._score_fn(output, target)
        self._computed = True
        if watched is not None:
            watched.end(microbatch, samples, compare=scores[0].count is None)
        if self._whole is not None and self._training and not again:
            self._whole.add(microbatch, output, target, samples, scores[0])
        return scores

    def record(self, microbatch: int, scores: Sequence[Score]) -> None:
        """Record the scores of a microbatch, and publish the loss where anybody asks for it.

        Raises:
            PipedreamError: the loss is a pair (sum, count) now, and was not before, or the other way round.
        """
        assert self._data is not None
        samples = self._data.samples(microbatch)
        self.meter.add(microbatch, scores, samples)
        if not self._training:
            return
        counted = scores[0].count is not None
        if self._publishes or (self._pools and (counted or self._counted is None)):
            self._losses.publish(self._first_microbatch + microbatch, scores[0], samples)
        if self._counted not in (None, counted):
            raise PipedreamError(
                "the loss is a pair (sum, count) for some microbatches and one number for others: let it always be "
                "the same"
            )
        self._counted = counted

    def root(self, microbatch: int, loss: Score) -> tuple[torch.Tensor, torch.Tensor]:
        """Return what backward starts from, and the gradient that it starts with, which nobody may write to."""
        assert self._data is not None
        weight = self._optimizer.loss_scale
        if loss.count is None:
            weight *= self._data.weight(microbatch)
        root = loss.sum if loss.sum is not None and self._pools else loss.mean
        return root, self._gradient(weight, root)

    def let_go(self, gradient: torch.Tensor) -> None:
        """Take back an initial gradient after its backward."""
        if is_shared(gradient):
            # A parameter's gradient is a view of it, and will be added to or scaled in place.
            self._gradients.clear()

    def divisor(self, n_microbatches: int) -> float:
        """Return what the sum of a round's gradients is divided by; all forwards of the round have been run."""
        begin = self._n_stepped
        if self._counted is None and self._pools:
            self._counted = self._losses.ask(self._first_microbatch, begin).counted
        if not self._counted or not self._pools:
            return self._optimizer.count(n_microbatches)
        round = range(begin, begin + n_microbatches)
        return sum(self._losses.ask(self._first_microbatch, microbatch).weight for microbatch in round) or 1.0

    def end_round(self, n_microbatches: int) -> None:
        """End a round: the next optimizer step learns from other microbatches."""
        self._n_stepped += n_microbatches

    def _loss(self, output: Any, target: Any) -> Sequence[Score]:
        return (read_score(self._loss_fn(output, target), "the loss"),)

    def _gradient(self, weight: float, loss: torch.Tensor) -> torch.Tensor:
        """Return the initial gradient that scales the loss by `weight` without a multiplication."""
        gradient = self._gradients.get(weight)
        if gradient is None or gradient.dtype != loss.dtype:
            # Microbatches of full size share one, until the loss scale changes.
            if len(self._gradients) > 16:
                self._gradients.clear()
            gradient = self._gradients[weight] = torch.full_like(loss, weight, requires_grad=False)
        return gradient
