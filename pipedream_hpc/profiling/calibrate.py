"""Calibrate a profile: train some minibatches in two real stages in this process, and scale the profile to them.

Time stamps between layers (see clocked) do not include what a stage does in addition: messages, weight versions,
seeds of random layers, gradient handling, Python. For layers that take microseconds this is a large part of the time::

    clocked       layer 0 │ layer 1 │ layer 2 │                   gives each layer's share
    calibration   ├ forward ┤ ├ forward ┤├ backward ┤├ update ┤ ├ backward ┤├ update ┤       gives the sums
                             ◦ ◦                                 ◦                           and the time in between
"""

from __future__ import annotations

import dataclasses
import itertools
import statistics
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from pipedream_hpc.cluster.world import World
from pipedream_hpc.job import Job
from pipedream_hpc.model.counting import count
from pipedream_hpc.model.graph import LayerGraph
from pipedream_hpc.model.preserve_state import preserve_state
from pipedream_hpc.model.randomness import preserve_rng_state
from pipedream_hpc.planning.even import even_plan
from pipedream_hpc.planning.profile import LayerProfile, Profile
from pipedream_hpc.runtime.comm.tensor_view import CPU
from pipedream_hpc.runtime.execution.emulator import emulate
from pipedream_hpc.runtime.execution.position import PassPosition
from pipedream_hpc.runtime.execution.run_losses import RunLosses
from pipedream_hpc.runtime.launch.build import TrainSetup, build_workers, microbatch_loader
from pipedream_hpc.runtime.launch.deployment import deploy
from pipedream_hpc.runtime.launch.run_plan import RunSchedule, plan_as_run
from pipedream_hpc.runtime.launch.wiring import local_wiring
from pipedream_hpc.schedule.trace import Span

#: Every rank calibrates by itself, however many were started.
_ONE_RANK = World(0, 1, 0, 1, "")


@dataclass(frozen=True)
class Calibration:
    """Median seconds per minibatch in training.

    Attributes:
        forward_s: forwards of all stages, including the loss.
        backward_s: backwards of all stages.
        update_s: updates of all stages.
        overhead_s: everything else that one stage does, including the exchange of a tensor.
    """

    forward_s: float
    backward_s: float
    update_s: float
    overhead_s: float


def calibrate(
    graph: LayerGraph,
    job: Job,
    data: Sequence[Any],
    *,
    device: torch.device = CPU,
) -> Calibration | None:
    """Train minibatches of the job in two even stages and return the median times; None for fewer than two minibatches.

    A model of a single layer is one stage. The weights are copied; the model is left unchanged.

    Args:
        graph: the captured model, built.
        job: provides loss, optimizer and training options.
        data: (inputs, target) pairs, already read; the first one is not counted.
        device: device of the stages.
    """
    if len(data) < 2:
        return None
    config = dataclasses.replace(
        job.train_config, gradient_accumulation_steps=1, recompute=None, compile_backend=None, seed=0, leaf_modules=()
    )
    if config.clip_grad_over == "model":  # one process has no norm over all ranks: the times are those without clipping
        config = dataclasses.replace(config, clip_grad_norm=None, clip_grad_over="stage")
    # 1F1B without flushes cannot reduce a norm over all stages, as fp16 needs it. A flush after every minibatch costs
    # the same here, where the stages run one after the other.
    name = "1f1b-flush" if config.needs_global_grad_norm else "1f1b"
    schedule = RunSchedule(name, all_reduce_grad_norm=config.needs_global_grad_norm)
    n_stages = min(len(graph.layers), 2)
    plan = plan_as_run(even_plan(count(graph), [1] * n_stages), "the calibration", schedule, None)
    deployment = deploy(plan, "the calibration", graph, schedule, _ONE_RANK)
    training = deployment.training(len(data))
    setup = TrainSetup(job.loss_fn, job.optimizer, config, device)
    wiring = local_wiring(training, deployment.edge_tensors, device)
    with preserve_state(graph.module, graph.notes.written_weights()):  # the stages are made of the model's own modules
        losses = RunLosses(wiring.losses, training.layout[-1])
        workers = build_workers(deployment, training, wiring, losses, setup)
        stages = [stage for worker in workers for stage in worker.stages.values()]
        with preserve_rng_state(device):
            loader = microbatch_loader(deployment, stages, data, setup, epoch=0, length=len(data))
            for worker in workers:
                worker.begin(
                    loader,
                    PassPosition("calibration"),
                    training=True,
                    first_microbatch=0,
                    first_trained=0,
                    score_fn=None,
                    trace=True,
                )
            for _ in emulate(workers, training):
                pass
            for worker in workers:
                worker.end()
    return calibration_from([span for worker in workers for span in worker.spans(0)], len(stages))


def calibration_from(spans: Sequence[Span], n_stages: int) -> Calibration:
    """Return the median times of the spans of a training in one process, without the first minibatch."""
    durations: dict[tuple[str, int], list[float]] = defaultdict(list)
    for span in spans:
        durations[span.kind, span.stage].append(span.end_s - span.start_s)
    by_kind: dict[str, float] = defaultdict(float)
    for (kind, _), seconds in durations.items():
        by_kind[kind] += statistics.median(seconds[1:])
    in_order = sorted(spans, key=lambda span: span.start_s)
    between_s = statistics.median(after.start_s - before.end_s for before, after in itertools.pairwise(in_order))
    computed = ("forward", "backward", "optimizer-step")
    other_s = sum(seconds for kind, seconds in by_kind.items() if kind not in computed)
    # Every kind of action in every stage is followed by one gap per minibatch.
    overhead_s = (other_s + between_s * len(durations)) / n_stages
    return Calibration(by_kind["forward"], by_kind["backward"], by_kind["optimizer-step"], overhead_s)


def apply_calibration(profile: Profile, calibration: Calibration) -> Profile:
    """Return `profile` scaled to the sums of the calibration; each layer keeps its share of them."""

    def factor(calibrated_s: float, clocked_s: float) -> float:
        return calibrated_s / clocked_s if clocked_s else 1.0

    forward = factor(calibration.forward_s, sum(layer.forward_s for layer in profile.layers))
    backward = factor(calibration.backward_s, sum(layer.backward_s for layer in profile.layers))
    update = factor(calibration.update_s, sum(layer.update_s for layer in profile.layers))

    def scaled(layer: LayerProfile) -> LayerProfile:
        return dataclasses.replace(
            layer,
            forward_s=layer.forward_s * forward,
            backward_s=layer.backward_s * backward,
            update_s=layer.update_s * update,
        )

    return dataclasses.replace(profile, layers=tuple(map(scaled, profile.layers)), overhead_s=calibration.overhead_s)
