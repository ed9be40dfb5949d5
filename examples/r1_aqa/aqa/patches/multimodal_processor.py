"""Fill LightRFT's image slot with audio features."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from aqa.audio.decode import HOP_LENGTH, MAX_SECONDS, SAMPLING_RATE
from aqa.data.columns import DataError
from aqa.patches.slots import GUARD_ROWS, MAX_FRAMES, audio_token_count, grid_of, pack_clip, windows_of

Waveform = tuple[np.ndarray, int]  # samples and rate in Hz


class AudioMultimodalProcessor:
    """Fills LightRFT's image slot with audio; replaces its ``MultimodalDataProcessor``.

    :param prompt_max_len: Longest prompt in tokens, where a clip's placeholder counts as one. Nothing is truncated.
    :param audio_seconds: Longest clip; what is longer is cut.
    """

    def __init__(self, tokenizer: Any, processor: Any, prompt_max_len: int, audio_seconds: float = MAX_SECONDS) -> None:
        self.audio_seconds = audio_seconds
        self.tokenizer = tokenizer
        self.processor = processor
        self.prompt_max_len = prompt_max_len
        self._silent_row: torch.Tensor | None = None  # (1, n_mels)
        self.audio_token_id = tokenizer.convert_tokens_to_ids(processor.audio_token)
        extractor = processor.feature_extractor
        if (extractor.sampling_rate, extractor.hop_length) != (SAMPLING_RATE, HOP_LENGTH):
            raise ValueError(
                f"the feature extractor works at {extractor.sampling_rate} Hz with hop {extractor.hop_length}; "
                f"the slot encoding was made for {SAMPLING_RATE} Hz and {HOP_LENGTH}"
            )

    def extract(self, audio: Waveform) -> tuple[list[torch.Tensor], int]:
        """Mel rows and number of audio tokens of one clip.

        The extractor would pad every window to 30 s before it transforms. The valid frames and the two guard rows
        depend on only a few hundred samples of that padding, so no more are added: the values are the same, and a
        one-second clip takes a thirtieth of the time.

        :param audio: Waveform ``(samples,)`` float32 and its rate, which must be 16,000 Hz.
        :return: Rows ``(frames + 2, n_mels)`` float32 of each window of 30 s, and the clip's number of audio tokens.
        :raises ValueError: if the rate is wrong, or the waveform is not a vector of finite samples.
        """
        wave, rate = audio
        if rate != SAMPLING_RATE:
            raise ValueError(f"audio at {rate} Hz; {SAMPLING_RATE} Hz are needed (load_audio resamples)")
        if wave.ndim != 1 or not np.isfinite(wave).all():
            raise ValueError(f"audio of shape {wave.shape} is not a vector of finite samples")
        wave = wave[: int(self.audio_seconds * SAMPLING_RATE)]
        windows = [self._extract_window(wave[start:end]) for start, end in windows_of(len(wave))]
        return windows, sum(audio_token_count(len(rows) - GUARD_ROWS) for rows in windows)

    def _extract_window(self, wave: np.ndarray) -> torch.Tensor:
        extractor = self.processor.feature_extractor
        frames = -(-len(wave) // HOP_LENGTH)
        needed = (frames + GUARD_ROWS) * HOP_LENGTH + extractor.n_fft
        padded = np.pad(wave, (0, max(0, min(needed, MAX_FRAMES * HOP_LENGTH) - len(wave))))
        mel = extractor(
            padded, sampling_rate=SAMPLING_RATE, padding="do_not_pad", truncation=False, return_tensors="pt"
        )
        return pack_clip(mel["input_features"][0], frames)

    def silence(self, clip: torch.Tensor) -> torch.Tensor:
        """The rows of silence that is as long as a clip; all rows of silence are alike.

        :param clip: Rows ``(frames + 2, n_mels)`` from :meth:`extract`.
        :return: A view of a single row, of the same shape.
        """
        if self._silent_row is None:
            self._silent_row = self._extract_window(np.zeros(SAMPLING_RATE, np.float32))[:1]
        return self._silent_row.expand_as(clip)

    def process_multimodal_batch(
        self,
        all_prompts: Sequence[str],
        all_images: Sequence[Waveform | None] | None,
        all_references: Sequence[str] | None,
        images_num: Sequence[int] | None,
        n_samples_per_prompt: int,
        all_videos: Sequence[Any] | None = None,
        videos_num: Sequence[int] | None = None,
    ) -> dict[str, Any]:
        """Expand the prompts and pack their clips, in the form that LightRFT expects of its multimodal processor.

        Text-only prompts (None in ``all_images``) may be mixed in. The mel spectrogram of a waveform is computed once,
        whatever ``n_samples_per_prompt`` and however many prompts share it.

        :param all_prompts: Prompt texts with one placeholder per clip.
        :param all_images: One ``(waveform, rate)`` or None per prompt.
        :param images_num: Windows per prompt, as ``get_images_num`` counted them; None: they are counted here.
        :param n_samples_per_prompt: Every output list repeats each prompt's entry this many times in a row.
        :param all_videos: Must be None or hold only None.
        :return: LightRFT's mapping; ``all_images_pixel_values`` is ``(sum of rows, n_mels)`` or None,
            ``all_images_grid_thw`` is ``(windows, 3)`` with ``(1, 1, rows)``.
        :raises DataError: if a prompt is too long, or its placeholders do not match its clips.
        """
        if all_videos is not None and any(video is not None for video in all_videos):
            raise DataError("the audio pipeline carries no videos")
        n = n_samples_per_prompt
        audio = list(all_images) if all_images is not None else [None] * len(all_prompts)
        counts = count_audio(audio, self.audio_seconds)
        if images_num is not None and list(images_num) != counts:
            raise DataError(f"images_num says {list(images_num)} windows per prompt, but there are {counts}")
        prompt_ids, rows = [], []
        extracted: dict[tuple[int, int], tuple[list[torch.Tensor], int]] = {}  # by waveform and rate
        token_ids = self.tokenizer(list(all_prompts), add_special_tokens=False)["input_ids"]
        for i, ids in enumerate(token_ids):
            self._check_prompt(f"prompt {i}", all_prompts[i], ids, int(audio[i] is not None))
            if audio[i] is not None:
                ids, windows = self._add_audio(ids, audio[i], extracted)
                rows += windows * n
            prompt_ids.append(ids)
        no_grid = torch.empty((0, 3), dtype=torch.long)
        total = n * len(prompt_ids)

        def repeat(values: Sequence[Any]) -> list[Any]:
            return [value for value in values for _ in range(n)]

        return {
            "all_prompt_token_ids": repeat(prompt_ids),
            "all_prompts": repeat(all_prompts),
            "all_images": repeat(audio),
            "all_videos": [None] * total,
            "all_images_num": repeat(counts),
            "all_videos_num": [0] * total,
            "all_images_pixel_values": torch.cat(rows) if rows else None,
            "all_videos_pixel_values": None,
            "all_images_grid_thw": torch.cat([no_grid, *map(grid_of, rows)]),
            "all_videos_grid_thw": no_grid,
            "all_references": None if all_references is None else repeat(all_references),
        }

    def _check_prompt(self, name: str, text: str, ids: Sequence[int], clips: int) -> None:
        if len(ids) > self.prompt_max_len:
            raise DataError(f"{name} has {len(ids)} tokens, more than {self.prompt_max_len}: {text!r}")
        placeholders = ids.count(self.audio_token_id)
        if placeholders != clips:
            raise DataError(f"{name} holds {placeholders} audio placeholders for {clips} clips: {text!r}")

    def _add_audio(
        self, ids: list[int], audio: Waveform, extracted: dict[tuple[int, int], tuple[list[torch.Tensor], int]]
    ) -> tuple[list[int], list[torch.Tensor]]:
        """Expand a prompt's placeholder; return token ids and the windows' rows, taken from ``extracted`` if there."""
        key = id(audio[0]), audio[1]  # prompts about the same file share its waveform
        if key not in extracted:
            extracted[key] = self.extract(audio)
        windows, tokens = extracted[key]
        at = ids.index(self.audio_token_id)
        return ids[:at] + [self.audio_token_id] * tokens + ids[at + 1 :], windows


def count_audio(all_images: Sequence[Waveform | None] | None, seconds: float = MAX_SECONDS) -> list[int] | None:
    """What takes the place of ``get_images_num``.

    :param all_images: One ``(waveform, rate)`` or None a prompt.
    :param seconds: Longest clip; what is longer is cut.
    :return: Entries of a prompt in the image slot: its windows of 30 s.
    """
    if all_images is None:
        return None
    most = int(seconds * SAMPLING_RATE)
    return [0 if clip is None else len(windows_of(min(len(clip[0]), most))) for clip in all_images]
