"""Split backward: deferred gradients of weights have the bits of a whole backward, whatever a layer is made of."""

from __future__ import annotations

import dataclasses
import threading
import weakref
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from typing import Any, ClassVar

import pytest
import torch
import zoo
from torch import nn
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint

from pipedream_hpc import Pipeline, RunConfig, ScheduleConfig, TrainConfig
from pipedream_hpc.errors import PipedreamError
from pipedream_hpc.job import LossFn
from pipedream_hpc.model.precision import autocast
from pipedream_hpc.runtime.execution.split_backward import SplitBackward
from pipedream_hpc.verification import reference
from pipedream_hpc.verification.reference import ReferenceConfig

WIDTH, ROWS, SAMPLES = 6, 3, 8


class Kept(nn.Module):
    """A layer that torch.fx does not trace; tests keep it whole (leaf_modules)."""


class Overwritten(Kept):
    """The output of a linear layer, a view here, is overwritten."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x).relu_()


class Twice(Overwritten):
    """The same layer called twice."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(self.inner(x).tanh()).tanh()


class Shared(Overwritten):
    """Two layers with the same weight."""

    def __init__(self) -> None:
        super().__init__()
        self.other = nn.Linear(WIDTH, WIDTH)
        self.other.weight = self.inner.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.other(self.inner(x).tanh())


class Tied(Overwritten):
    """A weight used outside its layer as well."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(self.inner(x).tanh(), self.inner.weight)


class Branches(Overwritten):
    """A layer whose output nobody uses, and one that does not see the input."""

    def __init__(self) -> None:
        super().__init__()
        self.unused, self.blind = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.unused(x)
        return self.inner(x) + self.blind(torch.ones(WIDTH))


class Frozen(Overwritten):
    """The weight is not trained, the bias is."""

    def __init__(self) -> None:
        super().__init__()
        self.inner.weight.requires_grad_(False)


class Alike(Kept):
    """A weight as large as the output of a layer: its gradient has the memory of the output's."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.shift = nn.Linear(WIDTH, WIDTH), nn.Parameter(torch.zeros(SAMPLES // 4 * ROWS * WIDTH))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x) + self.shift.view_as(x)


class Computed(Overwritten):
    """The weight is computed in every forward instead of being a parameter of the layer."""

    def __init__(self) -> None:
        super().__init__()
        self.raw = nn.Parameter(torch.randn(WIDTH, WIDTH))
        del self.inner.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.inner.weight = self.raw.tanh()
        return self.inner(x)


class Steepest(Overwritten):
    """The forward itself differentiates the layer; backward does not reach that call."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.enable_grad():
            entry = x if x.requires_grad else x.detach().requires_grad_()
            slope, pull = torch.autograd.grad(self.inner(entry).tanh().sum(), [entry, self.inner.bias])
        return self.inner(x + 0.1 * slope.sign() + pull.mean())


class SharedGradient(Overwritten):
    """Two weights are added through views: autograd gives both the same gradient, in the same memory."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Parameter(torch.zeros(WIDTH)), nn.Parameter(torch.zeros(WIDTH))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x) + (self.a[None] + self.b[None])


class Deep(Overwritten):
    """Several checkpointed layers: their forward runs again in backward. Counts their forwards, of all instances."""

    seen: ClassVar[Any] = threading.local()  # a list would be a state

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(*[nn.Linear(WIDTH, WIDTH) for _ in range(4)])
        self.seen.runs = 0
        self.layers[0].register_forward_hook(self.count)

    def count(self, *_: Any) -> None:
        self.seen.runs += 1

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(checkpoint(self.layers, x, use_reentrant=False))


class Normed(Overwritten):
    """The weight is computed from other parameters, by a parametrization."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = parametrizations.weight_norm(nn.Linear(WIDTH, WIDTH))


class Checkpointed(Overwritten):
    """The layer is checkpointed: its forward runs again in backward."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return checkpoint(lambda each: self.inner(each).tanh(), x, use_reentrant=False)


class Reentrant(Overwritten):
    """Checkpointed by torch's older, reentrant implementation."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return checkpoint(lambda each: self.inner(each).tanh(), x, use_reentrant=True)


class Swish(Overwritten):
    """The output is overwritten though backward needs its old value."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.inner(x)
        return h.mul_(h.sigmoid())


class Pair(nn.Linear):
    """Derived from nn.Linear, but with another forward."""

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:  # type: ignore[override]
        return super().forward(x), self.weight.pow(2).mean()


