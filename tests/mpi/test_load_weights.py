"""Every rank opens one safetensors file and reads the tensors of its own stage only."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from mpi4py import MPI
from safetensors.torch import save_file
from torch import nn

from pipedream_hpc import Pipeline
from pipedream_hpc.errors import PipedreamError
from pipedream_hpc.runtime.state import load_state_dict

sys.path.insert(0, str(Path(__file__).parents[1]))
import chains

RANKS = (2,)  # tests/test_on_ranks.py starts this file on as many

comm = MPI.COMM_WORLD


def test_ranks_read_their_own_stages_and_refuse_together(
    monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> None:
    assert comm.size == 2
    opened, read = [], []
    real = load_state_dict.safe_open

    class Counting:
        def __init__(self, path: Path, **options: Any) -> None:
            opened.append(path)
            self.opened = real(path, **options)

        def __enter__(self) -> Counting:
            self.file = self.opened.__enter__()
            return self

        def __exit__(self, *error: Any) -> None:
            self.opened.__exit__(*error)

        def __getattr__(self, name: str) -> Any:
            return getattr(self.file, name)

        def get_tensor(self, name: str) -> torch.Tensor:
            read.append(name)
            return self.file.get_tensor(name)

    monkeypatch.setattr(load_state_dict, "safe_open", Counting)
    folder = Path(comm.bcast(str(tmp_path_factory.mktemp("weights")) if comm.rank == 0 else None))
    weights = {name: value * 2 for name, value in chains.plain_model().state_dict().items()}
    if comm.rank == 0:
        save_file(weights, folder / "good.safetensors")
        save_file({**weights, "0.bias": torch.zeros(3)}, folder / "bad.safetensors")
    comm.Barrier()
    pipeline = Pipeline(
        chains.plain_model(),
        loss_fn=nn.CrossEntropyLoss(),
        optimizer=partial(torch.optim.SGD, lr=0.1),
        example_inputs=chains.example(),
        plan=2,
    )
    pipeline.load_state_dict(folder / "good.safetensors")
    own = {name for name, stage in pipeline.stage_of_parameters().items() if stage == comm.rank}
    assert 0 < len(own) < len(weights)
    assert sorted(read) == sorted(own)
    assert len(opened) == 2, "once to check the names before anything is changed, once to read"
    # A tensor of stage 0 has another shape: both ranks refuse the file, and read nothing of it.
    with pytest.raises(PipedreamError, match=r"'0.bias' in .*bad.safetensors has shape \(3,\), but the model's has"):
        pipeline.load_state_dict(folder / "bad.safetensors")
    assert sorted(read) == sorted(own)
    found = pipeline.state_dict()
    assert all(torch.equal(found[name], weights[name]) for name in (weights if comm.rank == 0 else ()))
    pipeline.close()
