"""`pipedream verify`: exact if training is right; otherwise it names the first tensor that differs."""

from __future__ import annotations

from pathlib import Path

import pytest
import ranks
import torch
from typer.testing import CliRunner

from pipedream_hpc.cli import app
from pipedream_hpc.errors import PipedreamError
from pipedream_hpc.verification.comparison import Difference, compare
from pipedream_hpc.verification.reference import Event

JOB = """
from functools import partial
import torch
from torch import nn
from pipedream_hpc import Job, TrainConfig

def job(args):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 16), nn.Dropout(0.2), nn.ReLU(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 3))
    data = [(torch.randn(4, 6), torch.randint(0, 3, (4,))) for _ in range(6)]
    if "wrong" in args:
        from pipedream_hpc.runtime.weights import stash
        stash.WeightStash.update = spoiled(stash.WeightStash.update)
    return Job(model, nn.CrossEntropyLoss(), partial(torch.optim.Adam, lr=0.01), data, data[0][0],
               train_config=TrainConfig(
                   lr_scheduler=partial(torch.optim.lr_scheduler.ExponentialLR, gamma=0.9), clip_grad_norm=0.5))

def spoiled(update):
    def wrong(self, gradients):
        if len(self.trained_names) and "3.weight" in self.trained_names and self.version == 2:
            gradients[self.trained_names.index("3.weight")][0, 0] += 0.25
        return update(self, gradients)
    return wrong
"""


@pytest.fixture
def job(tmp_path: Path) -> Path:
    path = tmp_path / "own.py"
    path.write_text(JOB)
    return path


EXACT = "exact: every bit of the pipelined training is that of the reference"


@pytest.mark.parametrize(
    ("launched", "words"),
    [(3, ["--plan", "2-1"]), (2, ["--plan", "2", "--schedule", "gpipe", "--n-microbatches", "2"])],
)
def test_exact_on_ranks(job: Path, launched: int, words: list[str]) -> None:
    output = ranks.command(launched, "verify", job, *words, "--minibatches", "5", "--tolerance", "0")
    assert output.startswith(f"{launched} ranks\n")
    assert EXACT in output


@pytest.mark.parametrize(
    "words",
    [
        ["--plan", "2-1"],
        ["--plan", "3", "--schedule", "vertical-sync"],
        ["--plan", "2", "--schedule", "2bw", "--n-microbatches", "3"],
        ["--plan", "2", "--precision", "bf16"],
        ["--plan", "3", "--schedule", "gpipe-split", "--n-microbatches", "3"],
        ["--plan", "2-1", "--schedule", "zb-h2", "--n-microbatches", "4"],
        ["--plan", "2", "--schedule", "zb-h1", "--n-microbatches", "4", "--gradient-accumulation-steps", "2"],
    ],
)
def test_exact_in_one_process(job: Path, words: list[str]) -> None:
    arguments = ["verify", str(job), *words, "--minibatches", "5", "--tolerance", "0"]
    result = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    assert EXACT in result.output


def test_weights_that_are_not_trained(job: Path) -> None:
    source = job.read_text()
    assert source.count("    return Job(") == 1
    job.write_text(source.replace("    return Job(", "    model[3].weight.requires_grad_(False)\n    return Job("))
    test_exact_in_one_process(job, ["--plan", "3"])


def test_a_wrong_update_is_found_by_name(job: Path) -> None:
    finished = ranks.pipedream(0, "verify", job, "--plan", "2", "--", "wrong")
    assert finished.status == 2, finished.output
    text = " ".join(finished.output.split())
    assert "pipelined training differs from the reference: the weight '3.weight' (stage" in text
    assert "after epoch 0, round 2: 1 of 256 numbers differ" in text


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--schedule", "naive"], "the naive schedule has no reference"),
        (["--precision", "fp16", "--schedule", "gpipe", "--n-microbatches", "2"], "fp16 scales losses"),
    ],
)
def test_what_cannot_be_verified(job: Path, words: list[str], said: str) -> None:
    with pytest.raises(PipedreamError, match=said):
        CliRunner().invoke(app, ["verify", str(job), "--plan", "2", *words], catch_exceptions=False)


def test_differences_come_in_the_order_of_training() -> None:
    def events(first: float, second: float) -> list[Event]:
        return [
            Event("loss", 1, 0, 5, {"loss": torch.tensor(1.0)}),
            Event("gradient", 0, 0, 1, {"a": torch.tensor([first, 2.0]), "b": torch.tensor([4.0])}),
            Event("weight", 0, 0, 1, {"a": torch.tensor([second, 2.0])}),
        ]

    same, other = compare(events(1, 1), events(1, 1)), compare(events(1, 1), events(1.5, 1.25))
    assert (same.exact, same.compared) == (True, {"loss": 1, "gradient": 2, "weight": 1})
    assert other.differences == (
        Difference("gradient", "the gradient of 'a' (stage 0) in epoch 0, round 1", 0.5, 0.25, 1, 2),
        Difference("weight", "the weight 'a' (stage 0) after epoch 0, round 1", 0.25, 0.125, 1, 2),
    )
    assert other.within(0.25)
    assert not other.within(0.2)
    missing = compare([], events(1, 1), n_microbatches=2)
    assert [each.what for each in missing.differences] == [
        "the loss of epoch 0, minibatch 2, microbatch 1",
        "the gradient of 'a' (stage 0) in epoch 0, round 1",
        "the gradient of 'b' (stage 0) in epoch 0, round 1",
        "the weight 'a' (stage 0) after epoch 0, round 1",
    ]
