"""Decode audio files the way Qwen2-Audio wants them: mono float32 at 16 kHz, 30 s at most."""

from __future__ import annotations

from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import soundfile
import soxr
from audio_slots import MAX_FRAMES, MIN_FRAMES
from tqdm import tqdm

SAMPLING_RATE = 16_000  # Hz
HOP_LENGTH = 160  # samples a mel frame
MAX_SECONDS = MAX_FRAMES * HOP_LENGTH / SAMPLING_RATE
MIN_SAMPLES = (MIN_FRAMES - 1) * HOP_LENGTH + 1  # shorter clips leave no audio token


class AudioError(ValueError):
    """An audio file that cannot be used; the message names it and says why."""


def load_audio(path: str | Path) -> np.ndarray:
    """Decode a file.

    Reads no more than the 30 s that the model hears, whatever the length of the file.

    :param path: Any format that libsndfile reads, any rate, any number of channels.
    :return: Waveform ``(samples,)`` float32, 16 kHz mono.
    :raises AudioError: if the file is missing, is not readable as audio, is shorter than 20 ms, or has samples that
        are not finite.
    """
    try:
        with soundfile.SoundFile(str(path)) as file:
            rate = file.samplerate
            # a few samples more, for the resampler's filter; cut below
            wave = file.read(int((MAX_SECONDS + 0.1) * rate), dtype="float32", always_2d=True)
    except (OSError, soundfile.LibsndfileError) as error:
        raise AudioError(f"{path}: {describe_failure(path, error)}") from error
    wave = wave.mean(axis=1)
    if not np.isfinite(wave).all():
        raise AudioError(f"{path}: has samples that are NaN or infinite")
    if rate != SAMPLING_RATE:
        wave = soxr.resample(wave, rate, SAMPLING_RATE, quality="HQ")
    if len(wave) < MIN_SAMPLES:
        raise AudioError(
            f"{path}: {len(wave) / SAMPLING_RATE * 1000:.0f} ms of sound; the model needs "
            f"{MIN_SAMPLES / SAMPLING_RATE * 1000:.0f} ms to hear anything"
        )
    return np.ascontiguousarray(wave[: int(MAX_SECONDS * SAMPLING_RATE)], dtype=np.float32)


def describe_failure(path: str | Path, error: Exception) -> str:
    """Why a file could not be opened, in the user's terms.

    :param path: The file.
    :param error: What libsndfile or the system said.
    """
    path = Path(path)
    if not path.exists():
        return "does not exist"
    if path.is_dir():
        return "is a folder, not a file"
    if path.stat().st_size == 0:
        return "is empty (0 bytes)"
    return f"cannot be read as audio ({error})"


def probe_audio(path: str | Path) -> str | None:
    """Check a file's header without decoding it.

    :param path: The file.
    :return: None if it looks usable, else what is wrong with it, the path included.
    """
    try:
        info = soundfile.info(str(path))
    except (OSError, soundfile.LibsndfileError) as error:
        return f"{path}: {describe_failure(path, error)}"
    if info.frames / info.samplerate * SAMPLING_RATE < MIN_SAMPLES:
        return f"{path}: {info.frames} samples at {info.samplerate} Hz are too short to hear"
    return None


def probe_all(paths: Iterable[str | Path], show_progress: bool = False) -> list[str]:
    """Check many files in parallel.

    :param paths: Files; each different one is checked once.
    :param show_progress: Show a progress bar.
    :return: What is wrong, one entry a bad file, in the order of the paths.
    """
    different = list(dict.fromkeys(map(str, paths)))
    with ThreadPoolExecutor(max_workers=16) as pool:
        results = pool.map(probe_audio, different, chunksize=64)
        bar = tqdm(results, total=len(different), desc="checking audio", unit="file", disable=not show_progress)
        return [problem for problem in bar if problem is not None]
