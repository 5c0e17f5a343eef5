"""The calibration gives the sums of the times, the clocked layers their shares."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import chains
import pytest
import torch
from torch import nn

from pipedream_hpc import Job, TrainConfig
from pipedream_hpc.model.capture import capture
from pipedream_hpc.model.precision import autocast
from pipedream_hpc.planning.profile import LayerProfile, Profile
from pipedream_hpc.profiling.calibrate import Calibration, apply_calibration, calibrate, calibration_from
from pipedream_hpc.schedule.trace import Kind, Span


def job(minibatches: int, seen: list[int] | None = None, **more: Any) -> Job:
    def loss(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        if seen is not None:
            seen.append(len(target))
        return nn.functional.cross_entropy(output, target)

    data = chains.minibatches(minibatches)
    return Job(chains.rich_model(), loss, chains.OPTIMIZERS["adam"], data, chains.example(), **more)


@pytest.mark.parametrize(
    "config",
    [
        TrainConfig(),
        TrainConfig(clip_grad_norm=1.0, clip_grad_over="model"),
        TrainConfig(precision="bf16"),
        TrainConfig(precision="fp16"),
    ],
    ids=["default", "clipped over the model", "bf16", "fp16"],
)
def test_calibration_trains_two_stages_minibatch_by_minibatch(config: TrainConfig) -> None:
    seen: list[int] = []
    calibrated_job = job(9, seen, train_config=config)
    before, rng = calibrated_job.model.state_dict()["9.weight"].clone(), torch.get_rng_state()
    graph = capture(calibrated_job.model, calibrated_job.example_inputs, precision=autocast(config.precision))
    calibration = calibrate(graph, calibrated_job, chains.minibatches(6))
    assert seen == [chains.SAMPLES] * 6
    assert calibration is not None
    assert min(calibration.forward_s, calibration.backward_s, calibration.update_s) > 0
    assert calibration.overhead_s >= 0
    assert torch.equal(torch.get_rng_state(), rng)
    assert torch.equal(graph.module.state_dict()["9.weight"], before)


def test_the_gaps_between_actions_are_counted() -> None:
    """Two stages in one process, with a gap of a second between any two actions::

    stage 0   F S ░ ░ ░ ░ ░ R B U   F S ...      F 3, S 2, R 1, B 6, U 1
    stage 1   ░ ░ R F B S U ░ ░ ░   ░ ░ ...      R 1, F 4, B 5, S 2, U 1
    """
    minibatch: list[tuple[int, Kind, float]] = [
        *((0, "forward", 3.0), (0, "send", 2.0), (1, "recv", 1.0), (1, "forward", 4.0), (1, "backward", 5.0)),
        *(
            (1, "send", 2.0),
            (1, "optimizer-step", 1.0),
            (0, "recv", 1.0),
            (0, "backward", 6.0),
            (0, "optimizer-step", 1.0),
        ),
    ]
    spans, now_s = [], 0.0
    for microbatch in range(4):
        for stage, kind, seconds in minibatch:
            spans.append(
                Span(stage, stage, kind, microbatch, 0, now_s, now_s + seconds * (10 if microbatch == 0 else 1))
            )
            now_s = spans[-1].end_s + 1.0
    # Besides forwards, backwards and updates: 6 s of messages and 10 gaps of 1 s, divided by two stages.
    assert calibration_from(spans, 2) == Calibration(7.0, 11.0, 2.0, 8.0)


def test_a_single_layer_is_one_stage() -> None:
    data = chains.minibatches(4)
    single = Job(nn.Linear(12, 5), nn.CrossEntropyLoss(), chains.OPTIMIZERS["sgd"], data, chains.example())
    assert calibrate(capture(single.model, single.example_inputs), single, data) is not None


def test_a_single_minibatch_is_too_few() -> None:
    short = job(1)
    assert calibrate(capture(short.model, short.example_inputs), short, chains.minibatches(1)) is None


def test_layers_keep_their_shares_of_the_times() -> None:
    small = LayerProfile("a", "Linear", 1.0, 2.0, 8, 8, update_s=0.5)
    large = replace(small, name="b", forward_s=3.0, backward_s=2.0, update_s=1.5)
    profile = apply_calibration(Profile("net", "cpu", 8, (small, large), ((0, 1),)), Calibration(8.0, 2.0, 6.0, 0.25))
    assert [layer.forward_s for layer in profile.layers] == [2.0, 6.0]
    assert [layer.backward_s for layer in profile.layers] == [1.0, 1.0]
    assert [layer.update_s for layer in profile.layers] == [1.5, 4.5]
    assert profile.overhead_s == 0.25


def test_a_time_of_zero_stays_zero() -> None:
    counted = LayerProfile("a", "Linear", 1.0, 2.0, 8, 8)
    profile = apply_calibration(Profile("net", "cpu", 8, (counted,), ()), Calibration(1.0, 2.0, 6.0, 0.0))
    assert profile.layers == (counted,)
