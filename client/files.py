"""Files of a result: that they can be written is made sure before the work; each appears whole."""

import errno
import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from unlearning.errors import SecateurError


def prepare_folder(folder: Path, names: Sequence[str], option: str = "--out") -> list[Path]:
    """Make sure that files of these names can be written; return the folders made, innermost first.

    Raises
    ------
    SecateurError
        If they cannot; no folder is left behind then.
    """
    made = []
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        for path in reversed(missing):
            path.mkdir()
            made.append(path)
        with tempfile.NamedTemporaryFile(dir=folder):
            blocked = [name for name in names if (folder / name).is_dir()]
        if blocked:
            raise OSError(errno.EISDIR, f"{blocked[0]} is a folder")
    except OSError as error:
        for path in reversed(made):
            path.rmdir()
        raise SecateurError(
            f"cannot write to {folder}: {error.strerror}; choose another folder with {option}"
        ) from error
    return made[::-1]


def write_files(folder: Path, files: Mapping[str, bytes]) -> None:
    """Write all of them, in folders where their names say so; each appears complete or not at all.

    Raises
    ------
    SecateurError
        If they cannot be written.
    """
    try:
        with tempfile.TemporaryDirectory(dir=folder, prefix=".writing-") as staging:
            for name, content in files.items():
                (Path(staging) / name).parent.mkdir(exist_ok=True)
                (Path(staging) / name).write_bytes(content)
            for name in files:
                (folder / name).parent.mkdir(exist_ok=True)
                os.replace(Path(staging) / name, folder / name)
    except OSError as error:
        raise SecateurError(
            f"the report cannot be written to {folder}: {error.strerror}; free the place or choose "
            "another folder with --out"
        ) from error
