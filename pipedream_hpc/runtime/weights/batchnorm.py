"""Running statistics of normalization layers: one set of means and variances for all replicas of a stage.

In training a BatchNorm layer normalizes by the minibatch that it sees, so replicas do not depend on each other; but
each collects running statistics of its own minibatches only. At the end of an epoch every replica takes the mean over
all replicas, so that evaluations and saved weights are the same on each of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn

from pipedream_hpc.runtime.comm.allreduce import AllReduce, Buckets


class RunningStats:
    """The running statistics of one replica of a stage.

    Args:
        buffers: the replica's own buffers of layers that track running statistics.
    """

    def __init__(self, buffers: Sequence[torch.Tensor]) -> None:
        self._means = [buffer for buffer in buffers if buffer.is_floating_point()]
        self._counters = [buffer for buffer in buffers if not buffer.is_floating_point()]
        self._baseline = [buffer.clone() for buffer in self._counters]
        self._all_reduce: AllReduce | None = None
        self._replicas = 1

    @property
    def buckets(self) -> Buckets:
        """Buckets for the all-reduce over replicas; none if the module has no running statistics."""
        count = sum(buffer.numel() for buffer in (*self._means, *self._counters))
        return [(count, torch.float64)] if count else []

    def share(self, all_reduce: AllReduce, replicas: int) -> None:
        """Average with the other replicas from now on."""
        self._all_reduce, self._replicas = all_reduce, replicas

    def set_baseline(self) -> None:
        """Take the counters as the new baseline, after they were restored from a checkpoint."""
        for counter, baseline in zip(self._counters, self._baseline, strict=True):
            baseline.copy_(counter)

    def start_average(self) -> None:
        """Send this replica's statistics to the others."""
        if self._all_reduce is None:
            return
        increments = [counter - baseline for counter, baseline in zip(self._counters, self._baseline, strict=True)]
        flat = torch.cat([buffer.flatten().double() for buffer in (*self._means, *increments)])
        self._all_reduce.bucket(0).copy_(flat)
        self._all_reduce.start(0)

    def finish_average(self) -> None:
        """Take the mean of all replicas' statistics; counters of minibatches are added up."""
        if self._all_reduce is None:
            return
        self._all_reduce.wait(0)
        device = next(buffer.device for buffer in (*self._means, *self._counters))
        flat, offset = self._all_reduce.bucket(0).to(device), 0
        for buffer in self._means:
            buffer.copy_((flat[offset : offset + buffer.numel()] / self._replicas).view(buffer.shape))
            offset += buffer.numel()
        for counter, baseline in zip(self._counters, self._baseline, strict=True):
            increment = flat[offset : offset + counter.numel()].to(baseline.dtype).view(baseline.shape)
            counter.copy_(baseline + increment)
            baseline.copy_(counter)
            offset += counter.numel()


@contextmanager
def keep_running_stats(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Run a forward again without changing running statistics: they include this microbatch already.

    The layers have copies of their buffers meanwhile. Restoring the values afterwards instead would change tensors
    that autograd has saved.
    """
    layers = [each for each in modules if getattr(each, "track_running_stats", False)]
    originals = [dict(layer._buffers) for layer in layers]
    for layer, buffers in zip(layers, originals, strict=True):
        layer._buffers.update({name: None if each is None else each.clone() for name, each in buffers.items()})
    try:
        yield
    finally:
        for layer, buffers in zip(layers, originals, strict=True):
            layer._buffers.update(buffers)
