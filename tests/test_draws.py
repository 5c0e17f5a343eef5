"""`pipedream verify` and random numbers: it draws them again, and says so where the stages have drawn wrong ones."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import ranks
import torch
from torch import nn
from typer.testing import CliRunner

from pipedream_hpc.cli import app
from pipedream_hpc.errors import PipedreamError
from pipedream_hpc.model import randomness, stage_module
from pipedream_hpc.runtime.execution import stage
from pipedream_hpc.verification.draws import Draw, Replay, problems_of

JOB = """
import random
from functools import partial
import numpy
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from pipedream_hpc import Job, TrainConfig

class LayerDrop(nn.Module):
    "Draws Python's and NumPy's numbers, and torch's within."
    def __init__(self):
        super().__init__()
        self.linear, self.drop = nn.Linear(8, 8), nn.Dropout(0.3)
    def forward(self, x):
        if not self.training:
            return x
        if random.random() < 0.4:
            return x
        return x + self.drop(self.linear(x)) * float(numpy.random.uniform(0.5, 1))

class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear, self.norm = nn.Linear(8, 8), nn.LayerNorm(8)
    def forward(self, x):
        q = self.linear(x)
        attended = F.scaled_dot_product_attention(q, q, q, dropout_p=0.2 if self.training else 0.0)
        return x + F.dropout(self.norm(attended), 0.1, self.training)

class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second, self.drop = nn.Linear(8, 8), nn.Linear(8, 8), nn.Dropout(0.3)
        self.last = nn.Dropout(0.3)
    def forward(self, x):
        return x + self.last(self.second(self.drop(torch.tanh(self.first(x)))))

class Checkpointed(Block):
    reentrant = False
    def forward(self, x):
        return checkpoint(super().forward, x, use_reentrant=self.reentrant)

class Reentrant(Checkpointed):
    reentrant = True

class Model(nn.Module):
    def __init__(self, kinds):
        super().__init__()
        self.first, self.drop = nn.Linear(6, 8), nn.Dropout(0.5)
        self.blocks = nn.ModuleList(kind() for kind in kinds)
        self.rnn, self.rrelu = nn.LSTM(8, 8, 2, dropout=0.3, batch_first=True), nn.RReLU()
        self.last = nn.Linear(8, 3)
    def forward(self, x):
        noise = torch.randn(len(x), 1, 8) if self.training else 0  # every stage draws it
        x = self.first(x) + 0.1 * noise
        for block in self.blocks:
            x = self.drop(block(x))
        x, _ = self.rnn(self.rrelu(x))
        return self.last(x if not self.training else x + 0.01 * torch.randn_like(x)).mean(1)

def job(args):
    torch.manual_seed(0)
    model = Model([globals()[kind] for kind in args])
    data = [(torch.randn(4, 5, 6), torch.randint(0, 3, (4,))) for _ in range(4)]
    return Job(model, nn.CrossEntropyLoss(), partial(torch.optim.SGD, lr=0.1), data, data[0][0],
               train_config=TrainConfig(leaf_modules=[Block] if args else []))
"""


@pytest.fixture
def job(tmp_path: Path) -> Path:
    path = tmp_path / "own.py"
    path.write_text(JOB)
    return path


def words_of(job: Path, plan: str, *kinds: str) -> list[str]:
    return ["verify", str(job), *plan.split(), "--minibatches", "4", "--tolerance", "0", "--", *kinds]


def output_of(job: Path, plan: str, *kinds: str) -> str:
    return " ".join(CliRunner().invoke(app, words_of(job, plan, *kinds), catch_exceptions=False).output.split())


EXACT = "exact: every bit of the pipelined training is that of the reference"
ALL = ("LayerDrop", "Checkpointed", "Attention", "Reentrant", "LayerDrop", "Block")


@pytest.mark.parametrize(
    "plan",
    [
        "--plan 3",
        "--plan 2-1",
        "--plan 3 --recompute",
        "--plan 2 --schedule gpipe --n-microbatches 2",
        "--plan 3 --schedule zb-h1 --n-microbatches 2",
        "--plan 3 --schedule vertical-sync",
    ],
)
def test_the_model_by_itself_draws_what_its_stages_draw(job: Path, plan: str) -> None:
    assert EXACT in output_of(job, plan, *ALL)


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_between_modules_of_a_stage(job: Path, reentrant: bool) -> None:
    """The forward of the model itself calls it; its modules are trained, and run once more per minibatch, not more."""
    job.write_text(JOB.replace("block(x)", f"checkpoint(block, x, use_reentrant={reentrant})"))
    assert EXACT in output_of(job, "--plan 3", "Attention", "Block", "Block", "Block")


CHECKPOINTED = {
    "inside a block": """
