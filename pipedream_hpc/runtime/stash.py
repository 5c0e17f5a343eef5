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

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from pipedream_hpc.core import load_memory
from pipedream_hpc.errors import PipedreamError
from pipedream_hpc.job import OptimizerFactory
from pipedream_hpc.runtime.fused import FusedStep, fused_from
from pipedream_hpc.runtime.view import CPU, alone, memory_on, tensor_over

if TYPE_CHECKING:
    from pipedream_hpc._memory import View, WeightPool

_ALIGNMENT = 64  # bytes: a cache line, and enough for any vector instruction


#: Entries that point at a parameter: a module's own, or a list that a recurrent layer keeps beside them.
_Holder = tuple[Any, Any]


@dataclass(frozen=True)
class _Slot:
    """Where one parameter stands in every slab, and who holds it in the module."""

    name: str
    offset: int
    shape: torch.Size
    dtype: torch.dtype
    trained: bool
    holders: tuple[_Holder, ...]

    def view(self, slab: View, device: torch.device) -> nn.Parameter:
        """A leaf over this parameter's place in `slab`, with a version counter of its own."""
        values = tensor_over(slab, self.shape, self.dtype, offset=self.offset, device=device)
        return nn.Parameter(values, requires_grad=self.trained)


class WeightStash:
    """Versioned parameters of one stage module, and the optimizer that makes new versions.

    Versions count from 0, one per update. Units (minibatches or microbatches) look theirs up by id.

    Args:
        module: the stage; its parameter entries are re-pointed, never its weights copied again.
        slabs: number of newest versions that are kept.
        optimizer: called with the stage's trained parameters; not called if there are none.
        overwrite: let an update write over the newest version even while units hold it, which is
            what naive pipelining does.
        masters: whether bfloat16 weights have float32 masters, which the optimizer steps and keeps with its
            state; the weights are the masters, rounded.
        device: where the slabs are. On a GPU all is done on the stream that is current at the call, in its
            order, and nothing is waited for.
    """

    def __init__(
        self,
        module: nn.Module,
        slabs: int,
        optimizer: OptimizerFactory,
        *,
        overwrite: bool = False,
        masters: bool = False,
        device: torch.device = CPU,
    ) -> None:
        self._slots, nbytes = _lay_out(module)
        self._masters = masters
        self._overwrite, self._slab_bytes = overwrite, nbytes
        self._pool: WeightPool = load_memory().WeightPool(nbytes, slabs, memory_on(device))
        self._leaves: list[list[nn.Parameter]] = []
        # The core copies between versions at once: on a GPU it would have to wait for the stream.
        self._whole: list[torch.Tensor] = []
        originals = dict(module.named_parameters())
        for index in range(slabs):
            slab = self._pool.slab(index)
            self._leaves.append([slot.view(slab, device) for slot in self._slots])
            if device.type != "cpu":
                self._whole.append(tensor_over(slab, torch.Size([nbytes]), torch.uint8, device=device))
        with torch.no_grad():
            for index, leaves in enumerate(self._leaves):
                for slot, leaf in zip(self._slots, leaves, strict=True):
                    # An update writes trained parameters only: the others stand in every slab from the start.
                    if index == self._pool.newest_slab or not slot.trained:
                        leaf.copy_(originals[slot.name])
        self._bound = -1
        self._bind(self._pool.newest_slab)
        # The optimizer keeps one set of parameter objects for its whole life, so that its state
        # stays keyed to them; before each step they are pointed at the slab that is written. (.data
        # also leaves autograd's version counter behind: this slab's bytes are saved by nobody.)
        self._trained = [index for index, slot in enumerate(self._slots) if slot.trained]
        self._positions = {
            leaves[index]: position for leaves in self._leaves for position, index in enumerate(self._trained)
        }
        self._cursors = [nn.Parameter(self._leaves[0][index].data) for index in self._trained]
        self.optimizer = _made(optimizer, self._cursors) if self._cursors else None
        # From here on, since a checkpoint may be loaded before the first step.
        self._fused([])

    @property
    def version(self) -> int:
        """The newest version."""
        return self._pool.newest

    @property
    def slabs(self) -> int:
        """Versions that can be alive at once."""
        return len(self._leaves)

    @property
    def holders(self) -> int:
        """Units that hold a version."""
        return self._pool.holders

    @property
    def nbytes(self) -> int:
        """Bytes of all slabs."""
        return self._slab_bytes * self.slabs

    @property
    def trained(self) -> list[nn.Parameter]:
        """The newest version of the parameters that are trained."""
        leaves = self._leaves[self._pool.newest_slab]
        return [leaves[index] for index in self._trained]

    @property
    def trained_names(self) -> list[str]:
        """Their qualified names, in the same order."""
        return [self._slots[index].name for index in self._trained]

    def acquire(self, unit: int, version: int = -1) -> None:
        """Point the module at `version` (-1: the newest) and hold it for `unit`.

        Raises:
            RuntimeError: the version is not kept, or the unit holds one already.
        """
        self._bind(self._pool.acquire(unit, version))

    def bind(self, unit: int) -> None:
        """Point the module at the version that `unit` holds."""
        self._bind(self._pool.slab_of(unit))

    def version_of(self, unit: int) -> int:
        """The version that `unit` holds."""
        return self._pool.version_of(unit)

    def slab_of(self, unit: int) -> int:
        """The slab of the version that `unit` holds."""
        return self._pool.slab_of(unit)

    def trains(self, leaf: nn.Parameter) -> bool:
        """Whether `leaf` is a parameter that is trained here, in any version."""
        return leaf in self._positions

    def position_of(self, leaf: nn.Parameter) -> int:
        """Position among the trained parameters of a leaf of any version."""
        return self._positions[leaf]

    def release(self, unit: int) -> list[torch.Tensor | None]:
        """Let go of the version of `unit` after its backward; returns its gradients."""
        slab = self._pool.slab_of(unit)
        self._pool.release(unit)
        return self.take(slab)

    def let_go(self, unit: int) -> None:
        """Likewise, but the gradients stay where they are until `take`."""
        self._pool.release(unit)

    def take(self, slab: int) -> list[torch.Tensor | None]:
        """The gradients that backwards have left on the leaves of a slab, added up in their order."""
        leaves, gradients = self._leaves[slab], []
        for index in self._trained:
            gradients.append(leaves[index].grad)
            leaves[index].grad = None
        return gradients

    def keep_apart(self, slab: int, storages: set[int]) -> None:
        """Copy gradients on the leaves of a slab that stand in one of `storages`, by address."""
        for index in self._trained:
            leaf = self._leaves[slab][index]
            if leaf.grad is not None and leaf.grad.untyped_storage().data_ptr() in storages:
                leaf.grad = leaf.grad.clone()

    def part(self, slab: int) -> None:
        """Give gradients on the leaves of a slab memory of their own each."""
        for index in self._trained:
            leaf = self._leaves[slab][index]
            if leaf.grad is not None:
                leaf.grad = alone(leaf.grad)

    def when_ready(self, ready: Callable[[int, nn.Parameter, torch.Tensor], None]) -> None:
        """Call `ready(position, leaf, gradient)` during backward, as soon as a parameter's gradient is whole.

        The gradient is then the callee's, and `release` has nothing to return for it.
        """

        def hook(position: int) -> Callable[[nn.Parameter], None]:
            def hand_over(leaf: nn.Parameter) -> None:
                gradient, leaf.grad = leaf.grad, None
                if gradient is not None:
                    ready(position, leaf, gradient)

            return hand_over

        for leaves in self._leaves:
            for position, index in enumerate(self._trained):
                leaves[index].register_post_accumulate_grad_hook(hook(position))  # type: ignore[no-untyped-call]

    def update(self, gradients: Sequence[torch.Tensor | None]) -> int:
        """Write the next version: newest weights, one optimizer step; returns its number.

        The step is written into a free slab, as the newest is read where the optimizer has a fused
        step (SGD, Adam, AdamW), else after a copy. With one slab (the last stage has no other minibatch
        in flight) the newest version is nobody's any more and is updated in place.
        """
        fused = self._fused(gradients)
        source, target = self._begin_update(copy=fused is None)
        leaves = self._leaves[target]
        for cursor, index in zip(self._cursors, self._trained, strict=True):
            cursor.data = leaves[index].data
        if fused is not None:
            fused.step([self._leaves[source][index] for index in self._trained], self._cursors, gradients)
        elif self.optimizer is not None:
            for cursor, gradient in zip(self._cursors, gradients, strict=True):
                cursor.grad = gradient
            self.optimizer.step()
            for cursor in self._cursors:
                cursor.grad = None
        return self._pool.commit()

    def skip_update(self) -> int:
        """Make the next version a copy of the newest: a step left out; returns its number."""
        self._begin_update(copy=True)
        return self._pool.commit()

    def use_newest(self) -> None:
        """Point the module at the newest version, for evaluation and for reading the weights."""
        self._bind(self._pool.newest_slab)

    def _fused(self, gradients: Sequence[torch.Tensor | None]) -> FusedStep | None:
        """The optimizer's fused step.

        Raises:
            PipedreamError: there is none, and only such a step knows masters.
        """
        if self.optimizer is None:
            return None
        found = fused_from(self.optimizer, self._cursors, gradients, master=self._masters)
        if found is None and self._masters:
            raise PipedreamError(
                f"master_weights=True needs weights in float32 or bfloat16 and torch.optim.SGD, Adam or AdamW without "
                f"amsgrad, hooks and hyperparameters that are tensors, which this {type(self.optimizer).__name__} is "
                "not, or has: train without it, or with one of these"
            )
        return found

    def _begin_update(self, *, copy: bool) -> tuple[int, int]:
        """Slabs (source, target) of the next version; with `copy` the target begins as the source."""
        source, target = self._pool.begin_update(copy=copy and not self._whole, overwrite=self._overwrite)
        if copy and self._whole and source != target:
            self._whole[target].copy_(self._whole[source])
        return source, target

    def _bind(self, slab: int) -> None:
        if slab == self._bound:
            return
        for slot, leaf in zip(self._slots, self._leaves[slab], strict=True):
            for entries, key in slot.holders:
                entries[key] = leaf
        self._bound = slab


