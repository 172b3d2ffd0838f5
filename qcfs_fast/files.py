"""The one way this package writes a file: beside its target, synchronised, then renamed.

Whoever reads the file, also after a loss of power, sees the old one or the new one, never half of one. Processes that
add to one file take turns (`update_json`). A folder in which one process alone can work has one user (`sole_user`).
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import platform
import re
import secrets
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save as serialised
from safetensors.torch import save_file
from torch import Tensor

from .errors import WRONG_FORM


@contextlib.contextmanager
def written_atomically(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A temporary path in the target's folder to write to; it becomes `path` if the block ends without an exception.

    A pipe or a device is written to as it is, never replaced.

    Raises:
        FileNotFoundError: the folder does not exist.
        IsADirectoryError: the path is a folder.
    """
    path = Path(path)
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder; name a file in it")
    if path.exists() and not path.is_file():
        with _named(path):
            yield path
        return
    path = Path(os.path.realpath(path))  # a link stays a link; the file it leads to is replaced
    require_folder_of(path)
    temporary = path.with_name(f"{path.name}.{secrets.token_hex(8)}.part")
    with _named(path, temporary):
        try:
            handle = os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
            mode = stat.S_IMODE(os.fstat(handle).st_mode)  # of any new file; who writes may make another, a private one
            os.close(handle)
            yield temporary
            with open(temporary, "rb+") as file:
                os.fsync(file.fileno())
            os.chmod(temporary, mode)
            os.replace(temporary, path)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
            raise


def require_folder_of(path: Path) -> None:
    """FileNotFoundError where a file cannot be written because its folder does not exist."""
    if not path.absolute().parent.is_dir():
        raise FileNotFoundError(f"the folder {path.parent} does not exist; create it first")


@contextlib.contextmanager
def _named(path: Path, temporary: Path | None = None) -> Iterator[None]:
    """Errors of the system name the target, where they name the temporary file or, as of a full disk, none."""
    try:
        yield
    except OSError as error:
        if error.errno and error.filename in (None, str(temporary)):
            error.filename = str(path)
        raise


def write_tensors_atomically(
    path: str | os.PathLike[str], tensors: dict[str, Tensor], metadata: dict[str, str]
) -> None:
    """Write a safetensors file as `written_atomically` does."""
    with written_atomically(path) as temporary:
        if not temporary.is_file():  # save_file would replace a device or a pipe
            temporary.write_bytes(serialised(tensors, metadata))
            return
        try:
            save_file(tensors, temporary, metadata=metadata)
        except SafetensorError as error:
            raise OSError(f"{path}: could not be written ({error})") from error


def write_text_atomically(path: str | os.PathLike[str], text: str) -> None:
    """Write a file of text (UTF-8) as `written_atomically` does."""
    with written_atomically(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def update_json(path: str | os.PathLike[str], changed: Callable[[Any], Any]) -> Any:
    """Write what `changed` makes of a file's content (None: there is no file yet), and return it.

    Processes that add to one file do so one after the other, so none loses what another one added.
    """
    path = Path(path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)
        made = changed(json.loads(path.read_text(encoding="utf-8")) if path.exists() else None)
        write_text_atomically(path, json.dumps(made, indent=1) + "\n")
    finally:
        os.close(folder)
    return made


@contextlib.contextmanager
def content_of(path: Path, kind: str) -> Iterator[None]:
    """What the block stumbles over in a file's content becomes a ValueError that names the file and the remedy."""
    try:
        yield
    except WRONG_FORM as error:
        raise ValueError(f"{path}: is no {kind}; remove the file to start anew, or name another place") from error


def read_json(path: Path, kind: str, fits: Callable[[Any], object]) -> Any:
    """The content of a file; ValueError that names it and the remedy where `fits` is false of it, or fails."""
    with content_of(path, kind):
        found = json.loads(path.read_text(encoding="utf-8"))
        if not fits(found):
            raise ValueError
    return found


@contextlib.contextmanager
def sole_user(folder: Path, option: str) -> Iterator[None]:
    """Make a folder, and hold it: while the block runs, no other process gets it. A killed process holds nothing.

    At the end the folder is taken away if nothing is in it, unless it was there before and empty.

    Args:
        option: by which the user names another folder.

    Raises:
        BlockingIOError: another process, which is named, holds the folder.
    """
    was_empty = folder.is_dir() and not any(folder.iterdir())
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / ".qcfs-fast.lock"
    with open(path, "ab+", buffering=0, opener=lambda p, flags: os.open(p, flags | os.O_NOFOLLOW, 0o666)) as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not path.exists() or not os.path.samestat(os.fstat(lock.fileno()), path.stat()):
                raise BlockingIOError  # its holder has just ended, and taken it away
        except BlockingIOError as error:
            lock.seek(0)
            who = lock.read(200).decode(errors="replace") or "another process"
            raise BlockingIOError(f"{folder}: {who} works in it; wait for its end, or give another {option}") from error
        try:
            with contextlib.suppress(OSError):  # of a full disk; the lock holds without a name
                lock.truncate(0)
                lock.write(f"process {os.getpid()} on {platform.node()}".encode())
            yield
        finally:
            path.unlink(missing_ok=True)
            if not was_empty:
                with contextlib.suppress(OSError):
                    folder.rmdir()


def remove_written(folder: Path, names: str) -> None:
    """Remove the files of a folder whose names match a pattern, and what a killed process left of such; no others."""
    pattern = re.compile(rf"({names})(\.[0-9a-f]{{16}}\.part)?")
    for path in folder.iterdir():
        if pattern.fullmatch(path.name) and path.is_file():
            path.unlink()


def replace_between(path: str | os.PathLike[str], marks: tuple[str, str], text: str) -> None:
    """Put a text in the place of what stands between two marks of a file.

    Raises:
        ValueError: one of the marks is not in the file, or more than once.
    """
    old = Path(path).read_text(encoding="utf-8")
    if any(old.count(mark) != 1 for mark in marks):
        raise ValueError(f"{path}: needs the lines {marks[0]} and {marks[1]} once each; the text goes between them")
    before, rest = old.split(marks[0])
    write_text_atomically(path, f"{before}{marks[0]}\n\n{text}\n{marks[1]}{rest.split(marks[1])[1]}")
