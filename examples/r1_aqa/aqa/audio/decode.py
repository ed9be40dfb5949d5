"""Decode audio files the way the models want them: mono float32 at 16 kHz, by default 30 s at most.

Every file ends in its waveform or in an :class:`AudioError` that names it.
"""

import os
import re
import stat
from pathlib import Path
from typing import Any

import numpy as np
import soundfile

from aqa.common.constants import HOP_LENGTH, MAX_FRAMES, MIN_FRAMES, SAMPLING_RATE

MAX_SECONDS = MAX_FRAMES * HOP_LENGTH / SAMPLING_RATE
MIN_SAMPLES = (MIN_FRAMES - 1) * HOP_LENGTH + 1  # shorter clips leave no audio token
MIN_RATE, MAX_RATE, MAX_CHANNELS = 1_000, 768_000, 64  # a header with values beyond these is damaged
MAX_PEAK = 100.0  # of float samples, whose full scale is 1; a larger peak means whole numbers stored as floats
BLOCK = 2**16  # frames decoded at a time, so that eight channels cost the memory of one
SILENCE = "is digital silence: every sample that the model would hear is zero"

# The formats of libsndfile for which a file that is cut short can be told from a whole one.
FORMATS = ("WAV", "WAVEX", "RF64", "W64", "AIFF", "AU", "FLAC", "OGG", "MP3")
# libsndfile's log of a file that ends before its data do. "RIFF" is left out: many writers get that size wrong.
_CUT = re.compile(r"^ *(?:data|Data Size|SSND|riff|Riff size) *: *(\d+) *\(should be (\d+)\)", re.MULTILINE)
_UNKNOWN_SIZE = 0x7FFF_F000  # from here on a size means that the writer could not know it: ffmpeg into a pipe
_SLACK = 8  # bytes: some writers count the chunk's own header
_MP3_SLACK = 2 * 1152  # samples: decoders drop or keep the encoder's padding
_FOREIGN = {  # what a file that libsndfile does not know begins with, and where
    b"ftyp": (4, "MP4/M4A (AAC)"),
    b"\x1a\x45\xdf\xa3": (0, "WebM/Matroska"),
    b"\x30\x26\xb2\x75": (0, "WMA/WMV"),
    b"#!AMR": (0, "AMR"),
    b"FLV": (0, "Flash video"),
}


class AudioError(ValueError):
    """An audio file that cannot be used; the message names it and says why."""


def show(path: str | Path) -> str:
    """A path for a message: as it is, or escaped if a character in it would break the line."""
    text = str(path)
    return text if text.isprintable() else ascii(text)


def load_audio(path: str | Path, silence_ok: bool = False, seconds: float = MAX_SECONDS) -> np.ndarray:
    """Decode a file.

    Reads no more than the model hears, whatever the length of the file.

    :param path: A file in one of :data:`FORMATS`, of any rate and number of channels.
    :param silence_ok: Accept a clip whose samples are all zero. An evaluation asks all of its questions, so it does;
        in training the model would learn to answer without listening.
    :param seconds: What is longer is cut.
    :return: Waveform ``(samples,)`` float32, 16 kHz mono.
    :raises AudioError: if the file is missing, is not readable as audio, is cut short, is shorter than 20 ms, is
        digital silence, or has samples that are no sound (NaN, infinite, or far above full scale).
    """
    name = show(path)
    try:
        _refuse_special(path)
        with soundfile.SoundFile(str(path)) as file:
            _check_header(path, file, seconds)
            rate, whole = file.samplerate, file.frames
            # a few samples more, for the resampler's filter; cut below
            left = min(whole, int((seconds + 0.1) * rate))
            slack = _MP3_SLACK if file.format == "MP3" else 0
            blocks = [np.empty(0, dtype=np.float32)]
            while left > 0:
                block = file.read(min(left, BLOCK), dtype="float32", always_2d=True)
                if not len(block):
                    break
                left -= len(block)
                with np.errstate(over="ignore", invalid="ignore"):  # what is not finite is refused below
                    blocks.append(block.mean(axis=1))
    except AudioError:
        raise
    except (OSError, soundfile.SoundFileError, TypeError, ValueError) as error:
        raise AudioError(f"{name}: {describe_failure(path, error)}") from error
    wave = np.concatenate(blocks)
    if left > slack:
        raise AudioError(f"{name}: is cut short: {len(wave)} samples, its header promises {left} more")
    peak = float(np.abs(wave).max(initial=0.0))
    if not np.isfinite(peak):
        raise AudioError(f"{name}: has samples that are NaN or infinite")
    if peak > MAX_PEAK:
        raise AudioError(f"{name}: has samples up to {peak:g}; float samples must be scaled to 1, not to whole numbers")
    if rate != SAMPLING_RATE:
        try:
            import soxr
        except ImportError as error:
            raise AudioError(f"{name}: is at {rate} Hz, and resampling needs soxr: pip install soxr") from error

        wave = soxr.resample(wave, rate, SAMPLING_RATE, quality="HQ")
    if len(wave) < MIN_SAMPLES:
        raise AudioError(f"{name}: {_too_short(len(wave) / SAMPLING_RATE)}")
    wave = np.ascontiguousarray(wave[: int(seconds * SAMPLING_RATE)], dtype=np.float32)
    if not silence_ok and not wave.any():
        more = f"; of its {whole / rate:.1f} s the first {seconds:g} are heard (--audio_seconds)"
        raise AudioError(f"{name}: {SILENCE}{more if whole > seconds * rate else ''}")
    return wave


