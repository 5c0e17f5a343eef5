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

import rounding
import torch
from torch import nn
from torch.func import functional_call

Batches = Sequence[tuple[Any, torch.Tensor]]

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


@rounding.correct_square_roots()
def train(
    model: nn.Module,
    stage_of: dict[str, int],
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
    seeded: Callable[[nn.Module, int], None] = lambda model, unit: None,
) -> dict[str, torch.Tensor]:
    """Weights of the model after all epochs.

    The whole model is run on a mixture of weights: of every stage the version that the unit meets there.

    Args:
        stage_of: the stage of every parameter.
        seeded: called with every unit's number within the run before its forward.
    """
    n = max(stage_of.values()) + 1
    replicas = replicas or [1] * n
    own = [{name: p for name, p in model.named_parameters() if stage_of[name] == s} for s in range(n)]
    optimizers = [optimizer(each.values()) for each in own]
    schedulers = [scheduler(each) for each in optimizers] if scheduler else []
    per_round = [microbatches * accumulate if kind in CUT else R * accumulate for R in replicas]
    versions = [[_copy(each)] for each in own]  # versions[s][v]
    run = 0
    for batches in epochs:
        begin = [len(of_stage) - 1 for of_stage in versions]
        units = _units(batches, microbatches if kind in CUT else 1, accumulate if kind in CUT else 1)
        # sums[s][r]: of the gradients that replica r of stage s has made in this round
        sums: list[list[dict[str, torch.Tensor]]] = [[{} for _ in range(R)] for R in replicas]
        for k, (inputs, target, weight) in enumerate(units):
            leaves = {}
            for s in range(n):
                used = versions[s][begin[s] + version(kind, replicas, per_round, accumulate, s, k)]
                leaves.update({name: w.clone().requires_grad_() for name, w in used.items()})
            seeded(model, run + k)
            scored = loss(functional_call(model, leaves, inputs), target)
            (scored if weight == 1 else scored * weight).backward()
            for name, leaf in leaves.items():
                total = sums[stage_of[name]][k % replicas[stage_of[name]]]
                if leaf.grad is not None:
                    total[name] = total[name] + leaf.grad if name in total else leaf.grad
            ending = [s for s in range(n) if (k + 1) % per_round[s] == 0 or k + 1 == len(units)]
            averages = {}
            for s in ending:
                count = (k % per_round[s]) + 1 if kind not in CUT else 1
                averages[s] = _averaged(sums[s], count)
                sums[s] = [{} for _ in range(replicas[s])]
            _clip(averages, clip)
            for s in ending:
                for name, parameter in own[s].items():
                    parameter.grad = averages[s].get(name)
                optimizers[s].step()  # acts on the newest version
                versions[s].append(_copy(own[s]))
                for _ in range(-(-((k % per_round[s]) + 1) // (microbatches if kind in CUT else 1))):
                    if schedulers:
                        schedulers[s].step()
        run += len(units)
    return {name: value for of_stage in versions for name, value in of_stage[-1].items()}


def _units(batches: Batches, pieces: int, accumulate: int) -> list[tuple[Any, torch.Tensor, float]]:
    """(inputs, target, weight of its loss): minibatches, or the microbatches they are cut into."""
    units = []
    for number, (inputs, target) in enumerate(batches):
        sharing = min(accumulate, len(batches) - number // accumulate * accumulate)
        several = inputs if isinstance(inputs, tuple) else (inputs,)
        cut = zip(*(each.tensor_split(pieces) for each in several), strict=True)
        for x, y in zip(cut, target.tensor_split(pieces), strict=True):
            units.append((x, y, 1.0 if pieces == sharing == 1 else len(y) / len(target) / sharing))
    return units


def _averaged(of_replicas: list[dict[str, torch.Tensor]], count: int) -> dict[str, torch.Tensor]:
    total: dict[str, torch.Tensor] = {}
    for own in of_replicas:
        for name, gradient in own.items():
            total[name] = total[name] + gradient if name in total else gradient
    return {name: gradient / count if count > 1 else gradient for name, gradient in total.items()}


def _clip(averages: dict[int, dict[str, torch.Tensor]], clip: tuple[float, str] | None) -> None:
    if clip is None:
        return
    squares = {s: sum(float(g.double().pow(2).sum()) for g in found.values()) for s, found in averages.items()}
    for s, found in averages.items():
        norm = (squares[s] if clip[1] == "stage" else sum(squares.values())) ** 0.5
        if norm > clip[0]:
            for gradient in found.values():
                gradient.mul_(clip[0] / (norm + 1e-6))


def _copy(parameters: dict[str, nn.Parameter]) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in parameters.items()}