class Derived(Kept):
    """Uses both outputs of a Pair."""

    def __init__(self) -> None:
        super().__init__()
        self.pair = Pair(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out, norm = self.pair(x)
        return out + norm


class Stop(torch.autograd.Function):
    """An identity that stops the gradient."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> None:
        return None


class Stopped(Overwritten):
    """A layer that no gradient reaches."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + Stop.apply(self.inner(x))


class Convolved(Kept):
    """Convolutions with a normalization and an in-place ReLU between them."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv1d(ROWS, 4, 3, padding=1), nn.BatchNorm1d(4), nn.ReLU(inplace=True), nn.ConvTranspose1d(4, ROWS, 1)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers(x)


class Without(Kept):
    """No layer that defers gradients."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(x)


LAYERS: list[Callable[[], nn.Module]] = [
    lambda: nn.Linear(WIDTH, WIDTH),
    lambda: nn.TransformerEncoderLayer(WIDTH, 2, 8, dropout=0.0, batch_first=True),
    Overwritten, Twice, Shared, Tied, Branches, Frozen, Normed, Checkpointed, Reentrant, Swish, Derived, Stopped,
    Convolved, Without, Alike, Computed, Steepest, Deep, SharedGradient,
]  # fmt: skip


def start(layer: Callable[[], nn.Module]) -> tuple[nn.Module, list[tuple[torch.Tensor, torch.Tensor]]]:
    """Return a model with two of the layers, and three minibatches for it."""
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), layer(), nn.Tanh(), layer(), nn.Flatten(), nn.Linear(18, 4))
    return model, [(torch.randn(SAMPLES, ROWS, WIDTH), torch.randint(4, (SAMPLES,))) for _ in range(3)]


def optimizer(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.3, momentum=0.9)


def pipeline_of(
    model: nn.Module, example: torch.Tensor, plan: str, schedule: ScheduleConfig, config: TrainConfig | None = None
) -> Pipeline:
    """Create the pipeline, of stages in this process."""
    # Some of these models mix samples, on purpose: the check would refuse to cut their minibatches.
    options = dataclasses.replace(config or TrainConfig(), check_model=False)
    return Pipeline(
        model,
        loss_fn=nn.functional.cross_entropy,
        optimizer=optimizer,
        example_inputs=example,
        plan=plan,
        schedule=schedule,
        train_config=replace(options, leaf_modules=(Kept, nn.TransformerEncoderLayer)),
        run_config=RunConfig(device="cpu", trace=True),
    )


def assert_bits_of_the_reference(
    layer: Callable[[], nn.Module], plan: str, schedule: ScheduleConfig, config: TrainConfig | None = None
) -> None:
    """Assert every bit of the weights after two epochs of three minibatches."""
    model, batches = start(layer)
    with pipeline_of(model, batches[0][0], plan, schedule, config) as pipeline:
        pipeline.fit(batches, epochs=2)
        ran = {span.kind for span in pipeline.last_trace().spans}
        assert ("backward-weight" in ran) == (schedule.name in ("zb-h1", "zb-h2", "gpipe-split"))
        found, stage_of, options = pipeline.state_dict(), pipeline.stage_of_parameters(), pipeline.train_config
    model, batches = start(layer)
    expected = reference.train(
        model,
        stage_of,
        [batches, batches],
        nn.functional.cross_entropy,
        optimizer,
        ReferenceConfig(
            schedule.name or "1f1b",
            [int(count) for count in plan.split("-")],
            schedule.n_microbatches or 1,
            options.gradient_accumulation_steps,
        ),
        precision=autocast(options.precision) or nullcontext,
    )
    assert [name for name in expected if not torch.equal(expected[name], found[name])] == []


@pytest.mark.parametrize("plan", ["1-1", "1-2", "1-1-1"])
@pytest.mark.parametrize("layer", [layer for layer in LAYERS if layer is not Reentrant])
def test_weights_have_the_bits_of_the_reference(layer: Callable[[], nn.Module], plan: str) -> None:
    assert_bits_of_the_reference(layer, plan, ScheduleConfig("zb-h1", 4))


@pytest.mark.parametrize(
    ("schedule", "config"),
    [
        pytest.param("zb-h1", TrainConfig(recompute=True), id="recompute"),
        pytest.param("zb-h1", TrainConfig(precision="bf16"), id="bf16"),
        pytest.param("gpipe-split", TrainConfig(), id="gpipe-split"),
        pytest.param("zb-h2", TrainConfig(), id="zb-h2"),
    ],
)
def test_options_and_schedules(schedule: str, config: TrainConfig) -> None:
    assert_bits_of_the_reference(LAYERS[1], "1-1-1", ScheduleConfig(schedule, 4), config)


@pytest.mark.parametrize(
    ("schedule", "steps"),
    [
        pytest.param(ScheduleConfig("1f1b-flush", 4), 1, id="flush"),
        pytest.param(ScheduleConfig("gpipe", 4), 1, id="gpipe"),
        pytest.param(ScheduleConfig("1f1b"), 3, id="accumulated"),
    ],
)
def test_weights_that_share_a_gradient_in_whole_backwards(schedule: ScheduleConfig, steps: int) -> None:
    assert_bits_of_the_reference(SharedGradient, "1-1-1", schedule, TrainConfig(gradient_accumulation_steps=steps))


