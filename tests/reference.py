"""Every way of training in plain autograd: equations of the papers and nothing else.

With weight stashing (PipeDream, section 3.3), one replica per stage:

    w^(t+1) = w^(t) - ν · ∇f(w_1^(t-n+1), w_2^(t-n+2), ..., w_n^(t))

and in general: stage s runs unit k on version `version(s, k)`, versions of a stage are made by rounds of
units, and each round's gradients are averaged. What differs between schedules is these two functions.
Every version of every stage is kept as a copy of its own; nothing is shared with the code under test.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.func import functional_call

Batches = Sequence[tuple[torch.Tensor, torch.Tensor]]

CUT = ("1f1b-flush", "gpipe", "2bw", "interleaved")


def warm_up(replicas: Sequence[int], s: int) -> int:
    """ceil(ranks behind the stage / its replicas): forwards before the first backward."""
    return -(-sum(replicas[s + 1 :]) // replicas[s])


def version(kind: str, replicas: Sequence[int], per_round: Sequence[int], accumulate: int, s: int, k: int) -> int:
    """The version that stage s runs unit k on, counted from the epoch's beginning."""
    if kind == "1f1b":
        return max(0, k // replicas[s] - warm_up(replicas, s)) // accumulate
    if kind == "vertical-sync":
        of_input = max(0, k // replicas[0] - warm_up(replicas, 0)) // accumulate
        return replicas[0] * of_input // replicas[s]
    if kind == "2bw":
        return max(0, k // per_round[s] - 1)
    return k // per_round[s]  # synchronous: every round before it


def train(
    stages: Sequence[nn.Sequential],
    epochs: Sequence[Batches],
    loss: Any,
    optimizer: Callable[..., Any],
    *,
    kind: str = "1f1b",
    replicas: Sequence[int] = (),
    microbatches: int = 1,
    accumulate: int = 1,
    scheduler: Callable[..., Any] | None = None,
    clip: tuple[float, str] | None = None,
) -> list[dict[str, torch.Tensor]]:
    """Weights of every stage after all epochs."""
    n, replicas = len(stages), replicas or [1] * len(stages)
    optimizers = [optimizer(stage.parameters()) for stage in stages]
    schedulers = [scheduler(each) for each in optimizers] if scheduler else []
    per_round = [microbatches * accumulate if kind in CUT else R * accumulate for R in replicas]
    versions = [[_copy(stage)] for stage in stages]  # versions[s][v]
    for batches in epochs:
        begin = [len(of_stage) - 1 for of_stage in versions]
        units = _units(batches, microbatches if kind in CUT else 1, accumulate if kind in CUT else 1)
        # sums[s][r]: of the gradients that replica r of stage s has made in this round
        sums: list[list[dict[str, torch.Tensor]]] = [[{} for _ in range(R)] for R in replicas]
        for k, (inputs, target, weight) in enumerate(units):
            leaves, value = [], inputs
            for s, stage in enumerate(stages):
                used = versions[s][begin[s] + version(kind, replicas, per_round, accumulate, s, k)]
                leaves.append({name: w.clone().requires_grad_() for name, w in used.items()})
                value = functional_call(stage, leaves[s], value)
            scored = loss(value, target)
            (scored if weight == 1 else scored * weight).backward()
            for s in range(n):
                own = sums[s][k % replicas[s]]
                for name, leaf in leaves[s].items():
                    own[name] = own[name] + leaf.grad if name in own else leaf.grad
            ending = [s for s in range(n) if (k + 1) % per_round[s] == 0 or k + 1 == len(units)]
            averages = {}
            for s in ending:
                count = (k % per_round[s]) + 1 if kind not in CUT else 1
                averages[s] = _averaged(sums[s], count)
                sums[s] = [{} for _ in range(replicas[s])]
            _clip(averages, stages, clip)
            for s in ending:
                for name, parameter in stages[s].named_parameters():
                    parameter.grad = averages[s][name]
                optimizers[s].step()  # acts on the newest version
                versions[s].append(_copy(stages[s]))
                for _ in range(-(-((k % per_round[s]) + 1) // (microbatches if kind in CUT else 1))):
                    if schedulers:
                        schedulers[s].step()
    return [of_stage[-1] for of_stage in versions]


def _units(batches: Batches, pieces: int, accumulate: int) -> list[tuple[torch.Tensor, torch.Tensor, float]]:
    """(inputs, target, weight of its loss): minibatches, or the microbatches they are cut into."""
    units = []
    for number, (inputs, target) in enumerate(batches):
        sharing = min(accumulate, len(batches) - number // accumulate * accumulate)
        for x, y in zip(inputs.tensor_split(pieces), target.tensor_split(pieces), strict=True):
            units.append((x, y, 1.0 if pieces == sharing == 1 else len(x) / len(inputs) / sharing))
    return units


def _averaged(of_replicas: list[dict[str, torch.Tensor]], count: int) -> dict[str, torch.Tensor]:
    total: dict[str, torch.Tensor] = {}
    for own in of_replicas:
        for name, gradient in own.items():
            total[name] = total[name] + gradient if name in total else gradient
    return {name: gradient / count if count > 1 else gradient for name, gradient in total.items()}


def _clip(
    averages: dict[int, dict[str, torch.Tensor]], stages: Sequence[nn.Sequential], clip: tuple[float, str] | None
) -> None:
    if clip is None:
        return
    squares = {s: sum(float(g.double().pow(2).sum()) for g in found.values()) for s, found in averages.items()}
    for s, found in averages.items():
        norm = (squares[s] if clip[1] == "stage" else sum(squares.values())) ** 0.5
        if norm > clip[0]:
            for gradient in found.values():
                gradient.mul_(clip[0] / (norm + 1e-6))


def _copy(stage: nn.Module) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in stage.named_parameters()}
