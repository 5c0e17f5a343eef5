"""d: hooks of modules and of weights, parametrizations, pruning, and modules that cannot be copied."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.modules.module import register_module_full_backward_hook, register_module_full_backward_pre_hook
from user_programs import (
    LOSS,
    SGD,
    Net,
    assert_trained_alike,
    backward_hook,
    chain,
    hook,
    hooked_backwards,
    inner_hook,
    minibatches,
    pipeline_of,
    plain,
    pruned,
    spectral,
)

from pipedream_hpc import PipedreamError, Pipeline, ScheduleConfig

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


def old_weight_norm() -> nn.Module:
    model = chain()
    model[2] = nn.utils.weight_norm(model[2])
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
        *(masked, masked_after, pre_hook, hook, inner_hook, backward_hook, adapted, borrowed),
        *(spectral, old_weight_norm, pruned),
        *(keeps(torch.Generator), keeps(threading.Lock), keeps(lambda: logging.getLogger("x"))),
    ],
)
def test_hooks_and_parametrizations_are_the_users_own(build: Callable[[], nn.Module], plan: int) -> None:
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


def with_hooks_that_go(reentrant: bool) -> nn.Module:
    """Return a model of which a hook takes itself off, another puts one on, and one lets the input have a gradient."""

    class Blocks(Net):
        def forward(self, x: torch.Tensor) -> Any:
            h = torch.utils.checkpoint.checkpoint(self.b, self.a(x), use_reentrant=reentrant)
            return self.c(h.tanh())

    model = Blocks()
    model.a.requires_grad_(False)
    first = model.a.register_forward_hook(lambda *_: first.remove())
    model.a.register_forward_hook(lambda module, inputs, output: output.requires_grad_(True))

    def put(module: nn.Module, inputs: Any, output: torch.Tensor) -> None:
        module.register_forward_hook(lambda *_: None)

    model.a.register_forward_hook(put)
    return model


@pytest.mark.parametrize("plan", [2, 3])
@pytest.mark.parametrize("reentrant", [True, False])
def test_hooks_that_change_the_hooks_of_a_module_of_another_stage(plan: int, reentrant: bool) -> None:
    assert_trained_alike(partial(with_hooks_that_go, reentrant), plan)


class Routed(nn.Module):
    """Is kept whole, as it reads values; the loss of all routers takes what a hook has kept of the router in it."""

    def __init__(self) -> None:
        super().__init__()
        self.router, self.experts = nn.Linear(16, 2), nn.ModuleList(nn.Linear(16, 16) for _ in range(2))

    def forward(self, h: torch.Tensor) -> torch.Tensor:
        choice = self.router(h).softmax(-1)
        y = torch.zeros_like(h)
        for number, count in enumerate(choice.argmax(-1).bincount(minlength=2).tolist()):
            if count:
                y = y + self.experts[number](h) * choice[:, number, None]
        return h + y


_KEPT: list[list[torch.Tensor]] = []


class Balanced(nn.Module):
    """Collects what routers in modules that are kept whole return, by hooks, and uses it in the end."""

    def __init__(self, sequential: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        blocks = [Routed() for _ in range(4)]
        self.first, self.last = nn.Linear(6, 16), nn.Linear(16, 3)
        self.blocks = nn.Sequential(*blocks) if sequential else nn.ModuleList(blocks)
        self.sequential = sequential
        for block in blocks:
            block.router.register_forward_hook(lambda module, inputs, output: _KEPT[-1].append(output))

    def forward(self, x: torch.Tensor) -> Any:
        _KEPT.append([])
        h = self.first(x)
        if self.sequential:
            h = self.blocks(h)
        else:
            for block in self.blocks:
                h = block(h)
        balance = sum(each.softmax(-1).mean(0).square().sum() for each in _KEPT.pop())
        return self.last(h), balance


@pytest.mark.parametrize("sequential", [False, True])
@pytest.mark.parametrize("plan", [1, 2, 4])
def test_hooks_in_modules_that_are_kept_whole_keep_what_they_kept(plan: int, sequential: bool) -> None:
    def penalized(output: Any, target: torch.Tensor) -> torch.Tensor:
        return LOSS(output[0], target) + output[1]

    batches = minibatches()
    pipeline = pipeline_of(Balanced(sequential), plan, batches, penalized)
    pipeline.fit(batches)
    found = pipeline.state_dict()
    for name, expected in plain(Balanced(sequential), batches, penalized).items():
        torch.testing.assert_close(found[name], expected, rtol=1e-5, atol=1e-6)
