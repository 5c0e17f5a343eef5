"""Stages that are run one after the other by hand compute what the whole model computes, at any cut."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils._pytree import tree_flatten

from pipedream_hpc import zoo
from pipedream_hpc.errors import PipedreamError
from pipedream_hpc.model.capture import capture
from pipedream_hpc.model.graph import LayerGraph
from pipedream_hpc.model.partition import Partition
from pipedream_hpc.model.stage_module import writable


def tokens(vocabulary: int, length: int) -> torch.Tensor:
    return torch.randint(1, vocabulary, (4, length))


class Skipping(nn.Module):
    """A skip connection over three layers, and one added in place."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d = (nn.Linear(6, 6) for _ in range(4))
        self.norm = nn.BatchNorm1d(6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.a(x))
        kept = x
        x = torch.relu_(self.norm(self.b(x)))
        x = self.c(x)
        x += kept
        return self.d(x) * kept


class UNet(nn.Module):
    """Two nested skip connections."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.down, self.deep, self.last = (nn.Linear(6, 6) for _ in range(4))
        self.up = nn.Linear(12, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        a = self.first(x)
        b = self.down(torch.relu(a))
        c = self.deep(torch.relu(b))
        return self.last(self.up(torch.cat([c, b], 1)) + a)


class Sizes(nn.Module):
    """Numbers, sizes and a mask that later layers use."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, 6), nn.Linear(3, 3), nn.Linear(6, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        positive, shape, batch = x > 0, x.shape, x.size(0)
        x = torch.tanh(self.a(x))
        x = self.b(x.view(batch, 2, 3))
        x = self.c(x.reshape(shape))
        return x.masked_fill(positive, 0.0)


