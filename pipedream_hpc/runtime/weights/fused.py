"""Fused optimizer steps that write the next weight version while they read the newest.

torch's own optimizers update in place, so a new version would have to be copied first and then stepped::

    copy, then step       newest ──copy──► free      free ──step──► free      5 numbers moved, 7 with Adam
    copy-on-write         newest ──────────step────► free                     one pass, no copy

The step is that of `torch.optim.SGD`, `Adam` and `AdamW`: hyperparameters are read from `optimizer.param_groups` at
every step, and state is kept in `optimizer.state` under torch's own names. A program may switch between this and
`optimizer.step()` at any time, and save and load state as usual. On a CPU the results are bitwise those of
`optimizer.step()` with `fused=False`.

Weights in bfloat16 have a float32 master, `optimizer.state[parameter]["master"]`, made from the weights at the first
step. The step updates the master in float32, with state in float32; the weights are the master, rounded. (torch's
optimizers have no masters, so this needs `master=True`.)
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

from pipedream_hpc.core import load_weights

if TYPE_CHECKING:
    from pipedream_hpc._weights import Adam, Sgd

_Group = dict[str, Any]
#: State of the shape of its weight, which the core reads by address.
LIKE_WEIGHTS = frozenset({"exp_avg", "exp_avg_sq", "momentum_buffer", "master"})
_ONE = torch.tensor(1.0)  # a tensor is added in half the time that a number takes


def fused_from(
    optimizer: torch.optim.Optimizer,
    parameters: Sequence[nn.Parameter] | None = None,
    gradients: Sequence[Tensor | None] = (),
    *,
    master: bool = False,
) -> FusedStep | None:
    """Return the fused step that does what `optimizer.step()` would do now, or None if there is none.

    There is none for optimizers other than SGD, Adam and AdamW (nor for their subclasses), for `amsgrad`,
    `capturable`, `differentiable` and hyperparameters that are tensors, with step hooks or a gradient scaler, for
    sparse gradients, and for dtypes other than float32 (and bfloat16, see `master`). All of this may change, so call
    this before every step; it is cheap.

    Args:
        optimizer: the optimizer.
        parameters: the order in which `FusedStep.step` takes its tensors; by default that of
            `optimizer.param_groups`. Parameters that the optimizer does not have are copied unchanged.
        gradients: of the coming step, in that order.
        master: whether bfloat16 weights have a float32 master. From then on `optimizer.load_state_dict` keeps the
            master, and the other state, in float32.
    """
    if type(optimizer) not in (torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW) or _has_hooks(optimizer):
        return None
    owned = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    ordered = owned if parameters is None else list(parameters)
    if not {id(parameter) for parameter in owned} <= {id(parameter) for parameter in ordered}:
        return None
    if not all(_is_supported(group) for group in optimizer.param_groups):
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
        _keep_float32_state(optimizer)
    return FusedStep(optimizer, ordered)


class FusedStep:
    """One optimizer's step from one weight version to the next. Created by `fused_from`.

    Attributes:
        streaming: whether to store new weights past the caches; None: only if the step moves more than 32 MiB.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, parameters: Sequence[nn.Parameter]) -> None:
        self._optimizer, self._count = optimizer, len(parameters)
        self._position = {id(parameter): index for index, parameter in enumerate(parameters)}
        self.streaming: bool | None = None

    def step(self, sources: Sequence[Tensor], targets: Sequence[Tensor], gradients: Sequence[Tensor | None]) -> None:
        """Take one step: read the weights `sources` and write `targets`.

        Args:
            sources: newest weights, contiguous; not changed.
            targets: like `sources`, in other memory, or in the same memory for a step in place.
            gradients: of each parameter; where it is None, the weights are copied unchanged.
        """
        with torch.no_grad():
            unstepped = set(range(self._count))
            for group in self._optimizer.param_groups:
                batches: dict[tuple[object, ...], _Batch] = {}
                for parameter in group["params"]:
                    index = self._position[id(parameter)]
                    gradient = gradients[index]
                    if gradient is not None:
                        unstepped.discard(index)
                        state = self._optimizer.state[parameter]
                        _add_to_batch(group, state, sources[index], targets[index], gradient, batches)
                for batch in batches.values():
                    batch.run(self.streaming)
            for index in unstepped:
                if sources[index].data_ptr() != targets[index].data_ptr():
                    targets[index].copy_(sources[index])
        # A learning-rate scheduler checks this to see that the optimizer has stepped before it.
        self._optimizer._opt_called = True  # type: ignore[attr-defined]


