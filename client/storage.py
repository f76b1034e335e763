"""Small files that must be right: written whole or not at all, read with a checksum, locked."""

import contextlib
import hashlib
import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TypeVar

from filelock import FileLock, Timeout
from pydantic import BaseModel, ConfigDict, ValidationError

from unlearning.errors import SecateurError

VERSION = 1
"""Of the form of every file here; another one is not guessed at."""
PATIENCE_S = 60.0
"""How long one process waits for another to leave a folder."""


class KeepingError(SecateurError):
    """What a client keeps on disk cannot be read, written or used; it does not go on without."""


class Record(BaseModel):
    """What a file holds; unknown entries and other types are faults."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


Kind = TypeVar("Kind", bound=Record)


def write_record(path: Path, record: Record) -> None:
    """Write a file that is there, complete and on the disk when this returns, or not at all.

    Raises
    ------
    KeepingError
        If it cannot be written.
    """
    content = record.model_dump(mode="json")
    document = {"version": VERSION, "sha256": _checksum(content), "content": content}
    data = json.dumps(document, indent=1).encode()
    try:
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=".", delete=False) as file:
            staged = Path(file.name)
            try:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
                os.replace(staged, path)
            except BaseException:
                staged.unlink(missing_ok=True)
                raise
        sync(path.parent)
    except OSError as error:
        raise KeepingError(f"{path} cannot be written: {error.strerror or error}") from error


def read_record(path: Path, kind: type[Kind]) -> Kind | None:
    """Return what a file holds; ``None`` if there is none.

    Raises
    ------
    KeepingError
        If it cannot be read, is damaged, or was written by another version.
    """
    try:
        document = json.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    except OSError as error:
        raise KeepingError(f"{path} cannot be read: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise _damaged(path, "it is not JSON") from error
    if not isinstance(document, dict) or not {"version", "sha256", "content"} <= document.keys():
        raise _damaged(path, "it lacks version, sha256 or content")
    if document["version"] != VERSION:
        raise KeepingError(
            f"{path} has version {document['version']!r}, and {VERSION} is known here; use the "
            "Secateur that wrote it"
        )
    if document["sha256"] != _checksum(document["content"]):
        raise _damaged(path, "its checksum is wrong")
    try:
        return kind.model_validate_json(json.dumps(document["content"]))
    except ValidationError as error:
        raise _damaged(
            path, f"{error.error_count()} entries are not what they should be"
        ) from error


def sync(path: Path) -> None:
    """Return once a file, or the names in a folder, are on the disk."""
    if path.is_dir() and os.name == "nt":  # which knows no such thing
        return
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)


@contextlib.contextmanager
def locked(folder: Path, patience_s: float = PATIENCE_S) -> Iterator[None]:
    """Have a folder, which is made if need be, to oneself among threads and processes.

    Parameters
    ----------
    patience_s
        How long to wait for it, in seconds.

    Raises
    ------
    KeepingError
        If it cannot be made, or another process does not leave it.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / ".lock", timeout=patience_s)
        lock.acquire()
    except Timeout as error:
        raise KeepingError(
            f"{folder} is in use by another process for {patience_s:.0f} s; give each client a "
            "folder of its own"
        ) from error
    except OSError as error:
        raise KeepingError(f"{folder} cannot be used: {error.strerror or error}") from error
    try:
        yield
    finally:
        lock.release()


def _checksum(content: object) -> str:
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def _damaged(path: Path, why: str) -> KeepingError:
    return KeepingError(f"{path} is damaged: {why}; put back a copy, for it cannot be done without")
