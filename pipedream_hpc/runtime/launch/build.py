"""Build: the workers of this process, made of the plan and the user's training setup."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from pipedream_hpc.config import TrainConfig
from pipedream_hpc.errors import PipedreamError
from pipedream_hpc.job import LossFn, OptimizerFactory
from pipedream_hpc.model.arguments import optional_inputs
from pipedream_hpc.model.averages import weighs_alike
from pipedream_hpc.model.materialize import materialize
from pipedream_hpc.model.precision import Precision, autocast
from pipedream_hpc.model.randomness import seed_modules
from pipedream_hpc.model.recipe import release_memory
from pipedream_hpc.model.stage_module import StageModule
from pipedream_hpc.runtime.comm.staged_allreduce import CopyStream, StagedAllReduce
from pipedream_hpc.runtime.comm.tensor_view import CPU
from pipedream_hpc.runtime.execution.data import MicrobatchLoader, Reader
from pipedream_hpc.runtime.execution.loss_means import LossMeans
from pipedream_hpc.runtime.execution.run_losses import RunLosses
from pipedream_hpc.runtime.execution.split_backward import SplitBackward
from pipedream_hpc.runtime.execution.stage import Stage
from pipedream_hpc.runtime.execution.stage_loss import StageLoss
from pipedream_hpc.runtime.execution.whole_loss import WholeLoss
from pipedream_hpc.runtime.execution.worker import Worker
from pipedream_hpc.runtime.launch.deployment import Deployment
from pipedream_hpc.runtime.launch.wiring import Wiring
from pipedream_hpc.runtime.weights.batchnorm import RunningStats
from pipedream_hpc.runtime.weights.grad_allreduce import BucketLayout, GradAllReduce
from pipedream_hpc.runtime.weights.optimizer_step import LossScale, StageOptimizer
from pipedream_hpc.runtime.weights.stash import WeightStash
from pipedream_hpc.schedule.actions import Layout, OptimizerStep, Schedule

#: The loss scale that fp16 starts with.
_FIRST_LOSS_SCALE = 65536.0


@dataclass(frozen=True)
class TrainSetup:
    """How stages are trained.

    Attributes:
        loss_fn: mean loss of a minibatch from (output, target).
        optimizer: creates the optimizer of a stage from its parameters.
        config: the options.
        device: what this process computes on.
    """

    loss_fn: LossFn
    optimizer: OptimizerFactory
    config: TrainConfig
    device: torch.device = CPU

    @property
    def autocast(self) -> Precision | None:
        """The context that forwards run in; None for the model's own dtypes."""
        return autocast(self.config.precision, self.device.type)

    @property
    def first_loss_scale(self) -> float:
        """The loss scale at first; 1 where losses are not scaled."""
        return _FIRST_LOSS_SCALE if self.config.precision == "fp16" else 1.0


