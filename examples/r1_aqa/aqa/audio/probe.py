"""Look at audio files: is there sound, how long, at which rate.

soundfile is imported with the first file: whoever skips the check does without it.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Hashable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from typing import TYPE_CHECKING, NamedTuple, TypeVar

from aqa.common.console import progress

if TYPE_CHECKING:
    from aqa.audio.reader import AudioReader

T = TypeVar("T")


class Clip(NamedTuple):
    """One audio file. ``kind``: None (fine), ``audio_missing``, ``audio_silent`` or ``audio_unreadable``."""

    seconds: float = 0.0
    sampling_rate: int = 0
    kind: str | None = None
    reason: str = ""


def probe_clip(path: str, reader: AudioReader | None = None) -> Clip:
    """Decode what the model will hear of one file.

    :param reader: Reads the file; None: in this process.
    :return: Length (seconds) and sampling rate (Hz), or what is wrong.
    """
    from aqa.audio.decode import SILENCE, AudioError, show
    from aqa.audio.reader import AudioReader

    reader = reader or AudioReader()
    try:
        os.lstat(path)
    except PermissionError:
        pass  # the file may be there; the reader says what forbids to open it
    except (OSError, ValueError):
        return Clip(kind="audio_missing", reason=f"no such file: {show(path)}")
    try:
        frames, rate = reader.read_header(path)
        reader.load(path)
    except AudioError as error:
        kind = "audio_silent" if f": {SILENCE}" in str(error) else "audio_unreadable"  # a sandbox passes on only text
        return Clip(kind=kind, reason=str(error))
    return Clip(frames / rate, rate)


def probe_clips(
    paths: Iterable[str], workers: int, probe: Callable[[str], T] = probe_clip, show: bool = True
) -> dict[str, T]:
    """Look at many files, each once.

    In threads, because most of the time is spent waiting for a disk or a network.

    :param paths: Audio files; a file may occur several times.
    :param workers: How many files are open at a time.
    :param show: Show a progress bar on stderr.
    :return: What was found, by path, in the order of first appearance.
    """
    unique = list(dict.fromkeys(paths))
    bar = progress("probing audio", len(unique), quiet=True) if show else nullcontext(lambda: None)
    clips = {}
    with bar as advance, ThreadPoolExecutor(workers) as pool:
        # the pool's results are held by the loop alone: Ctrl-C drops them, and with them the files that are left
        for path, clip in zip(unique, pool.map(probe, unique), strict=True):
            clips[path] = clip
            advance()
    return clips


def probe_all(paths: Iterable[str], reader: Callable[[str], object]) -> list[str]:
    """Check many files in parallel.

    :param paths: Files; each different one is checked once.
    :param reader: Raises AudioError if something is wrong, as :func:`aqa.audio.decode.read_header` does.
    :return: What is wrong, one entry for each bad file, in the order of the paths.
    """
    from aqa.audio.decode import AudioError

    def problem(path: str) -> str | None:
        try:
            reader(path)
        except AudioError as error:
            return str(error)
        return None

    return [found for found in probe_clips(paths, 16, problem, show=False).values() if found is not None]


def first_copies(paths: Iterable[str], workers: int) -> dict[str, str]:
    """For each file the first one that has the same content, often itself. A file that cannot be read is its own.

    :param paths: Files; few are read as a whole, since most differ in size or in a block from their middle.
    :param workers: How many are open at a time.
    """
    unique = list(dict.fromkeys(paths))
    first = {path: path for path in unique}
    groups = [unique]
    with ThreadPoolExecutor(workers) as pool:
        for key in (_size, _middle, _content):
            parts: dict[Hashable, list[str]] = {}
            for number, group in enumerate(groups):
                for path, value in zip(group, pool.map(key, group), strict=True):
                    if value is not None:
                        parts.setdefault((number, value), []).append(path)
            groups = [part for part in parts.values() if len(part) > 1]
    return first | {path: group[0] for group in groups for path in group}


def _size(path: str) -> int | None:
    return os.path.getsize(path) if os.path.isfile(path) else None


def _middle(path: str) -> bytes | None:
    return _content(path, whole=False)


def _content(path: str, whole: bool = True) -> bytes | None:
    try:
        with open(path, "rb") as file:
            if whole:
                return hashlib.file_digest(file, "blake2b").digest()
            file.seek(os.path.getsize(path) // 2)
            return file.read(2**12)
    except OSError:
        return None
