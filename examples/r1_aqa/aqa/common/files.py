"""Files that are there in full or not at all, whenever a run is killed."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import BinaryIO


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write beside the target, then rename: a reader finds the old file or the whole new one.

    :param path: Target; its folder exists.
    :param content: Text is written as UTF-8.
    """
    draft = path.with_name(path.name + ".part")
    draft.write_bytes(content.encode("utf-8") if isinstance(content, str) else content)
    draft.replace(path)


def write_files(folder: str, writers: dict[str, Callable[[BinaryIO], object]], obsolete: Sequence[str] = ()) -> None:
    """Write several files so that either all are new or all are as they were.

    :param folder: Made if missing.
    :param writers: By file name, a function that writes the content to an open binary file.
    :param obsolete: Names of files to remove just before the new ones take their places.
    :raises OSError: if a file cannot be written; the folder is then as before.
    """
    os.makedirs(folder, exist_ok=True)
    token = os.urandom(4).hex()  # two runs, perhaps on two machines, may write to one folder at the same time
    drafts = {name: os.path.join(folder, f".{name}.{token}.tmp") for name in writers}
    try:
        for name, write in writers.items():
            with open(drafts[name], "wb") as file:  # not tempfile, whose files only their owner may read
                write(file)
                file.flush()
                os.fsync(file.fileno())
        for name in obsolete:
            if os.path.lexists(os.path.join(folder, name)):
                os.remove(os.path.join(folder, name))
        for name, draft in drafts.items():
            os.replace(draft, os.path.join(folder, name))
    finally:
        for draft in drafts.values():
            if os.path.lexists(draft):
                os.remove(draft)
