"""Decoding: every common kind of file becomes 16 kHz mono float32, and every unusable one is named."""

import numpy as np
import pytest
import soundfile

from aqa.audio import decode
from aqa.audio.decode import AudioError, load_audio, probe_all, probe_audio

RATE = 16_000


def sine(rate: int, seconds: float = 0.5, frequency: float = 440.0, amplitude: float = 0.5) -> np.ndarray:
    return amplitude * np.sin(2 * np.pi * frequency * np.arange(int(rate * seconds)) / rate)


def frequency_of(wave: np.ndarray) -> float:
    spectrum = np.abs(np.fft.rfft(wave * np.hanning(len(wave)), n=16 * len(wave)))
    return float(np.argmax(spectrum)) * RATE / (16 * len(wave))


@pytest.mark.parametrize("rate", [8_000, 11_025, 16_000, 22_050, 32_000, 44_100, 48_000])
@pytest.mark.parametrize("frequency", [440.0, 3_000.0])
def test_resampling_keeps_frequency_amplitude_and_duration(tmp_path, rate, frequency):
    path = tmp_path / "sine.wav"
    soundfile.write(path, sine(rate, frequency=frequency), rate, subtype="FLOAT")
    wave = load_audio(path)
    assert wave.dtype == np.float32
    assert wave.ndim == 1
    assert abs(len(wave) - RATE // 2) <= 1
    assert frequency_of(wave) == pytest.approx(frequency, abs=1.0)
    middle = slice(1000, 7000)  # the resampler's filter rings at the ends
    # a thousandth: -54 dB, where a resampler of low quality leaves some -30 dB of images
    np.testing.assert_allclose(wave[middle], sine(RATE, frequency=frequency)[middle], rtol=0, atol=1e-3)


@pytest.mark.parametrize("rate", [32_000, 44_100, 48_000])
def test_what_is_above_8_khz_does_not_come_back_as_another_tone(tmp_path, rate):
    path = tmp_path / "high.wav"
    soundfile.write(path, sine(rate, frequency=12_000.0), rate, subtype="FLOAT")
    assert np.abs(load_audio(path)[1000:-1000]).max() < 1e-3


@pytest.mark.parametrize(
    ("subtype", "step"),
    # the largest error is half a quantisation step of the subtype, one bit more where libsndfile truncates
    [("PCM_U8", 2**-7), ("PCM_16", 2**-15), ("PCM_24", 2**-23), ("PCM_32", 2**-24), ("FLOAT", 0), ("DOUBLE", 0)],
)
def test_every_sample_format_keeps_its_precision(tmp_path, subtype, step):
    path, wave = tmp_path / "a.wav", sine(RATE).astype(np.float32)
    soundfile.write(path, wave, RATE, subtype=subtype)
    np.testing.assert_allclose(load_audio(path), wave, rtol=0, atol=step)


def test_sixteen_bits_are_read_exactly(tmp_path):
    values = np.array([0, 1, -1, 32767, -32768, 12345] * 100, dtype=np.int16)
    soundfile.write(tmp_path / "a.wav", values, RATE, subtype="PCM_16")
    np.testing.assert_array_equal(load_audio(tmp_path / "a.wav"), values.astype(np.float32) / 32768)


@pytest.mark.parametrize(
    ("suffix", "format_", "subtype", "tolerance"),
    # Vorbis and MP3 are lossy: a few hundredths on a plain sine, against its amplitude of 0.5
    [("flac", "FLAC", "PCM_24", 1e-6), ("ogg", "OGG", "VORBIS", 0.02), ("mp3", "MP3", "MPEG_LAYER_III", 0.02)],
)
def test_compressed_formats(tmp_path, suffix, format_, subtype, tolerance):
    if format_ not in soundfile.available_formats():
        pytest.skip(f"this libsndfile has no {format_}")
    path, wave = tmp_path / f"a.{suffix}", sine(RATE, seconds=1.0)
    soundfile.write(path, wave, RATE, format=format_, subtype=subtype)
    out = load_audio(path)
    assert frequency_of(out) == pytest.approx(440.0, abs=1.0)
    middle = slice(4000, 12_000)
    assert np.sqrt((out[middle] ** 2).mean()) == pytest.approx(0.5 / np.sqrt(2), abs=tolerance)


def test_channels_are_averaged(tmp_path):
    left, right = sine(RATE, amplitude=0.6), sine(RATE, amplitude=0.2)
    soundfile.write(tmp_path / "a.wav", np.stack([left, right], axis=1), RATE, subtype="FLOAT")
    np.testing.assert_allclose(load_audio(tmp_path / "a.wav"), (left + right) / 2, atol=1e-7)


@pytest.mark.parametrize("rate", [8_000, 16_000, 44_100])
def test_of_a_long_file_only_30_s_are_read(tmp_path, monkeypatch, rate):
    path = tmp_path / "long.wav"
    soundfile.write(path, sine(rate, seconds=40.0), rate)
    asked, read = [], soundfile.SoundFile.read

    def counting(self, frames=-1, **kwargs):
        out = read(self, frames, **kwargs)
        asked.append(len(out))
        return out

    monkeypatch.setattr(soundfile.SoundFile, "read", counting)
    wave = load_audio(path)
    assert len(wave) == 30 * RATE
    assert sum(asked) <= 30.2 * rate
    # up to the last sample: the cut is not made where the resampler's filter knows of no more samples; 16 bits
    np.testing.assert_allclose(wave[-100:], sine(RATE, seconds=30.0)[-100:], rtol=0, atol=1e-3)


@pytest.mark.parametrize(("samples", "fits"), [(320, False), (321, True)])
def test_the_shortest_clip_makes_one_audio_token(tmp_path, samples, fits):
    path = tmp_path / "short.wav"
    soundfile.write(path, sine(RATE)[:samples], RATE)
    if fits:
        assert len(load_audio(path)) == samples
        assert probe_audio(path) is None
    else:
        with pytest.raises(AudioError, match=r"short\.wav: 20 ms of sound"):
            load_audio(path)
        assert "too short" in probe_audio(path)


def write_nan(path):
    soundfile.write(path, np.array([0.0] * 500 + [np.nan] + [0.0] * 500), RATE, subtype="FLOAT")


def write_inf(path):
    soundfile.write(path, np.array([0.0] * 500 + [np.inf] + [0.0] * 500), RATE, subtype="FLOAT")


BAD_FILES = {
    "missing": (lambda path: None, "does not exist"),
    "folder": (lambda path: path.mkdir(), "is a folder"),
    "empty": (lambda path: path.write_bytes(b""), r"is empty \(0 bytes\)"),
    "text": (lambda path: path.write_text("no sound at all\n" * 20), "cannot be read as audio"),
    "header_only": (lambda path: soundfile.write(path, np.zeros(0), RATE), "0 ms of sound"),
    "header_only_8k": (lambda path: soundfile.write(path, np.zeros(0), 8_000), "0 ms of sound"),
    "nan": (write_nan, "NaN or infinite"),
    "inf": (write_inf, "NaN or infinite"),
}


@pytest.mark.parametrize("kind", BAD_FILES)
def test_bad_files_are_named_with_the_reason(tmp_path, kind):
    make, reason = BAD_FILES[kind]
    path = tmp_path / f"{kind}.wav"
    make(path)
    with pytest.raises(AudioError, match=rf"{kind}\.wav: .*{reason}"):
        load_audio(path)


@pytest.mark.parametrize("kind", [kind for kind in BAD_FILES if kind not in ("nan", "inf")])
def test_the_probe_sees_what_a_header_shows(tmp_path, kind):
    path = tmp_path / f"{kind}.wav"
    BAD_FILES[kind][0](path)
    assert f"{kind}.wav: " in probe_audio(path)


def test_probing_many_files_keeps_their_order_and_opens_each_once(tmp_path, monkeypatch):
    good = tmp_path / "good.wav"
    soundfile.write(good, sine(RATE), RATE)
    opened, info = [], soundfile.info
    monkeypatch.setattr(decode.soundfile, "info", lambda path: opened.append(path) or info(path))
    missing = [tmp_path / name for name in ("z.wav", "a.wav")]
    problems = probe_all([good, missing[0], good, missing[1], missing[0]])
    assert problems == [f"{path}: does not exist" for path in missing]
    assert sorted(opened) == sorted(map(str, [good, *missing]))