class Tupled(nn.Module):
    """Recurrent layers pass on tuples of tuples; the model returns a mapping."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.LSTM(6, 6, batch_first=True), nn.LSTM(6, 6, batch_first=True)
        self.head = nn.Linear(6, 2)

    def forward(self, x: torch.Tensor, steps: torch.Tensor) -> dict[str, torch.Tensor]:
        out, state = self.one(x)
        out, (hidden, _) = self.two(out, state)
        return {"logits": self.head(out[:, -1]), "hidden": hidden[0] * steps[:, None]}


class Tied(nn.Module):
    """One weight in an embedding, in the middle by name, and in the last layer."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.inner = nn.Embedding(9, 6), nn.Linear(6, 6)
        self.head = nn.Linear(6, 9, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.tanh(self.inner(self.embedding(x)))
        x = x + self.embedding.weight[0]
        return self.head(x)


class Frozen(nn.Module):
    """The first layer is not trained: no gradient goes back to it."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Linear(6, 6) for _ in range(3))
        self.a.requires_grad_(False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        a = self.a(x)
        return self.c(torch.relu(self.b(a))) + a


SENTENCE = (tokens(20, 7), torch.tensor([7, 3, 5, 1]), tokens(20, 5))
FLOATS = torch.randn(4, 6)
CASES: dict[str, tuple[Callable[[], nn.Module], Any]] = {
    "skipping": (Skipping, FLOATS),
    "u-net": (UNet, FLOATS),
    "sizes": (Sizes, FLOATS),
    "tupled": (Tupled, (torch.randn(4, 3, 6), torch.randint(1, 5, (4,)))),
    "tied": (Tied, tokens(9, 5)),
    "frozen": (Frozen, FLOATS),
    "vgg": (zoo.vgg_small, torch.randn(4, 3, 32, 32)),
    "resnet": (zoo.resnet_tiny, torch.randn(4, 3, 8, 8)),
    "inception": (zoo.inception_tiny, torch.randn(4, 3, 8, 8)),
    "s2vt": (lambda: zoo.s2vt(20, 12, 6, 8), (torch.randn(4, 4, 12), tokens(20, 5))),
    "gnmt": (lambda: zoo.gnmt(8, 20, 8), SENTENCE),
    "awd_lm": (lambda: zoo.awd_lm(3, 20, 6, 8), tokens(20, 5)),
    "gpt": (lambda: zoo.gpt(2, 8, 2, 20, 16, dropout=0.0), tokens(20, 5)),
}


def built(name: str) -> tuple[nn.Module, tuple[Any, ...]]:
    build, example = CASES[name]
    torch.manual_seed(0)
    model = build()
    for module in model.modules():
        if isinstance(module, nn.Dropout | nn.Dropout2d):
            module.p = 0.0
        if isinstance(module, nn.LSTM):
            module.dropout = 0.0
    return model, example if isinstance(example, tuple) else (example,)


@cache
def captured(name: str) -> LayerGraph:
    """Capture a model once for all cuts; stages leave its weights as they are, and their gradients in it."""
    return capture(*built(name))


def weighted_sum(output: Any) -> torch.Tensor:
    """Return a loss in which every element has a different weight."""
    leaves = [leaf for leaf in tree_flatten(output)[0] if isinstance(leaf, torch.Tensor)]
    return sum((leaf * torch.arange(leaf.numel()).view(leaf.shape)).sum() for leaf in leaves)  # type: ignore[return-value]


def run_whole(model: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, dict[str, torch.Tensor]]:
    output = model(*(each.clone() for each in arguments))
    weighted_sum(output).backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return output, gradients


def run_in_stages(
    graph: LayerGraph, stages: list[list[int]], arguments: tuple[Any, ...]
) -> tuple[Any, dict[str, torch.Tensor]]:
    """Run the stages as the runtime does: autograd ends at every edge, and gradients are sent back and accumulated."""
    partition = Partition(graph, stages)
    modules = [partition.stage_module(index) for index in range(len(stages))]
    sent: dict[tuple[int, int, str], torch.Tensor] = {}
    stage_outputs, stage_inputs, output = [], [], None
    for index, stage in enumerate(modules):
        leaves = [
            sent[source, index, value.name].detach().clone().requires_grad_(value.needs_gradient)
            for source, value in stage.stage_inputs
        ]
        given = list(leaves)
        for position in stage.written_inputs:
            given[position] = writable(given[position]) if given[position].requires_grad else given[position]
        returned, output = stage.run(graph.inputs.like(arguments) if stage.reads_inputs else None, given)
        for (source, target), values in partition.edges.items():
            if source == index:
                for value in values:
                    tensor = returned[[each.name for each in stage.stage_outputs].index(value.name)]
                    assert (tuple(tensor.shape), tensor.dtype) == (value.shape, value.dtype)
                    assert tensor.requires_grad == value.needs_gradient
                    sent[source, target, value.name] = tensor
        stage_outputs.append(dict(zip((value.name for value in stage.stage_outputs), returned, strict=True)))
        stage_inputs.append(leaves)
    returning: dict[tuple[int, str], list[torch.Tensor]] = {}
    gradients: dict[str, torch.Tensor] = {}
    for index in reversed(range(len(modules))):
        stage = modules[index]
        roots = [(weighted_sum(output), None)] if stage.is_last else []
        for name, sent_on in stage_outputs[index].items():
            roots += [(sent_on, gradient) for gradient in returning.get((index, name), ())]
        if roots:
            torch.autograd.backward([root for root, _ in roots], [gradient for _, gradient in roots])
        for (source, value), leaf in zip(stage.stage_inputs, stage_inputs[index], strict=True):
            if value.needs_gradient:
                # The stage may have used only its size.
                gradient = torch.zeros_like(leaf) if leaf.grad is None else leaf.grad
                returning.setdefault((source, value.name), []).append(gradient)
        own = {name: p.grad for name, p in stage.module.named_parameters() if p.grad is not None}
        assert not own.keys() & gradients.keys(), "every weight belongs to one stage"
        gradients.update(own)  # type: ignore[arg-type]
    return output, gradients


def assert_same(stages: list[list[int]], name: str) -> None:
    graph, (model, arguments) = captured(name), built(name)
    graph.module.load_state_dict(model.state_dict())  # what BatchNorm counted in another cut
    graph.module.zero_grad()
    expected, expected_gradients = run_whole(model, arguments)
    output, gradients = run_in_stages(graph, stages, arguments)
    for left, right in zip(tree_flatten(output)[0], tree_flatten(expected)[0], strict=True):
        assert torch.equal(left, right)
    # The gradients of weights and values that several stages use are added in another order.
    for key, gradient in expected_gradients.items():
        torch.testing.assert_close(gradients[key], gradient, rtol=1e-4, atol=1e-5)
    assert gradients.keys() == expected_gradients.keys()


@pytest.mark.parametrize("name", CASES)
def test_every_layer_a_stage(name: str) -> None:
    assert_same([[index] for index in range(len(captured(name).layers))], name)


@pytest.mark.parametrize("name", CASES)
@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_any_cut(name: str, data: st.DataObject) -> None:
    """Any sets of layers between which data flows only forward, contiguous or not."""
    graph = captured(name)
    count = data.draw(st.integers(1, min(5, len(graph.layers))))
    place: list[int] = []
    for layer in range(len(graph.layers)):
        least = max((place[source] for source, target in graph.edges if target == layer), default=0)
        place.append(min(count - 1, data.draw(st.sampled_from([least, least, least, least + 1, count - 1]))))
    used = sorted(set(place))
    stages = [[layer for layer, at in enumerate(place) if at == stage] for stage in used]
    assert_same(stages, name)


def test_a_skip_connection_is_sent_directly() -> None:
    model, arguments = built("u-net")
    graph = capture(model, arguments)
    names = [layer.name for layer in graph.layers]
    assert names == ["first", "relu", "down", "relu_1", "deep", "cat", "up", "add", "last"]
    partition = Partition(graph, [[0, 1], [2, 3], [4, 5], [6, 7, 8]])
    assert {edge: [value.name for value in values] for edge, values in partition.edges.items()} == {
        (0, 1): ["relu"],
        (0, 3): ["first"],
        (1, 2): ["down", "relu_1"],
        (2, 3): ["cat"],
    }


def test_a_shared_weight_belongs_to_its_first_stage_and_is_sent_to_the_others() -> None:
    model, arguments = built("tied")
    graph = capture(model, arguments)
    partition = Partition(graph, [[0], list(range(1, len(graph.layers)))])
    (first, second) = (partition.stage_module(0), partition.stage_module(1))
    assert [value.name for value in partition.edges[0, 1]] == ["embedding.weight", "embedding"]
    assert [name for name, _ in first.module.named_parameters()] == ["embedding.weight"]
    assert [name for name, _ in second.module.named_parameters()] == ["inner.weight", "inner.bias"]


def test_impossible_stages() -> None:
    model, arguments = built("u-net")
    graph = capture(model, arguments)
    with pytest.raises(PipedreamError, match="no stage has layer 'last'"):
        Partition(graph, [[0, 1, 2, 3, 4, 5, 6, 7]])
    with pytest.raises(PipedreamError, match="layer 'relu' is in stages 0 and 1"):
        Partition(graph, [[0, 1], [1, 2, 3, 4, 5, 6, 7, 8]])
    with pytest.raises(
        PipedreamError, match="layer 'relu' in stage 0 needs layer 'first', which is in the later stage 1"
    ):
        Partition(graph, [[1, 2, 3], [0, 4, 5, 6, 7, 8]])


class Arguments(nn.Module):
    def forward(self, x: torch.Tensor, scale: float = 2.0, mask: torch.Tensor | None = None) -> torch.Tensor:
        return x * scale if mask is None else x * scale * mask


def test_example_inputs_as_tuples_and_mappings() -> None:
    assert list(capture(Arguments(), FLOATS).inputs.named()) == ["x"]
    assert list(capture(Arguments(), {"mask": FLOATS, "x": FLOATS}).inputs.named()) == ["mask", "x"]
    with pytest.raises(
        PipedreamError, match=r"Arguments.forward takes 1 to 3 inputs \(x, scale, mask\), but example_inputs has 4"
    ):
        capture(Arguments(), (FLOATS, FLOATS, FLOATS, FLOATS))
