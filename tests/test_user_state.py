"""i: state and weights that a forward changes."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn
from torch.func import functional_call
from user_programs import LOSS, SGD, Net, assert_trained_alike, minibatches, pipeline_of, plain, with_state

from pipedream_hpc import PipedreamError, Pipeline, ScheduleConfig, TrainConfig
from pipedream_hpc.model.capture import capture


class Ema(nn.Module):
    """A running scale, as vector quantisers and observers keep it."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("scale", torch.ones(8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.training:
            self.scale.mul_(0.9).add_(0.1 * x.detach().abs().mean(0))
        return x / self.scale


class Assigned(Ema):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.training:
            self.scale = 0.9 * self.scale + 0.1 * x.detach().abs().mean(0)
        return x / self.scale


class Counter(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.training:
            self.calls += 1
        return x * (1 + self.calls)


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("plan", [1, 2, 3])
@pytest.mark.parametrize("make", [Ema, Assigned, Counter])
def test_state_changes_once_per_minibatch(make: Callable[[], nn.Module], plan: int, recompute: bool) -> None:
    assert_trained_alike(with_state(make), plan, recompute=recompute)


@pytest.mark.parametrize("make", [Ema, Assigned, Counter])
def test_state_goes_with_versions_in_flight(make: Callable[[], nn.Module]) -> None:
    """1F1B with three stages, beside plain torch with the paper's delayed weights; the model's state is its own."""
    batches = minibatches()
    pipeline = Pipeline(
        with_state(make)(), loss_fn=LOSS, optimizer=SGD, example_inputs=batches[0][0], plan=3, schedule="1f1b"
    )
    pipeline.fit(batches)
    stage_of, model = pipeline.stage_of_parameters(), with_state(make)()
    history = [{name: value.detach().clone() for name, value in model.named_parameters()}]
    for number, (inputs, target) in enumerate(batches):
        weights = {
            name: history[max(0, number - (2 - stage_of[name]))][name].clone().requires_grad_() for name in history[0]
        }
        loss = LOSS(functional_call(model, weights, (inputs,)), target)
        gradients = torch.autograd.grad(loss, list(weights.values()))
        history.append({n: history[-1][n] - 0.1 * each for n, each in zip(weights, gradients, strict=True)})
    found = pipeline.state_dict()
    for name, value in {**dict(model.named_buffers()), **history[-1]}.items():
        torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("make", [Ema, Assigned, Counter])
def test_state_of_its_own_is_refused_in_replicas(make: Callable[[], nn.Module]) -> None:
    with pytest.raises(PipedreamError, match=r"module '1' changes its own state .* 2 replicas of stage 0"):
        Pipeline(with_state(make)(), loss_fn=LOSS, optimizer=SGD, example_inputs=minibatches()[0][0], plan="2-1")


class FunctionalNorm(nn.Module):
    """Keeps the buffers of a normalization itself."""

    def __init__(self, norm: Callable[..., torch.Tensor]) -> None:
        super().__init__()
        self.norm = norm
        self.register_buffer("mean", torch.zeros(8))
        self.register_buffer("var", torch.ones(8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        series = x.unsqueeze(2) * torch.tensor([1.0, 2.0])
        return self.norm(series, self.mean, self.var, None, None, self.training).mean(2) + self.mean


class WholeNorm(Net):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(16))
        self.register_buffer("var", torch.ones(16))

    def forward(self, x: torch.Tensor) -> Any:
        h = nn.functional.batch_norm(self.a(x), self.mean, self.var, training=self.training)
        return self.c(self.b(h).tanh())


NORMS = [partial(FunctionalNorm, nn.functional.batch_norm), partial(FunctionalNorm, nn.functional.instance_norm)]


@pytest.mark.parametrize("given_as_function", [False, True])
@pytest.mark.parametrize("make", NORMS)
def test_statistics_of_functions_change_once_per_minibatch(
    make: Callable[[], nn.Module], given_as_function: bool
) -> None:
    build, batches = with_state(make), minibatches()
    pipeline = pipeline_of(build if given_as_function else build(), 3, batches, recompute=True)
    pipeline.fit(batches)
    expected, trained = plain(build(), batches), pipeline.state_dict()
    assert {name for name, value in expected.items() if not torch.equal(trained[name], value)} == set()


@pytest.mark.parametrize("make", NORMS)
def test_statistics_of_functions_are_refused_in_replicas(make: Callable[[], nn.Module]) -> None:
    with pytest.raises(PipedreamError, match=r"module '1' changes its own state .* 2 replicas of stage 0"):
        pipeline_of(with_state(make)(), "2-1", minibatches())


def test_a_forward_that_writes_its_buffers_by_a_function_is_not_cut() -> None:
    assert_trained_alike(WholeNorm, 1)
    with pytest.raises(PipedreamError, match="cannot be cut, because its forward writes buffer 'mean'"):
        pipeline_of(WholeNorm(), 2, minibatches())


class Held(nn.Module):
    """Keeps what it changes in an object of another kind; `how` says in which."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.layer = how, nn.Linear(8, 8)
        self.seen: list[int] = []
        self.box = Box()
        self.kept: dict[str, Any] = {"calls": 0, "mean": torch.zeros(8)}
        self.mean = torch.zeros(8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.training and self.how == "list":
            self.seen.append(len(self.seen))
        elif self.training and self.how == "object":
            self.box.calls += 1
        elif self.training and self.how == "dict":
            self.kept["calls"] += 1
        elif self.training and self.how == "tensor in a dict":
            self.kept["mean"].mul_(0.9).add_(x.detach().mean(0), alpha=0.1)
        elif self.training:
            self.mean.mul_(0.9).add_(x.detach().mean(0), alpha=0.1)
        calls = len(self.seen) + self.box.calls + self.kept["calls"]
        return self.layer(x) * (1 + 0.1 * calls) + self.kept["mean"] * x + self.mean * x

    def state(self) -> tuple[Any, ...]:
        return self.seen[:], self.box.calls, self.kept["calls"], self.kept["mean"].tolist(), self.mean.tolist()


class Box:
    def __init__(self) -> None:
        self.calls = 0


HOLDERS = ["list", "object", "dict", "tensor in a dict", "tensor"]


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("plan", [1, 2, 3])
@pytest.mark.parametrize("how", HOLDERS)
def test_what_objects_hold_changes_once_per_minibatch(how: str, plan: int, recompute: bool) -> None:
    made: list[nn.Sequential] = []

    def build() -> nn.Module:
        made.append(with_state(partial(Held, how))())  # type: ignore[arg-type]
        return made[-1]

    assert_trained_alike(build, plan, recompute=recompute)
    trained, expected = (model[1].state() for model in made)  # type: ignore[operator]
    assert trained == expected


@pytest.mark.parametrize("how", HOLDERS)
def test_making_a_pipeline_leaves_what_objects_hold(how: str) -> None:
    model = with_state(partial(Held, how))()
    before = model[1].state()  # type: ignore[index,operator]
    pipeline_of(model, 2, minibatches())
    assert model[1].state() == before  # type: ignore[index,operator]


@pytest.mark.parametrize("how", HOLDERS)
def test_what_objects_hold_is_refused_in_replicas(how: str) -> None:
    with pytest.raises(PipedreamError, match=r"module '1' changes its own state .* 2 replicas of stage 0"):
        pipeline_of(with_state(partial(Held, how))(), "2-1", minibatches())


def test_a_forward_may_collect_tensors_in_a_list() -> None:
    class Collecting(Net):
        def __init__(self) -> None:
            super().__init__()
            self.hidden: list[torch.Tensor] = []

        def forward(self, x: torch.Tensor) -> Any:
            self.hidden.clear()
            self.hidden.append(self.a(x))
            self.hidden.append(self.b(self.hidden[0]).tanh())
            return self.c(self.hidden[1] + self.hidden[0])

    assert_trained_alike(Collecting, 3)


class Clamped(nn.Module):
    """Clamps its weights, as WGAN does; `how` is the way in which they are written."""

    def __init__(self, how: str = "in place") -> None:
        super().__init__()
        self.how, self.layer = how, nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight = self.layer.weight
        if self.training and self.how == "in place":
            with torch.no_grad():
                weight.clamp_(-0.1, 0.1)
        elif self.training and self.how == "data":
            weight.data[:4].clamp_(-0.1, 0.1)
        elif self.training:
            weight.data = weight.data.clamp(-0.1, 0.1)
        return self.layer(x)


class MomentumEncoder(nn.Module):
    """A frozen copy follows the trained layer."""

    def __init__(self) -> None:
        super().__init__()
        self.trained, self.frozen = nn.Linear(8, 8), nn.Linear(8, 8).requires_grad_(False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.training:
            with torch.no_grad():
                for followed, follower in zip(self.trained.parameters(), self.frozen.parameters(), strict=True):
                    follower.mul_(0.9).add_(followed, alpha=0.1)
        return self.trained(x) + self.frozen(x)


def hooked() -> nn.Module:
    """A layer whose weight is renormalized by a hook before each forward."""

    def renormalize(layer: nn.Module, arguments: Any) -> None:
        layer.weight.data.copy_(torch.renorm(layer.weight.data, 2, 0, 0.3))  # type: ignore[operator,union-attr]

    layer = nn.Linear(8, 8)
    layer.register_forward_pre_hook(renormalize)
    return layer


WRITERS = [*(partial(Clamped, how) for how in ("in place", "data", "assigned")), MomentumEncoder, hooked]


@pytest.mark.parametrize("plan", [1, 2, 3])
@pytest.mark.parametrize("make", WRITERS)
def test_a_forward_may_write_its_weights(make: Callable[[], nn.Module], plan: int) -> None:
    assert_trained_alike(with_state(make), plan)


@pytest.mark.parametrize("make", [*WRITERS, Ema])
def test_making_a_pipeline_leaves_weights_as_they_were(make: Callable[[], nn.Module]) -> None:
    model = with_state(make)()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    pipeline_of(model, 2, minibatches())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_capture_with_values_leaves_weights_as_they_were() -> None:
    class Reading(nn.Module):
        """Reads values, so that the model is recorded with values."""

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x if float(x.sum()) else x + 1

    model = with_state(Clamped)()
    model.insert(2, Reading())  # type: ignore[operator]
    before = model[1].layer.weight.clone()  # type: ignore[index]
    capture(model, minibatches()[0][0], leaf_modules=[Reading])
    assert torch.equal(model[1].layer.weight, before)  # type: ignore[index]


@pytest.mark.parametrize(
    "options",
    [
        {"plan": 3, "schedule": "1f1b"},
        {"plan": 2, "schedule": ScheduleConfig("1f1b-flush", 2)},
        {"plan": 2, "schedule": ScheduleConfig("1f1b-flush", 1), "train_config": TrainConfig(recompute=True)},
        {"plan": "2-1", "schedule": "1f1b"},
    ],
)
@pytest.mark.parametrize("make", WRITERS)
def test_written_weights_need_one_forward_per_step_on_the_newest(
    make: Callable[[], nn.Module], options: dict[str, Any]
) -> None:
    with pytest.raises(PipedreamError, match=r"writes weight '1\..*', but in stage [01] forwards run more than once"):
        Pipeline(with_state(make)(), loss_fn=LOSS, optimizer=SGD, example_inputs=minibatches()[0][0], **options)


def test_a_forward_that_writes_weights_of_its_own_is_not_cut() -> None:
    class Outermost(Net):
        def forward(self, x: torch.Tensor) -> Any:
            self.b.weight.data.clamp_(-0.1, 0.1)
            return super().forward(x)

    assert_trained_alike(Outermost, 1)
    with pytest.raises(PipedreamError, match=r"cannot be cut, because its forward writes weight 'b\.weight'"):
        pipeline_of(Outermost(), 2, minibatches())


class Recurrent(Net):
    """Keeps what it computed for one minibatch for the next, where no module has it."""

    def __init__(self, where: str) -> None:
        super().__init__()
        self.where, self.kept = where, dict[str, torch.Tensor]()

    def forward(self, x: torch.Tensor) -> Any:
        h = self.a(x)
        before = self.kept.get("h")
        if self.where == "first":
            h = h if before is None else h + before
            self.kept["h"] = h.detach()
        h = self.b(h).tanh() + (0 if before is None or self.where == "first" else before)
        if self.where == "last":
            self.kept["h"] = h.detach()
        return self.c(h)


@pytest.mark.parametrize("where", ["first", "last"])
def test_what_a_forward_keeps_for_the_next_minibatch_is_right_or_refused(where: str) -> None:
    assert_trained_alike(partial(Recurrent, where), 1)
    batches = minibatches()
    for plan in (2, 3):
        with pytest.raises(PipedreamError, match=r"(kept of|from) an earlier minibatch"):
            pipeline_of(Recurrent(where), plan, batches).fit(batches)
