"""j: what crosses a boundary: objects, parameters, strides, sparse tensors, and what a forward asks of it."""

from __future__ import annotations

import types
from collections import namedtuple
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from user_programs import (
    LOSS,
    SGD,
    Net,
    Objects,
    Out,
    Policy,
    assert_trained_alike,
    cut,
    minibatches,
    pipeline_of,
    plain,
)

from pipedream_hpc import PipedreamError
from pipedream_hpc.model.arguments import Arguments
from pipedream_hpc.model.capture import capture
from pipedream_hpc.model.partition import Partition


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


class Experts(nn.Module):
    """Gives every row to the expert that its own values choose, in one of several ways."""

    def __init__(self, how: str, n_experts: int = 3) -> None:
        super().__init__()
        self.how, self.router = how, nn.Linear(6, n_experts)
        self.experts = nn.ModuleList(nn.Linear(6, 6) for _ in range(n_experts))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        choice = self.router(x)
        best, y = choice.argmax(-1), torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            if self.how == "counts nonzero":
                rows = (best == number).nonzero().squeeze(-1)
                if len(rows):
                    y = y.index_add(0, rows, expert(x[rows]))
            elif self.how == "counts what a mask selects":
                if x[best == number].shape[0]:
                    y[best == number] = expert(x[best == number])
            elif self.how == "counts where":
                (rows,) = torch.where(best == number)
                if rows.numel() > 0:
                    y = y.index_copy(0, rows, expert(x.index_select(0, rows)))
            elif self.how == "counts the chosen":
                if number in best.unique():
                    y = y + expert(x) * (best == number)[:, None]
            elif self.how == "never asks":
                rows = (best == number).nonzero().squeeze(-1)
                y = y.index_add(0, rows, expert(x[rows]).tanh() * choice[rows, number, None])
            elif self.how == "selects":
                chosen = (best == number)[:, None].expand_as(x)
                y = y.masked_scatter(chosen, expert(x.masked_select(chosen).view(-1, 6)))
            elif self.how == "repeats":
                rows = torch.arange(len(x)).repeat_interleave((best == number).long())
                y = y.index_add(0, rows, expert(x[rows]))
        return x + y * choice.softmax(-1).amax(-1, keepdim=True)


class Block(nn.Module):
    def __init__(self, how: str) -> None:
        super().__init__()
        self.before, self.experts = nn.Linear(6, 6), Experts(how)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.experts(self.before(x).tanh())


def mixture(how: str) -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(*(Block(how) for _ in range(3)), nn.Linear(6, 3))


@pytest.mark.parametrize(
    "how",
    [
        *("counts nonzero", "counts what a mask selects", "counts where", "counts the chosen"),
        *("never asks", "selects", "repeats"),
    ],
)
def test_a_mixture_of_experts_of_sizes_that_values_choose(how: str) -> None:
    batches = minibatches(6)
    graph = capture(mixture(how), batches[0][0])
    with_experts = [layer for layer in graph.layers if any(".experts.experts." in name for name in layer.parameters)]
    # Where Python asks nothing of them, several stages may have the experts of a block.
    assert len(with_experts) == 3 or "counts" not in how
    assert any(layer.name == "1.before" for layer in graph.layers), "the block is opened"
    for plan in (2, 4):
        assert_trained_alike(lambda: mixture(how), plan, batches)


