"""The user's program is the truth: stages train what a plain torch loop over the same module trains, bit for bit.

Each case is a model whose forward does more than it shows: contexts, flags, hooks, state, objects. The reference is an
ordinary loop; it shares nothing with the pipeline.
"""

from __future__ import annotations

import logging
import threading
import types
from collections import namedtuple
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import ranks
import torch
from torch import nn
from torch.func import functional_call
from torch.nn.modules.module import register_module_full_backward_hook, register_module_full_backward_pre_hook
from torch.nn.utils import parametrizations, prune
from torch.utils.checkpoint import checkpoint

from pipedream_hpc import PipedreamError, Pipeline, ScheduleConfig, TrainConfig
from pipedream_hpc.model.arguments import Arguments
from pipedream_hpc.model.capture import capture
from pipedream_hpc.model.partition import Partition
from pipedream_hpc.runtime.launch.same_program import check_same_program

LOSS = nn.CrossEntropyLoss()
SGD = partial(torch.optim.SGD, lr=0.1)


def minibatches(count: int = 5, samples: int = 8, shape: tuple[int, ...] = (6,)) -> list[Any]:
    draw = torch.Generator().manual_seed(7)
    return [
        (torch.randn(samples, *shape, generator=draw), torch.randint(0, 3, (samples,), generator=draw))
        for _ in range(count)
    ]


def plain(model: nn.Module, batches: list[Any], loss_fn: Any = LOSS, optimizer: Any = SGD) -> dict[str, torch.Tensor]:
    """Train in an ordinary loop; return the state dict."""
    steps = optimizer([each for each in model.parameters() if each.requires_grad])
    model.train()
    for inputs, target in batches:
        steps.zero_grad()
        output = model(*inputs) if type(inputs) is tuple else model(inputs)
        loss_fn(output, target).backward()
        steps.step()
    return dict(model.state_dict())


def pipeline_of(model: nn.Module, plan: Any, batches: list[Any], loss_fn: Any = LOSS, **options: Any) -> Pipeline:
    return Pipeline(
        model,
        loss_fn=loss_fn,
        optimizer=options.pop("optimizer", SGD),
        example_inputs=batches[0][0],
        plan=plan,
        schedule=ScheduleConfig("1f1b-flush", 1),
        train_config=TrainConfig(**options),
    )


def assert_trained_alike(
    build: Callable[[], nn.Module], plan: Any, batches: list[Any] | None = None, loss_fn: Any = LOSS, **options: Any
) -> Pipeline:
    """Train in stages and in a plain loop; assert that weights and buffers have the same bits."""
    batches = batches or minibatches()
    pipeline = pipeline_of(build(), plan, batches, loss_fn, **options)
    pipeline.fit(batches)
    expected = plain(build(), batches, loss_fn, options.get("optimizer", SGD))
    trained = pipeline.state_dict()
    assert trained.keys() == expected.keys()
    different = {name: float((trained[name].double() - value.double()).abs().max()) for name, value in expected.items()}
    assert {name: each for name, each in different.items() if each} == {}
    return pipeline


