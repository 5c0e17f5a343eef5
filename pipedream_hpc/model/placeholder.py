"""Placeholder: what stands for a tensor of another stage while a stage runs the model's forward."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from pipedream_hpc.errors import PipedreamError
from pipedream_hpc.model.functions import function_name, place_of_user

if TYPE_CHECKING:
    from pipedream_hpc.model.graph import Key

#: Attribute of a tensor that depends on a call of the graph: functions of it are calls of the graph, too. Its value
#: says in which run of the forward the call was made.
MARK = "_pipedream_call"

#: What may be done with a placeholder that a module or a hook keeps: copy, save and print the module.
_HARMLESS = frozenset({"__deepcopy__", "__reduce_ex__", "__repr__", "__format__"})

#: What torch.utils.checkpoint asks of the arguments of a part, also where the part is another stage's.
_ASKED = frozenset(
    {
        torch.Tensor.device.__get__,
        torch.Tensor.requires_grad.__get__,  # type: ignore[attr-defined]
    }
)


class Placeholder(torch.Tensor):
    """Stands for a tensor that another stage has.

    Attributes:
        key: the output of a call that it stands for; None for another tensor.
        without_values: a tensor of its shape, if it stands for what a hook has computed.
    """

    key: Key | None
    without_values: torch.Tensor | None

    @staticmethod
    def make(key: Key | None, without_values: torch.Tensor | None = None) -> Placeholder:
        made: Placeholder = torch.Tensor._make_subclass(Placeholder, torch.empty(0, device="meta"))
        setattr(made, MARK, True)
        made.key, made.without_values = key, without_values
        return made

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(function, "__name__", str(function)) in _HARMLESS or function in _ASKED:
            return super().__torch_function__(function, types, args, kwargs)  # type: ignore[no-untyped-call]
        where, kind = place_of_user()
        raise PipedreamError(
            f"{function_name(function)} uses a tensor that another stage has, in {where}: it was not passed on but "
            "kept, by a hook, in an attribute or from an earlier minibatch, or the forward takes another path than "
            "with example_inputs: return it from the module that computes it, and from the model if the loss needs it; "
            f"or keep the module whole that has all of it, such as by TrainConfig(leaf_modules=[{kind}])"
        )


def kept_of_another_forward() -> PipedreamError:
    """Return the error of a forward that uses a tensor of an earlier one."""
    return PipedreamError(
        "the model's forward uses a tensor that it has kept of an earlier minibatch, or of another forward, which "
        f"stages cannot pass on, in {place_of_user()[0]}: keep it in a module of its own, which one stage runs, or use "
        "plan 1"
    )
