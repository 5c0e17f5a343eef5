"""Memory counted, tensor by tensor."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn

from pipedream_hpc import Pipeline
from pipedream_hpc.model.capture import capture
from pipedream_hpc.model.profiler import measure
from pipedream_hpc.observe.tables import memory_table
from pipedream_hpc.observe.terminal import console
from pipedream_hpc.planning.memory import MemoryParts
from pipedream_hpc.runtime.footprint import Footprint, Peak, kept_bytes
from pipedream_hpc.runtime.view import CPU

F = 4  # bytes of a float32


def chain() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3))


def trained(**options: Any) -> Pipeline:
    pipeline = Pipeline(
        chain(),
        loss=nn.functional.mse_loss,
        optimizer=options.pop("optimizer", partial(torch.optim.SGD, lr=0.1, momentum=0.9)),
        example=torch.zeros(8, 6),
        plan=options.pop("plan", 2),
        **options,
    )
    pipeline.fit([(torch.ones(8, 6), torch.zeros(8, 3))] * 6)
    return pipeline


def test_what_autograd_keeps() -> None:
    """Of y = tanh(W x): x, which the weight's gradient needs, and y itself."""
    layer, x = nn.Linear(6, 5), torch.ones(8, 6)
    y = torch.tanh(layer(x))
    weights = {parameter.untyped_storage().data_ptr() for parameter in layer.parameters()}
    assert kept_bytes([y], weights) == (8 * 6 + 8 * 5) * F
    assert kept_bytes([y], {*weights, x.untyped_storage().data_ptr()}) == 8 * 5 * F
    y.sum().backward()
    assert kept_bytes([y], weights) == 0, "backward gives it back"


def test_a_rank_in_numbers() -> None:
    """Two stages: the first has two versions of its weights and two minibatches in flight."""
    pipeline = trained()
    sizes = [[p.nbytes for p in stage.stash.trained] for stage in pipeline.stages]
    for footprint, stage, own, in_flight in zip(pipeline.footprints(), pipeline.stages, sizes, (2, 1), strict=True):
        assert (footprint.rank, footprint.stages) == (stage.index, (stage.index,))
        assert footprint.measured.weights == in_flight * sum(-(-size // 64) * 64 for size in own)
        assert footprint.measured.gradients == footprint.measured.optimizer == sum(own)
        assert footprint.measured.activations % in_flight == 0
        assert footprint.measured.activations > 0
    crossing = math.prod(pipeline.stages[0].part.exits[0].shape) * F
    slots = [footprint.measured.slots for footprint in pipeline.footprints()]
    assert slots == [2 * crossing, 2 * crossing], "gradients: at work and ahead; activations: in flight and ahead"


def test_recompute_keeps_the_activations_of_one_minibatch() -> None:
    kept, again = (trained(recompute=each).footprints()[0].measured.activations for each in (False, True))
    assert kept == 2 * again


@pytest.mark.parametrize(("optimizer", "times"), [(torch.optim.SGD, 0), (torch.optim.Adam, 2)])
def test_state_of_optimizers(optimizer: Any, times: int) -> None:
    for footprint, stage in zip(
        (pipeline := trained(optimizer=partial(optimizer, lr=0.1))).footprints(), pipeline.stages, strict=True
    ):
        weights = sum(p.nbytes for p in stage.stash.trained)
        steps = F * len(stage.stash.trained) if times else 0  # Adam counts its steps
        assert footprint.measured.optimizer == times * weights + steps


def test_counting_agrees_with_the_profile_on_a_single_layer() -> None:
    """The profile hooks what is saved, this walks the graph: two ways to the same number."""
    torch.manual_seed(0)
    layer, x = nn.Conv2d(3, 4, 3), torch.randn(2, 3, 8, 8)
    profile = measure(capture(layer, x), x, minibatches=1, warm_up=0)
    own = {parameter.untyped_storage().data_ptr() for parameter in layer.parameters()}
    assert kept_bytes([layer(x)], own) == profile.layers[0].stash_bytes > 0


def test_the_peak_is_that_since_training_began() -> None:
    peak = Peak(CPU)
    assert not peak.begun
    peak.begin(0)
    assert peak.begun
    before = peak.read()
    block = torch.ones(64 << 20, dtype=torch.uint8)
    assert peak.read() - before > 32 << 20
    del block
    assert peak.read() - before > 32 << 20, "it was there once"
    assert peak.before_bytes > 0


def test_a_table_of_memory(capsys: pytest.CaptureFixture[str]) -> None:
    parts = MemoryParts(weights=4_000_000, gradients=2_000_000, optimizer=2_000_000, activations=512_000, slots=64_000)
    here = Footprint(0, (0,), "CPU of node n1", parts, parts, peak_bytes=300_000_000, before_bytes=200_000_000)
    console().print(memory_table([here, Footprint(1, (1,), "CPU of node n1", None, parts)]))
    table = capsys.readouterr().out
    assert [line.split("│")[1:3] for line in table.splitlines() if "MB" in line and "│" in line] == [
        [" 0    ", " planned  "],
        [" 0    ", " measured "],
        [" 1    ", " measured "],
    ]
    assert "300 MB" in table
    assert "200 MB of it from before the first minibatch" in " ".join(table.split())
