"""Gradients of weights that are put off are the same, bit for bit, whatever a layer is made of."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import zoo
from torch import nn
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint

from pipedream_hpc import Pipeline
from pipedream_hpc.errors import PipedreamError
from pipedream_hpc.model.precision import autocast
from pipedream_hpc.runtime.put_off import PutOff
from pipedream_hpc.verification import reference
from pipedream_hpc.verification.reference import Way

WIDTH, ROWS, SAMPLES = 6, 3, 8


class Kept(nn.Module):
    """A layer that is never looked into."""


class Written(Kept):
    """The output of a layer, which is a view here, is written over."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x).relu_()


class Twice(Written):
    """The same layer called twice."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(self.inner(x).tanh()).tanh()


class Shared(Written):
    """Two layers with the same weight."""

    def __init__(self) -> None:
        super().__init__()
        self.other = nn.Linear(WIDTH, WIDTH)
        self.other.weight = self.inner.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.other(self.inner(x).tanh())


class Tied(Written):
    """A weight used outside its layer as well."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(self.inner(x).tanh(), self.inner.weight)


class Branches(Written):
    """A layer whose output nobody uses, and one that does not see the input."""

    def __init__(self) -> None:
        super().__init__()
        self.unused, self.blind = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.unused(x)
        return self.inner(x) + self.blind(torch.ones(WIDTH))


class Frozen(Written):
    """The weight is not trained, the bias is."""

    def __init__(self) -> None:
        super().__init__()
        self.inner.weight.requires_grad_(False)


class Alike(Kept):
    """A weight as large as the output of a layer: its gradient stands where that of the output does."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.shift = nn.Linear(WIDTH, WIDTH), nn.Parameter(torch.zeros(SAMPLES // 4 * ROWS * WIDTH))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x) + self.shift.view_as(x)


class Computed(Written):
    """The layer's weight is no parameter of its own, but computed in every forward."""

    def __init__(self) -> None:
        super().__init__()
        self.raw = nn.Parameter(torch.randn(WIDTH, WIDTH))
        del self.inner.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.inner.weight = self.raw.tanh()
        return self.inner(x)


class Steepest(Written):
    """The slope of a layer within the forward, which no gradient comes to afterwards."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.enable_grad():
            entry = x if x.requires_grad else x.detach().requires_grad_()
            slope, pull = torch.autograd.grad(self.inner(entry).tanh().sum(), [entry, self.inner.bias])
        return self.inner(x + 0.1 * slope.sign() + pull.mean())


class Met(Written):
    """Two weights meet through views: autograd gives both the same gradient, in the same memory."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Parameter(torch.zeros(WIDTH)), nn.Parameter(torch.zeros(WIDTH))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x) + (self.a[None] + self.b[None])


class Deep(Written):
    """Several layers whose forward is run again in backward."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(*[nn.Linear(WIDTH, WIDTH) for _ in range(4)])
        self.runs = 0
        self.layers[0].register_forward_hook(self.count)

    def count(self, *_: Any) -> None:
        self.runs += 1

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(checkpoint(self.layers, x, use_reentrant=False))


class Normed(Written):
    """The weight is computed from others."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = parametrizations.weight_norm(nn.Linear(WIDTH, WIDTH))


class Checkpointed(Written):
    """Its forward is run again in backward."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return checkpoint(lambda each: self.inner(each).tanh(), x, use_reentrant=False)


class Reentrant(Written):
    """The same, as torch did it first."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return checkpoint(lambda each: self.inner(each).tanh(), x, use_reentrant=True)


class Swish(Written):
    """The output is written over while its old value is still to be differentiated."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.inner(x)
        return h.mul_(h.sigmoid())


class Pair(nn.Linear):
    """A linear layer by its class, and nothing like it."""

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:  # type: ignore[override]
        return super().forward(x), self.weight.pow(2).mean()


class Derived(Kept):
    """What uses it."""

    def __init__(self) -> None:
        super().__init__()
        self.pair = Pair(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out, norm = self.pair(x)
        return out + norm


class Stop(torch.autograd.Function):
    """The gradient ends here."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> None:
        return None


class Stopped(Written):
    """A layer that no gradient comes to."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + Stop.apply(self.inner(x))


class Convolved(Kept):
    """Convolutions with normalisation between them, written over."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv1d(ROWS, 4, 3, padding=1), nn.BatchNorm1d(4), nn.ReLU(inplace=True), nn.ConvTranspose1d(4, ROWS, 1)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers(x)


