"""Bad audio: each file of a corpus is decoded to the right waveform, or refused with its name and the reason."""

import io
import os
import pickle
import signal
import socket
import struct
import sys
import tempfile
import threading
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import soundfile
from audio_dataset import DataError
from conftest import EXAMPLE, run_code, wait_until_gone
from support.processors import make_dataset, training_row

from aqa.audio import decode
from aqa.audio.decode import AudioError, load_audio, read_header
from aqa.audio.probe import probe_all, probe_clip
from aqa.audio.reader import AudioReader
from aqa.audio.sandbox import Sandbox, escape_of
from aqa.evaluation import asking
from aqa.evaluation.items import Item
from aqa.patches import slots

RATE = 16_000
SECONDS = 10.0  # no file may take longer, on a machine that does other things too; they take milliseconds
Content = bytes | Callable[[Path], None]  # of a file, or what makes it at a path


# ---- the corpus
def tone(seconds: float = 0.5, rate: int = RATE, amplitude: float = 0.5) -> np.ndarray:
    return amplitude * np.sin(2 * np.pi * 440.0 * np.arange(round(rate * seconds)) / rate)


def sound(wave: np.ndarray, format_: str = "WAV", subtype: str = "PCM_16", rate: int = RATE) -> bytes:
    file = io.BytesIO()
    soundfile.write(file, wave, rate, format=format_, subtype=subtype)
    return file.getvalue()


def pcm(wave: np.ndarray) -> bytes:
    return np.round(wave * 32767).astype("<i2").tobytes()


def chunk(name: bytes, data: bytes) -> bytes:
    return name + struct.pack("<I", len(data)) + data


def riff(data=b"", *, size=None, total=None, code=1, channels=1, rate=RATE, bits=16, align=None, before=b"", after=b""):
    """A WAV file by hand, any field of which may lie."""
    align = channels * bits // 8 if align is None else align
    fmt = struct.pack("<HHIIHH", code, channels, rate, rate * align & 0xFFFFFFFF, align & 0xFFFF, bits)
    body = b"WAVE" + chunk(b"fmt ", fmt) + before
    body += b"data" + struct.pack("<I", len(data) if size is None else size) + data + after
    return b"RIFF" + struct.pack("<I", len(body) if total is None else total) + body


def with_value(value: float, at: int, rate: int = RATE) -> np.ndarray:
    wave = tone(rate=rate)
    wave[at] = value
    return wave


def changed(data: bytes, at: int, new: bytes) -> bytes:
    return data[:at] + new + data[at + len(new) :]


def flac_of_length(frames: int) -> bytes:
    return changed(FLAC, 21, bytes([FLAC[21] & 0xF0 | frames >> 32]) + (frames & 0xFFFFFFFF).to_bytes(4, "big"))


def cut_at_page(subtype: str) -> bytes:
    data = sound(tone(4) + 0.1 * np.random.default_rng(0).standard_normal(4 * RATE), "OGG", subtype)
    return data[: data.rindex(b"OggS")]


def linked(target: str) -> Callable[[Path], None]:
    def make(path: Path) -> None:
        path.with_name("real.wav").write_bytes(PLAIN)
        path.symlink_to(target)

    return make


def make_socket(path: Path) -> None:
    folder = os.getcwd()
    os.chdir(path.parent)  # the name of a socket may have 107 bytes
    try:
        with socket.socket(socket.AF_UNIX) as end:
            end.bind(path.name)
    finally:
        os.chdir(folder)


def two_hours(channels: int) -> Callable[[Path], None]:
    """A WAV of two hours, of which the file system stores the first 31 s; the rest is a hole."""

    def make(path: Path) -> None:
        size = 7200 * RATE * channels * 2
        header = riff(size=size, total=size + 36, channels=channels)
        path.write_bytes(header + pcm(np.repeat(tone(31), channels)))
        os.truncate(path, len(header) + size)

    return make


