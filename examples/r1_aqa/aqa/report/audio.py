"""Clips for the page: MP3, the outline of the waveform, and the mel spectrogram that the model hears."""

from __future__ import annotations

import base64
import io
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
from matplotlib import colormaps
from PIL import Image
from transformers.audio_utils import mel_filter_bank, spectrogram, window_function

from aqa.audio.decode import HOP_LENGTH, SAMPLING_RATE, load_audio

N_FFT, N_MELS = 400, 128  # of Qwen2-Audio's feature extractor
COLUMNS = 240  # of the waveform's outline
IMAGE_SIZE = (480, 96)  # pixels, at most


def encode_clip(path: Path) -> dict[str, Any]:
    """A clip as the page holds it: what the model heard of the file, mono, 16 kHz and at most 30 s.

    :return: seconds, mp3 (base64), mel (WebP, base64), peaks (lowest and highest sample of each column, -100 to
        100), heard (where in frequency its energy lies, in words).
    :raises AudioError: if it does not decode.
    """
    wave = load_audio(path, silence_ok=True)
    mel = log_mel(wave)
    return {
        "seconds": round(len(wave) / SAMPLING_RATE, 3),
        "mp3": to_mp3(wave),
        "mel": to_image(mel),
        "peaks": outline(wave),
        "heard": describe(wave),
    }


def to_mp3(wave: np.ndarray) -> str:
    """Base64 of an MP3: the only compressed format that every browser plays from a local page.

    :param wave: ``(samples,)`` at 16 kHz.
    """
    buffer = io.BytesIO()
    form = {"format": "MP3", "subtype": "MPEG_LAYER_III", "bitrate_mode": "VARIABLE", "compression_level": 0.6}
    soundfile.write(buffer, wave, SAMPLING_RATE, **form)
    return base64.b64encode(buffer.getvalue()).decode()


def outline(wave: np.ndarray) -> list[int]:
    """Lowest and highest sample of each column, in per cent of the loudest: low, high, low, high, ..."""
    columns = np.array_split(wave, min(COLUMNS, len(wave)))
    loudest = max(float(np.abs(wave).max()), 1e-4)
    pairs = [(column.min(), column.max()) for column in columns]
    return [round(float(value) / loudest * 100) for pair in pairs for value in pair]


def log_mel(wave: np.ndarray) -> np.ndarray:
    """The log-mel spectrogram of Whisper's and Qwen2-Audio's feature extractor, without the padding to 30 s.

    :param wave: ``(samples,)`` at 16 kHz.
    :return: ``(128, frames)`` float32, 10 ms a frame; a difference of 2 is 80 dB.
    """
    filters = mel_filter_bank(1 + N_FFT // 2, N_MELS, 0.0, SAMPLING_RATE / 2, SAMPLING_RATE, "slaney", "slaney")
    window = window_function(N_FFT, "hann")
    mel = spectrogram(wave, window, N_FFT, HOP_LENGTH, power=2.0, mel_filters=filters, log_mel="log10")[:, :-1]
    return (np.maximum(mel, mel.max() - 8.0) + 4.0) / 4.0


def to_image(mel: np.ndarray) -> str:
    """Base64 of a WebP image of a spectrogram ``(128, frames)``, with low frequencies at the bottom."""
    shade = (mel - mel.min()) / max(float(np.ptp(mel)), 1e-6)
    image = Image.fromarray(colormaps["magma"](shade[::-1], bytes=True)[..., :3])
    size = (min(IMAGE_SIZE[0], max(image.width, 120)), IMAGE_SIZE[1])
    buffer = io.BytesIO()
    image.resize(size, Image.Resampling.BILINEAR).save(buffer, format="WEBP", quality=75)
    return base64.b64encode(buffer.getvalue()).decode()


def describe(wave: np.ndarray) -> str:
    """Where in frequency a clip's energy lies, for readers who cannot see the spectrogram."""
    energy = np.cumsum(np.abs(np.fft.rfft(wave)) ** 2)
    if energy[-1] == 0:
        return "silence"
    low, high = (int(np.searchsorted(energy, q * energy[-1])) * SAMPLING_RATE / len(wave) for q in (0.1, 0.9))
    return f"80 % of the energy between {low:,.0f} and {high:,.0f} Hz"
