"""The run over MPI = the run in one process = plain autograd with the paper's equation, bit for bit."""

from __future__ import annotations

import gc
import math

import chains
import pytest
import torch
import training
from torch import nn
from training import Report, Training, assert_bitwise

from pipedream_hpc.job import OptimizerFactory, accuracy
from pipedream_hpc.runtime.pipeline import Pipeline
from pipedream_hpc.schedule.trace import Trace
from pipedream_hpc.verification import reference
from pipedream_hpc.verification.rounding import correct_square_roots

FEWER_THAN_STAGES = [(1,), (2, 3), (1, 2)]

TRAININGS = {
    **{
        f"{n} {name}": Training(n, optimizer=name, epochs=(40, 40, 40))
        for n in (1, 2, 3, 4)
        for name in chains.OPTIMIZERS
    },
    **{f"4 {epochs}": Training(4, epochs=epochs) for epochs in FEWER_THAN_STAGES},
    **{f"{n} attentive": Training(n, model="attentive", optimizer="adam", epochs=(6, 6), last=3) for n in (2, 3)},
    **{f"{n} rich": Training(n, model="rich", epochs=(9, 9), last=3) for n in (2, 4)},
    "4 draining": Training(4, epochs=(7, 3, 7)),
    "4 allocating": Training(4, epochs=(20, 20, 20)),
}


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def launched() -> dict[str, Report]:
    """Reports by name: all trainings on as many ranks as their plans have stages."""
    found: dict[str, Report] = {}
    for stages in (1, 2, 3, 4):
        names = [name for name, each in TRAININGS.items() if each.plan == stages]
        found.update(zip(names, training.on_ranks(stages, [TRAININGS[name] for name in names]), strict=True))
    return found


def pipeline_of(
    stages: int,
    model: nn.Module | None = None,
    optimizer: OptimizerFactory = chains.OPTIMIZERS["sgd"],
    example: torch.Tensor | None = None,
    schedule: str | None = None,
) -> Pipeline:
    return Pipeline(
        chains.rich_model() if model is None else model,
        loss_fn=nn.CrossEntropyLoss(),
        optimizer=optimizer,
        example_inputs=chains.example() if example is None else example,
        plan=stages,
        schedule=schedule,
    )


def by_reference(training: Training) -> dict[str, torch.Tensor]:
    """Return the weights by the reference; the model is the plain one."""
    return reference.train(
        chains.plain_model(),
        pipeline_of(len(training.replicas), chains.plain_model()).stage_of_parameters(),
        training.minibatches,
        nn.CrossEntropyLoss(),
        chains.OPTIMIZERS[training.optimizer],
    )


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
@pytest.mark.parametrize("stages", [1, 2, 3, 4])
def test_three_epochs_of_forty_minibatches(stages: int, optimizer: str, launched: dict[str, Report]) -> None:
    name = f"{stages} {optimizer}"
    on_ranks, emulated = launched[name], training.in_one_process(TRAININGS[name])
    assert_bitwise(emulated.weights, by_reference(TRAININGS[name]))
    assert_bitwise(on_ranks.weights, emulated.weights)
    assert on_ranks.scores == emulated.scores


@pytest.mark.parametrize("epochs", FEWER_THAN_STAGES)
def test_fewer_minibatches_than_stages(epochs: tuple[int, ...], launched: dict[str, Report]) -> None:
    name = f"4 {epochs}"
    on_ranks, emulated = launched[name], training.in_one_process(TRAININGS[name])
    assert_bitwise(emulated.weights, by_reference(TRAININGS[name]))
    assert_bitwise(on_ranks.weights, emulated.weights)
    assert len(on_ranks.losses) == len(epochs)
    assert not any(map(math.isnan, on_ranks.losses))


def test_stashing_differs_from_plain_sgd() -> None:
    """The reference would be worthless if staleness changed nothing."""
    stale, plain = by_reference(Training(4, epochs=(10,))), by_reference(Training(1, epochs=(10,)))
    assert any(not torch.equal(stale[name], plain[name]) for name in plain)


@pytest.mark.parametrize(
    "name",
    [
        *(pytest.param(f"{n} attentive", id=f"dropout in attention and as a function, {n} stages") for n in (2, 3)),
        *(pytest.param(f"{n} rich", id=f"BatchNorm, writes in place, a short minibatch, {n} stages") for n in (2, 4)),
    ],
)
def test_random_numbers_and_buffers(name: str, launched: dict[str, Report]) -> None:
    on_ranks, emulated = launched[name], training.in_one_process(TRAININGS[name])
    assert_bitwise(on_ranks.weights, emulated.weights)
    assert on_ranks.losses == emulated.losses
    if "rich" in name:
        assert on_ranks.weights["2.num_batches_tracked"] == 18  # buffers have no versions


@pytest.mark.parametrize("schedule", ["model-parallel", "1f1b-flush", "gpipe", "zb-h1"])
@pytest.mark.parametrize("stages", [1, 2, 3, 4])
def test_a_schedule_without_staleness_is_plain_training_with_batchnorm(stages: int, schedule: str) -> None:
    """The reference is an ordinary training loop over the user's own module; every minibatch is one microbatch."""
    model, plain = chains.rich_model(), chains.rich_model()
    for each in (model, plain):
        for module in each.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0  # the plain loop draws other masks
            if isinstance(module, nn.ReLU):
                module.inplace = False  # dropout with p = 0 returns its input, which autograd keeps
    pipeline = pipeline_of(stages, model, chains.OPTIMIZERS["adam"], schedule=schedule)
    batches = chains.minibatches(12, last=5)
    pipeline.fit(batches, epochs=2)
    optimizer = chains.OPTIMIZERS["adam"](plain.parameters())
    with correct_square_roots():
        for inputs, target in [*batches, *batches]:
            optimizer.zero_grad()
            nn.CrossEntropyLoss()(plain(inputs), target).backward()
            optimizer.step()
    assert_bitwise(pipeline.state_dict(), dict(plain.state_dict()))


