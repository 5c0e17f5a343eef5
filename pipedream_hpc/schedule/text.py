"""The text form of actions and schedules, which people read and write.

One word per action: stage, operation, microbatch or round, and what else the action says::

    2F0v0           forward of microbatch 0 in stage 2 on version 0       2F0v0s   its backward is split
    2B0v0           backward                                              2B0v0l   the last of its round on this rank
    2I0v0           first part of a split backward, for the stage's input
    2W0v0           second part, for the stage's weights                  2W0v0l   the last of its round on this rank
    2RECV_F0<1r0    receive activation 0 from stage 1, rank 0             2SEND_F0>3r5   send it to stage 3, rank 5
    2RECV_B0<3r5    receive gradient 0 from stage 3, rank 5               2SEND_B0>1r0   send it to stage 1, rank 0
    2REDUCE0n4      reduce the gradients of round 0, of 4 microbatches, over the replicas
    2NORM0n4        all-reduce the gradient norm of round 0
    2STEP1n4        optimizer step that makes version 1 from 4 microbatches

A schedule is a header and one line per rank; `#` begins a comment::

    pipedream-schedule 1
    layout 0 | 1            # ranks of every stage
    n_microbatches 1        # microbatches per minibatch; 1: whole minibatches
    rank 0: 0F0v0 0SEND_F0>1r1 0RECV_B0<1r1 0B0v0l 0STEP1n1
    rank 1: 1RECV_F0<0r0 1F0v0 1B0v0l 1SEND_B0>0r0 1STEP1n1
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from pipedream_hpc.schedule.actions import (
    Action,
    AllReduceGradNorm,
    Backward,
    BackwardInput,
    BackwardWeight,
    Forward,
    Layout,
    OptimizerStep,
    Payload,
    Recv,
    ReduceGradients,
    Schedule,
    ScheduleError,
    Send,
)
from pipedream_hpc.schedule.written import Written, check_layout, layout_text, misplaced

_FORMAT, _VERSION = "pipedream-schedule", 1

_LETTER = {"activation": "F", "gradient": "B"}
_PAYLOAD: dict[str, Payload] = {"F": "activation", "B": "gradient"}
_NUMBER = "([0-9]{1,9})"


@dataclass(frozen=True)
class _Operation:
    """How the word of one operation goes on after stage and operation.

    Attributes:
        rest: pattern of what follows.
        like: an example for people; {} stands for stage and operation.
        action: makes the action from the stage and the groups of `rest`.
    """

    rest: re.Pattern[str]
    like: str
    action: Callable[[int, list[str]], Action]


def _message(payload: str, kind: type[Recv] | type[Send]) -> _Operation:
    sign = "<" if kind is Recv else ">"
    return _Operation(
        re.compile(f"{_NUMBER}{sign}{_NUMBER}r{_NUMBER}"),
        f"{{}}0{sign}1r0, with microbatch, stage and rank of the {'sender' if kind is Recv else 'receiver'}",
        lambda stage, found: kind(stage, int(found[0]), _PAYLOAD[payload], int(found[1]), int(found[2])),
    )


def _round(kind: type[ReduceGradients] | type[AllReduceGradNorm]) -> _Operation:
    return _Operation(
        re.compile(f"{_NUMBER}n{_NUMBER}"),
        "{}0n4, with the round and the number of its microbatches",
        lambda stage, found: kind(stage, int(found[0]), int(found[1])),
    )


_VERSIONED = f"{_NUMBER}v{_NUMBER}"
_OPERATIONS = {
    "F": _Operation(
        re.compile(f"{_VERSIONED}(s?)"),
        "{}0v0, with microbatch and version, or {}0v0s where its backward is split",
        lambda stage, found: Forward(stage, int(found[0]), int(found[1]), bool(found[2])),
    ),
    "B": _Operation(
        re.compile(f"{_VERSIONED}(l?)"),
        "{}0v0, with microbatch and version, or {}0v0l where it is the last of its round on this rank",
        lambda stage, found: Backward(stage, int(found[0]), int(found[1]), bool(found[2])),
    ),
    "I": _Operation(
        re.compile(_VERSIONED),
        "{}0v0, with microbatch and version",
        lambda stage, found: BackwardInput(stage, int(found[0]), int(found[1])),
    ),
    "W": _Operation(
        re.compile(f"{_VERSIONED}(l?)"),
        "{}0v0, with microbatch and version, or {}0v0l where it is the last of its round on this rank",
        lambda stage, found: BackwardWeight(stage, int(found[0]), int(found[1]), bool(found[2])),
    ),
    "RECV_F": _message("F", Recv),
    "RECV_B": _message("B", Recv),
    "SEND_F": _message("F", Send),
    "SEND_B": _message("B", Send),
    "REDUCE": _round(ReduceGradients),
    "NORM": _round(AllReduceGradNorm),
    "STEP": _Operation(
        re.compile(f"{_NUMBER}n{_NUMBER}"),
        "{}1n4, with the version that is made and the number of microbatches of the round",
        lambda stage, found: OptimizerStep(stage, int(found[0]), int(found[1])),
    ),
}
_BEGIN = re.compile("([0-9]*)([A-Z_]*)(.*)", re.DOTALL)


def format_action(action: Action) -> str:
    """Return the action as a word, such as `2F0v0`."""
    if isinstance(action, Recv):
        letter = _LETTER[action.payload]
        return f"{action.stage}RECV_{letter}{action.microbatch}<{action.peer_stage}r{action.peer_rank}"
    if isinstance(action, Send):
        letter = _LETTER[action.payload]
        return f"{action.stage}SEND_{letter}{action.microbatch}>{action.peer_stage}r{action.peer_rank}"
    if isinstance(action, Forward):
        return f"{action.stage}F{action.microbatch}v{action.version}{'s' * action.split}"
    if isinstance(action, Backward):
        return f"{action.stage}B{action.microbatch}v{action.version}{'l' * action.last}"
    if isinstance(action, BackwardInput):
        return f"{action.stage}I{action.microbatch}v{action.version}"
    if isinstance(action, BackwardWeight):
        return f"{action.stage}W{action.microbatch}v{action.version}{'l' * action.last}"
    if isinstance(action, ReduceGradients):
        return f"{action.stage}REDUCE{action.round}n{action.n_microbatches}"
    if isinstance(action, AllReduceGradNorm):
        return f"{action.stage}NORM{action.round}n{action.n_microbatches}"
    return f"{action.stage}STEP{action.version}n{action.n_microbatches}"


def where(rank: int, action: Action) -> str:
    """Return the begin of an error message: rank, stage and action, in text form and in words."""
    return f"rank {rank} (stage {action.stage}) at {format_action(action)} ({action})"


def parse_action(word: str) -> Action:
    """Return the action that a word such as `2F0v0` stands for.

    Raises:
        ScheduleError: names the word and what was expected in it.
    """
    begin = _BEGIN.fullmatch(word)
    assert begin is not None, "matches any word"
    stage, name, rest = begin.groups()
    if not re.fullmatch(_NUMBER, stage):
        raise ScheduleError(f"'{word}' should begin with the number of a stage, as in 2F0v0")
    operation = _OPERATIONS.get(name)
    if operation is None:
        found = f"'{name}'" if name else "nothing"
        raise ScheduleError(f"'{word}' should have one of {', '.join(_OPERATIONS)} after the stage, but has {found}")
    groups = operation.rest.fullmatch(rest)
    if groups is None:
        like = operation.like.replace("{}", stage + name)
        raise ScheduleError(f"'{word}' should be written as {like}")
    return operation.action(int(stage), list(groups.groups()))


def format_actions(actions: Iterable[Action]) -> str:
    """Return actions as words with a space between, such as `0F0v0 0B0v0l 0STEP1n1`."""
    return " ".join(map(format_action, actions))


def parse_actions(text: str) -> tuple[Action, ...]:
    """Return the actions of words separated by white space.

    Raises:
        ScheduleError: names the first word that is none, its number in the text, and what was expected.
    """
    actions = []
    for number, word in enumerate(text.split(), start=1):
        try:
            actions.append(parse_action(word))
        except ScheduleError as error:
            raise ScheduleError(f"word {number}: {error}") from None
    return tuple(actions)


def format_schedule(schedule: Schedule, n_microbatches: int | None = None) -> str:
    """Return the schedule as the text of a file.

    Args:
        schedule: the schedule.
        n_microbatches: microbatches per minibatch; by default those of a round where the schedule cuts minibatches.
    """
    if n_microbatches is None:
        n_microbatches = getattr(schedule, "n_microbatches", 1)
    ranks = sorted({rank for members in schedule.layout for rank in members})
    return "".join(
        f"{line}\n"
        for line in (
            f"{_FORMAT} {_VERSION}",
            f"layout {layout_text(schedule.layout)}",
            f"n_microbatches {n_microbatches}",
            *(f"rank {rank}: {format_actions(schedule.actions(rank))}" for rank in ranks),
        )
    )


def read_schedule(path: str | Path) -> Written:
    """Read a schedule from a file. It has not been verified yet.

    Raises:
        ScheduleError: the file cannot be read, or a line is not what it should be.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise ScheduleError(f"{path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ScheduleError(f"{path}: is no text file; a schedule begins with '{_FORMAT} {_VERSION}'") from None
    return parse_schedule(text, str(path))


def parse_schedule(text: str, name: str = "schedule") -> Written:
    """Return the schedule of a file's text; errors begin with `name`.

    Raises:
        ScheduleError: names the line, and the column of the word, that is not what it should be.
    """
    lines = list(_lines(text))
    number, column, first = lines[0] if lines else (1, 1, "")
    words = first.split()
    if words[:1] != [_FORMAT] or len(words) != 2:
        raise ScheduleError(f"{name}, line {number}: should be '{_FORMAT} {_VERSION}', but is '{first[:40]}'")
    if words[1] != str(_VERSION):
        raise ScheduleError(f"{name}, line {number}: version {words[1]} cannot be read, only version {_VERSION}")
    layout: Layout | None = None
    n_microbatches: int | None = None
    rank_lines: dict[int, tuple[int, int, str]] = {}
    for number, column, line in lines[1:]:
        where = f"{name}, line {number}"
        keyword = line.split(maxsplit=1)[0]
        rest = line[len(keyword) :]
        if keyword == "layout" and layout is None:
            layout = _layout(rest, where)
        elif keyword == "n_microbatches" and n_microbatches is None:
            if not re.fullmatch(_NUMBER, rest.strip()):
                raise ScheduleError(f"{where}: n_microbatches should be one number, not '{rest.strip()}'")
            n_microbatches = int(rest)
        elif (found := re.match(f"rank +{_NUMBER} *:", line)) is not None and int(found[1]) not in rank_lines:
            rank_lines[int(found[1])] = number, column + found.end(), line[found.end() :]
        else:
            raise ScheduleError(
                f"{where}: should be 'layout', 'n_microbatches' or 'rank NUMBER:', each once, but is '{line[:40]}'"
            )
    for keyword, value in (("layout", layout), ("n_microbatches", n_microbatches)):
        if value is None:
            raise ScheduleError(f"{name}: there is no line '{keyword} ...'")
    assert layout is not None
    assert n_microbatches is not None
    ranks = 1 + max(rank for members in layout for rank in members)
    for rank in sorted({*range(ranks)} ^ {*rank_lines}):
        if rank < ranks:
            raise ScheduleError(f"{name}: there is no line 'rank {rank}: ...', though the layout has {ranks} ranks")
        raise ScheduleError(f"{name}, line {rank_lines[rank][0]}: the layout has no rank {rank}")
    try:
        return Written(layout, tuple(_rank(*rank_lines[r], r, layout, name) for r in range(ranks)), n_microbatches)
    except ScheduleError as error:
        raise ScheduleError(str(error) if str(error).startswith(name) else f"{name}: {error}") from None


def _lines(text: str) -> Iterator[tuple[int, int, str]]:
    """Yield number, first column and content of every line that is not empty, without comments."""
    for number, line in enumerate(text.splitlines(), start=1):
        content = line.partition("#")[0].rstrip()
        if content.strip():
            yield number, len(content) - len(content.lstrip()) + 1, content.lstrip()


def _layout(text: str, where: str) -> Layout:
    stages = []
    for part in text.split("|"):
        ranks = [word.strip() for word in part.split(",")]
        if not all(re.fullmatch(_NUMBER, rank) for rank in ranks):
            raise ScheduleError(f"{where}: a layout should be written as in 0 | 1,2 | 3, not as '{text.strip()}'")
        stages.append(tuple(map(int, ranks)))
    layout = tuple(stages)
    try:
        check_layout(layout)
    except ScheduleError as error:
        raise ScheduleError(f"{where}: {error}") from None
    return layout


def _rank(number: int, column: int, text: str, rank: int, layout: Layout, name: str) -> tuple[Action, ...]:
    """Return the actions of a rank's line, which begin at `column`."""
    actions = []
    for word in re.finditer(r"\S+", text):
        where = f"{name}, line {number}, column {column + word.start()}"
        try:
            action = parse_action(word[0])
        except ScheduleError as error:
            raise ScheduleError(f"{where}: {error}") from None
        problem = misplaced(action, rank, layout)
        if problem is not None:
            raise ScheduleError(f"{where}: '{word[0]}': {problem}")
        actions.append(action)
    return tuple(actions)
