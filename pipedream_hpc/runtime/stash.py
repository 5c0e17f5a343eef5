"""Weight stash: every weight version of one stage, in a fixed number of slabs.

The parameters of the stage live in one flat slab of bytes, and the pool holds as many slabs as
minibatches can be in flight. Each slab has its own set of leaf tensors, views into it::

    slab 0   │ conv.weight │ conv.bias │ fc.weight │ fc.bias │   version 4, held by minibatch 6
    slab 1   │ conv.weight │ conv.bias │ fc.weight │ fc.bias │   version 5, newest
    slab 2   │ conv.weight │ conv.bias │ fc.weight │ fc.bias │   free: version 6 will be written here

Running forward on a version means pointing the module's parameter entries at the leaves of its
slab. Autograd then holds exactly these leaves until backward, so backward cannot help but use the
version of its forward. No bytes move, whatever the size of the weights.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn

from pipedream_hpc.core import load_memory
from pipedream_hpc.errors import PipedreamError
from pipedream_hpc.job import OptimizerFactory

if TYPE_CHECKING:
    from pipedream_hpc._memory import View, WeightPool

_ALIGNMENT = 64  # bytes: a cache line, and enough for any vector instruction


@dataclass(frozen=True)
class _Slot:
    """Where one parameter stands in every slab, and who holds it in the module."""

    name: str
    offset: int
    shape: torch.Size
    dtype: torch.dtype
    trained: bool
    holders: tuple[tuple[dict[str, nn.Parameter | None], str], ...]

    def view(self, slab: View) -> nn.Parameter:
        """A leaf over this parameter's place in `slab`, with a version counter of its own."""
        if not self.shape.numel():
            return nn.Parameter(torch.empty(self.shape, dtype=self.dtype), requires_grad=self.trained)
        count = self.shape.numel()
        values = torch.frombuffer(slab, dtype=self.dtype, count=count, offset=self.offset)
        return nn.Parameter(values.view(self.shape), requires_grad=self.trained)


class WeightStash:
    """Versioned parameters of one stage module, and the optimizer that makes new versions.

    Versions count from 0, one per update. Minibatches look theirs up by id.

    Args:
        module: the stage; its parameter entries are re-pointed, never its weights copied again.
        slabs: minibatches in flight at most, which is also the number of versions alive.
        optimizer: called with the stage's trained parameters; not called if there are none.
    """

    def __init__(self, module: nn.Module, slabs: int, optimizer: OptimizerFactory) -> None:
        self._slots, nbytes = _lay_out(module)
        self._pool: WeightPool = load_memory().WeightPool(nbytes, slabs)
        self._leaves: list[list[nn.Parameter]] = []
        originals = dict(module.named_parameters())
        for index in range(slabs):
            self._leaves.append([slot.view(self._pool.slab(index)) for slot in self._slots])
        with torch.no_grad():
            for slot, leaf in zip(self._slots, self._leaves[self._pool.newest_slab], strict=True):
                leaf.copy_(originals[slot.name])
        self._bound = -1
        self._bind(self._pool.newest_slab)
        # The optimizer keeps one set of parameter objects for its whole life, so that its state
        # stays keyed to them; before each step they are pointed at the slab that is written. (.data
        # also leaves autograd's version counter behind: this slab's bytes are saved by nobody.)
        self._trained = [index for index, slot in enumerate(self._slots) if slot.trained]
        self._cursors = [nn.Parameter(self._leaves[0][index].data) for index in self._trained]
        self.optimizer = optimizer(self._cursors) if self._cursors else None
        if self._cursors and not isinstance(self.optimizer, torch.optim.Optimizer):
            raise PipedreamError(
                f"optimizer(parameters) returned {type(self.optimizer).__name__}; it should return a "
                "torch.optim.Optimizer, as functools.partial(torch.optim.SGD, lr=0.1) does"
            )

    @property
    def version(self) -> int:
        """The newest version."""
        return self._pool.newest

    @property
    def slabs(self) -> int:
        """Versions that can be alive at once."""
        return len(self._leaves)

    def acquire(self, minibatch: int) -> int:
        """Point the module at the newest version and hold it for `minibatch`; returns the version."""
        self._bind(self._pool.acquire(minibatch))
        return self._pool.newest

    def version_of(self, minibatch: int) -> int:
        """The version that `minibatch` holds."""
        return self._pool.version_of(minibatch)

    def release(self, minibatch: int) -> list[torch.Tensor | None]:
        """Let go of the version of `minibatch` after its backward; returns its gradients."""
        leaves = self._leaves[self._pool.slab_of(minibatch)]
        self._pool.release(minibatch)
        gradients = []
        for index in self._trained:
            gradients.append(leaves[index].grad)
            leaves[index].grad = None
        return gradients

    def update(self, gradients: list[torch.Tensor | None]) -> int:
        """Write the next version: newest weights, one optimizer step; returns its number.

        The step is written into a free slab. With one slab (the last stage has no other minibatch
        in flight) the newest version is nobody's any more and is updated in place.
        """
        _, target = self._pool.begin_update(copy=True)
        leaves = self._leaves[target]
        for cursor, index, gradient in zip(self._cursors, self._trained, gradients, strict=True):
            cursor.data = leaves[index].data
            cursor.grad = gradient
        if self.optimizer is not None:
            self.optimizer.step()
        for cursor in self._cursors:
            cursor.grad = None
        return self._pool.commit()

    def use_newest(self) -> None:
        """Point the module at the newest version, for evaluation and for reading the weights."""
        self._bind(self._pool.newest_slab)

    def _bind(self, slab: int) -> None:
        if slab == self._bound:
            return
        for slot, leaf in zip(self._slots, self._leaves[slab], strict=True):
            for entries, key in slot.holders:
                entries[key] = leaf
        self._bound = slab


def _lay_out(module: nn.Module) -> tuple[list[_Slot], int]:
    """Give every distinct parameter its place in a slab; parameters of one dtype stand together."""
    holders: dict[int, list[tuple[dict[str, nn.Parameter | None], str]]] = {}
    for owner in module.modules():
        for key, parameter in owner._parameters.items():
            if parameter is not None:
                holders.setdefault(id(parameter), []).append((owner._parameters, key))
    slots, offset = [], 0
    for name, parameter in sorted(module.named_parameters(), key=lambda item: str(item[1].dtype)):
        place = tuple(holders[id(parameter)])
        slots.append(_Slot(name, offset, parameter.shape, parameter.dtype, parameter.requires_grad, place))
        offset += -(-parameter.nbytes // _ALIGNMENT) * _ALIGNMENT
    return slots, max(offset, _ALIGNMENT)
