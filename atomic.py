"""Files that are written whole or not at all."""

import contextlib
import os
import tempfile
from pathlib import Path

from errors import UserError


@contextlib.contextmanager
def atomic(path):
    """A temporary path beside `path` that takes its place when the block ends well, and vanishes when it does not.

    UserError where the disk is full or the folder is missing or cannot be written; the former file is whole then.
    """
    path = Path(path)
    temporary = None
    if not path.parent.is_dir():
        raise UserError(f"cannot write {path}: there is no folder {path.parent}; make it first")
    try:
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
        os.close(handle)
        os.chmod(temporary, 0o644)
        yield Path(temporary)
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}; free space or mend permissions") from None
    finally:
        if temporary:
            Path(temporary).unlink(missing_ok=True)


def write_text(path, text):
    """Write a text file atomically."""
    with atomic(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
