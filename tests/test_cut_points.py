"""Cut points: stages begin with the modules that the user names, and train what a plain loop trains."""

from __future__ import annotations

import itertools
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import ranks
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from typer.testing import CliRunner

from pipedream_hpc import Job, PipedreamError, Pipeline, ScheduleConfig, TrainConfig
from pipedream_hpc.cli import app
from pipedream_hpc.cli.train import names_of
from pipedream_hpc.planning.even import even_plan
from pipedream_hpc.planning.plan import Plan
from pipedream_hpc.planning.profile import LayerProfile, Profile

LOSS = nn.CrossEntropyLoss()
SGD = partial(torch.optim.SGD, lr=0.1)


class Attention(nn.Module):
    """Reads values, so that it is kept whole."""

    def __init__(self) -> None:
        super().__init__()
        self.key, self.value = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        scores = self.key(x)
        return self.value(scores if scores.sum() > 0 else -scores)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.attention, self.up = nn.LayerNorm(8), Attention(), nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + torch.relu(self.up(self.attention(self.norm(x))))


class Scale(nn.Module):
    """Depends on the model's arguments alone."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.mean()


class Tall(nn.Module):
    """Its weights have another size in each layer, so a cut by costs lies elsewhere than those that are named."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.scale, self.embed = Scale(), nn.Linear(6, 8)
        self.layers = nn.ModuleList(Block() for _ in range(4))
        self.encoder = nn.TransformerEncoderLayer(8, 2, 8, dropout=0.0, batch_first=True)
        self.unused, self.head = nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        scale = self.scale(x)
        h = self.embed(x)
        for layer in self.layers:
            h = layer(h)
        h = self.encoder(h[:, None])[:, 0]
        return self.head(h) * scale  # type: ignore[no-any-return]


