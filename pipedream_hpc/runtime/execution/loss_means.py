"""Loss means: does the mean of a loss over a microbatch weigh every sample alike?

Where minibatches are cut, the loss of a minibatch is taken to be the mean over its microbatches, weighted by samples.
That is not so for a mean over targets of which some are ignored, or weighted by their class: then the number that the
loss divides by must be the same for every sample of the minibatch. A number that a loss divides by besides, as in a
masked mean of the user's own, must be so, too, or be the same in all microbatches, such as a temperature.
"""

from __future__ import annotations

from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.overrides import TorchFunctionMode

from pipedream_hpc.errors import PipedreamError
from pipedream_hpc.model.averages import AVERAGES_TARGETS, divisor_of, is_loss

#: The samples of a microbatch; what its means over targets divide by; and what else its loss divides by.
Divisors = tuple[int, list[float], list[float]]


def compare_divisors(one: Divisors, other: Divisors) -> None:
    """Compare the divisors of two microbatches of a minibatch.

    Raises:
        PipedreamError: they differ per sample.
    """
    samples, other_samples = one[0], other[0]
    remedy = (
        "the mean over microbatches would be another; let loss_fn return a pair (sum, count), such as the sum of the "
        "losses and how many targets they are of"
    )
    for divisor, another in zip(one[1], other[1], strict=False):
        if not _per_sample(divisor, samples, another, other_samples):
            raise PipedreamError(
                f"the loss is a mean over {another:g} targets of {other_samples} samples in one microbatch, and over "
                f"{divisor:g} of {samples} in another of the same minibatch, because some are ignored or weighted: "
                f"{remedy}"
            )
    if len(one[2]) != len(other[2]):
        return  # microbatches that take other paths
    for divisor, another in zip(one[2], other[2], strict=True):
        same = abs(divisor - another) <= 1e-6 * abs(divisor)
        if not same and not _per_sample(divisor, samples, another, other_samples):
            raise PipedreamError(
                f"the loss divides by {another:g} for {other_samples} samples in one microbatch, and by {divisor:g} "
                f"for {samples} in another of the same minibatch: {remedy}"
            )


def _per_sample(divisor: float, samples: int, other: float, other_samples: int) -> bool:
    return abs(divisor * other_samples - other * samples) <= 1e-6 * max(abs(divisor * other_samples), 1.0)


class LossMeans(TorchFunctionMode):
    """Watches what a loss divides by: one that a loss function computes, or the model itself.

    Args:
        n_microbatches: microbatches per minibatch.
        in_forward: whether the model computes means itself.

    Attributes:
        first: of the first microbatch of every minibatch of the pass that ran here.
    """

    def __init__(self, n_microbatches: int, *, in_forward: bool) -> None:
        super().__init__()
        self.in_forward = in_forward
        self._n_microbatches = n_microbatches
        self._of_targets: list[float] = []  # divisors of the current microbatch
        self._others: list[float] = []
        self._in_loss = False
        self._sums = self._sums_in_forward = False  # whether it computes sums
        self.first: dict[int, Divisors] = {}

    def begin(self) -> None:
        """Begin a pass."""
        self.first.clear()

    def end_forward(self) -> None:
        """End the forward of a microbatch: its loss function comes next."""
        self._sums_in_forward, self._in_loss = self._sums, True

    def is_needed(self, microbatch: int) -> bool:
        """Return whether to watch a microbatch.

        If the loss of a minibatch's first microbatch divides by nothing, there is nothing to compare the others with:
        watching costs more than a small loss itself.
        """
        first = self.first.get(microbatch // self._n_microbatches)
        return first is None or bool(first[1] or first[2])

    def end(self, microbatch: int, samples: int, *, compare: bool) -> None:
        """End a microbatch.

        Args:
            microbatch: its number.
            samples: how many it has.
            compare: compare its divisors with those of the first microbatch of its minibatch.

        Raises:
            PipedreamError: they differ per sample.
        """
        sums, self._sums, self._sums_in_forward, self._in_loss = self._sums_in_forward, False, False, False
        own: Divisors = (samples, self._of_targets, self._others) if compare else (samples, [], [])
        self._of_targets, self._others = [], []
        if sums and compare:
            raise PipedreamError(
                "the model's own loss is a sum (reduction='sum'), divided by a number that is not known to be that of "
                "the microbatch: let loss_fn return a pair (sum, count), or train whole minibatches (n_microbatches=1)"
            )
        compare_divisors(self.first.setdefault(microbatch // self._n_microbatches, own), own)

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        options = kwargs or {}
        self._sums |= function in AVERAGES_TARGETS and options.get("reduction") == "sum"
        if function in AVERAGES_TARGETS and options.get("reduction", "mean") == "mean":
            self._note(*args, **options)
        returned = function(*args, **options)
        # In the model's forward most divisions have nothing to do with a loss.
        if self._in_loss or is_loss(returned):
            divisor = divisor_of(function, args, options)
            if divisor is not None and not isinstance(divisor, FakeTensor):
                self._others.append(float(divisor.detach() if isinstance(divisor, torch.Tensor) else divisor))
        return returned

    def _note(
        self, _: torch.Tensor, target: torch.Tensor, weight: torch.Tensor | None = None, *more: Any, **options: Any
    ) -> None:
        if target.is_floating_point() or isinstance(target, FakeTensor):
            return  # probabilities, which are a mean over samples; or a forward that is recorded
        ignored = options.get("ignore_index", -100)
        kept = target[target != ignored]
        self._of_targets.append(float(kept.numel()) if weight is None else float(weight[kept].sum()))
