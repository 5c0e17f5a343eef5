"""Whole loss: is the loss of a minibatch the mean of the losses of its microbatches?

It is not for a sum, for a loss that compares samples with each other, or for a mean over unequal numbers of tokens. The
output stage finds out with the first minibatch that it trains: it keeps what its microbatches put out, and computes the
loss of all of them together. Losses that are random, or that have no tensors of samples to join, are not compared.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from pipedream_hpc.errors import PipedreamError
from pipedream_hpc.model.batch_dims import TARGET, BatchDims
from pipedream_hpc.model.structure import tensors_of_value
from pipedream_hpc.runtime.execution.score import Score

#: Outputs and targets that are kept.
MOST_BYTES = 256 << 20


class WholeLoss:
    """Compares the loss of some microbatches of one minibatch with that of all of them together.

    Args:
        loss_fn: computes the loss from (output, target).
        batch_dims: where samples are in targets.
        n_microbatches: microbatches per minibatch.
    """

    def __init__(self, loss_fn: Callable[[Any, Any], Any], batch_dims: BatchDims, n_microbatches: int) -> None:
        self._loss_fn, self._batch_dims, self._n_microbatches = loss_fn, batch_dims, n_microbatches
        self._compared = False
        self._kept: list[tuple[Any, Any, int, torch.Tensor]] = []  # output, target, samples, loss
        self._bytes = 0

    def add(self, microbatch: int, output: Any, target: Any, samples: int, loss: Score) -> None:
        """Keep a microbatch of the first minibatch, as long as there is room for it; compare at the next minibatch.

        Args:
            microbatch: its number within the pass.
            output: of the model.
            target: of the loss.
            samples: how many it has.
            loss: its loss; one that is counted is not compared.

        Raises:
            PipedreamError: as `compare`.
        """
        if self._compared:
            return
        if loss.count is not None or microbatch >= self._n_microbatches:
            self.compare()
            return
        leaves, structure = tree_flatten(output)
        tensors = [leaf.detach() if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves]
        self._bytes += sum(each.nbytes for each in tensors if isinstance(each, torch.Tensor))
        self._kept.append((tree_unflatten(tensors, structure), target, samples, loss.mean.detach()))
        if self._bytes > MOST_BYTES:
            self._kept = []

    @torch.no_grad()
    def compare(self) -> None:
        """Compare what has been kept, and keep nothing more.

        Raises:
            PipedreamError: the loss of all together is another.
        """
        kept, self._kept, self._compared = self._kept, [], True
        if len(kept) < 2 or any(map(_holds_tensors, tree_flatten([each[:2] for each in kept])[0])):
            return
        if self._batch_dims.cuts_lists(kept[0][1]):
            return
        samples = [each[2] for each in kept]
        rtol = 1e-4 if kept[0][3].dtype in (torch.float32, torch.float64) else 2e-2  # sums have another order
        mean = sum(float(each[3]) * each[2] for each in kept) / sum(samples)
        dim = self._batch_dims.by_name.get(TARGET, 0)
        targets = [each[1] for each in kept]
        state = list(self._loss_fn.buffers()) if isinstance(self._loss_fn, nn.Module) else []
        before = [each.clone() for each in state]
        try:
            if not _close(float(self._loss_fn(*kept[0][:2])), float(kept[0][3]), rtol):
                return  # it is random
            wholes = [
                float(self._loss_fn(output, _joined(targets, samples, dim)))
                for output in _joins([each[0] for each in kept], samples)
            ]
        except Exception:  # it is not made of tensors of samples
            return
        finally:
            for buffer, value in zip(state, before, strict=True):
                buffer.copy_(value)
        if wholes and not any(_close(whole, mean, rtol) for whole in wholes):
            raise PipedreamError(
                f"the loss of the first minibatch is {wholes[0]:g}, but the mean of the losses of its {len(kept)} "
                f"microbatches is {mean:g}: a number should be a mean over samples; let loss_fn return a pair (sum, "
                "count), or train whole minibatches (n_microbatches=1)"
            )


def _holds_tensors(leaf: Any) -> bool:
    """Return whether an object that cannot be joined holds tensors."""
    return not isinstance(leaf, torch.Tensor) and bool(tensors_of_value(leaf))


def _close(one: float, other: float, rtol: float) -> bool:
    return math.isclose(one, other, rel_tol=rtol, abs_tol=1e-6)


def _joins(outputs: Sequence[Any], samples: Sequence[int]) -> list[Any]:
    """Return the outputs joined along each dimension that may be the one of the samples; none if there is none."""
    first = [leaf for leaf in tree_flatten(outputs[0])[0] if isinstance(leaf, torch.Tensor)]
    if not first or any(not leaf.dim() for leaf in first):
        return []
    dims = range(max(leaf.dim() for leaf in first))
    return [_joined(outputs, samples, dim) for dim in dims if all(_fits(leaf, samples[0], dim) for leaf in first)]


def _fits(leaf: torch.Tensor, samples: int, dim: int) -> bool:
    return dim < leaf.dim() and leaf.shape[dim] == samples


def _joined(values: Sequence[Any], samples: Sequence[int], dim: int | None) -> Any:
    """Return values of microbatches joined along a dimension; tensors without samples stay those of the first."""
    structure = tree_flatten(values[0])[1]
    columns = zip(*(tree_flatten(value)[0] for value in values), strict=True)
    joined = [
        torch.cat(column, dim)
        if dim is not None and isinstance(column[0], torch.Tensor) and _fits(column[0], samples[0], dim)
        else column[0]
        for column in columns
    ]
    return tree_unflatten(joined, structure)
