"""Schedules by name, as plans and command lines give them."""

from __future__ import annotations

from pipedream_hpc.schedule.actions import Layout, Links, ScheduleError
from pipedream_hpc.schedule.data_parallel import DataParallel
from pipedream_hpc.schedule.flush import Flush
from pipedream_hpc.schedule.forward_only import ForwardOnly
from pipedream_hpc.schedule.gpipe import GPipe
from pipedream_hpc.schedule.interleaved import Interleaved
from pipedream_hpc.schedule.model_parallel import ModelParallel
from pipedream_hpc.schedule.naive import Naive
from pipedream_hpc.schedule.one_f_one_b import OneFOneB
from pipedream_hpc.schedule.two_bw import TwoBW
from pipedream_hpc.schedule.vertical_sync import VerticalSync

#: Of whole minibatches. `1f1b-rr` is what plans with replicas call 1F1B.
_WHOLE: dict[str, type[OneFOneB | ModelParallel | ForwardOnly]] = {
    "1f1b": OneFOneB,
    "1f1b-rr": OneFOneB,
    "vertical-sync": VerticalSync,
    "data-parallel": DataParallel,
    "model-parallel": ModelParallel,
    "naive": Naive,
    "forward-only": ForwardOnly,
}
#: Of microbatches.
_CUT: dict[str, type[Flush | GPipe | TwoBW | Interleaved]] = {
    "1f1b-flush": Flush,
    "gpipe": GPipe,
    "2bw": TwoBW,
    "interleaved": Interleaved,
}
NAMES = (*_WHOLE, *_CUT)
_SPLITTING = ("1f1b-flush", "gpipe")

AnySchedule = OneFOneB | ModelParallel | ForwardOnly | Flush | GPipe | TwoBW | Interleaved


def takes_microbatches(kind: str) -> bool:
    """Whether minibatches are cut into microbatches, which then are the units that pass."""
    return kind in _CUT


def make(
    kind: str,
    layout: Layout,
    units: int,
    *,
    microbatches: int = 1,
    links: Links | None = None,
    accumulate: int = 1,
    agree: bool = False,
    split: bool = False,
    zero_bubble: bool = False,
) -> AnySchedule:
    """The schedule `kind` for `units` units.

    Args:
        kind: one of NAMES.
        layout: ranks of every stage.
        units: microbatches altogether where minibatches are cut, else minibatches.
        microbatches: to a minibatch.
        links: which stages talk; by default each and the next.
        accumulate: minibatches per replica to an update; where minibatches are cut, whole minibatches.
        agree: whether all stages agree about a round before they update.
        split: whether backwards are split (1f1b-flush and gpipe only).
        zero_bubble: whether they are, with twice as many units in flight (1f1b-flush only).

    Raises:
        ScheduleError: no such schedule, or it does not go with this layout or number of microbatches.
    """
    if zero_bubble and kind in NAMES and kind != "1f1b-flush":
        raise ScheduleError(f"zero_bubble is for 1f1b-flush, not for {kind}: leave it away, or use that schedule")
    if split and kind in NAMES and kind not in _SPLITTING:
        raise ScheduleError(f"{kind} runs backwards whole: leave split_backward away, or use {' or '.join(_SPLITTING)}")
    update = microbatches * accumulate
    if kind == "1f1b-flush":
        split = split or zero_bubble
        return Flush(layout, units, update, links=links, agree=agree, split=split, zero_bubble=zero_bubble)
    if kind == "gpipe":
        return GPipe(layout, units, update, links=links, agree=agree, split=split)
    if kind in _CUT:
        return _CUT[kind](layout, units, update, links=links, agree=agree)
    if kind not in _WHOLE:
        raise ScheduleError(f"there is no schedule '{kind}': choose from {', '.join(NAMES)}")
    if microbatches != 1:
        raise ScheduleError(
            f"{kind} sends whole minibatches, not {microbatches} microbatches of each: "
            f"leave microbatches away, or choose from {', '.join(_CUT)}"
        )
    return _WHOLE[kind](layout, units, links=links, accumulate=accumulate, agree=agree)
