"""Options of the command line that are fields of the configuration dataclasses.

A command takes one parameter per dataclass and gets what the user gave for its fields::

    @with_options(schedule=ScheduleConfig, train=TrainConfig)
    def run(target: ..., schedule: Given, train: Given) -> None:
        config = train.applied_to(job.train_config)

The flags, types, defaults and help texts are those of the fields (config.option), so an option exists in one place.
"""

from __future__ import annotations

import dataclasses
import inspect
import types
import typing
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import wraps
from typing import Annotated, Any, Optional, TypeVar

import typer

from pipedream_hpc.config import ScheduleConfig

C = TypeVar("C")


@dataclass(frozen=True)
class Given:
    """What the user gave for the fields of one dataclass.

    Attributes:
        values: by field; fields that were not given are absent.
    """

    values: dict[str, Any]

    def applied_to(self, config: C) -> C:
        """Return `config` with the given fields replaced.

        Raises:
            PipedreamError: a value is not accepted.
        """
        return dataclasses.replace(config, **self.values)  # type: ignore[type-var]


def schedule_of(given: Given, job_schedule: str | ScheduleConfig | None) -> ScheduleConfig:
    """Return the schedule to run: the job's, with the given fields replaced.

    A schedule that is given replaces the job's altogether: its microbatches and chunks belong to the job's schedule.

    Raises:
        PipedreamError: a value is not accepted.
    """
    return given.applied_to(ScheduleConfig() if "name" in given.values else ScheduleConfig.of(job_schedule))


def with_options(**configs: type | tuple[type, Sequence[str]]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Return a decorator that replaces each named parameter of a command by the options of a dataclass.

    Args:
        configs: the dataclass of each parameter, or the dataclass and the fields to take.
    """

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        hints = typing.get_type_hints(command, include_extras=True)
        parameters: list[inspect.Parameter] = []
        owners: dict[str, tuple[str, str]] = {}  # option parameter -> (parameter of the command, field)
        for parameter in inspect.signature(command).parameters.values():
            if parameter.name not in configs:
                plain = parameter.replace(annotation=hints[parameter.name], kind=inspect.Parameter.KEYWORD_ONLY)
                parameters.append(plain)
                continue
            chosen = configs[parameter.name]
            config, names = chosen if isinstance(chosen, tuple) else (chosen, None)
            for option in _options(config, names):
                owners[option.name] = parameter.name, option.name.partition("__")[2]
                parameters.append(option)

        @wraps(command)
        def run(**arguments: Any) -> None:
            given: dict[str, dict[str, Any]] = {name: {} for name in configs}
            for name, (owner, field) in owners.items():
                value = arguments.pop(name)
                if value is not None:
                    given[owner][field] = value
            command(**arguments, **{name: Given(values) for name, values in given.items()})

        # What typer reads: the signature of the options, and no longer that of the command.
        run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        run.__annotations__ = {each.name: each.annotation for each in parameters}
        del run.__wrapped__
        return run

    return decorate


def _options(config: type, names: Sequence[str] | None) -> list[inspect.Parameter]:
    """Return one keyword parameter per field of `config` that is an option."""
    found = []
    for field in dataclasses.fields(config):
        if not field.metadata.get("help") or (names is not None and field.name not in names):
            continue
        flag = field.metadata["flag"] or "--" + field.name.replace("_", "-")
        kind = _plain(eval(str(field.type), {}))  # a builtin, or None besides: other names may not be imported
        flags = [f"{flag}/--no-{flag[2:]}"] if kind is bool else [flag]
        option = typer.Option(
            *flags, help=_help(field, kind), show_default=False, rich_help_panel=_PANELS[config.__name__]
        )
        found.append(
            inspect.Parameter(
                f"{config.__name__.lower()}__{field.name}",
                inspect.Parameter.KEYWORD_ONLY,
                default=None,
                annotation=Annotated[Optional[kind], option],  # noqa: UP045 - typer reads it at run time
            )
        )
    return found


def _plain(hint: Any) -> type:
    """Return the type of a value that may be None as well."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        (hint,) = (each for each in typing.get_args(hint) if each is not type(None))
    return hint  # type: ignore[no-any-return]


def _help(field: dataclasses.Field[Any], kind: type) -> str:
    text: str = field.metadata["help"]
    if field.metadata["choices"]:
        text += f" Choices: {', '.join(field.metadata['choices'])}."
    if field.default is None or field.default is dataclasses.MISSING:
        return text
    default = field.metadata["default"] or (("on" if field.default else "off") if kind is bool else field.default)
    return f"{text} (default: {default})"


#: Headings of the groups in `--help`.
_PANELS = {"ScheduleConfig": "Schedule", "TrainConfig": "Training", "RunConfig": "Where it runs"}
