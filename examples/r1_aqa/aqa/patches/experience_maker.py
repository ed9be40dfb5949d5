"""Patches of an experience maker: it takes ``(waveform, rate)`` where it expects images."""

from __future__ import annotations

import functools
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np

from aqa.common.patch import Patch, require
from aqa.patches.multimodal_processor import AudioMultimodalProcessor, count_audio

BANNED = -100.0  # bias on the logit of <|AUDIO|>: if it were sampled, it would stand for audio that is not there


def take_audio(
    patch: Patch, exp_maker: Any, processor: Any, tokenizer: Any, prompt_max_len: int, audio_seconds: float
) -> None:
    """Replace the multimodal processor, and the two functions that look at images.

    The functions are replaced in the namespace of the experience maker's own module: that is where it looks them up,
    whoever defined them.
    """
    require(exp_maker, "multimodal_processor")
    module = sys.modules[type(exp_maker).__module__]
    patch.put(module, "normalize_images", check_audio)
    patch.put(module, "get_images_num", functools.partial(count_audio, seconds=audio_seconds))
    if not isinstance(exp_maker.multimodal_processor, AudioMultimodalProcessor):
        audio_processor = AudioMultimodalProcessor(tokenizer, processor, prompt_max_len, audio_seconds)
        patch.replace(exp_maker, "multimodal_processor", audio_processor)


class NamedClip(tuple):
    """``(waveform, rate)``, a pair to all who take pairs, that knows its file."""

    path: str | None = None

    @classmethod
    def of(cls, wave: np.ndarray, rate: int, path: str) -> NamedClip:
        """A decoded file."""
        clip = cls((wave, rate))
        clip.path = path
        return clip


def check_audio(raw_images: Sequence[Any]) -> list[Any]:
    """What takes the place of ``normalize_images``: audio is decoded already, and only checked.

    :param raw_images: One ``(waveform, rate)`` or None a prompt.
    :return: The same entries.
    :raises TypeError: if an entry is anything else.
    """
    for i, clip in enumerate(raw_images):
        fits = clip is None or (isinstance(clip, tuple) and len(clip) == 2 and isinstance(clip[0], np.ndarray))
        if not fits:
            raise TypeError(f"prompt {i}: expected (waveform, sampling rate) or None, got {type(clip).__name__}")
    return list(raw_images)


def describe_audio(clip: Any) -> dict[str, Any]:
    """What trajectories record of a clip: its file, if it is known.

    :param clip: ``(waveform, rate)`` or None.
    """
    return {"audio_path": clip.path if isinstance(clip, NamedClip) else None}
