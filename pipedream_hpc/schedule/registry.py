"""Registry: schedules by name, as plans and command lines give them."""

from __future__ import annotations

from pipedream_hpc.planning.plan import Edge
from pipedream_hpc.schedule.actions import Layout, ScheduleError
from pipedream_hpc.schedule.data_parallel import DataParallel
from pipedream_hpc.schedule.flush import ZBH1, ZBH2, Flush
from pipedream_hpc.schedule.forward_only import ForwardOnly
from pipedream_hpc.schedule.gpipe import GPipe, GPipeSplit
from pipedream_hpc.schedule.interleaved import Interleaved
from pipedream_hpc.schedule.model_parallel import ModelParallel
from pipedream_hpc.schedule.naive import Naive
from pipedream_hpc.schedule.one_f_one_b import OneFOneB
from pipedream_hpc.schedule.two_bw import TwoBW
from pipedream_hpc.schedule.vertical_sync import VerticalSync
from pipedream_hpc.schedule.written import Written

#: Schedules that pass whole minibatches. `1f1b-rr` is what plans with replicas call 1F1B.
_WHOLE: dict[str, type[OneFOneB | ModelParallel | ForwardOnly]] = {
    "1f1b": OneFOneB,
    "1f1b-rr": OneFOneB,
    "vertical-sync": VerticalSync,
    "data-parallel": DataParallel,
    "model-parallel": ModelParallel,
    "naive": Naive,
    "forward-only": ForwardOnly,
}
#: Schedules that cut minibatches into microbatches.
_CUT: dict[str, type[Flush | GPipe | TwoBW | Interleaved]] = {
    "1f1b-flush": Flush,
    "zb-h1": ZBH1,
    "zb-h2": ZBH2,
    "gpipe": GPipe,
    "gpipe-split": GPipeSplit,
    "2bw": TwoBW,
    "interleaved": Interleaved,
}
NAMES = (*_WHOLE, *_CUT)
#: Those that train.
TRAINING_NAMES = tuple(name for name in NAMES if name != "forward-only")
#: Those that cut minibatches into microbatches.
CUTTING_NAMES = tuple(_CUT)

#: Every schedule there is: those that `make` returns, and those read from files.
AnySchedule = OneFOneB | ModelParallel | ForwardOnly | Flush | GPipe | TwoBW | Interleaved | Written


def cuts_minibatches(name: str) -> bool:
    """Return whether the schedule cuts minibatches into microbatches.

    Raises:
        ScheduleError: there is no such schedule.
    """
    if name not in NAMES:
        raise ScheduleError(f"there is no schedule '{name}': choose from {', '.join(NAMES)}")
    return name in _CUT


def make(
    name: str,
    layout: Layout,
    microbatches: int,
    *,
    n_microbatches: int = 1,
    edges: tuple[Edge, ...] | None = None,
    gradient_accumulation_steps: int = 1,
    all_reduce_grad_norm: bool = False,
) -> AnySchedule:
    """Return the schedule called `name`.

    Args:
        name: one of NAMES.
        layout: ranks of every stage.
        microbatches: how many pass through the pipeline, of all minibatches together.
        n_microbatches: microbatches per minibatch; 1 for whole minibatches.
        edges: pairs of stages that exchange messages; by default each stage and the next.
        gradient_accumulation_steps: minibatches per optimizer step; per replica where minibatches are whole.
        all_reduce_grad_norm: whether all stages exchange the gradient norm of a round before they update.

    Raises:
        ScheduleError: there is no such schedule, or it cannot be made for this layout or number of microbatches.
    """
    if name in _CUT:
        round_size = n_microbatches * gradient_accumulation_steps
        return _CUT[name](
            layout, microbatches, edges=edges, all_reduce_grad_norm=all_reduce_grad_norm, n_microbatches=round_size
        )
    if name not in _WHOLE:
        raise ScheduleError(f"there is no schedule '{name}': choose from {', '.join(NAMES)}")
    if n_microbatches != 1:
        raise ScheduleError(
            f"{name} passes whole minibatches and does not cut them into {n_microbatches} microbatches: "
            f"use 1 microbatch per minibatch, or choose from {', '.join(_CUT)}"
        )
    return _WHOLE[name](
        layout,
        microbatches,
        edges=edges,
        gradient_accumulation_steps=gradient_accumulation_steps,
        all_reduce_grad_norm=all_reduce_grad_norm,
    )
