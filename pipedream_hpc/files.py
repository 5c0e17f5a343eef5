"""How every noun of the project goes to disk and comes back.

A noun is a frozen dataclass. On disk it is one JSON object that begins with its format and version::

    {"format": "pipedream-profile", "version": 1, ...the fields...}

Writing is atomic (a temporary name in the same folder, then a rename), reading is strict: unknown
fields, wrong types and impossible values end in one sentence that names the file and the field.
"""

from __future__ import annotations

import dataclasses
import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, BinaryIO, ClassVar, Protocol, TypeVar

from pydantic import ConfigDict, TypeAdapter, ValidationError

from pipedream_hpc.errors import PipedreamError

#: What pydantic reads off each noun: integers are not silently floats, unknown fields are refused.
STRICT = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class Document(Protocol):
    """A frozen dataclass that has a file format."""

    FORMAT: ClassVar[str]
    VERSION: ClassVar[int]
    __dataclass_fields__: ClassVar[dict[str, Any]]


D = TypeVar("D", bound=Document)


@contextmanager
def atomic_write(path: str | Path) -> Iterator[BinaryIO]:
    """Open a temporary file beside `path`; it takes the name `path` only if the block succeeds.

    Raises:
        PipedreamError: it cannot be written there.
    """
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    except OSError as error:
        raise PipedreamError(f"{path}: cannot be written: {error.strerror}") from None
    try:
        with os.fdopen(handle, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        # mkstemp makes the file private; a plan is meant to be shared within a group.
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)
        os.replace(temporary, path)
    except BaseException as error:
        Path(temporary).unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise PipedreamError(f"{path}: cannot be written: {error.strerror}") from None
        raise


def make_folder(path: str | Path) -> None:
    """Make a folder that files can be written to.

    Raises:
        PipedreamError: it cannot be made, or written to.
    """
    path = Path(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise PipedreamError(f"{path}: cannot be written: {error.strerror}") from None
    if not os.access(path, os.W_OK):
        raise PipedreamError(f"{path}: cannot be written: change its permissions, or give another folder")


def write_json(path: str | Path, content: Any) -> None:
    """Write plain data as indented JSON, atomically."""
    with atomic_write(path) as file:
        file.write(json.dumps(content, indent=1).encode() + b"\n")


def save(noun: Document, path: str | Path) -> None:
    """Write `noun` to `path`, atomically."""
    body = {field.name: _plain(getattr(noun, field.name)) for field in dataclasses.fields(noun)}
    write_json(path, {"format": noun.FORMAT, "version": noun.VERSION, **body})


def load(cls: type[D], path: str | Path) -> D:
    """Read a `cls` from `path`.

    Raises:
        PipedreamError: the file is missing, is no JSON, holds another noun or version, or a field
            is unknown, missing, of the wrong type or impossible.
    """
    return parse(cls, read_document(cls, path), path)


def read_document(cls: type[Document], path: str | Path) -> dict[str, Any]:
    """The fields of the `cls` in `path`, still unchecked; format and version are right and left out.

    Raises:
        PipedreamError: the file is missing, is no JSON, or holds another noun or version.
    """
    try:
        content = json.loads(Path(path).read_bytes())
    except OSError as error:
        raise PipedreamError(f"{path}: cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise PipedreamError(f"{path}: is not JSON: {error}") from None
    if not isinstance(content, dict) or content.get("format") != cls.FORMAT:
        found = content.get("format") if isinstance(content, dict) else type(content).__name__
        raise PipedreamError(f"{path}: field 'format' should be '{cls.FORMAT}' but is {found!r}")
    if content.get("version") != cls.VERSION:
        raise PipedreamError(
            f"{path}: field 'version' is {content.get('version')!r}; this pipedream reads version "
            f"{cls.VERSION}: make the file anew with the same command"
        )
    return {key: value for key, value in content.items() if key not in ("format", "version")}


def parse(cls: type[D], body: dict[str, Any], path: str | Path) -> D:
    """Make a `cls` of the fields in `body`, strictly; `path` is named in errors.

    Raises:
        PipedreamError: a field is unknown, missing, of the wrong type or impossible.
    """
    try:
        # Through JSON text, so that strict mode knows lists may be tuples.
        made: D = _adapter(cls).validate_json(json.dumps(body))
        return made
    except ValidationError as error:
        raise PipedreamError(f"{path}: {_sentence(error)}") from None


@cache
def _adapter(cls: type[D]) -> TypeAdapter[D]:
    return TypeAdapter(cls)


def _plain(value: Any) -> Any:
    """`value` as JSON data. Nested nouns become objects, tuples become lists."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: _plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, tuple | list):
        return [_plain(item) for item in value]
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return value


def _sentence(error: ValidationError) -> str:
    """The first complaint of pydantic as `field 'layers[3].forward_s': ... (got -1)`."""
    first = error.errors(include_url=False)[0]
    field = ""
    for part in first["loc"]:
        field += f"[{part}]" if isinstance(part, int) else f".{part}" if field else str(part)
    others = error.error_count() - 1
    also = f" (and {others} more)" if others else ""
    if first["type"] == "unexpected_keyword_argument":
        return f"unknown field '{field}': remove it{also}"
    if first["type"] in ("missing", "missing_argument"):
        return f"field '{field}' is missing: make the file anew with the same command{also}"
    reason = first["msg"].removeprefix("Value error, ")
    reason = reason[0].lower() + reason[1:]
    where = f"field '{field}': " if field else ""
    given = first["input"]
    shown = f" (got {given!r})" if isinstance(given, int | float | str | bool | None) else ""
    return f"{where}{reason}{shown}{also}"
