"""A run that stops and resumes is bitwise the run that never stopped; damaged checkpoints are skipped."""

from __future__ import annotations

import json
import pickle
import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import chains
import pytest
import ranks
import torch
import training
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from training import Training, assert_bitwise

from pipedream_hpc import Pipeline, ScheduleConfig, TrainConfig
from pipedream_hpc.errors import PipedreamError
from pipedream_hpc.runtime.state import checkpoint


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def pipeline(
    plan: str = "2-1",
    optimizer: str = "adam",
    model: str = "rich",
    schedule: ScheduleConfig | None = None,
    **train_options: Any,
) -> Pipeline:
    return Pipeline(
        chains.MODELS[model](),
        loss_fn=nn.CrossEntropyLoss(),
        optimizer=chains.OPTIMIZERS[optimizer],
        example_inputs=chains.example(),
        plan=plan,
        schedule=schedule,
        train_config=TrainConfig(
            lr_scheduler=partial(torch.optim.lr_scheduler.StepLR, step_size=7, gamma=0.5), **train_options
        ),
    )


def trained(held: Pipeline, epochs: int, folder: Path | None = None) -> list[float]:
    """Train; write a checkpoint into `folder` after every epoch."""
    losses = []
    for _ in range(epochs):
        losses.append(held.fit(chains.minibatches(7, last=3)))
        if folder is not None:
            held.save_checkpoint(folder)
    return losses


@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
@pytest.mark.parametrize(
    ("plan", "more"),
    [
        ("1-1-1", {}),
        ("2-1", {}),
        ("1-1", {"schedule": ScheduleConfig("gpipe", 2)}),
        ("1-1", {"model": "half", "master_weights": True}),
    ],
)
def test_a_resumed_run_is_the_run_that_never_stopped(
    plan: str, more: dict[str, Any], optimizer: str, tmp_path: Path
) -> None:
    uninterrupted = pipeline(plan, optimizer, **more)
    expected = trained(uninterrupted, 4)
    assert trained(pipeline(plan, optimizer, **more), 2, tmp_path) == expected[:2]
    second = pipeline(plan, optimizer, **more)
    assert second.resume(tmp_path) == 2
    assert trained(second, 2, tmp_path) == expected[2:]
    assert_bitwise(second.state_dict(), uninterrupted.state_dict())


def test_on_ranks(tmp_path: Path) -> None:
    """Two epochs on ranks, then two more in another launch: the same as four epochs in one process."""
    decay = TrainConfig(lr_scheduler=partial(torch.optim.lr_scheduler.ExponentialLR, gamma=0.9))
    whole = Training((2, 1), train_config=decay, model="rich", epochs=(7,) * 4, last=3)
    half = replace(whole, epochs=(7, 7), checkpoints=str(tmp_path / "kept"))
    training.on_ranks(3, [replace(half, resumed=0)])
    (resumed,) = training.launched(3, [replace(half, resumed=2)], tmp_path)
    expected = training.in_one_process(whole)
    assert_bitwise(resumed.weights, expected.weights)
    assert resumed.losses == expected.losses[2:]


def damage(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-5] ^= 255
    path.write_bytes(bytes(content))


def rewritten(field: str, value: Any) -> Callable[[Path], None]:
    """Return a function that changes a field of the manifest."""

    def spoil(folder: Path) -> None:
        path = folder / "manifest.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), field: value}))

    return spoil


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda folder: (folder / "stage-1.safetensors").unlink(), r"stage-1\.safetensors: is missing"),
        (lambda folder: damage(folder / "stage-0.safetensors"), "is damaged: its checksum is wrong"),
        (lambda folder: (folder / "stage-0.safetensors").write_bytes(b"no"), r"stage-0\.safetensors: is damaged"),
        (lambda folder: (folder / "manifest.json").unlink(), r"manifest\.json: cannot be read"),
        (lambda folder: (folder / "manifest.json").write_text("{"), r"manifest\.json: is not JSON"),
        (
            rewritten("epoch", -7),
            r"manifest\.json: field 'epoch': input should be greater than or equal to 0 \(got -7\)",
        ),
        (rewritten("epoch", 1), r"manifest\.json: is not the manifest of this epoch"),
        (rewritten("files", []), r"manifest\.json: is not the manifest of this epoch and these stages"),
    ],
)
def test_a_damaged_or_incomplete_checkpoint_is_skipped_with_the_reason(spoil: Any, words: str, tmp_path: Path) -> None:
    trained(pipeline(), 2, tmp_path)
    spoil(tmp_path / "epoch-00002")
    with pytest.warns(UserWarning, match=words):
        assert pipeline().resume(tmp_path) == 1


