"""The whole model's state dict: gathered from stages, and loaded into them from a dict or a safetensors file."""

from __future__ import annotations

import copy
import json
import struct
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import chains
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from pipedream_hpc import Pipeline, ScheduleConfig, TrainConfig
from pipedream_hpc.cluster.world import World
from pipedream_hpc.errors import PipedreamError
from pipedream_hpc.model.capture import capture
from pipedream_hpc.model.graph import LayerGraph
from pipedream_hpc.model.materialize import materialize
from pipedream_hpc.model.partition import Partition
from pipedream_hpc.runtime.state import load_state_dict
from pipedream_hpc.runtime.state.full_state_dict import full_state_dict
from pipedream_hpc.runtime.state.load_state_dict import load_full_state_dict
from pipedream_hpc.runtime.weights.optimizer_step import StageOptimizer
from pipedream_hpc.runtime.weights.stage_state import StageState
from pipedream_hpc.runtime.weights.stash import WeightStash

ALONE = World(0, 1, 0, 1, "n1")
Weights = dict[str, torch.Tensor]


class Model(nn.Module):
    """BatchNorm buffers, a weight with two names within a stage, one that nobody uses, and a frozen one."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Linear(4, 4), nn.BatchNorm1d(4)
        self.last, self.again = nn.Linear(4, 4), nn.Linear(4, 4)
        self.again.weight = self.last.weight
        self.first.bias.requires_grad_(False)
        self.unused = nn.Parameter(torch.randn(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.again(self.last(self.norm(self.first(x))))


#: What the two stages of the model have, cut after the norm.
STAGE_0 = {"first.weight", "first.bias", *(f"norm.{name}" for name in nn.BatchNorm1d(4).state_dict())}
STAGE_1 = {"last.weight", "last.bias", "again.weight", "again.bias"}


def build() -> Model:
    torch.manual_seed(0)
    return Model()


def stages_of(graph: LayerGraph, *, optimizer: Any = None, master_weights: bool = False) -> list[StageState]:
    """Cut after the norm: two stages with two weight versions each."""
    partition = Partition(graph, [[0, 1], [2, 3]])
    modules = [partition.stage_module(index) for index in range(2)]
    materialize(graph, modules)
    states = []
    for index, part in enumerate(modules):
        factory = optimizer or partial(torch.optim.SGD, lr=0.1)
        stash = WeightStash(part.module, 2, factory, master_weights=master_weights, entries=part.entries)
        states.append(StageState(index, 0, part.module, stash, StageOptimizer(stash.optimizer)))
    return states


def changed(model: nn.Module) -> Weights:
    """Return a state dict with other values."""
    return {name: value + 1 for name, value in model.state_dict().items()}


def saved(weights: Weights, folder: Path) -> Path:
    """Save weights as a safetensors file."""
    path = folder / "weights.safetensors"
    save_file({name: value.detach().clone() for name, value in weights.items()}, path)
    return path


def in_shards(weights: Weights, folder: Path) -> Path:
    """Save weights in two files with an index, as transformers' save_pretrained does."""
    file_of = {name: f"model-0000{1 + number % 2}-of-00002.safetensors" for number, name in enumerate(weights)}
    for file in set(file_of.values()):
        save_file({name: weights[name].detach().clone() for name in weights if file_of[name] == file}, folder / file)
    path = folder / "model.safetensors.index.json"
    path.write_text(json.dumps({"metadata": {"total_size": 0}, "weight_map": file_of}))
    return path


def as_given(form: str, weights: Weights, folder: Path) -> Weights | Path:
    """Return the weights as a dict, a file, the index of several, or the folder of these."""
    if form == "dict":
        return weights
    if form == "file":
        return saved(weights, folder)
    index = in_shards(weights, folder)
    return index if form == "index" else folder


in_every_form = pytest.mark.parametrize("form", ["dict", "file", "index", "folder"])


