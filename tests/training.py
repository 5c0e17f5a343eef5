"""Train the models of tests/chains.py: in this process, or on real ranks, many trainings in one launch."""

from __future__ import annotations

import os
import pickle
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import chains
import ranks
import torch
from torch import nn

from pipedream_hpc import Pipeline, RunConfig, ScheduleConfig, TrainConfig, core
from pipedream_hpc.job import accuracy
from pipedream_hpc.schedule.trace import Trace


@dataclass(frozen=True)
class Training:
    """One training.

    Attributes:
        plan: replicas of the stages, or the number of stages.
        schedule: schedule, microbatches and chunks.
        train_config: how stages are trained.
        model: a name in chains.MODELS.
        optimizer: a name in chains.OPTIMIZERS.
        epochs: minibatches of every epoch.
        last: samples of the last minibatch of every epoch.
        checkpoints: folder for a checkpoint after every epoch, in which {rank} is replaced by the rank.
        resumed: epochs that `checkpoints` should hold at first; None for a run that does not resume.
    """

    plan: int | tuple[int, ...]
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    train_config: TrainConfig = field(default_factory=TrainConfig)
    model: str = "plain"
    optimizer: str = "sgd"
    epochs: tuple[int, ...] = (3,)
    last: int = chains.SAMPLES
    checkpoints: str | None = None
    resumed: int | None = None

    @property
    def replicas(self) -> list[int]:
        """Replicas of every stage."""
        return [1] * self.plan if isinstance(self.plan, int) else list(self.plan)

    @property
    def minibatches(self) -> list[list[tuple[torch.Tensor, torch.Tensor]]]:
        """The minibatches of every epoch."""
        return [chains.minibatches(count, last=self.last) for count in self.epochs]


@dataclass
class Report:
    """Results of a training.

    Attributes:
        ranks: processes that trained.
        losses: mean loss of every epoch.
        accuracies: mean accuracy after every epoch, over its minibatches.
        traces: the trace of every epoch.
        allocations: allocations of the core on every rank, after every epoch.
        slabs: weight slabs by rank; with several stages on a rank, of the last one.
        weights: the state dict.
        stage_of: the stage of every parameter.
    """

    ranks: int
    losses: list[float] = field(default_factory=list)
    accuracies: list[float] = field(default_factory=list)
    traces: list[Trace] = field(default_factory=list)
    allocations: list[list[int]] = field(default_factory=list)
    slabs: dict[int, int] = field(default_factory=dict)
    weights: dict[str, torch.Tensor] = field(default_factory=dict)
    stage_of: dict[str, int] = field(default_factory=dict)

    @property
    def scores(self) -> str:
        """Losses and accuracies, to every bit; the same text where they are equal, NaN included."""
        return f"{self.losses} {self.accuracies}"


def train(training: Training) -> Report:
    """Train on the ranks that were started; the same report on every rank, but for the weights."""
    model = chains.MODELS[training.model]()
    pipeline = Pipeline(
        model,
        loss_fn=nn.CrossEntropyLoss(),
        optimizer=chains.OPTIMIZERS[training.optimizer],
        example_inputs=chains.example(),
        plan=training.plan,
        schedule=training.schedule,
        train_config=replace(training.train_config, leaf_modules=(chains.Functional,)),
        run_config=RunConfig(trace=True, stall_limit_s=30),
    )
    report = Report(pipeline.world.size, stage_of=pipeline.stage_of_parameters())
    folder = (training.checkpoints or "").format(rank=os.environ.get("OMPI_COMM_WORLD_RANK", "0"))
    if training.resumed is not None:
        assert pipeline.resume(folder) == training.resumed
    allocations = []
    for batches in training.minibatches:
        report.losses.append(pipeline.fit(batches))
        report.accuracies.append(pipeline.evaluate(batches, {"accuracy": accuracy})["accuracy"])
        report.traces.append(pipeline.last_trace())
        on_ranks = pipeline.world.size > 1
        allocations.append(core.load_weights().allocations() + (core.load_comm().allocations() if on_ranks else 0))
        if folder:
            pipeline.save_checkpoint(folder)
    slabs = {worker.rank: stage.stash.slabs for worker in pipeline._run.workers for stage in worker.stages.values()}
    scores = [report.scores]
    report.slabs, report.allocations = slabs, [allocations]
    if pipeline.world.comm is not None:
        scores = pipeline.world.comm.allgather(report.scores)
        report.allocations = pipeline.world.comm.allgather(allocations)
        report.slabs = {rank: count for part in pipeline.world.comm.allgather(slabs) for rank, count in part.items()}
    assert set(scores) == {report.scores}, "every rank returns the same scores"
    report.weights = pipeline.state_dict()
    pipeline.close()
    return report


def in_one_process(training: Training) -> Report:
    """Return the report of all ranks in this process."""
    torch.set_num_threads(1)
    return train(training)


def train_all(trainings: Sequence[Training]) -> list[Report]:
    """Train one after the other on the ranks that were started."""
    torch.set_num_threads(1)
    return [train(each) for each in trainings]


def on_ranks(count: int, trainings: Sequence[Training], timeout: float = 240) -> list[Report]:
    """Return the reports of trainings on `count` ranks, in order."""
    reports = ranks.call(count, train_all, list(trainings), timeout)
    assert {report.ranks for report in reports} <= {count}, "the ranks really ran"
    return reports


def launched(count: int, trainings: Sequence[Training], folder: Path, timeout: float = 240) -> list[Report]:
    """Return the reports of trainings in a launch of their own, in order; 0 for a process without a launcher."""
    source, target = folder / f"trainings-{count}", folder / f"reports-{count}"
    source.write_bytes(pickle.dumps(list(trainings)))
    finished = ranks.python(count, "train_chain.py", source, target, timeout=timeout)
    assert finished.status == 0, "\n".join([finished.output, *map(str, trainings)])
    reports: list[Report] = pickle.loads(target.read_bytes())
    assert {report.ranks for report in reports} <= {max(1, count)}, "the ranks really ran"
    return reports


def assert_bitwise(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor], what: object = "") -> None:
    """Assert that the same tensors are in both, with the same bits."""
    assert left.keys() == right.keys(), what
    assert [name for name in left if not torch.equal(left[name], right[name])] == [], what
