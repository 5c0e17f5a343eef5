"""Models are captured as layers; those that cannot be captured are refused with a clear message."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import chains
import pytest
import torch
from torch import nn

from pipedream_hpc.errors import PipedreamError
from pipedream_hpc.model.capture import capture
from pipedream_hpc.model.counting import count
from pipedream_hpc.model.partition import Partition
from pipedream_hpc.model.stage_module import writable
from pipedream_hpc.profiling.profiler import measure


class Residual(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(x + self.second(torch.relu(self.first(x))))


class Branching(nn.Module):
    """Control flow that depends on values."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(12, 12)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x) if x.sum() > 0 else x


class Scaled(nn.Module):
    """A weight used by name twice, and a reshape that reads the batch size."""

    def __init__(self) -> None:
        super().__init__()
        self.scale, self.last = nn.Parameter(torch.full((1,), 2.0)), nn.Linear(12, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.view(x.size(0), -1) * self.scale
        return self.last(x) * self.scale


def layer_names(model: nn.Module) -> list[str]:
    return [layer.name for layer in capture(model, chains.example()).layers]


def test_a_chain_has_one_layer_per_module() -> None:
    assert layer_names(nn.Sequential(nn.Linear(12, 4), nn.ReLU(), nn.Sequential(nn.Linear(4, 4)))) == ["0", "1", "2.0"]


def test_a_block_has_a_layer_per_module_with_the_cheap_operations_after_it() -> None:
    graph = capture(nn.Sequential(nn.Linear(12, 12), Residual(12)), chains.example())
    assert [layer.name for layer in graph.layers] == ["0", "1.first", "1.second", "add", "relu_1"]
    assert graph.edges == ((0, 1), (0, 3), (1, 2), (2, 3), (3, 4))
    assert [call.name for call in graph.layers[1].calls] == ["1.first", "relu"]
    assert graph.layers[1].parameters == ("1.first.weight", "1.first.bias")
    assert graph.layers[1].parameter_bytes == 4 * (12 * 12 + 12)


def test_a_module_called_twice_is_two_layers_with_the_same_weights() -> None:
    shared = nn.Linear(12, 12)
    graph = capture(nn.Sequential(shared, nn.Tanh(), shared), chains.example())
    assert [layer.name for layer in graph.layers] == ["0", "1", "0@2"]


def test_a_weight_used_by_name_and_a_reshape() -> None:
    model = Scaled()
    graph = capture(model, chains.example())
    # The view is of the model's argument alone: every stage that needs it computes it.
    assert [layer.name for layer in graph.layers] == ["mul", "last", "mul_1"]
    second = Partition(graph, [[0], [1, 2]]).stage_module(1)
    assert sorted(name for name, _ in second.module.named_parameters()) == ["last.bias", "last.weight"]


def test_capturing_and_measuring_leave_the_model_unchanged() -> None:
    model = chains.rich_model()
    example = torch.randn(8, 12)
    before, rng = {k: v.clone() for k, v in model.state_dict().items()}, torch.get_rng_state()
    graph = capture(model, example)
    measure(graph, example, minibatches=2)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), rng)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_stage_may_write_into_its_input() -> None:
    graph = capture(nn.Sequential(nn.Linear(12, 2), nn.Flatten(), nn.ReLU(inplace=True)), chains.example())
    stage = Partition(graph, [[0], [1, 2]]).stage_module(1)
    assert stage.written_inputs == {0}, "written through a view"
    leaf = torch.tensor([[-1.0, 2.0]], requires_grad=True)
    stage.run(None, [writable(leaf)])[1].sum().backward()
    assert leaf.grad is not None
    assert leaf.grad.tolist() == [[0.0, 1.0]]


def test_counting_is_deterministic_and_a_convolution_costs_more_than_a_relu() -> None:
    first, second = (count(capture(chains.rich_model(), chains.example())) for _ in range(2))
    assert first == second
    times = {layer.name: layer.forward_s for layer in first.layers}
    assert times["4"] > times["3"] > 0  # a convolution and a ReLU


def test_a_profile_has_shapes_bytes_and_positive_times() -> None:
    graph = capture(chains.plain_model(), chains.example())
    profile = measure(graph, torch.randn(8, 12), minibatches=3, model="plain")
    linear = profile.layers[0]
    assert (linear.output_shape, linear.output_dtype, linear.output_bytes) == ((8, 16), "float32", 8 * 16 * 4)
    assert linear.parameter_bytes == 4 * (12 * 16 + 16)
    assert linear.stash_bytes == 8 * 12 * 4  # its input, for the weight's gradient
    assert all(layer.forward_s > 0 and layer.backward_s > 0 for layer in profile.layers)


def test_a_module_whose_python_reads_values_is_kept_whole() -> None:
    model = nn.Sequential(nn.Linear(12, 12), Branching(), nn.Linear(12, 5))
    graph = capture(model, chains.example())
    assert [layer.name for layer in graph.layers] == ["0", "1", "2"]
    assert graph.closed == {
        "1": "its Python reads the values of a tensor (`return self.inner(x) if x.sum() > 0 else x`)"
    }


class Gaussian(nn.Module):
    def __init__(self, *, validate: bool) -> None:
        super().__init__()
        self.inner, self.validate = nn.Linear(12, 12), None if validate else False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.distributions.Normal(self.inner(x), 1.0, validate_args=self.validate).log_prob(x)


def test_distributions_check_their_arguments_by_value() -> None:
    line = "return torch.distributions.Normal(self.inner(x), 1.0, ..."
    assert capture(Gaussian(validate=False), chains.example()).closed == {}
    assert capture(Gaussian(validate=True), chains.example()).closed[""] == (
        f"its Python reads the values of a tensor (`{line}`, which reads none if it is given validate_args=False, "
        "or in a model of a library after torch.distributions.Distribution.set_default_validate_args(False))"
    )


