"""Weight stashing in plain autograd: the equation of the paper (section 3.3) and nothing else.

    w^(t+1) = w^(t) - ν · ∇f(w_1^(t-n+1), w_2^(t-n+2), ..., w_n^(t))

where w_s^(u) with u before the epoch's beginning is what stage s held then. Every version of every
stage is kept as a copy of its own; nothing is shared with the code under test.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.func import functional_call

Batches = Sequence[tuple[torch.Tensor, torch.Tensor]]


def train(
    stages: Sequence[nn.Sequential], epochs: Sequence[Batches], loss: Any, optimizer: Callable[..., Any]
) -> list[dict[str, torch.Tensor]]:
    """Weights of every stage after all epochs."""
    n = len(stages)
    optimizers = [optimizer(stage.parameters()) for stage in stages]
    versions = [[_copy(stage)] for stage in stages]  # versions[s][u] = w_s^(u)
    for batches in epochs:
        begin = len(versions[0]) - 1
        for t, (inputs, target) in enumerate(batches):
            leaves = []
            value = inputs
            for s, stage in enumerate(stages):
                used = versions[s][begin + max(0, t - n + 1 + s)]
                leaves.append({name: w.clone().requires_grad_() for name, w in used.items()})
                value = functional_call(stage, leaves[s], value)
            loss(value, target).backward()
            for s, stage in enumerate(stages):
                for name, parameter in stage.named_parameters():
                    parameter.grad = leaves[s][name].grad
                optimizers[s].step()  # acts on w^(t), the newest
                versions[s].append(_copy(stage))
    return [of_stage[-1] for of_stage in versions]


def _copy(stage: nn.Module) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in stage.named_parameters()}
