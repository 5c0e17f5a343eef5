"""Fused optimizer steps that write the next weight version while they read the newest.

torch's own optimizers update in place, so a new version would first be copied and then stepped over::

    copy, then step       newest ──copy──► free      free ──step──► free      5 numbers moved, 7 with Adam
    copy-on-write         newest ──────────step────► free                     one pass, no copy

The step is that of `torch.optim.SGD`, `Adam` and `AdamW`: hyperparameters are read from
`optimizer.param_groups` at every step, and state lives in `optimizer.state` under torch's own names. One
may change between this and `optimizer.step()` at any time, and save and load as ever. On a CPU the bits
are those of `optimizer.step()` with `fused=False`.

Weights in bfloat16 have a float32 master, `optimizer.state[parameter]["master"]`, made from the weights at
the first step. The master is what is stepped, in float32, with state in float32; the weights are the
master, rounded. (torch's optimizers know no masters, so this is asked for with `master=True`.)
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cache
from itertools import chain
from typing import TYPE_CHECKING, Any
from weakref import WeakSet

import torch
from torch import Tensor, nn
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks

from pipedream_hpc.core import load_memory

if TYPE_CHECKING:
    from pipedream_hpc._memory import Adam, Sgd

_Group = dict[str, Any]
_ONE = torch.tensor(1.0)  # a tensor is added in half the time that a number takes


def fused_from(
    optimizer: torch.optim.Optimizer,
    parameters: Sequence[nn.Parameter] | None = None,
    gradients: Sequence[Tensor | None] = (),
    *,
    master: bool = False,
) -> FusedStep | None:
    """The fused step that does what `optimizer.step()` would do now; None if there is none.

    There is none for optimizers other than SGD, Adam and AdamW (subclasses are others), for `amsgrad`,
    `capturable`, `differentiable` and hyperparameters that are tensors, where step hooks or a gradient
    scaler would go unheard, for sparse gradients, and for dtypes other than float32 (and bfloat16, see
    below). Cheap enough to be asked before every step, since all of this may change.

    Args:
        optimizer: whose step it is.
        parameters: the order in which `FusedStep.step` takes its tensors; by default that of
            `optimizer.param_groups`. Those that the optimizer does not have stay as they are.
        gradients: of the coming step, in that order.
        master: whether bfloat16 weights have a float32 master. From then on `optimizer.load_state_dict`
            keeps it, and the state, in float32.
    """
    if type(optimizer) not in (torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW) or _is_watched(optimizer):
        return None
    owned = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    ordered = owned if parameters is None else list(parameters)
    if not {id(parameter) for parameter in owned} <= {id(parameter) for parameter in ordered}:
        return None
    if not all(_is_plain(group) for group in optimizer.param_groups):
        return None
    dtypes = (torch.float32, torch.bfloat16) if master else (torch.float32,)
    if any(parameter.dtype not in dtypes for parameter in owned):
        return None
    if any(
        gradient is not None and (gradient.layout != torch.strided or gradient.dtype != parameter.dtype)
        for parameter, gradient in zip(ordered, gradients, strict=False)
    ):
        return None
    if master:
        _keep_masters(optimizer)
    return FusedStep(optimizer, ordered)


class FusedStep:
    """One optimizer's step, from one weight version to the next. Made by `fused_from`.

    Attributes:
        streaming: whether new weights are stored around the caches; None: if the step moves more than 32 MiB.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, parameters: Sequence[nn.Parameter]) -> None:
        self._optimizer, self._count = optimizer, len(parameters)
        self._position = {id(parameter): index for index, parameter in enumerate(parameters)}
        self.streaming: bool | None = None

    def step(self, sources: Sequence[Tensor], targets: Sequence[Tensor], gradients: Sequence[Tensor | None]) -> None:
        """Take one step, reading the weights `sources` and writing `targets`.

        Args:
            sources: newest weights, contiguous; left as they are.
            targets: as `sources`, in other memory, or in the same for a step in place.
            gradients: a parameter whose gradient is None is copied as it is.
        """
        with torch.no_grad():
            left = set(range(self._count))
            for group in self._optimizer.param_groups:
                batches: dict[tuple[object, ...], _Batch] = {}
                for parameter in group["params"]:
                    at = self._position[id(parameter)]
                    gradient = gradients[at]
                    if gradient is not None:
                        left.discard(at)
                        state = self._optimizer.state[parameter]
                        _prepare(group, state, sources[at], targets[at], gradient, batches)
                for batch in batches.values():
                    batch.run(self.streaming)
            for at in left:
                if sources[at].data_ptr() != targets[at].data_ptr():
                    targets[at].copy_(sources[at])
        # What a learning-rate scheduler looks at to tell that the optimizer has stepped before it.
        self._optimizer._opt_called = True  # type: ignore[attr-defined]


def _prepare(
    group: _Group,
    state: dict[str, Any],
    source: Tensor,
    target: Tensor,
    gradient: Tensor,
    batches: dict[tuple[object, ...], _Batch],
) -> None:
    """Put one parameter with those that are stepped by the same rule."""
    halves = target.dtype == torch.bfloat16
    if halves:
        if "master" not in state:
            state["master"] = source.float()
        source = _single(state, "master")
    first = second = 0
    kind: object = None
    if "betas" in group:
        if "step" not in state:
            double = torch.get_default_dtype() == torch.float64
            state["step"] = torch.tensor(0.0, dtype=torch.float64 if double else torch.float32)
            state["exp_avg"] = torch.zeros_like(source)
            state["exp_avg_sq"] = torch.zeros_like(source)
        kind = state["step"].add_(_ONE).item()
        first, second = _single(state, "exp_avg").data_ptr(), _single(state, "exp_avg_sq").data_ptr()
    elif group["momentum"] != 0:
        kind = state.get("momentum_buffer") is None
        if kind:
            state["momentum_buffer"] = torch.empty_like(source)
        first = _single(state, "momentum_buffer").data_ptr()
    key = kind, halves, target.device
    batch = batches.get(key)
    if batch is None:
        rule = _adam(group, kind) if "betas" in group else _sgd(group, first=bool(kind))
        batch = batches[key] = _Batch(rule, halves, target.device)
    batch.add(source, target, gradient, first, second)


