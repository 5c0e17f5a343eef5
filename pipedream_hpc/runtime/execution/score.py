"""Scores: what a loss function or a metric returns for a microbatch.

::

    one number       the mean over the samples; microbatches weigh as many as they have samples
    (sum, count)     a sum, and what it is over, such as the targets that are no padding; the score of several
                     microbatches is the sum of their sums divided by the sum of their counts
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from pipedream_hpc.errors import PipedreamError


@dataclass(frozen=True)
class Score:
    """A score of one microbatch.

    Attributes:
        mean: one number; 0 where nothing was counted.
        sum: the sum; None if the function returned a mean.
        count: what the sum is over; None if the function returned a mean.
    """

    mean: torch.Tensor
    sum: torch.Tensor | None = None
    count: torch.Tensor | float | None = None


#: Computes the scores of the output stage from (output, target): the loss in training, all metrics in evaluation.
ScoreFn = Callable[[Any, Any], Sequence[Score]]


def read_score(returned: Any, what: str) -> Score:
    """Return what a function returned as a Score.

    Args:
        returned: one number as a tensor, or a pair (sum, count), where count may be a tensor or a number.
        what: the function, for messages.

    Raises:
        PipedreamError: it is neither, or the count is negative.
    """
    if isinstance(returned, torch.Tensor) and returned.dim() == 0:
        return Score(returned)
    if type(returned) in (tuple, list) and len(returned) == 2:
        total, count = returned
        if isinstance(count, torch.Tensor) and count.dim() == 0 and not count.is_complex():
            count = count.detach()
            divisor: Any = count.where(count != 0, 1)
            if not count.is_cuda:  # there reading it would wait; the loss meter looks at the end of the pass
                require_count(float(count), what)
        elif isinstance(count, int | float):
            require_count(count, what)
            divisor = count or 1
        else:
            raise PipedreamError(
                f"{what} has the count {_kind(count)}; in a pair (sum, count) it should be one number of at least "
                "0, such as how many targets the sum is over"
            )
        if isinstance(total, torch.Tensor) and total.dim() == 0:
            mean = total / divisor
            if isinstance(count, torch.Tensor) or count == 0:
                # Of nothing the sum may be no number, as where it is a mean over nothing, times 0.
                nothing = torch.as_tensor(count == 0, device=total.device)
                mean = mean.where(~nothing, 0.0)
            return Score(mean, total, count)
        raise PipedreamError(f"{what} has the sum {_kind(total)}; in a pair (sum, count) it should be one number")
    if returned is None:
        raise PipedreamError(
            f"{what} is None: return one number, or a pair (sum, count); a loss that the model computes itself is None "
            "for minibatches without the labels"
        )
    raise PipedreamError(
        f"{what} should be one number, the mean over the minibatch, or a pair (sum, count), but is {_kind(returned)}: "
        "take its mean (reduction='mean')"
    )


def require_count(count: float, what: str) -> None:
    """Refuse a count that is no number from 0. It need not be an integer: a weighted mean counts weights.

    Raises:
        PipedreamError: it is negative, infinite or no number.
    """
    if not 0 <= count < math.inf:
        raise PipedreamError(
            f"{what} has the count {count:g}; in a pair (sum, count) it should be 0 or more, such as how many targets "
            "the sum is over, or the sum of their weights"
        )


def _kind(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return f"of shape {tuple(value.shape)}"
    return f"{value}" if isinstance(value, int | float) else f"of type {type(value).__name__}"
