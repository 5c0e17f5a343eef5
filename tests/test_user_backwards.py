"""c: backwards of the user's own, and parts of a forward that run again in backward."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from user_programs import (
    LOSS,
    SGD,
    Checkpointed,
    Net,
    ReversedInAModule,
    ReversedInTheForward,
    assert_trained_alike,
    minibatches,
    pipeline_of,
    plain,
)

from pipedream_hpc import PipedreamError, Pipeline
from pipedream_hpc.model.capture import capture


class Reversible(torch.autograd.Function):
    """Keeps nothing for the backward, but what two modules need to compute their inputs from their outputs."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, f: nn.Module, g: nn.Module) -> torch.Tensor:
        one, other = x.chunk(2, -1)
        one = one + f(other)
        ctx.modules, ctx.outputs = (f, g), (one.detach(), (other + g(one)).detach())
        return torch.cat(ctx.outputs, -1)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        (f, g), (one, other) = ctx.modules, ctx.outputs
        to_one, to_other = gradient.chunk(2, -1)
        with torch.enable_grad():
            one.requires_grad_()
            moved = g(one)
            moved.backward(to_other)
        other, to_one = other - moved.detach(), to_one + one.grad
        with torch.enable_grad():
            other.requires_grad_()
            f(other).backward(to_one)
        return torch.cat([to_one, to_other + other.grad], -1), None, None


class ReversibleLayers(Net):
    def __init__(self) -> None:
        super().__init__()
        self.f = nn.ModuleList([nn.Linear(8, 8) for _ in range(4)])

    def forward(self, x: torch.Tensor) -> Any:
        h = self.residual(self.a(x), self.f[0], self.f[1])
        return self.c(self.residual(self.b(h), self.f[2], self.f[3]))

    def residual(self, x: torch.Tensor, f: nn.Module, g: nn.Module) -> torch.Tensor:
        return Reversible.apply(x, f, g)  # type: ignore[no-any-return]


class KeptLayers(ReversibleLayers):
    """The same layers; autograd keeps their inputs."""

    def residual(self, x: torch.Tensor, f: nn.Module, g: nn.Module) -> torch.Tensor:
        one, other = x.chunk(2, -1)
        one = one + f(other)
        return torch.cat([one, other + g(one)], -1)


@pytest.mark.parametrize("plan", [1, 2, 3])
@pytest.mark.parametrize("build", [ReversedInAModule, ReversedInTheForward, Checkpointed, ReversibleLayers])
def test_a_custom_backward_runs(build: Callable[[], nn.Module], plan: int) -> None:
    assert_trained_alike(build, plan)


def test_modules_in_a_backward_run_on_the_weights_of_their_forward() -> None:
    """1F1B with three stages, where newer weights are there before a backward."""
    batches, trained = minibatches(8), []
    for build in (ReversibleLayers, KeptLayers):
        pipeline = Pipeline(
            build(),
            loss_fn=LOSS,
            optimizer=SGD,
            example_inputs=batches[0][0],
            plan=3,
            cut_points=["b", "c"],
            schedule="1f1b",
        )
        pipeline.fit(batches)
        trained.append(pipeline.state_dict())
    torch.testing.assert_close(*trained, rtol=1e-5, atol=1e-6)


class CheckpointedModules(Net):
    """Checkpoints modules, and calls no function itself."""

    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.reentrant = reentrant

    def forward(self, x: torch.Tensor) -> Any:
        h = self.a(x)
        for _ in range(2):
            h = checkpoint(self.b, h, use_reentrant=self.reentrant)
        return self.c(h)


@pytest.mark.parametrize("plan", [1, 2, 3, 4])
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_modules_may_be_those_of_other_stages(reentrant: bool, plan: int) -> None:
    batches = minibatches()
    pipeline = pipeline_of(CheckpointedModules(reentrant), plan, batches)
    pipeline.fit(batches)
    expected = plain(CheckpointedModules(reentrant), batches)
    torch.testing.assert_close(pipeline.state_dict(), expected, rtol=2e-6, atol=2e-7)