class Part(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.drop = nn.Linear(8, 8), nn.Linear(8, 8), nn.Dropout(0.3)
    def inner(self, x):
        return x + self.drop(self.b(self.drop(torch.tanh(self.a(x)))))
""",
    "functions that draw": """
class Part(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))
        self.rest = nn.Sequential(nn.Linear(8, 8), nn.Tanh())
    def inner(self, x):
        for layer in self.layers:
            x = torch.tanh(F.dropout(layer(x), 0.3))
        return self.rest(x)
""",
    "a weight of another stage": """
class Part(nn.Module):
    shared = nn.Linear(8, 8)
    def __init__(self):
        super().__init__()
        self.own, self.tied, self.drop = nn.Linear(8, 8), nn.Linear(8, 8), nn.Dropout(0.3)
        self.tied.weight = Part.shared.weight
    def inner(self, x):
        return torch.tanh(self.drop(self.tied(self.own(x)))).exp()
""",
}


@pytest.mark.parametrize("name", CHECKPOINTED)
@pytest.mark.parametrize("plan", ["--plan 3", "--plan 1-2"])
def test_boundaries_next_to_checkpointing(name: str, plan: str, job: Path) -> None:
    """What is run again in one go stays in one stage, whose backward has what its forward had."""
    opened = "\n    def forward(self, x):\n        return checkpoint(self.inner, x, use_reentrant=False)\n"
    job.write_text(JOB.replace("class Model(", f"{CHECKPOINTED[name].rstrip()}{opened}\nclass Model("))
    assert EXACT in output_of(job, plan, "Part", "Part", "Part")


def test_on_ranks(job: Path) -> None:
    output = ranks.command(2, *words_of(job, "--plan 2", *ALL))
    assert output.startswith("2 ranks\n")
    assert EXACT in output


Mutation = Callable[[pytest.MonkeyPatch], None]


def calls_are_not_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    class Forgetful(dict[str, int]):
        def get(self, *_: Any) -> Any:
            return 0

    enter = randomness._Seeding.__enter__

    def enter_and_forget(self: Any) -> None:
        enter(self)
        randomness._calls = Forgetful()

    monkeypatch.setattr(randomness._Seeding, "__enter__", enter_and_forget)


def seeds_from(
    monkeypatch: pytest.MonkeyPatch, what: Callable[[stage.Stage, Any, int, Any], tuple[object, ...]]
) -> None:
    """Let stages seed by what(stage, seed of the run, microbatch, name)."""
    running: list[stage.Stage] = []
    seed_for, run = stage.seed_for, stage.Stage._run

    def noted(self: stage.Stage, *args: Any, **kwargs: Any) -> Any:
        running[:] = [self]
        return run(self, *args, **kwargs)

    monkeypatch.setattr(stage.Stage, "_run", noted)
    monkeypatch.setattr(stage, "seed_for", lambda *parts: seed_for(*what(running[0], *parts)))


def by_stage(monkeypatch: pytest.MonkeyPatch) -> None:
    seeds_from(monkeypatch, lambda stage, *parts: (*parts, stage.index))


def without_microbatch(monkeypatch: pytest.MonkeyPatch) -> None:
    seeds_from(monkeypatch, lambda stage, seed, microbatch, name: (seed, name))


def by_time(monkeypatch: pytest.MonkeyPatch) -> None:
    times: list[int] = []
    seeds_from(monkeypatch, lambda stage, *parts: (*parts, times.append(0) or len(times)))


@pytest.mark.parametrize(
    ("mutation", "plan", "kinds", "said"),
    [
        (calls_are_not_counted, "--plan 2", ("Block", "Block"), "two draws are the same random numbers: bernoulli_"),
        (without_microbatch, "--plan 2", ("Block",), "two draws are the same random numbers"),
        (without_microbatch, "--plan 2", ("LayerDrop",), "two draws are the same random numbers"),
        (by_stage, "--plan 2", ("Block",), "stages 0 and 1 draw different random numbers where the forward"),
        (by_time, "--plan 1 --recompute", ("Block",), "when it runs the forward of microbatch 0 of the run again"),
    ],
)
def test_a_wrong_rule_is_found(
    mutation: Mutation, plan: str, kinds: tuple[str, ...], said: str, job: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mutation(monkeypatch)
    with pytest.raises(PipedreamError, match=r"random numbers are wrong") as caught:
        output_of(job, plan, *kinds)
    assert said in str(caught.value)


def test_a_mask_that_depends_on_the_stage(job: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is wrong by no draw alone: another plan would draw another mask."""
    by_stage(monkeypatch)
    job.write_text(JOB.replace("torch.randn(len(x), 1, 8)", "0"))
    with pytest.raises(PipedreamError, match="random numbers depend on the plan: in microbatch 0 of the run"):
        output_of(job, "--plan 2", "Block", "Block")