class Net(nn.Module):
    """Three layers; subclasses change what happens between them."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.c = nn.Linear(6, 16), nn.Linear(16, 16), nn.Linear(16, 3)

    def forward(self, x: torch.Tensor) -> Any:
        return self.c(self.b(self.a(x)).tanh())


# -- b: contexts in a forward ------------------------------------------------------------------------------------------


class NoGrad(Net):
    def forward(self, x: torch.Tensor) -> Any:
        with torch.no_grad():
            h = self.a(x).relu()
        return self.c(self.b(h).tanh())


class Decorated(Net):
    @torch.no_grad()
    def features(self, x: torch.Tensor) -> torch.Tensor:
        return self.b(self.a(x)).tanh()

    def forward(self, x: torch.Tensor) -> Any:
        return self.c(self.features(x))


class Detached(Net):
    def forward(self, x: torch.Tensor) -> Any:
        h = self.a(x)
        return self.c(self.b(h.detach()).tanh() + h)


@pytest.mark.parametrize("plan", [1, 2, 3])
@pytest.mark.parametrize("build", [NoGrad, Decorated, Detached])
def test_gradients_stop_where_the_forward_stops_them(build: Callable[[], nn.Module], plan: int) -> None:
    assert_trained_alike(build, plan)


# -- c: custom backwards -----------------------------------------------------------------------------------------------


class Reverse(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        return -0.5 * gradient


class ReverseLayer(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return Reverse.apply(x)  # type: ignore[no-any-return]


class ReversedInAModule(Net):
    def __init__(self) -> None:
        super().__init__()
        self.reverse = ReverseLayer()

    def forward(self, x: torch.Tensor) -> Any:
        return self.c(self.reverse(self.b(self.a(x)).tanh()))


class ReversedInTheForward(Net):
    def forward(self, x: torch.Tensor) -> Any:
        return self.c(Reverse.apply(self.b(self.a(x)).tanh()))


class Checkpointed(Net):
    def forward(self, x: torch.Tensor) -> Any:
        h = torch.utils.checkpoint.checkpoint(self.b, self.a(x), use_reentrant=False)
        return self.c(h.tanh())


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
        h = Reversible.apply(self.a(x), self.f[0], self.f[1])
        return self.c(Reversible.apply(self.b(h), self.f[2], self.f[3]))


@pytest.mark.parametrize("plan", [1, 2, 3])
@pytest.mark.parametrize("build", [ReversedInAModule, ReversedInTheForward, Checkpointed, ReversibleLayers])
def test_a_custom_backward_runs(build: Callable[[], nn.Module], plan: int) -> None:
    assert_trained_alike(build, plan)


# -- parts of a forward that run again in backward ---------------------------------------------------------------------


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


# -- functions whose outputs depend on values --------------------------------------------------------------------------


class Selects(nn.Module):
    """Puts out as many rows as its mask has, and a loss that only values have: the layers can be cut all the same."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList([nn.Linear(6, 6) for _ in range(4)])

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> Any:
        rows = None
        for layer in self.layers:
            x = layer(x).tanh() if rows is None else layer(x).tanh() / rows.shape[0]
            rows = x[mask] if rows is None else rows + x[: rows.shape[0]]
        lengths = torch.full((len(x),), 4)
        frames = x.view(1, -1, 6).log_softmax(-1).expand(4, -1, 6)
        return rows.sum() + nn.functional.ctc_loss(frames, torch.ones(len(x), 1).long(), lengths, lengths // 4)


def test_functions_of_values_leave_the_layers_to_be_cut() -> None:
    draw = torch.Generator().manual_seed(5)
    batches = [((x, torch.rand(8, generator=draw) > 0.4), target) for x, target in minibatches()]
    batches[0][0][1].fill_(True)  # the largest comes first, as example_inputs
    assert len({int(mask.sum()) for (_, mask), _ in batches}) > 2
    for plan in (2, 4):
        assert_trained_alike(Selects, plan, batches, lambda output, _: output)


# -- more in evaluation than in training -------------------------------------------------------------------------------


class Remembers(Net):
    """Returns in evaluation what it computed in the middle, and uses it once more."""

    def forward(self, x: torch.Tensor) -> Any:
        h = self.a(x).relu()
        memory = None if self.training else h[:, :3].detach() * 2
        out = self.c(self.b(h).tanh())
        return out if memory is None else (out + memory, memory)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(6, 16)

    def forward(self, x: torch.Tensor) -> Any:
        h = self.a(x)
        return (h, None) if self.training else (h, h[:, :3] * 2)


class RemembersInABlock(Net):
    def __init__(self) -> None:
        super().__init__()
        self.a = Block()  # type: ignore[assignment]

    def forward(self, x: torch.Tensor) -> Any:
        h, memory = self.a(x)
        out = self.c(self.b(h).tanh())
        return out if memory is None else (out + memory, memory)


def remembering_loss(output: Any, target: torch.Tensor) -> torch.Tensor:
    out, memory = output if isinstance(output, tuple) else (output, torch.zeros(()))
    return LOSS(out, target) + memory.mean()


@pytest.mark.parametrize("plan", [1, 2, 3])
@pytest.mark.parametrize("build", [Remembers, RemembersInABlock])
@pytest.mark.parametrize("whole", [(), (Block,)])
def test_more_is_passed_on_in_evaluation(build: Callable[[], nn.Module], plan: int, whole: Any) -> None:
    batches = minibatches()
    pipeline = assert_trained_alike(build, plan, batches, remembering_loss, leaf_modules=(*whole,))
    model = build()
    model.load_state_dict(pipeline.state_dict())
    model.eval()
    with torch.no_grad():
        expected = sum(float(remembering_loss(model(x), target)) for x, target in batches) / len(batches)
    assert pipeline.evaluate(batches)["loss"] == pytest.approx(expected, rel=1e-6)
    pipeline.fit(batches)


class DropPath(nn.Module):
    """Its forward calls functions between blocks in training only, which evaluation numbers otherwise."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.blocks, self.head = nn.Linear(6, 16), nn.ModuleList(map(Residual, range(4))), nn.Linear(16, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        for block in self.blocks:
            x = x + (block(x) - x) * 0.8 if self.training else block(x)
        out: torch.Tensor = self.head(x)
        return out


class Residual(nn.Module):
    def __init__(self, _: int) -> None:
        super().__init__()
        self.linear = nn.Linear(16, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.linear(x).tanh()


@pytest.mark.parametrize("cut_points", [["blocks.2"], ["blocks.1.linear", "blocks.2.linear"]])
def test_each_mode_may_number_functions_otherwise(cut_points: list[str]) -> None:
    batches = minibatches()
    pipeline = Pipeline(
        DropPath(),
        loss_fn=LOSS,
        optimizer=SGD,
        example_inputs=batches[0][0],
        plan=len(cut_points) + 1,
        schedule=ScheduleConfig("1f1b-flush", 1),
        cut_points=cut_points,
    )
    pipeline.fit(batches)
    model = DropPath()
    expected = plain(model, batches)
    # The gradient of x is a sum of more than two, which stages add up in another order.
    torch.testing.assert_close(pipeline.state_dict(), expected, rtol=0, atol=1e-6)
    model.eval()
    with torch.no_grad():
        losses = [LOSS(model(inputs), target).item() for inputs, target in batches]
    assert pipeline.evaluate(batches)["loss"] == pytest.approx(sum(losses) / len(losses), rel=1e-5)


# -- d, e: hooks, parametrizations, patched forwards -------------------------------------------------------------------


def chain() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3))


MASK = torch.ones(8, 6)
MASK[::2] = 0


def masked() -> nn.Module:
    model = chain()
    model[0].weight.register_hook(lambda gradient: gradient * MASK)
    return model


def masked_after() -> nn.Module:
    model = chain()

    def mask(weight: torch.Tensor) -> None:
        assert weight.grad is not None
        weight.grad.mul_(MASK)

    model[0].weight.register_post_accumulate_grad_hook(mask)
    return model


def pre_hook() -> nn.Module:
    model = chain()
    model.register_forward_pre_hook(lambda module, inputs: ((inputs[0] - 3) / 2,))
    return model


def hook() -> nn.Module:
    model = chain()
    model.register_forward_hook(lambda module, inputs, output: output * 10)
    return model


def inner_hook() -> nn.Module:
    model = chain()
    model[2].register_forward_hook(lambda module, inputs, output: output * 3)
    return model


def backward_hook() -> nn.Module:
    model = chain()
    model[2].register_full_backward_hook(lambda module, inputs, outputs: (inputs[0] * 2,))
    return model


class Adapted(nn.Module):
    """A block with a matrix that a hook of the layer in it uses."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.adapter = nn.Linear(6, 6), nn.Parameter(torch.randn(6, 6))
        self.layer.register_forward_hook(lambda layer, inputs, output: output + inputs[0] @ self.adapter)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.layer(x).tanh()


def adapted() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(Adapted(), Adapted(), nn.Linear(6, 3))


def borrowed() -> nn.Module:
    """Return a model in which a hook uses a weight of another stage."""
    model = chain()
    model[4].register_forward_pre_hook(lambda layer, inputs: (inputs[0] @ model[2].weight,))
    return model


def patched() -> nn.Module:
    model = chain()
    own = type(model).forward
    model.forward = types.MethodType(lambda self, input: own(self, input) * 10, model)
    return model


def lora() -> nn.Module:
    model = chain()
    layer = model[2]
    layer.down, layer.up = nn.Parameter(torch.randn(2, 8)), nn.Parameter(torch.zeros(8, 2))
    base = layer.forward
    layer.forward = lambda x: base(x) + x @ layer.down.T @ layer.up.T
    return model


def spectral() -> nn.Module:
    model = chain()
    parametrizations.spectral_norm(model[2])
    return model


def old_weight_norm() -> nn.Module:
    model = chain()
    model[2] = nn.utils.weight_norm(model[2])
    return model


def pruned() -> nn.Module:
    model = chain()
    prune.l1_unstructured(model[2], "weight", 0.5)
    return model


class Keeps(nn.Module):
    def __init__(self, what: Any) -> None:
        super().__init__()
        self.what = what

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * 2


def keeps(make: Callable[[], Any]) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        model = chain()
        model.insert(1, Keeps(make()))
        return model

    return build


@pytest.mark.filterwarnings("ignore:.*weight_norm.*deprecated")
@pytest.mark.parametrize("plan", [1, 2, 3])
@pytest.mark.parametrize(
    "build",
    [
        *(masked, masked_after, pre_hook, hook, inner_hook, backward_hook, patched, lora, spectral, old_weight_norm),
        *(
            adapted,
            borrowed,
            pruned,
            keeps(torch.Generator),
            keeps(threading.Lock),
            keeps(lambda: logging.getLogger("x")),
        ),
    ],
)
def test_hooks_and_patches_are_the_users_own(build: Callable[[], nn.Module], plan: int) -> None:
    assert_trained_alike(build, plan)


@pytest.mark.parametrize("plan", [1, 2, 3])
def test_a_hook_on_a_sequential_may_come_later(plan: int) -> None:
    batches = minibatches()

    def hook_of(seen: list[float]) -> Any:
        return lambda module, inputs, output: seen.append(float(output.detach().sum())) or output * 2

    model, expected, seen, wanted = chain(), chain(), [], []
    pipeline = pipeline_of(model, plan, batches)
    pipeline.fit(batches)
    plain(expected, batches)
    model.register_forward_hook(hook_of(seen))
    pipeline.fit(batches)
    expected.register_forward_hook(hook_of(wanted))
    weights = plain(expected, batches)
    assert seen == wanted
    assert all(torch.equal(each, weights[name]) for name, each in pipeline.state_dict().items())


def hooked_backwards(where: str, kind: str = "register_full_backward_hook") -> nn.Module:
    """Return a model with a hook that changes gradients, on the module named `where`."""
    torch.manual_seed(0)
    inner = nn.Sequential(nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 16))
    model = nn.Sequential(nn.Linear(6, 16), inner, nn.Tanh(), nn.Linear(16, 3))
    getattr(model.get_submodule(where), kind)(lambda *args: (args[1][0] * 0.5,))
    return model


