"""The check before training: of the whole model where rank 0 has room for it, and of each stage where it has not."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import user_programs as programs
from torch import nn
from zoo import ZOO

from pipedream_hpc import PipedreamError, Pipeline, ScheduleConfig, TrainConfig
from pipedream_hpc.cluster.memory import available_bytes
from pipedream_hpc.model.capture import capture
from pipedream_hpc.model.graph import LayerGraph
from pipedream_hpc.model.materialize import materialize, materialized
from pipedream_hpc.model.partition import Partition
from pipedream_hpc.model.preserve_state import preserve_state
from pipedream_hpc.runtime.launch import start
from pipedream_hpc.runtime.launch.check_model import why_not_whole
from pipedream_hpc.runtime.launch.same_stage import check_stage

CPU = torch.device("cpu")


@pytest.fixture
def no_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let no host have room for a whole model."""
    monkeypatch.setattr(start, "available_bytes", lambda: 1000)


def pipeline_of(model: Any, plan: Any = 2, **options: Any) -> Pipeline:
    n_microbatches = options.pop("n_microbatches", 1)
    return Pipeline(
        model,
        loss_fn=programs.LOSS,
        optimizer=programs.SGD,
        example_inputs=programs.minibatches()[0][0],
        plan=plan,
        schedule=ScheduleConfig("1f1b-flush", n_microbatches),
        train_config=TrainConfig(**options),
    )


class Dropped(programs.Net):
    def __init__(self) -> None:
        super().__init__()
        self.drop, self.norm = nn.Dropout(0.5), nn.BatchNorm1d(16)

    def forward(self, x: torch.Tensor) -> Any:
        return self.c(self.norm(self.drop(self.b(self.a(x)))))


# -- microbatches ------------------------------------------------------------------------------------------------------


class Several(programs.Net):
    """Returns a tensor, and a list as `listed` makes it."""

    def __init__(self, listed: Callable[[torch.Tensor], Any]) -> None:
        super().__init__()
        self.listed = listed

    def forward(self, x: torch.Tensor) -> Any:
        y = super().forward(x)
        return {"y": y, "list": self.listed(y)}


def test_an_output_may_be_a_list_with_an_item_for_each_sample() -> None:
    batches = programs.minibatches()
    for listed in (lambda y: list(y), lambda y: [(each, each[:2]) for each in y], lambda y: [y, y]):
        with Pipeline(
            Several(listed),
            loss_fn=lambda output, target: programs.LOSS(output["y"], target),
            optimizer=programs.SGD,
            example_inputs=batches[0][0],
            plan=2,
            schedule=ScheduleConfig("1f1b-flush", 2),
        ) as pipeline:
            pipeline.fit(batches)


@pytest.mark.parametrize(
    ("listed", "how"),
    [
        (lambda y: y @ y.T, r"in a tensor of shape \(8, 8\), which is \(4, 4\) and \(4, 4\) for the microbatches"),
        (lambda y: y - y.mean(0), "by up to "),
        (lambda y: list(y - y.mean(0)), "by up to "),
    ],
)
def test_a_sample_must_not_see_another(listed: Any, how: str) -> None:
    words = f"output for a minibatch differs from that for its 2 microbatches {how}.*: no sample may see another"
    with pytest.raises(PipedreamError, match=words):
        pipeline_of(Several(listed), n_microbatches=2)


# -- a model given as a function ---------------------------------------------------------------------------------------


def fickle() -> Callable[[], nn.Module]:
    """Return a function that builds a model whose forward computes something else at each call, and how is not seen."""
    seen = threading.local()
    seen.calls = 0

    class Fickle(programs.Net):
        def forward(self, x: torch.Tensor) -> Any:
            seen.calls += 1
            return self.c(self.b(self.a(x)).tanh() * seen.calls)

    return Fickle


def test_the_whole_model_is_built_and_checked() -> None:
    words = (
        "the stages do not compute what the model computes by itself: in training the output differs by up to .*, and "
        "the first module whose output differs is 'c': keep the modules whole"
    )
    with pytest.raises(PipedreamError, match=words):
        pipeline_of(fickle())
    pipeline_of(fickle(), check_model=False)