class Inplace(nn.Module):
    """What is written in place has to stay in one stage: `b` begins within the layer of `a`."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, 8), nn.ReLU(inplace=True), nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.a(x)
        return self.c(h * 2 + self.b(h))  # type: ignore[no-any-return]


def minibatches(count: int = 5) -> list[Any]:
    draw = torch.Generator().manual_seed(7)
    return [(torch.randn(8, 6, generator=draw), torch.randint(0, 3, (8,), generator=draw)) for _ in range(count)]


def plain(model: nn.Module) -> dict[str, torch.Tensor]:
    optimizer = SGD(model.parameters())
    for inputs, target in minibatches():
        optimizer.zero_grad()
        LOSS(model(inputs), target).backward()
        optimizer.step()
    return model.state_dict()


def pipeline_of(model: nn.Module, plan: Any, cut_points: Any, **options: Any) -> Pipeline:
    return Pipeline(
        model,
        loss_fn=LOSS,
        optimizer=SGD,
        example_inputs=minibatches()[0][0],
        plan=plan,
        cut_points=cut_points,
        schedule=ScheduleConfig("1f1b-flush", 1),
        train_config=TrainConfig(**options),
    )


def stage_names(pipeline: Pipeline, model: nn.Module) -> list[set[str]]:
    """Return the direct children of the model, and those of its list, in every stage."""
    named: list[set[str]] = [set() for _ in pipeline.plan.stages]
    for name, stage in pipeline.stage_of_parameters().items():
        first, second, *_ = name.split(".")
        named[stage].add(f"layers.{second}" if first == "layers" else first)
    return named


@pytest.mark.parametrize(
    ("cut_points", "stages"),
    [
        (["layers.0"], [{"embed"}, {"layers.0", "layers.1", "layers.2", "layers.3", "encoder", "head"}]),
        (["layers.1", "layers.2"], [
            {"embed", "layers.0"}, {"layers.1"}, {"layers.2", "layers.3", "encoder", "head"}
        ]),
        (["layers.3", "encoder", "head"], [
            {"embed", "layers.0", "layers.1", "layers.2"}, {"layers.3"}, {"encoder"}, {"head"}
        ]),
    ],
)  # fmt: skip
def test_stages_begin_where_the_user_says_and_train_what_a_plain_loop_trains(
    cut_points: list[str], stages: list[set[str]]
) -> None:
    pipeline = pipeline_of(Tall(), len(stages), cut_points)
    assert stage_names(pipeline, Tall()) == stages
    pipeline.fit(minibatches())
    trained, expected = pipeline.state_dict(), plain(Tall())
    assert trained.keys() == expected.keys()
    assert [name for name, value in expected.items() if not torch.equal(trained[name], value)] == []


def test_a_cut_within_a_block() -> None:
    pipeline = pipeline_of(Tall(), 2, ("layers.2.up",))
    stage = pipeline.stage_of_parameters()
    assert [name for name in stage if name.startswith("layers.2") and stage[name] == 1] == [
        "layers.2.up.weight",
        "layers.2.up.bias",
    ]
    assert {name for name in stage if name.startswith("layers.3") and stage[name] == 0} == set()


def test_the_plan_says_the_replicas() -> None:
    pipeline = pipeline_of(Tall(), "2-1-1", ["layers.1", "head"])
    assert pipeline.plan.layout == ((0, 1), (2,), (3,))
    assert stage_names(pipeline, Tall())[2] == {"head"}


def test_a_module_that_is_called_twice_begins_with_its_first_call() -> None:
    act = nn.Tanh()
    model = nn.Sequential(nn.Linear(6, 8), act, nn.Linear(8, 8), act, nn.Linear(8, 3))
    for name in ("1", "3"):  # two names of one module
        assert pipeline_of(model, 2, [name]).plan.stages[0].layers == ("0",)


def test_without_cut_points_costs_decide() -> None:
    assert pipeline_of(Tall(), 2, ()).plan == pipeline_of(Tall(), 2, None).plan
    assert pipeline_of(Tall(), 2, ()).plan != pipeline_of(Tall(), 2, ["layers.0"]).plan


@pytest.mark.parametrize(
    ("plan", "cut_points", "message"),
    [
        (2, ["layer.3"], "the model has no module 'layer.3' to cut at: near are 'layers.3', 'layers.2', 'layers.1'"),
        (2, ["xyzzy"], "the model has no module 'xyzzy' to cut at: its modules are 'scale', 'embed', 'layers', ..."),
        (2, [""], "the model has no module '' to cut at"),
        (
            2,
            ["layers.1.attention.value"],
            "no stage can begin with module 'layers.1.attention.value': module 'layers.1.attention' is kept whole, "
            "because its Python reads the values of a tensor (`return self.value(scores if scores.sum() > 0 else "
            "-scores)`): name 'layers.1.attention', or a module ",
        ),
        (
            2,
            ["encoder.linear1"],
            "module 'encoder' is kept whole, because modules of class TransformerEncoderLayer always are: name",
        ),
        (2, ["layers"], "module 'layers': it is not called by the forward in training: name a module that is, such as "
         "'layers.0'"),
        (2, ["unused"], "module 'unused': it is not called by the forward in training: name a module that is"),
        (2, ["scale"], "module 'scale': it depends on the model's arguments alone"),
        (3, ["layers.2", "layers.1"], "cut point 'layers.1' comes before 'layers.2' in the forward"),
        (3, ["layers.2", "layers.2"], "cut_points has 'layers.2' twice: name every module once"),
        (3, ["layers.2", "layers.2.norm"], "'layers.2' and 'layers.2.norm' both begin with layer 'layers.2.norm'"),
        (2, ["embed"], "cut point 'embed' begins with the first layer of the model"),
        (3, ["layers.2"], "the plan's 3 stages need 2 cut points, for the first begins with the model, but cut_points "
         "has 1: give a plan of 2 stages, or 2 cut points"),
        ("2-1", ["layers.1", "layers.2"], "the plan's 2 stages need 1 cut points, for the first begins"),
        (2, "layers.2", "cut_points should be a list of names of modules, not 'layers.2': give the names"),
        (2, [""], "the model has no module '' to cut at: its modules are 'scale', 'embed', 'layers', ..."),
        (2, [2], "cut_points should be a list of names of modules, not [2]"),
        ("FILE", ["layers.2"], "the plan says itself where stages begin: leave cut_points out, or give a number of "),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused_in_one_sentence(plan: Any, cut_points: Any, message: str) -> None:
    with pytest.raises(PipedreamError) as caught:
        pipeline_of(Tall(), written() if plan == "FILE" else plan, cut_points)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def written() -> Plan:
    layers = tuple(LayerProfile(f"l{number}", "Linear", 1.0, 1.0, 1, 1) for number in range(2))
    return even_plan(Profile("m", "counted", 1, layers, tuple(itertools.pairwise(range(2)))), (1, 1))


def test_a_module_within_a_layer_is_refused() -> None:
    with pytest.raises(PipedreamError, match="no stage can begin with module 'b': it begins within layer 'a'"):
        pipeline_of(Inplace(), 2, ["b"])


class Checkpointed(Tall):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.embed(x)
        for layer in self.layers:
            h = checkpoint(layer, h, use_reentrant=False)
        return self.head(h)  # type: ignore[no-any-return]


def test_a_module_that_runs_again_in_backward_is_kept_whole() -> None:
    with pytest.raises(PipedreamError, match=r"within layer 'layers\.2', which torch\.utils\.checkpoint keeps whole"):
        pipeline_of(Checkpointed(), 2, ["layers.2.up"])


def test_a_module_that_the_user_keeps_whole_is_named() -> None:
    with pytest.raises(PipedreamError, match=r"module 'layers\.1' is kept whole, because leaf_modules has its class B"):
        pipeline_of(Tall(), 2, ["layers.1.up"], leaf_modules=[Block])


def test_a_model_that_the_user_keeps_whole_cannot_be_cut() -> None:
    with pytest.raises(PipedreamError, match=r"the model cannot be cut, because leaf_modules has its class Tall$"):
        pipeline_of(Tall(), 2, None, leaf_modules=[Tall])


def test_a_model_that_cannot_be_cut() -> None:
    model = Attention()
    model.key, model.value = nn.Linear(6, 8), nn.Linear(8, 3)
    with pytest.raises(PipedreamError, match="the model itself is kept whole, because its Python reads the values"):
        pipeline_of(model, 2, ["value"])


def test_a_job_names_them_and_an_option_replaces_them() -> None:
    job = Job(
        model=Tall(),
        loss_fn=LOSS,
        optimizer=SGD,
        train_loader=minibatches(),
        example_inputs=minibatches()[0][0],
        cut_points=["layers.2"],
    )
    assert "layers.1.up" in Pipeline.from_job(job, plan=2).plan.stages[0].layers
    assert Pipeline.from_job(job, plan=2, cut_points=["layers.1"]).plan.stages[0].layers[-1] == "add"
    assert (
        Pipeline.from_job(job, plan=2, cut_points=names_of("")).plan
        == Pipeline.from_job(replace(job, cut_points=()), plan=2).plan
    )


@pytest.mark.parametrize("n_ranks", [1, 3])
def test_verify_on_the_command_line(n_ranks: int) -> None:
    words = ["verify", str(ranks.PROGRAMS / "small_job.py"), "--plan", "3", "--cut-points", "1, 2", "--tolerance", "0"]
    if n_ranks == 1:
        result = CliRunner().invoke(app, words, catch_exceptions=False)
        assert result.exit_code == 0, result.output
        assert "every bit of the pipelined training is that of the reference" in result.output
        return
    output = ranks.command(n_ranks, *words)
    assert output.startswith("3 ranks\n")
    assert "every bit of the pipelined training is that of the reference" in output


def test_train_on_the_command_line(tmp_path: Any) -> None:
    words = ["train", str(ranks.PROGRAMS / "small_job.py"), "--plan", "2", "--out", str(tmp_path)]
    result = CliRunner().invoke(app, [*words, "--cut-points", "3"], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    with pytest.raises(PipedreamError, match="the model has no module '7' to cut at"):
        CliRunner().invoke(app, [*words, "--cut-points", "7"], catch_exceptions=False)
