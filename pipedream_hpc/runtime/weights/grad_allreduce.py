"""Gradient all-reduce: average the gradients of one round over the replicas of a stage, while backward goes on.

Gradients are packed into buckets in the order in which backward computes them, from the last parameter to the first;
the all-reduce of a bucket starts as soon as its last gradient is complete (wait-free back-propagation)::

    backward   │ fc2 │ fc1 │ conv2 │ conv1 │
    bucket 0       fc2 fc1 ├── all-reduce ──┤
    bucket 1                  conv2 conv1 ├── all-reduce ──┤
    present                                              ├─┤     which parameters have a gradient at all

A parameter without a gradient on any replica is left unchanged, as torch's optimizers do.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from pipedream_hpc.runtime.comm.allreduce import AllReduce, Buckets

#: Large enough for full bandwidth, small enough that little of the last bucket is left to hide behind backward.
BUCKET_BYTES = 4 << 20


class BucketLayout:
    """The place of every parameter's gradient in the buckets.

    Args:
        parameters: the trained parameters.
        bucket_bytes: largest size of a bucket with more than one parameter.

    Attributes:
        places: position of a parameter -> (bucket, offset in elements, shape).
        positions: positions of the parameters in each bucket.
        buckets: element count and dtype of each bucket; the last one tells which parameters have a gradient.
    """

    def __init__(self, parameters: Sequence[torch.Tensor], bucket_bytes: int = BUCKET_BYTES) -> None:
        self.places: dict[int, tuple[int, int, torch.Size]] = {}
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


class GradAllReduce:
    """Averages gradients over the replicas of a stage, as one replica sees it.

    Args:
        layout: of the stage's trained parameters.
        all_reduce: over the replicas, with the layout's buckets.
    """

    def __init__(self, layout: BucketLayout, all_reduce: AllReduce) -> None:
        self._layout, self._all_reduce = layout, all_reduce
        self._views = {
            position: all_reduce.bucket(bucket)[offset : offset + shape.numel()].view(shape)
            for position, (bucket, offset, shape) in layout.places.items()
        }
        self._present = all_reduce.bucket(len(layout.buckets) - 1)  # 1 for every parameter that has a gradient
        self._present.zero_()
        self._n_complete = [0] * len(layout.positions)  # parameters of each bucket whose gradient is complete
        self._next, self._all_started = 0, False

    def add(self, position: int, gradient: torch.Tensor, *, last: bool) -> None:
        """Add the gradient of one microbatch to a bucket; called in backward as soon as it is complete.

        Args:
            position: position of the parameter.
            gradient: its gradient.
            last: whether the microbatch is the last of the round on this rank: then the bucket may start.
        """
        view = self._views[position]
        if self._present[position]:
            view.add_(gradient)
        else:
            view.copy_(gradient)
            self._present[position] = 1
        if last:
            self._n_complete[self._layout.places[position][0]] += 1
            self._start_complete()

    def start_rest(self) -> None:
        """Start the buckets that have not started: no more gradients come in this round."""
        if self._all_started:
            return
        self._all_started = True
        while self._next < len(self._layout.buckets):
            self._start(self._next)

    def done(self) -> bool:
        """Return whether `average` would return without waiting for another replica."""
        # Ask about every bucket: a staged one starts when it is asked about, and others wait for it.
        done = [self._all_reduce.done(index) for index in range(len(self._layout.buckets))]
        return self._all_started and all(done)

    def average(self, divisor: Callable[[], float]) -> list[torch.Tensor | None]:
        """Return the sum over all replicas divided by `divisor()`; None for parameters without a gradient.

        The divisor is asked for once the sum is there. The tensors are views of the buckets, valid until the next
        round's first `add`.
        """
        self.start_rest()
        for index in range(len(self._layout.buckets)):
            self._all_reduce.wait(index)
        present, number = self._present.tolist(), divisor()
        gradients = [
            self._views[position].div_(number) if present[position] else None for position in range(len(self._views))
        ]
        self._reset()
        return gradients

    def _reset(self) -> None:
        self._present.zero_()
        self._n_complete = [0] * len(self._layout.positions)
        self._next, self._all_started = 0, False

    def _start_complete(self) -> None:
        """Start complete buckets in their order, which is the same on all replicas."""
        positions = self._layout.positions
        while self._next < len(positions) and self._n_complete[self._next] == len(positions[self._next]):
            self._start(self._next)

    def _start(self, index: int) -> None:
        if index < len(self._layout.positions):
            for position in self._layout.positions[index]:
                if not self._present[position]:
                    self._views[position].zero_()
        self._all_reduce.start(index)
        self._next += 1
