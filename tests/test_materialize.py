"""A model given as a function: the weights of the whole model, bit for bit, and only one's own in memory."""

from __future__ import annotations

import copy
import json
import random
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import chains
import numpy
import pytest
import ranks
import torch
from torch import nn
from zoo import ZOO

from pipedream_hpc import Pipeline
from pipedream_hpc.errors import PipedreamError
from pipedream_hpc.model import materialize as module_under_test
from pipedream_hpc.model.capture import capture
from pipedream_hpc.model.cut import Cut
from pipedream_hpc.model.materialize import materialize


class Positions(nn.Module):
    """Buffers that are computed: a mask, and an encoding of places; a weight that starts as another's copy."""

    def __init__(self) -> None:
        super().__init__()
        place = torch.arange(6.0)[:, None] * torch.exp(torch.arange(4.0) / 4)
        self.register_buffer("encoding", torch.sin(place))
        self.register_buffer("mask", torch.tril(torch.ones(6, 6)))
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        with torch.no_grad():
            self.second.weight.copy_(2 * self.first.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(torch.relu(self.mask @ self.first(x + self.encoding)))


def orthogonal() -> nn.Module:
    model = nn.Sequential(*(nn.Linear(8, 8) for _ in range(5)))
    for layer in model:
        nn.init.orthogonal_(layer.weight)
    return model


def own_generator() -> nn.Module:
    generator = torch.Generator().manual_seed(5)
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    for layer in model:
        nn.init.normal_(layer.weight, generator=generator)
    return model


def truncated() -> nn.Module:
    """How many numbers are drawn depends on those drawn."""
    model = nn.Sequential(*(nn.Linear(8, 8) for _ in range(5)))
    for layer in model:
        nn.init.trunc_normal_(layer.weight, std=2.0)
    return model


def clones() -> nn.Module:
    layer = nn.Sequential(nn.Linear(8, 8), nn.ReLU())
    model = nn.Sequential(*(copy.deepcopy(layer) for _ in range(4)))
    model[2][0].weight = model[0][0].weight
    return model


def normalized() -> nn.Module:
    return nn.Sequential(*(nn.utils.parametrizations.weight_norm(nn.Linear(8, 8)) for _ in range(4)))


def arrays() -> nn.Module:
    """Weights from other generators, and from outside of torch."""
    model = nn.Sequential(*(nn.Linear(8, 8) for _ in range(4)))
    with torch.no_grad():
        model[1].weight.copy_(torch.from_numpy(numpy.random.rand(8, 8)))
        model[2].weight.fill_(random.random())
        model[3].weight.detach().numpy()[:] = 3 * model[3].weight.detach().numpy()
    return model


BUILDERS: dict[str, tuple[Callable[[], nn.Module], Any]] = {
    **{name: (specimen.build, specimen.example()) for name, specimen in ZOO.items()},
    "positions": (Positions, torch.zeros(2, 6, 4)),
    "orthogonal": (orthogonal, torch.zeros(2, 8)),
    "a generator of its own": (own_generator, torch.zeros(2, 8)),
    "truncated": (truncated, torch.zeros(2, 8)),
    "clones": (clones, torch.zeros(2, 8)),
    "normalized": (normalized, torch.zeros(2, 8)),
    "arrays": (arrays, torch.zeros(2, 8)),
    "rich": (chains.rich_model, chains.example()),
}


@pytest.fixture
def no_room(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small models are treated like large ones: nothing but the largest tensors may stay."""
    monkeypatch.setattr(module_under_test, "_SPARE", 0)


def seed() -> None:
    torch.manual_seed(11)
    random.seed(11)
    numpy.random.seed(11)


def states() -> list[Any]:
    """Where the random number generators are."""
    return [bytes(torch.get_rng_state().numpy()), random.getstate(), numpy.random.get_state()[1].tobytes()]


@pytest.mark.filterwarnings("ignore:every rank holds the whole model")
@pytest.mark.parametrize("name", BUILDERS)
def test_every_layer_by_itself_has_the_weights_of_the_whole(name: str, no_room: None) -> None:
    build, example = BUILDERS[name]
    seed()
    expected, after = dict(build().state_dict()), states()
    seed()
    graph = capture(build, example)
    assert states() == after, "as if the whole model had been built"
    assert all(parameter.is_meta for parameter in graph.module.parameters())
    cut = Cut(graph, [[index] for index in range(len(graph.layers))])
    seen = set()
    for index in range(len(graph.layers)):
        part = cut.part(index)
        materialize(graph, [part.module])
        for key, value in part.module.state_dict().items():
            assert torch.equal(value, expected[key]), key
            seen.add(key)
    assert {name for name, _ in graph.module.named_parameters()} <= seen
    assert states() == after


@pytest.mark.parametrize("plan", ["1-1-1", "2-1"])
def test_training_is_that_of_the_built_model(plan: str) -> None:
    def trained(model: Any) -> tuple[float, dict[str, torch.Tensor]]:
        pipeline = Pipeline(
            model,
            loss=nn.CrossEntropyLoss(),
            optimizer=chains.OPTIMIZERS["sgd"],
            example=chains.example(),
            plan=plan,
        )
        return pipeline.fit(chains.minibatches(7)), pipeline.state_dict()

    (loss, weights), (expected_loss, expected) = trained(chains.rich_model), trained(chains.rich_model())
    assert loss == expected_loss
    assert weights.keys() == expected.keys()
    assert [name for name in weights if not torch.equal(weights[name], expected[name])] == []


def held(how: str, folder: Path) -> list[dict[str, Any]]:
    folder.mkdir()
    finished = ranks.python(4, "hold_own.py", how, folder, timeout=240)
    assert finished.status == 0, finished.output
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(4)]


def test_each_rank_has_its_own_stage_in_memory_and_no_more(tmp_path: Path) -> None:
    by_function, by_module = held("function", tmp_path / "function"), held("module", tmp_path / "module")
    whole = sum(each["own"] for each in by_function)
    assert whole > 250 << 20
    for rank, (own, built) in enumerate(zip(by_function, by_module, strict=True)):
        assert own["ranks"] == 4, "the ranks really ran"
        assert own["weights"] == built["weights"], "the same training"
        # Versions, gradients of two minibatches, and what it takes to make the largest tensor.
        needed = own["own"] * (own["versions"] + 2) + (96 << 20)
        assert own["grown"] < needed, f"rank {rank}: {own['grown'] >> 20} MiB, of {needed >> 20} MiB needed"
        # A built model stays whole beside the stage's versions.
        assert built["grown"] > own["grown"] + whole // 2, f"{built['grown'] >> 20} and {own['grown'] >> 20} MiB"


def test_a_function_that_looks_back_is_said_to_and_right_all_the_same(no_room: None) -> None:
    def build() -> nn.Module:
        torch.manual_seed(2)
        model = nn.Sequential(*(nn.Linear(8, 8) for _ in range(12)))
        with torch.no_grad():
            model[-1].weight.copy_(model[0].weight)
        return model

    with pytest.warns(UserWarning, match="every rank holds the whole model while it is built: it looks back"):
        graph = capture(build, torch.zeros(2, 8))
    part = Cut(graph, [list(range(len(graph.layers)))]).part(0)
    materialize(graph, [part.module])
    assert all(torch.equal(value, build().state_dict()[key]) for key, value in part.module.state_dict().items())


def test_a_function_that_builds_something_else_the_second_time() -> None:
    widths = iter([8, 9, 9, 9])

    def build() -> nn.Module:
        width = next(widths)
        return nn.Sequential(nn.Linear(8, width), nn.Linear(width, 8))

    with pytest.raises(PipedreamError, match="built another one when it was called again"):
        Pipeline(build, loss=nn.MSELoss(), optimizer=chains.OPTIMIZERS["sgd"], example=torch.zeros(2, 8), plan=2)


@pytest.mark.parametrize(
    ("model", "words"),
    [(lambda: 3, "built something of type int"), (3, "the model is of type int")],
)
def test_what_is_no_model(model: Any, words: str) -> None:
    with warnings.catch_warnings(), pytest.raises(PipedreamError, match=words):
        warnings.simplefilter("error")
        capture(model, torch.zeros(2, 8))