# In every epoch the versions are counted anew. Microbatch k of stage s runs on version k - (stages behind s).
SEVEN = """
rank 0: F0v0 F1v0 F2v0 F3v0 B0v0 F4v1 B1v0 F5v2 B2v0 F6v3 B3v0 B4v1 B5v2 B6v3
rank 1: F0v0 F1v0 F2v0 B0v0 F3v1 B1v0 F4v2 B2v0 F5v3 B3v1 F6v4 B4v2 B5v3 B6v4
rank 2: F0v0 F1v0 B0v0 F2v1 B1v0 F3v2 B2v1 F4v3 B3v2 F5v4 B4v3 F6v5 B5v4 B6v5
rank 3: F0v0 B0v0 F1v1 B1v1 F2v2 B2v2 F3v3 B3v3 F4v4 B4v4 F5v5 B5v5 F6v6 B6v6
"""
THREE = """
rank 0: F0v0 F1v0 F2v0 B0v0 B1v0 B2v0
rank 1: F0v0 F1v0 F2v0 B0v0 B1v0 B2v0
rank 2: F0v0 F1v0 B0v0 F2v1 B1v0 B2v1
rank 3: F0v0 B0v0 F1v1 B1v1 F2v2 B2v2
"""


def drawn(trace: Trace) -> str:
    """Return the versions that forwards and backwards ran on, one line per rank, as in SEVEN."""
    lines = []
    for rank in sorted(trace.stages_of):
        spans = sorted((s for s in trace.spans if s.rank == rank), key=lambda span: span.start_s)
        ran = [s for s in spans if s.kind in ("forward", "backward")]
        lines.append(f"rank {rank}: " + " ".join(f"{s.kind[0].upper()}{s.microbatch}v{s.version}" for s in ran))
    return "\n" + "\n".join(lines) + "\n"


def test_the_timeline_of_versions_across_the_drain_between_epochs(launched: dict[str, Report]) -> None:
    """Every backward runs on the version of its forward."""
    for report in (training.in_one_process(TRAININGS["4 draining"]), launched["4 draining"]):
        assert [drawn(trace) for trace in report.traces] == [SEVEN, THREE, SEVEN]


def test_slabs_are_those_in_flight_and_nothing_is_allocated_after_warm_up(launched: dict[str, Report]) -> None:
    report = launched["4 allocating"]
    assert report.slabs == {0: 4, 1: 3, 2: 2, 3: 1}
    for rank, counts in enumerate(report.allocations):
        assert len(set(counts)) == 1, f"rank {rank} allocated between epochs: {counts}"


def test_dropout_masks_do_not_depend_on_the_plan() -> None:
    """With weights that never move, every plan must see the same losses."""

    def losses(stages: int) -> list[float]:
        pipeline = pipeline_of(
            stages,
            nn.Sequential(*chains.rich_model()[6:]),
            lambda parameters: torch.optim.SGD(parameters, lr=0.0),
            torch.zeros(8, 4, 3, 4),
        )
        batches = [(torch.ones(8, 4, 3, 4), torch.zeros(8, dtype=torch.long))] * 5
        return [pipeline.fit(batches) for _ in range(2)]

    first = losses(1)
    assert first[0] != first[1], "each minibatch draws masks of its own"
    assert losses(2) == first == losses(3)


def test_evaluation_leaves_everything_as_it_was() -> None:
    pipeline = pipeline_of(3)
    batches = chains.minibatches(5)
    pipeline.fit(batches)
    before, rng = pipeline.state_dict(), torch.get_rng_state()
    assert pipeline.evaluate(batches) == pipeline.evaluate(batches)
    assert_bitwise(pipeline.state_dict(), before)
    assert torch.equal(torch.get_rng_state(), rng)


def test_evaluation_is_that_of_the_whole_model() -> None:
    pipeline = pipeline_of(4)
    batches = chains.minibatches(6, last=2)
    pipeline.fit(batches)
    whole = chains.rich_model()
    whole.load_state_dict(pipeline.state_dict())
    whole.eval()
    hits = sum(int((whole(x).argmax(1) == y).sum()) for x, y in batches)
    found = pipeline.evaluate(batches, {"accuracy": accuracy})
    assert found == {"accuracy": pytest.approx(hits / sum(len(y) for _, y in batches), abs=1e-7)}


def test_no_tensor_of_a_minibatch_is_left_behind() -> None:
    """As many tensors live after ten epochs as after two: no graph, activation or gradient stays."""
    pipeline = pipeline_of(4)
    batches, living = chains.minibatches(5), []
    for epochs in (2, 8):
        for _ in range(epochs):
            pipeline.fit(batches)
        gc.collect()
        living.append(sum(issubclass(type(each), torch.Tensor) for each in gc.get_objects()))
    assert living[0] == living[1] > 0
