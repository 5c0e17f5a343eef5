"""Loss means: does the mean of a loss over a microbatch weigh every sample alike?

Where minibatches are cut, the loss of a minibatch is taken to be the mean over its microbatches, weighted by samples.
That is not so for a mean over targets of which some are ignored, or weighted by their class: then the number that the
loss divides by must be the same for every sample of the minibatch. A number that a loss divides by besides, as in a
masked mean of the user's own, must be so, too, or be the same in all microbatches, such as a temperature.

To watch takes as long as a small loss itself. So torch's cross-entropies are counted without, and a loss of functions
whose divisors follow from shapes is watched once for every combination of shapes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from pipedream_hpc.errors import PipedreamError
from pipedream_hpc.model.averages import AVERAGES_TARGETS, divisor_of, is_loss
from pipedream_hpc.model.functions import function_name

#: Functions of which a divisor follows from shapes if it is no tensor.
_OF_SHAPES = frozenset(
    {
        *("mse_loss", "l1_loss", "smooth_l1_loss", "huber_loss", "binary_cross_entropy", "kl_div", "mean", "sum"),
        *("binary_cross_entropy_with_logits", "add", "sub", "rsub", "mul", "rmul", "div", "truediv", "neg", "pow"),
        *("abs", "square", "sqrt", "exp", "log", "sigmoid", "tanh", "softmax", "log_softmax", "norm", "shape", "size"),
        *("dim", "numel", "len", "view", "reshape", "flatten", "squeeze", "unsqueeze", "transpose", "permute"),
    }
)

#: The samples of a microbatch; what its means over targets divide by; and what else its loss divides by.
Divisors = tuple[int, list[float], list[float]]


def compare_divisors(one: Divisors, other: Divisors) -> None:
    """Compare the divisors of two microbatches of a minibatch.

    Raises:
        PipedreamError: they differ per sample.
    """
    samples, other_samples = one[0], other[0]
    remedy = (
        "the mean over microbatches would be another; let loss_fn return a pair (sum, count), such as the sum of the "
        "losses and how many targets they are of"
    )
    for divisor, another in zip(one[1], other[1], strict=False):
        if not _per_sample(divisor, samples, another, other_samples):
            raise PipedreamError(
                f"the loss is a mean over {another:g} targets of {other_samples} samples in one microbatch, and over "
                f"{divisor:g} of {samples} in another of the same minibatch, because some are ignored or weighted: "
                f"{remedy}"
            )
    if len(one[2]) != len(other[2]):
        return  # microbatches that take other paths
    for divisor, another in zip(one[2], other[2], strict=True):
        same = abs(divisor - another) <= 1e-6 * abs(divisor)
        if not same and not _per_sample(divisor, samples, another, other_samples):
            raise PipedreamError(
                f"the loss divides by {another:g} for {other_samples} samples in one microbatch, and by {divisor:g} "
                f"for {samples} in another of the same minibatch: {remedy}"
            )


def _per_sample(divisor: float, samples: int, other: float, other_samples: int) -> bool:
    return abs(divisor * other_samples - other * samples) <= 1e-6 * max(abs(divisor * other_samples), 1.0)


class LossMeans(TorchFunctionMode):
    """Watches what a loss divides by: one that a loss function computes, or the model itself.

    Args:
        loss_fn: the loss.
        n_microbatches: microbatches per minibatch.
        in_forward: whether the model computes means itself.

    Attributes:
        first: of the first microbatch of every minibatch of the pass that ran here.
    """

    def __init__(self, loss_fn: Callable[[Any, Any], Any], n_microbatches: int, *, in_forward: bool) -> None:
        super().__init__()
        self.in_forward = in_forward
        self._counts = None if in_forward else _counting(loss_fn)
        self._n_microbatches = n_microbatches
        self._of_shapes = True  # whether the divisors of the current microbatch follow from shapes
        self._shapes: Any = None  # of what it is computed from
        self._known: dict[Any, Divisors] = {}  # those that follow from shapes
        self._of_targets: list[float] = []  # divisors of the current microbatch
        self._others: list[float] = []
        self._in_loss = False
        self._sums = self._sums_in_forward = False  # whether it computes sums
        self.first: dict[int, Divisors] = {}

    def begin(self) -> None:
        """Begin a pass."""
        self.first.clear()

    def end_forward(self) -> None:
        """End the forward of a microbatch: its loss function comes next."""
        self._sums_in_forward, self._in_loss = self._sums, True

    def is_needed(self, microbatch: int) -> bool:
        """Return whether to watch a microbatch.

        If the loss of a minibatch's first microbatch divides by nothing, there is nothing to compare the others with.
        """
        first = self.first.get(microbatch // self._n_microbatches)
        return first is None or bool(first[1] or first[2])

    def is_alike(self, microbatch: int, output: Any, target: Any, samples: int) -> bool:
        """Return whether a microbatch is known to have the divisors of the first one of its minibatch, or is the first.

        Args:
            microbatch: its number.
            output: the model's output.
            target: the loss's target.
            samples: how many it has.
        """
        if self.in_forward or self._counts is not None:
            return False
        if type(output) is torch.Tensor and type(target) is torch.Tensor:
            self._shapes = output.shape, target.shape, samples
        else:
            leaves = tree_leaves((output, target))
            shapes = [each.shape if isinstance(each, torch.Tensor) else each for each in leaves]
            # Other values decide, too: numbers and texts are compared, and for the rest the loss is always watched.
            plain = all(isinstance(each, torch.Size | int | float | str | None) for each in shapes)
            self._shapes = (*shapes, samples) if plain else None
        known = self._known.get(self._shapes)
        return known is not None and self.first.setdefault(microbatch // self._n_microbatches, known) is known

    def must_see(self, output: Any, target: Any) -> bool:
        """Return whether to watch the loss function of the current microbatch; else its divisors are known by now."""
        if self._counts is not None:
            self._counts(self._note, output, target)
            return False
        known = self._known.get(self._shapes)
        if known is not None:
            _, self._of_targets, self._others = known
        self._of_shapes = known is None
        return known is None

    def end(self, microbatch: int, samples: int, *, compare: bool) -> None:
        """End a microbatch.

        Args:
            microbatch: its number.
            samples: how many it has.
            compare: compare its divisors with those of the first microbatch of its minibatch.

        Raises:
            PipedreamError: they differ per sample.
        """
        sums, self._sums, self._sums_in_forward, self._in_loss = self._sums_in_forward, False, False, False
        own: Divisors = (samples, self._of_targets, self._others) if compare else (samples, [], [])
        if self._of_shapes and self._shapes is not None:
            self._known[self._shapes] = own
        self._shapes = None
        self._of_targets, self._others = [], []
        if sums and compare:
            raise PipedreamError(
                "the model's own loss is a sum (reduction='sum'), divided by a number that is not known to be that of "
                "the microbatch: let loss_fn return a pair (sum, count), or train whole minibatches (n_microbatches=1)"
            )
        compare_divisors(self.first.setdefault(microbatch // self._n_microbatches, own), own)

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        options = kwargs or {}
        if self._of_shapes and self._shapes is not None:
            self._of_shapes = function_name(function) in _OF_SHAPES
        self._sums |= function in AVERAGES_TARGETS and options.get("reduction") == "sum"
        if function in AVERAGES_TARGETS and options.get("reduction", "mean") == "mean":
            self._note(*args, **options)
        returned = function(*args, **options)
        # In the model's forward most divisions have nothing to do with a loss.
        if self._in_loss or is_loss(returned):
            divisor = divisor_of(function, args, options)
            self._of_shapes &= not isinstance(divisor, torch.Tensor)
            if divisor is not None and not isinstance(divisor, FakeTensor):
                self._others.append(float(divisor.detach() if isinstance(divisor, torch.Tensor) else divisor))
        return returned

    def _note(
        self, _: torch.Tensor, target: torch.Tensor, weight: torch.Tensor | None = None, *more: Any, **options: Any
    ) -> None:
        if target.is_floating_point() or isinstance(target, FakeTensor):
            return  # probabilities, which are a mean over samples; or a forward that is recorded
        ignored = options.get("ignore_index", -100)
        kept = target[target != ignored]
        self._of_targets.append(float(kept.numel()) if weight is None else float(weight[kept].sum()))


def _counting(loss_fn: Callable[[Any, Any], Any]) -> Callable[[Callable[..., None], Any, Any], None] | None:
    """Return what notes the divisor of one of torch's own cross-entropies; None for another loss."""
    if loss_fn in AVERAGES_TARGETS:
        return lambda note, output, target: note(output, target)
    plain = type(loss_fn) in (nn.CrossEntropyLoss, nn.NLLLoss) and not (
        loss_fn._forward_hooks or loss_fn._forward_pre_hooks or "forward" in vars(loss_fn)  # type: ignore[attr-defined]
    )
    if not plain or loss_fn.reduction != "mean":  # type: ignore[attr-defined]
        return None
    return lambda note, output, target: note(output, target, loss_fn.weight, ignore_index=loss_fn.ignore_index)  # type: ignore[attr-defined]
