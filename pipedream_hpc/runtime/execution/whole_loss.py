"""Whole loss: is the loss of a minibatch the mean of the losses of its microbatches?

It is not for a sum, for a loss that compares samples with each other, or for a mean over unequal numbers of tokens. The
output stage finds out with the minibatches 0, 1, 2, 4, 8, ... of the run: it keeps what its microbatches put out, and
computes the loss of all of them together, before an optimizer step learns from them. Losses that are random, or that
have no tensors of samples to join, are not compared.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from pipedream_hpc.errors import PipedreamError
from pipedream_hpc.model.batch_dims import TARGET, BatchDims
from pipedream_hpc.model.preserve_state import ModuleState
from pipedream_hpc.model.structure import tensors_of_value
from pipedream_hpc.runtime.execution.score import Score

#: Outputs and targets that are kept.
MOST_BYTES = 256 << 20


class WholeLoss:
    """Compares the loss of a replica's microbatches of one minibatch with that of all of them together.

    Args:
        loss_fn: computes the loss from (output, target).
        batch_dims: where samples are in targets.
        n_microbatches: microbatches per minibatch.
        replicas: replicas of the output stage, each of which runs every so many of the microbatches.
    """

    def __init__(
        self, loss_fn: Callable[[Any, Any], Any], batch_dims: BatchDims, n_microbatches: int, replicas: int
    ) -> None:
        self._loss_fn, self._batch_dims = loss_fn, batch_dims
        self._holder = nn.Module()  # whose state is that of the loss, which need not be a module
        self._holder.loss_fn = loss_fn  # type: ignore[assignment]
        self._n_microbatches, self._replicas = n_microbatches, replicas
        self._n_minibatches = 0  # that were compared or passed over, in the run
        self._kept: list[tuple[Any, Any, int, torch.Tensor]] = []  # output, target, samples, loss
        self._bytes = 0

    def add(self, microbatch: int, output: Any, target: Any, samples: int, loss: Score) -> None:
        """Keep a microbatch, if its minibatch is compared and there is room for it; compare after the last one.

        Args:
            microbatch: its number within the pass.
            output: the model's output.
            target: the loss's target.
            samples: how many it has.
            loss: its loss; one that is counted is not compared.

        Raises:
            PipedreamError: the loss of all together is another.
        """
        if not self._n_minibatches & (self._n_minibatches - 1) and loss.count is None:
            self._keep(output, target, samples, loss)
        if microbatch % self._n_microbatches + self._replicas >= self._n_microbatches:
            self._compare()
            self._n_minibatches += 1

    def _keep(self, output: Any, target: Any, samples: int, loss: Score) -> None:
        leaves, structure = tree_flatten(output)
        tensors = [leaf.detach() if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves]
        self._bytes += sum(each.nbytes for each in tensors if isinstance(each, torch.Tensor))
        self._kept.append((tree_unflatten(tensors, structure), target, samples, loss.mean.detach()))
        if self._bytes > MOST_BYTES:
            self._kept = []

    @torch.no_grad()
    def _compare(self) -> None:
        """Compare what has been kept, and let go of it."""
        kept, self._kept, self._bytes = self._kept, [], 0
        if len(kept) < 2 or any(map(_holds_tensors, tree_flatten([each[:2] for each in kept])[0])):
            return
        if self._batch_dims.cuts_lists(kept[0][1]):
            return
        samples = [each[2] for each in kept]
        # The outputs are the same; only the loss's own sums have another order.
        rtol = 1e-5 if kept[0][3].dtype in (torch.float32, torch.float64) else 2e-2
        mean = sum(float(each[3]) * each[2] for each in kept) / sum(samples)
        dim = self._batch_dims.by_name.get(TARGET, 0)
        targets = [each[1] for each in kept]
        if not _close(self._loss_of(*kept[0][:2]), float(kept[0][3]), rtol):
            return  # it is random
        joined = [(output, _joined(targets, samples, dim)) for output in _joins([each[0] for each in kept], samples)]
        # More than one dimension may be the one of the samples; the loss of outputs joined along another may fail.
        wholes = [whole for whole in (self._loss_of(*each) for each in joined) if whole is not None]
        if wholes and not any(_close(whole, mean, rtol) for whole in wholes):
            raise PipedreamError(
                f"the loss of the minibatch is {wholes[0]:g}, but the mean of the losses of its {len(kept)} "
                f"microbatches is {mean:g}: a number should be a mean over samples; let loss_fn return a pair (sum, "
                "count), or train whole minibatches (n_microbatches=1)"
            )

    def _loss_of(self, output: Any, target: Any) -> float | None:
        """Return the loss; None if it cannot be computed of that. Its state stays as it was."""
        state = ModuleState(self._holder)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # on shapes that only the comparison has
                return float(self._loss_fn(output, target))
        except Exception:  # it is not made of tensors of samples
            return None
        finally:
            state.restore()


def _holds_tensors(leaf: Any) -> bool:
    """Return whether an object that cannot be joined holds tensors."""
    return not isinstance(leaf, torch.Tensor) and bool(tensors_of_value(leaf))


def _close(one: float | None, other: float, rtol: float) -> bool:
    return one is not None and math.isclose(one, other, rel_tol=rtol, abs_tol=1e-6)


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
