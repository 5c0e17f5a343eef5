"""Memory counted, tensor by tensor."""

from __future__ import annotations

import dataclasses
import math
from functools import partial
from itertools import islice
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint

from pipedream_hpc import Pipeline
from pipedream_hpc.model.capture import capture
from pipedream_hpc.model.profiler import measure
from pipedream_hpc.observe.tables import memory_table
from pipedream_hpc.observe.terminal import console
from pipedream_hpc.planning.memory import MemoryParts, Recompute
from pipedream_hpc.planning.plan import Plan
from pipedream_hpc.planning.profile import Profile
from pipedream_hpc.planning.solver import Request, solve
from pipedream_hpc.planning.topology import Level, Topology
from pipedream_hpc.runtime.footprint import Footprint, Peak, kept_storages
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
    place_x, place_y, place_w = (each.untyped_storage().data_ptr() for each in (x, y, layer.weight))
    kept = kept_storages([y.grad_fn])
    kept.pop(place_w, None)
    assert kept == {place_x: 8 * 6 * F, place_y: 8 * 5 * F}
    y.sum().backward()
    assert kept_storages([y.grad_fn]) == {}, "backward gives it back"


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


@pytest.mark.parametrize(
    "replicas", [(1, 1, 1), (2, 1, 1), (1, 1, 2), (1, 2, 1), (2, 1, 2), (2, 2, 1), (3, 2, 1)], ids=str
)
@pytest.mark.parametrize(
    "options",
    [
        {"schedule": "1f1b"},
        {"schedule": "gpipe", "microbatches": 2},
        {"schedule": "gpipe", "microbatches": 4, "split_backward": True},
    ],
    ids=["1f1b", "gpipe", "split"],
)
def test_slots_are_planned_for_every_rank_that_sends(replicas: tuple[int, ...], options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(*(nn.Linear(16, 16) for _ in range(3))), torch.zeros(8, 16)
    profile = measure(capture(model, x), x, minibatches=1, warm_up=0)
    plan = solve(profile, Topology((Level("node", 3, 0.0, 1e12),), "cpu"), Request(straight=True))
    ranks = iter(range(sum(replicas)))
    stages = [
        dataclasses.replace(stage, ranks=tuple(islice(ranks, count)))
        for stage, count in zip(plan.stages, replicas, strict=True)
    ]
    plan = dataclasses.replace(plan, stages=tuple(stages))
    pipeline = Pipeline(
        model, loss=nn.functional.mse_loss, optimizer=partial(torch.optim.SGD, lr=0.1), example=x, plan=plan, **options
    )
    pipeline.fit([(x, x)] * 6)
    for footprint in pipeline.footprints():
        assert footprint.planned is not None
        assert footprint.planned.slots == footprint.measured.slots


def test_recompute_keeps_the_activations_of_one_minibatch() -> None:
    kept, again = (trained(recompute=each).footprints()[0].measured.activations for each in (False, True))
    assert kept == 2 * again


class Block(nn.Module):
    """A layer made of others, wide within."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.wide, self.narrow = nn.LayerNorm(16), nn.Linear(16, 128), nn.Linear(128, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.narrow(self.wide(self.norm(x)).sigmoid())


def run_three(block: type[nn.Module], samples: int, **options: Any) -> tuple[Profile, Plan, list[Footprint]]:
    """Three such blocks in a stage each, profiled, planned and trained; the memory is that of the training."""
    torch.manual_seed(0)
    model, x, y = nn.Sequential(block(), block(), block()), torch.randn(samples, 16), torch.randn(samples, 16)
    loss = nn.functional.mse_loss
    profile = measure(capture(model, x, [Block]), x, minibatches=1, warm_up=0, loss=lambda output: loss(output, y))
    plan = solve(profile, Topology((Level("node", 3, 0.0, 1e12),), "cpu"), Request(straight=True))
    with Pipeline(
        model,
        loss=loss,
        optimizer=partial(torch.optim.SGD, lr=0.1),
        example=x,
        plan=plan,
        leaves=[Block],
        device="cpu",
        **options,
    ) as pipeline:
        pipeline.fit([(x, y)] * 2)
        return profile, plan, pipeline.footprints()


@pytest.mark.parametrize("recompute", [None, True])
def test_layers_made_of_others_keep_what_waits_within_them(recompute: bool | None) -> None:
    flush = {"schedule": "1f1b-flush", "microbatches": 8, "zero_bubble": True}
    profile, plan, found = run_three(Block, 64, recompute=recompute, **flush)
    assert [layer.waiting_bytes for layer in profile.layers] == [64 * (128 + 16) * F] * 3
    assert [layer.outside_bytes for layer in profile.layers] == [2 * 16 * F] * 3
    for each in found:
        assert each.planned is not None
        assert each.planned.activations / 2 <= each.measured.activations <= each.planned.activations + 256
        # The norm's gradients wait until those of the products are there, in as many units.
        (stage,) = each.stages
        waiting = 0 if stage == 0 else 1 + min(2 * stage, 8)
        assert each.measured.gradients == plan.stages[stage].parameter_bytes + waiting * 2 * 16 * F
        assert each.planned.gradients == each.measured.gradients


class Bare(Block):
    def __init__(self) -> None:
        super().__init__()
        del self.norm


class Tied(Bare):
    """A weight that two products use."""

    def __init__(self) -> None:
        super().__init__()
        self.again = nn.Linear(16, 128)
        self.again.weight = self.wide.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.narrow(self.wide(x) + self.again(x))


class Borrowed(Bare):
    """Weights of products that are not called."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(self.wide(input=x).sigmoid(), self.narrow.weight, self.narrow.bias)


class Checkpointed(Bare):
    """Products whose forward is run again by autograd."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.narrow(checkpoint(self.wide, x, use_reentrant=False))


class Computed(Bare):
    """A product whose weight is computed from others."""

    def __init__(self) -> None:
        super().__init__()
        parametrizations.weight_norm(self.wide)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.narrow(self.wide(x).sigmoid())


@pytest.mark.parametrize("block", [Tied, Borrowed, Checkpointed, Computed])
@pytest.mark.parametrize(
    "options", [{"schedule": "gpipe", "split_backward": True}, {"schedule": "1f1b-flush", "zero_bubble": True}]
)
def test_gradients_that_wait_for_others_are_planned(block: type[Block], options: dict[str, Any]) -> None:
    for each in run_three(block, 8, microbatches=4, **options)[2]:
        assert each.planned is not None
        assert each.measured.gradients == each.planned.gradients


@pytest.mark.parametrize("anew", [None, True, False])
@pytest.mark.parametrize("recompute", ["never", "always"])
@pytest.mark.parametrize(
    ("options", "in_flight"),
    [
        ({}, [3, 2, 1]),
        ({"schedule": "1f1b-flush", "microbatches": 4}, [3, 2, 1]),
        ({"schedule": "1f1b-flush", "microbatches": 2}, [2, 2, 1]),
        ({"schedule": "1f1b-flush", "microbatches": 4, "split_backward": True}, [3, 3, 3]),
        ({"schedule": "1f1b-flush", "microbatches": 8, "zero_bubble": True}, [5, 5, 5]),
        ({"schedule": "gpipe", "microbatches": 4}, [4, 4, 4]),
        ({"schedule": "gpipe", "microbatches": 4, "split_backward": True}, [4, 4, 4]),
        ({"schedule": "vertical-sync"}, [3, 2, 1]),
    ],
    ids=lambda each: "-".join(map(str, each.values())) if isinstance(each, dict) else "",
)
def test_a_plan_knows_the_memory_of_the_way_it_is_run(
    recompute: Recompute, anew: bool | None, options: dict[str, Any], in_flight: list[int]
) -> None:
    """Planned for 1F1B on whole minibatches. Layers put out their input's size, and linear ones keep it."""
    torch.manual_seed(0)
    layers = [layer for _ in range(6) for layer in (nn.Linear(16, 16), nn.Tanh())]
    model, x, y = nn.Sequential(*layers[:-1]), torch.randn(64, 16), torch.randn(64, 16)
    loss = nn.functional.mse_loss
    profile = measure(capture(model, x), x, minibatches=1, warm_up=0, loss=lambda output: loss(output, y))
    request = Request(straight=True, recompute=recompute, cut_behind=["3", "7"])
    plan = solve(profile, Topology((Level("node", 3, 0.0, 1e12),), "cpu"), request)
    assert [len(stage.layers) for stage in plan.stages] == [4, 4, 3]
    with Pipeline(
        model,
        loss=loss,
        optimizer=partial(torch.optim.SGD, lr=0.1, momentum=0.9),
        example=x,
        plan=plan,
        recompute=anew,
        device="cpu",
        **options,
    ) as pipeline:
        pipeline.fit([(x, y)] * 6)
        assert [stage.in_flight for stage in pipeline.plan.stages] == in_flight
        for footprint in pipeline.footprints():
            assert footprint.planned is not None
            for part in MemoryParts.PARTS:
                planned, measured = getattr(footprint.planned, part), getattr(footprint.measured, part)
                # But for padding; and what one layer puts out and the next one keeps is planned twice.
                assert planned / 2 <= measured <= planned + 256, (footprint.rank, part, planned, measured)


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
    kept = kept_storages([layer(x).grad_fn])
    for parameter in layer.parameters():
        kept.pop(parameter.untyped_storage().data_ptr(), None)
    assert sum(kept.values()) == profile.layers[0].stash_bytes > 0


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
