"""The user's program is the truth: helpers and models for the tests that compare stages with plain torch, bit for bit.

Each model's forward does more than it shows: contexts, flags, hooks, state, objects. The reference is an ordinary loop;
it shares nothing with the pipeline.
"""

from __future__ import annotations

import types
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrizations, prune

from pipedream_hpc import Pipeline, ScheduleConfig, TrainConfig

LOSS = nn.CrossEntropyLoss()
SGD = partial(torch.optim.SGD, lr=0.1)


def minibatches(count: int = 5, samples: int = 8, shape: tuple[int, ...] = (6,)) -> list[Any]:
    draw = torch.Generator().manual_seed(7)
    return [
        (torch.randn(samples, *shape, generator=draw), torch.randint(0, 3, (samples,), generator=draw))
        for _ in range(count)
    ]


def plain(model: nn.Module, batches: list[Any], loss_fn: Any = LOSS, optimizer: Any = SGD) -> dict[str, torch.Tensor]:
    """Train in an ordinary loop; return the state dict."""
    steps = optimizer([each for each in model.parameters() if each.requires_grad])
    model.train()
    for inputs, target in batches:
        steps.zero_grad()
        output = model(*inputs) if type(inputs) is tuple else model(inputs)
        loss_fn(output, target).backward()
        steps.step()
    return dict(model.state_dict())


def pipeline_of(model: nn.Module, plan: Any, batches: list[Any], loss_fn: Any = LOSS, **options: Any) -> Pipeline:
    return Pipeline(
        model,
        loss_fn=loss_fn,
        optimizer=options.pop("optimizer", SGD),
        example_inputs=batches[0][0],
        plan=plan,
        schedule=ScheduleConfig("1f1b-flush", 1),
        train_config=TrainConfig(**options),
    )


def assert_trained_alike(
    build: Callable[[], nn.Module], plan: Any, batches: list[Any] | None = None, loss_fn: Any = LOSS, **options: Any
) -> Pipeline:
    """Train in stages and in a plain loop; assert that weights and buffers have the same bits."""
    batches = batches or minibatches()
    pipeline = pipeline_of(build(), plan, batches, loss_fn, **options)
    pipeline.fit(batches)
    expected = plain(build(), batches, loss_fn, options.get("optimizer", SGD))
    trained = pipeline.state_dict()
    assert trained.keys() == expected.keys()
    different = {name: float((trained[name].double() - value.double()).abs().max()) for name, value in expected.items()}
    assert {name: each for name, each in different.items() if each} == {}
    return pipeline


class Net(nn.Module):
    """Three layers; subclasses change what happens between them."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.c = nn.Linear(6, 16), nn.Linear(16, 16), nn.Linear(16, 3)

    def forward(self, x: torch.Tensor) -> Any:
        return self.c(self.b(self.a(x)).tanh())


class NoGrad(Net):
    def forward(self, x: torch.Tensor) -> Any:
        with torch.no_grad():
            h = self.a(x).relu()
        return self.c(self.b(h).tanh())


class Decorated(Net):
    @torch.no_grad()
    def features(self, x: torch.Tensor) -> torch.Tensor:
        return self.b(self.a(x)).tanh()

    def forward(self, x: torch.Tensor) -> Any:
        return self.c(self.features(x))


class Detached(Net):
    def forward(self, x: torch.Tensor) -> Any:
        h = self.a(x)
        return self.c(self.b(h.detach()).tanh() + h)


class Reverse(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        return -0.5 * gradient


class ReverseLayer(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return Reverse.apply(x)  # type: ignore[no-any-return]


class ReversedInAModule(Net):
    def __init__(self) -> None:
        super().__init__()
        self.reverse = ReverseLayer()

    def forward(self, x: torch.Tensor) -> Any:
        return self.c(self.reverse(self.b(self.a(x)).tanh()))


class ReversedInTheForward(Net):
    def forward(self, x: torch.Tensor) -> Any:
        return self.c(Reverse.apply(self.b(self.a(x)).tanh()))


class Checkpointed(Net):
    def forward(self, x: torch.Tensor) -> Any:
        h = torch.utils.checkpoint.checkpoint(self.b, self.a(x), use_reentrant=False)
        return self.c(h.tanh())


class Residual(nn.Module):
    def __init__(self, _: int) -> None:
        super().__init__()
        self.linear = nn.Linear(16, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.linear(x).tanh()


def chain() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3))


def hook() -> nn.Module:
    model = chain()
    model.register_forward_hook(lambda module, inputs, output: output * 10)
    return model


def inner_hook() -> nn.Module:
    model = chain()
    model[2].register_forward_hook(lambda module, inputs, output: output * 3)
    return model


def backward_hook() -> nn.Module:
    model = chain()
    model[2].register_full_backward_hook(lambda module, inputs, outputs: (inputs[0] * 2,))
    return model


def patched() -> nn.Module:
    model = chain()
    own = type(model).forward
    model.forward = types.MethodType(lambda self, input: own(self, input) * 10, model)
    return model


def lora() -> nn.Module:
    model = chain()
    layer = model[2]
    layer.down, layer.up = nn.Parameter(torch.randn(2, 8)), nn.Parameter(torch.zeros(8, 2))
    base = layer.forward
    layer.forward = lambda x: base(x) + x @ layer.down.T @ layer.up.T
    return model


def spectral() -> nn.Module:
    model = chain()
    parametrizations.spectral_norm(model[2])
    return model


def pruned() -> nn.Module:
    model = chain()
    prune.l1_unstructured(model[2], "weight", 0.5)
    return model


def hooked_backwards(where: str, kind: str = "register_full_backward_hook") -> nn.Module:
    """Return a model with a hook that changes gradients, on the module named `where`."""
    torch.manual_seed(0)
    inner = nn.Sequential(nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 16))
    model = nn.Sequential(nn.Linear(6, 16), inner, nn.Tanh(), nn.Linear(16, 3))
    getattr(model.get_submodule(where), kind)(lambda *args: (args[1][0] * 0.5,))
    return model


class Masks(nn.Module):
    """Returns two masks of one dropout module."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.drop, self.b = nn.Linear(6, 6), nn.Dropout(0.5), nn.Linear(6, 3)

    def forward(self, x: torch.Tensor) -> Any:
        h = self.a(x)
        one = torch.ones(8, 6)
        first = self.drop(one + 0 * h)
        return self.b(h), first, self.drop(one + 0 * h)


