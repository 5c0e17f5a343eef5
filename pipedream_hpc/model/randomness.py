"""Random numbers that depend on explicit seeds, and not on what this process has drawn before."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import fx, nn


def seed_for(*what: object) -> int:
    """Return a 63-bit seed that depends only on `what`: the same on every rank and under every plan."""
    digest = hashlib.blake2b(repr(what).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def set_seed(seed: int) -> None:
    """Seed torch's generators of the CPU and, once CUDA is in use, of the current CUDA device.

    torch.manual_seed does the same, but takes 200 µs: it collects a stack trace for every device type that is absent.
    """
    torch.default_generator.manual_seed(seed)
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        torch.cuda.default_generators[torch.cuda.current_device()].manual_seed(seed)


@contextmanager
def preserve_rng_state(device: torch.device) -> Iterator[None]:
    """Restore the generators that `set_seed` seeds when the block ends."""
    devices = set()
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        devices.add(torch.cuda.current_device())
    if device.type == "cuda":
        devices.add(torch.cuda.current_device() if device.index is None else device.index)
    with torch.random.fork_rng(devices=sorted(devices)):
        yield


#: Names of functions that draw random numbers.
RANDOM = frozenset(
    {
        "dropout",
        "dropout1d",
        "dropout2d",
        "dropout3d",
        "alpha_dropout",
        "feature_alpha_dropout",
        "scaled_dot_product_attention",
        "rrelu",
        "rand_like",
        "randn_like",
        "bernoulli",
    }
)


def seed_layers(module: fx.GraphModule, reseed: Callable[[str], None]) -> None:
    """Make every layer and function of a stage that draws random numbers reseed the generators first.

    A dropout mask also depends on the memory layout of its input, which differs before and after a cut; so the input
    is made contiguous.

    Args:
        module: the module of a stage, as Partition.stage_module creates it.
        reseed: called before every draw with the name of the layer or function in the whole model.
    """

    def seeder(name: str) -> Callable[[nn.Module, Any], Any]:
        def seed(layer: nn.Module, arguments: tuple[Any, ...]) -> Any:
            if not layer.training:
                return None
            reseed(name)
            return tuple(_contiguous(each) for each in arguments)

        return seed

    for name, layer in module.named_modules():
        # Recurrent and attention layers store their dropout probability as a float.
        number = getattr(layer, "dropout", None)
        if isinstance(layer, nn.modules.dropout._DropoutNd) or (isinstance(number, float) and number > 0):
            layer.register_forward_pre_hook(seeder(name))
    # torch.fx has recorded the value of `training=self.training` at capture; from now on the mode of the module
    # decides.
    found = [node for node in module.graph.nodes if "random" in node.meta]
    for node in found:
        node.target = _seeding(node.target, node.meta["random"], module, reseed)
    if found:
        module.recompile()


def _seeding(function: Any, name: str, module: nn.Module, reseed: Callable[[str], None]) -> Callable[..., Any]:
    attention = function is nn.functional.scaled_dot_product_attention
    parameters = None if attention else _signature(function)

    def drawing(*args: Any, **kwargs: Any) -> Any:
        if module.training:
            reseed(name)
            args = tuple(_contiguous(each) for each in args)
        elif attention:
            args, kwargs = args[:4], {**kwargs, "attn_mask": (args[3:4] or (kwargs.get("attn_mask"),))[0]}
            kwargs.pop("dropout_p", None)
            return function(*args[:3], **kwargs)
        if parameters is not None and "training" in parameters.parameters:
            bound = parameters.bind(*args, **kwargs)
            bound.arguments["training"] = module.training
            return function(*bound.args, **bound.kwargs)
        return function(*args, **kwargs)

    return drawing


def _contiguous(value: Any) -> Any:
    """Return a tensor as contiguous, and anything else unchanged."""
    return value.contiguous() if isinstance(value, torch.Tensor) else value


def _signature(function: Any) -> inspect.Signature | None:
    try:
        return inspect.signature(function)
    except (TypeError, ValueError):
        return None  # a builtin function has none