@pytest.mark.parametrize("kind", ["register_full_backward_hook", "register_full_backward_pre_hook"])
@pytest.mark.parametrize("where", ["1", "1.2", "3"])
@pytest.mark.parametrize("plan", [2, 3])
def test_modules_with_backward_hooks_are_kept_whole(where: str, kind: str, plan: int) -> None:
    pipeline = assert_trained_alike(partial(hooked_backwards, where, kind), plan)
    stages = {stage for name, stage in pipeline.stage_of_parameters().items() if name.startswith("1.")}
    assert where != "1" or len(stages) == 1


def test_a_model_with_backward_hooks_of_its_own_cannot_be_cut() -> None:
    with pytest.raises(PipedreamError, match="the model cannot be cut, because it has backward hooks"):
        pipeline_of(hooked_backwards(""), 2, minibatches())
    assert_trained_alike(partial(hooked_backwards, "", "register_full_backward_pre_hook"), 1)


@pytest.mark.parametrize("register", [register_module_full_backward_hook, register_module_full_backward_pre_hook])
def test_backward_hooks_for_all_modules_are_refused(register: Any) -> None:
    handle = register(lambda *_: None)
    try:
        with pytest.raises(PipedreamError, match="register it on the modules that need it"):
            pipeline_of(Net(), 2, minibatches())
    finally:
        handle.remove()


@pytest.mark.parametrize("schedule", ["zb-h1", "gpipe-split", "gpipe"])
def test_hooks_of_weights_run_once_per_microbatch(schedule: str) -> None:
    def build() -> nn.Module:
        model = masked()
        model[4].weight.register_hook(lambda gradient: gradient.clamp(-1e-2, 1e-2))  # type: ignore[union-attr]
        return model

    batches = minibatches()
    with Pipeline(
        build(),
        loss_fn=LOSS,
        optimizer=SGD,
        example_inputs=batches[0][0],
        plan=3,
        schedule=ScheduleConfig(schedule, 4),
    ) as pipeline:
        pipeline.fit(batches)
        trained = pipeline.state_dict()
    model = build()
    steps = SGD(model.parameters())
    for inputs, target in batches:
        steps.zero_grad()
        for x, y in zip(inputs.chunk(4), target.chunk(4), strict=True):
            (LOSS(model(x), y) / 4).backward()
        steps.step()
    torch.testing.assert_close(trained, dict(model.state_dict()), rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("schedule", "plan"), [(ScheduleConfig("gpipe", 4), 2), (ScheduleConfig("1f1b-flush", 1), "2-1")]
)
def test_hooks_on_accumulated_gradients_of_several_backwards_are_refused(schedule: ScheduleConfig, plan: Any) -> None:
    with pytest.raises(PipedreamError, match=r"parameter '0\.weight' has a hook of register_post_accumulate_grad_hook"):
        Pipeline(
            masked_after(),
            loss_fn=LOSS,
            optimizer=SGD,
            example_inputs=minibatches()[0][0],
            plan=plan,
            schedule=schedule,
        )


class Fork(nn.Module):
    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return x.tanh(), x.sigmoid()


class Join(nn.Module):
    def forward(self, pair: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        return pair[0] * pair[1]


def forked() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), Fork(), Join(), nn.Linear(8, 3))


@pytest.mark.parametrize("stages", [[[0], [1, 2, 3]], [[0, 1], [2, 3]], [[0, 1, 2], [3]], [[0], [1], [2], [3]]])
def test_pairs_between_the_children_of_a_sequential(stages: list[list[int]]) -> None:
    x = minibatches()[0][0]
    model = forked()
    partition = Partition(capture(model, x, leaf_modules=(Fork, Join)), stages)
    sent: dict[tuple[int, str], torch.Tensor] = {}
    output = None
    for number in range(len(stages)):
        stage = partition.stage_module(number)
        stage.train(True)
        received = [sent[source, value.name] for source, value in stage.stage_inputs]
        outputs, output = stage.run(Arguments((x,), {}), received)
        sent.update(((number, value.name), each) for value, each in zip(stage.stage_outputs, outputs, strict=True))
    assert torch.equal(output, forked()(x))


class Asks(Net):
    """Divides by a number of samples that it asks a tensor of another stage for."""

    def forward(self, x: torch.Tensor) -> Any:
        h = self.a(x)
        return self.c(self.b(h).tanh()) / (h.shape[0] + h.size(1) + h.dim())


@pytest.mark.parametrize("plan", [1, 2, 3])
def test_what_a_forward_asks_is_answered_for_its_own_minibatch(plan: int) -> None:
    batches = minibatches(3) + minibatches(2, samples=5) + minibatches(2) + minibatches(1, samples=3)
    assert_trained_alike(Asks, plan, batches)