def build_workers(
    deployment: Deployment,
    training: Schedule,
    wiring: Wiring,
    losses: RunLosses,
    setup: TrainSetup,
    check: Callable[[int, StageModule], None] | None = None,
) -> list[Worker]:
    """Create the workers of this process, in the order of their ranks. Collective.

    Args:
        deployment: plan, model and schedule.
        training: a schedule of training.
        wiring: channels and all-reduces.
        losses: of the run.
        setup: how stages are trained.
        check: called with the number and the module of every stage in this process, once it has its weights.
    """
    # In the order of the replicas, in which their gradients are summed.
    places = [
        (rank, index, replica)
        for index, ranks in enumerate(training.layout)
        for replica, rank in enumerate(ranks)
        if (index, rank) in wiring.channels
    ]
    parts = [deployment.partition.stage_module(index) for _, index, _ in places]
    materialize(deployment.graph, parts)
    deployment.graph.on_close.append(seed_modules(deployment.graph.module, deployment.graph.notes))
    first: dict[int, StageModule] = {}
    for part, (_, index, _) in zip(parts, places, strict=True):
        if first.setdefault(index, part) is part and check is not None:
            part.move_weights(setup.device)
            part.move_tensors(setup.device)
            check(index, part)
            release_memory()  # of the gradients that it computed
    for part, (_, index, _) in zip(parts, places, strict=True):
        if first[index] is not part:
            part.share_with(first[index])
    for part, (_, index, _) in zip(parts, places, strict=True):
        stateful = part.stateful_modules()
        if stateful and len(training.layout[index]) > 1:
            raise PipedreamError(
                f"module '{stateful[0]}' changes its own state in every forward, and each of the "
                f"{len(training.layout[index])} replicas of stage {index} would have another: give stage {index} one "
                "replica"
            )
        if _pools(deployment, training):
            _refuse_hooks_on_sums(part)
        written = deployment.graph.notes.writes_parameters & set(part.entries)
        if written and _forwards_repeat(deployment, training, setup, index):
            raise PipedreamError(
                f"the forward of the model writes weight '{min(written)}', but in stage {index} forwards run more than "
                "once per optimizer step, or on other weights than the newest: use the schedule '1f1b-flush' with one "
                "microbatch and one replica, and neither recompute nor master_weights"
            )
    stages: dict[int, list[Stage]] = {}
    for part, (rank, index, replica) in zip(parts, places, strict=True):
        stages.setdefault(rank, []).append(_stage(deployment, training, wiring, losses, setup, part, index, replica))
    release_memory()  # the stashes hold the weights now
    exchange = deployment.schedule.all_reduce_grad_norm
    norms = {
        rank: wiring.all_reduce(None, "norms", [(2, torch.float64)]) if exchange else None for rank in sorted(stages)
    }
    return [Worker(rank, stages[rank], norms[rank], setup.device) for rank in sorted(stages)]


def build_running_stats(stages: Sequence[Stage], layout: Layout, wiring: Wiring) -> list[RunningStats]:
    """Create the running statistics, such as BatchNorm's, that replicas average at an epoch's end. Collective."""
    shared = []
    for stage in sorted(stages, key=lambda each: (each.index, each.replica)):
        replicas, stats = len(layout[stage.index]), RunningStats(stage.stage_module.running_stats())
        if replicas > 1 and stats.buckets:
            stats.share(wiring.all_reduce(stage.index, "running statistics", stats.buckets), replicas)
            shared.append(stats)
    return shared


def microbatch_loader(
    deployment: Deployment,
    stages: Sequence[Stage],
    loader: Any,
    setup: TrainSetup,
    *,
    epoch: int,
    length: int,
    training: bool = True,
) -> MicrobatchLoader:
    """Create one pass over `loader` for those of the stages that read data."""
    return MicrobatchLoader(
        loader,
        epoch=epoch,
        seed=setup.config.seed,
        readers=[Reader(stage.replica, len(deployment.layout[stage.index])) for stage in stages if stage.reads_data],
        n_microbatches=deployment.n_microbatches,
        gradient_accumulation_steps=deployment.minibatches_per_loss,
        length=length,
        example=deployment.graph.inputs,
        batch_dims=deployment.graph.batch_dims,
        may_be_larger=not training,
        optional=() if training else optional_inputs(deployment.graph.module),
        device=setup.device,
    )


