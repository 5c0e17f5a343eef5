"""Passes: one pass over the data through the pipeline, for training or for evaluation.

::

    check data ──► actions of the schedule, one by one ──► average running statistics ──► compare replicas, mean scores
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from typing import Any

from pipedream_hpc.cluster.world import World
from pipedream_hpc.errors import PipedreamError
from pipedream_hpc.model.checksum import checksum
from pipedream_hpc.runtime.comm.handshake import exchange, require_equal
from pipedream_hpc.runtime.comm.stall import is_stall, report
from pipedream_hpc.runtime.execution.data import MicrobatchLoader
from pipedream_hpc.runtime.execution.emulator import carry_out, emulate
from pipedream_hpc.runtime.execution.garbage import deferred_collection
from pipedream_hpc.runtime.execution.loss_means import Divisors, compare_divisors
from pipedream_hpc.runtime.execution.position import PassPosition
from pipedream_hpc.runtime.execution.run_losses import RunLosses
from pipedream_hpc.runtime.execution.score import ScoreFn
from pipedream_hpc.runtime.execution.worker import Worker
from pipedream_hpc.runtime.weights.batchnorm import RunningStats
from pipedream_hpc.schedule.actions import Action, OptimizerStep, Schedule

#: A worker and the optimizer step that it has just taken.
Stepped = tuple[Worker, OptimizerStep]


class PassRunner:
    """Runs passes on the workers of this process, and counts what they ran.

    Args:
        world: all ranks.
        workers: of this process.
        running_stats: what replicas average after a training pass.
        losses: of the run, published for other ranks.
        fit_channels: called with the microbatches of an evaluation, which may be larger than the example. Collective.
        stall_limit_s: seconds that a rank waits for another.
        common_epoch_ns: returns a moment that is the same on all ranks, on this process's clock. Collective.
        set_position: tells the core how messages count microbatches.

    Attributes:
        microbatches_run: of all passes.
        microbatches_trained: of the training passes.
        began_ns: when the last pass began, on this process's clock.
    """

    def __init__(
        self,
        world: World,
        workers: Sequence[Worker],
        running_stats: Sequence[RunningStats],
        losses: RunLosses,
        fit_channels: Callable[[MicrobatchLoader], None],
        stall_limit_s: float,
        common_epoch_ns: Callable[[], int],
        set_position: Callable[[str, int, int], None],
    ) -> None:
        self._world, self._workers, self._running_stats = world, workers, running_stats
        self._losses, self._fit_channels, self._stall_limit_s = losses, fit_channels, stall_limit_s
        self._common_epoch_ns, self._set_position = common_epoch_ns, set_position
        self.microbatches_run = self.microbatches_trained = self.began_ns = 0

    def run(
        self,
        schedule: Schedule,
        data: Callable[[], MicrobatchLoader],
        position: PassPosition,
        *,
        minibatches: int,
        score_fn: ScoreFn | None = None,
        trace: bool = False,
        publish: bool = False,
    ) -> Generator[Stepped, None, list[float]]:
        """Run one pass; yield every optimizer step of this process after it ran, and return the mean scores.

        Args:
            schedule: of the pass.
            data: creates the microbatches of the pass.
            position: names microbatches in messages.
            minibatches: of the pass.
            score_fn: computed by the output stage instead of the loss.
            trace: record when each action ran.
            publish: publish every loss.

        Raises:
            PipedreamError: ranks read different data, a rank stalls, or replicas have drifted apart.
        """
        try:
            loader = data()
            check_data(self._world, minibatches, loader, limit_s=self._stall_limit_s)
            if not schedule.training:
                self._fit_channels(loader)
            self._set_position(position.where, self.microbatches_run, position.n_microbatches)
            for worker in self._workers:
                worker.begin(
                    loader,
                    position,
                    training=schedule.training,
                    first_microbatch=self.microbatches_run,
                    first_trained=self.microbatches_trained,
                    score_fn=score_fn,
                    trace=trace,
                    publish=publish,
                )
            self.began_ns = self._common_epoch_ns()
            with deferred_collection() as collector:
                for worker, action in self._actions(schedule):
                    if isinstance(action, OptimizerStep):
                        yield worker, action
                        collector.collect_if_due()
            self._losses.flush()
            for worker in self._workers:
                worker.end()
            if schedule.training:
                self._average_running_stats()
            means = finish_pass(
                self._world,
                self._workers,
                loader.checksums,
                training=schedule.training,
                limit_s=self._stall_limit_s,
            )
        except Exception as error:
            if is_stall(error):
                raise report(self._world, str(error.__cause__ or error)) from None
            raise
        self.microbatches_run += schedule.total_microbatches
        if schedule.training:
            self.microbatches_trained += schedule.total_microbatches
        return means

    def _actions(self, schedule: Schedule) -> Iterator[tuple[Worker, Action]]:
        if self._world.size > 1:
            worker = self._workers[0]
            on_gpu = worker.device.type == "cuda" and any(stage.is_last for stage in worker.stages.values())
            return carry_out(worker, schedule, before_waiting=self._losses.flush if on_gpu else None)
        return emulate(self._workers, schedule)

    def _average_running_stats(self) -> None:
        for stats in self._running_stats:
            stats.start_average()
        for stats in self._running_stats:
            stats.finish_average()


def check_data(world: World, minibatches: int, data: MicrobatchLoader, *, limit_s: float) -> None:
    """Check that all ranks are about to read the same minibatches.

    Raises:
        PipedreamError: names two ranks that would read different ones.
    """
    answers = exchange(world, {"minibatches": minibatches, "data": data.fingerprint()}, limit_s=limit_s)
    require_equal(answers, {"minibatches": "give every rank the same loader"})
    seen = [(rank, answer["data"]) for rank, answer in enumerate(answers) if answer["data"] is not None]
    for rank, fingerprint in seen:
        if fingerprint != seen[0][1]:
            raise PipedreamError(
                f"ranks {seen[0][0]} and {rank} read different first minibatches: the order of the data must "
                "depend on torch's random numbers alone (DataLoader(shuffle=True) does), not on the rank"
            )


def finish_pass(
    world: World, workers: Sequence[Worker], checksums: Mapping[int, int], *, training: bool, limit_s: float
) -> list[float]:
    """Compare what ranks have read, and replicas after training; return the mean scores, the same on every rank.

    Args:
        world: all ranks.
        workers: of this process.
        checksums: of the minibatches that were read here, by number.
        training: whether the pass has trained.
        limit_s: how long to wait for a rank.

    Raises:
        PipedreamError: ranks have read different data, or replicas of a stage have drifted apart: it names two ranks;
            or the means of a loss in replicas are over different numbers of targets.
    """
    placed = [(worker.rank, stage) for worker in workers for stage in worker.stages.values()]
    facts: dict[str, Any] = {
        "data": checksums,
        "scores": [score for _, stage in placed if stage.is_last for score in stage.loss.meter.read()],
        "weights": [
            (stage.index, rank, checksum((*stage.stash.trained, *stage.module.buffers())))
            for rank, stage in placed
            if training and stage.grad_allreduce is not None
        ],
        "divisors": [
            stage.loss.means.first
            for _, stage in placed
            if training and stage.grad_allreduce is not None and stage.loss.means is not None
        ],
    }
    answers = exchange(world, facts, limit_s=limit_s)
    _compare_data([answer["data"] for answer in answers])
    _compare_divisors([each for answer in answers for each in answer["divisors"]])
    first: dict[int, tuple[int, int]] = {}
    for index, rank, weights in sorted(each for answer in answers for each in answer["weights"]):
        other, expected = first.setdefault(index, (rank, weights))
        if weights != expected:
            raise PipedreamError(
                f"replicas of stage {index} have drifted apart: after this epoch the weights of ranks {other} and "
                f"{rank} differ: random numbers or data of the model must not depend on the rank"
            )
    # In the order of the microbatches, so that every plan sums in the same order.
    scores = sorted(score for answer in answers for score in answer["scores"])
    width = len(scores[0][1]) if scores else 1
    return [_weighted_mean([(means[index], weights[index]) for _, means, weights in scores]) for index in range(width)]


def _compare_data(by_rank: Sequence[Mapping[int, int]]) -> None:
    """Compare the minibatches that several ranks have read."""
    first: dict[int, tuple[int, int]] = {}
    for rank, checksums in enumerate(by_rank):
        for minibatch, own in checksums.items():
            other, expected = first.setdefault(minibatch, (rank, own))
            if own != expected:
                raise PipedreamError(
                    f"ranks {other} and {rank} have read different numbers in minibatch {minibatch}: an item of a data "
                    "set may depend on its index and on torch's, NumPy's and Python's own random numbers, which are "
                    "the same on all ranks, but not on which items were read before it"
                )


def _compare_divisors(of_replicas: Sequence[Mapping[int, Divisors]]) -> None:
    """Compare what the losses divide by in the replicas of the output stage, minibatch by minibatch."""
    first: dict[int, Divisors] = {}
    for of_replica in of_replicas:
        for minibatch, divisors in of_replica.items():
            compare_divisors(first.setdefault(minibatch, divisors), divisors)


def _weighted_mean(scores: Sequence[tuple[float, float]]) -> float:
    weight = sum(weight for _, weight in scores)
    return sum(mean * weight for mean, weight in scores) / weight if weight else float("nan")
