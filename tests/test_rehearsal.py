"""The rehearsal gives the sums, the clocked layers the shares."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import chains
import pytest
import torch
from torch import nn

from pipedream_hpc import Clip, Job
from pipedream_hpc.model.capture import capture
from pipedream_hpc.model.precision import autocast
from pipedream_hpc.planning.profile import LayerProfile, Profile
from pipedream_hpc.runtime.rehearsal import Rehearsal, _figures, calibrated, rehearse
from pipedream_hpc.schedule.trace import Kind, Span


def job(minibatches: int, seen: list[int] | None = None, **more: Any) -> Job:
    def loss(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        if seen is not None:
            seen.append(len(target))
        return nn.functional.cross_entropy(output, target)

    data = chains.minibatches(minibatches)
    return Job(chains.rich_model(), loss, chains.OPTIMIZERS["adam"], data, chains.example(), **more)


@pytest.mark.parametrize(
    ("more", "precision"), [({}, None), ({"clip": Clip(1.0, "model")}, None), ({}, "bf16"), ({}, "fp16")]
)
def test_two_stages_train_the_minibatches_one_by_one(more: dict[str, Any], precision: str | None) -> None:
    seen: list[int] = []
    rehearsed_job = job(9, seen, **more)
    before, rng = rehearsed_job.model.state_dict()["9.weight"].clone(), torch.get_rng_state()
    graph = capture(rehearsed_job.model, rehearsed_job.example, precision=autocast(precision))
    rehearsal = rehearse(graph, rehearsed_job, chains.minibatches(6), precision=precision)
    assert seen == [chains.SAMPLES] * 6  # the first is not counted
    assert rehearsal is not None
    assert min(rehearsal.forward_s, rehearsal.backward_s, rehearsal.update_s) > 0
    assert rehearsal.beside_s >= 0
    assert torch.equal(torch.get_rng_state(), rng)
    assert torch.equal(graph.module.state_dict()["9.weight"], before)


def test_what_is_between_counts_for_every_action() -> None:
    """Two stages in one process, a second between any two actions::

    stage 0   F S ░ ░ ░ ░ ░ R B U   F S ...      F 3, S 2, R 1, B 6, U 1
    stage 1   ░ ░ R F B S U ░ ░ ░   ░ ░ ...      R 1, F 4, B 5, S 2, U 1
    """
    minibatch: list[tuple[int, Kind, float]] = [
        *((0, "forward", 3.0), (0, "send", 2.0), (1, "receive", 1.0), (1, "forward", 4.0), (1, "backward", 5.0)),
        *((1, "send", 2.0), (1, "update", 1.0), (0, "receive", 1.0), (0, "backward", 6.0), (0, "update", 1.0)),
    ]
    spans, now_s = [], 0.0
    for unit in range(4):
        for stage, kind, seconds in minibatch:
            spans.append(Span(stage, stage, kind, unit, 0, now_s, now_s + seconds * (10 if unit == 0 else 1)))
            now_s = spans[-1].end_s + 1.0
    # Beside forwards, backwards and updates: 6 s of messages and 10 s between, shared by two stages.
    assert _figures(spans, 2) == Rehearsal(7.0, 11.0, 2.0, 8.0)


def test_a_single_layer_is_one_stage() -> None:
    data = chains.minibatches(4)
    alone = Job(nn.Linear(12, 5), nn.CrossEntropyLoss(), chains.OPTIMIZERS["sgd"], data, chains.example())
    assert rehearse(capture(alone.model, alone.example), alone, data) is not None


def test_a_single_minibatch_tells_nothing() -> None:
    short = job(1)
    assert rehearse(capture(short.model, short.example), short, chains.minibatches(1)) is None


def test_layers_keep_their_shares_of_the_sums() -> None:
    small = LayerProfile("a", "Linear", 1.0, 2.0, 8, 8, update_s=0.5)
    large = replace(small, name="b", forward_s=3.0, backward_s=2.0, update_s=1.5)
    profile = calibrated(Profile("net", "cpu", 8, (small, large), ((0, 1),)), Rehearsal(8.0, 2.0, 6.0, 0.25))
    assert [layer.forward_s for layer in profile.layers] == [2.0, 6.0]
    assert [layer.backward_s for layer in profile.layers] == [1.0, 1.0]
    assert [layer.update_s for layer in profile.layers] == [1.5, 4.5]
    assert profile.beside_s == 0.25


def test_what_was_not_clocked_stays_nothing() -> None:
    counted = LayerProfile("a", "Linear", 1.0, 2.0, 8, 8)
    profile = calibrated(Profile("net", "cpu", 8, (counted,), ()), Rehearsal(1.0, 2.0, 6.0, 0.0))
    assert profile.layers == (counted,)
