"""The examples run; the documentation shows them."""

from __future__ import annotations

import gzip
import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import ranks
import torch

from pipedream_hpc.errors import PipedreamError
from pipedream_hpc.job import Job, load

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.fixture(scope="module")
def classifier() -> ModuleType:
    spec = importlib.util.spec_from_file_location("classifier", EXAMPLES / "classifier.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def write_idx(path: Path, values: np.ndarray) -> None:
    """Write an IDX file like those of MNIST: 0, 0, 8 (unsigned bytes), dimensions, big-endian sizes, values."""
    head = bytes([0, 0, 8, values.ndim]) + b"".join(size.to_bytes(4, "big") for size in values.shape)
    content = head + values.astype(np.uint8).tobytes()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)


@pytest.fixture
def idx_folder(tmp_path: Path) -> Path:
    """Write a training set as plain files and a test set gzipped, with images of 28x28 pixels."""
    draw = np.random.default_rng(0)
    for part, count, ending in (("train", 70, ""), ("t10k", 20, ".gz")):
        write_idx(tmp_path / f"{part}-images-idx3-ubyte{ending}", draw.integers(0, 256, (count, 28, 28)))
        write_idx(tmp_path / f"{part}-labels-idx1-ubyte{ending}", np.arange(count) % 10)
    return tmp_path


def test_fashion_mnist_is_read_from_idx_files(idx_folder: Path) -> None:
    job = load(str(EXAMPLES / "classifier.py"), ["--data", "fashion-mnist", str(idx_folder)])
    assert isinstance(job, Job)
    assert (len(job.train_loader), len(job.test_loader)) == (3, 1)  # minibatches of 32
    assert job.example_inputs.shape == (32, 1, 28, 28)
    assert 0 <= job.example_inputs.min() < job.example_inputs.max() <= 1
    assert job.model(job.example_inputs).shape == (32, 10)


def test_a_folder_without_the_files(classifier: ModuleType, tmp_path: Path) -> None:
    with pytest.raises(PipedreamError, match=r"contains neither train-images-idx3-ubyte nor .*\.gz"):
        classifier.job(["--data", "fashion-mnist", str(tmp_path)])


def test_a_truncated_file(classifier: ModuleType, idx_folder: Path) -> None:
    path = idx_folder / "train-images-idx3-ubyte"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(PipedreamError, match=r"train-images-idx3-ubyte is not a complete IDX file"):
        classifier.job(["--data", "fashion-mnist", str(idx_folder)])


def test_unknown_data(classifier: ModuleType) -> None:
    with pytest.raises(PipedreamError, match="--data takes 'digits' or 'fashion-mnist DIR', not 'mnist'"):
        classifier.job(["--data", "mnist"])


def test_digits_prints_the_same_numbers_in_one_process_and_on_four_ranks() -> None:
    program = EXAMPLES / "digits.py"
    one, four = ranks.without_launcher(sys.executable, program), ranks.mpirun(4, sys.executable, program)
    assert one.status == four.status == 0, one.output + four.output

    def lines(output: str) -> list[str]:
        return [line.strip() for line in output.splitlines() if line.startswith("epoch")]

    assert len(lines(one.output)) == 5
    assert lines(one.output) == lines(four.output)
    assert float(lines(one.output)[-1].split()[-1]) > 0.9


def test_torch_is_seeded_before_the_model_is_built(classifier: ModuleType) -> None:
    """Every rank must start with the same weights."""
    first, second = classifier.job([]).model, classifier.job([]).model
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
