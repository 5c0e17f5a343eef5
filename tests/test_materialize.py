"""A model given as a function: weights bitwise equal to the whole model's, and only a rank's own in memory."""

from __future__ import annotations

import copy
import functools
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
from pipedream_hpc.model import recipe
from pipedream_hpc.model.capture import capture
from pipedream_hpc.model.materialize import materialize
from pipedream_hpc.model.partition import Partition


class Positions(nn.Module):
    """Computed buffers (a mask and positional encodings), and a weight initialised from another weight."""

    def __init__(self) -> None:
        super().__init__()
        angles = torch.arange(6.0)[:, None] * torch.exp(torch.arange(4.0) / 4)
        self.register_buffer("encoding", torch.sin(angles))
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
    """The number of random draws depends on the drawn values."""
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
    """Weights from the generators of numpy and Python, and a weight written through numpy."""
    model = nn.Sequential(*(nn.Linear(8, 8) for _ in range(4)))
    with torch.no_grad():
        model[1].weight.copy_(torch.from_numpy(numpy.random.rand(8, 8)))
        model[2].weight.fill_(random.random())
        model[3].weight.detach().numpy()[:] = 3 * model[3].weight.detach().numpy()
    return model


BUILDERS: dict[str, tuple[Callable[[], nn.Module], Any]] = {
    **{name: (case.build, case.example()) for name, case in ZOO.items()},
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
def little_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Treat small models like large ones: only a few tensors may stay in memory."""
    monkeypatch.setattr(recipe, "_SPARE_BYTES", 0)


def seed() -> None:
    torch.manual_seed(11)
    random.seed(11)
    numpy.random.seed(11)


def generator_states() -> list[Any]:
    """Return the states of all random number generators."""
    return [bytes(torch.get_rng_state().numpy()), random.getstate(), numpy.random.get_state()[1].tobytes()]


@pytest.mark.filterwarnings("ignore:every rank holds the whole model")
@pytest.mark.parametrize("name", BUILDERS)
def test_every_layer_has_the_weights_of_the_whole_model(name: str, little_memory: None) -> None:
    build, example = BUILDERS[name]
    seed()
    expected, after = dict(build().state_dict()), generator_states()
    seed()
    graph = capture(build, example)
    assert generator_states() == after, "as after building the whole model"
    assert all(parameter.is_meta for parameter in graph.module.parameters())
    partition = Partition(graph, [[index] for index in range(len(graph.layers))])
    seen = set()
    for index in range(len(graph.layers)):
        stage = partition.stage_module(index)
        materialize(graph, [stage])
        for key, value in stage.module.state_dict().items():
            assert torch.equal(value, expected[key]), key
            seen.add(key)
    assert {name for name, _ in graph.module.named_parameters()} <= seen
    assert generator_states() == after


@pytest.mark.parametrize("plan", ["1-1-1", "2-1"])
def test_training_equals_that_of_the_built_model(plan: str) -> None:
    def train(model: Any) -> tuple[float, dict[str, torch.Tensor]]:
        with Pipeline(
            model,
            loss_fn=nn.CrossEntropyLoss(),
            optimizer=chains.OPTIMIZERS["sgd"],
            example_inputs=chains.example(),
            plan=plan,
        ) as pipeline:
            return pipeline.fit(chains.minibatches(7)), pipeline.state_dict()

    (loss, weights), (expected_loss, expected) = train(chains.rich_model), train(chains.rich_model())
    assert loss == expected_loss
    assert weights.keys() == expected.keys()
    assert [name for name in weights if not torch.equal(weights[name], expected[name])] == []


def run_hold_own(how: str, folder: Path) -> list[dict[str, Any]]:
    folder.mkdir()
    finished = ranks.python(3, "hold_own.py", how, folder, timeout=240)
    assert finished.status == 0, finished.output
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(3)]


def test_each_rank_holds_only_its_own_stage(tmp_path: Path) -> None:
    by_function, by_stage, by_module = (run_hold_own(how, tmp_path / how) for how in ("function", "stages", "module"))
    whole = sum(each["own"] for each in by_function)
    assert whole > 130 << 20
    for rank, (own, checked, built) in enumerate(zip(by_function, by_stage, by_module, strict=True)):
        assert own["ranks"] == 3, "the job ran on three ranks"
        assert own["weights"] == checked["weights"] == built["weights"], "all trained to the same weights"
        # Weight versions, gradients of two minibatches, and temporaries for creating the largest tensor.
        needed = own["own"] * (own["versions"] + 2) + (64 << 20)
        # Before training, rank 0 has built and checked the whole model, and let it go.
        held = own["started" if rank == 0 else "grown"]
        assert held < needed, f"rank {rank}: {held >> 20} MiB, of {needed >> 20} MiB needed"
        # Where there is no room for that, no rank does.
        assert checked["grown"] < needed, f"rank {rank}: {checked['grown'] >> 20} MiB, of {needed >> 20} MiB needed"
        # Of a built model the other stages' weights stay in memory.
        assert built["grown"] > own["grown"] + whole // 4, f"{built['grown'] >> 20} and {own['grown'] >> 20} MiB"


def test_a_function_that_reads_earlier_tensors_is_warned_about_and_still_correct(little_memory: None) -> None:
    def build() -> nn.Module:
        torch.manual_seed(2)
        model = nn.Sequential(*(nn.Linear(8, 8) for _ in range(12)))
        with torch.no_grad():
            model[-1].weight.copy_(model[0].weight)
        return model

    with pytest.warns(UserWarning, match="every rank holds the whole model while it is built: it reads a tensor"):
        graph = capture(build, torch.zeros(2, 8))
    stage = Partition(graph, [list(range(len(graph.layers)))]).stage_module(0)
    materialize(graph, [stage])
    assert all(torch.equal(value, build().state_dict()[key]) for key, value in stage.module.state_dict().items())


def test_a_function_that_builds_a_different_model_the_second_time() -> None:
    widths = iter([8, 9, 9, 9])

    def build() -> nn.Module:
        width = next(widths)
        return nn.Sequential(nn.Linear(8, width), nn.Linear(width, 8))

    with pytest.raises(PipedreamError, match="built a different model when it was called again"):
        Pipeline(
            build, loss_fn=nn.MSELoss(), optimizer=chains.OPTIMIZERS["sgd"], example_inputs=torch.zeros(2, 8), plan=2
        )


def pipeline_of(model: Any) -> Pipeline:
    return Pipeline(
        model,
        loss_fn=nn.MSELoss(),
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.1),
        example_inputs=torch.zeros(2, 8),
        plan=2,
    )


def counted() -> Callable[[], nn.Module]:
    """Return a function that builds other weights of its second layer at each call."""
    calls: list[int] = []

    def build() -> nn.Module:
        torch.manual_seed(0)
        model = nn.Sequential(*(nn.Linear(8, 8) for _ in range(4)))
        calls.append(1)
        with torch.no_grad():
            model[1].weight.mul_(len(calls))
        return model

    return build


OTHER_VALUES = r"^the function given as model built '1\.weight' with other values than for the check on rank 0: seed"


def test_a_function_that_builds_other_weights_at_each_call() -> None:
    with pytest.raises(PipedreamError, match=OTHER_VALUES):
        pipeline_of(counted())


EXISTING = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
ONCE = functools.cache(lambda: nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)))


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (lambda: EXISTING, "^the function given as model returns a model that was made before: pass the model itself"),
        (
            lambda: nn.Sequential(EXISTING, nn.Linear(8, 8)),
            r"returns a model with '0\.0\.weight', of a module that was made before: pass the model itself, or make",
        ),
        (
            ONCE,
            "^the function given as model returns again what it built before, as with functools.cache: it must",
        ),
        (nn.Sequential(nn.Linear(8, 8, device="meta")), r"^'0\.weight' of the model is on the meta device and has"),
        (lambda: nn.Sequential(nn.Linear(8, 8, device="meta")), r"^'0\.weight' of the model is on the meta device"),
    ],
)
def test_a_model_that_exists_already_or_has_no_values(model: Any, words: str) -> None:
    with pytest.raises(PipedreamError, match=words):
        pipeline_of(model)
    assert not any(each.is_meta for each in EXISTING.parameters())


def test_modules_without_weights_may_exist_already() -> None:
    """As the activation in an argument's default."""
    activation = nn.Tanh()
    assert capture(lambda: nn.Sequential(nn.Linear(8, 8), activation, nn.Linear(8, 8)), torch.zeros(2, 8)).layers


@pytest.mark.parametrize(
    ("model", "words"),
    [(lambda: 3, "returned an object of type int"), (3, "model is of type int")],
)
def test_an_object_that_is_no_model(model: Any, words: str) -> None:
    with warnings.catch_warnings(), pytest.raises(PipedreamError, match=words):
        warnings.simplefilter("error")
        capture(model, torch.zeros(2, 8))
