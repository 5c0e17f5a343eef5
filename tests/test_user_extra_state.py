"""k: extra state in state dicts and checkpoints, and what a closed pipeline leaves behind."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn
from user_programs import Net, Noisy, minibatches, pipeline_of, plain, with_state


class Titled(nn.Module):
    """Has a state that is no tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[int] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.seen.append(len(x))
        return x

    def get_extra_state(self) -> Any:
        return {"seen": self.seen[-2:]}

    def set_extra_state(self, state: Any) -> None:
        self.seen = list(state["seen"])


def test_extra_state_is_in_state_dicts_and_checkpoints(tmp_path: Path) -> None:
    batches = minibatches()
    model = with_state(Titled)()
    pipeline = pipeline_of(model, 2, batches, check_model=False)
    pipeline.fit(batches)
    state = pipeline.state_dict()
    assert state["1._extra_state"] == {"seen": [8, 8]}
    pipeline.save_checkpoint(tmp_path)
    whole, other = with_state(Titled)(), with_state(Titled)()
    whole.load_state_dict(state)
    assert whole[1].seen == [8, 8]
    for restore in (lambda each: each.load_state_dict(state), lambda each: each.resume(tmp_path)):
        again = pipeline_of(other, 2, batches, check_model=False)
        restore(again)
        assert other[1].seen == [8, 8]
        other[1].seen = []


class Versioned(Net):
    """Loads a state dict by its version, as torchvision's MNASNet does."""

    _version = 2

    def _load_from_state_dict(self, state_dict: Any, prefix: str, metadata: Any, *rest: Any) -> None:
        if metadata.get("version") != 2:
            raise ValueError(f"version {metadata.get('version')} is unknown")
        super()._load_from_state_dict(state_dict, prefix, metadata, *rest)  # type: ignore[no-untyped-call]


def test_a_state_dict_has_the_versions_of_modules() -> None:
    batches = minibatches()
    pipeline = pipeline_of(Versioned(), 2, batches)
    pipeline.fit(batches)
    loaded = Versioned()
    loaded.load_state_dict(pipeline.state_dict())
    assert all(torch.equal(each, plain(Versioned(), batches)[name]) for name, each in loaded.state_dict().items())


def test_a_closed_pipeline_leaves_no_hooks_behind() -> None:
    model, batches = Noisy("dropout"), minibatches()
    before = {name: set(vars(module)) for name, module in model.named_modules()}
    with pipeline_of(model, 2, batches) as pipeline:
        pipeline.fit(batches)
        trained = pipeline.state_dict()
    assert {name: set(vars(module)) for name, module in model.named_modules()} == before
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert all(torch.equal(value, trained[name]) for name, value in model.state_dict().items())
    model.eval()(batches[0][0])  # an ordinary model