class Noisy(Net):
    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.drop = how, nn.Dropout(0.2)

    def forward(self, x: torch.Tensor) -> Any:
        h = self.b(self.drop(self.a(x)))
        if self.how == "gumbel":
            h = h * nn.functional.gumbel_softmax(h)
        elif self.how == "normal":
            h = h + torch.normal(torch.zeros_like(h), 1.0)
        elif self.how == "bernoulli_":
            h = h * h.new_empty((8, 16)).bernoulli_(0.5)
        elif self.how == "rand":
            h = h + torch.rand(16)
        elif self.how == "dropout":
            h = nn.functional.dropout(h, 0.5, self.training)
        return self.c(h)


def with_state(make: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        model = chain()
        model.insert(1, make())
        return model

    return build


class Auxiliary(Net):
    """Returns a tuple in training only, from a head in the middle."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(16, 3)

    def forward(self, x: torch.Tensor) -> Any:
        h = self.a(x)
        out = self.c(self.b(h).tanh())
        return (out, self.head(h)) if self.training else out


def auxiliary_loss(output: Any, target: torch.Tensor) -> torch.Tensor:
    return (
        LOSS(output[0], target) + 0.3 * LOSS(output[1], target) if isinstance(output, tuple) else LOSS(output, target)
    )


class Policy(Net):
    """Returns a parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.log_std = nn.Parameter(torch.full((3,), 0.1))

    def forward(self, x: torch.Tensor) -> Any:
        return super().forward(x), self.log_std


@dataclass
class Out:
    last: torch.Tensor
    pooled: torch.Tensor | None = None


class Encoder(nn.Module):
    def __init__(self, make: Any) -> None:
        super().__init__()
        self.make, self.layers = make, nn.Sequential(nn.Linear(6, 32), nn.Tanh(), nn.Linear(32, 16))

    def forward(self, x: torch.Tensor) -> Any:
        h = self.layers(x)
        return self.make(h if float(h.sum()) < 1e9 else -h)


class Objects(nn.Module):
    """Passes an object from module to module, and uses it again in the end."""

    def __init__(self, make: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.encoder = Encoder(make)
        self.decoder, self.side = nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 3)), nn.Linear(16, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = self.encoder(x)
        last = out["last"] if isinstance(out, dict) else out.last
        return self.decoder(last) + self.side(last)


def cut(
    model: nn.Module,
    batches: list[Any],
    loss_fn: Any = LOSS,
    n_microbatches: int = 2,
    plan: Any = 2,
    batch_dims: dict[str, int | None] | None = None,
) -> Pipeline:
    return Pipeline(
        model,
        loss_fn=loss_fn,
        optimizer=SGD,
        example_inputs=batches[0] if isinstance(batches[0], dict) else batches[0][0],
        plan=plan,
        schedule=ScheduleConfig("1f1b-flush", n_microbatches),
        train_config=TrainConfig(batch_dims=batch_dims or {}),
    )