class Parts(Net):
    """Two parts, each of two modules and functions that draw; `reentrant` is None where nothing is checkpointed."""

    def __init__(self, reentrant: bool | None, p: float = 0.5) -> None:
        super().__init__()
        self.reentrant, self.p = reentrant, p
        self.norm, self.drop = nn.BatchNorm1d(16), nn.Dropout(p)

    def first(self, h: torch.Tensor) -> torch.Tensor:
        return self.drop(self.b(h).tanh()) * nn.functional.linear(h, self.b.weight)

    def second(self, h: torch.Tensor) -> torch.Tensor:
        return nn.functional.dropout(self.norm(h).relu(), self.p, self.training) + self.b(h)

    def again(self, part: Callable[..., Any], h: torch.Tensor) -> torch.Tensor:
        if self.reentrant is None:
            return part(h)  # type: ignore[no-any-return]
        return checkpoint(part, h, use_reentrant=self.reentrant)  # type: ignore[no-any-return]

    def forward(self, x: torch.Tensor) -> Any:
        h = self.again(self.second, self.again(self.first, self.a(x)))
        return self.c(h.relu() + self.b(h))


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("plan", [1, 2, 3, 4])
@pytest.mark.parametrize("reentrant", [False, True])
def test_what_is_checkpointed_runs_again_as_it_ran(reentrant: bool, plan: int, recompute: bool) -> None:
    """BatchNorm counts a minibatch twice, as in a plain loop. (Reentrant backwards add gradients in another order.)"""
    batches = minibatches()
    pipeline = pipeline_of(Parts(reentrant, 0.0), plan, batches, recompute=recompute)
    pipeline.fit(batches)
    expected, found = plain(Parts(reentrant, 0.0), batches), pipeline.state_dict()
    for name, each in expected.items():
        torch.testing.assert_close(found[name], each, rtol=2e-6 if reentrant else 0, atol=2e-7 if reentrant else 0)


@pytest.mark.parametrize("schedule", ["1f1b-flush", "1f1b", "zb-h1"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_what_is_checkpointed_runs_again_with_its_weights_and_draws(reentrant: bool, schedule: str) -> None:
    """The same stages train the same without checkpoints. The weight that all parts use travels between them."""
    batches, trained = minibatches(8), []
    for checkpoints in (False, True):
        model = Parts(reentrant)
        pipeline = Pipeline(model, loss_fn=LOSS, optimizer=SGD, example_inputs=batches[0][0], plan=3, schedule=schedule)
        model.reentrant = reentrant if checkpoints else None
        losses = [step.loss for step in pipeline.train(batches)]
        trained.append((losses, {name: each for name, each in pipeline.state_dict().items() if "norm.r" not in name}))
    (expected_losses, expected), (losses, found) = trained
    assert losses == pytest.approx(expected_losses, rel=1e-6)
    del expected["norm.num_batches_tracked"]
    for name, weight in expected.items():
        torch.testing.assert_close(found[name], weight, rtol=1e-5, atol=1e-6)


def test_no_boundary_lies_in_what_is_checkpointed() -> None:
    inside = {call.name for layer in capture(Parts(False), torch.zeros(8, 6)).layers for call in layer.calls}
    layers = [{call.name for call in each.calls} for each in capture(Parts(False), torch.zeros(8, 6)).layers]
    assert {"drop", "linear"} <= inside
    assert any({"drop", "tanh", "linear"} <= each for each in layers)
    assert any({"norm", "relu", "dropout"} <= each for each in layers)


class Forces(nn.Module):
    """Returns energies and their gradient, which its own forward takes; `where` says of how much of it."""

    def __init__(self, where: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.where = where
        self.a, self.b = nn.Linear(6, 16), nn.Linear(16, 16)
        self.c, self.d = nn.Linear(16, 16), nn.Linear(16, 3)

    def forward(self, x: torch.Tensor) -> Any:
        with torch.enable_grad():
            if self.where == "all":
                x = x.detach().requires_grad_()
            h = self.b(self.a(x).tanh())
            if self.where == "end":
                h = h * 1
            elif self.where == "detached":
                h = h.detach().requires_grad_()
            out = self.d(self.c(h).tanh())
            of = {"all": x, "begin": h}.get(self.where, h)
            if self.where == "backward":
                out.sum().backward(retain_graph=True)
                return out, out
            (force,) = torch.autograd.grad(out.sum(), of, create_graph=self.training)
        return out, force


def force_loss(output: Any, target: torch.Tensor) -> torch.Tensor:
    return LOSS(output[0], target) + output[1].square().mean()


@pytest.mark.parametrize("where", ["end", "detached"])
@pytest.mark.parametrize("plan", [1, 2, 3])
def test_a_forward_may_take_gradients_of_what_is_in_one_stage(where: str, plan: int) -> None:
    batches = minibatches()
    pipeline = assert_trained_alike(partial(Forces, where), plan, batches, force_loss)
    model = Forces(where)
    model.load_state_dict(pipeline.state_dict())
    model.eval()
    expected = sum(float(force_loss(model(x), target)) for x, target in batches) / len(batches)
    assert pipeline.evaluate(batches)["loss"] == pytest.approx(expected, rel=1e-5)
    stages = pipeline.stage_of_parameters()
    assert stages["c.weight"] == stages["d.weight"] == plan - 1


@pytest.mark.parametrize(
    ("where", "words"),
    [
        ("all", r"its forward takes gradients of all of it \(torch.autograd.grad\)"),
        ("backward", r"its forward calls backward\(\)"),
    ],
)
def test_a_forward_that_takes_gradients_across_stages_is_not_cut(where: str, words: str) -> None:
    with pytest.raises(PipedreamError, match=f"the model cannot be cut, because {words}"):
        pipeline_of(Forces(where), 2, minibatches(), force_loss)
    if where == "all":
        assert_trained_alike(partial(Forces, where), 1, loss_fn=force_loss)
