"""Files: write and read documents, such as profiles, topologies and plans.

A document is a frozen dataclass. Its file is one JSON object that begins with format and version::

    {"format": "pipedream-profile", "version": 2, ...the fields...}

Writing is atomic (a temporary file in the same folder, then a rename). Reading is strict: for unknown
fields, wrong types and invalid values it raises an error whose message names the file and the field.
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
from typing import TYPE_CHECKING, Any, BinaryIO, ClassVar, Protocol, TypeVar

from pipedream_hpc.errors import PipedreamError

if TYPE_CHECKING:  # pydantic takes a quarter of a second to import, which a rank that reads no file need not wait for
    from pydantic import ConfigDict, TypeAdapter, ValidationError

#: Configuration that pydantic reads from each dataclass: no implicit conversions, no unknown fields.
STRICT: ConfigDict = {"extra": "forbid", "strict": True, "allow_inf_nan": False}


class Document(Protocol):
    """A frozen dataclass that has a file format."""

    FORMAT: ClassVar[str]
    VERSION: ClassVar[int]
    __dataclass_fields__: ClassVar[dict[str, Any]]


D = TypeVar("D", bound=Document)


@contextmanager
def atomic_write(path: str | Path) -> Iterator[BinaryIO]:
    """Open a temporary file in the folder of `path`, and rename it to `path` if the block succeeds.

    Raises:
        PipedreamError: the file cannot be written.
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
        # mkstemp creates a private file, but users of a group share plans: apply the umask as open() does.
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
    """Create a folder, and check that files can be written to it.

    Raises:
        PipedreamError: the folder cannot be created, or is not writable.
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


def save(document: Document, path: str | Path) -> None:
    """Write `document` to `path`, atomically."""
    body = {field.name: _plain(getattr(document, field.name)) for field in dataclasses.fields(document)}
    write_json(path, {"format": document.FORMAT, "version": document.VERSION, **body})


def load(cls: type[D], path: str | Path) -> D:
    """Read a document of type `cls` from `path`.

    Raises:
        PipedreamError: the file is missing, is not JSON, has another format or version, or a field is
            unknown, missing, of the wrong type or invalid.
    """
    return parse(cls, read_document(cls, path), path)


def read_document(cls: type[Document], path: str | Path) -> dict[str, Any]:
    """Return the unchecked fields of the document in `path`, after checking format and version.

    Raises:
        PipedreamError: the file is missing, is not JSON, or has another format or version.
    """
    try:
        content = json.loads(Path(path).read_bytes())
    except OSError as error:
        raise PipedreamError(f"{path}: cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise PipedreamError(f"{path}: is not JSON, and so no {cls.FORMAT} file: {error}") from None
    if not isinstance(content, dict) or content.get("format") != cls.FORMAT:
        found = content.get("format") if isinstance(content, dict) else type(content).__name__
        raise PipedreamError(f"{path}: field 'format' should be '{cls.FORMAT}' but is {found!r}")
    if content.get("version") != cls.VERSION:
        raise PipedreamError(
            f"{path}: field 'version' is {content.get('version')!r}, but this pipedream reads version "
            f"{cls.VERSION}: create the file again with the same command"
        )
    return {key: value for key, value in content.items() if key not in ("format", "version")}


def parse(cls: type[D], body: dict[str, Any], path: str | Path) -> D:
    """Create a `cls` from the fields in `body`, strictly; errors name `path`.

    Raises:
        PipedreamError: a field is unknown, missing, of the wrong type or invalid.
    """
    from pydantic import ValidationError

    try:
        # Via JSON text: only then does pydantic's strict mode accept lists as tuples.
        document: D = _adapter(cls).validate_json(json.dumps(body))
        return document
    except ValidationError as error:
        raise PipedreamError(f"{path}: {_sentence(error)}") from None


@cache
def _adapter(cls: type[D]) -> TypeAdapter[D]:
    from pydantic import TypeAdapter

    return TypeAdapter(cls)


def _plain(value: Any) -> Any:
    """Return `value` as JSON data: nested dataclasses become objects, tuples become lists."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: _plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, tuple | list):
        return [_plain(item) for item in value]
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return value


def _sentence(error: ValidationError) -> str:
    """Format pydantic's first error such as `field 'layers[3].forward_s': ... (got -1)`."""
    first = error.errors(include_url=False)[0]
    field = ""
    for part in first["loc"]:
        field += f"[{part}]" if isinstance(part, int) else f".{part}" if field else str(part)
    others = error.error_count() - 1
    also = f" (and {others} more)" if others else ""
    if first["type"] == "unexpected_keyword_argument":
        return f"unknown field '{field}': remove it{also}"
    if first["type"] in ("missing", "missing_argument"):
        return f"field '{field}' is missing: create the file again with the same command{also}"
    reason = first["msg"].removeprefix("Value error, ")
    reason = reason[0].lower() + reason[1:]
    where = f"field '{field}': " if field else ""
    value = first["input"]
    shown = f" (got {value!r})" if isinstance(value, int | float | str | bool | None) else ""
    return f"{where}{reason}{shown}{also}"
