"""A run that stops and goes on is the run that never stopped, bit for bit; what is damaged is passed over."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import chains
import pytest
import ranks
import torch
import training
from torch import nn
from training import assert_bitwise

from pipedream_hpc import Pipeline
from pipedream_hpc.errors import PipedreamError


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def pipeline(
    folder: Path | None, plan: str = "2-1", optimizer: str = "adam", model: str = "rich", **more: Any
) -> Pipeline:
    return Pipeline(
        chains.MODELS[model](),
        loss=nn.CrossEntropyLoss(),
        optimizer=chains.OPTIMIZERS[optimizer],
        example=chains.example(),
        plan=plan,
        scheduler=partial(torch.optim.lr_scheduler.StepLR, step_size=7, gamma=0.5),
        checkpoints=folder,
        **more,
    )


def trained(held: Pipeline, epochs: int) -> list[float]:
    return [held.fit(chains.minibatches(7, last=3)) for _ in range(epochs)]


@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
@pytest.mark.parametrize(
    ("plan", "more"),
    [
        ("1-1-1", {}),
        ("2-1", {}),
        ("1-1", {"schedule": "gpipe", "microbatches": 2}),
        ("1-1", {"model": "half", "master_weights": True}),
    ],
)
def test_going_on_is_never_having_stopped(plan: str, more: dict[str, Any], optimizer: str, tmp_path: Path) -> None:
    straight_on = pipeline(None, plan, optimizer, **more)
    expected = trained(straight_on, 4)
    first = pipeline(tmp_path, plan, optimizer, **more)
    assert trained(first, 2) == expected[:2]
    second = pipeline(tmp_path, plan, optimizer, **more)
    assert second.resume() == 2
    assert trained(second, 2) == expected[2:]
    assert_bitwise(second.state_dict(), straight_on.state_dict())


def test_on_ranks(tmp_path: Path) -> None:
    """Two epochs on ranks, then two more in another launch = four epochs in one process."""
    order = {"plan": "2-1", "model": "rich", "optimizer": "sgd", "last": 3, "decay": 0.9}
    kept = {"checkpoints": str(tmp_path / "kept")}
    for done in (0, 2):
        (resumed,) = training.on_ranks(3, [{**order, "epochs": [7, 7], "options": kept, "resume": done}], tmp_path)
    (whole,) = training.on_ranks(0, [{**order, "epochs": [7] * 4}], tmp_path)
    assert_bitwise(resumed["weights"], whole["weights"])
    assert resumed["losses"] == whole["losses"][2:]


def damage(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-5] ^= 255
    path.write_bytes(bytes(content))


def rewritten(field: str, value: Any) -> Callable[[Path], None]:
    """Spoils a field of the manifest."""

    def spoil(folder: Path) -> None:
        path = folder / "manifest.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), field: value}))

    return spoil


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda folder: (folder / "stage-1.safetensors").unlink(), r"stage-1\.safetensors: is missing"),
        (lambda folder: damage(folder / "stage-0.safetensors"), "its contents are not what was written"),
        (lambda folder: (folder / "stage-0.safetensors").write_bytes(b"no"), r"stage-0\.safetensors: is damaged"),
        (lambda folder: (folder / "manifest.json").unlink(), r"manifest\.json: cannot be read"),
        (lambda folder: (folder / "manifest.json").write_text("{"), r"manifest\.json: is not JSON"),
        (rewritten("epoch", -7), r"manifest\.json: field 'epoch': input should be greater than 0 \(got -7\)"),
        (rewritten("epoch", 1), r"manifest\.json: is not the manifest of this epoch"),
        (rewritten("parts", []), r"manifest\.json: is not the manifest of this epoch and these stages"),
        (rewritten("version", 99), r"manifest\.json: field 'version' is 99"),
    ],
)
def test_what_is_not_whole_is_passed_over_by_name(spoil: Any, words: str, tmp_path: Path) -> None:
    trained(pipeline(tmp_path), 2)
    spoil(tmp_path / "epoch-00002")
    held = pipeline(tmp_path)
    with pytest.warns(UserWarning, match=words):
        assert held.resume() == 1


def test_nothing_to_go_on_from(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert pipeline(tmp_path / "new").resume() == 0
    with pytest.raises(PipedreamError, match="make the Pipeline with checkpoints=FOLDER"):
        pipeline(None).resume()


def test_of_another_plan(tmp_path: Path) -> None:
    trained(pipeline(tmp_path), 1)
    with pytest.raises(PipedreamError, match=r"manifest\.json is of another plan or schedule: take the one"):
        pipeline(tmp_path, "1-1").resume()


def test_of_another_seed_precision_or_optimizer(tmp_path: Path) -> None:
    trained(pipeline(tmp_path), 1)
    for other, words in (
        ({"seed": 7}, "is of another seed, 0: take the one that it was trained with instead of this, 7"),
        ({"precision": "bf16"}, "is of another precision, the model's: take"),
        ({"optimizer": "sgd"}, r"stage 0: it was trained with torch\.optim\.adam\.Adam, not torch\.optim\.sgd\.SGD"),
    ):
        with pytest.raises(PipedreamError, match=words):
            pipeline(tmp_path, **other).resume()


def test_a_folder_that_one_rank_does_not_see(tmp_path: Path) -> None:
    """Nothing is trained, and nothing is lost."""
    order = {"plan": 2, "model": "plain", "optimizer": "sgd", "epochs": [3]}
    training.on_ranks(2, [{**order, "options": {"checkpoints": str(tmp_path / "0")}}], tmp_path)
    apart = [{**order, "options": {"checkpoints": str(tmp_path / "{rank}")}, "resume": 1, "out": "never"}]
    finished = ranks.python(2, "train_chain.py", json.dumps(apart))
    assert finished.status == 2, finished.output
    assert "ranks see different checkpoints: epochs 1 on rank 0, none on rank 1: give" in finished.output
    assert (tmp_path / "0" / "epoch-00001" / "manifest.json").exists()


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(PipedreamError, match=r"file/kept: cannot be written"):
        trained(pipeline(tmp_path / "file" / "kept"), 1)


def test_a_new_run_takes_no_folder_of_another(tmp_path: Path) -> None:
    trained(pipeline(tmp_path), 2)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*.*")}
    with pytest.raises(PipedreamError, match="holds checkpoints of an earlier run, epoch-00002 the newest: go on"):
        trained(pipeline(tmp_path), 1)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*.*")} == before


def test_parts_of_two_launches_are_no_whole(tmp_path: Path) -> None:
    """The second launch was killed when one stage had written epoch 2 anew, and the other not yet."""
    for launch in ("first", "second"):
        trained(pipeline(tmp_path / launch), 2)
    part = Path("epoch-00002") / "stage-0.safetensors"
    (tmp_path / "first" / part).write_bytes((tmp_path / "second" / part).read_bytes())
    with pytest.warns(UserWarning, match=r"stage-0\.safetensors: was written by another launch than its manifest"):
        assert pipeline(tmp_path / "first").resume() == 1


def test_what_was_passed_over_makes_room(tmp_path: Path) -> None:
    """Epoch 3 is damaged: it is trained anew, and that is the newest from then on."""
    trained(pipeline(tmp_path), 3)
    damage(tmp_path / "epoch-00003" / "stage-0.safetensors")
    held = pipeline(tmp_path)
    with pytest.warns(UserWarning, match="epoch-00003"):
        assert held.resume() == 2
    trained(held, 1)
    assert pipeline(tmp_path).resume() == 3


def test_the_newest_two_are_kept(tmp_path: Path) -> None:
    trained(pipeline(tmp_path), 4)
    assert sorted(each.name for each in tmp_path.iterdir()) == ["epoch-00003", "epoch-00004"]
