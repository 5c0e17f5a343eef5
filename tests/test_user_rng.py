"""What the user draws before, between and after steps is what he would draw without training."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import chains
import pytest
import torch
from torch import nn

from pipedream_hpc import Pipeline
from pipedream_hpc.runtime.execution.user_rng import UserGenerators

CPU = torch.device("cpu")


def drawn(count: int) -> list[float]:
    return [float(torch.rand(())) for _ in range(count)]


@pytest.fixture
def expected() -> Iterator[list[float]]:
    """The user's numbers from seed 5; the test starts with the same seed."""
    torch.manual_seed(5)
    numbers = drawn(8)
    torch.manual_seed(5)
    yield numbers
    torch.manual_seed(0)


def test_states_are_kept_apart(expected: list[float]) -> None:
    """
    user      0 1 │            │ 2 │            │ 3
    training      │ seed, draw │   │ seed, draw │
    """
    found = drawn(2)
    users = UserGenerators(CPU)
    torch.manual_seed(99)
    drawn(3)
    users.restore()
    found += drawn(1)
    users.save()
    torch.manual_seed(98)
    users.restore()
    assert found + drawn(1) == expected[:4]


class FakeCuda:
    """Generators of two GPUs, as numbers."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, initialized: bool) -> None:
        self.states = {0: torch.tensor(10), 1: torch.tensor(20)}
        monkeypatch.setattr(torch.cuda, "is_initialized", lambda: initialized)
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
        monkeypatch.setattr(torch.cuda, "get_rng_state", lambda index: self.states[index])
        monkeypatch.setattr(torch.cuda, "set_rng_state", self.set)

    def set(self, state: torch.Tensor, index: int) -> None:
        self.states[index] = state


@pytest.mark.parametrize(
    ("device", "initialized", "restored"),
    [
        ("cpu", False, []),  # a run on CPUs never touches CUDA
        ("cpu", True, [0]),  # but torch.manual_seed seeds a GPU that the user's own code uses
        ("cuda:1", True, [0, 1]),
        ("cuda", True, [0]),
    ],
)
def test_generators_of_gpus(
    device: str, initialized: bool, restored: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    cuda = FakeCuda(monkeypatch, initialized=initialized)
    users = UserGenerators(torch.device(device))
    cuda.states = {index: torch.tensor(0) for index in cuda.states}
    users.restore()
    assert [index for index, state in cuda.states.items() if state] == restored


def pipeline() -> Pipeline:
    return Pipeline(
        chains.rich_model(),  # with dropout, which training seeds
        loss_fn=nn.CrossEntropyLoss(),
        optimizer=chains.OPTIMIZERS["sgd"],
        example_inputs=chains.example(),
        plan="1-1-1",
    )


def test_a_pass_draws_nothing_of_the_users(expected: list[float]) -> None:
    held = pipeline()
    torch.manual_seed(5)
    found = drawn(1)
    held.fit(chains.minibatches(3))
    found += drawn(1)
    held.evaluate(chains.minibatches(3))
    assert found + drawn(1) == expected[:3]


def test_the_user_draws_within_the_loop(expected: list[float]) -> None:
    held, data = pipeline(), chains.minibatches(4)
    torch.manual_seed(5)
    found: list[float] = []
    for _ in held.train(data):
        found += drawn(1)
    assert found + drawn(1) == expected[:5]
    undisturbed = pipeline()
    undisturbed.fit(data)
    left, right = held.state_dict(), undisturbed.state_dict()
    assert all(torch.equal(left[name], right[name]) for name in left), "and training draws nothing of the user's"


def test_an_error_gives_the_generators_back(expected: list[float]) -> None:
    held = pipeline()
    torch.manual_seed(5)
    found = drawn(1)
    bad: Any = [*chains.minibatches(1), 3]
    with pytest.raises(Exception, match="yielded int"):
        held.fit(bad)
    assert found + drawn(1) == expected[:2]