def two_hours_of_flac(path: Path) -> None:
    with soundfile.SoundFile(path, "w", 8_000, 1, format="FLAC", subtype="PCM_16") as file:
        file.write(tone(60, 8_000))
        for _ in range(119):
            file.write(np.zeros(60 * 8_000, dtype=np.int16))


def scaled_channels(count: int) -> np.ndarray:
    """Channel k plays the tone at (k + 1) / count of full scale / 2: only the mean of all has the right amplitude."""
    return np.stack([tone(amplitude=0.5 * (k + 1) / count) for k in range(count)], axis=1)


PLAIN, FLAC, MP3 = sound(tone()), sound(tone(), "FLAC"), sound(tone(4), "MP3", "MPEG_LAYER_III")
OGG, CANCELLING = sound(tone(4), "OGG", "VORBIS"), np.stack([tone(), -tone()], axis=1)


class Good(NamedTuple):
    """A file that is decoded to the tone of 440 Hz.

    :param atol: Largest difference from the tone: half a step of 16 bits, and the rounding of the test's own file.
    :param edge: Samples at either end that are not compared: a resampler's or lossy codec's filter rings there.
    """

    content: Content
    name: str = "clip.wav"
    seconds: float = 0.5
    amplitude: float = 0.5
    atol: float = 2**-15
    edge: int = 0