def assert_equal(found: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert [name for name in expected if not torch.equal(found[name], expected[name])] == []


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The tensors that are read from safetensors files, in order."""
    names: list[str] = []
    real = load_state_dict.safe_open

    class Counting:
        def __init__(self, *arguments: Any, **options: Any) -> None:
            self.opened = real(*arguments, **options)

        def __enter__(self) -> Counting:
            self.file = self.opened.__enter__()
            return self

        def __exit__(self, *error: Any) -> None:
            self.opened.__exit__(*error)

        def __getattr__(self, name: str) -> Any:
            return getattr(self.file, name)

        def get_tensor(self, name: str) -> torch.Tensor:
            names.append(name)
            return self.file.get_tensor(name)

    monkeypatch.setattr(load_state_dict, "safe_open", Counting)
    return names


# -- gathering -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", [build(), build], ids=["a module", "a function"])
def test_a_gathered_state_dict_has_every_name_of_the_model(model: Any) -> None:
    graph = capture(model, torch.zeros(2, 4))
    assert_equal(full_state_dict(ALONE, graph, stages_of(graph)), build().state_dict())


def test_rank_0_gathers_the_first_replica_of_every_stage() -> None:
    """rank   holds                  sends
    0      stage 0                stage 0
    1      stage 1, replica 0     stage 1
    2      stage 1, replica 1     nothing: it has the same weights
    """
    graph = capture(build(), torch.zeros(2, 4))
    first, second = stages_of(graph)
    replica = StageState(1, 1, second.module, second.stash, second.optimizer)
    sent: list[Weights] = []

    class Comm:
        def gather(self, own: Weights, root: int) -> list[Weights] | None:
            sent.append(own)
            return list(sent) if len(sent) == 3 else None

    def gathered(rank: int, stage: StageState) -> Weights:
        return full_state_dict(World(rank, 3, rank, 3, "n1", Comm()), graph, [stage])

    assert gathered(2, replica) == {}
    assert gathered(1, second) == {}
    assert_equal(gathered(0, first), build().state_dict())
    assert [set(own) for own in sent] == [set(), STAGE_1, STAGE_0]


@pytest.mark.parametrize("model", [build(), build], ids=["a module", "a function"])
def test_optimizer_factories_get_the_models_own_names_and_attributes(model: Any) -> None:
    def marked() -> nn.Module:
        made = build()
        made.norm.weight.no_decay = True  # type: ignore[assignment]
        return made

    graph = capture(marked() if isinstance(model, nn.Module) else marked, torch.zeros(2, 4))
    seen: dict[str, bool] = {}

    def optimizer(parameters: Any) -> torch.optim.Optimizer:
        given = list(parameters)
        seen.update({each.qualified_name: getattr(each, "no_decay", False) for each in given})
        return torch.optim.SGD(given, lr=0.1)

    stages_of(graph, optimizer=optimizer)
    names = ["first.weight", "norm.weight", "norm.bias", "last.weight", "last.bias", "again.bias"]
    assert seen == {name: name == "norm.weight" for name in names}


# -- loading ---------------------------------------------------------------------------------------------------------


@in_every_form
@pytest.mark.parametrize("model", [build, lambda: build], ids=["a module", "a function"])
def test_loaded_weights_are_the_newest_version_and_stay(model: Any, form: str, tmp_path: Path) -> None:
    graph = capture(model(), torch.zeros(2, 4))
    states, weights = stages_of(graph), changed(build())
    load_full_state_dict(graph, states, as_given(form, weights, tmp_path))
    assert_equal(full_state_dict(ALONE, graph, states), weights)
    for state in states:  # a step into the other slab; the frozen bias has its value there, too
        state.stash.update([torch.zeros_like(each) for each in state.stash.trained])
    assert_equal(full_state_dict(ALONE, graph, states), weights)


@in_every_form
@pytest.mark.parametrize("dropped", ["last.weight", "again.weight"])
def test_a_shared_weight_is_loaded_under_any_of_its_names(dropped: str, form: str, tmp_path: Path) -> None:
    """As safetensors' save_model saves it: once."""
    graph = capture(build(), torch.zeros(2, 4))
    states, weights = stages_of(graph), changed(build())
    once = {name: value for name, value in weights.items() if name != dropped}
    load_full_state_dict(graph, states, as_given(form, once, tmp_path))
    assert_equal(full_state_dict(ALONE, graph, states), weights)


@pytest.mark.parametrize("files", [saved, in_shards])
@pytest.mark.parametrize(("stage", "own"), [(0, STAGE_0), (1, STAGE_1)])
@pytest.mark.parametrize(("model", "unused"), [(build, {"unused"}), (lambda: build, set())], ids=["module", "function"])
def test_only_the_tensors_of_own_stages_are_read_from_a_file(
    stage: int, own: set[str], model: Any, unused: set[str], files: Any, reads: list[str], tmp_path: Path
) -> None:
    graph = capture(model(), torch.zeros(2, 4))
    load_full_state_dict(graph, [stages_of(graph)[stage]], files(changed(build()), tmp_path), keeps_unused=False)
    assert sorted(reads) == sorted((own - {"again.weight"}) | unused), "a weight with two names is read once"


@pytest.mark.parametrize("model", [build, lambda: build], ids=["a module", "a function"])
def test_what_is_loaded_is_a_copy(model: Any) -> None:
    """Also of a weight that no stage uses."""
    graph, weights = capture(model(), torch.zeros(2, 4)), changed(build())
    states = stages_of(graph)
    load_full_state_dict(graph, states, weights)
    for value in weights.values():
        value.zero_()
    assert_equal(full_state_dict(ALONE, graph, states), changed(build()))


def test_dtypes_are_converted() -> None:
    graph = capture(build(), torch.zeros(2, 4))
    states, weights = stages_of(graph), changed(build())
    load_full_state_dict(graph, states, {name: value.double() for name, value in weights.items()})
    assert_equal(full_state_dict(ALONE, graph, states), weights)


def test_master_weights_are_made_anew_from_the_loaded_weights() -> None:
    """A step without a gradient rounds the master: an old one would bring the old weight back."""
    graph = capture(build().bfloat16(), torch.zeros(2, 4, dtype=torch.bfloat16))
    states = stages_of(graph, master_weights=True)

    def step(value: float) -> None:
        for state in states:
            state.stash.update([torch.full_like(each, value) for each in state.stash.trained])

    step(0.01)
    weights = {name: (value * 3).to(value.dtype) for name, value in build().bfloat16().state_dict().items()}
    load_full_state_dict(graph, states, weights)
    step(0.0)
    assert_equal(full_state_dict(ALONE, graph, states), weights)


@in_every_form
@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda given: given.pop("norm.running_mean"), "lacks 'norm.running_mean': load the state dict of this model"),
        (lambda given: [given.pop(name) for name in STAGE_0], "lacks 'first.bias' and 6 more"),
        (lambda given: [given.pop(f"{name}.weight") for name in ("last", "again")], "lacks 'again.weight' and 1 more"),
        (lambda given: given.update(head=torch.zeros(1)), "has unknown 'head': load the state dict"),
        (
            lambda given: given.update(head=given.pop("last.bias")),
            "lacks 'last.bias' and has unknown 'head': load the state dict",
        ),
        (
            lambda given: given.update({"last.bias": torch.zeros(5)}),
            r"'last.bias' in .* has shape \(5,\), but the model's has \(4,\): load",
        ),
        (
            lambda given: given.update({"norm.running_var": torch.zeros(4, 1)}),
            r"'norm.running_var' in .* has shape \(4, 1\), but the model's has \(4,\): load",
        ),
    ],
)
def test_another_models_weights_are_refused_and_nothing_changes(
    change: Callable[[Weights], Any], words: str, form: str, reads: list[str], tmp_path: Path
) -> None:
    graph = capture(build(), torch.zeros(2, 4))
    states, weights = stages_of(graph), changed(build())
    change(weights)
    in_dict = "^the state dict|in the state dict"
    where = {"dict": in_dict, "file": "weights.safetensors", "index": "index.json", "folder": str(tmp_path)}[form]
    with pytest.raises(PipedreamError, match=words) as refused:
        load_full_state_dict(graph, states, as_given(form, weights, tmp_path))
    assert refused.match(where)
    assert_equal(full_state_dict(ALONE, graph, states), build().state_dict())
    assert reads == []


