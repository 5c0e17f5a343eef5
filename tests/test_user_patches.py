"""e: forwards patched on the instance, and closures over what they replace."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn
from user_programs import Net, assert_trained_alike, chain, lora, minibatches, patched, pipeline_of, plain

from pipedream_hpc import PipedreamError


def frozen_first() -> nn.Module:
    """Return an nn.Sequential that calls its children in turn, but the first three without gradients."""
    model = chain()

    def forward(x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            for layer in model[:3]:
                x = layer(x)
        for layer in model[3:]:
            x = layer(x)
        return x

    model.forward = forward  # type: ignore[method-assign,assignment]
    return model


@pytest.mark.parametrize("plan", [1, 2, 3])
@pytest.mark.parametrize("build", [patched, lora, frozen_first])
def test_patches_are_the_users_own(build: Callable[[], nn.Module], plan: int) -> None:
    assert_trained_alike(build, plan)


def test_a_forward_that_holds_a_parameter_itself_is_refused() -> None:
    model, batches = chain(), minibatches()
    weight = model[2].weight
    model[2].forward = lambda x: nn.functional.linear(x, weight)
    with pytest.raises(PipedreamError, match=r"the forward uses the parameter '2.weight' as .* \(module.weight\)"):
        pipeline_of(model, 2, batches).fit(batches)


class Wrapper(nn.Module):
    """Passes on whatever it is given, as wrappers for adapters do."""

    def __init__(self) -> None:
        super().__init__()
        self.model = Net()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.model(*args, **kwargs)


def test_a_wrapper_takes_a_mapping_as_keyword_arguments() -> None:
    batches = minibatches()
    pipeline = pipeline_of(Wrapper(), 2, [({"x": x}, target) for x, target in batches])
    pipeline.fit([({"x": x}, target) for x, target in batches])
    expected = plain(Wrapper(), batches)
    assert all(torch.equal(each, expected[name]) for name, each in pipeline.state_dict().items())


class Recalls(nn.Module):
    """Holds the layers' weights besides the layers, as `how` says."""

    def __init__(self, how: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3))
        layer = self.layers[2]
        weight = layer.weight
        if how == "hook":
            layer.register_forward_hook(lambda module, inputs, output: output + inputs[0] @ weight)
        elif how == "detached":
            layer.register_forward_hook(lambda module, inputs, output: output + inputs[0] @ weight.detach())
        elif how == "alias":
            alias = weight.detach()
            layer.register_forward_hook(lambda module, inputs, output: output + inputs[0] @ alias)
        elif how == "attribute":
            layer.transposed = weight.data.t()
            layer.register_forward_hook(lambda module, inputs, output: output + inputs[0] @ module.transposed.t())
        elif how == "buffer":
            layer.register_buffer("shown", weight.data[:4], persistent=False)
            layer.register_forward_hook(lambda module, inputs, output: output + (inputs[0][:, :4] @ module.shown))
        elif how == "outside":
            self.layers[2] = nn.Identity()
            self.layers[2].weight, self.layers[2].bias = weight, layer.bias
            self.layers[2].forward = lambda x: layer(x)
        elif how == "module":
            layer.register_forward_hook(lambda module, inputs, output: output + inputs[0] @ module.weight)

    def forward(self, x: torch.Tensor) -> Any:
        return self.layers(x)


@pytest.mark.parametrize("plan", [1, 2, 3])
@pytest.mark.parametrize("how", ["hook", "detached", "alias", "attribute", "buffer", "outside"])
def test_weights_that_are_held_besides_their_modules_are_refused(how: str, plan: int) -> None:
    words = r"forward \(.*\): the forward uses the parameter 'layers.2.weight' as .* from its module in the model"
    batches = minibatches()
    with pytest.raises(PipedreamError, match=words):
        pipeline_of(Recalls(how), plan, batches).fit(batches)
    assert_trained_alike(partial(Recalls, "module"), plan)


@pytest.mark.parametrize("how", ["alias", "attribute", "buffer"])
def test_memory_of_weights_that_a_function_has_kept_is_refused(how: str) -> None:
    batches = minibatches()
    with pytest.raises(PipedreamError, match=r"the forward uses the parameter 'layers\.2\.weight' as"):
        pipeline_of(partial(Recalls, how), 2, batches).fit(batches)


class TwoParameters(nn.Module):
    """`last` has the memory of `first`, or another part of the same memory, in a parameter of its own."""

    def __init__(self, begin: int, trained: bool = True) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Linear(6, 6, bias=False), nn.Linear(6, 6, bias=False)
        memory = torch.randn(2 * 36) / 3
        self.first.weight.data = memory[:36].view(6, 6)
        self.last.weight.data = memory[begin : begin + 36].view(6, 6)
        self.requires_grad_(trained)
        self.head = nn.Linear(6, 3)

    def forward(self, x: torch.Tensor) -> Any:
        return self.head(self.last(torch.tanh(self.first(x))))


@pytest.mark.parametrize("begin", [0, 35])
@pytest.mark.parametrize("as_function", [False, True])
def test_parameters_with_the_same_memory_are_refused(begin: int, as_function: bool) -> None:
    words = r"weights 'first.weight' and 'last.weight' are two parameters with the same memory, .*: tie them as one"
    model = partial(TwoParameters, begin)
    with pytest.raises(PipedreamError, match=words):
        pipeline_of(model if as_function else model(), 2, minibatches())


@pytest.mark.parametrize(("begin", "trained"), [(36, True), (0, False)], ids=["other parts of it", "frozen"])
def test_parameters_may_share_memory_that_no_two_write_to(begin: int, trained: bool) -> None:
    assert_trained_alike(partial(TwoParameters, begin, trained), 2)


class Asks(Net):
    def forward(self, x: torch.Tensor) -> Any:
        kind = next(self.parameters()).dtype
        return self.c(self.b(self.a(x.to(kind))).tanh()) * (next(self.parameters()).numel() / 96)


@pytest.mark.parametrize("plan", [1, 2, 3])
def test_a_forward_may_ask_for_dtypes_of_weights(plan: int) -> None:
    assert_trained_alike(Asks, plan)
