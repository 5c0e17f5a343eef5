"""What a stage draws depends on seed, microbatch and layer alone; an evaluation draws nothing."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from pipedream_hpc.model.capture import capture
from pipedream_hpc.model.partition import Partition
from pipedream_hpc.model.randomness import preserve_rng_state, seed_for, seed_modules, seeding, set_seed


class Drawing(nn.Module):
    """A layer, two functions that say whether they train, and attention, which does not."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Dropout(0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = nn.functional.dropout(self.layer(x), 0.5, training=self.training)
        x = nn.functional.rrelu(x, training=self.training)
        return nn.functional.scaled_dot_product_attention(x, x, x, dropout_p=0.5 if self.training else 0.0)


def run(seed: int, noise: int, *, training: bool = True) -> tuple[torch.Tensor, list[str]]:
    """Run the only stage after other random numbers were drawn; return the output, and the names of what was seeded."""
    graph = capture(Drawing(), torch.zeros(2, 3, 4))
    stage = Partition(graph, [list(range(len(graph.layers)))]).stage_module(0)
    undo = seed_modules(graph.module, graph.notes)
    names: list[str] = []

    def reseed(name: str) -> None:
        names.append(name)
        set_seed(seed_for(seed, 7, name))

    stage.train(training)
    torch.manual_seed(noise)
    with seeding(reseed):
        _, output = stage.run(graph.inputs.like(torch.arange(24.0).view(2, 3, 4) / 24), [])
    undo()
    return output, names


def test_draws_do_not_depend_on_what_was_drawn_before() -> None:
    (first, names), (again, _), (other, _) = run(0, 1), run(0, 2), run(1, 1)
    assert torch.equal(first, again)
    assert not torch.equal(first, other), "but on the seed"
    assert names == ["layer", "function 0", "function 1", "function 2"], "every draw has a name of its own"


def test_an_evaluation_draws_nothing() -> None:
    output, _ = run(0, 1, training=False)
    assert torch.equal(output, Drawing().eval()(torch.arange(24.0).view(2, 3, 4) / 24))


def test_seeds_differ_by_everything_they_are_made_of() -> None:
    seeds = [seed_for(*parts) for parts in ((0, 1, "a"), (1, 0, "a"), (0, 1, "b"), ("data", 0, 1), ("epoch", 0, 1))]
    assert len(set(seeds)) == len(seeds)
    assert seed_for(0, 1, "a") == seeds[0]


def test_the_current_gpu_is_seeded_once_cuda_is_in_use(monkeypatch: pytest.MonkeyPatch) -> None:
    seeds: list[int] = []
    generators = [
        SimpleNamespace(manual_seed=lambda seed: pytest.fail("the other GPU")),
        SimpleNamespace(manual_seed=seeds.append),
    ]
    monkeypatch.setattr(torch.cuda, "default_generators", generators)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    set_seed(3)
    assert seeds == []
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    set_seed(4)
    assert seeds == [4]
    assert torch.initial_seed() == 4


@pytest.mark.parametrize(
    ("device", "initialized", "devices"),
    [("cpu", False, []), ("cpu", True, [0]), ("cuda:1", True, [0, 1]), ("cuda", True, [0])],
)
def test_generators_that_are_preserved(
    device: str, initialized: bool, devices: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    forked: list[list[int]] = []
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: initialized)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    real = torch.random.fork_rng

    def fork_rng(devices: list[int]) -> object:
        forked.append(devices)
        return real(devices=[])

    monkeypatch.setattr(torch.random, "fork_rng", fork_rng)
    before = torch.get_rng_state()
    with preserve_rng_state(torch.device(device)):
        torch.rand(3)
    assert forked == [devices]
    assert torch.equal(torch.get_rng_state(), before)