def _made(optimizer: OptimizerFactory, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    """The optimizer of `parameters`; says what is wrong with a factory that makes none that can be used."""
    wanted = (
        "a function of the parameters that returns a torch.optim.Optimizer: functools.partial(torch.optim.SGD, lr=0.1)"
    )
    if not callable(optimizer):
        raise PipedreamError(f"optimizer is {type(optimizer).__name__}; it should be {wanted}")
    made = optimizer(parameters)
    if not isinstance(made, torch.optim.Optimizer):
        raise PipedreamError(f"optimizer(parameters) returned {type(made).__name__}; optimizer should be {wanted}")
    closure = inspect.signature(type(made).step).parameters.get("closure")
    if closure is not None and closure.default is inspect.Parameter.empty:
        raise PipedreamError(
            f"{type(made).__name__} runs the model again within a step, which no pipeline can do: use another optimizer"
        )
    return made


def _lay_out(module: nn.Module) -> tuple[list[_Slot], int]:
    """Give every distinct parameter its place in a slab; parameters of one dtype stand together."""
    holders: dict[int, list[_Holder]] = {}
    for owner in module.modules():
        for key, parameter in owner._parameters.items():
            if parameter is not None:
                holders.setdefault(id(parameter), []).append((owner._parameters, key))
        # Recurrent layers look their weights up in a list of their own.
        for position, parameter in enumerate(getattr(owner, "_flat_weights", ())):
            if parameter is not None:
                holders.setdefault(id(parameter), []).append((owner._flat_weights, position))
    slots, offset = [], 0
    for name, parameter in sorted(module.named_parameters(), key=lambda item: str(item[1].dtype)):
        place = tuple(holders[id(parameter)])
        slots.append(_Slot(name, offset, parameter.shape, parameter.dtype, parameter.requires_grad, place))
        offset += -(-parameter.nbytes // _ALIGNMENT) * _ALIGNMENT
    return slots, max(offset, _ALIGNMENT)