class Without(Kept):
    """No layer that puts anything off."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(x)


LAYERS: list[Callable[[], nn.Module]] = [
    lambda: nn.Linear(WIDTH, WIDTH),
    lambda: nn.TransformerEncoderLayer(WIDTH, 2, 8, dropout=0.0, batch_first=True),
    Written, Twice, Shared, Tied, Branches, Frozen, Normed, Checkpointed, Reentrant, Swish, Derived, Stopped, Convolved,
    Without, Alike, Computed, Steepest, Deep, Met,
]  # fmt: skip


def start(layer: Callable[[], nn.Module]) -> tuple[nn.Module, list[tuple[torch.Tensor, torch.Tensor]]]:
    """A model with such layers, and three minibatches for it."""
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), layer(), nn.Tanh(), layer(), nn.Flatten(), nn.Linear(18, 4))
    return model, [(torch.randn(SAMPLES, ROWS, WIDTH), torch.randint(4, (SAMPLES,))) for _ in range(3)]


def optimizer(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.3, momentum=0.9)


def assert_as_the_reference(layer: Callable[[], nn.Module], plan: str, **options: Any) -> None:
    """All weights after two epochs of three minibatches, of stages in this process, to the bit."""
    model, batches = start(layer)
    with Pipeline(
        model,
        loss=nn.functional.cross_entropy,
        optimizer=optimizer,
        example=batches[0][0],
        plan=plan,
        leaves=[Kept, nn.TransformerEncoderLayer],
        trace=True,
        device="cpu",
        **{"schedule": "1f1b-flush", "microbatches": 4, "split_backward": True, **options},
    ) as pipeline:
        for _ in range(2):
            pipeline.fit(batches)
        assert ("weight-gradient" in {span.kind for span in pipeline.last_trace().spans}) == bool(pipeline.split)
        found, stages = pipeline.state_dict(), pipeline.stage_of_parameters()
        way = Way(
            options.get("schedule", "1f1b-flush"),
            [int(count) for count in plan.split("-")],
            pipeline.pieces,
            pipeline.accumulate,
            split=pipeline.split,
        )
    model, batches = start(layer)
    expected = reference.train(
        model,
        stages,
        [batches, batches],
        nn.functional.cross_entropy,
        optimizer,
        way,
        precision=autocast(options.get("precision")) or nullcontext,
    )
    assert [name for name in expected if not torch.equal(expected[name], found[name])] == []


@pytest.mark.parametrize("plan", ["1-1", "1-2", "1-1-1"])
@pytest.mark.parametrize("layer", [layer for layer in LAYERS if layer is not Reentrant])
def test_the_weights_are_those_of_the_reference(layer: Callable[[], nn.Module], plan: str) -> None:
    assert_as_the_reference(layer, plan)


@pytest.mark.parametrize(
    "options",
    [{"recompute": True}, {"precision": "bf16"}, {"schedule": "gpipe"}, {"zero_bubble": True}],
    ids=["recompute", "bf16", "gpipe", "zero bubble"],
)
def test_however_forwards_are_run(options: dict[str, Any]) -> None:
    assert_as_the_reference(LAYERS[1], "1-1-1", **options)


@pytest.mark.parametrize(
    "options",
    [{}, {"schedule": "gpipe"}, {"schedule": "1f1b", "microbatches": None, "accumulate": 3}],
    ids=["flush", "gpipe", "accumulated"],
)
def test_weights_that_meet_through_views_where_backwards_are_whole(options: dict[str, Any]) -> None:
    assert_as_the_reference(Met, "1-1-1", split_backward=False, **options)


def assert_split_as_whole(model: Callable[[], nn.Module], batches: Any, plan: str, **options: Any) -> None:
    """To the bit: of two microbatches the order in which they add up makes no difference."""

    def trained(split: bool) -> dict[str, torch.Tensor]:
        with Pipeline(
            model(),
            optimizer=optimizer,
            example=batches[0][0],
            plan=plan,
            schedule="1f1b-flush",
            microbatches=2,
            split_backward=split,
            device="cpu",
            **options,
        ) as pipeline:
            pipeline.fit(batches)
            return pipeline.state_dict()

    whole, split = trained(False), trained(True)
    assert [name for name in whole if not torch.equal(whole[name], split[name])] == []


def test_what_the_reference_cannot_run() -> None:
    """Reentrant checkpointing finds no weights that a call brings along."""
    model, batches = (lambda: start(Reentrant)[0]), start(Reentrant)[1]
    assert_split_as_whole(model, batches, "1-1-1", loss=nn.functional.cross_entropy, leaves=[Kept])


@pytest.mark.parametrize("plan", ["1-1", "1-2"])
def test_a_weight_borrowed_from_another_stage_gets_its_whole_gradient(plan: str) -> None:
    specimen = zoo.ZOO["gpt, tied"]
    assert_split_as_whole(specimen.model, specimen.minibatches(2, zoo.SAMPLES), plan, loss=specimen.loss)


def test_the_first_part_computes_no_gradient_that_can_wait() -> None:
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Linear(4, 5), nn.LayerNorm(5), nn.Tanh(), nn.Linear(5, 3))
    entry = torch.randn(2, 4, requires_grad=True)
    layers(entry).sum().backward()
    expected = [parameter.grad for parameter in (entry, *layers.parameters())]
    layers.zero_grad()
    entry.grad = None

    put_off = PutOff(layers, lambda leaf: True)
    with put_off.noting(5):
        out = layers(entry)
    put_off.first_part(5, lambda: out.sum().backward())
    assert [parameter.grad for parameter in layers.parameters()] == [None] * 6, "they are added when all are there"
    assert [gradient.shape for gradient in put_off.early(5)] == [(5,), (5,)], "those of the norm are there"
    assert entry.grad is not None
    late = dict(put_off.second_part(5))
    got = [late.get(parameter, parameter.grad) for parameter in (entry, *layers.parameters())]
    assert all(torch.equal(a, b) for a, b in zip(expected, got, strict=True))


def test_checkpointed_layers_run_their_forward_once_more_only() -> None:
    layer = Deep()
    put_off, x = PutOff(layer, lambda leaf: True), torch.randn(2, WIDTH, requires_grad=True)
    with put_off.noting(0):
        out = layer(x)
    put_off.first_part(0, lambda: out.sum().backward())
    assert len(put_off.early(0)) == 8, "all but the layer beside them, which puts its weight and bias off"
    assert len(list(put_off.second_part(0))) == 10
    assert layer.runs == 2


def test_nothing_is_kept_of_a_unit_that_is_done() -> None:
    layer = nn.Linear(4, 3)
    put_off = PutOff(layer, lambda leaf: True)
    entry = torch.ones(2, 4, requires_grad=True)
    with put_off.noting(0):
        out = layer(entry)
    (graph,) = put_off.graphs(0)
    put_off.first_part(0, lambda: out.sum().backward())
    (gradient,) = put_off.kept(0)
    mark = graph.metadata["mark"] = nn.Identity()  # lives as long as the graph
    left = [weakref.ref(each) for each in (mark, gradient)]
    del graph, gradient, mark
    assert [each() is None for each in left] == [False, False]
    assert len(list(put_off.second_part(0))) == 2
    assert [each() is None for each in left] == [True, True]


def test_a_module_that_differentiates_twice_is_told_so() -> None:
    layer = nn.Linear(4, 3)
    put_off = PutOff(layer, lambda leaf: True)
    entry = torch.ones(2, 4, requires_grad=True)
    with put_off.noting(0):
        out = layer(entry)
    (slope,) = torch.autograd.grad(out.tanh().sum(), entry, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        slope.sum().backward()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"schedule": "1f1b"}, "1f1b runs backwards whole: leave split_backward away, or use 1f1b-flush"),
        ({"schedule": "1f1b-flush", "microbatches": 2, "compiler": "eager"}, "compiled stages run backwards whole"),
        ({"zero_bubble": True, "microbatches": 2, "compiler": "eager"}, "backwards whole: leave zero_bubble away"),
        ({"schedule": "2bw", "zero_bubble": True}, "zero_bubble is for 1f1b-flush, not for 2bw: leave it away"),
    ],
)
def test_where_backwards_cannot_be_split(options: dict[str, Any], words: str) -> None:
    with pytest.raises(PipedreamError, match=words):
        Pipeline(
            nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2)),
            loss=nn.functional.mse_loss,
            optimizer=torch.optim.SGD,
            example=torch.ones(4, 4),
            plan=2,
            split_backward=True,
            device="cpu",
            **options,
        )