class Dropping(nn.Module):
    """Layers that are dropped at random, as an attribute says."""

    def __init__(self, rate: float, draw: Callable[[], Any]) -> None:
        super().__init__()
        self.layers, self.rate, self.draw = nn.ModuleList(nn.Linear(12, 12) for _ in range(3)), rate, draw

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            if self.draw() < self.rate:
                continue
            x = layer(x)
        return x


def _in_place() -> torch.Tensor:
    number = torch.ones(())
    number += torch.rand(())
    return number - 1


def _by_index() -> torch.Tensor:
    numbers = torch.zeros(2)
    numbers[0] = torch.rand(())
    return numbers[0]


@pytest.mark.parametrize(
    ("rate", "draw", "is_open"),
    [
        (1e-9, lambda: torch.rand([]), False),  # not by luck: it is all but never dropped
        (0.5, lambda: (1 - torch.rand(1)).sqrt(), False),
        (0.5, lambda: torch.rand(1).item(), False),
        (0.5, lambda: torch.empty(1).uniform_(), False),
        (0.5, lambda: torch.randn(1), False),
        (1e-9, _in_place, False),
        (1e-9, _by_index, False),
        (0.5, random.random, False),
        (0.0, lambda: torch.rand([]), True),
        (0.0, lambda: (1 - torch.rand(1)).sqrt(), True),
    ],
)
def test_a_container_that_decides_by_random_numbers_is_kept_whole(
    rate: float, draw: Callable[[], Any], *, is_open: bool
) -> None:
    model = nn.Sequential(nn.Linear(12, 12), Dropping(rate, draw), nn.Linear(12, 5))
    graph = capture(model, chains.example())
    if is_open:
        assert graph.closed == {}
        assert [layer.name for layer in graph.layers] == ["0", "1.layers.0", "1.layers.1", "1.layers.2", "2"]
    else:
        assert [layer.name for layer in graph.layers] == ["0", "1", "2"]
        assert "random numbers" in graph.closed["1"]


def test_a_number_that_depends_on_draws_but_on_no_path_leaves_a_container_open() -> None:
    class Scaled(Dropping):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x * torch.rand([]))

    assert capture(nn.Sequential(Scaled(0.0, lambda: 1)), chains.example()).closed == {}


class TwoInputs(nn.Module):
    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return x + y


def test_every_argument_needs_an_example_input() -> None:
    with pytest.raises(PipedreamError, match=r"TwoInputs\.forward takes 2 inputs \(x, y\), but example_inputs has 1"):
        capture(TwoInputs(), chains.example())


def test_example_inputs_that_do_not_fit() -> None:
    with pytest.raises(PipedreamError, match=r"does not accept example_inputs of shape \(2, 9\) and dtype float32"):
        capture(nn.Linear(8, 8), torch.zeros(2, 9))
    graph = capture(nn.Linear(8, 8), torch.zeros(2, 8))
    with pytest.raises(PipedreamError, match=r"example_inputs has shape \(3, 8\) of torch.float32, but"):
        measure(graph, torch.zeros(3, 8))
    with pytest.raises(PipedreamError, match="minibatches is 0: profile at least 1"):
        measure(graph, torch.zeros(2, 8), minibatches=0)


# --- writes in place ------------------------------------------------------------------------------


class Writing(nn.Module):
    """A statement that writes into `h` in place, and whose result is unused."""

    def __init__(self, write: Callable[[torch.Tensor], Any]) -> None:
        super().__init__()
        self.first, self.second, self.relu = nn.Linear(12, 12), nn.Linear(12, 5), nn.ReLU(inplace=True)
        self.write = write

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.first(x)
        if self.write is None:
            self.relu(h)
        else:
            self.write(h)
        return self.second(h)


@pytest.mark.parametrize(
    "write",
    [
        lambda h: h.add_(1.0),
        nn.functional.relu_,
        lambda h: nn.functional.relu(h, inplace=True),
        torch.relu_,
        lambda h: h.add_(1.0).mul_(2.0),
        None,
    ],
    ids=["method", "function", "argument", "torch", "chain", "module"],
)
def test_a_write_in_place_is_kept_although_its_result_is_unused(write: Any) -> None:
    model, x = Writing(write), torch.randn(4, 12)
    graph = capture(model, x)
    whole = Partition(graph, [list(range(len(graph.layers)))]).stage_module(0)
    assert torch.equal(whole.run(graph.inputs.like(x), [])[1], model(x))


def test_a_write_into_a_view_stays_in_the_stage_of_what_it_is_a_view_of() -> None:
    model, x = Writing(lambda h: h.view(-1, 3).add_(1.0)), torch.randn(4, 12)
    graph = capture(model, x)
    assert [layer.name for layer in graph.layers] == ["first", "second"]
    first, second = (Partition(graph, [[0], [1]]).stage_module(index) for index in range(2))
    sent, _ = first.run(graph.inputs.like(x), [])
    assert torch.equal(second.run(None, sent)[1], model(x))


class Sampled(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * float(torch.multinomial(torch.ones(4), 2).sum())


def test_a_model_given_as_a_function_that_needs_values() -> None:
    words = (
        r"^a model given as a function is captured without values, but `return x \* float\(torch\.multinomial\("
        r".*` in module '1' needs them: pass the built model$"
    )
    with pytest.raises(PipedreamError, match=words):
        capture(lambda: nn.Sequential(nn.Linear(4, 4), Sampled()), torch.zeros(2, 4), [Sampled])