def read_header(path: str | Path, seconds: float = MAX_SECONDS) -> tuple[int, int]:
    """Check a file's header without decoding it.

    :return: Frames and rate (Hz).
    :raises AudioError: for what :func:`load_audio` raises it, as far as a header shows it.
    """
    try:
        _refuse_special(path)
        info = soundfile.info(str(path))
        _check_header(path, info, seconds)
    except AudioError:
        raise
    except (OSError, soundfile.SoundFileError, TypeError, ValueError) as error:
        raise AudioError(f"{show(path)}: {describe_failure(path, error)}") from error
    if info.frames / info.samplerate * SAMPLING_RATE < MIN_SAMPLES:
        raise AudioError(f"{show(path)}: {_too_short(info.frames / info.samplerate)}")
    return info.frames, info.samplerate


def _too_short(seconds: float) -> str:
    needed = MIN_SAMPLES / SAMPLING_RATE * 1000
    return f"{seconds * 1000:.0f} ms of sound are too short; the model needs {needed:.2f} ms to hear anything"


def _refuse_special(path: str | Path) -> None:
    """Refuse pipes and devices, because reading them might never end."""
    if os.path.exists(path) and not stat.S_ISREG(mode := os.stat(path).st_mode) and not stat.S_ISDIR(mode):
        raise AudioError(f"{show(path)}: is not a regular file, but a pipe, socket or device")


def _check_header(path: str | Path, header: Any, seconds: float) -> None:
    name, frames, rate = show(path), header.frames, header.samplerate
    if header.format not in FORMATS:
        raise AudioError(f"{name}: is {header.format}; convert it to one of {', '.join(FORMATS)}")
    if not MIN_RATE <= rate <= MAX_RATE:
        raise AudioError(f"{name}: its header says {rate} Hz; {MIN_RATE} to {MAX_RATE} Hz are read")
    if header.channels > MAX_CHANNELS:
        raise AudioError(f"{name}: its header says {header.channels} channels; {MAX_CHANNELS} at most are read")
    if frames > 2**40:  # more than two weeks at the highest rate; libsndfile's number for a length that is not known
        raise AudioError(f"{name}: its header does not tell its length; convert it, for example to WAV")
    if header.format == "MP3" and not _has_length_tag(path):
        # libsndfile guesses the length from the first frame then, and reads half of a file of variable bit rate
        raise AudioError(f"{name}: is MP3 without a Xing or Info tag, so its length is not known; convert it to WAV")
    if frames >= seconds * rate:
        return  # the model hears no more, and these are there even if the file is cut short
    for match in _CUT.finditer(header.extra_info):
        promised, there = map(int, match.groups())
        if there + _SLACK < promised < _UNKNOWN_SIZE:
            raise AudioError(f"{name}: is cut short: its header promises {promised} bytes of sound, {there} are there")
    if header.format == "OGG" and not _has_last_page(path):
        raise AudioError(f"{name}: is cut short: the last page of an Ogg stream is missing")


def _has_length_tag(path: str | Path) -> bool:
    """Whether the first frame of an MP3 is a Xing, Info or VBRI tag, which holds the length."""
    with open(path, "rb") as file:
        start = file.read(10)
        if start[:3] == b"ID3":  # four times seven bits
            size = sum((byte & 0x7F) << shift for byte, shift in zip(start[6:10], (21, 14, 7, 0), strict=True))
            file.seek(10 + size)
            start = b""
        start += file.read(4096)
    return any(tag in start for tag in (b"Xing", b"Info", b"VBRI"))


def _has_last_page(path: str | Path) -> bool:
    """Whether an Ogg file ends with a whole page that is marked as the last one."""
    with open(path, "rb") as file:
        end = file.seek(0, os.SEEK_END)
        file.seek(max(0, end - 2 * 65_307))  # a page is 65,307 bytes at most
        tail = file.read()
    at = tail.rfind(b"OggS")
    page = tail[at:] if at >= 0 else b""
    if len(page) < 27 or len(page) < 27 + page[26]:
        return False
    return bool(page[5] & 4) and len(page) >= 27 + page[26] + sum(page[27 : 27 + page[26]])


def describe_failure(path: str | Path, error: Exception) -> str:
    """Say in the user's terms why a file could not be opened."""
    if os.path.islink(path) and not os.path.exists(path):
        return f"is a broken link to {show(os.readlink(path))}, which does not exist"
    if os.path.isdir(path):
        return "is a folder, not a file"
    try:
        with open(path, "rb") as file:
            start = file.read(16)
    except FileNotFoundError:
        return "does not exist"
    except (OSError, ValueError) as system_error:
        return f"cannot be opened ({getattr(system_error, 'strerror', None) or system_error})"
    if not start:
        return "is empty (0 bytes)"
    for magic, (offset, kind) in _FOREIGN.items():
        if start[offset:].startswith(magic):
            hint = "which libsndfile does not know; convert it: ffmpeg -i IN.m4a OUT.wav"
            return f"cannot be read as audio: it is {kind}, {hint}"
    if isinstance(error, TypeError):  # soundfile takes *.raw for sound without a header and asks for its rate
        return "cannot be read as audio: *.raw means sound without a header, whose rate is not known; convert it to WAV"
    if isinstance(error, soundfile.LibsndfileError):  # some of its errors have a number and no text
        reason = error.error_string or f"damaged: libsndfile error {error.code}"
        if reason.startswith("File does not exist"):  # what libsndfile says of a *.mp3 in which it finds no frame
            reason = "no MP3 frame in it"
        return f"cannot be read as audio ({reason}); if a player plays it, convert it: ffmpeg -i IN OUT.wav"
    return f"cannot be read as audio ({error})"