def test_each_stage_is_checked_where_there_is_no_room(no_memory: None) -> None:
    with pytest.raises(PipedreamError, match="stage 1 does not compute what its modules compute by themselves: in tr"):
        pipeline_of(fickle())
    pipeline_of(fickle(), check_model=False)


def test_nothing_is_said_where_the_whole_model_was_checked() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pipeline_of(programs.Net, n_microbatches=2)
        pipeline_of(programs.Net())


def test_rank_0_says_in_one_line_what_was_not_checked(no_memory: None) -> None:
    with pytest.warns(UserWarning, match="each stage was checked by itself") as caught:
        pipeline_of(programs.Net, n_microbatches=2)
    (warning,) = caught
    text = str(warning.message)
    assert text.endswith(
        "unchecked is that the stages together compute what the model computes, that a minibatch gives what its "
        "microbatches give, and that the function builds the same model at every call and on every rank"
    )
    assert "more than half of the 0.0 GB that the host of rank 0 has left" in text
    assert "\n" not in text


def test_one_stage_without_microbatches_needs_no_check(no_memory: None) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pipeline_of(programs.Net, 1)


def test_a_built_model_is_checked_as_a_whole_anyway(no_memory: None) -> None:
    with pytest.raises(PipedreamError, match="the stages do not compute what the model computes by itself"):
        pipeline_of(fickle()())


@pytest.mark.filterwarnings("ignore:each stage was checked by itself")
@pytest.mark.parametrize("memory", [1000, 1 << 40])
@pytest.mark.parametrize("build", [programs.NoGrad, programs.hook, programs.lora, Dropped])
def test_the_check_changes_nothing(build: Any, memory: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A checked model trains what a plain loop trains, from the same weights."""
    monkeypatch.setattr(start, "available_bytes", lambda: memory)
    pipeline, batches = pipeline_of(build), programs.minibatches()
    pipeline.fit(batches)
    trained, expected = pipeline.state_dict(), programs.plain(build(), batches)
    if build is not Dropped:  # which draws other masks than a plain loop
        assert [name for name, value in expected.items() if not torch.equal(trained[name], value)] == []
    unchecked = pipeline_of(build, check_model=False)
    unchecked.fit(batches)
    assert [name for name, value in unchecked.state_dict().items() if not torch.equal(trained[name], value)] == []


# -- one stage ---------------------------------------------------------------------------------------------------------


def checked(build: Callable[[], nn.Module], example: Any, stages: Callable[[int], list[list[int]]]) -> list[str]:
    """Check every stage of a model of which only that stage has weights; return why some could not be checked."""
    reasons, graph = [], capture(build, example)
    layers = stages(len(graph.layers))
    for index in range(len(layers)):
        graph = capture(build, example) if index else graph
        partition = Partition(graph, layers)
        stage = partition.stage_module(index)
        materialize(graph, [stage])
        reasons.append(check(graph, partition, index, stage, example))
        assert any(each.is_meta for each in graph.module.parameters())
    return [each for each in reasons if each]


def check(graph: LayerGraph, partition: Partition, index: int, stage: Any, example: Any) -> str:
    arguments = graph.inputs.like(example)
    return check_stage(partition, index, stage, arguments, seed=0, precision=None, device=CPU)


def halves(n_layers: int) -> list[list[int]]:
    return [list(range(n_layers // 2)), list(range(n_layers // 2, n_layers))]


def each_alone(n_layers: int) -> list[list[int]]:
    return [[layer] for layer in range(n_layers)]


@pytest.mark.parametrize("stages", [halves, each_alone])
@pytest.mark.parametrize(
    "build",
    [
        *(programs.NoGrad, programs.Decorated, programs.Detached, programs.ReversedInAModule, programs.Auxiliary),
        *(programs.ReversedInTheForward, programs.Checkpointed, programs.Masks, programs.Policy, programs.hook),
        *(programs.inner_hook, programs.backward_hook, programs.patched, programs.lora, programs.spectral),
        *(programs.pruned, partial(programs.Noisy, "bernoulli_"), partial(programs.Noisy, "dropout")),
    ],
)
def test_stages_of_all_kinds_of_programs_pass(build: Callable[[], nn.Module], stages: Any) -> None:
    assert checked(build, programs.minibatches()[0][0], stages) == []


@pytest.mark.parametrize("name", ZOO)
def test_stages_of_the_zoo_pass(name: str) -> None:
    assert checked(ZOO[name].build, ZOO[name].example(), halves) == []


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("shape", (8, 15), r"in training 'b' is float32 \(8, 16\), but float32 \(8, 15\) when it was captured"),
        ("dtype", torch.float64, r"in training 'b' is float32 \(8, 16\), but float64 \(8, 16\) when it was captured"),
        ("needs_gradient", False, "in training 'b' depends on trained weights, but did not when it was captured"),
    ],
)
def test_what_was_recorded_differently_is_found(field: str, value: Any, message: str) -> None:
    example = programs.minibatches()[0][0]
    graph = capture(programs.Net(), example)
    partition = Partition(graph, [[0], [1, 2, 3]])
    stage = partition.stage_module(1)
    assert check(graph, partition, 1, stage, example) == ""
    call = next(each for each in graph.training.calls if each.name == "b")
    call.values = (replace(call.values[0], **{field: value}),)
    with pytest.raises(PipedreamError, match=f"stage 1 does not compute what its modules .*: {message}"):
        check(graph, partition, 1, stage, example)


def test_a_gradient_of_a_weight_that_no_call_was_seen_to_use_is_found() -> None:
    example = programs.minibatches()[0][0]
    graph = capture(programs.Net(), example)
    partition = Partition(graph, [[0], [1, 2, 3]])
    call = next(each for each in graph.training.calls if each.name == "b")
    call.parameters = ("b.weight",)
    with pytest.raises(PipedreamError, match=r"in training 'b\.bias' gets a gradient, but no call of the stage"):
        check(graph, partition, 1, partition.stage_module(1), example)


def test_a_stage_that_runs_whole_modules_differently_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stage that takes the modules of a chain in another order than the model."""
    example = programs.minibatches()[0][0]
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 3))
    graph = capture(model, example)
    partition = Partition(graph, [[0, 1, 2, 3], [4]])
    stage = partition.stage_module(0)
    assert stage._forwards[True]._direct is not None
    steps, number = stage._forwards[True]._direct
    stage._forwards[True]._direct = [steps[0], steps[2], steps[1], steps[3]], number
    with pytest.raises(PipedreamError, match=r"in training output 0 differs|in training the output differs"):
        check(graph, partition, 0, stage, example)


