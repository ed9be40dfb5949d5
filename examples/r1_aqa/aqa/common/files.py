"""Files that are there in full or not at all, whenever a run is killed."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import BinaryIO

from aqa.common.lock import lock

DRAFT = re.compile(r"\..+\.[0-9a-f]{8}\.(part|tmp)")


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write beside the target, then rename: a reader finds the old file or the whole new one.

    :param path: Target; its folder exists.
    :param content: Text is written as UTF-8.
    """
    draft = path.with_name(path.name + ".part")
    try:
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
                with drafts[name].open("wb") as file:  # not tempfile, whose files only their owner may read
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
