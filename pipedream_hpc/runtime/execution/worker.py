"""Worker: carries out the actions of one rank, one by one, each for the stage that it names.

Most ranks hold one stage; with the interleaved schedule a rank holds several.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from pipedream_hpc.errors import PipedreamError
from pipedream_hpc.model.clock import Mark, clock_of
from pipedream_hpc.runtime.comm.allreduce import AllReduce
from pipedream_hpc.runtime.comm.tensor_view import CPU
from pipedream_hpc.runtime.execution.data import MicrobatchLoader
from pipedream_hpc.runtime.execution.position import PassPosition
from pipedream_hpc.runtime.execution.score import ScoreFn
from pipedream_hpc.runtime.execution.stage import Stage
from pipedream_hpc.schedule.actions import (
    Action,
    AllReduceGradNorm,
    Backward,
    BackwardInput,
    BackwardWeight,
    Forward,
    OptimizerStep,
    Recv,
    ReduceGradients,
    Send,
)
from pipedream_hpc.schedule.text import format_action
from pipedream_hpc.schedule.trace import KIND_OF, Kind, Span

#: Actions that concern one stage; the others are collective.
_STAGE_ACTIONS: dict[type, Callable[[Stage, Any], None]] = {
    Recv: Stage.recv,
    Send: Stage.send,
    Forward: Stage.forward,
    Backward: Stage.backward,
    BackwardInput: Stage.backward_input,
    BackwardWeight: Stage.backward_weight,
    OptimizerStep: Stage.optimizer_step,
}


class ActionError(RuntimeError):
    """An action failed: names rank, stage, position and action; the cause is chained."""


class Worker:
    """One rank.

    Args:
        rank: its number.
        stages: the stages it holds a replica of.
        grad_norm: all-reduce over all ranks of two numbers: the gradients' sum of squares, and how many ranks
            found an overflow. None where stages exchange nothing about their gradients.
        device: what it computes on.
    """

    def __init__(
        self,
        rank: int,
        stages: Sequence[Stage],
        grad_norm: AllReduce | None = None,
        device: torch.device = CPU,
    ) -> None:
        self.rank, self.stages = rank, {stage.index: stage for stage in stages}
        self._grad_norm, self._grad_norm_started = grad_norm, False
        self._position = PassPosition()
        self.device, self._clock = device, clock_of(CPU)
        self._spans: list[tuple[int, Kind, int, int, Mark, Mark]] | None = None

    def begin(
        self,
        data: MicrobatchLoader,
        position: PassPosition,
        *,
        training: bool,
        first_microbatch: int,
        first_trained: int,
        score_fn: ScoreFn | None,
        trace: bool,
        publish: bool = False,
    ) -> None:
        """Prepare for one pass; see Stage.begin.

        Args:
            position: names the microbatches in messages.
            score_fn: computed instead of the loss.
            trace: record when each action ran.
            publish: publish every loss.
        """
        self._position = position
        for stage in self.stages.values():
            stage.begin(
                data,
                training=training,
                first_microbatch=first_microbatch,
                first_trained=first_trained,
                score_fn=score_fn,
                publish=publish,
            )
        self._spans = [] if trace else None
        if trace:
            self._clock = clock_of(self.device)

    def end(self) -> None:
        """Wait for the last sends."""
        for stage in self.stages.values():
            stage.end()

    def ready(self, action: Action) -> bool:
        """Return whether `action` would run without waiting for another rank; start what other ranks wait for."""
        if isinstance(action, Recv | Send):
            return self.stages[action.stage].ready(action)
        if isinstance(action, ReduceGradients):
            grad_allreduce = self.stages[action.stage].grad_allreduce
            assert grad_allreduce is not None
            grad_allreduce.start_rest()
            return grad_allreduce.done()
        if isinstance(action, AllReduceGradNorm):
            self._start_grad_norm(action)
            assert self._grad_norm is not None
            return self._grad_norm.done(0)
        return True

    def run(self, action: Action) -> None:
        """Carry out one action.

        Raises:
            PipedreamError: bad input; rank, stage, position and action stand before its sentence.
            ActionError: anything else, in the same form; the cause is chained.
        """
        began = self._clock.mark() if self._spans is not None else None
        try:
            on_stage = _STAGE_ACTIONS.get(type(action))
            if on_stage is not None:
                on_stage(self.stages[action.stage], action)
            elif isinstance(action, ReduceGradients):
                self.stages[action.stage].round_gradients(action.n_microbatches)
            else:
                assert isinstance(action, AllReduceGradNorm)
                self._all_reduce_grad_norm(action)
        except PipedreamError as error:
            raise PipedreamError(f"{self._describe(action)}: {error}") from error
        except Exception as error:
            raise ActionError(f"{self._describe(action)} failed: {type(error).__name__}: {error}") from error
        if self._spans is not None:
            microbatch = getattr(action, "microbatch", -1)
            version = getattr(action, "version", -1)
            self._spans.append((action.stage, KIND_OF[type(action)], microbatch, version, began, self._clock.mark()))

    def spans(self, epoch_ns: int) -> list[Span]:
        """Return what ran since `begin`, with times in seconds since `epoch_ns` on this process's clock."""
        spans = self._spans or ()
        marks = [mark for *_, began, ended in spans for mark in (began, ended)]
        times = [at_s - epoch_ns * 1e-9 for at_s in self._clock.read(marks)]
        return [
            Span(self.rank, stage, kind, microbatch, version, times[2 * index], times[2 * index + 1])
            for index, (stage, kind, microbatch, version, *_) in enumerate(spans)
        ]

    def _describe(self, action: Action) -> str:
        """Return such as `rank 1 (stage 1) at epoch 0, minibatch 3, forward (1F3v0)`."""
        kind = KIND_OF[type(action)].replace("-", " ")
        return (
            f"rank {self.rank} (stage {action.stage}) at {self._position.of(action)}, {kind} ({format_action(action)})"
        )

    def _start_grad_norm(self, action: AllReduceGradNorm) -> None:
        """Start the all-reduce of this rank's share, once a round; the first replica of each stage counts."""
        if self._grad_norm_started:
            return
        assert self._grad_norm is not None
        squares, overflows = 0.0, 0
        for stage in self.stages.values():
            own, overflow = stage.optimizer.squared_norm(stage.round_gradients(action.n_microbatches))
            overflows += overflow
            squares += own if stage.replica == 0 and not overflow else 0.0
        bucket = self._grad_norm.bucket(0)
        bucket[0], bucket[1] = squares, overflows
        self._grad_norm.start(0)
        self._grad_norm_started = True

    def _all_reduce_grad_norm(self, action: AllReduceGradNorm) -> None:
        self._start_grad_norm(action)
        assert self._grad_norm is not None
        self._grad_norm.wait(0)
        self._grad_norm_started = False
        squares, overflows = self._grad_norm.bucket(0).tolist()
        for stage in self.stages.values():
            stage.optimizer.set_model_norm(squares, overflow=overflows > 0)
