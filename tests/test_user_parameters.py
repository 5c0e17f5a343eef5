"""f: attributes of parameters, frozen weights, and optimizers that choose."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import nn
from user_programs import LOSS, SGD, Net, assert_trained_alike, chain, minibatches, pipeline_of

from pipedream_hpc import PipedreamError, Pipeline


@pytest.mark.parametrize("frozen", [{1}, {0}, {0, 1}], ids=["later", "at first: the head, then all", "twice"])
@pytest.mark.parametrize("plan", [1, 2])
def test_weights_frozen_between_epochs(plan: int, frozen: set[int]) -> None:
    """The pipeline is made with all of them trained."""
    batches = minibatches()
    model, reference = chain(), chain()
    pipeline = pipeline_of(model, plan, batches)
    steps = SGD(reference.parameters())
    for epoch in range(3):
        for each in (model, reference):
            each[0].requires_grad_(epoch not in frozen)
        pipeline.fit(batches)
        for x, y in batches:
            steps.zero_grad()
            LOSS(reference(x), y).backward()
            steps.step()
        expected = reference.state_dict()
        assert all(torch.equal(pipeline.state_dict()[name], value) for name, value in expected.items()), epoch


@pytest.mark.parametrize("plan", [1, 2, "2-1"])
def test_optimizer_groups_by_identity(plan: Any) -> None:
    """Within the function, the model's parameters are those that it is given."""
    batches, model, reference = minibatches(), chain(), chain()

    def groups(of: nn.Module, parameters: Any) -> torch.optim.Optimizer:
        parameters, head = list(parameters), {id(each) for each in of[-1].parameters()}
        split = [[each for each in parameters if (id(each) in head) == inside] for inside in (True, False)]
        return torch.optim.SGD([{"params": split[0], "lr": 0.5}, {"params": split[1]}], lr=0.1)

    pipeline = pipeline_of(model, plan, batches, optimizer=partial(groups, model))
    pipeline.fit(batches[:4])
    if plan == "2-1":
        assert [group["lr"] for group in pipeline.stages[-1].stash.optimizer.param_groups if group["params"]] == [0.5]
        return
    steps = groups(reference, reference.parameters())
    for x, y in batches[:4]:
        steps.zero_grad()
        LOSS(reference(x), y).backward()
        steps.step()
    assert all(torch.equal(value, reference.state_dict()[name]) for name, value in pipeline.state_dict().items())


def test_a_group_that_is_empty_in_every_stage_is_warned_of() -> None:
    model = chain()
    head = set(model[-1].parameters())

    def groups(parameters: Any) -> torch.optim.Optimizer:
        parameters = list(parameters)
        split = [[each for each in parameters if (each in head) == inside] for inside in (True, False)]
        return torch.optim.SGD([{"params": split[0], "lr": 0.5}, {"params": split[1]}], lr=0.1)

    with pytest.warns(UserWarning, match="group 0 of the optimizer is empty in every stage: .* choose them by qual"):
        pipeline_of(model, 2, minibatches(), optimizer=groups)


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


def test_weights_frozen_between_epochs_are_frozen_in_all_versions() -> None:
    batches, model = minibatches(8), chain()
    pipeline = Pipeline(model, loss_fn=LOSS, optimizer=SGD, example_inputs=batches[0][0], plan=3, schedule="1f1b")
    pipeline.fit(batches)
    before = {name: value.clone() for name, value in pipeline.state_dict().items()}
    model[0].requires_grad_(False)
    pipeline.fit(batches)
    after = pipeline.state_dict()
    assert [name for name, value in before.items() if torch.equal(value, after[name])] == ["0.weight", "0.bias"]


def test_weights_that_were_frozen_at_first_cannot_be_trained_later() -> None:
    model = chain()
    model[0].requires_grad_(False)
    pipeline = pipeline_of(model, 2, minibatches())
    pipeline.fit(minibatches())
    model[0].requires_grad_(True)
    with pytest.raises(PipedreamError, match=r"parameter '0\.weight' requires a gradient now, but did not when the"):
        pipeline.fit(minibatches())


@pytest.mark.parametrize("plan", [1, 2])
def test_a_parameter_that_is_replaced_between_epochs_is_refused_and_one_that_is_changed_is_not(plan: int) -> None:
    batches, model = minibatches(), chain()
    pipeline = pipeline_of(model, plan, batches)
    pipeline.fit(batches)
    with torch.no_grad():
        model[0].weight.zero_()
    assert not pipeline.state_dict()["0.weight"].any()
    pipeline.fit(batches)
    model[0].weight = nn.Parameter(torch.zeros_like(model[0].weight))
    words = r"parameter '0\.weight' has been replaced since the pipeline was made: change its values in place"
    with pytest.raises(PipedreamError, match=words):
        pipeline.fit(batches)
