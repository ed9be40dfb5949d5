"""Synthetic sounds that a person can tell apart by ear: eight classes, each with varied pitch, length, level and noise.

A clip is a pure function of its class, a random generator and a sampling rate. The classes differ in their spectrum
(where the energy lies) and in their rhythm; two clips of one class never have the same parameters.
"""

from collections.abc import Callable

import numpy as np

from aqa.common.constants import SAMPLING_RATE

MIN_SECONDS, MAX_SECONDS = 0.7, 1.8
MIN_LEVEL_DB, MAX_LEVEL_DB = -22.0, -3.0  # peak level, dB relative to full scale
MIN_NOISE_DB, MAX_NOISE_DB = -50.0, -30.0  # background noise, dB relative to the peak of the sound

Generator = Callable[[np.ndarray, int, np.random.Generator], np.ndarray]


def _band_noise(samples: int, rate: int, low_hz: float, high_hz: float, rng: np.random.Generator) -> np.ndarray:
    """White noise with everything outside a band (Hz) removed.

    :return: Noise of shape ``(samples,)`` and unit variance.
    """
    spectrum = np.fft.rfft(rng.standard_normal(samples))
    frequency = np.fft.rfftfreq(samples, 1 / rate)
    spectrum[(frequency < low_hz) | (frequency > high_hz)] = 0
    noise = np.fft.irfft(spectrum, samples)
    return noise / (noise.std() + 1e-12)


def _since_last(t: np.ndarray, period: float, phase: float) -> np.ndarray:
    """Time since the latest of a series of evenly spaced events.

    :param t: Time axis, seconds, shape ``(samples,)``.
    :param period: Distance of two events, seconds.
    :param phase: Offset of the series as a share of the period.
    :return: Seconds, shape ``(samples,)``.
    """
    return (t + phase * period) % period


def _beep(t: np.ndarray, rate: int, rng: np.random.Generator) -> np.ndarray:
    """An alarm: a pure tone around 1 kHz, keyed on and off."""
    period = rng.uniform(0.18, 0.35)
    on = _since_last(t, period, rng.random()) < 0.6 * period
    return np.sin(2 * np.pi * rng.uniform(900, 1150) * t) * on


def _bell(t: np.ndarray, rate: int, rng: np.random.Generator) -> np.ndarray:
    """A struck bell: inharmonic partials, the higher ones dying away faster."""
    pitch = rng.uniform(480, 620)
    return sum(
        np.sin(2 * np.pi * pitch * ratio * t) * weight * np.exp(-t * decay * rng.uniform(0.8, 1.2))
        for ratio, weight, decay in ((1.0, 1.0, 1.5), (2.76, 0.8, 2.0), (5.4, 0.6, 3.0), (8.93, 0.4, 4.0))
    )


def _clock(t: np.ndarray, rate: int, rng: np.random.Generator) -> np.ndarray:
    """A ticking clock: very short broadband clicks, silence between them."""
    since = _since_last(t, rng.uniform(0.16, 0.3), rng.random())
    return rng.standard_normal(len(t)) * np.exp(-since * rng.uniform(350, 500))


def _drum(t: np.ndarray, rate: int, rng: np.random.Generator) -> np.ndarray:
    """A drum: low strokes whose pitch falls as they die away."""
    since = _since_last(t, rng.uniform(0.25, 0.4), rng.random())
    pitch = rng.uniform(150, 190)
    return np.sin(2 * np.pi * pitch * (since + 0.03 * (1 - np.exp(-since * 20)))) * np.exp(-since * rng.uniform(8, 12))


def _engine(t: np.ndarray, rate: int, rng: np.random.Generator) -> np.ndarray:
    """An engine: a low hum rich in harmonics, trembling."""
    pitch = rng.uniform(65, 95)
    hum = sum(np.sin(2 * np.pi * pitch * k * t + rng.uniform(0, 2 * np.pi)) / np.sqrt(k) for k in range(1, 13))
    return hum * (1 + 0.4 * np.sin(2 * np.pi * rng.uniform(8, 14) * t))


def _horn(t: np.ndarray, rate: int, rng: np.random.Generator) -> np.ndarray:
    """A car horn: two reedy notes a third apart, held."""
    pitch = rng.uniform(380, 440)
    return sum(
        np.sin(2 * np.pi * pitch * interval * k * t) / np.sqrt(k) for interval in (1.0, 1.26) for k in range(1, 8)
    )


def _rain(t: np.ndarray, rate: int, rng: np.random.Generator) -> np.ndarray:
    """Rain: a steady hiss."""
    return _band_noise(len(t), rate, rng.uniform(1800, 2600), 7800, rng)


def _whistle(t: np.ndarray, rate: int, rng: np.random.Generator) -> np.ndarray:
    """A referee's whistle: a high steady tone with a fast trill and some breath."""
    pitch, trill = rng.uniform(2900, 3300), rng.uniform(20, 30)
    tone = np.sin(2 * np.pi * pitch * t + 3 * np.sin(2 * np.pi * trill * t))
    return tone + 0.1 * _band_noise(len(t), rate, 2000, 5000, rng)


GENERATORS: dict[str, Generator] = {
    "beep": _beep,
    "bell": _bell,
    "clock": _clock,
    "drum": _drum,
    "engine": _engine,
    "horn": _horn,
    "rain": _rain,
    "whistle": _whistle,
}
CLASSES: tuple[str, ...] = tuple(GENERATORS)


def synthesize(label: str, rng: np.random.Generator, sampling_rate: int = SAMPLING_RATE) -> np.ndarray:
    """Make one clip.

    :param label: One of :data:`CLASSES`.
    :param rng: Source of randomness; the same state gives the same clip.
    :param sampling_rate: Hz; at least 16,000, so that every class fits below half of it.
    :return: Waveform of shape ``(samples,)``, float32, within -1 and 1, lasting 0.7 to 1.8 s.
    :raises ValueError: if the class is unknown or the sampling rate too low.
    """
    if label not in GENERATORS:
        raise ValueError(f"Unknown class of sound {label!r}; known are {', '.join(CLASSES)}.")
    if sampling_rate < SAMPLING_RATE:
        raise ValueError(f"Sampling rate {sampling_rate} Hz is below {SAMPLING_RATE} Hz.")
    t = np.arange(int(rng.uniform(MIN_SECONDS, MAX_SECONDS) * sampling_rate)) / sampling_rate
    wave = GENERATORS[label](t, sampling_rate, rng)
    wave = wave / np.abs(wave).max()
    wave = wave + 10 ** (rng.uniform(MIN_NOISE_DB, MAX_NOISE_DB) / 20) * rng.standard_normal(len(t))
    level = 10 ** (rng.uniform(MIN_LEVEL_DB, MAX_LEVEL_DB) / 20)
    return (wave * (level / np.abs(wave).max())).astype(np.float32)
