"""Check model: which comparison of the stages with the user's program a run can make before it trains, and making it.

::

    the whole model fits on rank 0     same_program: the model by itself, and its stages     on rank 0, then let go
    it does not                        same_stage: each stage by itself                      on every rank
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import torch
from torch.utils._pytree import tree_map

from pipedream_hpc.cluster.world import World
from pipedream_hpc.config import TrainConfig
from pipedream_hpc.model.arguments import Arguments
from pipedream_hpc.model.graph import LayerGraph
from pipedream_hpc.model.precision import autocast
from pipedream_hpc.model.stage_module import StageModule
from pipedream_hpc.runtime.comm.handshake import exchange
from pipedream_hpc.runtime.execution.data import to_device
from pipedream_hpc.runtime.launch.build import TrainSetup
from pipedream_hpc.runtime.launch.deployment import Deployment
from pipedream_hpc.runtime.launch.same_program import check_microbatches, check_same_program
from pipedream_hpc.runtime.launch.same_stage import check_stage

#: Forwards of the whole model that the check takes, where a backward is as long as two of them.
_FORWARDS = 10
#: What one thread computes at least, in floating-point operations per second.
_FLOPS_PER_S = 10e9


def why_not_whole(graph: LayerGraph, available_bytes: int, limit_s: float) -> str:
    """Return why the whole model cannot be checked in this process; empty if it can.

    A built model is in memory anyway; one that was given as a function would have to be built for the check alone.

    Args:
        graph: the captured model.
        available_bytes: memory that may be used; half of it is left to what is computed within modules.
        limit_s: seconds that the other ranks wait; half of it is left to building the model.
    """
    if graph.recipe is None:
        return ""
    parameters = list(graph.module.parameters())
    gradients = sum(each.nbytes for each in parameters if each.requires_grad)
    outputs = sum(value.nbytes for call in graph.training.calls for value in call.values)
    needed = sum(each.nbytes for each in parameters) + 2 * (gradients + outputs)
    if needed > available_bytes // 2:
        return (
            f"it takes {needed / 1e9:.1f} GB with its gradients, more than half of the {available_bytes / 1e9:.1f} GB "
            "that the host of rank 0 has left"
        )
    took_s = _FORWARDS * sum(layer.flops for layer in graph.layers) / (_FLOPS_PER_S * torch.get_num_threads())
    if took_s > limit_s / 2:
        return f"that could take rank 0 {took_s:.0f} s, more than half of the stall_limit_s that the others wait for it"
    return ""


def check_whole(
    deployment: Deployment, minibatch: Arguments, microbatches: Sequence[Arguments], config: TrainConfig
) -> None:
    """Compare the model by itself with its microbatches, and with its stages."""
    graph, precision = deployment.graph, autocast(config.precision)
    if len(microbatches) > 1:
        check_microbatches(graph, minibatch, microbatches, precision)
    n_stages = len(deployment.plan.stages)
    if n_stages > 1 or graph.notes.random_functions:
        check_same_program(
            graph, deployment.partition, n_stages, microbatches[0], seed=config.seed, precision=precision
        )


class StageChecks:
    """Checks the stages of this process one by one, where the whole model is not checked.

    Args:
        deployment: plan, model and schedule.
        microbatch: the model's arguments for one microbatch.
        setup: how stages are trained.
    """

    def __init__(self, deployment: Deployment, microbatch: Arguments, setup: TrainSetup) -> None:
        self._deployment, self._setup, self._unchecked = deployment, setup, list[str]()
        args, kwargs = tree_map(lambda each: to_device(each, setup.device), (microbatch.args, microbatch.kwargs))
        self._arguments = Arguments(args, kwargs, microbatch.names)

    def __call__(self, index: int, stage: StageModule) -> None:
        reason = check_stage(
            self._deployment.partition,
            index,
            stage,
            self._arguments,
            seed=self._setup.config.seed,
            precision=self._setup.autocast,
            device=self._setup.device,
        )
        if reason and reason not in self._unchecked:
            self._unchecked.append(reason)

    def report(self, world: World, why_not: str, limit_s: float) -> None:
        """Warn on rank 0 about what was not checked. Collective."""
        answers = exchange(world, {"unchecked": self._unchecked}, limit_s=limit_s)
        several = "" if self._deployment.n_microbatches == 1 else ", that a minibatch gives what its microbatches give,"
        reasons = dict.fromkeys(reason for answer in answers for reason in answer["unchecked"])
        if world.is_root:
            warnings.warn(
                f"each stage was checked by itself, and not the whole model, because {why_not}: unchecked is that the "
                f"stages together compute what the model computes{several} and that the function builds the same model "
                "at every call and on every rank" + "".join(f"; {each}" for each in reasons),
                stacklevel=2,
            )
