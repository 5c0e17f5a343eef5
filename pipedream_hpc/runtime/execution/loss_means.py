"""Loss means: does the mean of a loss over a microbatch weigh every sample alike?

Where minibatches are cut, the loss of a minibatch is taken to be the mean over its microbatches, weighted by samples.
That is not so for a mean over targets of which some are ignored, or weighted by their class: then the number that the
loss divides by must be the same for every sample of the minibatch.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from pipedream_hpc.errors import PipedreamError


class LossMeans(TorchFunctionMode):
    """Watches what a loss function divides by.

    Args:
        n_microbatches: microbatches per minibatch.
    """

    def __init__(self, n_microbatches: int) -> None:
        super().__init__()
        self._n_microbatches = n_microbatches
        self._divisors: list[float] = []  # of the current microbatch
        self._minibatch, self._first = -1, (0, [0.0])

    def begin(self) -> None:
        """Begin the loss of a microbatch."""
        self._divisors = []

    def end(self, microbatch: int, samples: int) -> None:
        """Compare a microbatch's divisors with those of the first one of its minibatch.

        Raises:
            PipedreamError: they differ per sample.
        """
        minibatch = microbatch // self._n_microbatches
        if minibatch != self._minibatch:
            self._minibatch, self._first = minibatch, (samples, self._divisors)
            return
        first_samples, first = self._first
        for divisor, other in zip(self._divisors, first, strict=False):
            if abs(divisor * first_samples - other * samples) > 1e-6 * max(abs(divisor * first_samples), 1.0):
                raise PipedreamError(
                    f"the loss is a mean over {divisor:g} targets of {samples} samples here, and over {other:g} of "
                    f"{first_samples} in another microbatch of the minibatch, because some are ignored or weighted: "
                    "the mean over microbatches would be another; train whole minibatches (n_microbatches=1)"
                )

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        options = kwargs or {}
        if function in (functional.cross_entropy, functional.nll_loss) and options.get("reduction", "mean") == "mean":
            self._note(*args, **options)
        return function(*args, **options)

    def _note(
        self, _: torch.Tensor, target: torch.Tensor, weight: torch.Tensor | None = None, *more: Any, **options: Any
    ) -> None:
        if target.is_floating_point():
            return  # probabilities: a mean over samples
        ignored = options.get("ignore_index", -100)
        kept = target[target != ignored]
        self._divisors.append(float(kept.numel()) if weight is None else float(weight[kept].sum()))
