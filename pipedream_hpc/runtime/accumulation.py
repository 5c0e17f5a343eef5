"""Accumulation: the gradients of a round of one stage, from the leaves where backward leaves them to one per weight.

A round is what one update learns from. Where a stage has no other replica::

    units of one version    added up by autograd itself on the leaves of its slab, while each is still in the caches
    another version         taken from the leaves and added to the round's sum; bit for bit the same

Where it has, each gradient goes to the averager's bucket as soon as it is whole.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from pipedream_hpc.runtime.averaging import Averager
from pipedream_hpc.runtime.stash import WeightStash
from pipedream_hpc.runtime.view import alone

Gradients = list[torch.Tensor | None]


class Accumulation:
    """The gradients of the round under way.

    Args:
        stash: the stage's weights.
        averager: over the replicas; None for a single one.
        keeps: asked in backward about (leaf, gradient), whether somebody keeps it because more is to come of it.
    """

    def __init__(
        self, stash: WeightStash, averager: Averager | None, keeps: Callable[[nn.Parameter, torch.Tensor], bool] | None
    ) -> None:
        self._stash, self._averager, self._keeps = stash, averager, keeps
        self._last = False  # whether the unit at work is the round's last here
        self._sum: Gradients = []  # of the units of the round so far
        self._slab: int | None = None  # on whose leaves they stand meanwhile
        self._total: Gradients | None = None
        if averager is not None:
            stash.when_ready(self._ready)

    def begin(self, slab: int, *, last: bool) -> None:
        """A backward on the version in `slab` begins, or goes on; `last`: of the last unit of the round here."""
        self._last = last
        if self._slab is not None and self._slab != slab:
            self._add(self._stash.take(self._slab))
            self._slab = None

    def add(self, leaf: nn.Parameter, gradient: torch.Tensor) -> None:
        """A gradient that was put off, to where backward would have left it."""
        if self._averager is not None:
            self._averager.add(self._stash.position_of(leaf), gradient, last=self._last)
        else:
            leaf.grad = alone(gradient) if leaf.grad is None else leaf.grad.add_(gradient)

    def keep_apart(self, slab: int, places: set[int]) -> None:
        """Copy what stands in one of `places`, memory that is read or given back before the update."""
        if self._averager is None and places:
            self._stash.keep_apart(slab, places)

    def end(self, slab: int) -> None:
        """The gradients of the unit are whole."""
        if self._averager is not None:
            return
        if self._sum or self._last:
            self._add(self._stash.take(slab))
            self._slab = None
            return
        if self._slab is None:
            # Autograd gives weights that meet through views one gradient, and would add the next to it twice.
            self._stash.part(slab)
        self._slab = slab

    def total(self, count: int) -> Gradients:
        """The round's gradients, averaged over its `count` units; the same when asked for again before `close`."""
        if self._total is None:
            if self._averager is not None:
                self._total = self._averager.average(count)
            else:
                self._total = self._sum or [None] * len(self._stash.trained)
                for gradient in self._total:
                    if gradient is not None and count > 1:
                        gradient.div_(count)
            self._sum = []
        return self._total

    def close(self) -> None:
        """The round is over."""
        self._total = None

    def _ready(self, position: int, leaf: nn.Parameter, gradient: torch.Tensor) -> None:
        assert self._averager is not None
        if self._keeps is None or not self._keeps(leaf, gradient):
            self._averager.add(position, gradient, last=self._last)

    def _add(self, gradients: Gradients) -> None:
        if not self._sum:
            self._sum = gradients
            return
        for position, gradient in enumerate(gradients):
            total = self._sum[position]
            if total is None:
                self._sum[position] = gradient
            elif gradient is not None:
                total.add_(gradient)
