"""Run losses: the output stage publishes the losses of microbatches, and any rank reads them.

They are read for two reasons: a user reads step.loss; and where a loss is a pair (sum, count), all stages divide the
gradients of a round by the counts of its microbatches.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from pipedream_hpc.runtime.comm.loss_board import Loss, LossBoard
from pipedream_hpc.runtime.execution.score import Score


class RunLosses:
    """Publishes losses as soon as they are known to the host, and reads those of other ranks.

    On a GPU a loss is published when its copy to pinned memory has arrived; nobody waits for it, unless the rank is
    about to wait for another rank anyway.

    Args:
        board: where they are published.
        owners: the ranks of the output stage, by replica.
    """

    def __init__(self, board: LossBoard, owners: Sequence[int]) -> None:
        self._board, self._owners = board, owners
        self._on_their_way: list[tuple[int, torch.Tensor, bool, Any]] = []

    def publish(self, microbatch: int, score: Score, samples: int) -> None:
        """Publish the loss of a microbatch.

        Args:
            microbatch: its number within the run.
            score: the loss.
            samples: what it weighs, if it was not counted.
        """
        counted = score.count is not None
        weight = samples if score.count is None else score.count
        mean = score.mean.detach()
        if mean.device.type == "cpu":
            self._board.publish(microbatch, Loss(float(mean), float(weight), counted))
            return
        pinned = torch.empty(2, dtype=torch.float64, pin_memory=True)
        for place, value in zip(pinned, (mean, weight), strict=True):
            place.copy_(torch.as_tensor(value), non_blocking=True)
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record()
        self._on_their_way.append((microbatch, pinned, counted, event))
        while self._on_their_way and self._on_their_way[0][3].query():
            self._publish_first()

    def flush(self) -> None:
        """Publish what is on its way; wait for the device."""
        while self._on_their_way:
            self._on_their_way[0][3].synchronize()
            self._publish_first()

    def ask(self, first: int, microbatch: int) -> Loss:
        """Return a loss; wait until it is published.

        Args:
            first: number within the run of the pass's first microbatch.
            microbatch: number within the pass.

        Raises:
            PipedreamError: its owner has overwritten it with later losses.
        """
        self.flush()  # nobody else would publish what this process asks itself for
        return self._board.ask(self._owners[microbatch % len(self._owners)], first + microbatch)

    def _publish_first(self) -> None:
        microbatch, pinned, counted, _ = self._on_their_way.pop(0)
        mean, weight = pinned.tolist()
        self._board.publish(microbatch, Loss(mean, weight, counted))