def test_nothing_to_resume_from(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert pipeline().resume(tmp_path / "new") == 0


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("file", r"file is no folder: resume from the folder that save_checkpoint \(--checkpoints\) was given"),
        ("other", "other holds no checkpoints, but 'notes' and 1 more: resume from"),
        ("run/epoch-00001", "epoch-00001 is one checkpoint: resume from the folder"),
    ],
)
def test_what_exists_and_is_no_folder_of_checkpoints_is_refused(path: str, words: str, tmp_path: Path) -> None:
    trained(pipeline(), 1, tmp_path / "run")
    (tmp_path / "file").write_text("")
    (tmp_path / "other" / "notes").mkdir(parents=True)
    (tmp_path / "other" / "weights").write_text("")
    (tmp_path / "empty").mkdir()
    with pytest.raises(PipedreamError, match=words):
        pipeline().resume(tmp_path / path)
    assert pipeline().resume(tmp_path / "empty") == 0


def test_a_checkpoint_of_another_plan_is_refused(tmp_path: Path) -> None:
    trained(pipeline(), 1, tmp_path)
    with pytest.raises(PipedreamError, match=r"manifest\.json was written with another plan or schedule: resume with"):
        pipeline("1-1").resume(tmp_path)


def test_a_checkpoint_of_another_seed_precision_or_optimizer_is_refused(tmp_path: Path) -> None:
    trained(pipeline(), 1, tmp_path)
    refused: list[tuple[dict[str, Any], str]] = [
        ({"seed": 7}, r"was written with another seed \(0, here 7\): resume with the same"),
        ({"precision": "bf16"}, r"was written with another precision \(the model's, here bf16\)"),
        ({"optimizer": "sgd"}, r"stage 0: it was trained with torch\.optim\.adam\.Adam, not torch\.optim\.sgd\.SGD"),
    ]
    for other, words in refused:
        with pytest.raises(PipedreamError, match=words):
            pipeline(**other).resume(tmp_path)


def test_a_checkpoint_of_an_older_format_is_refused(tmp_path: Path) -> None:
    trained(pipeline(), 1, tmp_path)
    rewritten("version", 1)(tmp_path / "epoch-00001")
    with pytest.raises(PipedreamError, match=r"manifest\.json has format version 1, .* reads version 3: resume with"):
        pipeline().resume(tmp_path)


Scheduler = Callable[[torch.optim.Optimizer], Any]
SCHEDULES = torch.optim.lr_scheduler


def in_sequence(optimizer: torch.optim.Optimizer) -> Any:
    first, then = SCHEDULES.LinearLR(optimizer, total_iters=6), SCHEDULES.MultiStepLR(optimizer, [3, 9, 15], 0.5)
    return SCHEDULES.SequentialLR(optimizer, [first, then], milestones=[5])


def one_cycle(optimizer: torch.optim.Optimizer) -> Any:
    return SCHEDULES.OneCycleLR(optimizer, max_lr=0.1, total_steps=40)


@pytest.mark.parametrize(
    "scheduler",
    [partial(SCHEDULES.MultiStepLR, milestones=[5, 10, 17], gamma=0.3), in_sequence, one_cycle,
     partial(SCHEDULES.CosineAnnealingWarmRestarts, T_0=5)],
    ids=["MultiStepLR", "SequentialLR", "OneCycleLR", "CosineAnnealingWarmRestarts"],
)  # fmt: skip
def test_schedulers_go_on_where_they_stopped(scheduler: Scheduler, tmp_path: Path) -> None:
    """The rates, and so the weights, are those of a plain loop that never stops."""

    def held() -> Pipeline:
        return Pipeline(
            chains.plain_model(), loss_fn=nn.CrossEntropyLoss(), optimizer=chains.OPTIMIZERS["sgd"], plan=2,
            example_inputs=chains.example(), schedule=ScheduleConfig("1f1b-flush"),
            train_config=TrainConfig(lr_scheduler=scheduler),
        )  # fmt: skip

    plain = chains.plain_model()
    optimizer = chains.OPTIMIZERS["sgd"](plain.parameters())
    steps = scheduler(optimizer)
    for _ in range(3):
        for inputs, target in chains.minibatches(7):
            optimizer.zero_grad()
            nn.CrossEntropyLoss()(plain(inputs), target).backward()
            optimizer.step()
            steps.step()
    for epoch in range(3):
        pipeline = held()
        assert pipeline.resume(tmp_path) == epoch
        pipeline.fit(chains.minibatches(7))
        pipeline.save_checkpoint(tmp_path)
    assert_bitwise(pipeline.state_dict(), plain.state_dict())


