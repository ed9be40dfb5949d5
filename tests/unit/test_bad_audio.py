"""Bad audio: each file of a corpus made here ends in an error that names it, or in the right waveform.

docs/bad_input.md is the table of these cases. WRITE_DOCS=1 pytest tests/test_bad_audio.py writes it anew.
"""

from __future__ import annotations

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
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import eval_mmau
import numpy as np
import pytest
import soundfile
from audio_dataset import AudioPromptDataset, DataError
from conftest import EXAMPLE, ROOT
from support.processors import TextProcessor

from aqa.audio import decode
from aqa.audio.decode import AudioError, load_audio, probe_all, read_header
from aqa.audio.probe import probe_clip
from aqa.audio.sandbox import Sandbox, escape_of
from aqa.evaluation.items import Item
from aqa.patches import slots

RATE = 16_000
TABLE = ROOT / "docs" / "bad_input.md"
BEGIN, END = "<!-- cases: made by tests/test_bad_audio.py -->", "<!-- end of cases -->"
SECONDS = 10.0  # no file may take longer, on a machine that does other things too; they take milliseconds


# ----------------------------------------------------------------------------------------------------------- the corpus
def tone(seconds: float = 0.5, rate: int = RATE, amplitude: float = 0.5) -> np.ndarray:
    return amplitude * np.sin(2 * np.pi * 440.0 * np.arange(round(rate * seconds)) / rate)


def pcm(wave: np.ndarray) -> bytes:
    return np.round(wave * 32767).astype("<i2").tobytes()


def riff(
    data: bytes,
    *,
    size: int | None = None,
    total: int | None = None,
    code: int = 1,
    channels: int = 1,
    rate: int = RATE,
    bits: int = 16,
    align: int | None = None,
    before: bytes = b"",
    after: bytes = b"",
) -> bytes:
    """A WAV file by hand, any field of which may lie."""
    align = channels * bits // 8 if align is None else align
    fmt = struct.pack("<HHIIHH", code, channels, rate, rate * align & 0xFFFFFFFF, align & 0xFFFF, bits)
    body = b"WAVEfmt " + struct.pack("<I", len(fmt)) + fmt + before
    body += b"data" + struct.pack("<I", len(data) if size is None else size) + data + after
    return b"RIFF" + struct.pack("<I", len(body) if total is None else total) + body


def chunk(name: bytes, data: bytes) -> bytes:
    return name + struct.pack("<I", len(data)) + data


def encoded(wave: np.ndarray, format_: str, subtype: str, rate: int = RATE) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "x")
        soundfile.write(path, wave, rate, format=format_, subtype=subtype)
        return Path(path).read_bytes()


def content(make: Callable[[], bytes]) -> Callable[[Path], None]:
    return lambda path: path.write_bytes(make())


def written(
    wave: Callable[[], np.ndarray],
    format_: str = "WAV",
    subtype: str = "PCM_16",
    rate: int = RATE,
    cut: slice = slice(None),
):
    return content(lambda: encoded(wave(), format_, subtype, rate)[cut])


def no_xing() -> bytes:
    """An MP3 from its second frame on, which is the first with sound."""
    data = encoded(tone(2), "MP3", "MPEG_LAYER_III")
    second = data.index(data[:2], 100)
    return data[second:]


