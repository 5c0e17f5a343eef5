"""Models of two stages between which tensors of every kind cross, trained by the pipeline and in plain torch."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn

from pipedream_hpc import Pipeline, ScheduleConfig, TrainConfig

Tensor = torch.Tensor
Tensors = dict[str, Tensor]


def complex_of(h: Tensor) -> Tensor:
    return torch.complex(h, 2 * h)


def real(z: Tensor) -> Tensor:
    return torch.view_as_real(z.resolve_conj()).pow(2).sum(-1).float()


#: name -> (what crosses, made of h (4, 8); what the second stage makes of it: (4, 8))
KINDS: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    "complex64": (complex_of, real),
    "complex128": (lambda h: complex_of(h.double()), real),
    "complex view": (lambda h: torch.view_as_complex(h.view(-1, 4, 2)), lambda z: z.abs().repeat(1, 2)),
    "conjugate": (lambda h: complex_of(h).conj(), lambda z: z.imag + z.real),
    "negative": (lambda h: complex_of(h).conj().imag, lambda v: v),
    "bool": (lambda h: h > 0, lambda v: v.float()),
    "int8": (lambda h: (10 * h).to(torch.int8), lambda v: v.float()),
    "uint8": (lambda h: (10 * h).abs().to(torch.uint8), lambda v: v.float()),
    "int16": (lambda h: (10 * h).to(torch.int16), lambda v: v.float()),
    "int64": (lambda h: h.argsort(1), lambda v: v.float()),
    "float64": (lambda h: h.double(), lambda v: v.pow(2).float()),
    "float16": (lambda h: h.half(), lambda v: v.float()),
    "bfloat16": (lambda h: h.bfloat16(), lambda v: v.float()),
    "no elements": (lambda h: h[:, :0], lambda v: v.sum() + torch.ones(4, 8)),
    "no dimensions": (lambda h: h.mean(), lambda v: v * torch.ones(4, 8)),
    "count": (lambda h: (h > 0).sum(), lambda v: v * torch.ones(4, 8)),
    "transposed": (lambda h: h.t(), lambda v: v.t()),
    "strided": (lambda h: h[:, ::2], lambda v: v.repeat(1, 2)),
    "offset": (lambda h: h[:, 3:7], lambda v: v.repeat(1, 2)),
    "expanded": (lambda h: h[:, :1].expand(-1, 8), lambda v: v),
    "expanded constant": (lambda h: h.detach()[:, :1].expand(-1, 8), lambda v: v),
    "overlapping": (lambda h: h.unfold(1, 3, 1), lambda v: nn.functional.pad(v.mean(2), (0, 2))),
}


class First(nn.Module):
    """Returns what crosses, made of h, and h."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.a, self.b = kind, nn.Linear(6, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = self.b(torch.tanh(self.a(x)))
        return KINDS[self.kind][0](h), h


class Last(nn.Module):
    """Uses both; gradients come back for both."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.c, self.weight = kind, nn.Linear(8, 3), nn.Parameter(torch.ones(8))

    def forward(self, crossed: tuple[Tensor, Tensor]) -> Tensor:
        value, h = crossed
        out: Tensor = self.c(h + self.weight * KINDS[self.kind][1](value))
        return out


class ComplexLinear(nn.Module):
    """Has complex weights, and returns the conjugate as a view."""

    def __init__(self, n_in: int, n_out: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(n_out, n_in, dtype=torch.complex64) / 4)

    def forward(self, z: Tensor) -> Tensor:
        return (z @ self.weight.t()).conj()


class Magnitude(nn.Module):
    def forward(self, z: Tensor) -> Tensor:
        return z.abs()


def case(kind: str) -> tuple[nn.Module, list[tuple[Tensor, Tensor]]]:
    """Return the model and four minibatches; for `complex weights` the inputs are complex, too."""
    torch.manual_seed(0)
    if kind == "complex weights":
        model = nn.Sequential(ComplexLinear(6, 8), ComplexLinear(8, 3), Magnitude())
    else:
        model = nn.Sequential(First(kind), Last(kind))
    x = torch.randn(4, 4, 6, dtype=torch.complex64 if kind == "complex weights" else torch.float32)
    return model, list(zip(x.conj(), torch.randint(0, 3, (4, 4)), strict=True))


def plain(kind: str) -> Tensors:
    """Return the weights after training in plain torch."""
    model, data = case(kind)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for x, y in data:
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    return model.state_dict()


def piped(kind: str) -> Tensors:
    """Return the weights after training in two stages, without staleness."""
    model, data = case(kind)
    with Pipeline(
        model,
        loss_fn=nn.CrossEntropyLoss(),
        optimizer=partial(torch.optim.SGD, lr=0.1),
        example_inputs=data[0][0],
        plan=2,
        schedule=ScheduleConfig("gpipe", n_microbatches=1),
        train_config=TrainConfig(leaf_modules=(First, Last, ComplexLinear)),
    ) as pipeline:
        pipeline.fit(data)
        return pipeline.state_dict()


def piped_all(kinds: list[str]) -> dict[str, Any]:
    """Train all, one after the other, on these ranks."""
    return {kind: piped(kind) for kind in kinds}