@pytest.mark.parametrize("dropped", ["last.weight", "again.weight"])
@pytest.mark.parametrize("given", ["index", "folder"])
def test_from_several_files_only_the_tensors_of_own_stages_are_read(
    given: str, dropped: str, reads: list[str], tmp_path: Path
) -> None:
    """A weight with two names is in the files once."""
    graph, weights = capture(build(), torch.zeros(2, 4)), changed(build())
    once = {name: value for name, value in weights.items() if name != dropped}
    path = in_shards(once, tmp_path)
    states = stages_of(graph)
    load_full_state_dict(graph, states[1:], path if given == "index" else tmp_path)
    kept = ({"last.weight", "again.weight"} - {dropped}).pop()
    assert sorted(reads) == sorted([kept, "last.bias", "again.bias", "unused"])
    load_full_state_dict(graph, states[:1], path)
    assert_equal(full_state_dict(ALONE, graph, states), weights)


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (
            lambda index: (index.parent / "model-00002-of-00002.safetensors").unlink(),
            r"model-00002-of-00002\.safetensors, which .*index\.json names: no such file",
        ),
        (lambda index: index.write_text("{}"), r"index\.json: is not the index of safetensors files: it has no 'we"),
        (lambda index: index.write_text('{"weight_map": 3}'), r"index\.json: is not the index of safetensors files"),
        (lambda index: index.write_text("weights"), r"index\.json: is not the index of safetensors files"),
        (
            lambda index: index.unlink(),
            r"has model-00001-of-00002\.safetensors and model-00002-of-00002\.safetensors: say which",
        ),
        (
            lambda index: index.write_text(index.read_text().replace("model-00001", "model-00002")),
            r"index\.json: '.*' is not in model-00002-of-00002\.safetensors: save the weights again",
        ),
        (
            lambda index: in_shards({**changed(build()), "head": torch.zeros(1)}, index.parent),
            "has unknown 'head': load the state dict of this model",
        ),
    ],
)
def test_several_files_that_do_not_fit(spoil: Callable[[Path], Any], words: str, tmp_path: Path) -> None:
    graph = capture(build(), torch.zeros(2, 4))
    states = stages_of(graph)
    spoil(in_shards(changed(build()), tmp_path))
    with pytest.raises(PipedreamError, match=words):
        load_full_state_dict(graph, states, tmp_path)
    assert_equal(full_state_dict(ALONE, graph, states), build().state_dict())