class Picky(nn.Module):
    """Refuses values that the layer before never puts out."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if bool((x > 0).any()):
            raise ValueError("positive numbers")
        return x


class Logarithm(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.log(x - 2)


@pytest.mark.parametrize(
    ("build", "reason"),
    [
        (
            lambda: nn.Sequential(nn.Linear(6, 6), nn.Softplus(), nn.Threshold(9.0, -1.0), Picky(), nn.Linear(6, 3)),
            "stage 1 cannot run on random inputs (positive numbers)",
        ),
        (
            lambda: nn.Sequential(nn.Linear(6, 6), nn.Sigmoid(), nn.Hardtanh(3, 4), Logarithm(), nn.Linear(6, 3)),
            "stage 1 computes no finite numbers from random inputs",
        ),
    ],
)
def test_stages_that_cannot_bear_random_numbers_are_named(build: Any, reason: str) -> None:
    graph = capture(build(), programs.minibatches()[0][0])
    first = [layer.name for layer in graph.layers].index("2") + 1
    partition = Partition(graph, [list(range(first)), list(range(first, len(graph.layers)))])
    example = programs.minibatches()[0][0]
    assert check(graph, partition, 1, partition.stage_module(1), example) == reason


def test_modules_are_not_watched_after_a_check() -> None:
    graph = capture(programs.Net(), programs.minibatches()[0][0])
    partition = Partition(graph, [[0], [1, 2, 3]])
    stage = partition.stage_module(1)
    before = {name for name, module in graph.module.named_modules() if "_compiled_call_impl" in vars(module)}
    check(graph, partition, 1, stage, programs.minibatches()[0][0])
    assert before == {n for n, module in graph.module.named_modules() if "_compiled_call_impl" in vars(module)}


# -- room for the whole model ------------------------------------------------------------------------------------------


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.rnn, self.b = nn.Linear(6, 6), nn.GRU(6, 6, batch_first=True), nn.Linear(6, 6)
        self.b.weight = self.a.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.b(self.rnn(self.a(x)[:, None])[0][:, 0])  # type: ignore[no-any-return]


def test_all_weights_are_there_in_a_block_and_gone_after_it() -> None:
    graph = capture(Tied, torch.zeros(2, 6))
    before = dict(graph.module.named_parameters())
    with materialized(graph):
        found, expected = graph.module.state_dict(), Tied().state_dict()
        assert [name for name, value in expected.items() if not torch.equal(found[name], value)] == []
        assert graph.module.a.weight is graph.module.b.weight
        assert all(not each.is_meta for each in graph.module.rnn._flat_weights)
        with preserve_state(graph.module):
            assert torch.equal(graph.module(torch.ones(2, 6)), Tied()(torch.ones(2, 6)))
    assert all(each.is_meta for each in graph.module.parameters())
    assert all(before[name] is each for name, each in graph.module.named_parameters())
    assert all(each.is_meta for each in graph.module.rnn._flat_weights)


def test_what_decides_whether_the_whole_model_is_built() -> None:
    def build() -> nn.Module:
        return nn.Sequential(*(nn.Linear(1000, 1000, bias=False) for _ in range(10)))

    graph = capture(build, torch.zeros(100, 1000))
    needed = 3 * 40_000_000 + 2 * 10 * 400_000  # weights, gradients of both runs, outputs of both runs
    assert why_not_whole(graph, 2 * needed, 300.0) == ""
    assert why_not_whole(graph, 2 * needed - 2, 300.0) == (
        "it takes 0.1 GB with its gradients, more than half of the 0.3 GB that the host of rank 0 has left"
    )
    assert "could take rank 0" in why_not_whole(graph, 2 * needed, 0.01)
    assert why_not_whole(capture(build(), torch.zeros(100, 1000)), 0, 0.01) == ""


def tree(folder: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


MEMINFO = {"proc/meminfo": "MemTotal: 4000 kB\nMemAvailable: 2000 kB\n", "proc/self/cgroup": ""}
V1, V2 = "4:memory:/job\n0::/\n", "0::/job/task\n"


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, 0),
        (MEMINFO, 2_048_000),
        ({**MEMINFO, "proc/self/cgroup": V2}, 2_048_000),
        # version 2: the limit of a job binds its tasks; page cache is given back
        (
            {
                **MEMINFO,
                "proc/self/cgroup": V2,
                "cgroup/job/memory.max": "9000\n",
                "cgroup/job/memory.current": "5000\n",
                "cgroup/job/memory.stat": "anon 10\ninactive_file 700\n",
                "cgroup/job/task/memory.max": "max\n",
            },
            4700,
        ),
        # version 1
        (
            {
                **MEMINFO,
                "proc/self/cgroup": V1,
                "cgroup/memory/job/memory.limit_in_bytes": "9000\n",
                "cgroup/memory/job/memory.usage_in_bytes": "9500\n",
                "cgroup/memory/job/memory.stat": "total_inactive_file 0\n",
            },
            0,
        ),
        # in a container, where the path is the host's
        (
            {
                **MEMINFO,
                "proc/self/cgroup": "0::/elsewhere/deep\n",
                "cgroup/memory.max": "600\n",
                "cgroup/memory.current": "100\n",
                "cgroup/memory.stat": "inactive_file 1\n",
            },
            501,
        ),
    ],
)
def test_memory_that_is_left(files: dict[str, str], expected: int, tmp_path: Path) -> None:
    tree(tmp_path, files)
    assert available_bytes(tmp_path / "proc", tmp_path / "cgroup") == expected


def test_memory_of_this_host() -> None:
    assert available_bytes() > 1 << 20
