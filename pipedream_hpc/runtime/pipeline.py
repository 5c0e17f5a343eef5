"""Pipeline: what a user's program holds in its hand.

plan ──► stage modules ──► workers ──► fit, evaluate
                              ▲
          all of them in one process, or this rank's own under mpirun / srun
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pipedream_hpc.cluster.cores import Cores
from pipedream_hpc.cluster.device import choose
from pipedream_hpc.cluster.heap import keep_freed_memory
from pipedream_hpc.cluster.threads import take_cores
from pipedream_hpc.cluster.world import World, join
from pipedream_hpc.errors import PipedreamError
from pipedream_hpc.job import Job, Loss, OptimizerFactory, accuracy
from pipedream_hpc.model.capture import capture
from pipedream_hpc.model.materialize import Factory
from pipedream_hpc.model.precision import Precision
from pipedream_hpc.model.randomness import generators_kept
from pipedream_hpc.planning.plan import Plan
from pipedream_hpc.runtime.agreement import (
    agree_on_checkpoints,
    agree_on_data,
    agree_on_devices,
    agree_on_end,
    agree_on_start,
)
from pipedream_hpc.runtime.assembly import Wishes, assemble, feed_of, shared_statistics
from pipedream_hpc.runtime.checkpoint import Checkpoints, Position
from pipedream_hpc.runtime.deployment import deploy
from pipedream_hpc.runtime.emulator import carry_out, emulate
from pipedream_hpc.runtime.feed import Feed, cut
from pipedream_hpc.runtime.footprint import Footprint, Peak, core_bytes, footprint
from pipedream_hpc.runtime.garbage import no_stalls
from pipedream_hpc.runtime.gathering import whole_state
from pipedream_hpc.runtime.handshake import agree
from pipedream_hpc.runtime.manner import Manner, given, resolve
from pipedream_hpc.runtime.reading import start_workers_apart
from pipedream_hpc.runtime.route import choose_route
from pipedream_hpc.runtime.stage import Stage
from pipedream_hpc.runtime.stall import is_stall, report
from pipedream_hpc.runtime.step import Clip, SchedulerFactory
from pipedream_hpc.runtime.wiring import Wiring, local_wiring, mpi_wiring
from pipedream_hpc.runtime.worker import Worker
from pipedream_hpc.schedule.actions import Action, Backward, Schedule, Update
from pipedream_hpc.schedule.kinds import AnySchedule
from pipedream_hpc.schedule.trace import Span, Trace
from pipedream_hpc.schedule.verifier import verify_around


class Pipeline:
    """Train a model with pipeline parallelism: 1F1B with weight stashing, or any other schedule.

    Started by itself, a program runs all ranks of the plan in its one process; started by mpirun
    or srun on as many ranks as the plan has, each runs its own. The numbers are the same.

    Args:
        model: any module that torch.fx can trace, built with the same seed on every rank; or a function
            without arguments that builds it: then each rank keeps the weights of its own stages only. It
            is called twice and has to build the same.
        loss: mean loss of a minibatch from (output, target).
        optimizer: called once per stage with the stage's parameters, such as
            `functools.partial(torch.optim.SGD, lr=0.1)`.
        example: one minibatch of inputs, as large as they will get: a tensor, a tuple of the model's
            arguments, or a mapping from their names; only shapes and dtypes are used.
        plan: a Plan, the file of one, a number of stages to cut the model into evenly (by counted
            floating-point operations: the same cut on every machine), or the replicas of such
            stages, as in "2-1-1".
        schedule: one of schedule.kinds.NAMES, instead of the plan's.
        microbatches: to a minibatch, for schedules that cut minibatches, instead of the plan's.
        chunks: stages per rank, for the interleaved schedule.
        accumulate: minibatches per replica that one update learns from.
        split_backward: send the gradient of a stage's input before those of its weights are computed, which are
            put off; for 1f1b-flush and gpipe.
        zero_bubble: do so, and have as many microbatches in flight as leave no bubble: twice as many, less one.
            For 1f1b-flush.
        scheduler: called with each stage's optimizer, makes its learning-rate scheduler, which is
            stepped once per minibatch: `functools.partial(torch.optim.lr_scheduler.StepLR, step_size=100)`.
        clip: how gradients are clipped.
        precision: "bf16" or "fp16" to run forwards under autocast; fp16 scales losses.
        master_weights: keep a float32 master of every bfloat16 weight: it is what SGD, Adam and AdamW step, and
            the weights are the master, rounded. For models whose weights are bfloat16 (model.bfloat16()).
        recompute: run forwards again before backwards instead of keeping activations; by default what
            the plan says, stage by stage.
        compiler: a backend of torch.compile, such as "inductor", to compile every stage with.
        deterministic: average gradients of replicas in a fixed order, so that every run makes the
            same bits; otherwise MPI chooses the order.
        leaves: module classes that torch.fx cannot look into and is to keep whole.
        seed: order of the data and dropout masks depend on it and on nothing else.
        device: what to train on: "cpu", "cuda", or "auto" for a GPU where torch sees one and the core was
            built for it. A rank takes the GPU of its local rank; two on one GPU are refused unless the
            environment says PIPEDREAM_SHARE_GPUS=1. The model is given on the CPU.
        stall_limit_s: seconds a rank waits for another before it says for whom, and stops.
        trace: whether `last_trace` is to be had.
        checkpoints: a folder that all ranks see; every epoch's end is written there. See `resume`.

    Raises:
        PipedreamError: the plan does not fit the model or the number of ranks.
    """

    def __init__(
        self,
        model: nn.Module | Factory,
        *,
        loss: Loss,
        optimizer: OptimizerFactory,
        example: Any,
        plan: Plan | str | Path | int,
        schedule: str | None = None,
        microbatches: int | None = None,
        chunks: int = 1,
        accumulate: int = 1,
        split_backward: bool = False,
        zero_bubble: bool = False,
        scheduler: SchedulerFactory | None = None,
        clip: Clip | None = None,
        precision: str | None = None,
        master_weights: bool = False,
        recompute: bool | None = None,
        compiler: str | None = None,
        deterministic: bool = True,
        leaves: Sequence[type[nn.Module]] = (),
        seed: int = 0,
        device: str = "auto",
        stall_limit_s: float = 300.0,
        trace: bool = False,
        checkpoints: str | Path | None = None,
    ) -> None:
        self.world: World = join()
        own = choose(device, self.world)
        #: What every rank trains on.
        self.devices = agree_on_devices(self.world, own, limit_s=stall_limit_s)
        #: How boundary tensors travel between ranks.
        self.route = choose_route(self.world, own, limit_s=stall_limit_s)
        self._wishes = Wishes(loss, optimizer, scheduler, clip, precision, compiler, seed, own.torch, master_weights)
        if (split_backward or zero_bubble) and compiler:
            asked = "zero_bubble" if zero_bubble else "split_backward"
            raise PipedreamError(f"compiled stages run backwards whole: leave {asked} away, or compiler")
        manner = Manner(
            schedule,
            microbatches,
            chunks,
            accumulate,
            agree=self._wishes.needs_agreement,
            split=split_backward,
            zero_bubble=zero_bubble,
            recompute=recompute,
        )
        wanted = given(plan)
        graph = capture(model, cut(example, manner.pieces(wanted))[0], leaves, self._wishes.autocast)
        name = str(plan) if isinstance(plan, str | Path) else "the plan"
        self._deployment = deploy(resolve(wanted, name, graph, manner), name, graph, manner, self.world)
        self.plan = self._deployment.plan
        self._stall_limit_s, self._tracing = stall_limit_s, trace
        self._peak = Peak(own.torch)
        self._epoch = self._units_run = self._units_trained = 0
        self._begun = False
        self._verified: set[AnySchedule] = set()
        self._spans: list[Span] | None = None
        self._last_units = 0
        launch = agree_on_start(self.world, self._deployment, seed, limit_s=stall_limit_s)
        ranks = self._deployment.ranks
        cores = Cores()
        if ranks > 1 or self.world.size > 1:
            cores = take_cores(self.world, ranks)
        training, lines = self._deployment.training(0), self._deployment.lines
        self._wiring: Wiring = (
            mpi_wiring(
                self.world,
                training,
                lines,
                stall_limit_s,
                ordered=deterministic,
                route=self.route,
                cores=cores,
            )
            if self.world.size > 1
            else local_wiring(training, lines, own.torch)
        )
        self._workers = assemble(self._deployment, training, self._wiring, self._wishes)
        if own.torch.type == "cpu":
            keep_freed_memory()
        self._statistics = shared_statistics(self.stages, training.layout, self._wiring)
        self._checkpoints = (
            None if checkpoints is None else Checkpoints(checkpoints, self._deployment, self._wishes, launch)
        )

    @classmethod
    def of(cls, job: Job, *, plan: Plan | str | Path | int, **options: Any) -> Pipeline:
        """A pipeline that trains a Job; `options` are Pipeline's own."""
        return cls(
            job.model,
            loss=job.loss,
            optimizer=job.optimizer,
            example=job.example,
            plan=plan,
            scheduler=job.scheduler,
            clip=job.clip,
            leaves=job.leaves,
            **options,
        )

    @property
    def rank(self) -> int:
        """This process's rank; 0 when all ranks run in one process."""
        return self.world.rank

    @property
    def pieces(self) -> int:
        """Units that a minibatch is cut into: 1, or the number of microbatches."""
        return self._deployment.pieces

    @property
    def accumulate(self) -> int:
        """Minibatches per replica that one update learns from."""
        return self._deployment.manner.accumulate

    @property
    def split(self) -> int:
        """0 where backwards are whole, 1 where they are split, 2 where twice as many units are in flight for it."""
        return self._deployment.manner.times_split

    @property
    def seed(self) -> int:
        """What the order of the data and dropout masks depend on."""
        return self._wishes.seed

    @property
    def precision(self) -> Precision | None:
        """What forwards run in; None for the model's own dtypes."""
        return self._wishes.autocast

    @property
    def master_weights(self) -> bool:
        """Whether bfloat16 weights have float32 masters."""
        return self._wishes.masters

    @property
    def scales_losses(self) -> bool:
        """Whether losses are scaled, as fp16 needs it."""
        return self._wishes.first_scale != 1.0

    def fit(self, loader: Any, on_minibatch: Callable[[int, int], None] | None = None) -> float:
        """Train one epoch; returns the mean loss per sample, the same on all ranks.

        Args:
            loader: yields (inputs, target) minibatches; has a length.
            on_minibatch: called with (done, total) whenever the input stage has finished one.

        Raises:
            PipedreamError: ranks read different data, a minibatch is larger than the example, replicas have
                come to differ, or the folder for checkpoints is an earlier run's.
        """
        if self._checkpoints is not None and not self._begun:
            self._checkpoints.begin()
        if not self._peak.begun:
            training, lines = self._deployment.training(0), self._deployment.lines
            self._peak.begin(core_bytes(self.stages, training, lines, packs=not self.route.staged))
        self._begun = True
        total, pieces = length_of(loader), self._deployment.pieces
        first = min(self._workers[0].stages)

        def finished(action: Backward) -> None:
            if on_minibatch is not None and action.stage == first and (action.minibatch + 1) % pieces == 0:
                on_minibatch((action.minibatch + 1) // pieces, total)

        return self._pass(loader, total, self._deployment.training(total), None, finished)

    def evaluate(self, loader: Any, metric: Loss = accuracy) -> float:
        """Mean of `metric` per sample over `loader`, forward only, on the newest weights.

        Moves no weight, BatchNorm statistic or random number generator. The same on all ranks.
        """
        total = length_of(loader)
        return self._pass(loader, total, self._deployment.evaluation(total), metric, lambda *_: None)

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Newest weights and buffers of the whole model, on the CPU, under the model's own names.

        Collective. The whole on rank 0, empty elsewhere.
        """
        return whole_state(self.world, self._deployment.graph, self.stages)

    def stage_of_parameters(self) -> dict[str, int]:
        """The stage that each of the model's parameters belongs to, by qualified name."""
        cut, stages = self._deployment.cut, range(len(self.plan.stages))
        return {name: stage for stage in stages for name in cut.parameters(stage)}

    def last_trace(self) -> Trace:
        """What ran when in the last `fit`. Collective; the same on all ranks.

        Raises:
            PipedreamError: the pipeline was made without trace=True, or has not trained yet.
        """
        if self._spans is None:
            raise PipedreamError("there is no trace: make the Pipeline with trace=True and call fit first")
        spans = self._spans
        if self.world.comm is not None and self.world.size > 1:
            spans = [span for part in self.world.comm.allgather(spans) for span in part]
        return Trace("measured", self._deployment.layout, self._last_units, tuple(spans), self.pieces)

    def footprints(self) -> list[Footprint]:
        """Memory of every rank, planned and measured, after `fit`. Collective; the same on all ranks."""
        schedule, lines = self._deployment.training(0), self._deployment.lines
        peak = self._peak if len(self._workers) == 1 else None
        own = [
            footprint(worker, self.plan, schedule, lines, str(self.devices[self.rank]), peak)
            for worker in self._workers
        ]
        return [
            each for answer in agree(self.world, {"own": own}, limit_s=self._stall_limit_s) for each in answer["own"]
        ]

    def resume(self) -> int:
        """Go on from the newest whole checkpoint, as if training had never stopped; returns its epochs.

        Collective. 0, and nothing is changed, if there is none. One that is damaged or incomplete is
        passed over; rank 0 says which and why.

        Raises:
            PipedreamError: the pipeline was made without checkpoints, or they are of another model or plan.
        """
        if self._checkpoints is None:
            raise PipedreamError("there is nothing to resume from: make the Pipeline with checkpoints=FOLDER")
        positions, passed_over = self._checkpoints.whole()
        seen = [(each.epoch, each.units) for each in positions]
        agree_on_checkpoints(self.world, seen, limit_s=self._stall_limit_s)
        if self.rank == 0:
            for reason in passed_over:
                warnings.warn(f"checkpoint passed over: {reason}", stacklevel=2)
        self._begun = True
        if not positions:
            return 0
        for stage in self.stages:
            self._checkpoints.read_part(stage, positions[0])
        for statistics in self._statistics:
            statistics.begin_anew()
        self._epoch, self._units_trained = positions[0].epoch, positions[0].units
        return self._epoch

    def close(self) -> None:
        """Give back the channels. Collective; called at exit if not before."""
        self._wiring.close()

    def __enter__(self) -> Pipeline:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self.close()

    # ------------------------------------------------------------------

    @property
    def stages(self) -> list[Stage]:
        """Replicas of stages that this process holds, by rank."""
        return [stage for worker in self._workers for stage in worker.stages.values()]

    def _pass(
        self,
        loader: Any,
        total: int,
        schedule: AnySchedule,
        metric: Loss | None,
        finished: Callable[[Backward], None],
    ) -> float:
        """Run one schedule over one pass of the loader; `metric` None means training."""
        training = metric is None
        self._verify(schedule)
        with generators_kept(self._wishes.device):
            mean = self._run(loader, total, schedule, metric, finished)
        self._units_run += schedule.minibatches
        if training:
            self._units_trained += schedule.minibatches
            self._epoch += 1
            if self._checkpoints is not None:
                self._write(self._checkpoints)
        return mean

    def _run(
        self,
        loader: Any,
        total: int,
        schedule: AnySchedule,
        metric: Loss | None,
        finished: Callable[[Backward], None],
    ) -> float:
        training = metric is None
        try:
            feed = self._feed(loader, total)
            agree_on_data(self.world, total, feed, limit_s=self._stall_limit_s)
            for worker in self._workers:
                worker.begin(
                    schedule,
                    feed,
                    self._units_run,
                    self._units_trained,
                    score=metric,
                    trace=training and self._tracing,
                )
            began_ns = self._wiring.common_epoch_ns()
            with no_stalls() as collector:
                for _, action in self._execute(schedule):
                    if isinstance(action, Backward):
                        finished(action)
                    elif isinstance(action, Update):
                        collector.between_updates()
            for worker in self._workers:
                worker.end()
            if training:
                self._share_statistics()
            mean = agree_on_end(self.world, self._workers, training=training, limit_s=self._stall_limit_s)
        except Exception as error:
            if is_stall(error):
                raise report(self.world, str(error.__cause__ or error)) from None
            raise
        if training and self._tracing:
            self._spans = [span for worker in self._workers for span in worker.spans(began_ns)]
            self._last_units = schedule.minibatches
        return mean

    def _write(self, checkpoints: Checkpoints) -> None:
        position = Position(self._epoch, self._units_trained)
        for stage in self.stages:
            if stage.replica == 0:
                checkpoints.write_part(stage, position)
        if self.rank == 0:
            checkpoints.write_manifest(position)

    def _execute(self, schedule: Schedule) -> Iterator[tuple[Worker, Action]]:
        if self.world.size > 1:
            return carry_out(self._workers[0], schedule)
        return emulate(self._workers, schedule)

    def _feed(self, loader: Any, total: int) -> Feed:
        if self.world.size > 1:
            start_workers_apart(loader)
        return feed_of(self._deployment, self.stages, loader, self._wishes, epoch=self._epoch, length=total)

    def _share_statistics(self) -> None:
        for statistics in self._statistics:
            statistics.hand_in()
        for statistics in self._statistics:
            statistics.take()

    def _verify(self, schedule: AnySchedule) -> None:
        if schedule not in self._verified:
            verify_around(schedule, self.world.rank if self.world.size > 1 else None)
            self._verified.add(schedule)


def length_of(loader: Any) -> int:
    """Minibatches of a pass over `loader`.

    Raises:
        PipedreamError: it has no length.
    """
    try:
        return len(loader)
    except TypeError:
        raise PipedreamError(
            f"{type(loader).__name__} has no length: the schedule is fixed before the first minibatch, "
            "so the loader must know how many there are (give its dataset a __len__)"
        ) from None