def test_optimizers_with_tensors_as_rates_go_on(tmp_path: Path) -> None:
    def held() -> Pipeline:
        return Pipeline(
            chains.plain_model(), loss_fn=nn.CrossEntropyLoss(), plan=2, example_inputs=chains.example(),
            optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=torch.tensor(0.01), amsgrad=True),
        )  # fmt: skip

    uninterrupted, first, second = held(), held(), held()
    expected = trained(uninterrupted, 3)
    assert trained(first, 2, tmp_path) == expected[:2]
    assert second.resume(tmp_path) == 2
    assert trained(second, 1) == expected[2:]
    assert_bitwise(second.state_dict(), uninterrupted.state_dict())


def test_state_that_would_run_code_is_refused(tmp_path: Path) -> None:
    class Rate(SCHEDULES.LRScheduler):
        def get_lr(self) -> Any:
            return [group["lr"] for group in self.optimizer.param_groups]

        def state_dict(self) -> dict[str, Any]:
            return {"path": Path("rates")}

    held = pipeline()
    for worker in held.stages:
        worker.optimizer.lr_scheduler = Rate(worker.stash.optimizer)
    with pytest.raises(PipedreamError, match=r"scheduler or a .* of stage 0 holds an object of pathlib\.PosixPath"):
        held.save_checkpoint(tmp_path)