class CountsItself(nn.Module):
    """A model whose own forward decides by how many rows were chosen."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers, self.head = nn.ModuleList(nn.Linear(6, 6) for _ in range(3)), nn.Linear(6, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            rows = (x[:, 0] > 0).nonzero().squeeze(-1)
            if len(rows) > 2:
                x = layer(x)
            x = x.index_add(0, rows, layer(x[rows]))
        return self.head(x)  # type: ignore[no-any-return]


class CountsInTheEnd(Net):
    def forward(self, x: torch.Tensor) -> Any:
        out = super().forward(x)
        sure = out[out.softmax(-1).amax(-1) > 0.4]
        return out + sure.sum() / max(len(sure), 1)


def test_a_model_that_itself_counts_what_values_choose() -> None:
    batches = minibatches(6)
    with pytest.raises(
        PipedreamError, match=r"cannot be cut, .* asks how many values were chosen \(`if len\(rows\) > 2"
    ):
        pipeline_of(CountsItself(), 2, batches)
    for plan in (2, 3):
        assert_trained_alike(CountsInTheEnd, plan, batches)


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


class WritesArguments(Net):
    """Scales its input in place, and uses it in the first and in the last layers."""

    def forward(self, x: torch.Tensor) -> Any:
        x.mul_(0.5)
        return self.c(self.b(self.a(x)).tanh() + x.sum(1, keepdim=True))


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("plan", [1, 2, 3])
def test_a_forward_may_write_into_its_arguments(plan: int, recompute: bool) -> None:
    batches = minibatches()

    class Made(torch.utils.data.Dataset[Any]):
        def __len__(self) -> int:
            return len(batches)

        def __getitem__(self, index: int) -> Any:
            return tuple(each.clone() for each in batches[index])

    loader = torch.utils.data.DataLoader(Made(), batch_size=None)
    reference, model = WritesArguments(), WritesArguments()
    steps = SGD(reference.parameters())
    pipeline = pipeline_of(model, plan, minibatches(), recompute=recompute)
    for _ in range(2):
        pipeline.fit(loader)
        for x, y in loader:
            steps.zero_grad()
            LOSS(reference(x), y).backward()
            steps.step()
    expected = reference.state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in pipeline.state_dict().items())
    with pytest.raises(
        PipedreamError, match="forward writes into its arguments, which a list of minibatches would keep"
    ):
        pipeline.fit(minibatches())


def test_minibatches_of_a_forward_that_writes_in_evaluation_alone_may_be_a_list() -> None:
    """Dropout gives new values in training; in evaluation, what follows it writes into the minibatch."""
    model = nn.Sequential(nn.Dropout(0.5), nn.Tanh(), nn.Linear(6, 3))
    model.insert(1, nn.ReLU(inplace=True))
    pipeline = pipeline_of(model, 2, minibatches())
    pipeline.fit(minibatches())
    with pytest.raises(PipedreamError, match="forward writes into its arguments"):
        pipeline.evaluate(minibatches())


def policy_loss(output: Any, target: torch.Tensor) -> torch.Tensor:
    return LOSS(output[0], target) + output[1].square().sum()


@pytest.mark.parametrize("plan", [1, 2, 3])
def test_a_parameter_that_is_returned_is_trained(plan: int) -> None:
    assert_trained_alike(Policy, plan, loss_fn=policy_loss)


Named = namedtuple("Named", "last pooled")


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


def test_a_model_that_reads_values_itself_cannot_be_cut() -> None:
    class Reads(Net):
        def forward(self, x: torch.Tensor) -> Any:
            y = self.a(x)
            return self.c(self.b(-y if y.sum() > 0 else y))

    with pytest.raises(PipedreamError, match=r"cannot be cut, because its Python reads the values of a tensor"):
        pipeline_of(Reads(), 2, minibatches())
    assert_trained_alike(Reads, 1)


class Counts(Net):
    """Calls modules alone, and asks another stage's tensor for its size."""

    def forward(self, x: torch.Tensor) -> Any:
        h = self.a(x)
        samples = h.shape[0]
        return self.c(self.b(h)), samples


@pytest.mark.parametrize("plan", [1, 2, 3])
def test_a_forward_of_modules_alone_may_ask(plan: int) -> None:
    batches, seen = minibatches(2) + minibatches(1, samples=5), []

    def loss_fn(output: Any, target: torch.Tensor) -> torch.Tensor:
        seen.append(output[1])
        return LOSS(output[0], target) * output[1]

    pipeline = pipeline_of(Counts(), plan, batches, loss_fn)
    pipeline.fit(batches)
    assert seen == [8, 8, 5]
    expected = plain(Counts(), batches, loss_fn)
    assert all(torch.equal(pipeline.state_dict()[name], value) for name, value in expected.items())


