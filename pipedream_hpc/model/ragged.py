"""Ragged: tensors in a recorded forward whose sizes depend on values that the model has computed.

Such as the rows that a router has chosen for one expert. They stay in one stage, as no channel knows their sizes. What
a mask selects that is computed from the model's arguments alone has the same size in every stage, and is not ragged.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch

from pipedream_hpc.model.functions import function_name
from pipedream_hpc.model.graph import Call

#: Questions to which the answer depends on sizes, or calls that put out as many tensors as there are rows.
_SIZES = frozenset({"shape", "size", "len", "numel", "nelement", "nbytes", "iter", "unbind"})

#: Functions after which the size that values have chosen may be gone. Of these and of modules it is looked for in the
#: shapes of the outputs.
_SUMS = frozenset(
    {
        *("sum", "mean", "prod", "max", "min", "amax", "amin", "argmax", "argmin", "norm", "std", "var", "logsumexp"),
        *("any", "all", "matmul", "mm", "bmm", "linear", "einsum", "addmm", "scaled_dot_product_attention"),
    }
)

_aten = torch.ops.aten
#: Numbers of the arguments whose values decide about the size of what an operation puts out; otherwise the first.
_DECIDING = {_aten.masked_select: 1, _aten.index: 1}


def deciding(operation: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[torch.Tensor]:
    """Return the tensors on whose values the size of what an operation puts out depends."""
    if torch.Tag.dynamic_output_shape not in operation.tags:
        return []
    name = operation._overloadpacket
    given = [*args, *kwargs.values()]
    if name is _aten.repeat_interleave:
        return [each for each in given if isinstance(each, torch.Tensor)][-1:]
    found = given[_DECIDING.get(name, 0)]
    if name is _aten.index:
        masks = (torch.bool, torch.uint8)
        return [each for each in found if each is not None and each.dtype in masks]
    return [found]


class Ragged:
    """The ragged tensors of one recording."""

    def __init__(self) -> None:
        self._found: dict[int, tuple[torch.Tensor, int, int]] = {}  # tensor, its ragged size, the call that chose it

    def sources(self, tensors: Iterable[torch.Tensor]) -> tuple[int, ...]:
        """Return the numbers of the calls that have chosen the sizes of the ragged ones among some tensors."""
        return tuple(dict.fromkeys(self._found[id(each)][2] for each in tensors if id(each) in self._found))

    def are_asked(self, function: Any, tensors: Sequence[torch.Tensor]) -> tuple[int, ...]:
        """Return what `sources` returns, for a function that tells Python the sizes of tensors."""
        return self.sources(tensors) if function_name(function) in _SIZES else ()

    def note(self, call: Call, given: Sequence[torch.Tensor], returned: Iterable[torch.Tensor], chose: bool) -> None:
        """Note which outputs of a call are ragged.

        Args:
            call: the call.
            given: its arguments.
            returned: its outputs.
            chose: whether the call itself puts out what values choose.
        """
        others = [each.shape for each in given if id(each) not in self._found]
        sources = [self._found[id(each)] for each in given if id(each) in self._found]
        for each in returned:
            if chose and each.dim():
                new = (size for size in each.shape if all(size not in other for other in others))
                self._found[id(each)] = each, next(new, each.shape[0]), call.number
            # What is added to another tensor's rows has the shape of that one.
            elif each.dim() and each.shape not in others:
                may_sum = call.module is not None or call.kind in _SUMS
                for _, size, first in sources:
                    if not may_sum or any(
                        own == size or (min(own, size) > 1 and _divides(own, size)) for own in each.shape
                    ):
                        self._found[id(each)] = each, size, first
                        break


def _divides(one: int, other: int) -> bool:
    """Return whether one of two sizes may come from the other by flattening or unflattening."""
    return max(one, other) % min(one, other) == 0
