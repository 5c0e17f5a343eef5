"""Weight stash: every weight version of one stage, in a fixed number of slabs.

The parameters of the stage live in one flat slab of bytes, and the pool holds as many slabs as versions can be alive
at once. Each slab has its own set of leaf tensors, views into it::

    slab 0   │ conv.weight │ conv.bias │ fc.weight │ fc.bias │   version 4, held by microbatch 6
    slab 1   │ conv.weight │ conv.bias │ fc.weight │ fc.bias │   version 5, newest
    slab 2   │ conv.weight │ conv.bias │ fc.weight │ fc.bias │   free: version 6 will be written here

Running forward on a version means pointing the module's parameter entries at the leaves of its slab. Autograd then
holds exactly these leaves until backward, so backward always uses the version of its forward. No bytes move, whatever
the size of the weights.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from pipedream_hpc.core import load_weights
from pipedream_hpc.errors import PipedreamError
from pipedream_hpc.job import OptimizerFactory
from pipedream_hpc.model.stage_module import Entry, entries_by_weight
from pipedream_hpc.runtime.comm.tensor_view import CPU, clone_if_shared, memory_on, tensor_over
from pipedream_hpc.runtime.weights.fused import FusedStep, fused_from

if TYPE_CHECKING:
    from pipedream_hpc._weights import View, WeightPool

_ALIGNMENT = 64  # bytes: a cache line, and enough for any vector instruction


@dataclass(frozen=True)
class _ParameterSlot:
    """One parameter's place in every slab.

    Attributes:
        name: qualified name.
        offset: bytes from the beginning of the slab.
        shape: shape of the parameter.
        dtype: dtype of the parameter.
        trained: whether it requires a gradient.
        entries: the module's entries that refer to it.
    """

    name: str
    offset: int
    shape: torch.Size
    dtype: torch.dtype
    trained: bool
    entries: tuple[Entry, ...]

    def leaf(self, slab: View, device: torch.device, original: nn.Parameter) -> nn.Parameter:
        """Create a leaf over this parameter's place in `slab`, with its own version counter.

        It has the attributes and hooks of the original, but for hooks on an accumulated gradient: these run once in an
        optimizer step (see WeightStash.update).
        """
        values = tensor_over(slab, self.shape, self.dtype, offset=self.offset, device=device)
        leaf = nn.Parameter(values, requires_grad=self.trained)
        vars(leaf).update(vars(original))
        if self.trained:
            for hook in (original._backward_hooks or {}).values():
                leaf.register_hook(hook)  # type: ignore[no-untyped-call]
        return leaf


class WeightStash:
    """The weight versions of one stage module, and the optimizer that writes new ones.

    Versions count from 0, one per optimizer step. A microbatch holds at most one version, under its number.

    Args:
        module: holds the stage's parameters. Its parameter entries are pointed at the slabs.
        slabs: number of newest versions that are kept.
        optimizer: creates the optimizer from the stage's trained parameters; not called if there are none. The
            parameters carry the attributes of the module's own and, as `qualified_name`, their names in the model.
        overwrite: let an optimizer step overwrite the newest version even while microbatches hold it, as naive
            pipelining does.
        master_weights: whether bfloat16 weights have float32 masters. The optimizer steps the masters and keeps them
            in its state; the weights are the masters, rounded.
        entries: all entries that refer to each parameter, by its name; None for those of `module`.
        bound: shared by the stashes of replicas in one process, which have the same entries.
        device: where the slabs are. On a GPU everything runs in order on the stream that is current at the call, and
            the host waits for nothing.
    """

    def __init__(
        self,
        module: nn.Module,
        slabs: int,
        optimizer: OptimizerFactory,
        *,
        overwrite: bool = False,
        master_weights: bool = False,
        entries: Mapping[str, Sequence[Entry]] | None = None,
        bound: list[Any] | None = None,
        device: torch.device = CPU,
        stage: int = 0,
    ) -> None:
        self.device = device
        self._slots, nbytes = _slab_layout(module, entries)
        self._master_weights = master_weights
        self._overwrite, self._slab_bytes = overwrite, nbytes
        self._pool: WeightPool = load_weights().WeightPool(nbytes, slabs, memory_on(device))
        self._leaves: list[list[nn.Parameter]] = []
        # Whole slabs, on a GPU only: the core copies at once, and would have to wait for the stream there.
        self._slab_tensors: list[torch.Tensor] = []
        originals = dict(module.named_parameters())
        for index in range(slabs):
            slab = self._pool.slab(index)
            self._leaves.append([slot.leaf(slab, device, originals[slot.name]) for slot in self._slots])
            if device.type != "cpu":
                self._slab_tensors.append(tensor_over(slab, torch.Size([nbytes]), torch.uint8, device=device))
        with torch.no_grad():
            for index, leaves in enumerate(self._leaves):
                for slot, leaf in zip(self._slots, leaves, strict=True):
                    # An optimizer step writes trained parameters only: the others are in every slab from the start.
                    if index == self._pool.newest_slab or not slot.trained:
                        leaf.copy_(originals[slot.name])
        self._bound = [None] if bound is None else bound  # what the entries point at: (stash, slab)
        self._bind(self._pool.newest_slab)
        self._trained = [index for index, slot in enumerate(self._slots) if slot.trained]
        self._positions = {
            leaves[index]: position for leaves in self._leaves for position, index in enumerate(self._trained)
        }
        # The optimizer has one set of parameter objects for its whole life, so that its state stays keyed to them;
        # before each step they are pointed at the slab to write. (Assigning .data also leaves autograd's version
        # counter alone: no graph has saved this slab's bytes.)
        self._cursors = [self._cursor(index, originals[self._slots[index].name]) for index in self._trained]
        self._on_accumulated: dict[int, list[Callable[[nn.Parameter], None]]] = {}
        for position, index in enumerate(self._trained):
            hooks = getattr(originals[self._slots[index].name], "_post_accumulate_grad_hooks", None)
            if hooks:
                self._on_accumulated[position] = list(hooks.values())
        self.optimizer: torch.optim.Optimizer | None = None
        if self._cursors:
            # A factory may group them by identity: meanwhile the user's modules hold the objects that it is given.
            for index, cursor in zip(self._trained, self._cursors, strict=True):
                for container, key in self._slots[index].entries:
                    container[key] = cursor
            try:
                self.optimizer = _create_optimizer(optimizer, self._cursors, stage)
            finally:
                self._bound[0] = None
                self._bind(self._pool.newest_slab)
        # Checked now, and not before the first step, since a checkpoint may be loaded before it.
        self._fused_step([])

    @property
    def version(self) -> int:
        """The newest version."""
        return self._pool.newest

    @property
    def slabs(self) -> int:
        """Number of versions that can be alive at once."""
        return len(self._leaves)

    @property
    def holders(self) -> int:
        """Number of microbatches that hold a version."""
        return self._pool.holders

    @property
    def nbytes(self) -> int:
        """Bytes of all slabs."""
        return self._slab_bytes * self.slabs

    @property
    def trained(self) -> list[nn.Parameter]:
        """The trained parameters, in their newest version."""
        leaves = self._leaves[self._pool.newest_slab]
        return [leaves[index] for index in self._trained]

    @property
    def trained_names(self) -> list[str]:
        """Qualified names of the trained parameters, in the order of `trained`."""
        return [self._slots[index].name for index in self._trained]

    @property
    def optimizer_names(self) -> list[str]:
        """Qualified names in the order of the optimizer's parameter groups, by which its state is numbered."""
        if self.optimizer is None:
            return []
        names = {id(cursor): name for cursor, name in zip(self._cursors, self.trained_names, strict=True)}
        return [names[id(parameter)] for group in self.optimizer.param_groups for parameter in group["params"]]

    def acquire(self, microbatch: int, version: int = -1) -> None:
        """Point the module at `version` (-1: the newest) and hold it for `microbatch`.

        Raises:
            RuntimeError: the version is not kept, or the microbatch holds one already.
        """
        self._bind(self._pool.acquire(microbatch, version))

    def bind(self, microbatch: int) -> None:
        """Point the module at the version that `microbatch` holds."""
        self._bind(self._pool.slab_of(microbatch))

    def release(self, microbatch: int) -> None:
        """Release the version that `microbatch` holds; its gradients stay on the leaves of the slab."""
        self._pool.release(microbatch)

    def version_of(self, microbatch: int) -> int:
        """Return the version that `microbatch` holds."""
        return self._pool.version_of(microbatch)

    def slab_of(self, microbatch: int) -> int:
        """Return the slab of the version that `microbatch` holds."""
        return self._pool.slab_of(microbatch)

    def trains(self, leaf: nn.Parameter) -> bool:
        """Return whether `leaf` is a trained parameter of this stage, in any version."""
        return leaf in self._positions

    def position_of(self, leaf: nn.Parameter) -> int:
        """Return the position of a leaf of any version among the trained parameters."""
        return self._positions[leaf]

    def take_gradients(self, slab: int) -> list[torch.Tensor | None]:
        """Remove the gradients that backward passes have accumulated on the leaves of `slab`, and return them."""
        leaves, gradients = self._leaves[slab], []
        for index in self._trained:
            gradients.append(leaves[index].grad)
            leaves[index].grad = None
        return gradients

    def clone_gradients_in(self, slab: int, storages: set[int]) -> None:
        """Clone the gradients on the leaves of `slab` whose memory is one of `storages`.

        Args:
            slab: index of the slab.
            storages: addresses of storages that will be reused before the optimizer step, such as receive slots.
        """
        for index in self._trained:
            leaf = self._leaves[slab][index]
            if leaf.grad is not None and leaf.grad.untyped_storage().data_ptr() in storages:
                leaf.grad = leaf.grad.clone()

    def unshare_gradients(self, slab: int) -> None:
        """Clone the gradients on the leaves of `slab` that share memory with another tensor."""
        for index in self._trained:
            leaf = self._leaves[slab][index]
            if leaf.grad is not None:
                leaf.grad = clone_if_shared(leaf.grad)

    def on_gradient(self, callback: Callable[[int, nn.Parameter, torch.Tensor], None]) -> None:
        """Call `callback(position, leaf, gradient)` in backward as soon as a parameter's gradient is complete.

        The callback then owns the gradient: `take_gradients` returns none for this parameter.
        """

        def hook(position: int) -> Callable[[nn.Parameter], None]:
            def pass_on(leaf: nn.Parameter) -> None:
                gradient, leaf.grad = leaf.grad, None
                if gradient is not None:
                    callback(position, leaf, gradient)

            return pass_on

        for leaves in self._leaves:
            for position, index in enumerate(self._trained):
                leaves[index].register_post_accumulate_grad_hook(hook(position))  # type: ignore[no-untyped-call]

    def update(self, gradients: Sequence[torch.Tensor | None]) -> int:
        """Write the next version, the newest weights after one optimizer step, and return its number.

        A fused step (SGD, Adam, AdamW) reads the newest version and writes into a free slab; any other optimizer
        steps over a copy in the free slab. With a single slab (the last stage has no other microbatch in flight)
        nobody holds the newest version any more, and it is updated in place.

        Args:
            gradients: of the trained parameters, in the order of `trained`; parameters without one stay as they are.
        """
        gradients = self._after_accumulation(gradients)
        fused_step = self._fused_step(gradients)
        source, target = self._begin_update(copy=fused_step is None)
        leaves = self._leaves[target]
        for cursor, index in zip(self._cursors, self._trained, strict=True):
            cursor.data = leaves[index].data
        if fused_step is not None:
            fused_step.step([self._leaves[source][index] for index in self._trained], self._cursors, gradients)
        elif self.optimizer is not None:
            for cursor, gradient in zip(self._cursors, gradients, strict=True):
                cursor.grad = gradient
            self.optimizer.step()
            for cursor in self._cursors:
                cursor.grad = None
        return self._pool.commit()

    def _after_accumulation(self, gradients: Sequence[torch.Tensor | None]) -> Sequence[torch.Tensor | None]:
        """Run the user's hooks on accumulated gradients; they may change or replace them."""
        if not self._on_accumulated:
            return gradients
        changed = list(gradients)
        newest = self._leaves[self._pool.newest_slab]
        for position, hooks in self._on_accumulated.items():
            cursor, gradient = self._cursors[position], gradients[position]
            if gradient is None:
                continue
            cursor.data, cursor.grad = newest[self._trained[position]].data, gradient
            for hook in hooks:
                hook(cursor)
            changed[position], cursor.grad = cursor.grad, None
        return changed

    def set_frozen(self) -> None:
        """Take over which parameters the user has frozen, or thawed, since the stage was built.

        Raises:
            PipedreamError: a parameter now wants a gradient that the optimizer was not given.
        """
        shown = self._leaves[self._pool.newest_slab]
        for index, slot in enumerate(self._slots):
            wants = shown[index].requires_grad
            if wants and not slot.trained:
                raise PipedreamError(
                    f"parameter '{slot.name}' requires a gradient now, but did not when the pipeline was made, and its "
                    "optimizer does not have it: make the pipeline with it trained and freeze it afterwards, or make a "
                    "new pipeline"
                )
            for leaves in self._leaves:
                if leaves[index].requires_grad != wants:
                    leaves[index].requires_grad_(wants)

    def refuse_replaced(self) -> None:
        """Refuse other parameters than this stash has put into its modules: binding a version would undo them.

        Raises:
            PipedreamError: a parameter has been replaced.
        """
        stash, slab = self._bound[0] or (None, 0)
        if stash is not self:
            return
        for slot, leaf in zip(self._slots, self._leaves[slab], strict=True):
            held = (each.get(key) if isinstance(each, dict) else each[key] for each, key in slot.entries)
            if any(each is not leaf for each in held):
                raise PipedreamError(
                    f"parameter '{slot.name}' has been replaced since the pipeline was made: change its values in "
                    "place (with torch.no_grad()), or make a new pipeline"
                )

    def skip_update(self) -> int:
        """Make the next version a copy of the newest, without an optimizer step, and return its number."""
        self._begin_update(copy=True)
        return self._pool.commit()

    def use_newest(self) -> None:
        """Point the module at the newest version, to evaluate it or to read its weights."""
        self._bind(self._pool.newest_slab)

    def load_state(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Overwrite parameters in the newest version; untrained ones in every slab.

        The optimizer's state stays, except float32 masters of the loaded bfloat16 weights: the next step makes new
        masters from the loaded weights.

        Args:
            tensors: new values by qualified name; names of other stages are ignored.

        Raises:
            PipedreamError: a tensor has another shape than the parameter.
            RuntimeError: a microbatch holds a version.
        """
        if self.holders:
            raise RuntimeError(f"weights cannot be loaded while {self.holders} microbatches hold a weight version")
        loaded = [(index, tensors[slot.name]) for index, slot in enumerate(self._slots) if slot.name in tensors]
        for index, value in loaded:
            if value.shape != self._slots[index].shape:
                raise PipedreamError(
                    f"the given weight '{self._slots[index].name}' has shape {tuple(value.shape)}, but the model's "
                    f"has shape {tuple(self._slots[index].shape)}: load the weights of this model"
                )
        cursor_of = dict(zip(self._trained, self._cursors, strict=True))
        with torch.no_grad():
            for index, value in loaded:
                newest = self._leaves[self._pool.newest_slab]
                for leaves in [newest] if self._slots[index].trained else self._leaves:
                    leaves[index].copy_(value)
                if self.optimizer is not None and index in cursor_of:
                    self.optimizer.state.get(cursor_of[index], {}).pop("master", None)

    def _cursor(self, index: int, original: nn.Parameter) -> nn.Parameter:
        """Create the parameter object that the optimizer gets for one parameter."""
        cursor = nn.Parameter(self._leaves[0][index].data)
        # Factories group parameters by their names and by attributes that the model has set on them.
        vars(cursor).update({"qualified_name": self._slots[index].name, **vars(original)})
        return cursor

    def _fused_step(self, gradients: Sequence[torch.Tensor | None]) -> FusedStep | None:
        """Return the optimizer's fused step, or None if it has none.

        Raises:
            PipedreamError: it has none, and master weights need one.
        """
        if self.optimizer is None:
            return None
        found = fused_from(self.optimizer, self._cursors, gradients, master=self._master_weights)
        if found is None and self._master_weights:
            raise PipedreamError(
                "master_weights=True needs weights in float32 or bfloat16 and torch.optim.SGD, Adam or AdamW without "
                "amsgrad, step hooks or hyperparameters that are tensors; this "
                f"{type(self.optimizer).__name__} is not, or has: train without it, or use one of these"
            )
        return found

    def _begin_update(self, *, copy: bool) -> tuple[int, int]:
        """Return the slabs (source, target) of the next version; with `copy`, copy the source to the target."""
        on_device = bool(self._slab_tensors)
        source, target = self._pool.begin_update(copy=copy and not on_device, overwrite=self._overwrite)
        if copy and on_device and source != target:
            self._slab_tensors[target].copy_(self._slab_tensors[source])
        return source, target

    def _bind(self, slab: int) -> None:
        if self._bound[0] == (self, slab):
            return
        for slot, leaf in zip(self._slots, self._leaves[slab], strict=True):
            for container, key in slot.entries:
                container[key] = leaf
        self._bound[0] = (self, slab)


def _create_optimizer(factory: OptimizerFactory, parameters: list[nn.Parameter], stage: int) -> torch.optim.Optimizer:
    """Create the optimizer of `parameters`, of a stage.

    Raises:
        PipedreamError: the factory cannot be called, fails, returns no optimizer or one of other parameters, or the
            optimizer evaluates the loss itself.
    """
    expected = (
        "a function of the parameters that returns a torch.optim.Optimizer: functools.partial(torch.optim.SGD, lr=0.1)"
    )
    if not callable(factory):
        raise PipedreamError(f"optimizer is {type(factory).__name__}; it should be {expected}")
    try:
        optimizer = factory(parameters)
    except PipedreamError:
        raise
    except Exception as error:
        names = ", ".join(f"'{vars(each)['qualified_name']}'" for each in parameters[:3])
        raise PipedreamError(
            f"optimizer(parameters) failed for stage {stage}, which trains {names}{', ...' * (len(parameters) > 3)}: "
            f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}: each stage has an optimizer of its "
            "own parameters, among which there may be none of a name: leave empty groups out, and freeze what is not "
            "to be trained with requires_grad_(False)"
        ) from error
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise PipedreamError(
            f"optimizer(parameters) returned {type(optimizer).__name__}; optimizer should be {expected}"
        )
    given = {id(parameter) for parameter in parameters}
    if not {id(parameter) for group in optimizer.param_groups for parameter in group["params"]} <= given:
        raise PipedreamError(
            f"optimizer(parameters) returned a {type(optimizer).__name__} of other parameters than the "
            f"{len(parameters)} of this stage that it was given: create it from these, as "
            "functools.partial(torch.optim.SGD, lr=0.1) does"
        )
    closure = inspect.signature(type(optimizer).step).parameters.get("closure")
    if closure is not None and closure.default is inspect.Parameter.empty:
        raise PipedreamError(
            f"{type(optimizer).__name__} runs the model again within a step, which no pipeline can do: use another "
            "optimizer"
        )
    return optimizer


def _slab_layout(module: nn.Module, entries: Mapping[str, Sequence[Entry]] | None) -> tuple[list[_ParameterSlot], int]:
    """Lay out the module's distinct parameters in a slab, sorted by dtype; return the slots and the slab's bytes."""
    if entries is None:
        by_weight = entries_by_weight(module)
        entries = {name: by_weight[id(parameter)] for name, parameter in module.named_parameters()}
    slots, offset = [], 0
    for name, parameter in sorted(module.named_parameters(), key=lambda item: str(item[1].dtype)):
        own = tuple(entries[name])
        slots.append(_ParameterSlot(name, offset, parameter.shape, parameter.dtype, parameter.requires_grad, own))
        offset += -(-parameter.nbytes // _ALIGNMENT) * _ALIGNMENT
    return slots, max(offset, _ALIGNMENT)