class _Batch:
    """Tensors that are stepped in one call of the core."""

    def __init__(self, rule: Sgd | Adam, halves: bool, device: torch.device) -> None:
        self._rule, self._halves, self._device = rule, halves, device
        self._tensors: list[tuple[int, int, int, int, int, int]] = []
        self._alive: list[Tensor] = []

    def add(self, source: Tensor, target: Tensor, gradient: Tensor, first: int, second: int) -> None:
        if not gradient.is_contiguous():
            gradient = gradient.contiguous()
            self._alive.append(gradient)  # nobody else holds it
        place = source.data_ptr(), target.data_ptr(), gradient.data_ptr()
        self._tensors.append((target.numel(), *place, first, second))

    def run(self, streaming: bool | None) -> None:
        stream = None
        if self._device.type == "cuda":
            stream = torch.cuda.current_stream(self._device).cuda_stream
        load_memory().fused_step(
            self._rule,
            self._tensors,
            halves=self._halves,
            half_gradients=self._halves,
            threads=torch.get_num_threads(),
            contracted=_contracts(),
            streaming=streaming,
            stream=stream,
        )


def _sgd(group: _Group, first: bool) -> Sgd:
    return load_memory().Sgd(  # type: ignore[no-any-return]
        rate=-group["lr"],
        weight_decay=group["weight_decay"],
        momentum=group["momentum"],
        undampened=1 - group["dampening"],
        first=first,
        nesterov=group["nesterov"],
        maximize=group["maximize"],
    )


def _adam(group: _Group, step: Any) -> Adam:
    (beta1, beta2), decay = group["betas"], group["weight_decay"]
    decoupled = decay != 0 and group.get("decoupled_weight_decay", False)
    # In the order of torch's `_single_tensor_adam`, for the same bits.
    return load_memory().Adam(  # type: ignore[no-any-return]
        rate=-(group["lr"] / (1 - beta1**step)),
        weight_decay=1 - group["lr"] * decay if decoupled else decay,
        weight1=1 - beta1,
        beta2=beta2,
        weight2=1 - beta2,
        correction2=(1 - beta2**step) ** 0.5,
        epsilon=group["eps"],
        decoupled=decoupled,
        maximize=group["maximize"],
    )


def _single(state: dict[str, Any], key: str) -> Tensor:
    """State as the core reads it. It is so already, unless it was loaded from somewhere else."""
    value: Tensor = state[key]
    if value.dtype != torch.float32 or not value.is_contiguous():
        value = state[key] = value.float().contiguous()
    return value


def _is_plain(group: _Group) -> bool:
    """Whether the group asks for nothing but the algorithm with numbers as hyperparameters."""
    if any(group.get(flag) for flag in ("amsgrad", "capturable", "differentiable")):
        return False
    numbers = (group["lr"], group["weight_decay"], *group.get("betas", ()))
    return not any(isinstance(number, Tensor) for number in numbers)


def _is_watched(optimizer: torch.optim.Optimizer) -> bool:
    """Whether somebody would miss the call of `optimizer.step()`."""
    hooks = (
        optimizer._optimizer_step_pre_hooks,
        optimizer._optimizer_step_post_hooks,
        _global_optimizer_pre_hooks,
        _global_optimizer_post_hooks,
    )
    if any(hooks) or any(getattr(optimizer, name, None) is not None for name in ("grad_scale", "found_inf")):
        return True
    # Learning-rate schedulers wrap the step to see that it is called; see the end of FusedStep.step.
    own = vars(optimizer).get("step")
    return own is not None and not (hasattr(own, "_wrapped_by_lr_sched") and own.__wrapped__ is type(optimizer).step)


@cache
def _contracts() -> bool:
    """Whether torch rounds once when it multiplies and adds, which depends on the CPU; asked of torch itself."""
    value = 1 + 2**-12
    square = torch.add(torch.full((64,), -1 - 2**-11), torch.full((64,), value), alpha=value)
    return bool((square != 0).all()) and bool(load_memory().fused_contracts())


_keeping: WeakSet[torch.optim.Optimizer] = WeakSet()


def _keep_masters(optimizer: torch.optim.Optimizer) -> None:
    """Let loaded state stay float32: torch would round it to the dtype of the weights."""
    if optimizer in _keeping:
        return
    _keeping.add(optimizer)
    loaded: list[tuple[nn.Parameter, dict[str, Any]]] = []

    def remember(_: torch.optim.Optimizer, saved: dict[str, Any]) -> None:
        numbers: Iterable[int] = chain.from_iterable(group["params"] for group in saved["param_groups"])
        owned = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        loaded[:] = [(p, saved["state"].get(number, {})) for p, number in zip(owned, numbers, strict=False)]

    def restore(_: torch.optim.Optimizer) -> None:
        for parameter, saved in loaded:
            for key, value in saved.items():
                if parameter.dtype == torch.bfloat16 and isinstance(value, Tensor) and value.dtype == torch.float32:
                    optimizer.state[parameter][key] = value.detach().to(
                        "cpu" if key == "step" else parameter.device, copy=True
                    )
        loaded.clear()

    optimizer.register_load_state_dict_pre_hook(remember)
    optimizer.register_load_state_dict_post_hook(restore)
