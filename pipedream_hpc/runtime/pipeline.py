"""Pipeline: what a user's program holds in its hand.

plan ──► stage modules ──► workers ──► fit, evaluate
                              ▲
          all of them in one process, or this rank's own under mpirun / srun
"""

from __future__ import annotations

import math
import platform
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pipedream_hpc import __version__
from pipedream_hpc.cluster.threads import threads_per_rank
from pipedream_hpc.cluster.world import World, join
from pipedream_hpc.errors import PipedreamError
from pipedream_hpc.job import Loss, OptimizerFactory
from pipedream_hpc.model.capture import LayerGraph, capture
from pipedream_hpc.model.cut import check_ties, stage_module
from pipedream_hpc.planning.plan import Plan
from pipedream_hpc.runtime.deployment import boundaries_of, check_runnable, cuts_of, resolve
from pipedream_hpc.runtime.emulator import carry_out, emulate
from pipedream_hpc.runtime.feed import Feed
from pipedream_hpc.runtime.handshake import agree, same
from pipedream_hpc.runtime.stall import is_stall, report
from pipedream_hpc.runtime.stash import WeightStash
from pipedream_hpc.runtime.transport import Boundary
from pipedream_hpc.runtime.wiring import Wiring, local_wiring, mpi_wiring
from pipedream_hpc.runtime.worker import Worker
from pipedream_hpc.schedule.actions import Action, Backward, Schedule
from pipedream_hpc.schedule.forward_only import ForwardOnly
from pipedream_hpc.schedule.one_f_one_b import OneFOneB
from pipedream_hpc.schedule.trace import Span, Trace
from pipedream_hpc.schedule.verifier import verify_around