def truncated(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def of_another_format(path: Path) -> None:
    path.write_bytes(b"PK\x03\x04 not safetensors")


def with_a_wrong_header(path: Path) -> None:
    path.write_bytes(struct.pack("<Q", 1 << 40) + path.read_bytes()[8:])


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (Path.unlink, r"weights\.safetensors: no such file: give a safetensors file, the index of several"),
        (truncated, r"weights\.safetensors: cannot be read as a safetensors file"),
        (of_another_format, r"weights\.safetensors: cannot be read as a safetensors file"),
        (with_a_wrong_header, r"weights\.safetensors: cannot be read as a safetensors file"),
        (lambda path: (path.unlink(), path.mkdir()), r"weights\.safetensors has no safetensors file: give one"),
    ],
)
def test_a_file_that_cannot_be_read(spoil: Callable[[Path], Any], words: str, tmp_path: Path) -> None:
    graph = capture(build(), torch.zeros(2, 4))
    states, path = stages_of(graph), saved(changed(build()), tmp_path)
    spoil(path)
    with pytest.raises(PipedreamError, match=words):
        load_full_state_dict(graph, states, str(path))
    assert_equal(full_state_dict(ALONE, graph, states), build().state_dict())


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (3, "load_state_dict takes a dict of tensors, or a safetensors file, index or folder, not int"),
        ({"first.weight": [1.0]}, "'first.weight' in the state dict is list, not a tensor"),
    ],
)
def test_neither_tensors_nor_a_file(given: Any, words: str) -> None:
    graph = capture(build(), torch.zeros(2, 4))
    with pytest.raises(PipedreamError, match=words):
        load_full_state_dict(graph, stages_of(graph), given)


# -- with a pipeline, against plain torch ----------------------------------------------------------------------------


@in_every_form
@pytest.mark.parametrize("plan", ["1", "1-1-1", "2-1"])
def test_an_evaluation_after_loading_is_that_of_plain_torch(plan: str, form: str, tmp_path: Path) -> None:
    torch.set_num_threads(1)
    data = chains.minibatches(3)
    plain = chains.rich_model()
    plain.load_state_dict({name: value * 2 for name, value in plain.state_dict().items()})
    plain.eval()
    with torch.no_grad():
        losses = [float(nn.functional.cross_entropy(plain(x), y)) for x, y in data]
    with pipeline(chains.rich_model(), plan) as held:
        held.load_state_dict(as_given(form, plain.state_dict(), tmp_path))
        assert held.evaluate(data)["loss"] == sum(losses) / len(losses)


def pipeline(model: nn.Module, plan: str, **options: Any) -> Pipeline:
    return Pipeline(
        model,
        loss_fn=nn.CrossEntropyLoss(),
        optimizer=partial(torch.optim.SGD, lr=0.05, momentum=0.9),
        example_inputs=chains.example(),
        plan=plan,
        **options,
    )


@in_every_form
@pytest.mark.parametrize("model", ["plain", "half"])
def test_training_after_loading_is_that_of_plain_torch(model: str, form: str, tmp_path: Path) -> None:
    """Two minibatches, other weights, three more minibatches: the momentum stays. Without a minibatch in flight."""
    torch.set_num_threads(1)
    data = chains.minibatches(5)
    plain = chains.MODELS[model]()
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.05, momentum=0.9)
    other = {name: value * 1.5 for name, value in plain.state_dict().items()}

    def train(minibatches: list[tuple[torch.Tensor, torch.Tensor]]) -> float:
        losses = []
        for x, y in minibatches:
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(plain(x), y)
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
        return sum(losses) / len(losses)

    with pipeline(chains.MODELS[model](), "1-1-1", schedule=ScheduleConfig("model-parallel")) as held:
        assert held.fit(data[:2]) == train(data[:2])
        held.load_state_dict(as_given(form, copy.deepcopy(other), tmp_path))
        plain.load_state_dict(other)
        assert held.fit(data[2:]) == train(data[2:])
        assert_equal(held.state_dict(), plain.state_dict())


def test_loaded_counters_of_running_statistics_are_those_of_all_replicas() -> None:
    """Loaded: 100 minibatches. Then seven more in two replicas of the BatchNorm."""
    with pipeline(chains.rich_model(), "2-1", train_config=TrainConfig(seed=1)) as held:
        weights = held.state_dict()
        weights["2.num_batches_tracked"].fill_(100)
        held.load_state_dict(weights)
        held.fit(chains.minibatches(7))
        assert held.state_dict()["2.num_batches_tracked"] == 107
