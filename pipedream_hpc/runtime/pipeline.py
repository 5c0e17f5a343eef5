"""Pipeline: what a user's program holds in its hand.

plan ──► stage modules ──► workers ──► fit, evaluate
                              ▲
          all of them in one process, or this rank's own under mpirun / srun
"""

from __future__ import annotations

import contextlib
import platform
import warnings
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pipedream_hpc import __version__
from pipedream_hpc.cluster.threads import threads_per_rank
from pipedream_hpc.cluster.world import World, join
from pipedream_hpc.errors import PipedreamError
from pipedream_hpc.job import Loss, OptimizerFactory, accuracy
from pipedream_hpc.model.capture import capture
from pipedream_hpc.model.cut import Part
from pipedream_hpc.model.materialize import Factory, give_back, materialize
from pipedream_hpc.model.precision import autocast
from pipedream_hpc.planning.plan import Plan
from pipedream_hpc.runtime.averaging import Averager, Packing
from pipedream_hpc.runtime.checkpoint import Checkpoints, Position
from pipedream_hpc.runtime.deployment import Deployment, Manner, deploy, given, resolve
from pipedream_hpc.runtime.emulator import carry_out, emulate
from pipedream_hpc.runtime.feed import Feed, Taker, cut
from pipedream_hpc.runtime.handshake import agree, same
from pipedream_hpc.runtime.reading import start_workers_apart
from pipedream_hpc.runtime.stage import Ports, Stage
from pipedream_hpc.runtime.stall import is_stall, report
from pipedream_hpc.runtime.stash import WeightStash
from pipedream_hpc.runtime.statistics import Statistics
from pipedream_hpc.runtime.step import Clip, LossScale, SchedulerFactory, Step
from pipedream_hpc.runtime.wiring import Wiring, local_wiring, mpi_wiring
from pipedream_hpc.runtime.worker import Worker
from pipedream_hpc.schedule.actions import Action, Backward, Schedule
from pipedream_hpc.schedule.kinds import AnySchedule
from pipedream_hpc.schedule.trace import Span, Trace
from pipedream_hpc.schedule.verifier import verify_around

