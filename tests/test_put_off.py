"""Gradients of weights that are put off are the same, bit for bit, whatever a layer is made of."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint

from pipedream_hpc import Pipeline
from pipedream_hpc.errors import PipedreamError
from pipedream_hpc.runtime.put_off import Call, PutOff

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


class Normed(Written):
    """The weight is computed from others."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = parametrizations.weight_norm(nn.Linear(WIDTH, WIDTH))


class Checkpointed(Written):
    """Its forward is run again in backward."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return checkpoint(lambda each: self.inner(each).tanh(), x, use_reentrant=False)


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
    Written, Twice, Shared, Tied, Branches, Frozen, Normed, Checkpointed, Convolved, Without,
]  # fmt: skip


def trained(layer: Callable[[], nn.Module], plan: str, *, split: bool, **options: Any) -> dict[str, torch.Tensor]:
    """All weights after two epochs of three minibatches, of stages in this process."""
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), layer(), nn.Tanh(), layer(), nn.Flatten(), nn.Linear(18, 4))
    batches = [(torch.randn(SAMPLES, ROWS, WIDTH), torch.randint(4, (SAMPLES,))) for _ in range(3)]
    with Pipeline(
        model,
        loss=nn.functional.cross_entropy,
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.3, momentum=0.9),
        example=batches[0][0],
        plan=plan,
        schedule="1f1b-flush",
        microbatches=4,
        split_backward=split,
        leaves=[Kept, nn.TransformerEncoderLayer],
        trace=True,
        device="cpu",
        **options,
    ) as pipeline:
        for _ in range(2):
            pipeline.fit(batches)
        kinds = {span.kind for span in pipeline.last_trace().spans}
        assert ("weight-gradient" in kinds) == split
        return pipeline.state_dict()


@pytest.mark.parametrize("plan", ["1-1", "1-2", "1-1-1"])
@pytest.mark.parametrize("layer", LAYERS)
def test_the_weights_are_those_of_whole_backwards(layer: Callable[[], nn.Module], plan: str) -> None:
    whole, split = (trained(layer, plan, split=split) for split in (False, True))
    assert [name for name in whole if not torch.equal(whole[name], split[name])] == []


@pytest.mark.parametrize("options", [{"recompute": True}, {"precision": "bf16"}], ids=["recompute", "bf16"])
def test_however_forwards_are_run(options: dict[str, Any]) -> None:
    layer = LAYERS[1]
    whole, split = (trained(layer, "1-1", split=split, **options) for split in (False, True))
    assert [name for name in whole if not torch.equal(whole[name], split[name])] == []


def test_the_first_part_computes_no_gradient_that_can_wait() -> None:
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Linear(4, 5), nn.LayerNorm(5), nn.Tanh(), nn.Linear(5, 3))
    entry = torch.randn(2, 4, requires_grad=True)
    layers(entry).sum().backward()
    expected = [parameter.grad for parameter in (entry, *layers.parameters())]
    layers.zero_grad()
    entry.grad = None

    put_off, calls = PutOff(layers), list[Call]()
    put_off.note(calls)
    out = layers(entry)
    put_off.note(None)
    assert [call.layer for call in calls] == [layers[0], layers[3]]
    assert layers[0].weight is dict(layers.named_parameters())["0.weight"], "twins stand there during forward only"
    assert put_off.backward([out], [torch.ones_like(out)], [entry, *layers.parameters()], calls) == {}
    assert [parameter.grad is None for parameter in layers.parameters()] == [True, True, False, False, True, True]
    assert entry.grad is not None
    late = {leaf: gradient for call in calls for leaf, gradient in call.finish().items()}
    got = [late.get(parameter, parameter.grad) for parameter in (entry, *layers.parameters())]
    assert all(torch.equal(a, b) for a, b in zip(expected, got, strict=True))


def test_a_forward_that_fails_leaves_the_layer_its_weights() -> None:
    layer = nn.Linear(4, 3)
    weight, put_off = layer.weight, PutOff(layer)
    put_off.note([])
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        layer(torch.ones(2, 5))
    assert layer.weight is weight


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"schedule": "1f1b"}, "1f1b runs backwards whole: leave the split away, or use 1f1b-flush"),
        ({"schedule": "1f1b-flush", "microbatches": 2, "compiler": "eager"}, "compiled stages run backwards whole"),
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
