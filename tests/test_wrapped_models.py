"""Models that stand for others: compiled, replicated, sharded, scripted, quantized. They train, or are refused.

The reference is plain torch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import pytest
import torch
from torch import distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import distribute_tensor

from pipedream_hpc import PipedreamError, Pipeline

SGD = partial(torch.optim.SGD, lr=0.1)
DATA = [(torch.randn(4, 6), torch.randint(0, 2, (4,))) for _ in range(3)]
Wrap = Callable[[nn.Module], nn.Module]


class Outer(nn.Module):
    def __init__(self, wrap: Wrap) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.inner, self.last = nn.Linear(6, 6), wrap(block()), nn.Linear(6, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.last(self.inner(self.first(x)))
        return y


def block() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6))


def pipeline_of(model: nn.Module | Callable[[], nn.Module]) -> Pipeline:
    return Pipeline(
        model,
        loss_fn=nn.CrossEntropyLoss(),
        optimizer=SGD,
        example_inputs=DATA[0][0],
        plan=2,
        schedule="1f1b-flush",
    )


def compiled_in_place(model: nn.Module) -> nn.Module:
    model.compile(backend="eager")
    return model


@pytest.mark.parametrize(
    "wrap", [lambda model: torch.compile(model, backend="eager"), compiled_in_place, torch.fx.symbolic_trace]
)
def test_what_trains_inside_a_model(wrap: Wrap) -> None:
    net = Outer(lambda model: model)
    steps = SGD(net.parameters())
    for inputs, target in DATA:
        steps.zero_grad()
        nn.functional.cross_entropy(net(inputs), target).backward()
        steps.step()
    with pipeline_of(Outer(wrap)) as pipeline:
        pipeline.fit(DATA)
        found = {name.replace("_orig_mod.", ""): value for name, value in pipeline.state_dict().items()}
    assert found.keys() == net.state_dict().keys()
    assert all(torch.equal(value, found[name]) for name, value in net.state_dict().items())


@pytest.fixture(scope="module")
def one_process() -> Iterator[None]:
    """A process group of torch's, which some wrappers need."""
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


def sharded(model: nn.Module) -> nn.Module:
    fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
    return model


def of_distributed_tensors(model: nn.Module) -> nn.Module:
    linear = model.get_submodule("0")
    assert isinstance(linear, nn.Linear)
    linear.weight = nn.Parameter(distribute_tensor(linear.weight.detach(), init_device_mesh("cpu", (1,))))
    return model


REFUSED: dict[str, tuple[Wrap, str]] = {
    "DataParallel": (nn.DataParallel, r"is wrapped in DataParallel: give the module in it \(\.module\)"),
    "DDP": (nn.parallel.DistributedDataParallel, "is wrapped in DistributedDataParallel: give the module in it"),
    "FSDP": (
        partial(FullyShardedDataParallel, device_id=torch.device("cpu")),
        r"is sharded by FSDP \(FullyShardedDataParallel\): give it as it is before",
    ),
    "FSDP2": (sharded, r"is sharded by FSDP \(FSDPSequential\): give it as it is before"),
    "scripted": (torch.jit.script, r"is TorchScript \(RecursiveScriptModule, .* give the Python module"),
    "traced": (lambda model: torch.jit.trace(model, DATA[0][0]), r"is TorchScript \(TopLevelTracedModule, from"),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused_as_a_model_and_in_one(name: str, one_process: None) -> None:
    wrap, words = REFUSED[name]
    with pytest.raises(PipedreamError, match=f"the model {words}"):
        pipeline_of(wrap(block()))
    with pytest.raises(PipedreamError, match=f"module 'inner' {words}"):
        pipeline_of(Outer(wrap))


def test_distributed_tensors_are_refused(one_process: None) -> None:
    with pytest.raises(PipedreamError, match=r"weight 'weight' of module 'inner\.0' is a DTensor"):
        pipeline_of(Outer(of_distributed_tensors))


def test_a_compiled_model_is_refused() -> None:
    words = r"the model is compiled \(torch.compile, .* TrainConfig\(compile_backend='inductor'\)"
    with pytest.raises(PipedreamError, match=words):
        pipeline_of(torch.compile(block()))  # type: ignore[arg-type]
    with pytest.raises(PipedreamError, match=words):
        pipeline_of(lambda: torch.compile(block()))  # type: ignore[arg-type, return-value]


def test_a_model_without_values_is_refused() -> None:
    with pytest.raises(PipedreamError, match=r"'0\.weight' of the model is on the meta device and has no values"):
        pipeline_of(block().to("meta"))


@pytest.mark.filterwarnings("ignore")
def test_a_quantized_model_is_refused() -> None:
    quantized = torch.ao.quantization.quantize_dynamic(block(), {nn.Linear})
    with pytest.raises(
        PipedreamError, match=r"the model \(Sequential\) is quantized and has no weights to train: give"
    ):
        pipeline_of(quantized)
