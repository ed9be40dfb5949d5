"""Look at audio files without decoding them: is there sound, how long, at which rate."""

import os
import stat
from collections.abc import Iterable
from typing import NamedTuple

# libsndfile reports its largest count of frames where the length of a stream is not known.
_UNKNOWN_FRAMES = 2**62


class Clip(NamedTuple):
    """One audio file. ``kind`` is None where it is fine, otherwise ``audio_missing`` or ``audio_unreadable``."""

    seconds: float = 0.0
    sampling_rate: int = 0
    kind: str | None = None
    reason: str = ""


def probe_clip(path: str) -> Clip:
    """
    Read the header of one file.

    :param path: The audio file.
    :type path: str
    :return: Length (seconds) and sampling rate (Hz), or what is wrong. A file without a single frame is unreadable.
    :rtype: Clip
    """
    import soundfile  # here, because nobody who skips the check should need it, or wait for its import

    try:
        # Opening a pipe would wait for a writer for ever, so look before.
        if not stat.S_ISREG(os.stat(path).st_mode):
            return Clip(kind="audio_unreadable", reason=f"not a file: {path}")
        header = soundfile.info(path)
    except (FileNotFoundError, NotADirectoryError):
        return Clip(kind="audio_missing", reason=f"no such file: {path}")
    except (OSError, soundfile.SoundFileError) as error:
        return Clip(kind="audio_unreadable", reason=f"{path}: {error}")
    except TypeError:  # soundfile takes *.raw for sound without a header and asks for its rate
        return Clip(kind="audio_unreadable", reason=f"{path}: sound without a header has no known rate")
    if not 0 < header.frames < _UNKNOWN_FRAMES:
        return Clip(kind="audio_unreadable", reason=f"{path}: a header that promises {header.frames} frames of sound")
    return Clip(header.frames / header.samplerate, header.samplerate)


def probe_clips(paths: Iterable[str], workers: int) -> dict[str, Clip]:
    """
    Read the headers of many files, each once, with a progress bar on stderr.

    Threads, because the time goes into waiting for a disk or a network; libsndfile runs outside the interpreter lock.

    :param paths: Audio files, repetitions allowed.
    :type paths: Iterable[str]
    :param workers: How many files are open at a time.
    :type workers: int
    :return: What was found, by path, in the order of first appearance.
    :rtype: dict[str, Clip]
    """
    from concurrent.futures import ThreadPoolExecutor

    from tqdm import tqdm

    unique = list(dict.fromkeys(paths))
    pool = ThreadPoolExecutor(workers)
    try:
        clips = tqdm(pool.map(probe_clip, unique), total=len(unique), desc="probing audio", unit="file")
        return dict(zip(unique, clips, strict=True))
    finally:
        pool.shutdown(cancel_futures=True)  # otherwise Ctrl-C would wait for every file that is left
