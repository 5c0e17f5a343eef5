"""Memory of a rank: counted tensor by tensor, planned, and the peak of the process."""

from __future__ import annotations

import dataclasses
import math
from functools import partial
from pathlib import Path
from typing import Any

import pictures
import pytest
import torch
from schedules import layout
from torch import nn
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint

from pipedream_hpc import Pipeline, RunConfig, ScheduleConfig, TrainConfig
from pipedream_hpc.model.capture import capture
from pipedream_hpc.observe.tables import memory_table
from pipedream_hpc.observe.terminal import console
from pipedream_hpc.planning.memory import MemoryParts, Recompute
from pipedream_hpc.planning.plan import COUNTED, Plan
from pipedream_hpc.planning.profile import Profile
from pipedream_hpc.planning.solver import Request, solve
from pipedream_hpc.planning.topology import Level, Topology
from pipedream_hpc.profiling.profiler import measure
from pipedream_hpc.runtime.comm.tensor_view import CPU
from pipedream_hpc.runtime.execution.memory_probe import kept_storages
from pipedream_hpc.runtime.state.memory_report import MemoryReport, ProcessPeak, memory_report

F = 4  # bytes of a float32


def chain() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3))


MOMENTUM = partial(torch.optim.SGD, lr=0.1, momentum=0.9)


def trained(optimizer: Any = MOMENTUM, config: TrainConfig | None = None) -> Pipeline:
    """Return the pipeline of the chain in two stages, after six minibatches."""
    pipeline = Pipeline(
        chain(),
        loss_fn=nn.functional.mse_loss,
        optimizer=optimizer,
        example_inputs=torch.zeros(8, 6),
        plan=2,
        train_config=config,
    )
    pipeline.fit([(torch.ones(8, 6), torch.zeros(8, 3))] * 6)
    return pipeline


def test_what_autograd_keeps() -> None:
    """For y = tanh(W x): x, which the weight's gradient needs, and y itself."""
    layer, x = nn.Linear(6, 5), torch.ones(8, 6)
    y = torch.tanh(layer(x))
    address_x, address_y, address_w = (each.untyped_storage().data_ptr() for each in (x, y, layer.weight))
    kept = kept_storages([y.grad_fn])
    kept.pop(address_w, None)
    assert kept == {address_x: 8 * 6 * F, address_y: 8 * 5 * F}
    y.sum().backward()
    assert kept_storages([y.grad_fn]) == {}, "backward frees it"


