"""The check that stages compute what the model computes, at every boundary of models of every kind."""

from __future__ import annotations

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
    backward_hook,
    hook,
    inner_hook,
    lora,
    minibatches,
    patched,
    pipeline_of,
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
    calls = []

    class Fickle(Net):
        def forward(self, x: torch.Tensor) -> Any:
            calls.append(1)
            return self.c(self.b(self.a(x)).tanh() * len(calls))

    with pytest.raises(PipedreamError, match="the stages do not compute what the model computes by itself"):
        pipeline_of(Fickle(), 2, minibatches())
    pipeline_of(Fickle(), 2, minibatches(), check_model=False)