def test_backwards_that_draw_other_masks_than_their_forwards(job: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As if the seeds of a forward were not set again in the model's own activation checkpointing."""
    monkeypatch.setattr(stage_module, "seeding_from_here", lambda: lambda: randomness.seeding(None))
    with pytest.raises(PipedreamError, match="pipelined training differs from the reference: the gradient of"):
        output_of(job, "--plan 2 --no-check-model", "Checkpointed", "Checkpointed")
    with pytest.raises(PipedreamError, match="the stages do not compute what the model computes by itself"):
        output_of(job, "--plan 2", "Checkpointed", "Checkpointed")


def test_masks_that_keep_too_many() -> None:
    def problems(*counts: int, n: int = 10_000, probability: float = 0.8) -> list[str]:
        draws = [Draw("d", bytes([i]), "cpu", kept=(ones, n, probability)) for i, ones in enumerate(counts)]
        return list(problems_of({0: draws}))

    assert problems(8000, 8100, 7900) == []
    assert problems(8300, 8300) == ["16600 of 20000 numbers are kept in , with a probability of 0.8"]
    assert problems(4, n=4, probability=0.2) == [], "too few to tell"
    assert problems(1, n=10, probability=0.0), "what cannot be"


def test_numbers_that_are_alike_from_other_states() -> None:
    draws = [Draw("d", b"0", "cpu", numbers=5), Draw("d", b"1", "cpu", numbers=5), Draw("d", b"2", "cpu")]
    (problem,) = problems_of({0: draws[:1], 3: draws[1:]})
    assert problem == "two draws are the same random numbers: d in microbatch 0 of the run, and d in microbatch 3"


def test_a_model_that_draws_something_else() -> None:
    state = torch.get_rng_state().numpy().tobytes()
    model, x = nn.Dropout(0.5), torch.ones(2, 3)
    with (
        pytest.raises(PipedreamError, match=r"draws bernoulli_ of shape \(2, 3\), where its stages draw r"),
        Replay(model, {0: [Draw("rand of shape (2, 3)", state, "cpu")]}).microbatch(0),
    ):
        model(x)
    with (
        pytest.raises(PipedreamError, match="draws nothing more, where its stages draw r"),
        Replay(model, {0: [Draw("rand of shape (2, 3)", state, "cpu")]}).microbatch(0),
    ):
        pass
    with pytest.raises(PipedreamError, match="where its stages draw nothing more"), Replay(model, {}).microbatch(1):
        model(x)


def test_recording_does_not_depend_on_the_generators(job: Path) -> None:
    """A layer that is dropped by chance is recorded, or not, in every process alike."""
    outputs = []
    for seed in (1, 2, 3):
        random.seed(seed)
        outputs.append(output_of(job, "--plan 2", "LayerDrop", "LayerDrop"))
    assert all(EXACT in output for output in outputs)
