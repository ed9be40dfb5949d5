"""Files that are there in full or not at all, whenever a run is killed."""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from aqa.common.lock import lock

DRAFT = re.compile(r"\..+\.[0-9a-f]{8}\.(part|tmp)")
REMEDIES = dict.fromkeys((errno.ENOSPC, errno.EDQUOT), "make room there")
REMEDIES |= dict.fromkeys((errno.EROFS, errno.EACCES, errno.EPERM), "see to the rights, or name another place")


def explain(error: OSError) -> str:
    """A line about a file that cannot be read or written: which, why, and what to do about it."""
    parts = (error.filename2 or error.filename, error.strerror or error)
    line = ": ".join(str(part) for part in parts if part)
    return f"{line}; {REMEDIES[error.errno]}" if error.errno in REMEDIES else line


@contextmanager
def naming_file(path: Path) -> Iterator[None]:
    """Add the file's name to an error that lacks it, as that of a write to a full disk does."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(path)
        raise


def unwritable(path: Path) -> str | None:
    """What is wrong if a folder cannot be made, or not be written into; None if all is well."""
    base = next(folder for folder in (path.absolute(), *path.absolute().parents) if folder.exists())
    if base.is_dir() and os.access(base, os.W_OK):
        return None
    return f"{base} is no folder that can be written to; name another place"


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write beside the target, then rename: a reader finds the old file or the whole new one.

    :param path: Target; its folder exists.
    :param content: Text is written as UTF-8.
    """
    draft = path.with_name(path.name + ".part")
    try:
        with naming_file(path):
            draft.write_bytes(content.encode("utf-8") if isinstance(content, str) else content)
            draft.replace(path)
    except OSError:
        draft.unlink(missing_ok=True)
        raise


def write_files(
    folder: Path, what: str, writers: dict[str, Callable[[BinaryIO], object]], obsolete: Sequence[str] = ()
) -> None:
    """Write several files so that either all are new or all are as they were.

    :param what: The folder as the user knows it, such as ``--local_save_dir parquet``.
    :param writers: By file name, a function that writes the content to an open binary file.
    :param obsolete: Names of files to remove just before the new ones take their places.
    :raises LockedError: if another process is writing there.
    :raises OSError: if a file cannot be written; the folder is then as before.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with lock(folder / ".lock", what):
        remove_drafts(folder.glob(".*"))
        drafts = {name: draft_of(folder / name) for name in writers}
        try:
            for name, write in writers.items():
                # not tempfile, whose files only their owner may read
                with naming_file(folder / name), drafts[name].open("wb") as file:
                    write(file)
                    file.flush()
                    os.fsync(file.fileno())
            for name in obsolete:
                (folder / name).unlink(missing_ok=True)
            for name, draft in drafts.items():
                draft.replace(folder / name)
        finally:
            for draft in drafts.values():
                draft.unlink(missing_ok=True)


def draft_of(target: Path) -> Path:
    """A name for a file until it is whole; one that nobody else writes to."""
    return target.with_name(f".{target.name}.{os.urandom(4).hex()}.part")


def remove_drafts(paths: Iterable[Path]) -> None:
    """Remove those files that have a name of :func:`draft_of`, or an earlier version's: killed runs have left them."""
    for path in list(paths):
        if DRAFT.fullmatch(path.name):
            path.unlink(missing_ok=True)