def accuracy(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Fraction of samples whose largest output is at the target: (n, classes), (n,) -> ()."""
    return (output.argmax(dim=1) == target).float().mean()


class Pipeline:
    """Train a model with 1F1B and weight stashing.

    Started by itself, a program runs all ranks of the plan in its one process; started by mpirun
    or srun on as many ranks as the plan has, each runs its own. The numbers are the same.

    Args:
        model: takes one tensor, returns one tensor. Build it with the same seed on every rank.
        loss: mean loss of a minibatch from (output, target).
        optimizer: called once per stage with the stage's parameters, such as
            `functools.partial(torch.optim.SGD, lr=0.1)`.
        example: one minibatch of inputs, as large as they will get; only shape and dtype are used.
        plan: a Plan, the file of one, or a number of stages to cut the model into evenly (by
            counted floating-point operations: the same cut on every machine).
        leaves: module classes that torch.fx cannot look into and is to keep whole.
        seed: order of the data and dropout masks depend on it and on nothing else.
        stall_limit_s: seconds a rank waits for another before it says for whom, and stops.
        trace: whether `last_trace` is to be had.

    Raises:
        PipedreamError: the plan does not fit the model or the number of ranks.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        loss: Loss,
        optimizer: OptimizerFactory,
        example: torch.Tensor,
        plan: Plan | str | Path | int,
        leaves: Sequence[type[nn.Module]] = (),
        seed: int = 0,
        stall_limit_s: float = 300.0,
        trace: bool = False,
    ) -> None:
        self.world: World = join()
        graph = capture(model, example, leaves)
        self.plan = resolve(plan, graph)
        name = str(plan) if isinstance(plan, str | Path) else "the plan"
        cuts = cuts_of(self.plan, graph, name)
        check_ties(graph, cuts)
        check_runnable(self.plan, name, self.world)
        self._seed, self._stall_limit_s, self._tracing = seed, stall_limit_s, trace
        self._epoch = self._minibatches_run = 0
        self._verified: set[OneFOneB | ForwardOnly] = set()
        self._spans: list[Span] | None = None
        self._last_minibatches = 0
        boundaries = boundaries_of(graph, cuts)
        self._agree_on_start(seed, boundaries)
        if self.plan.ranks > 1 or self.world.size > 1:
            torch.set_num_threads(threads_per_rank(max(self.plan.ranks, self.world.local_size)))
        slots = [stage.in_flight + 1 for stage in self.plan.stages]
        self._wiring: Wiring = (
            mpi_wiring(self.world, self.plan.layout, boundaries, slots, stall_limit_s)
            if self.world.size > 1
            else local_wiring(self.plan.layout, boundaries, slots)
        )
        self._workers = [self._worker(graph, cuts, rank, loss, optimizer, seed) for rank in sorted(self._wiring.ports)]

    @property
    def rank(self) -> int:
        """This process's rank; 0 when all ranks run in one process."""
        return self.world.rank

    @property
    def last_stage(self) -> int:
        return len(self.plan.stages) - 1

    def fit(self, loader: Any, on_minibatch: Callable[[int, int], None] | None = None) -> float:
        """Train one epoch; returns the mean loss per sample, the same on all ranks.

        Args:
            loader: yields (input, target) minibatches; has a length.
            on_minibatch: called with (done, total) whenever the input stage has finished one.

        Raises:
            PipedreamError: ranks read different data, or a minibatch is larger than the example.
        """

        def finished(worker: Worker, action: Action) -> None:
            if on_minibatch is not None and worker is self._workers[0] and isinstance(action, Backward):
                on_minibatch(action.minibatch + 1, total)

        total = _length(loader)
        return self._pass(loader, OneFOneB(self.plan.layout, total), None, finished)

    def evaluate(self, loader: Any, metric: Loss = accuracy) -> float:
        """Mean of `metric` per sample over `loader`, forward only, on the newest weights.

        Moves no weight, BatchNorm statistic or random number generator. The same on all ranks.
        """
        return self._pass(loader, ForwardOnly(self.plan.layout, _length(loader)), metric, lambda *_: None)

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Newest weights and buffers of the whole model under the model's own names.

        Collective. The whole on rank 0, empty elsewhere.
        """
        own: dict[str, torch.Tensor] = {}
        for worker in self._workers:
            worker.stash.use_newest()
            own.update((k, v.detach().clone()) for k, v in worker.module.state_dict().items())
        if self.world.comm is None or self.world.size == 1:
            return own
        parts = self.world.comm.gather(own, root=0)
        return {name: value for part in parts or () for name, value in part.items()}

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
        return Trace("measured", self.plan.layout, self._last_minibatches, tuple(spans))

    def close(self) -> None:
        """Give back the channels. Collective; called at exit if not before."""
        self._wiring.close()

    def __enter__(self) -> Pipeline:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self.close()

    def _pass(
        self,
        loader: Any,
        schedule: OneFOneB | ForwardOnly,
        metric: Loss | None,
        finished: Callable[[Worker, Action], None],
    ) -> float:
        """Run one schedule over one pass of the loader; `metric` None means training."""
        training = metric is None
        self._verify(schedule)
        sides = self._sides()
        rng = torch.random.get_rng_state()
        try:
            feed = Feed(loader, epoch=self._epoch, seed=self._seed, sides=sides)
            self._agree_on_data(schedule, feed, sides)
            for worker in self._workers:
                worker.begin(
                    feed,
                    self._minibatches_run,
                    training=training,
                    score=metric or worker.loss,
                    trace=training and self._tracing,
                )
            began_ns = self._wiring.common_epoch_ns()
            for worker, action in self._execute(schedule):
                finished(worker, action)
            for worker in self._workers:
                worker.end()
        except Exception as error:
            if is_stall(error):
                raise report(self.world, str(error.__cause__ or error)) from None
            raise
        finally:
            torch.random.set_rng_state(rng)
        if training and self._tracing:
            self._spans = [span for worker in self._workers for span in worker.spans(began_ns)]
            self._last_minibatches = schedule.minibatches
        self._minibatches_run += schedule.minibatches
        self._epoch += training
        return self._from_output_stage()

    def _execute(self, schedule: Schedule) -> Iterator[tuple[Worker, Action]]:
        if self.world.size > 1:
            return carry_out(self._workers[0], schedule)
        return emulate(self._workers, schedule)

    def _from_output_stage(self) -> float:
        """The mean that the output stage tallied, on every rank."""
        mean = next((w.tally.mean() for w in self._workers if w.stage == self.last_stage), math.nan)
        if self.world.comm is not None and self.world.size > 1:
            mean = self.world.comm.bcast(mean, root=self.plan.layout[self.last_stage][0])
        return float(mean)

    def _worker(
        self,
        graph: LayerGraph,
        cuts: list[tuple[int, int]],
        rank: int,
        loss: Loss,
        optimizer: OptimizerFactory,
        seed: int,
    ) -> Worker:
        stage = self.plan.stage_of(rank)
        module = stage_module(graph, *cuts[stage])
        stash = WeightStash(module, self.plan.stages[stage].in_flight, optimizer)
        return Worker(rank, stage, module, stash, self._wiring.ports[rank], loss, seed)

    def _sides(self) -> frozenset[str]:
        stages = {worker.stage for worker in self._workers}
        sides = {"input"} if 0 in stages else set()
        return frozenset(sides | ({"target"} if self.last_stage in stages else set()))

    def _verify(self, schedule: OneFOneB | ForwardOnly) -> None:
        if schedule not in self._verified:
            verify_around(schedule, self.world.rank if self.world.size > 1 else None)
            self._verified.add(schedule)

    def _agree_on_start(self, seed: int, boundaries: list[Boundary]) -> None:
        facts = {
            "plan": str([(stage.layers, stage.ranks) for stage in self.plan.stages]),
            "seed": seed,
            "boundaries that the example leads to": [(each.shape, each.dtype_name) for each in boundaries],
            "version of pipedream_hpc": __version__,
            "version of torch": torch.__version__,
            "byte order": platform.machine(),
        }
        answers = agree(self.world, facts, limit_s=self._stall_limit_s)
        same(answers, dict.fromkeys(facts, "start every rank with the same"))

    def _agree_on_data(self, schedule: Schedule, feed: Feed, sides: frozenset[str]) -> None:
        facts = {"minibatches": schedule.minibatches, "data": feed.fingerprint() if sides else None}
        answers = agree(self.world, facts, limit_s=self._stall_limit_s)
        same(answers, {"minibatches": "give every rank the same loader"})
        seen = [(rank, answer["data"]) for rank, answer in enumerate(answers) if answer["data"] is not None]
        for rank, data in seen:
            if data != seen[0][1]:
                raise PipedreamError(
                    f"ranks {seen[0][0]} and {rank} read different first minibatches: the order of the data must "
                    "depend on torch's random numbers alone (DataLoader(shuffle=True) does), not on the rank"
                )


def _length(loader: Any) -> int:
    try:
        return len(loader)
    except TypeError:
        raise PipedreamError(
            f"{type(loader).__name__} has no length: the schedule is fixed before the first minibatch, "
            "so the loader must know how many there are (give its dataset a __len__)"
        ) from None
