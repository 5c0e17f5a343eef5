"""Averaging: the gradients of one round over the replicas of a stage, while backward goes on.

Gradients are packed into buckets in the order in which backward makes them, from the last parameter
to the first; a bucket is on its way as soon as its last gradient is whole (wait-free back-propagation)::

    backward   │ fc2 │ fc1 │ conv2 │ conv1 │
    bucket 0       fc2 fc1 ├─── on its way ───┤
    bucket 1                  conv2 conv1 ├─── on its way ───┤
    used                                                   ├─┤     which parameters had a gradient at all

A parameter that got no gradient on any replica is left alone, as torch's optimizers do.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from pipedream_hpc.runtime.reduction import Buckets, Reduction

#: Large enough for full bandwidth, small enough that the last bucket has little left to hide behind.
BUCKET_BYTES = 4 << 20


class Packing:
    """Which parameter stands where in which bucket.

    Attributes:
        buckets: count and dtype of each; the last one says which parameters had a gradient.
    """

    def __init__(self, parameters: Sequence[torch.Tensor], bucket_bytes: int = BUCKET_BYTES) -> None:
        self.places: dict[int, tuple[int, int, torch.Size]] = {}  # position -> bucket, offset, shape
        self.positions: list[list[int]] = []
        buckets: list[tuple[int, torch.dtype]] = []
        for position in reversed(range(len(parameters))):
            parameter = parameters[position]
            count, dtype = buckets[-1] if buckets else (0, None)
            if dtype != parameter.dtype or (count + parameter.numel()) * parameter.dtype.itemsize > bucket_bytes:
                buckets.append((0, parameter.dtype))
                self.positions.append([])
                count = 0
            self.places[position] = (len(buckets) - 1, count, parameter.shape)
            self.positions[-1].append(position)
            buckets[-1] = (count + parameter.numel(), parameter.dtype)
        # MPI sums no empty bucket: give it room for one number.
        self.buckets: Buckets = [
            *((max(count, 1), dtype) for count, dtype in buckets),
            (max(len(parameters), 1), torch.float32),
        ]


class Averager:
    """One replica's part in averaging.

    Args:
        packing: of the stage's trained parameters.
        reduction: over the replicas, with the packing's buckets.
    """

    def __init__(self, packing: Packing, reduction: Reduction) -> None:
        self._packing, self._reduction = packing, reduction
        self._views = {
            position: reduction.bucket(bucket)[offset : offset + shape.numel()].view(shape)
            for position, (bucket, offset, shape) in packing.places.items()
        }
        self._used = reduction.bucket(len(packing.buckets) - 1)
        self._used.zero_()
        self._ready = [0] * len(packing.positions)  # parameters of each bucket whose gradient is whole
        self._next, self._finishing = 0, False

    def add(self, position: int, gradient: torch.Tensor, *, last: bool) -> None:
        """Add the gradient of a unit; called in backward as soon as it is whole.

        Args:
            position: of the parameter.
            gradient: its.
            last: whether the unit is the round's last here: then the gradient may go.
        """
        view = self._views[position]
        if self._used[position]:
            view.add_(gradient)
        else:
            view.copy_(gradient)
            self._used[position] = 1
        if last:
            self._ready[self._packing.places[position][0]] += 1
            self._start_full()

    def start_rest(self) -> None:
        """No gradient is to come any more in this round: whatever has not gone goes."""
        if self._finishing:
            return
        self._finishing = True
        while self._next < len(self._packing.buckets):
            self._start(self._next)

    def done(self) -> bool:
        """Whether `average` would wait for no other replica."""
        # Every bucket is asked about: a staged one starts when it is, and others wait for it.
        here = [self._reduction.done(index) for index in range(len(self._packing.buckets))]
        return self._finishing and all(here)

    def average(self, count: int) -> list[torch.Tensor | None]:
        """The sum over all replicas divided by `count`; None where no replica had a gradient.

        The tensors are views of the buckets, good until the next round's first `add`.
        """
        self.start_rest()
        for index in range(len(self._packing.buckets)):
            self._reduction.wait(index)
        used = self._used.tolist()
        gradients = [
            self._views[position].div_(count) if used[position] else None for position in range(len(self._views))
        ]
        self._clear()
        return gradients

    def _clear(self) -> None:
        self._used.zero_()
        self._ready = [0] * len(self._packing.positions)
        self._next, self._finishing = 0, False

    def _start_full(self) -> None:
        """Start whole buckets, in order: all replicas start them in the same one."""
        while self._next < len(self._ready) and self._ready[self._next] == len(self._packing.positions[self._next]):
            self._start(self._next)

    def _start(self, index: int) -> None:
        if index < len(self._packing.positions):
            for position in self._packing.positions[index]:
                if not self._used[position]:
                    self._views[position].zero_()
        self._reduction.start(index)
        self._next += 1
