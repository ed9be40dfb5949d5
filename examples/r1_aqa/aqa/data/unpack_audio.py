"""Recordings out of a benchmark's archive (tar, also compressed, or zip), which is not trusted.

Only the recordings that the questions name are taken, and each goes to the path that its *question* gives: no name in
the archive ever becomes a path, so that none can lead out of the folder. Links, devices and folders are passed over.
"""

import lzma
import os
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path, PurePosixPath
from typing import IO, NamedTuple

from aqa.common.files import draft_of, remove_drafts

MAX_FILE = 256 * 2**20  # bytes of one recording; 30 s of 192 kHz, 8 channels, 24 bit are half of it
MAX_ALL = 64 * 2**30  # bytes of everything in an archive, taken or not: unpacking a bomb takes hours
MAX_MEMBERS = 1_000_000
CHUNK = 2**20
# what the readers raise for an archive that is damaged or cut short; TypeError: tarfile, where gzip's header ends early
DAMAGE = (tarfile.TarError, zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError, NotImplementedError, TypeError)


class UnpackError(RuntimeError):
    """The archive cannot be used; the message says why and what to do."""


class Member(NamedTuple):
    """A file in an archive.

    :param size: Bytes, as the archive says.
    :param open: Opens its content; None for what is no plain file.
    """

    name: str
    size: int
    open: Callable[[], IO[bytes] | None] | None


def is_safe(name: str) -> bool:
    """Whether a recording's name, as a question gives it (``./test-mini-audios/ID.wav``), is a path below a folder."""
    path = PurePosixPath(name)
    return not path.is_absolute() and ".." not in path.parts and bool(path.name) and "\\" not in name


def unpack(
    archive: Path, wanted: Iterable[str], folder: Path, advance: Callable[[], object] = lambda: None
) -> tuple[int, int]:
    """Take the wanted recordings that are not there yet.

    :param wanted: Names as the questions give them, each safe.
    :param advance: Called for each recording found.
    :return: How many were unpacked; and how many of the archive's entries no question names, or are no plain files.
    :raises UnpackError: if the archive is no archive, damaged, or larger than the limits.
    :raises OSError: if a file cannot be read or written.
    """
    # by relative path where the archive has the same folders, else by file name, as eval_mmau.py looks them up
    by_path = {str(PurePosixPath(name)): name for name in wanted}
    by_name = {PurePosixPath(name).name: name for name in wanted}
    unpacked = others = total = 0
    remove_drafts(folder.rglob(".*"))
    try:
        for count, member in enumerate(members_of(archive), start=1):
            total += member.size
            if total > MAX_ALL or count > MAX_MEMBERS:
                raise UnpackError(
                    f"{archive}: holds more than {MAX_ALL / 2**30:g} GiB or {MAX_MEMBERS} files: not the benchmark's "
                    "archive; nothing more is unpacked"
                )
            path = str(PurePosixPath(member.name))
            name = by_path.get(path) or by_name.get(PurePosixPath(path).name)
            if name is None or member.open is None:
                others += 1
                continue
            target = folder / name
            if not (target.is_file() and target.stat().st_size == member.size):
                if member.size > MAX_FILE:
                    raise UnpackError(
                        f"{archive}: {member.name!a} is {member.size} bytes, at most {MAX_FILE} are taken"
                    )
                write(member, target)
                unpacked += 1
            advance()
    except DAMAGE as error:
        raise UnpackError(
            f"{archive}: cannot be unpacked ({error or type(error).__name__}): no tar or zip archive, or not "
            "downloaded to its end. Download it again; what is unpacked stays"
        ) from error
    return unpacked, others


def write(member: Member, target: Path) -> None:
    """Write a recording to a draft, then rename it.

    :raises UnpackError: if it is longer than the archive says.
    :raises EOFError: if it is shorter.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    draft = draft_of(target)
    try:
        with member.open() as source, draft.open("xb") as file:
            left = member.size
            while data := source.read(min(CHUNK, left + 1)):
                left -= len(data)
                if left < 0:
                    raise UnpackError(f"{member.name!a} is longer than the {member.size} bytes that the archive says")
                file.write(data)
        if left:
            raise EOFError(f"{member.name!a} ends {left} bytes early")
        os.replace(draft, target)
    finally:
        draft.unlink(missing_ok=True)


def members_of(archive: Path) -> Iterator[Member]:
    """The files of an archive (tar, tar.gz, tar.bz2, tar.xz or zip), one by one; each is to be read before the next."""
    if zipfile.is_zipfile(archive):
        with zipfile.ZipFile(archive) as file:
            for info in file.infolist():
                kind = info.external_attr >> 28  # of the Unix mode: 8 is a file, 0 not said
                plain = not info.is_dir() and kind in (0, 8) and not info.flag_bits & 1  # 1: encrypted
                yield Member(info.filename, info.file_size, (lambda info=info: file.open(info)) if plain else None)
        return
    # a stream, not an index: compressed archives are read once, from front to back
    with tarfile.open(archive, "r|*") as file:
        for info in file:
            yield Member(info.name, info.size, (lambda info=info: file.extractfile(info)) if info.isreg() else None)