def assert_split_has_the_bits_of_whole(
    model: Callable[[], nn.Module], batches: Any, plan: str, loss_fn: LossFn = nn.functional.cross_entropy
) -> None:
    """Train with split and with whole backwards. The sum of two microbatches has the same bits in either order."""

    def train(schedule: str) -> dict[str, torch.Tensor]:
        with Pipeline(
            model(),
            loss_fn=loss_fn,
            optimizer=optimizer,
            example_inputs=batches[0][0],
            plan=plan,
            schedule=ScheduleConfig(schedule, 2),
            train_config=TrainConfig(leaf_modules=(Kept,)),
            run_config=RunConfig(device="cpu"),
        ) as pipeline:
            pipeline.fit(batches)
            return pipeline.state_dict()

    whole, split = train("1f1b-flush"), train("zb-h1")
    assert [name for name in whole if not torch.equal(whole[name], split[name])] == []


def test_reentrant_checkpointing() -> None:
    """The reference cannot run it: it finds no weights that a functional call replaces."""
    assert_split_has_the_bits_of_whole(lambda: start(Reentrant)[0], start(Reentrant)[1], "1-1-1")


@pytest.mark.parametrize("plan", ["1-1", "1-2"])
def test_a_weight_borrowed_from_another_stage_gets_its_whole_gradient(plan: str) -> None:
    case = zoo.ZOO["gpt, tied"]
    assert_split_has_the_bits_of_whole(case.model, case.minibatches(2, zoo.SAMPLES), plan, case.loss)


def test_backward_input_computes_no_gradient_that_can_wait() -> None:
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Linear(4, 5), nn.LayerNorm(5), nn.Tanh(), nn.Linear(5, 3))
    x = torch.randn(2, 4, requires_grad=True)
    layers(x).sum().backward()
    expected = [parameter.grad for parameter in (x, *layers.parameters())]
    layers.zero_grad()
    x.grad = None

    split_backward = SplitBackward(layers.modules(), lambda leaf: True)
    with split_backward.recording(5):
        y = layers(x)
    split_backward.backward_input(5, lambda: y.sum().backward())
    assert x.grad is not None
    assert [parameter.grad for parameter in layers.parameters()] == [None] * 6, "none before all are there"
    early = [gradient.shape for gradient in split_backward.early_gradients(5)]
    assert early == [(5,), (5,)], "those of the LayerNorm, which does not defer"
    late = dict(split_backward.backward_weight(5))
    got = [late.get(parameter, parameter.grad) for parameter in (x, *layers.parameters())]
    assert all(torch.equal(a, b) for a, b in zip(expected, got, strict=True))


def test_checkpointed_layers_run_their_forward_only_once_more() -> None:
    layer = Deep()
    split_backward, x = SplitBackward(layer.modules(), lambda leaf: True), torch.randn(2, WIDTH, requires_grad=True)
    with split_backward.recording(0):
        y = layer(x)
    split_backward.backward_input(0, lambda: y.sum().backward())
    assert len(split_backward.early_gradients(0)) == 8, "all but weight and bias of the layer that is not checkpointed"
    assert len(list(split_backward.backward_weight(0))) == 10
    assert layer.seen.runs == 2


def test_nothing_is_kept_of_a_microbatch_after_its_backward() -> None:
    layer = nn.Linear(4, 3)
    split_backward = SplitBackward(layer.modules(), lambda leaf: True)
    x = torch.ones(2, 4, requires_grad=True)
    with split_backward.recording(0):
        y = layer(x)
    (graph,) = split_backward.graphs(0)
    split_backward.backward_input(0, lambda: y.sum().backward())
    (gradient,) = split_backward.output_gradients(0)
    mark = graph.metadata["mark"] = nn.Identity()  # lives as long as the graph
    kept = [weakref.ref(each) for each in (mark, gradient)]
    del graph, gradient, mark
    assert [each() is None for each in kept] == [False, False]
    assert len(list(split_backward.backward_weight(0))) == 2
    assert [each() is None for each in kept] == [True, True]


def test_a_module_that_differentiates_twice_is_refused() -> None:
    layer = nn.Linear(4, 3)
    split_backward = SplitBackward(layer.modules(), lambda leaf: True)
    x = torch.ones(2, 4, requires_grad=True)
    with split_backward.recording(0):
        y = layer(x)
    (slope,) = torch.autograd.grad(y.tanh().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        slope.sum().backward()


@pytest.mark.parametrize("schedule", ["zb-h1", "zb-h2", "gpipe-split"])
def test_compiled_stages_run_backwards_whole(schedule: str) -> None:
    with pytest.raises(PipedreamError, match=f"compiled stages run backwards whole, but {schedule} splits them"):
        pipeline_of(
            nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2)),
            torch.ones(4, 4),
            "2",
            ScheduleConfig(schedule, 2),
            TrainConfig(compile_backend="eager"),
        )


@pytest.mark.parametrize("schedule", ["1f1b", "1f1b-flush", "gpipe", "2bw", "vertical-sync"])
def test_other_schedules_split_no_backward(schedule: str) -> None:
    config = ScheduleConfig(schedule, 4 if schedule in ("1f1b-flush", "gpipe", "2bw") else None)
    assert_bits_of_the_reference(LAYERS[0], "1-1", config)
