"""Pipeline: what a user's program holds.

plan ──► stage modules ──► workers ──► train, evaluate
                              ▲
          all of them in one process, or this rank's own under mpirun / srun
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pipedream_hpc.cluster.device import Device
from pipedream_hpc.cluster.world import World
from pipedream_hpc.config import RunConfig, ScheduleConfig, TrainConfig
from pipedream_hpc.errors import PipedreamError
from pipedream_hpc.job import Job, LossFn, OptimizerFactory
from pipedream_hpc.model.precision import Precision
from pipedream_hpc.model.recipe import ModelFactory
from pipedream_hpc.planning.plan import Plan
from pipedream_hpc.runtime.comm.gpu_route import Route
from pipedream_hpc.runtime.comm.handshake import exchange
from pipedream_hpc.runtime.execution.data import MicrobatchLoader
from pipedream_hpc.runtime.execution.dataloader import use_forkserver
from pipedream_hpc.runtime.execution.memory_probe import core_bytes, measured_parts
from pipedream_hpc.runtime.execution.passes import Stepped
from pipedream_hpc.runtime.execution.position import PassPosition
from pipedream_hpc.runtime.execution.score import Score, ScoreFn, read_score
from pipedream_hpc.runtime.execution.stage import Stage
from pipedream_hpc.runtime.execution.user_rng import UserGenerators
from pipedream_hpc.runtime.launch.build import TrainSetup, microbatch_loader
from pipedream_hpc.runtime.launch.preflight import check_checkpoints
from pipedream_hpc.runtime.launch.start import start
from pipedream_hpc.runtime.state.checkpoint import Checkpoints, Position
from pipedream_hpc.runtime.state.full_state_dict import full_state_dict
from pipedream_hpc.runtime.state.load_state_dict import load_full_state_dict, state_dict_problem
from pipedream_hpc.runtime.state.memory_report import MemoryReport, ProcessPeak, memory_report
from pipedream_hpc.schedule import registry
from pipedream_hpc.schedule.trace import Span, Trace
from pipedream_hpc.schedule.verifier import verify_around
from pipedream_hpc.schedule.written import Written


@dataclass(frozen=True)
class Step:
    """One minibatch that has been trained.

    Attributes:
        index: number of the minibatch within this call of `Pipeline.train`.
        lr: learning rate of the first parameter group; None on a rank whose stage trains nothing.
        samples_per_s: samples per second since the step before, counting a short minibatch as a full one.
    """

    index: int
    lr: float | None
    samples_per_s: float
    _ask: Callable[[int], float] = field(repr=False)

    @property
    def loss(self) -> float:
        """Mean loss of the minibatch, the same on all ranks.

        Nothing is computed or sent before it is read. It may be read on some ranks only.

        Raises:
            PipedreamError: it is read thousands of microbatches later, when it is no longer kept.
        """
        return self._ask(self.index)


class Pipeline:
    """Train a model with pipeline parallelism: 1F1B with weight stashing, or any other schedule.

    A program that is started by itself runs all ranks of the plan in its one process. Started by mpirun
    or srun on as many ranks as the plan has, each process runs its own rank. The numbers are the same.

    Args:
        model: any module, built with the same seed on every rank, which is trained in place; or a function
            without arguments that builds it, so that each rank keeps the weights of its own stages only. The function
            is called two or three times and must build the same model.
        loss_fn: mean loss of a minibatch from (output, target), or a pair (sum, count), such as the sum of the losses
            of all tokens and how many there are: then a mean is one over all that was counted.
        optimizer: called once per stage with the stage's parameters, such as
            `functools.partial(torch.optim.SGD, lr=0.1)`. The parameters have the user's own attributes, and
            `qualified_name`.
        example_inputs: one minibatch of inputs, as large as they will get: a tensor, a tuple of the model's
            arguments, or a mapping from their names; only shapes and dtypes are used.
        plan: a Plan, the file of one, a number of stages into which the model is cut evenly (by counted
            floating-point operations: the same cut on every machine), or the replicas of such
            stages, as in "2-1-1".
        cut_points: qualified names of the modules that stages begin with, in the order of the forward, one fewer than
            stages: then the plan gives the number of stages or their replicas alone. A module that is called more than
            once begins with its first call. None for a cut by counted operations.
        schedule: the schedule, by name or as a ScheduleConfig; None for the plan's own.
        train_config: how stages are trained.
        run_config: where the run computes, and what it records.

    Raises:
        PipedreamError: the plan does not fit the model or the number of ranks.
    """

    def __init__(
        self,
        model: nn.Module | ModelFactory,
        *,
        loss_fn: LossFn,
        optimizer: OptimizerFactory,
        example_inputs: Any,
        plan: Plan | str | Path | int,
        cut_points: Sequence[str] | None = None,
        schedule: str | ScheduleConfig | None = None,
        train_config: TrainConfig | None = None,
        run_config: RunConfig | None = None,
    ) -> None:
        self.run_config = run_config or RunConfig()
        self._run = start(
            model,
            example_inputs,
            plan,
            cut_points or (),
            ScheduleConfig.of(schedule),
            TrainSetup(loss_fn, optimizer, train_config or TrainConfig()),
            self.run_config,
        )
        self._peak = ProcessPeak(self._run.setup.device)
        self._epoch = 0
        self._verified: set[registry.AnySchedule | Written] = set()
        self._spans: list[Span] | None = None
        self._last_microbatches = 0
        self._checkpoints: dict[Path, Checkpoints] = {}
        self._last_loss = float("nan")
        self._unfinished = ""  # the pass that was left before its end
        self._closed = False

    @classmethod
    def from_job(
        cls,
        job: Job,
        *,
        plan: Plan | str | Path | int,
        cut_points: Sequence[str] | None = None,
        schedule: str | ScheduleConfig | None = None,
        train_config: TrainConfig | None = None,
        run_config: RunConfig | None = None,
    ) -> Pipeline:
        """Create the pipeline that trains a Job; what is given here replaces the job's own."""
        return cls(
            job.model,
            loss_fn=job.loss_fn,
            optimizer=job.optimizer,
            example_inputs=job.example_inputs,
            plan=plan,
            cut_points=job.cut_points if cut_points is None else cut_points,
            schedule=job.schedule if schedule is None else schedule,
            train_config=train_config or job.train_config,
            run_config=run_config or job.run_config,
        )

    # -- what runs ---------------------------------------------------------------------------------------------------

    @property
    def world(self) -> World:
        """All ranks."""
        return self._run.world

    @property
    def rank(self) -> int:
        """This process's rank; 0 when all ranks run in one process."""
        return self.world.rank

    @property
    def plan(self) -> Plan:
        """The plan as it is run."""
        return self._run.deployment.plan

    @property
    def train_config(self) -> TrainConfig:
        """How stages are trained."""
        return self._run.setup.config

    @property
    def n_microbatches(self) -> int:
        """Microbatches per minibatch."""
        return self._run.deployment.n_microbatches

    @property
    def devices(self) -> tuple[Device, ...]:
        """What every rank computes on."""
        return self._run.devices

    @property
    def route(self) -> Route:
        """How boundary tensors travel between ranks."""
        return self._run.route

    @property
    def precision(self) -> Precision | None:
        """The context that forwards run in; None for the model's own dtypes."""
        return self._run.setup.autocast

    @property
    def stages(self) -> list[Stage]:
        """The replicas of stages in this process, by rank."""
        return self._run.stages

    # -- training ----------------------------------------------------------------------------------------------------

    def train(self, loader: Any, *, steps: int | None = None) -> Iterator[Step]:
        """Train one pass over `loader`; yield a Step for every minibatch, once an optimizer step has learned from it.

        The pipe drains at the end of the pass, not at every step. The loop must run to its end: use `steps` to train
        fewer minibatches than the loader has. Between steps the user's random numbers are the user's own.

        Args:
            loader: yields (inputs, target) minibatches.
            steps: minibatches to train; needed for a loader without a length.

        Raises:
            PipedreamError: ranks read different data, a minibatch is larger than the example, or replicas have
                drifted apart.
        """
        total = _length(loader, steps)
        return self._train(loader, total, self._training_pass(loader, total, publish=True))

    def fit(
        self,
        loader: Any,
        *,
        epochs: int = 1,
        steps: int | None = None,
        on_step: Callable[[Step], None] | None = None,
    ) -> float:
        """Train; return the mean loss per sample of the last epoch, the same on all ranks.

        Args:
            loader: yields (inputs, target) minibatches.
            epochs: passes over the loader.
            steps: minibatches per epoch; needed for a loader without a length.
            on_step: called with every Step.

        Raises:
            PipedreamError: as `train`.
        """
        if not isinstance(epochs, int) or epochs < 1:
            raise PipedreamError(f"epochs should be an integer of at least 1, not {epochs!r}")
        loss = float("nan")
        self._check_lr_schedulers(_length(loader, steps) * epochs)
        for _ in range(epochs):
            total = _length(loader, steps)
            running = self._training_pass(loader, total, publish=on_step is not None)
            if on_step is None:
                loss = _finish(running)[0]
                continue
            for step in self._train(loader, total, running):
                on_step(step)
            loss = self._last_loss
        return loss

    def evaluate(
        self, loader: Any, metrics: Mapping[str, LossFn] | None = None, *, steps: int | None = None
    ) -> dict[str, float]:
        """Return the mean of every metric over `loader`, forward only, on the newest weights.

        Means are over the samples, or over what a metric counts; the same on all ranks. Changes no weight, BatchNorm
        statistic or random number generator.

        Args:
            loader: yields (inputs, target) minibatches, which may lack inputs that the model does without (their
                default is None) if no metric needs them, such as the labels.
            metrics: name to mean score of a minibatch, or a pair (sum, count), from (output, target); the loss by
                default.
            steps: minibatches to evaluate; needed for a loader without a length.
        """
        if metrics is not None and not isinstance(metrics, Mapping):
            raise PipedreamError(
                f"metrics is {type(metrics).__name__}; it should map names to functions of (output, target): "
                "metrics={'accuracy': accuracy}"
            )
        chosen = dict(metrics) if metrics is not None else {"loss": self._run.setup.loss_fn}
        if not chosen:
            raise PipedreamError("metrics is empty: give at least one, such as metrics={'accuracy': accuracy}")
        total = _length(loader, steps)
        schedule = self._run.deployment.evaluation(total)
        where = f"evaluation after {self._epoch} epochs" if self._epoch else "evaluation before training"
        running = self._pass(loader, total, schedule, where, score_fn=_scores(chosen))
        return dict(zip(chosen, _finish(running), strict=True))

    # -- weights and checkpoints -------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Return the newest weights and buffers of the whole model, on the CPU, under the user's own names.

        Collective. Complete on rank 0, empty elsewhere.
        """
        self._check_finished()
        return full_state_dict(self.world, self._run.deployment.graph, [stage.state for stage in self.stages])

    def load_state_dict(self, weights: Mapping[str, torch.Tensor] | str | Path) -> None:
        """Set weights and buffers of the model; optimizers keep their state.

        Args:
            weights: tensors by the user's own names; or a safetensors file, the index of several
                (model.safetensors.index.json), or the folder of either, as save_pretrained writes it. From files each
                rank reads the tensors of its own stages only.

        Raises:
            PipedreamError: a name is missing or unknown, or a shape differs, or a file cannot be read; nothing is
                changed then.
        """
        self._check_finished()
        problem = state_dict_problem(self._run.deployment.graph, weights)
        for rank, answer in enumerate(
            exchange(self.world, {"problem": problem}, limit_s=self.run_config.stall_limit_s)
        ):
            if answer["problem"] is not None:
                where = "" if self.world.size == 1 else f" on rank {rank} (state_dict() is complete on rank 0 only)"
                raise PipedreamError(f"{answer['problem']}{where}")
        load_full_state_dict(
            self._run.deployment.graph,
            [stage.state for stage in self.stages],
            weights,
            keeps_unused=self.rank == 0,
        )
        for stats in self._run.running_stats:
            stats.set_baseline()

    def save_checkpoint(self, folder: str | Path) -> None:
        """Write a checkpoint of this moment into `folder`, which all ranks see. Collective.

        Raises:
            PipedreamError: the folder holds checkpoints of an earlier run that was not resumed, or cannot be written.
        """
        self._check_finished()
        checkpoints = self.prepare_checkpoints(folder)
        position = Position(self._epoch, self._run.passes.microbatches_trained)
        for stage in self.stages:
            if stage.replica == 0:
                checkpoints.write_stage(stage.state, position)
        if self.rank == 0:
            checkpoints.write_manifest(position)

    def resume(self, folder: str | Path) -> int:
        """Continue from the newest complete checkpoint, as if training had never stopped; return its epochs.

        Collective. Returns 0 and changes nothing if the folder is empty or missing. A damaged or incomplete checkpoint
        is skipped; rank 0 says which one and why.

        Raises:
            PipedreamError: the checkpoints are of another model or plan; or the path is that of a file, or of a folder
                of other things.
        """
        self._check_finished()
        checkpoints = self._checkpoints_in(folder)
        positions, skipped = checkpoints.complete()
        limit_s = self.run_config.stall_limit_s
        check_checkpoints(self.world, [(each.epoch, each.n_microbatches) for each in positions], limit_s=limit_s)
        if self.rank == 0:
            for reason in skipped:
                warnings.warn(f"checkpoint skipped: {reason}", stacklevel=2)
        self._checkpoints[Path(folder)] = checkpoints
        if not positions:
            return 0
        for stage in self.stages:
            checkpoints.read_stage(stage.state, positions[0])
        for stats in self._run.running_stats:
            stats.set_baseline()
        self._epoch, self._run.passes.microbatches_trained = positions[0].epoch, positions[0].n_microbatches
        return self._epoch

    def prepare_checkpoints(self, folder: str | Path) -> Checkpoints:
        """Check that checkpoints of this run can be written to `folder`; `save_checkpoint` does so, too. Collective.

        Raises:
            PipedreamError: as `save_checkpoint`.
        """
        path = Path(folder)
        if path not in self._checkpoints:
            checkpoints = self._checkpoints_in(folder)
            checkpoints.begin()
            exchange(self.world, {}, limit_s=self.run_config.stall_limit_s)  # no rank writes before all have looked
            self._checkpoints[path] = checkpoints
        return self._checkpoints[path]

    # -- reports -----------------------------------------------------------------------------------------------------

    def stage_of_parameters(self) -> dict[str, int]:
        """Return the stage that each of the model's parameters belongs to, by qualified name."""
        partition, stages = self._run.deployment.partition, range(len(self.plan.stages))
        return {name: stage for stage in stages for name in partition.parameters(stage)}

    def last_trace(self) -> Trace:
        """Return what ran when in the last training pass. Collective; the same on all ranks.

        Raises:
            PipedreamError: nothing was recorded, or the pipeline has not trained yet.
        """
        if self._spans is None:
            raise PipedreamError("there is no trace: give run_config=RunConfig(trace=True), and train first")
        spans = self._spans
        if self.world.comm is not None and self.world.size > 1:
            spans = [span for part in self.world.comm.allgather(spans) for span in part]
        layout = self._run.deployment.layout
        return Trace("measured", layout, self._last_microbatches, tuple(spans), self.n_microbatches)

    def memory_reports(self) -> list[MemoryReport]:
        """Return the memory of every rank, planned and measured, after training. Collective; the same on all ranks."""
        run, schedule = self._run, self._run.deployment.example_training()
        peak = self._peak if len(run.workers) == 1 else None
        own = []
        for worker in run.workers:
            measured = {
                index: measured_parts(
                    stage.state,
                    stage.memory_probe,
                    stage.channels,
                    schedule,
                    run.deployment.edge_tensors,
                    recompute=stage.recomputes,
                )
                for index, stage in worker.stages.items()
            }
            own.append(memory_report(worker.rank, self.plan, measured, str(self.devices[self.rank]), peak))
        answers = exchange(self.world, {"own": own}, limit_s=self.run_config.stall_limit_s)
        return [each for answer in answers for each in answer["own"]]

    def close(self) -> None:
        """Release the channels, once all ranks have come here. Collective; harmless when called twice.

        Raises:
            PipedreamError: a rank did not come within the stall limit.
        """
        if not self._closed:
            # Until all have come, a rank may ask this one for the loss of a step.
            exchange(self.world, {}, limit_s=self.run_config.stall_limit_s)
        self._closed = True
        self._run.wiring.close()
        self._run.deployment.graph.close()

    def __enter__(self) -> Pipeline:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self.close()

    # ----------------------------------------------------------------------------------------------------------------

    def _check_lr_schedulers(self, minibatches: int) -> None:
        for stage in self.stages:
            stage.optimizer.check_steps(minibatches)

    def _check_trains(self) -> None:
        """Refuse to train where all weights are frozen, in whatever stage: the user's model shows those of all.

        Raises:
            PipedreamError: no weight requires a gradient.
        """
        loss_fn = self._run.setup.loss_fn
        modules = [self._run.deployment.graph.module, *([loss_fn] if isinstance(loss_fn, nn.Module) else [])]
        if not any(weight.requires_grad for module in modules for weight in module.parameters()):
            raise PipedreamError(
                "no weight of the model requires a gradient, so nothing would be trained: thaw some with "
                "requires_grad_(True)"
            )

    def _training_pass(self, loader: Any, total: int, *, publish: bool) -> Generator[Stepped, None, list[float]]:
        self._check_lr_schedulers(total)
        self._check_trains()
        if not self._peak.begun:
            tensors = self._run.deployment.edge_tensors
            stages = [(stage.state, stage.channels) for stage in self.stages]
            packs = not self._run.route.staged
            self._peak.begin(core_bytes(stages, self._run.deployment.example_training(), tensors, packs=packs))
        schedule = self._run.deployment.training(total)
        return self._pass(loader, total, schedule, f"epoch {self._epoch}", publish=publish)

    def _pass(
        self,
        loader: Any,
        total: int,
        schedule: registry.AnySchedule | Written,
        where: str,
        *,
        score_fn: ScoreFn | None = None,
        publish: bool = False,
    ) -> Generator[Stepped, None, list[float]]:
        """Run one pass; yield every optimizer step of this process after it ran, and return the mean scores."""
        self._check_finished()
        self._run.deployment.graph.check_modules()
        writes = schedule.training in self._run.deployment.graph.notes.writes_inputs
        if writes and isinstance(loader, list | tuple):
            raise PipedreamError(
                f"the model's forward writes into its arguments, which a {type(loader).__name__} of minibatches would "
                "keep for the next epoch: let the forward copy them (x = x.clone()), or give a loader that makes new "
                "tensors for every pass, such as a DataLoader"
            )
        self._verify(schedule)
        trace = self.run_config.trace and schedule.training
        self._unfinished = where
        users = UserGenerators(self._run.setup.device)
        try:
            means = yield from self._run.passes.run(
                schedule,
                lambda: self._microbatches(loader, total, schedule.training),
                PassPosition(where, self.n_microbatches),
                minibatches=total,
                score_fn=score_fn,
                trace=trace,
                publish=publish,
            )
        finally:
            users.restore()
        self._unfinished = ""
        if schedule.training:
            self._epoch += 1
            self._last_loss = means[0]
        if trace:
            began_ns = self._run.passes.began_ns
            self._spans = [span for worker in self._run.workers for span in worker.spans(began_ns)]
            self._last_microbatches = schedule.total_microbatches
        return means

    def _train(self, loader: Any, total: int, running: Generator[Stepped, None, list[float]]) -> Iterator[Step]:
        """Yield the steps of a training pass."""
        own_rank, first = self._run.workers[0].rank, min(self._run.workers[0].stages)
        own = self._run.workers[0].stages[first]
        begun, done = self._run.passes.microbatches_run, 0
        users, since_s = UserGenerators(self._run.setup.device), time.perf_counter()

        def ask(minibatch: int) -> float:
            return self._loss_of(begun, minibatch)

        try:
            for worker, action in running:
                if (worker.rank, action.stage) != (own_rank, first):
                    continue
                trained = range(done // self.n_microbatches, (done + action.n_microbatches) // self.n_microbatches)
                done += action.n_microbatches
                if done == total * self.n_microbatches:
                    _finish(running)  # before the last steps are seen: whoever has seen all may leave
                now_s = time.perf_counter()
                rate = len(trained) * self._run.samples / max(now_s - since_s, 1e-9)
                training = UserGenerators(self._run.setup.device)
                users.restore()
                try:
                    for minibatch in trained:
                        yield Step(minibatch, own.optimizer.lr, rate, ask)
                finally:
                    users.save()
                    training.restore()
                since_s = time.perf_counter()
        finally:
            running.close()
            users.restore()

    def _loss_of(self, begun: int, minibatch: int) -> float:
        """Return the mean loss of a minibatch of the pass that began with microbatch number `begun`."""
        first = minibatch * self.n_microbatches
        parts = [self._run.losses.ask(begun, each) for each in range(first, first + self.n_microbatches)]
        return sum(each.mean * each.weight for each in parts) / (sum(each.weight for each in parts) or 1.0)

    def _microbatches(self, loader: Any, total: int, training: bool) -> MicrobatchLoader:
        if self.world.size > 1:
            use_forkserver(loader)
        return microbatch_loader(
            self._run.deployment,
            self.stages,
            loader,
            self._run.setup,
            epoch=self._epoch,
            length=total,
            training=training,
        )

    def _checkpoints_in(self, folder: str | Path) -> Checkpoints:
        facts = self._run.deployment.checkpoint_facts(self.train_config)
        return Checkpoints(folder, len(self.plan.stages), facts, self._run.launch)

    def _check_finished(self) -> None:
        if self._closed:
            raise PipedreamError("the pipeline is closed: use it within its with block, or before close()")
        if self._unfinished:
            raise PipedreamError(
                f"{self._unfinished} is not finished, and a schedule is fixed before its first minibatch: let the loop "
                "over train() run to its end, or give steps= to train fewer minibatches"
            )

    def _verify(self, schedule: registry.AnySchedule | Written) -> None:
        if schedule not in self._verified:
            verify_around(schedule, self.world.rank if self.world.size > 1 else None)
            self._verified.add(schedule)


def _finish(running: Generator[Stepped, None, list[float]]) -> list[float]:
    """Run a pass to its end; return the mean scores."""
    while True:
        try:
            next(running)
        except StopIteration as end:
            means: list[float] = end.value
            return means


def _scores(metrics: Mapping[str, LossFn]) -> ScoreFn:
    """Return a function that computes all metrics."""

    def score(output: Any, target: Any) -> list[Score]:
        return [read_score(metric(output, target), f"the metric '{name}'") for name, metric in metrics.items()]

    return score


def _length(loader: Any, steps: int | None) -> int:
    """Return the minibatches of a pass over `loader`.

    Raises:
        PipedreamError: the loader has no length and `steps` is not given, or it has fewer than `steps`, or none.
    """
    if steps is not None and (not isinstance(steps, int) or isinstance(steps, bool) or steps < 1):
        raise PipedreamError(f"steps should be an integer of at least 1, not {steps!r}")
    try:
        length = len(loader)
    except TypeError:
        if steps is None:
            raise PipedreamError(
                f"{type(loader).__name__} has no length, and a schedule is fixed before its first minibatch: "
                "say how many minibatches to run, with steps="
            ) from None
        return steps
    if steps is not None and steps > length:
        raise PipedreamError(f"steps is {steps}, but the loader has {length} minibatches: give at most {length}")
    if not length:
        raise PipedreamError(
            f"the loader ({type(loader).__name__}) has no minibatch: give one that has; a data set smaller than a "
            "minibatch yields none with drop_last=True"
        )
    return length if steps is None else steps