def forged(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    """Change the tensors of stage 1, and make its checksum right again."""
    path = folder / "epoch-00001" / "stage-1.safetensors"
    with safe_open(path, framework="pt") as file:
        tensors, metadata = {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118
    change(tensors)
    save_file(tensors, path, {**metadata, "checksum": str(checkpoint._checksum(tensors))})


@pytest.mark.parametrize(
    ("name", "shape", "dtype", "words"),
    [
        (
            "model.6.weight",
            (9, 16),
            torch.float32,
            r"'6\.weight' has shape \(9, 16\) .* this model's has shape \(5, 16\)",
        ),
        ("model.6.weight", (1, 16), torch.float32, r"'6\.weight' has shape \(1, 16\)"),
        ("model.6.weight", (5, 16), torch.float64, r"dtype float64, but this model's has .* and dtype float32"),
        (
            "optimizer.6.weight.exp_avg",
            (1,),
            torch.float32,
            r"optimizer's exp_avg of '6\.weight' has shape \(1,\), but",
        ),
    ],
)
def test_tensors_of_other_shapes_are_refused_before_anything_is_copied(
    name: str, shape: tuple[int, ...], dtype: torch.dtype, words: str, tmp_path: Path
) -> None:
    """Also with a valid checksum: copies would broadcast, and a fused step would read beyond the end."""
    trained(pipeline("1-1", model="plain"), 1, tmp_path)
    forged(tmp_path, lambda tensors: tensors.update({name: torch.zeros(shape, dtype=dtype)}))
    second = pipeline("1-1", model="plain")
    before = second.state_dict()
    with pytest.raises(PipedreamError, match=rf"stage-1\.safetensors: does not fit stage 1: .*{words}"):
        second.resume(tmp_path)
    last = {key: value for key, value in second.state_dict().items() if key.startswith("6.")}
    assert_bitwise(last, {key: before[key] for key in last})


@pytest.mark.parametrize(
    "values", [b"", b"no archive of torch.save", pickle.dumps({}), pickle.dumps(Path("x"))], ids=str
)
def test_values_that_torch_cannot_read_are_refused(values: bytes, tmp_path: Path) -> None:
    """Also with a valid checksum; no code of theirs runs."""
    trained(pipeline("1-1", model="plain"), 1, tmp_path)
    bytes_of = torch.tensor(list(values), dtype=torch.uint8)
    forged(tmp_path, lambda tensors: tensors.update({"values": bytes_of}))
    with pytest.raises(PipedreamError, match=r"stage-1\.safetensors: does not fit stage 1: .*: use the model and"):
        pipeline("1-1", model="plain").resume(tmp_path)


def test_frozen_weights_are_restored_in_every_version(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The resumed model is built with other frozen weights; each of its slabs gets those of the run."""

    def frozen(value: float) -> Pipeline:
        model = chains.plain_model()
        model[0].requires_grad_(False)
        nn.init.constant_(model[0].weight, value)
        monkeypatch.setitem(chains.MODELS, "frozen", lambda: model)
        return pipeline("1-1", model="frozen")

    uninterrupted = frozen(0.5)
    losses = trained(uninterrupted, 2)
    assert trained(frozen(0.5), 1, tmp_path) == losses[:1]
    resumed = frozen(7.0)
    assert resumed.resume(tmp_path) == 1
    assert trained(resumed, 1) == losses[1:]
    assert_bitwise(resumed.state_dict(), uninterrupted.state_dict())


def test_a_folder_that_one_rank_does_not_see(tmp_path: Path) -> None:
    """Training does not start, and the checkpoint stays."""
    training.on_ranks(2, [Training(2, checkpoints=str(tmp_path / "0"))])
    (tmp_path / "apart").write_bytes(pickle.dumps([Training(2, checkpoints=str(tmp_path / "{rank}"), resumed=1)]))
    finished = ranks.python(2, "train_chain.py", tmp_path / "apart", tmp_path / "never")
    assert finished.status == 2, finished.output
    assert "ranks see different checkpoints: epochs 1 on rank 0, none on rank 1: give" in finished.output
    assert (tmp_path / "0" / "epoch-00001" / "manifest.json").exists()


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(PipedreamError, match=r"file/kept: cannot be written"):
        pipeline().save_checkpoint(tmp_path / "file" / "kept")


def test_a_new_run_refuses_the_folder_of_another(tmp_path: Path) -> None:
    trained(pipeline(), 2, tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*.*")}
    with pytest.raises(PipedreamError, match="holds checkpoints of an earlier run, the newest is epoch-00002: resume"):
        trained(pipeline(), 1, tmp_path)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*.*")} == before


def test_files_of_two_launches_are_not_one_checkpoint(tmp_path: Path) -> None:
    """The second launch was killed when one stage had written epoch 2 again, and the other had not."""
    for launch in ("first", "second"):
        trained(pipeline(), 2, tmp_path / launch)
    file = Path("epoch-00002") / "stage-0.safetensors"
    (tmp_path / "first" / file).write_bytes((tmp_path / "second" / file).read_bytes())
    with pytest.warns(UserWarning, match=r"stage-0\.safetensors: was written by another launch than its manifest"):
        assert pipeline().resume(tmp_path / "first") == 1


def test_a_skipped_checkpoint_is_replaced(tmp_path: Path) -> None:
    """Epoch 3 is damaged: it is trained and written again."""
    trained(pipeline(), 3, tmp_path)
    damage(tmp_path / "epoch-00003" / "stage-0.safetensors")
    held = pipeline()
    with pytest.warns(UserWarning, match="epoch-00003"):
        assert held.resume(tmp_path) == 2
    trained(held, 1, tmp_path)
    assert pipeline().resume(tmp_path) == 3


def test_the_newest_two_are_kept(tmp_path: Path) -> None:
    trained(pipeline(), 4, tmp_path)
    assert sorted(each.name for each in tmp_path.iterdir()) == ["epoch-00003", "epoch-00004"]


def test_checkpoints_of_one_run_in_two_folders(tmp_path: Path) -> None:
    """Each folder has the epochs that were saved in it."""
    held = pipeline()
    trained(held, 1, tmp_path / "first")
    trained(held, 1, tmp_path / "second")
    held.save_checkpoint(tmp_path / "first")
    for folder, epochs in (("first", ["epoch-00001", "epoch-00002"]), ("second", ["epoch-00002"])):
        assert sorted(each.name for each in (tmp_path / folder).iterdir()) == epochs
        assert pipeline().resume(tmp_path / folder) == 2