# -- h: modules used twice ---------------------------------------------------------------------------------------------


class Watched(Net):
    """Hooks in blocks keep what they put out, for a penalty; they are there once the model has run."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Inner() for _ in range(3)])
        self.kept: list[torch.Tensor] = []

    def forward(self, x: torch.Tensor) -> Any:
        if not self.blocks[0].layer._forward_hooks:
            for block in self.blocks:
                block.layer.register_forward_hook(lambda module, inputs, output: self.kept.append(output))
        self.kept.clear()
        h = self.a(x)
        for block in self.blocks:
            h = block(h)
        return self.c(h + self.kept[0]), list(self.kept)


class Inner(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer, self.other = nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, h: torch.Tensor) -> torch.Tensor:
        return self.other(self.layer(h).tanh()) + h  # type: ignore[no-any-return]


@pytest.mark.parametrize("plan", [1, 2, 3, 4])
def test_hooks_in_blocks_of_other_stages_keep_what_they_kept(plan: int) -> None:
    def penalized(output: Any, target: torch.Tensor) -> torch.Tensor:
        return LOSS(output[0], target) + sum(each.square().mean() for each in output[1])

    batches = minibatches()
    pipeline = pipeline_of(Watched(), plan, batches, penalized)
    pipeline.fit(batches)
    found = pipeline.state_dict()
    for name, expected in plain(Watched(), batches, penalized).items():
        torch.testing.assert_close(found[name], expected, rtol=1e-6, atol=1e-7)


class Siamese(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.trunk = nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU())
        self.head = nn.Linear(16, 3)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return self.head(self.trunk(x) - self.trunk(y))


@pytest.mark.parametrize("plan", [1, 2])
def test_batchnorm_that_is_used_twice_counts_twice(plan: int) -> None:
    batches = [((x, x.flip(0) + 2), y) for x, y in minibatches()]
    pipeline = assert_trained_alike(Siamese, plan, batches)
    assert pipeline.state_dict()["trunk.1.num_batches_tracked"] == 2 * len(batches)


class Masks(nn.Module):
    """Returns two masks of one dropout module."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.drop, self.b = nn.Linear(6, 6), nn.Dropout(0.5), nn.Linear(6, 3)

    def forward(self, x: torch.Tensor) -> Any:
        h = self.a(x)
        one = torch.ones(8, 6)
        first = self.drop(one + 0 * h)
        return self.b(h), first, self.drop(one + 0 * h)


@pytest.mark.parametrize("plan", [1, 2, 3, 5])
def test_two_calls_of_one_dropout_draw_two_masks(plan: int) -> None:
    seen = []

    def loss_fn(output: Any, target: torch.Tensor) -> torch.Tensor:
        seen.append((bool(torch.equal(output[1], output[2])), float((output[1] == 0).float().mean())))
        return LOSS(output[0], target)

    batches = minibatches(20)
    pipeline_of(Masks(), plan, batches, loss_fn).fit(batches)
    assert not any(equal for equal, _ in seen)
    assert 0.4 < sum(rate for _, rate in seen) / len(seen) < 0.6


class Noisy(Net):
    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.drop = how, nn.Dropout(0.2)

    def forward(self, x: torch.Tensor) -> Any:
        h = self.b(self.drop(self.a(x)))
        if self.how == "gumbel":
            h = h * nn.functional.gumbel_softmax(h)
        elif self.how == "normal":
            h = h + torch.normal(torch.zeros_like(h), 1.0)
        elif self.how == "bernoulli_":
            h = h * h.new_empty((8, 16)).bernoulli_(0.5)
        elif self.how == "rand":
            h = h + torch.rand(16)
        elif self.how == "dropout":
            h = nn.functional.dropout(h, 0.5, self.training)
        return self.c(h)


@pytest.mark.parametrize("how", ["", "gumbel", "normal", "bernoulli_", "rand", "dropout"])
def test_what_is_drawn_does_not_depend_on_the_plan(how: str) -> None:
    batches = minibatches()
    weights = []
    for plan in (1, 2, 3):
        pipeline = pipeline_of(Noisy(how), plan, batches)
        pipeline.fit(batches)
        weights.append(pipeline.state_dict())
    for other in weights[1:]:
        assert all(torch.equal(value, other[name]) for name, value in weights[0].items())
    without = Noisy(how)
    without.how, without.drop = "", nn.Identity()
    expected = plain(without, batches)
    assert any(not torch.equal(value, expected[name]) for name, value in weights[0].items()), "something is drawn"


class AsksWithValues(nn.Module):
    """A forward that is recorded with values, and asks for shapes after earlier stages have run a BatchNorm."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.head = nn.Linear(6, 16), nn.Linear(16, 3)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(16, 16), nn.BatchNorm1d(16), nn.Tanh()) for _ in range(4))

    def forward(self, x: torch.Tensor) -> Any:
        x = self.first(x)
        positive = torch.masked_select(x, x > 0)
        for block in self.blocks:
            x = x + block(x) * torch.full((x.shape[0], 1), 0.5)
        return self.head(x) + positive.mean()


@pytest.mark.parametrize("plan", [2, 3])
def test_a_question_leaves_what_autograd_has_saved(plan: int) -> None:
    batches = minibatches()
    pipeline = pipeline_of(AsksWithValues(), plan, batches)
    pipeline.fit(batches)
    expected = plain(AsksWithValues(), batches)
    torch.testing.assert_close(pipeline.state_dict(), expected, rtol=0, atol=1e-5)


# -- i: state that a forward changes -----------------------------------------------------------------------------------


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


def with_state(make: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        model = chain()
        model.insert(1, make())
        return model

    return build


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


# -- state in lists, dicts and plain objects ---------------------------------------------------------------------------


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


def test_a_hook_may_log_in_a_list_of_the_model() -> None:
    class Logging(Net):
        def __init__(self) -> None:
            super().__init__()
            self.log: list[float] = []
            self.b.register_forward_hook(lambda *_: self.log.append(1.0))

    model = Logging()
    pipeline_of(model, 2, minibatches())
    assert model.log == []
    assert_trained_alike(Logging, 3)


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


# -- weights that a forward writes -------------------------------------------------------------------------------------


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


def test_an_embedding_of_largest_norm_is_trained() -> None:
    def build() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Embedding(30, 6, max_norm=0.5), nn.Flatten(), nn.Linear(24, 8), nn.Tanh(), nn.Linear(8, 3)
        )

    draw = torch.Generator().manual_seed(1)
    batches = [(torch.randint(30, (8, 4), generator=draw), target) for _, target in minibatches()]
    model, batch = build(), batches[0]
    pipeline_of(model, 2, [batch], recompute=True)
    assert torch.equal(model[0].weight, build()[0].weight), "the check leaves it as it was"  # type: ignore[index]
    assert_trained_alike(build, 2, batches)


# -- a: flags ----------------------------------------------------------------------------------------------------------


class Auxiliary(Net):
    """Returns a tuple in training only, from a head in the middle."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(16, 3)

    def forward(self, x: torch.Tensor) -> Any:
        h = self.a(x)
        out = self.c(self.b(h).tanh())
        return (out, self.head(h)) if self.training else out


