"""Averages: what the functions of a loss divide by."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from pipedream_hpc.model.functions import function_name

#: Functions that compute a mean over targets, of which some may be ignored or weighted.
AVERAGES_TARGETS = (functional.cross_entropy, functional.nll_loss)

_OF_ELEMENTS = (
    *(functional.mse_loss, functional.l1_loss, functional.smooth_l1_loss, functional.huber_loss),
    functional.binary_cross_entropy_with_logits,
)
_MODULES_OF_ELEMENTS = (nn.MSELoss, nn.L1Loss, nn.SmoothL1Loss, nn.HuberLoss, nn.BCELoss, nn.BCEWithLogitsLoss)

_DIVISIONS = frozenset({"div", "div_", "divide", "divide_", "true_divide", "truediv", "itruediv"})
_DIVISIONS_FROM_THE_RIGHT = frozenset({"rdiv", "rtruediv"})
_OTHER_LOSSES = frozenset({"binary_cross_entropy", "binary_cross_entropy_with_logits", "kl_div"})


def divisor_of(function: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """Return the one number that a function divides all by; None if there is none.

    It is what a tensor, or a number, is divided by; and of a mean over a whole tensor how many elements that has. Means
    over targets, such as cross_entropy, are not meant: see AVERAGES_TARGETS.
    """
    if not args or function in AVERAGES_TARGETS:
        return None
    name, value = function_name(function), args[0]
    if name in _DIVISIONS:
        divisor = args[1] if len(args) > 1 else kwargs.get("other")
        return divisor if _is_number(divisor) or (_is_plain(divisor) and _is_number(value)) else None
    if name in _DIVISIONS_FROM_THE_RIGHT or name == "reciprocal":
        return value if _is_number(value) else None
    is_mean = name in ("mean", "nanmean") and len(args) == 1 and kwargs.get("dim") is None
    is_loss = name.endswith("_loss") or name in _OTHER_LOSSES
    if is_mean or (is_loss and kwargs.get("reduction", "mean") == "mean"):
        return value.numel() if isinstance(value, torch.Tensor) and value.dim() else None
    return None


def weighs_alike(loss_fn: Callable[..., Any]) -> bool:
    """Return whether a loss is one of torch's own that are means over all elements: every sample weighs the same."""
    of_elements = type(loss_fn) in _MODULES_OF_ELEMENTS and getattr(loss_fn, "reduction", "") == "mean"
    return loss_fn in _OF_ELEMENTS or of_elements


def is_loss(value: Any) -> bool:
    """Return whether a value may be a loss: one number with a gradient."""
    return _is_number(value) and bool(value.requires_grad)


def _is_number(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and not value.dim()


def _is_plain(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
