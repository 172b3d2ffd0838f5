"""The one way this package writes a file: beside its target, synchronised, then renamed.

A reader, or a machine that loses power, sees the old file or the new one, never half of one.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def written_atomically(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A temporary path in the target's folder to write to; it becomes `path` if the block ends without an exception.

    Raises:
        FileNotFoundError: the folder does not exist.
    """
    if os.path.exists(path) and not os.path.isfile(path):  # a pipe or a device is written to, never replaced
        yield Path(path)
        return
    path = Path(os.path.realpath(path))  # a link stays a link; the file it leads to is replaced
    if not path.parent.is_dir():
        raise FileNotFoundError(f"the folder {path.parent} does not exist; create it first")
    handle, name = tempfile.mkstemp(prefix=path.name, suffix=".part", dir=path.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        umask = os.umask(0)  # mkstemp's files are private; the target gets the permissions of any new file
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise


def write_text_atomically(path: str | os.PathLike[str], text: str) -> None:
    """Write a file of text (UTF-8) as `written_atomically` does."""
    with written_atomically(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
