"""Statistics: running means and variances of normalisation layers, one set for all replicas of a stage.

In training a BatchNorm layer normalises by the minibatch it sees, so replicas need nothing of each
other; but each gathers running statistics of its own minibatches only. At the end of an epoch every
replica takes the mean of all, and what is evaluated or saved is the same on each of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from pipedream_hpc.runtime.reduction import Buckets, Reduction


class Statistics:
    """Running statistics of one replica's stage module.

    Args:
        module: the stage.
    """

    def __init__(self, module: nn.Module) -> None:
        layers = [each for each in module.modules() if getattr(each, "track_running_stats", False)]
        buffers = [buffer for layer in layers for buffer in layer.buffers(recurse=False)]
        self._means = [buffer for buffer in buffers if buffer.is_floating_point()]
        self._counts = [buffer for buffer in buffers if not buffer.is_floating_point()]
        self._before = [buffer.clone() for buffer in self._counts]
        self._reduction: Reduction | None = None
        self._replicas = 1

    @property
    def buckets(self) -> Buckets:
        """What is summed over replicas; none if there is nothing."""
        count = sum(buffer.numel() for buffer in (*self._means, *self._counts))
        return [(count, torch.float64)] if count else []

    def share(self, reduction: Reduction, replicas: int) -> None:
        """From now on there are other replicas."""
        self._reduction, self._replicas = reduction, replicas

    def begin_anew(self) -> None:
        """The statistics were put back to what all replicas had at an epoch's end."""
        for count, before in zip(self._counts, self._before, strict=True):
            before.copy_(count)

    def hand_in(self) -> None:
        """Give the own statistics to the others."""
        if self._reduction is None:
            return
        more = [count - before for count, before in zip(self._counts, self._before, strict=True)]
        flat = torch.cat([buffer.flatten().double() for buffer in (*self._means, *more)])
        self._reduction.bucket(0).copy_(flat)
        self._reduction.start(0)

    def take(self) -> None:
        """Take the mean of all replicas' statistics, and the sum of how many minibatches they saw."""
        if self._reduction is None:
            return
        self._reduction.wait(0)
        place = next(buffer.device for buffer in (*self._means, *self._counts))
        flat, offset = self._reduction.bucket(0).to(place), 0
        for buffer in self._means:
            buffer.copy_((flat[offset : offset + buffer.numel()] / self._replicas).view(buffer.shape))
            offset += buffer.numel()
        for buffer, before in zip(self._counts, self._before, strict=True):
            buffer.copy_(before + flat[offset : offset + buffer.numel()].to(before.dtype).view(before.shape))
            before.copy_(buffer)
            offset += buffer.numel()


@contextmanager
def statistics_kept(module: nn.Module) -> Iterator[None]:
    """Leave the running statistics of normalisation layers as they are: they have seen this unit.

    The layers get copies meanwhile. To put values back instead would spoil what autograd has stashed.
    """
    layers = [each for each in module.modules() if getattr(each, "track_running_stats", False)]
    held = [dict(layer._buffers) for layer in layers]
    for layer, buffers in zip(layers, held, strict=True):
        layer._buffers.update({name: None if each is None else each.clone() for name, each in buffers.items()})
    try:
        yield
    finally:
        for layer, buffers in zip(layers, held, strict=True):
            layer._buffers.update(buffers)
