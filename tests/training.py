"""Train chains of tests/chains.py: on real ranks, many in one launch, or in this process."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ranks
import torch

sys.path.insert(0, str(ranks.PROGRAMS))
import train_chain

#: What tests/programs/train_chain.py is asked for, and what it reports.
Order = dict[str, Any]
Report = dict[str, Any]


def on_ranks(count: int, orders: Sequence[Order], folder: Path, timeout: float = 240) -> list[Report]:
    """Reports of one launch on `count` ranks, in the order of the orders; 0 is a process without a launcher."""
    written = [{**order, "out": str(folder / f"{count}-{index}.pt")} for index, order in enumerate(orders)]
    finished = ranks.python(count, "train_chain.py", json.dumps(written), timeout=timeout)
    assert finished.status == 0, f"{finished.output}\n{json.dumps(orders, indent=1)}"
    reports = [torch.load(order["out"]) for order in written]
    assert {report["ranks"] for report in reports} <= {max(1, count)}, "the ranks really ran"
    return reports


def alone(order: Order) -> Report:
    """The report of all ranks in this process."""
    torch.set_num_threads(1)
    report: Report = train_chain.train(order)
    return report


def assert_bitwise(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor], what: object = "") -> None:
    assert left.keys() == right.keys(), what
    assert [name for name in left if not torch.equal(left[name], right[name])] == [], what
