"""Functions of torch that a forward calls: how they are named, and where in the user's code."""

from __future__ import annotations

import inspect
import linecache
import textwrap
import traceback
from pathlib import Path
from typing import Any

import torch

#: Functions that read the values of a tensor into Python.
READS_VALUES = frozenset(
    {
        *("item", "tolist", "numpy", "is_nonzero", "equal", "allclose", "__contains__"),
        *("__bool__", "__int__", "__float__", "__index__", "__complex__", "__array__", "__format__"),
    }
)

#: Folders of code that is not the user's.
_NOT_THE_USERS = (str(Path(torch.__file__).parent), str(Path(__file__).parent))
_DISTRIBUTIONS = str(Path(torch.distributions.__file__).parent)


def function_name(function: Any) -> str:
    """Return the name of a torch function, as a user writes it: `add` of `x + y`, `T` of `x.T`."""
    name = getattr(function, "__name__", str(function))
    if name in ("__get__", "__set__"):
        name = getattr(getattr(function, "__self__", None), "__name__", name)
    if name in READS_VALUES:
        return str(name)
    return str(name).strip("_") + ("_" if str(name).endswith("_") and not str(name).endswith("__") else "")


def line_of_user(error: BaseException | None = None) -> str:
    """Return the line of the user's code that runs, and how torch.distributions there is made to read no values.

    Args:
        error: return the line that has raised it instead.
    """
    frame, checks = inspect.currentframe(), False
    for frame, _ in traceback.walk_tb(error.__traceback__) if error else ():  # noqa: B007 - the innermost
        pass
    while frame is not None and frame.f_code.co_filename.startswith(_NOT_THE_USERS):
        checks |= frame.f_code.co_filename.startswith(_DISTRIBUTIONS)
        frame = frame.f_back
    line = "" if frame is None else linecache.getline(frame.f_code.co_filename, frame.f_lineno, frame.f_globals)
    text = f"`{textwrap.shorten(line, 90, placeholder=' ...')}`" if line else "in code without a source"
    if not checks:
        return text
    return (
        f"{text}, which reads none if it is given validate_args=False, or in a model of a library after "
        "torch.distributions.Distribution.set_default_validate_args(False)"
    )


def place_of_user() -> tuple[str, str]:
    """Return which module's code runs, by its name in the model and its class and by the line; and its class."""
    frame, line, running = inspect.currentframe(), "", []
    while frame is not None:
        code = frame.f_code
        if code.co_filename.startswith(_NOT_THE_USERS):
            frame = frame.f_back
            continue
        if not line:
            text = textwrap.shorten(linecache.getline(code.co_filename, frame.f_lineno, frame.f_globals), 90)
            line = f" (`{text}` in {code.co_filename}, line {frame.f_lineno})" if text else ""
        if isinstance(owner := frame.f_locals.get("self"), torch.nn.Module):
            running.append(owner)
        frame = frame.f_back
    if not running:
        return f"the model{line}", "its class"
    inner = running[0]
    kind = type(inner).__name__
    names = (name for outer in reversed(running) for name, each in outer.named_modules() if each is inner)
    name = next(names, "")
    return (f"module '{name}' of class {kind}" if name else f"the model itself, a {kind}") + line, kind
