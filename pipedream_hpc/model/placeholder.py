"""Placeholder: what stands for a tensor of another stage while a stage runs the model's forward."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from pipedream_hpc.errors import PipedreamError

if TYPE_CHECKING:
    from pipedream_hpc.model.graph import Key

#: Attribute of a tensor that depends on a call of the graph: functions of it are calls of the graph, too. Its value
#: says in which run of the forward the call was made.
MARK = "_pipedream_call"

KEPT = (
    "the model's forward uses a tensor that it has kept of an earlier minibatch, or of another forward, which stages "
    "cannot pass on: keep it in a module of its own, which one stage runs, or use plan 1"
)

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
        name = getattr(function, "__name__", str(function))
        if name in _HARMLESS or function in _ASKED:
            return super().__torch_function__(function, types, args, kwargs)  # type: ignore[no-untyped-call]
        raise PipedreamError(
            f"{name} uses a tensor that another stage has, and that was not passed on but kept, by a hook, in an "
            "attribute or from an earlier minibatch: return it from the module that computes it, and from the model "
            "if the loss needs it; or keep the module whole that has all of it, with "
            "TrainConfig(leaf_modules=[its class])"
        )