def flipped_flac() -> bytes:
    data = bytearray(encoded(tone(), "FLAC", "PCM_16"))
    data[len(data) // 2] ^= 0xFF
    return bytes(data)


def flac_of_length(frames: int) -> bytes:
    data = bytearray(encoded(tone(), "FLAC", "PCM_16"))
    data[21] = data[21] & 0xF0 | frames >> 32
    data[22:26] = (frames & 0xFFFFFFFF).to_bytes(4, "big")
    return bytes(data)


def cut_at_page(subtype: str) -> bytes:
    data = encoded(tone(4) + 0.1 * np.random.default_rng(0).standard_normal(4 * RATE), "OGG", subtype)
    return data[: data.rindex(b"OggS")]


def with_value(value: float, at: int, rate: int = RATE) -> Callable[[], np.ndarray]:
    def make() -> np.ndarray:
        wave = tone(rate=rate)
        wave[at] = value
        return wave

    return make


def linked(target: str | None) -> Callable[[Path], None]:
    def make(path: Path) -> None:
        real = path.with_name("real.wav")
        if target is None:
            real.write_bytes(riff(pcm(tone())))
        path.symlink_to(target or real)

    return make


def make_socket(path: Path) -> None:
    folder = os.getcwd()
    os.chdir(path.parent)  # the name of a socket may have 107 bytes
    try:
        with socket.socket(socket.AF_UNIX) as end:
            end.bind(path.name)
    finally:
        os.chdir(folder)


def two_hours(channels: int, rate: int = RATE) -> Callable[[Path], None]:
    """A WAV of two hours, of which the file system stores the first 31 s; the rest is a hole."""

    def make(path: Path) -> None:
        start = pcm(np.repeat(tone(31, rate), channels))
        size = 7200 * rate * channels * 2
        header = riff(b"", size=size, total=size + 36, channels=channels, rate=rate)
        path.write_bytes(header + start)
        os.truncate(path, len(header) + size)

    return make


def two_hours_of_flac(path: Path) -> None:
    with soundfile.SoundFile(path, "w", 8_000, 1, format="FLAC", subtype="PCM_16") as file:
        file.write(tone(60, 8_000))
        for _ in range(119):
            file.write(np.zeros(60 * 8_000, dtype=np.int16))


@dataclass(frozen=True)
class Case:
    """A file and what must become of it.

    :param title: For the table.
    :param make: Makes the file at a path.
    :param error: Part of the message; None: the file is decoded to the tone of 440 Hz.
    :param name: File name.
    :param seconds: Length of the tone.
    :param amplitude: Of the tone.
    :param atol: Largest difference from the tone: half a step of 16 bits, and the rounding of the test's own file.
    :param edge: Samples at either end that are not compared: a resampler's or lossy codec's filter rings there.
    :param header_shows: Whether the header alone gives the fault away.
    :param silence: Whether an evaluation asks the clip all the same.
    """

    title: str
    make: Callable[[Path], None]
    error: str | None = None
    name: str = "clip.wav"
    seconds: float = 0.5
    amplitude: float = 0.5
    atol: float = 2**-15
    edge: int = 0
    header_shows: bool = True
    silence: bool = False


def good(title: str, make: Callable[[Path], None], **fields) -> Case:
    return Case(title, make, **fields)


def bad(title: str, make: Callable[[Path], None], error: str, **fields) -> Case:
    return Case(title, make, error, **fields)


# -54 dB of the tone: a resampler of low quality leaves -30 dB of images
RESAMPLED = {"atol": 1e-3, "edge": 1000}
# a lossy codec keeps a plain tone to some hundredths of its amplitude, 0.5
LOSSY = {"atol": 0.03, "edge": 2400, "seconds": 2.0}


def all_channels(count: int) -> Callable[[], np.ndarray]:
    """Channel k plays the tone at (k + 1) / count of full scale / 2: only the mean of all has the right amplitude."""
    return lambda: np.stack([tone(amplitude=0.5 * (k + 1) / count) for k in range(count)], axis=1)


CASES = [
    *[
        good(f"{rate} Hz", written(lambda rate=rate: tone(rate=rate), rate=rate), **({} if rate == RATE else RESAMPLED))
        for rate in (8_000, 11_025, 16_000, 22_050, 24_000, 32_000, 44_100, 48_000, 88_200, 96_000, 192_000)
    ],
    *[
        good(f"{n} channels", written(all_channels(n), subtype="PCM_24"), amplitude=0.25 * (n + 1) / n)
        for n in range(2, 9)
    ],
    # 8 bits: a step; A-law and u-law: half of their largest step below 0.5, 2^-5; ADPCM follows with a delay
    *[
        good(f"WAV, {subtype}", written(tone, subtype=subtype), atol=atol)
        for subtype, atol in {
            "PCM_U8": 2**-7,
            "PCM_24": 2**-23,
            "PCM_32": 2**-24,
            "FLOAT": 2**-25,
            "DOUBLE": 2**-25,
            "ULAW": 2**-6,
            "ALAW": 0.017,
        }.items()
    ],
    good(
        "WAV, IMA ADPCM",
        written(lambda: tone(1017 * 16 / RATE), subtype="IMA_ADPCM"),
        seconds=1017 * 16 / RATE,
        atol=0.05,
        edge=200,
    ),
    *[good(f"{f}, 16 bit", written(tone, f), name=f"clip.{f}") for f in ("WAVEX", "RF64", "W64", "AIFF", "AU", "FLAC")],
    good("Ogg Vorbis", written(lambda: tone(2), "OGG", "VORBIS"), name="clip.ogg", **LOSSY),
    good("Ogg Opus", written(lambda: tone(2), "OGG", "OPUS"), name="clip.opus", **LOSSY),
    good("MP3", written(lambda: tone(2), "MP3", "MPEG_LAYER_III"), name="clip.mp3", **LOSSY),
    good("WAV named .mp3", written(tone), name="clip.mp3"),
    good("FLAC named .wav", written(tone, "FLAC")),
    good("MP3 named .wav", written(lambda: tone(2), "MP3", "MPEG_LAYER_III"), **LOSSY),
    good("WAV without extension", written(tone), name="clip"),
    good("unicode name", written(tone), name="звук 音 🎵.wav"),
    good("newline in the name", written(tone), name="a\nb.wav"),
    good("quotes and a dash in the name", written(tone), name="-'\"%s$(x).wav"),
    good("link", linked(None)),
    good("10 ms more than the shortest", written(lambda: tone(0.03)), seconds=0.03),
    good("321 samples, the shortest that is heard", written(lambda: tone()[:321]), seconds=321 / RATE),
    good("2 hours of WAV (30 s are read)", two_hours(1), seconds=30),
    good("2 hours of 8 channels, 1.8 GB", two_hours(8), seconds=30),
    good("2 hours of FLAC", two_hours_of_flac, seconds=30, **RESAMPLED),
    good("cut behind the 30 s that are heard", content(lambda: riff(pcm(tone(31)), size=64 * RATE)), seconds=30),
    good("size unknown: ffmpeg into a pipe", content(lambda: riff(pcm(tone()), size=2**32 - 1, total=2**32 - 1))),
    good("size unknown: sox into a pipe", content(lambda: riff(pcm(tone()), size=0x7FFFF000, total=0x7FFFF024))),
    good("wrong RIFF size, right data size", content(lambda: riff(pcm(tone()), total=10**6))),
    good(
        "other chunks around the data",
        content(lambda: riff(pcm(tone()), before=chunk(b"LIST", b"INFO" * 9), after=chunk(b"id3 ", b"x" * 64))),
    ),
    good("one bit of sound", written(lambda: np.full(RATE // 2, 2**-15)), amplitude=0.0),
    # ----------------------------------------------------------------------------------------------- nothing to decode
    bad("0 bytes", content(bytes), "is empty (0 bytes)"),
    bad("RIFF and nothing else", content(lambda: riff(b"")[:12]), "cannot be read as audio"),
    bad("half a header", content(lambda: riff(b"")[:30]), "cannot be read as audio"),
    bad("header only", content(lambda: riff(b"")), "0 ms of sound"),
    bad("header that promises data, and none", content(lambda: riff(b"", size=RATE)), "is cut short"),
    bad("text", content(lambda: b"not found\n" * 50), "cannot be read as audio"),
    bad("HTML of a failed download", content(lambda: b"<!DOCTYPE html><html>404</html>"), "cannot be read as audio"),
    bad("random bytes", content(lambda: np.random.default_rng(0).bytes(9999)), "cannot be read as audio"),
    bad("folder", lambda path: path.mkdir(), "is a folder, not a file"),
    bad("missing", lambda path: None, "does not exist"),
    bad("broken link", linked("gone.wav"), "is a broken link to gone.wav, which does not exist"),
    bad("link to itself", linked("clip.wav"), "is a broken link to clip.wav"),
    bad("named pipe", os.mkfifo, "is not a regular file"),
    bad("device that never ends", linked("/dev/zero"), "is not a regular file"),
    bad("socket", make_socket, "is not a regular file"),
    bad("name that is too long", lambda path: None, "cannot be opened (File name too long)", name="x" * 300),
    bad("name that is not UTF-8", written(tone), "can't encode", name=os.fsdecode(b"a\xff.wav")),
    # ------------------------------------------------------------------------------------------------------ cut short
    *[
        bad(f"{f}, second half missing", written(tone, f, cut=slice(8_000)), "is cut short", name=f"clip.{f}")
        for f in ("WAV", "WAVEX", "RF64", "W64", "AIFF", "AU")
    ],
    bad("WAV, last 100 bytes missing", written(tone, cut=slice(-100)), "is cut short"),
    bad("24 bit WAV, cut within a sample", written(tone, subtype="PCM_24", cut=slice(-1000)), "is cut short"),
    bad(
        "FLAC, second half missing",
        written(tone, "FLAC", cut=slice(3_000)),
        "cannot be read as audio",
        header_shows=False,
    ),
    bad("FLAC, last byte missing", written(tone, "FLAC", cut=slice(-1)), "cannot be read as audio", header_shows=False),
    bad("FLAC, one byte changed", content(flipped_flac), "cannot be read as audio", header_shows=False),
    bad("Ogg Vorbis cut between pages", content(lambda: cut_at_page("VORBIS")), "is cut short"),
    bad("Ogg Opus cut between pages", content(lambda: cut_at_page("OPUS")), "is cut short"),
    bad("Ogg, last byte missing", written(lambda: tone(4), "OGG", "VORBIS", cut=slice(-1)), "is cut short"),
    bad(
        "MP3, second half missing",
        written(lambda: tone(4), "MP3", "MPEG_LAYER_III", cut=slice(2_000)),
        "is cut short",
        header_shows=False,
    ),
    bad("MP3 of unknown length", content(no_xing), "MP3 without a Xing or Info tag"),
    # ---------------------------------------------------------------------------------------- headers that do not hold
    bad("rate 0 Hz", content(lambda: riff(pcm(tone()), rate=0)), "cannot be read as audio"),
    bad("rate 1 Hz", content(lambda: riff(pcm(tone()), rate=1)), "its header says 1 Hz"),
    bad("rate 2 GHz", content(lambda: riff(pcm(tone()), rate=2**31 - 1)), "its header says 2147483647 Hz"),
    bad("no channel", content(lambda: riff(pcm(tone()), channels=0, align=2)), "cannot be read as audio"),
    bad("65 channels", content(lambda: riff(pcm(tone()), channels=65)), "its header says 65 channels"),
    bad("65,535 channels", content(lambda: riff(pcm(tone()), channels=65_535)), "cannot be read as audio"),
    bad("0 bits", content(lambda: riff(pcm(tone()), bits=0, align=2)), "cannot be read as audio"),
    bad("13 bytes a sample", content(lambda: riff(pcm(tone()), bits=104)), "cannot be read as audio"),
    bad("unknown codec", content(lambda: riff(pcm(tone()), code=0xBEEF)), "cannot be read as audio"),
    bad(
        "sound without format",
        content(lambda: b"RIFF\x24\0\0\0WAVE" + chunk(b"data", pcm(tone()))),
        "cannot be read as audio",
    ),
    bad("FLAC of unknown length", content(lambda: flac_of_length(0)), "does not tell its length"),
    bad(
        "FLAC that promises 49 days",
        content(lambda: flac_of_length(2**36 - 1)),
        "cannot be read as audio",
        header_shows=False,
    ),
    bad(
        "m4a",
        content(lambda: b"\0\0\0\x20ftypM4A \0\0\0\0" + bytes(999)),
        "it is MP4/M4A (AAC), which libsndfile does not know; convert it: ffmpeg",
        name="clip.m4a",
    ),
    bad("m4a named .wav", content(lambda: b"\0\0\0\x18ftypmp42" + bytes(999)), "it is MP4/M4A"),
    bad("WebM", content(lambda: b"\x1a\x45\xdf\xa3" + bytes(999)), "it is WebM/Matroska", name="clip.webm"),
    bad("raw samples", content(lambda: pcm(tone())), "sound without a header", name="clip.raw"),
    bad("CAF", written(tone, "CAF"), "is CAF; convert it to one of WAV", name="clip.caf"),
    bad("NIST Sphere", written(tone, "NIST"), "is NIST; convert it to one of WAV"),
    # ---------------------------------------------------------------------------------------------- sound that is none
    bad("1 sample", written(lambda: tone()[1:2]), "too short"),
    bad("10 ms", written(lambda: tone(0.01)), "too short"),
    bad("10 ms at 48 kHz", written(lambda: tone(0.01, 48_000), rate=48_000), "too short"),
    *[
        bad(
            f"{value} as sample {at}",
            written(with_value(value, at), subtype="FLOAT"),
            "NaN or infinite",
            header_shows=False,
        )
        for value, at in ((np.nan, 0), (np.nan, -1), (np.inf, 77), (-np.inf, 77))
    ],
    bad(
        "NaN at 44.1 kHz",
        written(with_value(np.nan, 9, 44_100), subtype="FLOAT", rate=44_100),
        "NaN or infinite",
        header_shows=False,
    ),
    bad(
        "doubles beyond float32", written(with_value(1e300, 9), subtype="DOUBLE"), "NaN or infinite", header_shows=False
    ),
    bad(
        "floats scaled to 16 bits",
        written(lambda: tone() * 32767, subtype="FLOAT"),
        "float samples must be scaled to 1",
        header_shows=False,
    ),
    bad("all zeros, WAV", written(lambda: tone() * 0), "is digital silence", header_shows=False, silence=True),
    bad(
        "all zeros, FLAC at 44.1 kHz",
        written(lambda: np.zeros(44_100), "FLAC", rate=44_100),
        "is digital silence",
        header_shows=False,
        silence=True,
    ),
    bad(
        "channels that cancel out",
        written(lambda: np.stack([tone(), -tone()], axis=1), subtype="FLOAT"),
        "is digital silence",
        header_shows=False,
        silence=True,
    ),
    bad(
        "zeros for 30 s, then sound",
        written(lambda: np.concatenate([np.zeros(31 * RATE), tone()])),
        "is digital silence",
        header_shows=False,
        silence=True,
    ),
]
SEPARATE = [("file without permission to read", "cannot be opened (Permission denied)")]  # tests of their own, below


@pytest.fixture(scope="module")
def sandbox():
    with_limits = Sandbox()
    yield with_limits
    with_limits.close()


def make_dataset(path: str, **kwargs) -> AudioPromptDataset:
    content = [{"type": "audio", "audio_url": path}, {"type": "text", "text": "What is it?"}]
    columns = {"prompt": [[{"role": "user", "content": content}]], "audio_path": [path], "reference": ["dog"]}
    names = SimpleNamespace(input_key="prompt", images_key="audio_path", reference_key="reference", label_key="label")
    processor = TextProcessor()
    strategy = SimpleNamespace(args=names)
    return AudioPromptDataset(columns | {"label": ["x"]}, processor.tokenizer, processor, 99, strategy, **kwargs)


def outcome(load: Callable[[str], np.ndarray], path: str) -> np.ndarray | str:
    start = time.monotonic()
    try:
        return load(path)
    except AudioError as error:
        return str(error)
    finally:
        assert time.monotonic() - start < SECONDS


def named(path: str) -> str:
    return path if path.isprintable() else ascii(path)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.title)
def test_every_file_is_decoded_right_or_named_with_the_reason(tmp_path, sandbox, case):
    case.make(tmp_path / case.name)
    path = str(tmp_path / case.name)
    result, boxed = outcome(load_audio, path), outcome(sandbox.load, path)
    item = Item(0, "item 0", {}, "?", Path(path))
    lengths, unusable, silent = eval_mmau.check_audio([item], sandbox)
    if case.error is None:
        assert isinstance(result, np.ndarray), result
        assert result.dtype == np.float32
        expected = tone(case.seconds, amplitude=case.amplitude) if case.amplitude else np.full(len(result), 2**-15)
        assert abs(len(result) - len(expected)) <= (1 if case.edge else 0)
        inner = slice(case.edge, min(len(result), len(expected)) - case.edge)
        np.testing.assert_allclose(result[inner], expected[inner], rtol=0, atol=case.atol)
        np.testing.assert_array_equal(boxed, result)
        assert probe_all([path]) == probe_all([path], reader=load_audio) == []
        assert (lengths, unusable, silent) == ({0: len(result)}, {}, [])
        assert probe_clip(path, decode=True).kind is None
        np.testing.assert_array_equal(make_dataset(path, sandbox=sandbox)[0][1][0], result)
        return
    assert isinstance(result, str)
    assert result.startswith(named(path) + ": ")
    assert "\n" not in result
    assert case.error in result
    assert boxed == result
    assert probe_all([path], reader=load_audio) == [result]
    header = probe_all([path])
    assert header == ([header[0]] if case.header_shows else [])
    assert all(message.startswith(named(path) + ": ") for message in header)
    clip = probe_clip(path, decode=True, sandbox=sandbox)
    assert clip.kind == ("audio_missing" if case.title in ("missing", "name that is too long") else "audio_unreadable")
    assert named(path) in clip.reason
    if case.silence:
        assert (list(lengths), unusable, silent) == ([0], {}, [0])  # asked, and reported
    else:
        assert (lengths, unusable, silent) == ({}, {0: f"item 0: {result}"}, [])
    message = "cannot be stored|no path" if case.name.startswith("a\udcff") else "1 problems in 1 rows"
    with pytest.raises(DataError, match=message):
        make_dataset(path, decode_all=True)
    if not case.header_shows:  # training's own check reads headers; the rest stops it when the clip is reached
        with pytest.raises(AudioError, match="clip"):
            make_dataset(path)[0]


def test_a_name_with_a_zero_byte_is_refused(sandbox):
    for load in (load_audio, read_header, sandbox.load):
        with pytest.raises(AudioError, match=r"'a\\x00b\.wav': .*null"):
            load("a\0b.wav")


def test_a_file_that_may_not_be_read_is_named():
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:  # pytest's own folder is closed to other users
        path = os.path.join(folder, "clip.wav")
        Path(path).write_bytes(riff(pcm(tone())))
        os.chmod(folder, 0o755)
        os.chmod(path, 0)
        user = os.geteuid()
        try:
            if user == 0:
                os.seteuid(65534)  # root may read everything
            with pytest.raises(AudioError, match=r"clip\.wav: cannot be opened \(Permission denied\)"):
                load_audio(path)
            assert "Permission denied" in probe_all([path])[0]
        finally:
            os.seteuid(user)


@pytest.mark.parametrize("channels", [1, 8])
def test_two_hours_cost_no_more_than_30_s(tmp_path, channels):
    def cost(path: Path) -> tuple[int, float]:
        tracemalloc.start()
        start = time.process_time()
        load_audio(path)
        seconds, peak = time.process_time() - start, tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return peak, seconds

    (tmp_path / "short.wav").write_bytes(riff(pcm(np.repeat(tone(31), channels)), channels=channels))
    two_hours(channels)(tmp_path / "long.wav")
    cost(tmp_path / "short.wav")
    peak, seconds = cost(tmp_path / "short.wav")
    long_peak, long_seconds = cost(tmp_path / "long.wav")
    assert long_peak < peak + 2**20
    assert long_peak < 12 * 2**20  # 30 s of mono are 1.9 MB: blocks, their concatenation, its absolute values
    assert long_seconds < 3 * seconds + 0.5


def test_limits_are_those_of_the_slots():
    assert (decode.MAX_FRAMES, decode.MIN_FRAMES) == (slots.MAX_FRAMES, slots.MIN_FRAMES)


# ---------------------------------------------------------------------------------------------------------- the sandbox
# A worker as audio_sandbox makes it, but for a decoder that does something else for some names.
PROGRAM = """
import ctypes, os, signal, sys, time
sys.path.insert(0, {folder!r})
import numpy as np
from aqa.audio.decode import load_audio, read_header
from aqa.audio.sandbox import serve

def load(path, silence_ok=False):
    kind = os.path.basename(path)
    if kind == "crash": ctypes.string_at(0)
    if kind == "abort": os.abort()
    if kind == "exit": os._exit(3)
    if kind == "sleep": time.sleep(1000)
    if kind == "loop":
        while True: pass
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
    return load_audio(path, silence_ok)

serve(load, read_header)
"""


@pytest.fixture
def odd_sandbox():
    box = Sandbox(seconds=2.0, mebibytes=256, command=[sys.executable, "-c", PROGRAM.format(folder=str(EXAMPLE))])
    yield box
    box.close()


@pytest.mark.parametrize(
    ("kind", "message", "dies"),
    [
        ("crash", "the decoder crashed (signal 11", True),
        ("abort", "the decoder crashed (signal 6", True),
        ("exit", "the decoder crashed (exit 3", True),
        ("sleep", "took more than 2 s and was stopped", True),
        ("loop", "took more than 2 s and was stopped", True),
        ("stubborn", "took more than 2 s and was stopped", True),
        ("eat", "decoding needs more than 256 MiB", False),
        ("eat at once", "decoding needs more than 256 MiB", False),
        ("write", "File too large", False),
        ("error", "KeyError('inside')", False),
        ("nan", "no finite samples", False),
        ("odd bytes", "no finite samples", False),
        ("too much", "a reply of 4000000 bytes", True),
    ],
)
def test_whatever_the_decoder_does_the_file_is_named_and_the_next_is_read(tmp_path, odd_sandbox, kind, message, dies):
    clip = tmp_path / "clip.wav"
    clip.write_bytes(riff(pcm(tone())))
    expected = load_audio(clip)
    np.testing.assert_array_equal(odd_sandbox.load(clip), expected)
    worker = odd_sandbox._worker
    start = time.monotonic()
    with pytest.raises(AudioError) as error:
        odd_sandbox.load(tmp_path / kind)
    assert time.monotonic() - start < 2 + SECONDS
    assert str(error.value).startswith(f"{tmp_path / kind}: ")
    assert message in str(error.value)
    np.testing.assert_array_equal(odd_sandbox.load(clip), expected)
    assert (odd_sandbox._worker is not worker) == dies
    assert (worker.poll() is not None) == dies


def test_a_worker_that_was_killed_between_two_files_is_replaced(tmp_path, sandbox):
    clip = tmp_path / "clip.wav"
    clip.write_bytes(riff(pcm(tone())))
    sandbox.load(clip)
    sandbox._worker.kill()
    sandbox._worker.wait()
    assert len(sandbox.load(clip)) == RATE // 2


def test_the_real_decoder_keeps_the_memory_limit(tmp_path):
    soundfile.write(tmp_path / "clip.wav", 0.1 * np.ones((30 * 48_000, 8)), 48_000)
    box = Sandbox(mebibytes=4)
    with pytest.raises(AudioError, match=r"clip\.wav: decoding needs more than 4 MiB"):
        box.load(tmp_path / "clip.wav")
    box.close()


def test_threads_forks_and_copies_get_their_own_answers(tmp_path, sandbox):
    paths = []
    for i in range(24):
        paths.append(tmp_path / f"{i}.wav")
        paths[i].write_bytes(riff(pcm(np.full(1000 + i, 0.01 * (i + 1)))))
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


def test_the_worker_ends_with_its_owner(tmp_path):
    """Even if the owner is killed."""
    code = (
        f"import sys; sys.path.insert(0, {str(EXAMPLE)!r})\n"
        "import os, signal; from aqa.audio.sandbox import Sandbox; from aqa.audio.decode import AudioError\n"
        "box = Sandbox()\ntry: box.load('/none')\nexcept AudioError: print(box._worker.pid, flush=True)\n"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    import subprocess

    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == -signal.SIGKILL
    pid, deadline = int(done.stdout), time.monotonic() + SECONDS
    while time.monotonic() < deadline and Path(f"/proc/{pid}").exists():
        stat = Path(f"/proc/{pid}/stat").read_text()
        if stat.rpartition(")")[2].split()[0] == "Z":  # ended; whoever inherited it has not looked yet
            break
        time.sleep(0.05)
    else:
        assert not Path(f"/proc/{pid}").exists()


# ------------------------------------------------------------------------------------------------------------- confined
def test_what_leads_out_of_a_folder_is_seen(tmp_path):
    inside, outside = tmp_path / "audio", tmp_path / "audio2"
    inside.mkdir()
    outside.mkdir()
    (outside / "a.wav").touch()
    (inside / "a.wav").touch()
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
    for name in ("secret.wav", "audio/clip.wav"):
        (tmp_path / name).write_bytes(riff(pcm(tone())))
    (tmp_path / "audio/link.wav").symlink_to("../secret.wav")
    root = str(tmp_path / "audio")
    for name in ("audio/../secret.wav", "audio/link.wav"):
        with monkeypatch.context() as patch:
            patch.setattr(decode.soundfile, "info", lambda path: pytest.fail(f"{path} was opened"))
            with pytest.raises(DataError, match=rf"leads to .*/secret\.wav, outside {root} \(--confine_audio\)"):
                make_dataset(str(tmp_path / name), audio_root=root)
    dataset = make_dataset(str(tmp_path / "audio/clip.wav"), audio_root=root)
    assert len(dataset[0][1][0]) == RATE // 2
    (tmp_path / "audio/clip.wav").unlink()
    (tmp_path / "audio/clip.wav").symlink_to("../secret.wav")  # after the check
    with pytest.raises(AudioError, match="leads to"):
        dataset[0]


# ------------------------------------------------------------------------------------------------------------ the table
def test_the_table_in_the_docs_is_that_of_the_cases():
    assert len(CASES) + len(SEPARATE) >= 60
    assert len({case.title for case in CASES}) == len(CASES)
    rows = [
        (case.title, "16 kHz mono" if case.error is None else f"error: ... {case.error} ...", case.header_shows)
        for case in CASES
    ] + [(title, f"error: ... {error} ...", True) for title, error in SEPARATE]
    lines = [f"{len(rows)} files: {sum(r[1] == '16 kHz mono' for r in rows)} are decoded, the others are refused.", ""]
    lines += ["| File | Outcome | Found by |", "|---|---|---|"]
    for title, result, header in rows:
        found = "" if result == "16 kHz mono" else "header" if header else "decoding"
        lines.append(f"| {title} | {result} | {found} |")
    head, _, rest = TABLE.read_text().partition(BEGIN)
    _, _, tail = rest.partition(END)
    text = f"{head}{BEGIN}\n" + "\n".join(lines) + f"\n{END}{tail}"
    if os.environ.get("WRITE_DOCS"):
        TABLE.write_text(text)
    assert TABLE.read_text() == text, "WRITE_DOCS=1 pytest tests/test_bad_audio.py writes the table anew"