def auxiliary_loss(output: Any, target: torch.Tensor) -> torch.Tensor:
    return (
        LOSS(output[0], target) + 0.3 * LOSS(output[1], target) if isinstance(output, tuple) else LOSS(output, target)
    )


@pytest.mark.parametrize("plan", [1, 2, 3])
def test_an_auxiliary_head_exists_in_training_only(plan: int) -> None:
    pipeline = assert_trained_alike(Auxiliary, plan, loss_fn=auxiliary_loss)
    model, batches = Auxiliary(), minibatches()
    model.load_state_dict(pipeline.state_dict())
    model.eval()
    with torch.no_grad():
        expected = sum(float(LOSS(model(x), y)) for x, y in batches) / len(batches)
    assert pipeline.evaluate(batches, {"loss": LOSS})["loss"] == pytest.approx(expected, abs=1e-6)


class FrozenNorm(nn.Module):
    """BatchNorm that an overridden train() keeps in evaluation mode."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.norm, self.b = nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 3)

    def train(self, mode: bool = True) -> FrozenNorm:
        super().train(mode)
        self.norm.eval()
        return self

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.b(self.norm(self.a(x)))


@pytest.mark.parametrize("plan", [1, 2, 3])
def test_an_overridden_train_is_respected(plan: int) -> None:
    pipeline = assert_trained_alike(FrozenNorm, plan)
    assert pipeline.state_dict()["norm.num_batches_tracked"] == 0


# -- g: weights of others ----------------------------------------------------------------------------------------------


class Arc(nn.Module):
    """A loss with a weight of its own."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.weight = nn.Parameter(torch.randn(3, 3))

    def forward(self, output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return LOSS(output @ self.weight, target)


@pytest.mark.parametrize("plan", [1, 2])
def test_a_loss_with_weights_is_trained(plan: int) -> None:
    batches, loss, own = minibatches(), Arc(), Arc()
    pipeline = pipeline_of(chain(), plan, batches, loss)
    pipeline.fit(batches)
    reference = chain()
    expected = plain(reference, batches, own, lambda weights: SGD([*weights, *own.parameters()]))
    assert all(torch.equal(pipeline.state_dict()[name], value) for name, value in expected.items())
    assert torch.equal(loss.weight, own.weight)


def test_a_penalty_over_weights_of_other_stages_is_refused() -> None:
    model, batches = chain(), minibatches()

    def loss_fn(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return LOSS(output, target) + 0.1 * sum(each.square().sum() for each in model.parameters())

    with pytest.raises(PipedreamError, match=r"the loss or a metric reads '0.weight', which another stage has"):
        pipeline_of(model, 2, batches, loss_fn).fit(batches)


def test_a_forward_that_holds_a_parameter_itself_is_refused() -> None:
    model, batches = chain(), minibatches()
    weight = model[2].weight
    model[2].forward = lambda x: nn.functional.linear(x, weight)
    with pytest.raises(PipedreamError, match=r"the forward or the loss of stage \d depends on '2.weight'"):
        pipeline_of(model, 2, batches).fit(batches)


# -- f: attributes of parameters; weights that are frozen later --------------------------------------------------------


@pytest.mark.parametrize("plan", [1, 2])
@pytest.mark.parametrize(
    ("model", "loss_fn"),
    [
        pytest.param(chain().requires_grad_(False), LOSS, id="frozen"),
        pytest.param(chain(), lambda output, target: torch.zeros(()), id="constant"),
    ],
)
def test_a_loss_that_trains_nothing_is_refused(model: nn.Module, loss_fn: Any, plan: int) -> None:
    with pytest.raises(PipedreamError, match="the loss depends on no weight that requires a gradient"):
        pipeline_of(model, plan, minibatches(), loss_fn).fit(minibatches())


def test_weights_frozen_between_epochs() -> None:
    batches = minibatches()
    model, reference = chain(), chain()
    pipeline = pipeline_of(model, 2, batches)
    steps = SGD(reference.parameters())
    for epoch in range(3):
        for each in (model, reference):
            each[0].requires_grad_(epoch != 1)
        pipeline.fit(batches)
        for x, y in batches:
            steps.zero_grad()
            LOSS(reference(x), y).backward()
            steps.step()
        expected = reference.state_dict()
        assert all(torch.equal(pipeline.state_dict()[name], value) for name, value in expected.items()), epoch


def test_optimizer_groups_by_attribute() -> None:
    def build() -> nn.Module:
        model = chain()
        for each in model.parameters():
            each._slow = each.dim() == 1
        return model

    def optimizer(weights: Any) -> torch.optim.Optimizer:
        weights = list(weights)
        slow = [each for each in weights if each._slow]
        fast = [each for each in weights if not each._slow]
        return torch.optim.SGD([{"params": fast, "lr": 0.1}, {"params": slow, "lr": 0.01}])

    assert_trained_alike(build, 2, optimizer=optimizer)


# -- j: what crosses a boundary ----------------------------------------------------------------------------------------


class Policy(Net):
    """Returns a parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.log_std = nn.Parameter(torch.full((3,), 0.1))

    def forward(self, x: torch.Tensor) -> Any:
        return super().forward(x), self.log_std


def policy_loss(output: Any, target: torch.Tensor) -> torch.Tensor:
    return LOSS(output[0], target) + output[1].square().sum()


@pytest.mark.parametrize("plan", [1, 2, 3])
def test_a_parameter_that_is_returned_is_trained(plan: int) -> None:
    assert_trained_alike(Policy, plan, loss_fn=policy_loss)


@dataclass
class Out:
    last: torch.Tensor
    pooled: torch.Tensor | None = None


Named = namedtuple("Named", "last pooled")


class Encoder(nn.Module):
    def __init__(self, make: Any) -> None:
        super().__init__()
        self.make, self.layers = make, nn.Sequential(nn.Linear(6, 32), nn.Tanh(), nn.Linear(32, 16))

    def forward(self, x: torch.Tensor) -> Any:
        h = self.layers(x)
        return self.make(h if float(h.sum()) < 1e9 else -h)


class Objects(nn.Module):
    """Passes an object from module to module, and uses it again in the end."""

    def __init__(self, make: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.encoder = Encoder(make)
        self.decoder, self.side = nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 3)), nn.Linear(16, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = self.encoder(x)
        last = out["last"] if isinstance(out, dict) else out.last
        return self.decoder(last) + self.side(last)


@pytest.mark.parametrize("plan", [1, 2, 3])
@pytest.mark.parametrize(
    "make",
    [
        Out,
        lambda h: types.SimpleNamespace(last=h),
        lambda h: Named(h, None),
        lambda h: {"last": h, "pooled": None, "n": 3},
    ],
)
def test_objects_cross_boundaries(make: Any, plan: int) -> None:
    assert_trained_alike(lambda: Objects(make), plan)


class Graph(nn.Module):
    """Multiplies by a sparse constant."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Linear(6, 8), nn.Linear(8, 3)
        self.register_buffer("adjacency", torch.eye(8).to_sparse())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.b(torch.sparse.mm(self.adjacency, self.a(x)).relu())


@pytest.mark.parametrize("plan", [1, 2])
def test_sparse_constants(plan: int) -> None:
    batches = minibatches()
    pipeline = pipeline_of(Graph(), plan, batches)
    pipeline.fit(batches)
    weights = {name: value for name, value in plain(Graph(), batches).items() if name != "adjacency"}
    assert all(torch.equal(pipeline.state_dict()[name], value) for name, value in weights.items())


@pytest.mark.parametrize(
    ("layer", "words"),
    [
        (lambda: nn.Embedding(20, 6, sparse=True), r"module '0' has sparse gradients, .* sparse=False"),
        (lambda: nn.LazyLinear(6), r"module '0' of class LazyLinear has no weights yet: run the model once"),
    ],
)
def test_layers_that_are_refused(layer: Callable[[], nn.Module], words: str) -> None:
    model = nn.Sequential(layer(), nn.Linear(6, 3))
    with pytest.raises(PipedreamError, match=words):
        pipeline_of(model, 2, [(torch.zeros(8, dtype=torch.long), torch.zeros(8, dtype=torch.long))])


class Strides(nn.Module):
    """A view that only works with the strides of a transposed tensor."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.lin, self.conv, self.head, self.out = (
            nn.Linear(6, 4),
            nn.Conv1d(4, 4, 1),
            nn.Linear(20, 12),
            nn.Linear(12, 3),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        t = self.lin(x).transpose(1, 2)
        h = self.head(self.conv(t).flatten(1))
        return self.out(h + t.transpose(1, 2).view(8, -1)[:, :12])


class ChannelsLast(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.head = nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.b(self.a(x).relu())
        return self.head(h.permute(0, 2, 3, 1).view(8, 16, 8).mean(1))


@pytest.mark.parametrize("plan", [1, 2, 3])
def test_strides_cross_boundaries(plan: int) -> None:
    assert_trained_alike(Strides, plan, minibatches(shape=(5, 6)))
    images = [(x.contiguous(memory_format=torch.channels_last), y) for x, y in minibatches(shape=(3, 4, 4))]
    assert_trained_alike(ChannelsLast, plan, images)


# -- minibatches that cannot be cut ------------------------------------------------------------------------------------


def cut(
    model: nn.Module,
    batches: list[Any],
    loss_fn: Any = LOSS,
    n_microbatches: int = 2,
    plan: Any = 2,
    batch_dims: dict[str, int | None] | None = None,
) -> Pipeline:
    return Pipeline(
        model,
        loss_fn=loss_fn,
        optimizer=SGD,
        example_inputs=batches[0] if isinstance(batches[0], dict) else batches[0][0],
        plan=plan,
        schedule=ScheduleConfig("1f1b-flush", n_microbatches),
        train_config=TrainConfig(batch_dims=batch_dims or {}),
    )


class TimeFirst(nn.Module):
    """Takes (time, samples, features)."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.lstm, self.head = nn.LSTM(6, 8), nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.lstm(x)[0])


class Bank(nn.Module):
    """Compares samples with a bank of keys, which has as many rows as there are samples."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Linear(6, 16), nn.Linear(16, 3)

    def forward(self, x: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
        return self.b((self.a(x) @ keys.T).softmax(1) @ keys)


class Decoder(nn.Module):
    """Takes words as (time, samples), and a mask of (time, time) that is no sample's."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.head = nn.Embedding(11, 8), nn.Linear(8, 11)
        self.block = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0)

    def forward(self, words: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return self.head(self.block(self.embed(words), src_mask=mask))


def sentences(samples: tuple[int, ...] = (8, 8, 7, 8)) -> list[Any]:
    draw = torch.Generator().manual_seed(3)
    mask = nn.Transformer.generate_square_subsequent_mask(6)
    words = [torch.randint(0, 11, (6, each), generator=draw) for each in samples]
    return [((each, mask), each.roll(-1, 0)) for each in words]


def next_word(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return nn.functional.cross_entropy(output.flatten(0, 1), target.flatten())


#: Samples are along the second dimension; the mask has none.
TIME_FIRST = {"words": 1, "mask": None, "target": 1}


@pytest.mark.parametrize("plan", [1, 2, "2-1"])
@pytest.mark.parametrize("n_microbatches", [2, 3])
def test_samples_may_be_along_any_dimension(plan: Any, n_microbatches: int) -> None:
    batches = sentences()
    pipeline = cut(Decoder(), batches, next_word, n_microbatches, plan, TIME_FIRST)
    for step in pipeline.train(batches):
        assert step.loss > 0
    for name, value in plain(Decoder(), batches, next_word).items():
        torch.testing.assert_close(pipeline.state_dict()[name], value, rtol=1e-5, atol=1e-6)
    model = Decoder()
    model.load_state_dict(pipeline.state_dict())
    model.eval()
    losses = [float(next_word(model(*inputs), target).detach()) for inputs, target in batches]
    expected = sum(loss * inputs[0].shape[1] for loss, (inputs, _) in zip(losses, batches, strict=True)) / 31
    assert pipeline.evaluate(batches)["loss"] == pytest.approx(expected, rel=1e-5)


def test_keys_of_a_mapping_have_batch_dimensions_too() -> None:
    batches = [{"words": words, "mask": mask, "labels": target} for (words, mask), target in sentences()]

    class WithLabels(Decoder):
        def forward(self, words: torch.Tensor, mask: torch.Tensor, labels: torch.Tensor) -> Any:
            return {"loss": next_word(super().forward(words, mask), labels)}

    dims = {"words": 1, "mask": None, "labels": 1}
    pipeline = cut(WithLabels(), batches, lambda output, batch: output["loss"], 2, 2, dims)
    pipeline.fit(batches)
    for name, value in plain(Decoder(), sentences(), next_word).items():
        torch.testing.assert_close(pipeline.state_dict()[name], value, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("dims", "words"),
    [
        (
            {"word": 1},
            r"batch_dims has 'word', which is no input of the model: its inputs are words, mask; 'target' is",
        ),
        ({**TIME_FIRST, "words": 2}, r"'words' has its samples along dimension 2, but its shape is \(6, 8\)"),
        ({"words": 1}, r"tensors of 6 and 8 samples cannot be split into 2 microbatches: .*batch_dims"),
        ({"words": True}, r"batch_dims maps 'words' to True; it should map names of inputs to dimensions, or to None"),
        ({"words": 0, "mask": 0}, r"does not accept example_inputs of shape \(3, 8\) .* and \(3, 6\)"),
    ],
)
def test_batch_dims_that_do_not_fit_are_refused(dims: Any, words: str) -> None:
    with pytest.raises(PipedreamError, match=words):
        cut(Decoder(), sentences(), next_word, batch_dims=dims)


def test_inputs_that_are_not_per_sample_are_refused() -> None:
    with pytest.raises(PipedreamError, match=r"output for a minibatch differs .*n_microbatches=1"):
        cut(TimeFirst(), minibatches(shape=(4, 6)))
    with pytest.raises(PipedreamError, match=r"output for a minibatch differs .*n_microbatches=1"):
        cut(Bank(), [((x, torch.randn(8, 16)), y) for x, y in minibatches()])


@pytest.mark.parametrize(
    ("ignored", "weight"), [((2, 0, 0, 0), None), ((3, 3, 3, 2), None), ((0, 0, 0, 0), (1.0, 5.0, 0.1))]
)
def test_a_mean_over_unequal_numbers_of_targets_is_refused(
    ignored: tuple[int, ...], weight: tuple[float, ...] | None
) -> None:
    """Four microbatches of two samples with three targets each, of which some are ignored, or weighted by class."""
    batches = minibatches(shape=(3, 6))
    for index, (x, _) in enumerate(batches):
        target = torch.randint(0, 3, (8, 3), generator=torch.Generator().manual_seed(index))
        for microbatch, count in enumerate(ignored):
            target[2 * microbatch, :count] = -100
        batches[index] = (x, target)
    classes = None if weight is None else torch.tensor(weight)

    def loss_fn(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return nn.functional.cross_entropy(output.flatten(0, 1), target.flatten(), weight=classes)

    with pytest.raises(PipedreamError, match=r"the loss is a mean over .* another; let loss_fn return a pair"):
        cut(chain(), batches, loss_fn, 4).fit(batches)


def test_a_mean_over_equal_numbers_of_targets_is_that_of_the_minibatch() -> None:
    batches = [(x, y.clone()) for x, y in minibatches(shape=(3, 6))]
    batches = [(x, torch.randint(0, 3, (8, 3), generator=torch.Generator().manual_seed(0))) for x, _ in batches]
    for _, target in batches:
        target[:, 0] = -100

    def loss_fn(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return nn.functional.cross_entropy(output.flatten(0, 1), target.flatten())

    pipeline = cut(chain(), batches, loss_fn, 4)
    pipeline.fit(batches)
    for name, value in plain(chain(), batches, loss_fn).items():
        torch.testing.assert_close(pipeline.state_dict()[name], value, rtol=1e-5, atol=1e-6)


def test_a_model_that_reads_values_itself_cannot_be_cut() -> None:
    class Reads(Net):
        def forward(self, x: torch.Tensor) -> Any:
            y = self.a(x)
            return self.c(self.b(-y if y.sum() > 0 else y))

    with pytest.raises(PipedreamError, match=r"cannot be cut, because its Python reads the values of a tensor"):
        pipeline_of(Reads(), 2, minibatches())
    assert_trained_alike(Reads, 1)


# -- every boundary ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "build",
    [
        *(NoGrad, Decorated, Detached, ReversedInAModule, ReversedInTheForward, Checkpointed, Masks, Auxiliary, Policy),
        *(hook, inner_hook, backward_hook, patched, lora, spectral, pruned, lambda: Objects(Out)),
        *(lambda: Noisy("gumbel"), lambda: Noisy("bernoulli_"), lambda: Noisy("dropout")),
    ],
)
def test_the_check_passes_whichever_boundary_is_chosen(build: Callable[[], nn.Module]) -> None:
    model = build()
    graph = capture(model, minibatches()[0][0])
    arguments = graph.inputs.like(minibatches()[0][0])
    count = len(graph.layers)
    cuts = [[list(range(first)), list(range(first, count))] for first in range(1, count)]
    for stages in [*cuts, [[layer] for layer in range(count)]]:
        check_same_program(graph, Partition(graph, stages), len(stages), arguments, seed=0, precision=None)


def test_the_check_lets_a_gradient_pass_that_is_zero_but_for_rounding() -> None:
    """BatchNorm takes the mean away, so the bias before it has no gradient."""

    class Skips(Net):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(16)

        def forward(self, x: torch.Tensor) -> Any:
            h = self.a(x)
            return self.c(self.norm(h + self.b(h.tanh())) + 0 * h)

    batches = minibatches(1, 512)
    graph = capture(Skips(), batches[0][0])
    for boundary in range(1, len(graph.layers)):
        partition = Partition(graph, [range(boundary), range(boundary, len(graph.layers))])
        check_same_program(graph, partition, 2, Arguments((batches[0][0],), {}), seed=0, precision=None)


def test_the_check_finds_what_a_stage_does_differently() -> None:
    """A forward that behaves differently the second time it is called from the same state."""
    calls = []

    class Fickle(Net):
        def forward(self, x: torch.Tensor) -> Any:
            calls.append(1)
            return self.c(self.b(self.a(x)).tanh() * len(calls))

    with pytest.raises(PipedreamError, match="the stages do not compute what the model computes by itself"):
        pipeline_of(Fickle(), 2, minibatches())
    pipeline_of(Fickle(), 2, minibatches(), check_model=False)


# -- k: extra state, and what is left behind ---------------------------------------------------------------------------


class Titled(nn.Module):
    """Has a state that is no tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[int] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.seen.append(len(x))
        return x

    def get_extra_state(self) -> Any:
        return {"seen": self.seen[-2:]}

    def set_extra_state(self, state: Any) -> None:
        self.seen = list(state["seen"])


def test_extra_state_is_in_state_dicts_and_checkpoints(tmp_path: Path) -> None:
    batches = minibatches()
    model = with_state(Titled)()
    pipeline = pipeline_of(model, 2, batches, check_model=False)
    pipeline.fit(batches)
    state = pipeline.state_dict()
    assert state["1._extra_state"] == {"seen": [8, 8]}
    pipeline.save_checkpoint(tmp_path)
    whole, other = with_state(Titled)(), with_state(Titled)()
    whole.load_state_dict(state)
    assert whole[1].seen == [8, 8]
    for restore in (lambda each: each.load_state_dict(state), lambda each: each.resume(tmp_path)):
        again = pipeline_of(other, 2, batches, check_model=False)
        restore(again)
        assert other[1].seen == [8, 8]
        other[1].seen = []


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


class Versioned(Net):
    """Loads a state dict by its version, as torchvision's MNASNet does."""

    _version = 2

    def _load_from_state_dict(self, state_dict: Any, prefix: str, metadata: Any, *rest: Any) -> None:
        if metadata.get("version") != 2:
            raise ValueError(f"version {metadata.get('version')} is unknown")
        super()._load_from_state_dict(state_dict, prefix, metadata, *rest)  # type: ignore[no-untyped-call]


def test_a_state_dict_has_the_versions_of_modules() -> None:
    batches = minibatches()
    pipeline = pipeline_of(Versioned(), 2, batches)
    pipeline.fit(batches)
    loaded = Versioned()
    loaded.load_state_dict(pipeline.state_dict())
    assert all(torch.equal(each, plain(Versioned(), batches)[name]) for name, each in loaded.state_dict().items())


def test_a_closed_pipeline_leaves_no_hooks_behind() -> None:
    model, batches = Noisy("dropout"), minibatches()
    before = {name: set(vars(module)) for name, module in model.named_modules()}
    with pipeline_of(model, 2, batches) as pipeline:
        pipeline.fit(batches)
        trained = pipeline.state_dict()
    assert {name: set(vars(module)) for name, module in model.named_modules()} == before
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert all(torch.equal(value, trained[name]) for name, value in model.state_dict().items())
    model.eval()(batches[0][0])  # an ordinary model


# -- evaluation of other sizes -----------------------------------------------------------------------------------------


def mean_loss(model: nn.Module, batches: list[Any], loss_fn: Any) -> float:
    """Return the mean per sample of a plain loop."""
    model.eval()
    with torch.no_grad():
        losses = [(float(loss_fn(model(inputs), target)), len(inputs)) for inputs, target in batches]
    return sum(loss * count for loss, count in losses) / sum(count for _, count in losses)


class Lengths(nn.Module):
    """Any number of positions; the middle stage's inputs are in another order in memory."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.mix, self.head = nn.Linear(6, 8), nn.Conv1d(8, 8, 3, padding=1), nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.mix(self.embed(x).transpose(1, 2)).relu()
        return self.head(h.transpose(1, 2)).mean(1)


def of_sizes(*sizes: tuple[int, int]) -> list[Any]:
    """Return minibatches of (samples, length)."""
    draw = torch.Generator().manual_seed(5)
    return [
        (torch.randn(samples, length, 6, generator=draw), torch.randint(0, 3, (samples,), generator=draw))
        for samples, length in sizes
    ]


def evaluate_sizes(argument: tuple[Any, int, list[Any]]) -> list[float]:
    """Train and evaluate in turns; return the scores, and check them against a plain loop on rank 0."""
    plan, n_microbatches, evaluations = argument
    train = of_sizes((4, 5), (4, 3))
    scores = []
    with cut(Lengths(), train, LOSS, n_microbatches, plan) as pipeline:
        for evaluated in evaluations:
            pipeline.fit(train)
            weights = pipeline.state_dict()
            scores.append(pipeline.evaluate(evaluated)["loss"])
            if pipeline.rank == 0:
                model = Lengths()
                model.load_state_dict(weights)
                assert scores[-1] == pytest.approx(mean_loss(model, evaluated, LOSS), rel=1e-5)
    return scores


EVALUATIONS = [
    of_sizes((4, 5)),  # as the example
    of_sizes((10, 5), (3, 5)),  # more samples
    of_sizes((4, 11), (2, 2)),  # longer
    of_sizes((10, 12), (9, 7)),  # both
    of_sizes((2, 2)),
]


@pytest.mark.parametrize("plan", [1, 2, 3, "2-1"])
@pytest.mark.parametrize("n_microbatches", [1, 2])
def test_minibatches_of_an_evaluation_may_be_larger_than_the_example(plan: Any, n_microbatches: int) -> None:
    evaluate_sizes((plan, n_microbatches, EVALUATIONS))


@pytest.mark.alone
def test_minibatches_of_an_evaluation_may_be_larger_on_ranks() -> None:
    on_ranks = ranks.call(3, evaluate_sizes, (3, 2, EVALUATIONS))
    assert on_ranks == evaluate_sizes((3, 2, EVALUATIONS))


def test_a_minibatch_larger_than_the_first_of_an_evaluation_is_refused() -> None:
    with pytest.raises(Exception, match=r"in an evaluation the first minibatch may be the largest instead"):
        evaluate_sizes((3, 1, [of_sizes((4, 5), (4, 9))]))


# -- optimizers that choose --------------------------------------------------------------------------------------------


def chosen(kind: Any, names: str, parameters: Any) -> torch.optim.Optimizer:
    """Train the parameters of layers by name, the others not; a plain loop's have no names and come in order."""
    given = dict(zip(Net().state_dict(), parameters, strict=False))
    own = [getattr(each, "qualified_name", name) for name, each in given.items()]
    groups = [[p for name, p in zip(own, given.values(), strict=True) if name[0] == layer] for layer in names]
    return kind([{"params": group} for group in groups], lr=0.01)  # type: ignore[no-any-return]


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.RMSprop])
def test_parameters_that_the_optimizer_leaves_out_stay_as_they_are(kind: Any) -> None:
    trained = assert_trained_alike(Net, 2, optimizer=partial(chosen, kind, "ac")).state_dict()
    assert [name for name, value in Net().state_dict().items() if torch.equal(value, trained[name])] == [
        "b.weight",
        "b.bias",
    ]


def test_an_optimizer_of_names_that_a_stage_does_not_have_is_refused() -> None:
    def head(parameters: Any) -> torch.optim.Optimizer:
        return torch.optim.SGD([each for each in parameters if each.qualified_name.startswith("c.")], lr=0.1)

    words = (
        r"^optimizer\(parameters\) failed for stage 0, which trains 'a\.weight', 'a\.bias': ValueError: optimizer got "
        r"an empty parameter list: each stage has an optimizer of its own parameters, .* requires_grad_\(False\)$"
    )
    with pytest.raises(PipedreamError, match=words):
        pipeline_of(Net(), 3, minibatches(), optimizer=head)
    model = Net()
    for each in (model.a, model.b):
        each.requires_grad_(False)
    pipeline_of(model, 3, minibatches(), optimizer=head).fit(minibatches())