RESAMPLED = {"atol": 1e-3, "edge": 1000}  # -54 dB of the tone: a resampler of low quality leaves -30 dB of images
LOSSY = {"atol": 0.03, "edge": 2400}  # a lossy codec keeps a plain tone to some hundredths of its amplitude, 0.5
ADPCM = 1017 * 16 / RATE  # whole blocks; it follows the tone with a delay
# 8 bits: a step; A-law and u-law: half of their largest step below 0.5, 2^-5
STEPS = {"PCM_U8": 2**-7, "PCM_24": 2**-23, "PCM_32": 2**-24, "FLOAT": 2**-25, "DOUBLE": 2**-25}
STEPS |= {"ULAW": 2**-6, "ALAW": 0.017}
GOOD = {
    "16000 Hz": Good(PLAIN),
    **{
        f"{rate} Hz": Good(sound(tone(rate=rate), rate=rate), **RESAMPLED)
        for rate in (8_000, 11_025, 22_050, 24_000, 32_000, 44_100, 48_000, 88_200, 96_000, 192_000)
    },
    **{
        f"{n} channels": Good(sound(scaled_channels(n), "WAV", "PCM_24"), amplitude=0.25 * (n + 1) / n)
        for n in range(2, 9)
    },
    **{f"WAV, {kind}": Good(sound(tone(), "WAV", kind), atol=atol) for kind, atol in STEPS.items()},
    "WAV, IMA ADPCM": Good(sound(tone(ADPCM), "WAV", "IMA_ADPCM"), seconds=ADPCM, atol=0.05, edge=200),
    **{f"{f}, 16 bit": Good(sound(tone(), f), f"clip.{f}") for f in ("WAVEX", "RF64", "W64", "AIFF", "AU", "FLAC")},
    "Ogg Vorbis": Good(OGG, "clip.ogg", 4, **LOSSY),
    "Ogg Opus": Good(sound(tone(4), "OGG", "OPUS"), "clip.opus", 4, **LOSSY),
    "MP3": Good(MP3, "clip.mp3", 4, **LOSSY),
    "WAV named .mp3": Good(PLAIN, "clip.mp3"),
    "FLAC named .wav": Good(FLAC),
    "MP3 named .wav": Good(MP3, seconds=4, **LOSSY),
    "WAV without extension": Good(PLAIN, "clip"),
    "unicode name": Good(PLAIN, "звук 音 🎵.wav"),
    "newline in the name": Good(PLAIN, "a\nb.wav"),
    "quotes and a dash in the name": Good(PLAIN, "-'\"%s$(x).wav"),
    "link": Good(linked("real.wav")),
    "10 ms more than the shortest": Good(sound(tone(0.03)), seconds=0.03),
    "321 samples, the shortest that is heard": Good(sound(tone()[:321]), seconds=321 / RATE),
    "2 hours of WAV (30 s are read)": Good(two_hours(1), seconds=30),
    "2 hours of 8 channels, 1.8 GB": Good(two_hours(8), seconds=30),
    "2 hours of FLAC": Good(two_hours_of_flac, seconds=30, **RESAMPLED),
    "cut behind the 30 s that are heard": Good(riff(pcm(tone(31)), size=64 * RATE), seconds=30),
    "size unknown: ffmpeg into a pipe": Good(riff(pcm(tone()), size=2**32 - 1, total=2**32 - 1)),
    "size unknown: sox into a pipe": Good(riff(pcm(tone()), size=0x7FFFF000, total=0x7FFFF024)),
    "wrong RIFF size, right data size": Good(riff(pcm(tone()), total=10**6)),
    "other chunks around the data": Good(
        riff(pcm(tone()), before=chunk(b"LIST", b"INFO" * 9), after=chunk(b"id3 ", b"x" * 64))
    ),
    "one bit of sound": Good(sound(np.full(RATE // 2, 2**-15)), amplitude=0.0),
}
# title: content, part of the message, and the file's name where it matters
UNREADABLE = "cannot be read as audio"
SHOWN_BY_THE_HEADER: dict[str, tuple] = {
    "0 bytes": (b"", "is empty (0 bytes)"),
    "RIFF and nothing else": (riff()[:12], UNREADABLE),
    "half a header": (riff()[:30], UNREADABLE),
    "header only": (riff(), "0 ms of sound"),
    "header that promises data, and none": (riff(size=RATE), "is cut short"),
    "text": (b"not found\n" * 50, UNREADABLE),
    "text named .mp3": (b"not found\n" * 50, "(no MP3 frame in it); if a player", "clip.mp3"),
    "HTML of a failed download": (b"<!DOCTYPE html><html>404</html>", UNREADABLE),
    "random bytes": (np.random.default_rng(0).bytes(9999), UNREADABLE),
    "folder": (lambda path: path.mkdir(), "is a folder, not a file"),
    "missing": (lambda path: None, "does not exist"),
    "broken link": (linked("gone.wav"), "is a broken link to gone.wav, which does not exist"),
    "link to itself": (linked("clip.wav"), "is a broken link to clip.wav"),
    "named pipe": (os.mkfifo, "is not a regular file"),
    "device that never ends": (linked("/dev/zero"), "is not a regular file"),
    "socket": (make_socket, "is not a regular file"),
    "name that is too long": (lambda path: None, "cannot be opened (File name too long)", "x" * 300),
    "name that is not UTF-8": (PLAIN, "can't encode", os.fsdecode(b"a\xff.wav")),
    **{
        f"{f}, second half missing": (sound(tone(), f)[:8_000], "is cut short", f"clip.{f}")
        for f in ("WAV", "WAVEX", "RF64", "W64", "AIFF", "AU")
    },
    "WAV, last 100 bytes missing": (PLAIN[:-100], "is cut short"),
    "24 bit WAV, cut within a sample": (sound(tone(), "WAV", "PCM_24")[:-1000], "is cut short"),
    "Ogg Vorbis cut between pages": (cut_at_page("VORBIS"), "is cut short"),
    "Ogg Opus cut between pages": (cut_at_page("OPUS"), "is cut short"),
    "Ogg, last byte missing": (OGG[:-1], "is cut short"),
    # from the second frame on, which is the first with sound
    "MP3 of unknown length": (MP3[MP3.index(MP3[:2], 100) :], "MP3 without a Xing or Info tag"),
    "rate 0 Hz": (riff(pcm(tone()), rate=0), UNREADABLE),
    "rate 1 Hz": (riff(pcm(tone()), rate=1), "its header says 1 Hz"),
    "rate 2 GHz": (riff(pcm(tone()), rate=2**31 - 1), "its header says 2147483647 Hz"),
    "no channel": (riff(pcm(tone()), channels=0, align=2), UNREADABLE),
    "65 channels": (riff(pcm(tone()), channels=65), "its header says 65 channels"),
    "65,535 channels": (riff(pcm(tone()), channels=65_535), UNREADABLE),
    "0 bits": (riff(pcm(tone()), bits=0, align=2), UNREADABLE),
    "13 bytes a sample": (riff(pcm(tone()), bits=104), UNREADABLE),
    "unknown codec": (riff(pcm(tone()), code=0xBEEF), UNREADABLE),
    "sound without format": (b"RIFF\x24\0\0\0WAVE" + chunk(b"data", pcm(tone())), UNREADABLE),
    "FLAC of unknown length": (flac_of_length(0), "does not tell its length"),
    "m4a": (
        b"\0\0\0\x20ftypM4A \0\0\0\0" + bytes(999),
        "it is MP4/M4A (AAC), which libsndfile does not know; convert it: ffmpeg",
        "clip.m4a",
    ),
    "m4a named .wav": (b"\0\0\0\x18ftypmp42" + bytes(999), "it is MP4/M4A"),
    "WebM": (b"\x1a\x45\xdf\xa3" + bytes(999), "it is WebM/Matroska", "clip.webm"),
    "raw samples": (pcm(tone()), "sound without a header", "clip.raw"),
    "CAF": (sound(tone(), "CAF"), "is CAF; convert it to one of WAV", "clip.caf"),
    "NIST Sphere": (sound(tone(), "NIST"), "is NIST; convert it to one of WAV"),
    "1 sample": (sound(tone()[1:2]), "too short"),
    "10 ms": (sound(tone(0.01)), "too short"),
    "10 ms at 48 kHz": (sound(tone(0.01, 48_000), rate=48_000), "too short"),
}
NOT_FINITE = "NaN or infinite"
SHOWN_BY_DECODING: dict[str, tuple] = {
    "FLAC, second half missing": (FLAC[:3_000], UNREADABLE),
    "FLAC, last byte missing": (FLAC[:-1], UNREADABLE),
    "FLAC, one byte changed": (changed(FLAC, len(FLAC) // 2, bytes([FLAC[len(FLAC) // 2] ^ 0xFF])), UNREADABLE),
    "FLAC that promises 49 days": (flac_of_length(2**36 - 1), UNREADABLE),
    "MP3, second half missing": (MP3[:2_000], "is cut short"),
    **{
        f"{value} as sample {at}": (sound(with_value(value, at), "WAV", "FLOAT"), NOT_FINITE)
        for value, at in ((np.nan, 0), (np.nan, -1), (np.inf, 77), (-np.inf, 77))
    },
    "NaN at 44.1 kHz": (sound(with_value(np.nan, 9, 44_100), "WAV", "FLOAT", 44_100), NOT_FINITE),
    "doubles beyond float32": (sound(with_value(1e300, 9), "WAV", "DOUBLE"), NOT_FINITE),
    "floats scaled to 16 bits": (sound(tone() * 32767, "WAV", "FLOAT"), "float samples must be scaled to 1"),
}
SILENT: dict[str, tuple] = {  # refused by training; an evaluation asks the clip all the same
    "all zeros, WAV": (sound(tone() * 0), "is digital silence"),
    "all zeros, FLAC at 44.1 kHz": (sound(np.zeros(44_100), "FLAC", rate=44_100), "is digital silence"),
    "channels that cancel out": (sound(CANCELLING, "WAV", "FLOAT"), "is digital silence"),
    "zeros for 30 s, then sound": (sound(np.concatenate([np.zeros(31 * RATE), tone()])), "is digital silence"),
}
BAD = SHOWN_BY_THE_HEADER | SHOWN_BY_DECODING | SILENT


@pytest.fixture(scope="module")
def sandbox():
    with_limits = Sandbox()
    yield with_limits
    with_limits.close()


@pytest.fixture(scope="module")
def reader():
    with_limits = AudioReader(sandboxed=True)
    yield with_limits
    with_limits.close()


def dataset_of(path: str, **kwargs):
    return make_dataset({name: [value] for name, value in training_row(path).items()}, **kwargs)


def put(content: Content, path: Path) -> str:
    path.write_bytes(content) if isinstance(content, bytes) else content(path)
    return str(path)


def outcome(load: Callable[[str], np.ndarray], path: str) -> np.ndarray | str:
    start = time.monotonic()
    try:
        return load(path)
    except AudioError as error:
        return str(error)
    finally:
        assert time.monotonic() - start < SECONDS


def evaluated(path: str, reader: AudioReader) -> tuple:
    """(lengths, unusable, silent) as eval_mmau.py finds them for one item."""
    return asking.check_audio([Item(0, "item 0", {}, "?", Path(path), None)], reader, False)


@pytest.mark.parametrize("title", GOOD)
def test_a_sound_file_is_decoded_right(tmp_path, reader, title):
    case = GOOD[title]
    path = put(case.content, tmp_path / case.name)
    result = outcome(load_audio, path)
    assert isinstance(result, np.ndarray), result
    assert result.dtype == np.float32
    expected = tone(case.seconds, amplitude=case.amplitude) if case.amplitude else np.full(len(result), 2**-15)
    assert abs(len(result) - len(expected)) <= (1 if case.edge else 0)
    inner = slice(case.edge, min(len(result), len(expected)) - case.edge)
    np.testing.assert_allclose(result[inner], expected[inner], rtol=0, atol=case.atol)
    np.testing.assert_array_equal(outcome(reader.load, path), result)
    assert probe_all([path], read_header) == probe_all([path], load_audio) == []
    assert evaluated(path, reader) == ({0: [len(result)]}, {}, [])
    assert probe_clip(path).kind is None
    np.testing.assert_array_equal(dataset_of(path, reader=reader)[0][1][0], result)


@pytest.mark.parametrize("title", BAD)
def test_a_bad_file_is_named_with_the_reason(tmp_path, reader, title):
    content, error, *name = BAD[title]
    path = put(content, tmp_path / (name[0] if name else "clip.wav"))
    result = outcome(load_audio, path)
    named = path if path.isprintable() else ascii(path)
    assert isinstance(result, str)
    assert result.startswith(f"{named}: ") and "\n" not in result and error in result
    assert outcome(reader.load, path) == result
    assert probe_all([path], load_audio) == [result]
    header = probe_all([path], read_header)
    assert len(header) == (title in SHOWN_BY_THE_HEADER) and all(text.startswith(f"{named}: ") for text in header)
    clip = probe_clip(path, reader)
    missing = title in ("missing", "name that is too long")
    assert clip.kind == f"audio_{'missing' if missing else 'silent' if title in SILENT else 'unreadable'}"
    assert named in clip.reason
    lengths, unusable, silent = evaluated(path, reader)
    if title in SILENT:
        assert (list(lengths), unusable, silent) == ([0], {}, [0])  # asked, and reported
    else:
        assert (lengths, unusable, silent) == ({}, {0: f"item 0: {result}"}, [])
    message = "cannot be stored|no path" if title == "name that is not UTF-8" else "1 problems in 1 rows"
    with pytest.raises(DataError, match=message):
        dataset_of(path, decode_all=True)
    if title not in SHOWN_BY_THE_HEADER:  # training's own check reads headers; the rest stops it at the clip's turn
        with pytest.raises(AudioError, match="clip"):
            dataset_of(path)[0]


def test_a_name_with_a_zero_byte_is_refused(sandbox):
    for load in (load_audio, read_header, sandbox.load):
        with pytest.raises(AudioError, match=r"'a\\x00b\.wav': .*null"):
            load("a\0b.wav")


def test_a_file_that_may_not_be_read_is_named():
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:  # pytest's own folder is closed to other users
        path = put(PLAIN, Path(folder) / "clip.wav")
        os.chmod(folder, 0o755)
        os.chmod(path, 0)
        user = os.geteuid()
        try:
            if user == 0:
                os.seteuid(65534)  # root may read everything
            with pytest.raises(AudioError, match=r"clip\.wav: cannot be opened \(Permission denied\)"):
                load_audio(path)
            assert "Permission denied" in probe_all([path], read_header)[0]
        finally:
            os.seteuid(user)


@pytest.mark.parametrize("channels", [1, 8])
def test_two_hours_cost_no_more_than_30_s(tmp_path, channels):
    def cost(path: str) -> tuple[int, float]:
        tracemalloc.start()
        start = time.process_time()
        load_audio(path)
        seconds, peak = time.process_time() - start, tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return peak, seconds

    short = put(riff(pcm(np.repeat(tone(31), channels)), channels=channels), tmp_path / "short.wav")
    cost(short)
    peak, seconds = cost(short)
    long_peak, long_seconds = cost(put(two_hours(channels), tmp_path / "long.wav"))
    assert long_peak < min(peak + 2**20, 12 * 2**20)  # 30 s of mono are 1.9 MB: blocks, joined, their absolute values
    assert long_seconds < 3 * seconds + 0.5


@pytest.mark.parametrize("rate", [32_000, 44_100])
def test_what_is_above_8_khz_does_not_come_back_as_another_tone(tmp_path, rate):
    high = 0.5 * np.sin(2 * np.pi * 12_000 * np.arange(rate // 2) / rate)
    path = put(sound(high, "WAV", "FLOAT", rate), tmp_path / "clip.wav")
    assert np.abs(load_audio(path)[1000:-1000]).max() < 1e-3


def test_the_30_s_of_a_longer_file_are_right_up_to_the_last_sample(tmp_path):
    """The cut is not made where the resampler's filter knows of no more samples."""
    path = put(sound(tone(31, 44_100), rate=44_100), tmp_path / "clip.wav")
    np.testing.assert_allclose(load_audio(path)[-100:], tone(30)[-100:], rtol=0, atol=1e-3)


def test_probing_many_files_keeps_their_order_and_opens_each_once(tmp_path, monkeypatch):
    good = put(PLAIN, tmp_path / "good.wav")
    opened, info = [], soundfile.info
    monkeypatch.setattr(decode.soundfile, "info", lambda path: opened.append(path) or info(path))
    missing = [str(tmp_path / name) for name in ("z.wav", "a.wav")]
    paths = [good, missing[0], good, missing[1], missing[0]]
    assert probe_all(paths, read_header) == [f"{path}: does not exist" for path in missing]
    assert sorted(opened) == sorted([good, *missing])


@pytest.mark.parametrize("sandboxed", [False, True])
def test_as_much_is_heard_as_was_asked_for(tmp_path, sandboxed):
    """--audio_seconds, also in the worker; the last 4 s of a file of 64 s are missing."""
    clip = put(sound(tone(50)), tmp_path / "clip.wav")
    short = put(riff(pcm(tone(60)), size=128 * RATE), tmp_path / "short.wav")
    for seconds, heard in ((20, 20), (45, 45), (70, 50)):
        reader = AudioReader(sandboxed, seconds=seconds)
        assert len(reader.load(clip)) == heard * RATE
        if seconds < 60:
            assert len(reader.load(short)) == heard * RATE
        else:
            for read in (reader.load, reader.read_header):
                with pytest.raises(AudioError, match="cut short"):
                    read(short)
        reader.close()


def test_limits_are_those_of_the_slots():
    assert (decode.MAX_FRAMES, decode.MIN_FRAMES) == (slots.MAX_FRAMES, slots.MIN_FRAMES)


# ---- the sandbox
# A worker as aqa.audio.sandbox starts it, but with a decoder that does something else for some names.
PROGRAM = """
import ctypes, os, signal, sys, time
sys.path.insert(0, {folder!r})
import numpy as np
from aqa.audio.decode import load_audio, read_header
from aqa.audio.sandbox import serve

def load(path, silence_ok, seconds):
    kind = os.path.basename(path)
    if kind == "crash": ctypes.string_at(0)
    if kind == "abort": os.abort()
    if kind == "exit": os._exit(3)
    if kind == "sleep": time.sleep(1000)
    if kind == "stubborn":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        while True: pass
    if kind == "eat":
        kept = []
        while True: kept.append(np.ones(2**20))
    if kind == "eat at once": return np.ones(2**40)
    if kind == "write": os.write(os.open(path, os.O_CREAT | os.O_WRONLY), b"x" * 10)
    if kind == "error": raise KeyError("inside")
    if kind == "nan": return np.full(999, np.nan, dtype=np.float32)
    if kind == "odd bytes": return np.zeros(999, dtype=np.uint8)
    if kind == "too much": return np.zeros(10**6, dtype=np.float32)
    return load_audio(path, silence_ok, seconds)

serve(load, read_header)
"""


@pytest.mark.parametrize(
    ("kind", "message", "dies"),
    [
        ("crash", "the decoder crashed (signal 11", True),
        ("abort", "the decoder crashed (signal 6", True),
        ("exit", "the decoder crashed (exit 3", True),
        ("sleep", "took more than 2 s and was stopped", True),
        ("stubborn", "took more than 2 s and was stopped", True),
        ("eat", "decoding needs more than 256 MiB", False),
        ("eat at once", "decoding needs more than 256 MiB", False),
        ("write", "File too large", False),
        ("error", "KeyError('inside')", False),
        ("nan", "not finite samples", False),
        ("odd bytes", "not finite samples", False),
        ("too much", "a reply of 4000000 bytes", True),
    ],
)
def test_whatever_the_decoder_does_the_file_is_named_and_the_next_is_read(tmp_path, kind, message, dies):
    box = Sandbox(seconds=2.0, mebibytes=256, command=[sys.executable, "-c", PROGRAM.format(folder=str(EXAMPLE))])
    clip = put(PLAIN, tmp_path / "clip.wav")
    expected = load_audio(clip)
    np.testing.assert_array_equal(box.load(clip), expected)
    worker = box._worker
    start = time.monotonic()
    with pytest.raises(AudioError) as error:
        box.load(tmp_path / kind)
    assert time.monotonic() - start < 2 + SECONDS
    assert str(error.value).startswith(f"{tmp_path / kind}: ") and message in str(error.value)
    np.testing.assert_array_equal(box.load(clip), expected)
    assert (box._worker is not worker) == (worker.poll() is not None) == dies
    box.close()


def test_a_worker_that_was_killed_between_two_files_is_replaced(tmp_path, sandbox):
    clip = put(PLAIN, tmp_path / "clip.wav")
    sandbox.load(clip)
    sandbox._worker.kill()
    sandbox._worker.wait()
    assert len(sandbox.load(clip)) == RATE // 2


def test_the_real_decoder_keeps_the_memory_limit(tmp_path):
    clip = put(sound(0.1 * np.ones((30 * 48_000, 8)), rate=48_000), tmp_path / "clip.wav")
    box = Sandbox(mebibytes=4)
    with pytest.raises(AudioError, match=r"clip\.wav: decoding needs more than 4 MiB"):
        box.load(clip)
    box.close()


def test_threads_forks_and_copies_get_their_own_answers(tmp_path, sandbox):
    paths = [put(riff(pcm(np.full(1000 + i, 0.01 * (i + 1)))), tmp_path / f"{i}.wav") for i in range(24)]
    expected = [load_audio(path) for path in paths]
    results: dict[int, np.ndarray] = {}
    threads = [threading.Thread(target=lambda i=i: results.update({i: sandbox.load(paths[i])})) for i in range(24)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(SECONDS)
    assert all((results[i] == expected[i]).all() for i in range(24))

    worker = sandbox._worker.pid
    sandbox._lock.acquire()  # as if a thread of the parent were in the middle of a file
    child = os.fork()
    if child == 0:
        signal.alarm(20)
        same = all((sandbox.load(path) == wave).all() for path, wave in zip(paths, expected, strict=True))
        other = sandbox._worker.pid != worker
        sandbox.close()
        os._exit(0 if same and other else 1)
    sandbox._lock.release()
    assert all((sandbox.load(path) == wave).all() for path, wave in zip(paths, expected, strict=True))
    assert os.waitpid(child, 0)[1] == 0
    assert sandbox._worker.pid == worker

    copy = pickle.loads(pickle.dumps(sandbox))
    assert (copy.load(paths[0]) == expected[0]).all()
    copy.close()


def test_the_worker_ends_when_its_owner_is_killed():
    code = (
        "import os, signal; from aqa.audio.sandbox import Sandbox; from aqa.audio.decode import AudioError\n"
        "box = Sandbox()\ntry: box.load('/none')\nexcept AudioError: print(box._worker.pid, flush=True)\n"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    done = run_code(code, check=False)
    assert done.returncode == -signal.SIGKILL
    wait_until_gone(int(done.stdout))


# ---- --confine_audio
def test_what_leads_out_of_a_folder_is_seen(tmp_path):
    inside, outside = tmp_path / "audio", tmp_path / "audio2"
    for folder in (inside, outside):
        folder.mkdir()
        (folder / "a.wav").touch()
    (inside / "file").symlink_to(outside / "a.wav")
    (inside / "folder").symlink_to(outside)
    (inside / "fine").symlink_to("a.wav")
    (tmp_path / "link").symlink_to(inside)
    for name in ("a.wav", "fine", "missing.wav", "new/../a.wav", "..foo"):
        assert escape_of(inside / name, inside) is None
        assert escape_of(inside / name, tmp_path / "link") is None
        assert escape_of(tmp_path / "link" / name, f"{inside}/") is None
    for name in ("file", "folder/a.wav", "../audio2/a.wav", "..", "../../etc/passwd", "/etc/passwd", "../audio.wav"):
        assert escape_of(os.path.join(inside, name), inside)
    assert escape_of("/etc/passwd", "/") is None


def test_training_refuses_what_lies_outside_its_folder(tmp_path, monkeypatch):
    (tmp_path / "audio").mkdir()
    put(PLAIN, tmp_path / "secret.wav")
    clip = Path(put(PLAIN, tmp_path / "audio/clip.wav"))
    (tmp_path / "audio/link.wav").symlink_to("../secret.wav")
    root = str(tmp_path / "audio")
    for name in ("audio/../secret.wav", "audio/link.wav"):
        with monkeypatch.context() as patch:
            patch.setattr(decode.soundfile, "info", lambda path: pytest.fail(f"{path} was opened"))
            with pytest.raises(DataError, match=rf"leads to .*/secret\.wav, outside {root} \(--confine_audio\)"):
                dataset_of(str(tmp_path / name), reader=AudioReader(folder=root))
    dataset = dataset_of(str(clip), reader=AudioReader(folder=root))
    assert len(dataset[0][1][0]) == RATE // 2
    clip.unlink()
    clip.symlink_to("../secret.wav")  # after the check
    with pytest.raises(AudioError, match="leads to"):
        dataset[0]
