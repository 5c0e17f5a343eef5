"""The check that stages compute what the model computes, at every boundary of models of every kind."""

from __future__ import annotations

import threading
from collections import OrderedDict, UserDict
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from user_programs import (
    Auxiliary,
    Checkpointed,
    Decorated,
    Detached,
    Masks,
    Net,
    NoGrad,
    Noisy,
    Objects,
    Out,
    Policy,
    ReversedInAModule,
    ReversedInTheForward,
    assert_trained_alike,
    backward_hook,
    hook,
    inner_hook,
    lora,
    minibatches,
    patched,
    pipeline_of,
    plain,
    pruned,
    spectral,
)

from pipedream_hpc import PipedreamError
from pipedream_hpc.model.arguments import Arguments
from pipedream_hpc.model.capture import capture
from pipedream_hpc.model.partition import Partition
from pipedream_hpc.runtime.launch.same_program import check_same_program


@pytest.mark.parametrize(
    "build",
    [
        *(NoGrad, Decorated, Detached, ReversedInAModule, ReversedInTheForward, Checkpointed, Masks, Auxiliary, Policy),
        *(hook, inner_hook, backward_hook, patched, lora, spectral, pruned, lambda: Objects(Out)),
        *(lambda: Noisy("gumbel"), lambda: Noisy("bernoulli_"), lambda: Noisy("dropout")),
    ],
)
def test_the_check_passes_whichever_boundary_is_chosen(build: Callable[[], nn.Module]) -> None:
    model = build()
    graph = capture(model, minibatches()[0][0])
    arguments = graph.inputs.like(minibatches()[0][0])
    count = len(graph.layers)
    cuts = [[list(range(first)), list(range(first, count))] for first in range(1, count)]
    for stages in [*cuts, [[layer] for layer in range(count)]]:
        check_same_program(graph, Partition(graph, stages), len(stages), arguments, seed=0, precision=None)


def test_the_check_lets_a_gradient_pass_that_is_zero_but_for_rounding() -> None:
    """BatchNorm takes the mean away, so the bias before it has no gradient."""

    class Skips(Net):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(16)

        def forward(self, x: torch.Tensor) -> Any:
            h = self.a(x)
            return self.c(self.norm(h + self.b(h.tanh())) + 0 * h)

    batches = minibatches(1, 512)
    graph = capture(Skips(), batches[0][0])
    for boundary in range(1, len(graph.layers)):
        partition = Partition(graph, [range(boundary), range(boundary, len(graph.layers))])
        check_same_program(graph, partition, 2, Arguments((batches[0][0],), {}), seed=0, precision=None)


def test_the_check_finds_what_a_stage_does_differently() -> None:
    """A forward that behaves differently the second time it is called from the same state."""
    seen = threading.local()  # which is not put back
    seen.calls = 0

    class Fickle(Net):
        def forward(self, x: torch.Tensor) -> Any:
            seen.calls += 1
            return self.c(self.b(self.a(x)).tanh() * seen.calls)

    with pytest.raises(PipedreamError, match="the stages do not compute what the model computes by itself"):
        pipeline_of(Fickle(), 2, minibatches())
    pipeline_of(Fickle(), 2, minibatches(), check_model=False)


class Attention(nn.Module):
    """Keeps keys for later layers in what it is given; layers without a projection of keys take those."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number, self.query = number, nn.Linear(6, 6)
        self.keys = nn.Linear(6, 6) if number < 2 else None

    def forward(self, x: torch.Tensor, shared: Any) -> torch.Tensor:
        if self.keys is not None:
            keys = self.keys(x).tanh()
            if isinstance(shared, list):
                shared.append((keys, keys.sum()))
            else:
                shared[f"of {self.number}"], shared["last"] = (keys, keys.sum()), keys
                shared["n"] = shared.get("n", 0) + 1
        else:
            keys, total = shared[0] if isinstance(shared, list) else shared["of 1"]
            keys = keys * total + (shared[-1][0] if isinstance(shared, list) else shared["last"] / shared["n"])
        scores = self.query(x) @ keys.T
        if float(scores.detach().sum()) > 1e9:  # so it is kept whole
            return x
        return scores.softmax(-1) @ x + x


class Layer(nn.Module):
    def __init__(self, number: int) -> None:
        super().__init__()
        self.attention, self.mlp = Attention(number), nn.Linear(6, 6)

    def forward(self, x: torch.Tensor, shared: Any) -> torch.Tensor:
        return x + self.mlp(self.attention(x, shared=shared)).tanh()  # type: ignore[no-any-return]


class Shares(nn.Module):
    """Passes a dict or a list along, into which layers put what later ones read."""

    def __init__(self, make: Callable[[], Any], *, writes: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.make, self.writes = make, writes
        self.layers, self.head = nn.ModuleList(Layer(number) for number in range(4)), nn.Linear(6, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        shared = self.make()
        for layer in self.layers:
            x = layer(x, shared)
            if self.writes:
                x.mul_(0.5)
        kept = shared if isinstance(shared, list) else list(shared)
        return self.head(x) * len(kept)  # type: ignore[no-any-return]


@pytest.mark.parametrize("writes", [False, True])
@pytest.mark.parametrize("make", [dict, list, UserDict, OrderedDict])
def test_dicts_and_lists_that_modules_fill_for_later_modules(make: Callable[[], Any], writes: bool) -> None:
    batches = minibatches()
    expected = plain(Shares(make, writes=writes), batches)
    for plan in (2, 3, 4):
        pipeline = pipeline_of(Shares(make, writes=writes), plan, batches)
        pipeline.fit(batches)
        for name, weight in pipeline.state_dict().items():
            # Gradients of what several stages use are added up in another order.
            torch.testing.assert_close(weight, expected[name], rtol=1e-5, atol=1e-6)


class Scales(Net):
    """A weight of the model itself that a function returns as it is."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(1.5))

    def forward(self, x: torch.Tensor) -> Any:
        h = self.b(self.a(x)).tanh()
        scale = self.scale.to(h.device)
        return self.c(h) * scale.exp() + scale


@pytest.mark.parametrize("plan", [1, 2, 3])
def test_a_weight_that_a_function_returns_as_it_is(plan: int) -> None:
    assert_trained_alike(Scales, plan)
    assert_trained_alike(Scales, plan, recompute=True)


def test_a_tensor_that_a_closure_keeps_of_an_earlier_forward_is_refused() -> None:
    cache: dict[str, torch.Tensor] = {}

    class Remembers(Net):
        def forward(self, x: torch.Tensor) -> Any:
            h = self.b(self.a(x)).tanh() + cache.get("h", 0.0)
            cache["h"] = h.detach().mean()
            return self.c(h)

    with pytest.raises(PipedreamError, match="uses a tensor that it has kept of an earlier minibatch"):
        pipeline_of(Remembers(), 3, minibatches())