def test_the_memory_of_a_rank_part_by_part() -> None:
    """Two stages: the first has two versions of its weights and two minibatches in flight."""
    pipeline = trained()
    sizes = [[p.nbytes for p in stage.stash.trained] for stage in pipeline.stages]
    for report, stage, own, in_flight in zip(pipeline.memory_reports(), pipeline.stages, sizes, (2, 1), strict=True):
        assert (report.rank, report.stages) == (stage.index, (stage.index,))
        assert report.measured.weights == in_flight * sum(-(-size // 64) * 64 for size in own)
        assert report.measured.gradients == report.measured.optimizer == sum(own)
        assert report.measured.activations % in_flight == 0
        assert report.measured.activations > 0
    crossing = math.prod(pipeline.stages[0].stage_module.stage_outputs[0].shape) * F
    slots = [report.measured.slots for report in pipeline.memory_reports()]
    assert slots == [2 * crossing, 2 * crossing], (
        "gradients: one in use and one ahead; activations: in flight and one ahead"
    )


@pytest.mark.parametrize(
    "replicas", [(1, 1, 1), (2, 1, 1), (1, 1, 2), (1, 2, 1), (2, 1, 2), (2, 2, 1), (3, 2, 1)], ids=str
)
@pytest.mark.parametrize(
    "schedule",
    [ScheduleConfig("1f1b-rr"), ScheduleConfig("gpipe", 2), ScheduleConfig("gpipe-split", 4)],
    ids=lambda each: each.name,
)
def test_slots_are_planned_for_every_rank_that_sends(replicas: tuple[int, ...], schedule: ScheduleConfig) -> None:
    """The plan was made for one replica of each stage."""
    torch.manual_seed(0)
    model, x = nn.Sequential(*(nn.Linear(16, 16) for _ in range(3))), torch.zeros(8, 16)
    profile = measure(capture(model, x), x, minibatches=1, warm_up=0)
    plan = solve(profile, Topology((Level("node", 3, 0.0, 1e12),), "cpu"), Request(straight=True))
    members = layout(*replicas)
    stages = [dataclasses.replace(stage, ranks=ranks) for stage, ranks in zip(plan.stages, members, strict=True)]
    plan = dataclasses.replace(plan, stages=tuple(stages))
    pipeline = Pipeline(
        model,
        loss_fn=nn.functional.mse_loss,
        optimizer=partial(torch.optim.SGD, lr=0.1),
        example_inputs=x,
        plan=plan,
        schedule=schedule,
    )
    pipeline.fit([(x, x)] * 6)
    for report in pipeline.memory_reports():
        assert report.planned is not None
        assert report.planned.slots == report.measured.slots


def test_recompute_keeps_the_activations_of_one_minibatch() -> None:
    kept, again = (
        trained(config=TrainConfig(recompute=each)).memory_reports()[0].measured.activations for each in (False, True)
    )
    assert kept == 2 * again


class Block(nn.Module):
    """A module of several layers, with wide intermediate outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.wide, self.narrow = nn.LayerNorm(16), nn.Linear(16, 128), nn.Linear(128, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.narrow(self.wide(self.norm(x)).sigmoid())


def run_three(
    block: type[nn.Module], samples: int, schedule: ScheduleConfig, recompute: bool | None = None
) -> tuple[Profile, Plan, list[MemoryReport]]:
    """Profile, plan and train three blocks in a stage each; return profile, plan and memory of the training."""
    torch.manual_seed(0)
    model, x, y = nn.Sequential(block(), block(), block()), torch.randn(samples, 16), torch.randn(samples, 16)
    loss = nn.functional.mse_loss
    profile = measure(capture(model, x, [Block]), x, minibatches=1, warm_up=0, loss_fn=lambda output: loss(output, y))
    plan = solve(profile, Topology((Level("node", 3, 0.0, 1e12),), "cpu"), Request(straight=True))
    with Pipeline(
        model,
        loss_fn=loss,
        optimizer=partial(torch.optim.SGD, lr=0.1),
        example_inputs=x,
        plan=plan,
        schedule=schedule,
        train_config=TrainConfig(leaf_modules=(Block,), recompute=recompute),
        run_config=RunConfig(device="cpu"),
    ) as pipeline:
        pipeline.fit([(x, y)] * 2)
        return profile, plan, pipeline.memory_reports()


def test_gradients_that_hooks_see_are_not_deferred() -> None:
    model, x = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 16)), torch.randn(8, 16)
    model[1].weight.register_hook(lambda gradient: gradient * 2)
    profile = measure(capture(model, x), x, minibatches=1, warm_up=0)
    assert [layer.unsplit_bytes for layer in profile.layers[1:]] == [(16 * 16 + 16) * F, 0]


@pytest.mark.parametrize("recompute", [None, True])
def test_deferred_gradients_within_modules_are_planned(recompute: bool | None) -> None:
    profile, plan, found = run_three(Block, 64, ScheduleConfig("zb-h2", 8), recompute)
    assert [layer.waiting_bytes for layer in profile.layers] == [64 * (128 + 16) * F] * 3
    assert [layer.unsplit_bytes for layer in profile.layers] == [2 * 16 * F] * 3
    for each in found:
        assert each.planned is not None
        assert each.planned.activations / 2 <= each.measured.activations <= each.planned.activations + 256
        # The norm's gradients wait until those of the linear layers are there, in as many microbatches.
        (stage,) = each.stages
        waiting = 0 if stage == 0 else 1 + min(2 * stage, 8)
        assert each.measured.gradients == plan.stages[stage].parameter_bytes + waiting * 2 * 16 * F
        assert each.planned.gradients == each.measured.gradients


class Bare(Block):
    def __init__(self) -> None:
        super().__init__()
        del self.norm


class Tied(Bare):
    """A weight that two linear layers use."""

    def __init__(self) -> None:
        super().__init__()
        self.again = nn.Linear(16, 128)
        self.again.weight = self.wide.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.narrow(self.wide(x) + self.again(x))


class Borrowed(Bare):
    """Weights of a linear layer that is not called."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(self.wide(input=x).sigmoid(), self.narrow.weight, self.narrow.bias)


class Checkpointed(Bare):
    """A linear layer whose forward is run again by autograd."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.narrow(checkpoint(self.wide, x, use_reentrant=False))


class Computed(Bare):
    """A linear layer whose weight is computed from other parameters."""

    def __init__(self) -> None:
        super().__init__()
        parametrizations.weight_norm(self.wide)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.narrow(self.wide(x).sigmoid())


@pytest.mark.parametrize("block", [Tied, Borrowed, Checkpointed, Computed])
@pytest.mark.parametrize("name", ["gpipe-split", "zb-h2"])
def test_early_gradients_are_planned(block: type[Block], name: str) -> None:
    for each in run_three(block, 8, ScheduleConfig(name, 4))[2]:
        assert each.planned is not None
        assert each.measured.gradients == each.planned.gradients


@pytest.mark.parametrize("recompute", [None, True, False])
@pytest.mark.parametrize("planned_recompute", ["never", "always"])
@pytest.mark.parametrize(
    ("schedule", "in_flight"),
    [
        (ScheduleConfig(), [3, 2, 1]),
        (ScheduleConfig("1f1b-flush", 4), [3, 2, 1]),
        (ScheduleConfig("1f1b-flush", 2), [2, 2, 1]),
        (ScheduleConfig("zb-h1", 4), [3, 3, 3]),
        (ScheduleConfig("zb-h2", 8), [5, 5, 5]),
        (ScheduleConfig("gpipe", 4), [4, 4, 4]),
        (ScheduleConfig("gpipe-split", 4), [4, 4, 4]),
        (ScheduleConfig("vertical-sync"), [3, 2, 1]),
    ],
    ids=lambda each: f"{each.name}-{each.n_microbatches}" if isinstance(each, ScheduleConfig) else "",
)
def test_a_plan_has_the_memory_of_the_schedule_that_is_run(
    planned_recompute: Recompute, recompute: bool | None, schedule: ScheduleConfig, in_flight: list[int]
) -> None:
    """Planned for 1F1B on whole minibatches. Outputs have the size of inputs, and linear layers keep theirs."""
    torch.manual_seed(0)
    layers = [layer for _ in range(6) for layer in (nn.Linear(16, 16), nn.Tanh())]
    model, x, y = nn.Sequential(*layers[:-1]), torch.randn(64, 16), torch.randn(64, 16)
    loss = nn.functional.mse_loss
    profile = measure(capture(model, x), x, minibatches=1, warm_up=0, loss_fn=lambda output: loss(output, y))
    request = Request(straight=True, recompute=planned_recompute, cut_after=["3", "7"])
    plan = solve(profile, Topology((Level("node", 3, 0.0, 1e12),), "cpu"), request)
    assert [len(stage.layers) for stage in plan.stages] == [4, 4, 3]
    with Pipeline(
        model,
        loss_fn=loss,
        optimizer=partial(torch.optim.SGD, lr=0.1, momentum=0.9),
        example_inputs=x,
        plan=plan,
        schedule=schedule,
        train_config=TrainConfig(recompute=recompute),
        run_config=RunConfig(device="cpu"),
    ) as pipeline:
        pipeline.fit([(x, y)] * 6)
        assert [stage.in_flight for stage in pipeline.plan.stages] == in_flight
        for report in pipeline.memory_reports():
            assert report.planned is not None
            for part in MemoryParts.PARTS:
                planned, measured = getattr(report.planned, part), getattr(report.measured, part)
                # Except for padding; and an output that the next layer keeps is planned twice.
                assert planned / 2 <= measured <= planned + 256, (report.rank, part, planned, measured)


@pytest.mark.parametrize(("optimizer", "times"), [(torch.optim.SGD, 0), (torch.optim.Adam, 2)])
def test_optimizer_state(optimizer: Any, times: int) -> None:
    pipeline = trained(partial(optimizer, lr=0.1))
    for report, stage in zip(pipeline.memory_reports(), pipeline.stages, strict=True):
        weights = sum(p.nbytes for p in stage.stash.trained)
        steps = F * len(stage.stash.trained) if times else 0  # Adam counts its steps
        assert report.measured.optimizer == times * weights + steps


def test_counting_agrees_with_the_profile_on_a_single_layer() -> None:
    """The profiler hooks saved tensors, the probe walks the graph: both find the same bytes."""
    torch.manual_seed(0)
    layer, x = nn.Conv2d(3, 4, 3), torch.randn(2, 3, 8, 8)
    profile = measure(capture(layer, x), x, minibatches=1, warm_up=0)
    kept = kept_storages([layer(x).grad_fn])
    for parameter in layer.parameters():
        kept.pop(parameter.untyped_storage().data_ptr(), None)
    assert sum(kept.values()) == profile.layers[0].stash_bytes > 0


def test_the_peak_counts_from_begin() -> None:
    peak = ProcessPeak(CPU)
    assert not peak.begun
    peak.begin(0)
    assert peak.begun
    before = peak.read()
    block = torch.ones(64 << 20, dtype=torch.uint8)
    assert peak.read() - before > 32 << 20
    del block
    assert peak.read() - before > 32 << 20, "it stays the peak"
    assert peak.before_bytes > 0


def test_the_peak_of_a_gpu_is_its_memory_and_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    """The core allocates its slots and slabs by itself: torch does not know of them."""
    gpu, reset = torch.device("cuda", 1), []
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", reset.append)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 100)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 700)
    peak = ProcessPeak(gpu)
    peak.begin(30)
    assert (reset, peak.before_bytes, peak.read()) == ([gpu], 130, 730)


def test_without_proc_the_peak_is_that_since_the_process_started(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(path: Path, *text: str) -> str:
        raise FileNotFoundError(path)

    monkeypatch.setattr(Path, "read_text", missing)
    monkeypatch.setattr(Path, "write_text", missing)
    peak = ProcessPeak(CPU)
    peak.begin(0)
    assert peak.read() >= peak.before_bytes > 1 << 20


def test_the_report_of_a_rank_with_two_stages_adds_them_up() -> None:
    """A plan from counted operations has no figures for activations, so it plans no memory."""
    parts = MemoryParts(weights=1, gradients=2, optimizer=3, activations=4, slots=5)
    plan = pictures.plan(1, 1)
    stages = tuple(dataclasses.replace(stage, memory=parts) for stage in plan.stages)
    plan, twice = dataclasses.replace(plan, stages=stages), MemoryParts(2, 4, 6, 8, 10)
    report = memory_report(0, plan, {1: parts, 0: parts}, "CPU of node n1", None)
    assert report == MemoryReport(0, (0, 1), "CPU of node n1", twice, twice)
    counted = dataclasses.replace(plan, notes=(COUNTED,))
    assert memory_report(0, counted, {0: parts}, "CPU of node n1", None).planned is None


def test_the_memory_table(capsys: pytest.CaptureFixture[str]) -> None:
    parts = MemoryParts(weights=4_000_000, gradients=2_000_000, optimizer=2_000_000, activations=512_000, slots=64_000)
    here = MemoryReport(0, (0,), "CPU of node n1", parts, parts, peak_bytes=300_000_000, before_bytes=200_000_000)
    console().print(memory_table([here, MemoryReport(1, (1,), "CPU of node n1", None, parts)]))
    table = capsys.readouterr().out
    assert [line.split("│")[1:3] for line in table.splitlines() if "MB" in line and "│" in line] == [
        [" 0    ", " planned  "],
        [" 0    ", " measured "],
        [" 1    ", " measured "],
    ]
    assert "300 MB" in table
    assert "200 MB of it were in use before the first minibatch" in " ".join(table.split())
