"""Worker: carries out the actions of one rank, one by one, each for the stage it names.

Most ranks hold one stage; with the interleaved schedule a rank holds several.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from pipedream_hpc.errors import PipedreamError
from pipedream_hpc.job import Loss
from pipedream_hpc.model.clock import Mark, clock_of
from pipedream_hpc.runtime.feed import Feed
from pipedream_hpc.runtime.reduction import Reduction
from pipedream_hpc.runtime.stage import Stage
from pipedream_hpc.runtime.view import CPU
from pipedream_hpc.schedule.actions import (
    Action,
    Agree,
    Backward,
    Forward,
    Receive,
    Reduce,
    Schedule,
    Send,
    Update,
    WeightGradient,
)
from pipedream_hpc.schedule.trace import KIND_OF, Kind, Span

#: What a stage does by itself; the rest is about several.
_STAGES_DO: dict[type, Callable[[Stage, Any], None]] = {
    Receive: Stage.receive,
    Send: Stage.send,
    Forward: Stage.forward,
    Backward: Stage.backward,
    WeightGradient: Stage.weight_gradient,
    Update: Stage.update,
}


class ActionError(RuntimeError):
    """An action failed: says on which rank, in which stage, at which action; the cause is chained."""


class Worker:
    """One rank.

    Args:
        rank: its number.
        stages: the stages it holds a replica of.
        agreement: over all ranks, of two numbers: the gradients' sum of squares, and how many ranks
            saw an overflow. None where nothing is agreed about.
        device: that it computes on.
    """

    def __init__(
        self,
        rank: int,
        stages: Sequence[Stage],
        agreement: Reduction | None = None,
        device: torch.device = CPU,
    ) -> None:
        self.rank, self.stages = rank, {stage.index: stage for stage in stages}
        self._agreement, self._handed_in = agreement, False
        self._schedule: Schedule | None = None
        self._device, self._clock = device, clock_of(CPU)
        self._spans: list[tuple[int, Kind, int, int, Mark, Mark]] | None = None

    def begin(
        self, schedule: Schedule, feed: Feed, unit_base: int, trained: int, *, score: Loss | None, trace: bool
    ) -> None:
        """Make ready for one schedule; see Stage.begin.

        Args:
            score: instead of each stage's loss.
            trace: whether to note down when each action ran.
        """
        self._schedule = schedule
        for stage in self.stages.values():
            stage.begin(schedule, feed, unit_base, trained, score or stage.loss)
        self._spans = [] if trace else None
        if trace:
            self._clock = clock_of(self._device)

    def end(self) -> None:
        """Wait for the last sends."""
        for stage in self.stages.values():
            stage.end()

    def ready(self, action: Action) -> bool:
        """Whether `action` would run without waiting for another rank; hands in what others wait for."""
        if isinstance(action, Receive | Send):
            return self.stages[action.stage].ready(action)
        if isinstance(action, Reduce):
            averager = self.stages[action.stage].averager
            assert averager is not None
            averager.start_rest()
            return averager.done()
        if isinstance(action, Agree):
            self._hand_in(action)
            assert self._agreement is not None
            return self._agreement.done(0)
        return True

    def run(self, action: Action) -> None:
        """Carry out one action.

        Raises:
            PipedreamError: bad input, with rank, stage and action before its sentence.
            ActionError: whatever else went wrong, likewise; the cause is chained.
        """
        began = self._clock.mark() if self._spans is not None else None
        try:
            does = _STAGES_DO.get(type(action))
            if does is not None:
                does(self.stages[action.stage], action)
            elif isinstance(action, Reduce):
                self._reduce(action)
            else:
                assert isinstance(action, Agree)
                self._agree(action)
        except PipedreamError as error:
            raise PipedreamError(f"rank {self.rank} (stage {action.stage}) at '{action}': {error}") from error
        except Exception as error:
            raise ActionError(
                f"rank {self.rank} (stage {action.stage}) failed at '{action}': {type(error).__name__}: {error}"
            ) from error
        if self._spans is not None:
            minibatch = getattr(action, "minibatch", -1)
            version = getattr(action, "version", -1)
            self._spans.append((action.stage, KIND_OF[type(action)], minibatch, version, began, self._clock.mark()))

    def spans(self, epoch_ns: int) -> list[Span]:
        """What ran since `begin`, with times in seconds since `epoch_ns` on this process's clock."""
        spans = self._spans or ()
        marks = [mark for *_, began, ended in spans for mark in (began, ended)]
        times = [at_s - epoch_ns * 1e-9 for at_s in self._clock.read(marks)]
        return [
            Span(self.rank, stage, kind, minibatch, version, times[2 * index], times[2 * index + 1])
            for index, (stage, kind, minibatch, version, *_) in enumerate(spans)
        ]

    def _reduce(self, action: Reduce) -> None:
        assert self._schedule is not None
        stage = self.stages[action.stage]
        stage.gradients(stage.step.count(self._schedule, action.stage, action.round))

    def _hand_in(self, action: Agree) -> None:
        """What this rank's stages measured, once a round; of the replicas of a stage the first counts."""
        if self._handed_in:
            return
        assert self._schedule is not None
        assert self._agreement is not None
        squares, overflows = 0.0, 0
        for stage in self.stages.values():
            gradients = stage.gradients(stage.step.count(self._schedule, stage.index, action.round))
            own, overflow = stage.step.measure(gradients)
            overflows += overflow
            squares += own if stage.replica == 0 and not overflow else 0.0
        bucket = self._agreement.bucket(0)
        bucket[0], bucket[1] = squares, overflows
        self._agreement.start(0)
        self._handed_in = True

    def _agree(self, action: Agree) -> None:
        self._hand_in(action)
        assert self._agreement is not None
        self._agreement.wait(0)
        self._handed_in = False
        squares, overflows = self._agreement.bucket(0).tolist()
        for stage in self.stages.values():
            stage.step.agreed(squares, overflows > 0)