def _stage(
    deployment: Deployment,
    training: Schedule,
    wiring: Wiring,
    losses: RunLosses,
    setup: TrainSetup,
    part: StageModule,
    index: int,
    replica: int,
) -> Stage:
    config = setup.config
    if part.is_last:
        part.add_loss(setup.loss_fn)
    stash = WeightStash(
        part.module,
        training.versions(index),
        setup.optimizer,
        overwrite=not training.stashes,
        master_weights=config.master_weights,
        entries=part.entries,
        bound=part.bound,
        device=setup.device,
        stage=index,
    )
    if setup.device.type != "cpu":
        part.move_tensors(setup.device)
    optimizer = StageOptimizer(
        stash.optimizer,
        config.lr_scheduler,
        LossScale(setup.first_loss_scale),
        clip_grad_norm=config.clip_grad_norm,
        clip_grad_over=config.clip_grad_over,
        n_microbatches=deployment.n_microbatches,
        average=not deployment.schedule.cuts_minibatches,
    )
    grad_allreduce = None
    if len(training.layout[index]) > 1:
        buckets = BucketLayout(stash.trained)
        all_reduce = wiring.all_reduce(index, "gradients", buckets.buckets)
        if setup.device.type == "cuda":
            # The last bucket says which parameters had a gradient: the host reads it.
            all_reduce = StagedAllReduce(all_reduce, buckets.buckets, CopyStream(setup.device), n_host_buckets=1)
        grad_allreduce = GradAllReduce(buckets, all_reduce)
    return Stage(
        index,
        replica,
        part,
        deployment.partition.edges,
        stash,
        optimizer,
        grad_allreduce,
        wiring.channels[index, training.layout[index][replica]],
        _loss_of(part, index, optimizer, losses, deployment, training, setup),
        config.seed,
        split_backward=SplitBackward(part.modules, stash.trains) if training.splits(index) else None,
        recompute=deployment.plan.stages[index].recompute,
        precision=setup.autocast,
        compile_backend=config.compile_backend,
    )


def _loss_of(
    part: StageModule,
    index: int,
    optimizer: StageOptimizer,
    losses: RunLosses,
    deployment: Deployment,
    training: Schedule,
    setup: TrainSetup,
) -> StageLoss:
    means = whole = None
    if part.is_last and deployment.n_microbatches > 1:
        in_forward = deployment.graph.notes.averages
        if in_forward or not weighs_alike(setup.loss_fn):
            means = LossMeans(setup.loss_fn, deployment.n_microbatches, in_forward=in_forward)
        if setup.config.check_model:
            whole = WholeLoss(
                setup.loss_fn, deployment.graph.batch_dims, deployment.n_microbatches, len(training.layout[index])
            )
    return StageLoss(
        setup.loss_fn,
        losses,
        optimizer,
        weights_of_others=part.weights_of_others,
        means=means,
        whole=whole,
        pools=_pools(deployment, training),
    )


def _refuse_hooks_on_sums(part: StageModule) -> None:
    """Refuse hooks on accumulated gradients, of which a stage has those of whole rounds only."""
    for name, parameter in part.module.named_parameters():
        if parameter.requires_grad and getattr(parameter, "_post_accumulate_grad_hooks", None):
            raise PipedreamError(
                f"parameter '{name}' has a hook of register_post_accumulate_grad_hook, which would run once per "
                "optimizer step, and not once per backward: where a step takes several microbatches or replicas, use "
                "register_hook of the parameter, or register_step_pre_hook of the optimizer"
            )


def _forwards_repeat(deployment: Deployment, training: Schedule, setup: TrainSetup, index: int) -> bool:
    """Return whether forwards of a stage run more than once per optimizer step, or on other weights than the newest."""
    return (
        training.versions(index) > 1
        or len(training.layout[index]) > 1
        or deployment.plan.stages[index].recompute
        or setup.config.master_weights
        or _pools(deployment, training)
    )


def _pools(deployment: Deployment, training: Schedule) -> bool:
    """Return whether rounds may have several microbatches, in any stage."""
    schedule = deployment.schedule
    if schedule.written is None:
        most = schedule.n_microbatches * schedule.gradient_accumulation_steps * max(map(len, training.layout))
        return most > 1
    ranks = {rank for ranks in training.layout for rank in ranks}
    actions = (action for rank in sorted(ranks) for action in training.actions(rank))
    return any(isinstance(action, OptimizerStep) and action.n_microbatches > 1 for action in actions)
