"""Timelines: what is drawn, not how it looks."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pictures
import pytest
from matplotlib.colors import to_rgb
from matplotlib.image import imread

from pipedream_hpc.errors import PipedreamError
from pipedream_hpc.observe.timeline import _COLOURS, _title, _window_s, draw
from pipedream_hpc.schedule.trace import Trace

SHORT = """
    rank 0  F0 F1 .  .  B0 B0 U  B1 B1 U
    rank 1  .  F0 B0 B0 F1 B1 B1 .  .  .
    """


def shows(image: np.ndarray, colour: str) -> bool:
    """Return whether some pixels have this colour."""
    return bool((np.abs(image[:, :, :3] - to_rgb(colour)).max(axis=2) < 0.01).any())


def test_forward_backward_and_optimizer_step_are_drawn(tmp_path: Path) -> None:
    draw(pictures.trace(SHORT), tmp_path / "one.png")
    image = imread(tmp_path / "one.png")
    assert [kind for kind, colour in _COLOURS.items() if shows(image, colour)] == [
        "forward",
        "backward",
        "optimizer-step",
    ]


def test_one_trace_over_another(tmp_path: Path) -> None:
    trace = pictures.trace(SHORT)
    draw(trace, tmp_path / "one.png")
    draw([trace, trace], tmp_path / "two.png")
    one, two = imread(tmp_path / "one.png"), imread(tmp_path / "two.png")
    assert two.shape[1] == one.shape[1]
    assert two.shape[0] > 1.7 * one.shape[0]


def test_colours_are_told_apart_in_grey() -> None:
    def grey(colour: str) -> float:
        return float(np.dot(to_rgb(colour), (0.2126, 0.7152, 0.0722)))

    assert grey(_COLOURS["backward"]) - grey(_COLOURS["forward"]) > 0.3


def test_the_title_says_where_a_long_trace_ends() -> None:
    cells = " ".join(f"F{i} B{i}" for i in range(40))
    trace = pictures.trace(f"rank 0  {cells}")
    assert _window_s(trace, 12) == pytest.approx(24e-3)
    assert _title(trace, _window_s(trace, 12)) == "measured: the first 12 of 40 minibatches"
    assert _title(trace, 1.0) == "measured: all 40 minibatches"
    assert _title(replace(trace, n_microbatches=4), 1.0) == "measured: all 40 microbatches"


def test_nothing_to_draw(tmp_path: Path) -> None:
    with pytest.raises(PipedreamError, match="nothing to draw"):
        draw(Trace("measured", ((0,),), 0, ()), tmp_path / "none.png")
    assert not list(tmp_path.iterdir())