class Tied(Net):
    """Uses a weight of an early module in a late function."""

    def forward(self, x: torch.Tensor) -> Any:
        h = self.b(self.a(x)).tanh()
        return self.c(nn.functional.linear(h, self.b.weight).tanh())


@pytest.mark.parametrize("plan", [1, 2, 3, 4])
def test_a_weight_that_two_stages_use_is_trained(plan: int) -> None:
    batches = minibatches()
    pipeline = pipeline_of(Tied(), plan, batches)
    pipeline.fit(batches)
    # Its gradient is a sum, which stages add up in another order.
    torch.testing.assert_close(pipeline.state_dict(), plain(Tied(), batches), rtol=1e-6, atol=1e-7)


class Decides(nn.Module):
    """Leaves out the layer that its user says."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers, self.skips = nn.ModuleList(nn.Linear(6, 6) for _ in range(4)), -1

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for number, layer in enumerate(self.layers):
            if number != self.skips:
                x = layer(x).tanh()
        return x[:, :3]


class Outer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = Decides()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.body(x).exp()  # type: ignore[no-any-return]


def test_another_path_is_refused_with_its_module_and_line() -> None:
    model, batches = Outer(), minibatches()
    pipeline = pipeline_of(model, 2, batches)
    pipeline.fit(batches)
    model.body.skips = 0
    words = (
        r"module 'body' of class Decides \(`x = layer\(x\).tanh\(\)` in .*test_user_values.py, line \d+\) called "
        r"module 'body.layers.1' where 'body.layers.0' had been called: .*leaf_modules=\[Decides\]"
    )
    with pytest.raises(PipedreamError, match=words):
        pipeline.fit(batches)


@pytest.mark.parametrize("where", ["body.layers.3", "body.layers.0", "body"])
def test_modules_that_are_replaced_are_refused(where: str) -> None:
    model, batches = Outer(), minibatches()
    pipeline = pipeline_of(model, 2, batches)
    pipeline.fit(batches)
    model.set_submodule(where, nn.Linear(6, 6))
    with pytest.raises(PipedreamError, match=rf"'{where}' of class \w+ has been replaced .* make a new pipeline"):
        pipeline.fit(batches)
    with pytest.raises(PipedreamError, match="has been replaced"):
        pipeline.evaluate(batches)


class DrawsInEvaluation(Net):
    def forward(self, x: torch.Tensor) -> Any:
        return super().forward(x + torch.rand_like(x))


def test_microbatches_of_a_model_that_draws_in_evaluation() -> None:
    with pytest.raises(PipedreamError, match=r"differs .* as it draws random numbers in evaluation mode: let it"):
        cut(DrawsInEvaluation(), minibatches())


class Packed(nn.Module):
    """Packs sequences of several lengths in its own forward."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.head = nn.Linear(6, 8), nn.Linear(16, 3)
        self.lstm = nn.LSTM(8, 8, bidirectional=True, batch_first=True)

    def forward(self, x: torch.Tensor, lengths: torch.Tensor) -> Any:
        rnn = nn.utils.rnn
        packed = rnn.pack_padded_sequence(self.embed(x), lengths, batch_first=True, enforce_sorted=False)
        hidden, _ = rnn.pad_packed_sequence(self.lstm(packed)[0], batch_first=True, total_length=x.size(1))
        return self.head(hidden.tanh()).mean(1)


@pytest.mark.parametrize("plan", [2, 3])
def test_packed_sequences(plan: int) -> None:
    draw = torch.Generator().manual_seed(7)
    batches = [
        ((torch.randn(8, 5, 6, generator=draw), torch.randint(shortest, 6, (8,), generator=draw)), y)
        for shortest, (_, y) in zip((5, 1, 1, 2, 1), minibatches(), strict=True)
    ]
    model, reference = Packed(), Packed()
    pipeline = pipeline_of(model, plan, batches)
    pipeline.fit(batches)
    steps = SGD(reference.parameters())
    for inputs, y in batches:
        steps.zero_grad()
        LOSS(reference(*inputs), y).backward()
        steps.step()
    expected = reference.state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in pipeline.state_dict().items())