def _add_to_batch(
    group: _Group,
    state: dict[str, Any],
    source: Tensor,
    target: Tensor,
    gradient: Tensor,
    batches: dict[tuple[object, ...], _Batch],
) -> None:
    """Add one parameter to the batch of those that take the same step, and create its state if it has none."""
    halves = target.dtype == torch.bfloat16
    if halves:
        if "master" not in state:
            state["master"] = source.float()
        source = _as_float32(state, "master")
    first = second = 0
    step: object = None  # Adam: its number; momentum: whether it is the first
    if "betas" in group:
        if "step" not in state:
            double = torch.get_default_dtype() == torch.float64
            state["step"] = torch.tensor(0.0, dtype=torch.float64 if double else torch.float32)
            state["exp_avg"] = torch.zeros_like(source)
            state["exp_avg_sq"] = torch.zeros_like(source)
        step = state["step"].add_(_ONE).item()
        first, second = _as_float32(state, "exp_avg").data_ptr(), _as_float32(state, "exp_avg_sq").data_ptr()
    elif group["momentum"] != 0:
        step = state.get("momentum_buffer") is None
        if step:
            state["momentum_buffer"] = torch.empty_like(source)
        first = _as_float32(state, "momentum_buffer").data_ptr()
    key = step, halves, target.device
    batch = batches.get(key)
    if batch is None:
        rule = _adam(group, step) if "betas" in group else _sgd(group, first=bool(step))
        batch = batches[key] = _Batch(rule, halves, target.device)
    batch.add(source, target, gradient, first, second)


class _Batch:
    """Tensors that take their step in one call of the core."""

    def __init__(self, rule: Sgd | Adam, halves: bool, device: torch.device) -> None:
        self._rule, self._halves, self._device = rule, halves, device
        self._tensors: list[tuple[int, int, int, int, int, int]] = []
        self._alive: list[Tensor] = []

    def add(self, source: Tensor, target: Tensor, gradient: Tensor, first: int, second: int) -> None:
        if not gradient.is_contiguous() or gradient.is_neg():
            gradient = gradient.contiguous().resolve_neg()
            self._alive.append(gradient)  # nothing else keeps it alive
        addresses = source.data_ptr(), target.data_ptr(), gradient.data_ptr()
        self._tensors.append((target.numel(), *addresses, first, second))

    def run(self, streaming: bool | None) -> None:
        stream = None
        if self._device.type == "cuda":
            stream = torch.cuda.current_stream(self._device).cuda_stream
        load_weights().fused_step(
            self._rule,
            self._tensors,
            bfloat16_weights=self._halves,
            bfloat16_gradients=self._halves,
            threads=torch.get_num_threads(),
            fma=_contracts(),
            streaming=streaming,
            stream=stream,
        )


def _sgd(group: _Group, first: bool) -> Sgd:
    return load_weights().Sgd(  # type: ignore[no-any-return]
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
    # In the order of operations of torch's `_single_tensor_adam`, for bitwise equality.
    return load_weights().Adam(  # type: ignore[no-any-return]
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


def _as_float32(state: dict[str, Any], key: str) -> Tensor:
    """Return state as the core reads it, contiguous float32; only state loaded from elsewhere is converted."""
    value: Tensor = state[key]
    if value.dtype != torch.float32 or not value.is_contiguous():
        value = state[key] = value.float().contiguous()
    return value


def _is_supported(group: _Group) -> bool:
    """Return whether the core supports the group's options, with plain numbers as hyperparameters."""
    if any(group.get(flag) for flag in ("amsgrad", "capturable", "differentiable")):
        return False
    numbers = (group["lr"], group["weight_decay"], *group.get("betas", ()))
    return not any(isinstance(number, Tensor) for number in numbers)


def _has_hooks(optimizer: torch.optim.Optimizer) -> bool:
    """Return whether a call of `optimizer.step()` has effects of its own: hooks, a gradient scaler, a wrapper."""
    hooks = (
        optimizer._optimizer_step_pre_hooks,
        optimizer._optimizer_step_post_hooks,
        _global_optimizer_pre_hooks,
        _global_optimizer_post_hooks,
    )
    if any(hooks) or any(getattr(optimizer, name, None) is not None for name in ("grad_scale", "found_inf")):
        return True
    # Wrappers by learning-rate schedulers do not count: they only check the call, see the end of FusedStep.step.
    own = vars(optimizer).get("step")
    return own is not None and not (hasattr(own, "_wrapped_by_lr_sched") and own.__wrapped__ is type(optimizer).step)


@cache
def _contracts() -> bool:
    """Return whether torch rounds once when it multiplies and adds (FMA); it depends on the CPU."""
    value = 1 + 2**-12
    square = torch.add(torch.full((64,), -1 - 2**-11), torch.full((64,), value), alpha=value)
    return bool((square != 0).all()) and bool(load_weights().cpu_has_fma())


_keeping: WeakSet[torch.optim.Optimizer] = WeakSet()


def _keep_float32_state(optimizer: torch.optim.Optimizer) -> None:
    """Keep loaded state in float32: torch would round it to the dtype of the weights."""
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
