"""Gradient accumulation: the gradients of one round of a stage, from the leaves of its versions to one per weight.

A round is the microbatches that one optimizer step learns from. If the stage has a single replica::

    microbatches of one version    autograd adds them up on the leaves of its slab, while each is still in the caches
    another version                taken from the leaves and added to the round's sum; bitwise the same

If it has several, each gradient goes into the all-reduce's bucket as soon as it is complete.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from pipedream_hpc.runtime.comm.tensor_view import clone_if_shared
from pipedream_hpc.runtime.weights.grad_allreduce import GradAllReduce
from pipedream_hpc.runtime.weights.stash import WeightStash

Gradients = list[torch.Tensor | None]


class GradAccumulator:
    """Adds up the gradients of a round.

    Args:
        stash: the stage's weights.
        grad_allreduce: averages over the replicas; None for a single replica.
        is_deferred: called in backward with (leaf, gradient); true if split backward keeps this gradient until its
            weight pass. None if no backward is split.
    """

    def __init__(
        self,
        stash: WeightStash,
        grad_allreduce: GradAllReduce | None,
        is_deferred: Callable[[nn.Parameter, torch.Tensor], bool] | None,
    ) -> None:
        self._stash, self._grad_allreduce, self._is_deferred = stash, grad_allreduce, is_deferred
        self._last = False  # whether the current microbatch is the round's last on this rank
        self._sum: Gradients = []  # over earlier versions in the round
        self._slab: int | None = None  # its leaves hold gradients that are not in the sum yet
        self._average: Gradients | None = None
        if grad_allreduce is not None:
            stash.on_gradient(self._on_gradient)

    def begin(self, slab: int, *, last: bool) -> None:
        """Begin, or continue, the backward of a microbatch.

        Args:
            slab: the slab of its weight version.
            last: whether it is the last microbatch of the round on this rank.
        """
        self._last = last
        if self._slab is not None and self._slab != slab:
            self._add_to_sum(self._stash.take_gradients(self._slab))
            self._slab = None

    def add(self, leaf: nn.Parameter, gradient: torch.Tensor) -> None:
        """Add a deferred gradient, as backward itself would have done."""
        if self._grad_allreduce is not None:
            self._grad_allreduce.add(self._stash.position_of(leaf), gradient, last=self._last)
        else:
            leaf.grad = clone_if_shared(gradient) if leaf.grad is None else leaf.grad.add_(gradient)

    def clone_gradients_in(self, slab: int, storages: set[int]) -> None:
        """Clone gradients in `storages`, memory that is reused before the optimizer step, such as receive slots."""
        if self._grad_allreduce is None and storages:
            self._stash.clone_gradients_in(slab, storages)

    def end(self, slab: int) -> None:
        """End the backward of a microbatch: its gradients are complete."""
        if self._grad_allreduce is not None:
            return
        if self._sum or self._last:
            self._add_to_sum(self._stash.take_gradients(slab))
            self._slab = None
            return
        if self._slab is None:
            # Autograd may give two weights the same gradient tensor, and would add the next one to it twice.
            self._stash.unshare_gradients(slab)
        self._slab = slab

    def average(self, divisor: Callable[[], float]) -> Gradients:
        """Return the sum of the round's gradients divided by `divisor()`; again the same until `close`.

        The divisor is asked for once all replicas have run their backwards of the round.
        """
        if self._average is None:
            if self._grad_allreduce is not None:
                self._average = self._grad_allreduce.average(divisor)
            else:
                self._average = self._sum or [None] * len(self._stash.trained)
                number = divisor() if self._sum else 1
                for gradient in self._average:
                    if gradient is not None and number != 1:
                        gradient.div_(number)
            self._sum = []
        return self._average

    def close(self) -> None:
        """End the round."""
        self._average = None

    def _on_gradient(self, position: int, leaf: nn.Parameter, gradient: torch.Tensor) -> None:
        assert self._grad_allreduce is not None
        if self._is_deferred is None or not self._is_deferred(leaf, gradient):
            self._grad_allreduce.add(position, gradient, last=self._last)

    def _add_to_sum(self, gradients: Gradients) -> None:
        if not self._sum:
            self._sum = gradients
            return
        for position, gradient in enumerate(gradients):
            total = self._sum[position]
            if total is None:
                self._sum[position] = gradient
            elif gradient is not None:
                total.add_(gradient)
