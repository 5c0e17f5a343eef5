"""e: forwards patched on the instance, and closures over what they replace."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from user_programs import Net, assert_trained_alike, chain, lora, minibatches, patched, pipeline_of, plain

from pipedream_hpc import PipedreamError


@pytest.mark.parametrize("plan", [1, 2, 3])
@pytest.mark.parametrize("build", [patched, lora])
def test_patches_are_the_users_own(build: Callable[[], nn.Module], plan: int) -> None:
    assert_trained_alike(build, plan)


def test_a_forward_that_holds_a_parameter_itself_is_refused() -> None:
    model, batches = chain(), minibatches()
    weight = model[2].weight
    model[2].forward = lambda x: nn.functional.linear(x, weight)
    with pytest.raises(PipedreamError, match=r"the forward or the loss of stage \d depends on '2.weight'"):
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
