"""Look at audio files: is there sound, how long, at which rate. Headers only, or all that the model will hear."""

import os
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from aqa.audio.sandbox import Sandbox


class Clip(NamedTuple):
    """One audio file. ``kind`` is None where it is fine, otherwise ``audio_missing`` or ``audio_unreadable``."""

    seconds: float = 0.0
    sampling_rate: int = 0
    kind: str | None = None
    reason: str = ""


def probe_clip(path: str, decode: bool = False, sandbox: "Sandbox | None" = None) -> Clip:
    """
    Read one file.

    :param path: The audio file.
    :type path: str
    :param decode: Decode what the model hears, not only the header.
    :type decode: bool
    :param sandbox: Where to read it; None: in this process.
    :type sandbox: aqa.audio.sandbox.Sandbox | None
    :return: Length (seconds) and sampling rate (Hz), or what is wrong.
    :rtype: Clip
    """
    # here, because nobody who skips the check should need soundfile, or wait for its import
    from aqa.audio.decode import AudioError, load_audio, read_header, show

    if not os.path.exists(path) and not os.path.islink(path):
        return Clip(kind="audio_missing", reason=f"no such file: {show(path)}")
    try:
        frames, rate = (sandbox.read_header if sandbox else read_header)(path)
        if decode:
            (sandbox.load if sandbox else load_audio)(path)
    except AudioError as error:
        return Clip(kind="audio_unreadable", reason=str(error))
    return Clip(frames / rate, rate)


def probe_clips(
    paths: Iterable[str],
    workers: int,
    probe: Callable[[str], Clip] = probe_clip,
) -> dict[str, Clip]:
    """
    Read many files, each once, with a progress bar on stderr.

    Threads, because the time goes into waiting for a disk or a network; libsndfile runs outside the interpreter lock.

    :param paths: Audio files, repetitions allowed.
    :type paths: Iterable[str]
    :param workers: How many files are open at a time.
    :type workers: int
    :param probe: Reads one.
    :type probe: Callable[[str], Clip]
    :return: What was found, by path, in the order of first appearance.
    :rtype: dict[str, Clip]
    """
    from concurrent.futures import ThreadPoolExecutor

    from tqdm import tqdm

    unique = list(dict.fromkeys(paths))
    pool = ThreadPoolExecutor(workers)
    try:
        clips = tqdm(pool.map(probe, unique), total=len(unique), desc="probing audio", unit="file")
        return dict(zip(unique, clips, strict=True))
    finally:
        pool.shutdown(cancel_futures=True)  # otherwise Ctrl-C would wait for every file that is left