#: Loss scale that fp16 begins with.
_FIRST_SCALE = 65536.0


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
        scheduler: called with each stage's optimizer, makes its learning-rate scheduler, which is
            stepped once per minibatch: `functools.partial(torch.optim.lr_scheduler.StepLR, step_size=100)`.
        clip: how gradients are clipped.
        precision: "bf16" or "fp16" to run forwards under autocast; fp16 scales losses.
        recompute: run forwards again before backwards instead of keeping activations; by default what
            the plan says, stage by stage.
        compiler: a backend of torch.compile, such as "inductor", to compile every stage with.
        deterministic: average gradients of replicas in a fixed order, so that every run makes the
            same bits; otherwise MPI chooses the order.
        leaves: module classes that torch.fx cannot look into and is to keep whole.
        seed: order of the data and dropout masks depend on it and on nothing else.
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
        scheduler: SchedulerFactory | None = None,
        clip: Clip | None = None,
        precision: str | None = None,
        recompute: bool | None = None,
        compiler: str | None = None,
        deterministic: bool = True,
        leaves: Sequence[type[nn.Module]] = (),
        seed: int = 0,
        stall_limit_s: float = 300.0,
        trace: bool = False,
        checkpoints: str | Path | None = None,
    ) -> None:
        self.world: World = join()
        manner = Manner(
            schedule,
            microbatches,
            chunks,
            accumulate,
            agree=(clip is not None and clip.over == "model") or precision == "fp16",
        )
        wanted = given(plan)
        self.precision = autocast(precision)
        graph = capture(model, cut(example, manner.pieces(wanted))[0], leaves, self.precision)
        name = str(plan) if isinstance(plan, str | Path) else "the plan"
        self._deployment = deploy(resolve(wanted, graph, manner), name, graph, manner, self.world)
        self.plan = self._deployment.plan
        self.seed, self._stall_limit_s, self._tracing = seed, stall_limit_s, trace
        self._loss, self._optimizer, self._scheduler = loss, optimizer, scheduler
        self._clip, self._recompute, self._compiler = clip, recompute, _known(compiler)
        self._first_scale = _FIRST_SCALE if precision == "fp16" else 1.0
        self._epoch = self._units_run = self._units_trained = 0
        self._verified: set[AnySchedule] = set()
        self._spans: list[Span] | None = None
        self._last_units = 0
        self._agree_on_start()
        ranks = self._deployment.ranks
        if ranks > 1 or self.world.size > 1:
            torch.set_num_threads(threads_per_rank(max(ranks, self.world.local_size)))
        training, lines = self._deployment.training(0), self._deployment.lines
        self._wiring: Wiring = (
            mpi_wiring(self.world, training, lines, stall_limit_s, ordered=deterministic)
            if self.world.size > 1
            else local_wiring(training, lines)
        )
        self._workers = self._made(training)
        self._statistics = self._shared_statistics()
        self._checkpoints = None if checkpoints is None else self._checkpoints_in(checkpoints)

    @property
    def rank(self) -> int:
        """This process's rank; 0 when all ranks run in one process."""
        return self.world.rank

    @property
    def last_stage(self) -> int:
        return len(self.plan.stages) - 1

    @property
    def pieces(self) -> int:
        """Units that a minibatch is cut into: 1, or the number of microbatches."""
        return self._deployment.pieces

    @property
    def accumulate(self) -> int:
        """Minibatches per replica that one update learns from."""
        return self._deployment.manner.accumulate

    @property
    def scales_losses(self) -> bool:
        """Whether losses are scaled, as fp16 needs it."""
        return self._first_scale != 1.0

    def fit(self, loader: Any, on_minibatch: Callable[[int, int], None] | None = None) -> float:
        """Train one epoch; returns the mean loss per sample, the same on all ranks.

        Args:
            loader: yields (inputs, target) minibatches; has a length.
            on_minibatch: called with (done, total) whenever the input stage has finished one.

        Raises:
            PipedreamError: ranks read different data, a minibatch is larger than the example, or
                replicas have come to differ.
        """
        total, pieces = _length(loader), self._deployment.pieces

        def finished(worker: Worker, action: Action) -> None:
            if on_minibatch is None or worker is not self._workers[0] or not isinstance(action, Backward):
                return
            if action.stage == min(worker.stages) and (action.minibatch + 1) % pieces == 0:
                on_minibatch((action.minibatch + 1) // pieces, total)

        return self._pass(loader, total, self._deployment.training(total), None, finished)

    def evaluate(self, loader: Any, metric: Loss = accuracy) -> float:
        """Mean of `metric` per sample over `loader`, forward only, on the newest weights.

        Moves no weight, BatchNorm statistic or random number generator. The same on all ranks.
        """
        total = _length(loader)
        return self._pass(loader, total, self._deployment.evaluation(total), metric, lambda *_: None)

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Newest weights and buffers of the whole model under the model's own names.

        Collective. The whole on rank 0, empty elsewhere.
        """
        own: dict[str, torch.Tensor] = {}
        for stage in self.stages:
            if stage.replica == 0:
                stage.stash.use_newest()
                own.update((name, value.detach().clone()) for name, value in stage.module.state_dict().items())
        if self.world.comm is not None and self.world.size > 1:
            parts = self.world.comm.gather(own, root=0)
            own = {name: value for part in parts or () for name, value in part.items()}
        return self._completed(own) if self.rank == 0 else {}

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
        return Trace("measured", self._deployment.layout, self._last_units, tuple(spans))

    def resume(self) -> int:
        """Go on from the newest whole checkpoint, as if training had never stopped; returns its epochs.

        Collective. 0, and nothing is changed, if there is none. One that is damaged or incomplete is
        passed over; rank 0 says which and why.

        Raises:
            PipedreamError: the pipeline was made without checkpoints, or they are of another model.
        """
        if self._checkpoints is None:
            raise PipedreamError("there is nothing to resume from: make the Pipeline with checkpoints=FOLDER")
        positions, passed_over = self._checkpoints.whole()
        answers = agree(self.world, {"whole": positions}, limit_s=self._stall_limit_s)
        everywhere = [position for position in positions if all(position in each["whole"] for each in answers)]
        if self.rank == 0:
            for reason in passed_over:
                warnings.warn(f"checkpoint passed over: {reason}", stacklevel=2)
        if not everywhere:
            return 0
        for stage in self.stages:
            self._checkpoints.read_part(stage, everywhere[0])
        for statistics in self._statistics:
            statistics.begin_anew()
        self._epoch, self._units_trained = everywhere[0].epoch, everywhere[0].units
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
        finished: Callable[[Worker, Action], None],
    ) -> float:
        """Run one schedule over one pass of the loader; `metric` None means training."""
        training = metric is None
        self._verify(schedule)
        rng = torch.random.get_rng_state()
        try:
            feed = self._feed(loader, total)
            self._agree_on_data(total, feed)
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
            for worker, action in self._execute(schedule):
                finished(worker, action)
            for worker in self._workers:
                worker.end()
            if training:
                self._share_statistics()
            mean = self._agree_on_end(training)
        except Exception as error:
            if is_stall(error):
                raise report(self.world, str(error.__cause__ or error)) from None
            raise
        finally:
            torch.random.set_rng_state(rng)
        if training and self._tracing:
            self._spans = [span for worker in self._workers for span in worker.spans(began_ns)]
            self._last_units = schedule.minibatches
        self._units_run += schedule.minibatches
        if training:
            self._units_trained += schedule.minibatches
            self._epoch += 1
            if self._checkpoints is not None:
                self._write(self._checkpoints)
        return mean

    def _write(self, checkpoints: Checkpoints) -> None:
        position = Position(self._epoch, self._units_trained)
        for stage in self.stages:
            if stage.replica == 0:
                checkpoints.write_part(stage, position)
        if self.rank == 0:
            checkpoints.write_manifest(position)

    def _checkpoints_in(self, folder: str | Path) -> Checkpoints:
        deployment = self._deployment
        layers = [stage.layers for stage in self.plan.stages]
        plan = str((layers, deployment.layout, self.plan.schedule, deployment.pieces, deployment.manner.accumulate))
        return Checkpoints(folder, plan, len(layers))

    def _execute(self, schedule: Schedule) -> Iterator[tuple[Worker, Action]]:
        if self.world.size > 1:
            return carry_out(self._workers[0], schedule)
        return emulate(self._workers, schedule)

    def _feed(self, loader: Any, total: int) -> Feed:
        layout = self._deployment.layout
        if self.world.size > 1:
            start_workers_apart(loader)
        takers = [Taker(stage.replica, len(layout[stage.index])) for stage in self.stages if stage.reads]
        return Feed(
            loader,
            epoch=self._epoch,
            seed=self.seed,
            takers=takers,
            names=[str(node.target) for node in self._deployment.graph.inputs],
            pieces=self._deployment.pieces,
            accumulate=self._deployment.shared,
            length=total,
        )

    def _made(self, training: AnySchedule) -> list[Worker]:
        """The workers of this process, in the order of their ranks."""
        # In the order of the replicas, in which their gradients are added up.
        places = [
            (rank, index, replica)
            for index, ranks in enumerate(training.layout)
            for replica, rank in enumerate(ranks)
            if (index, rank) in self._wiring.ports
        ]
        parts = [self._deployment.cut.part(index) for _, index, _ in places]
        materialize(self._deployment.graph, [part.module for part in parts])
        stages: dict[int, list[Stage]] = {}
        for part, (rank, index, replica) in zip(parts, places, strict=True):
            stage = self._stage(training, part, index, replica, self._wiring.ports[index, rank])
            stages.setdefault(rank, []).append(stage)
        give_back()  # the weights stand in the stashes now
        agreements = {
            rank: self._wiring.reduce(None, "norms", [(2, torch.float64)]) if training.agree else None
            for rank in sorted(stages)
        }
        return [Worker(rank, stages[rank], agreements[rank]) for rank in sorted(stages)]

    def _stage(self, training: AnySchedule, part: Part, index: int, replica: int, ports: Ports) -> Stage:
        stash = WeightStash(part.module, training.versions(index), self._optimizer, overwrite=not training.stashes)
        step = Step(
            stash.optimizer,
            self._scheduler,
            self._clip,
            LossScale(self._first_scale),
            microbatches=self._deployment.pieces,
            average=not self._deployment.cuts_minibatches,
        )
        averager = None
        if len(training.layout[index]) > 1:
            packing = Packing(stash.trained)
            averager = Averager(packing, self._wiring.reduce(index, "gradients", packing.buckets))
        planned = self.plan.stages[index].recompute
        return Stage(
            index,
            replica,
            part,
            self._deployment.cut.links,
            stash,
            step,
            averager,
            ports,
            self._loss,
            self.seed,
            recompute=planned if self._recompute is None else self._recompute,
            precision=self.precision or contextlib.nullcontext,
            compiler=self._compiler,
        )

    def _shared_statistics(self) -> list[Statistics]:
        shared = []
        for stage in sorted(self.stages, key=lambda each: (each.index, each.replica)):
            replicas, statistics = len(self._deployment.layout[stage.index]), Statistics(stage.module)
            if replicas > 1 and statistics.buckets:
                statistics.share(self._wiring.reduce(stage.index, "statistics", statistics.buckets), replicas)
                shared.append(statistics)
        return shared

    def _share_statistics(self) -> None:
        for statistics in self._statistics:
            statistics.hand_in()
        for statistics in self._statistics:
            statistics.take()

    def _completed(self, own: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Also what no stage uses, and further names of weights that have several."""
        model, recipe = self._deployment.graph.module, self._deployment.graph.recipe
        names: dict[int, str] = {}
        for name, parameter in model.named_parameters(remove_duplicate=False):
            if name in own:
                names.setdefault(id(parameter), name)
        for name, parameter in model.named_parameters(remove_duplicate=False):
            if name not in own and id(parameter) in names:
                own[name] = own[names[id(parameter)]]
        whole = {name: own.get(name, value) for name, value in model.state_dict().items()}
        missing = [name for name, value in whole.items() if value.is_meta]
        made = recipe.make(missing) if recipe and missing else {}
        return {**whole, **{name: value.detach() for name, value in made.items()}}

    def _verify(self, schedule: AnySchedule) -> None:
        if schedule not in self._verified:
            verify_around(schedule, self.world.rank if self.world.size > 1 else None)
            self._verified.add(schedule)

    def _agree_on_start(self) -> None:
        deployment: Deployment = self._deployment
        model = "random numbers that the model is made of"
        facts = {
            "boundaries that the example leads to": [
                (each.layer, each.shape, each.dtype_name) for line in deployment.lines.values() for each in line
            ],
            "plan": str([(stage.layers, stage.ranks) for stage in self.plan.stages]),
            "schedule": (self.plan.schedule, deployment.pieces, deployment.manner.chunks, deployment.manner.accumulate),
            "seed": self.seed,
            "version of pipedream_hpc": __version__,
            "version of torch": torch.__version__,
            "byte order": platform.machine(),
            model: getattr(deployment.graph.recipe, "fingerprint", None),
        }
        answers = agree(self.world, facts, limit_s=self._stall_limit_s)
        remedies = dict.fromkeys(facts, "start every rank with the same")
        same(answers, {**remedies, model: "call torch.manual_seed in the function that builds the model"})

    def _agree_on_data(self, minibatches: int, feed: Feed) -> None:
        facts = {"minibatches": minibatches, "data": feed.fingerprint()}
        answers = agree(self.world, facts, limit_s=self._stall_limit_s)
        same(answers, {"minibatches": "give every rank the same loader"})
        seen = [(rank, answer["data"]) for rank, answer in enumerate(answers) if answer["data"] is not None]
        for rank, data in seen:
            if data != seen[0][1]:
                raise PipedreamError(
                    f"ranks {seen[0][0]} and {rank} read different first minibatches: the order of the data must "
                    "depend on torch's random numbers alone (DataLoader(shuffle=True) does), not on the rank"
                )

    def _agree_on_end(self, training: bool) -> float:
        """Compare replicas; returns the mean score over all samples, the same on every rank."""
        facts: dict[str, Any] = {
            "scores": [score for stage in self.stages if stage.output for score in stage.tally.read()],
            "weights": [
                (stage.index, worker.rank, _checksum(stage))
                for worker in self._workers
                for stage in worker.stages.values()
                if training and stage.averager is not None
            ],
        }
        answers = agree(self.world, facts, limit_s=self._stall_limit_s)
        first: dict[int, tuple[int, int]] = {}
        for index, rank, checksum in sorted(each for answer in answers for each in answer["weights"]):
            other, expected = first.setdefault(index, (rank, checksum))
            if checksum != expected:
                raise PipedreamError(
                    f"replicas of stage {index} have drifted apart: after this epoch the weights of ranks {other} and "
                    f"{rank} differ: random numbers or data of the model must not depend on the rank"
                )
        scores = sorted(score for answer in answers for score in answer["scores"])
        samples = sum(count for _, _, count in scores)
        return sum(mean * count for _, mean, count in scores) / samples if samples else float("nan")


def _checksum(stage: Stage) -> int:
    """Of the newest weights and the buffers of a stage."""
    total = 0
    for tensor in (*stage.stash.trained, *stage.module.buffers()):
        flat = tensor.detach().cpu().contiguous().view(-1)
        if flat.numel():
            total = zlib.crc32(flat.view(torch.uint8).numpy().data, total)
    return total


def _known(compiler: str | None) -> str | None:
    if compiler is not None and compiler not in (known := torch.compiler.list_backends(exclude_tags=())):
        raise PipedreamError(f"there is no compiler '{compiler}': choose from {', '.join(sorted(known))}")
    return compiler


def _length(loader: Any) -> int:
    try:
        return len(loader)
    except TypeError:
        raise PipedreamError(
            f"{type(loader).__name__} has no length: the schedule is fixed before the first minibatch, "
            "so the loader must know how many there are (give its dataset a __len__)"
        ) from None
