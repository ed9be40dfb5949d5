"""Prompts with audio for LightRFT: the dataset, and the processor that fills the image slot.

The ``patch_*`` functions that make LightRFT's image pipeline carry audio live in ``aqa/patches/targets.py`` and are exported
from here too.
"""

from __future__ import annotations

import functools
import os
import socket
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from aqa.audio.decode import HOP_LENGTH, MAX_SECONDS, SAMPLING_RATE, AudioError, load_audio, probe_all, show
from aqa.audio.prefetch import DECODE_THREADS, WaveformCache
from aqa.audio.sandbox import Sandbox, escape_of
from aqa.data.mixing import SOURCE_COLUMN
from aqa.patches.slots import GUARD_ROWS, MAX_FRAMES, audio_token_count, grid_of, pack_clip
from aqa.patches.targets import (
    NamedClip,
    patch_actor_for_audio,
    patch_experience_maker_for_audio,
    patch_strategy_for_audio,
)
from torch.utils.data import Dataset

__all__ = [
    "AudioError",
    "AudioMultimodalProcessor",
    "AudioPromptDataset",
    "patch_actor_for_audio",
    "patch_experience_maker_for_audio",
    "patch_strategy_for_audio",
]

RESPONSE_HEADER = "<|im_start|>assistant\n"  # behind it the response begins; see reward_models_utils
Waveform = tuple[np.ndarray, int]  # samples and rate in Hz
TAG_COLUMNS = {SOURCE_COLUMN: "source", "dataset_name": "dataset", "question_type": "question_type"}
MOST_TAGS = 32  # of a kind; each makes several metrics


class DataError(ValueError):
    """Rows that cannot be trained on; the message names them."""


def render_prompt(processor: Any, messages: list[dict[str, Any]]) -> str:
    """Apply the chat template to a message list that may come from parquet.

    Parquet gives all content parts the same keys, so the text part comes back with ``audio_url: None``, and
    Qwen2-Audio's template takes every part that *has* the key for an audio: the question would be lost. Keys without a
    value are dropped first.

    :param processor: Qwen2-Audio processor.
    :param messages: Chat messages.
    :return: Prompt text that ends where the answer begins.
    """
    clean = []
    for message in messages:
        content = message["content"]
        if not isinstance(content, str):
            content = [{k: v for k, v in part.items() if v is not None} for part in content]
        clean.append({"role": message["role"], "content": content})
    return processor.apply_chat_template(clean, tokenize=False, add_generation_prompt=True)


def read_columns(dataset: Any, args: Any) -> dict[str, list]:
    """The four columns of the data, by the flag that names them.

    :param dataset: ``datasets.Dataset`` or any mapping of columns.
    :param args: ``input_key``, ``images_key``, ``reference_key``, ``label_key``.
    :raises DataError: naming flag and column if one is missing.
    """
    columns = {}
    there = getattr(dataset, "column_names", None) or list(dataset)
    names = {
        "input_key": args.input_key,
        "images_key": args.images_key,
        "reference_key": args.reference_key,
        "label_key": args.label_key,
    }
    for flag, name in names.items():
        if name not in there:
            raise DataError(
                f"the training data has no column {name!r}, which --{flag} names; its columns are "
                f"{', '.join(map(str, there))}. Name the right one, or make the data with data_preprocess/avqa.py"
            )
        columns[flag] = list(dataset[name])
    return columns


def tags_of(dataset: Any, labels: Sequence[str]) -> list[tuple[str, ...]]:
    """What each row is counted under in the metrics: its source, data set, question type and label.

    A column with one value only says nothing and is left out, and so is one with more than :data:`MOST_TAGS`.

    :param dataset: ``datasets.Dataset`` or any mapping of columns.
    :param labels: Reward rule of each row.
    :return: ``kind/value``, any number of them a row.
    """
    there = getattr(dataset, "column_names", None) or list(dataset)
    columns = {kind: list(dataset[name]) for name, kind in TAG_COLUMNS.items() if name in there} | {"label": labels}
    tags: list[tuple[str, ...]] = [()] * len(labels)
    for kind, values in columns.items():
        if 2 <= len(set(filter(None, values))) <= MOST_TAGS:
            tags = [(*row, f"{kind}/{value}") if value else row for row, value in zip(tags, values, strict=True)]
    return tags


def check_types(columns: dict[str, list]) -> list[str]:
    """Rows whose values are not of the kind that is expected.

    :param columns: From :func:`read_columns`.
    :return: One entry a bad value, with row, flag and value.
    """
    problems = []
    for i, (messages, path, reference, label) in enumerate(zip(*columns.values(), strict=True)):
        if wrong := _wrong_messages(messages):
            problems.append(f"row {i}: --input_key: {wrong}")
        if path is not None and not _is_text(path):
            problems.append(f"row {i}: --images_key: {path!r:.80} is no path of an audio file")
        if isinstance(reference, str) and not _is_text(reference):
            problems.append(f"row {i}: --reference_key: {reference!r:.80} cannot be stored as UTF-8")
        if label is not None and not _is_text(label):
            problems.append(f"row {i}: --label_key: {label!r:.80} is no text")
    return problems


def _is_text(value: Any) -> bool:
    # str.isascii is quick; half a surrogate pair, which tokenizers refuse, is the only text that UTF-8 does not hold
    return isinstance(value, str) and (value.isascii() or value == value.encode("utf-8", "ignore").decode("utf-8"))


def _wrong_messages(messages: Any) -> str | None:
    if not isinstance(messages, (list, tuple)) or not messages:
        return f"{messages!r:.80} is no list of chat messages"
    for message in messages:
        if not isinstance(message, Mapping) or not {"role", "content"} <= set(message) or not _is_text(message["role"]):
            return f"{message!r:.80} is no chat message with role and content"
        content = message["content"]
        if _is_text(content):
            continue
        if not isinstance(content, (list, tuple)) or not content:
            return f"content is {content!r:.80}, expected text or a list of parts"
        for part in content:
            kind = part.get("type") if isinstance(part, Mapping) else None
            key = {"text": "text", "audio": "audio_url"}.get(kind) if isinstance(kind, str) else None
            if key is None or not _is_text(part.get(key)):
                return f"{part!r:.80} is no part of type text, with text, or audio, with audio_url"
    return None


class AudioPromptDataset(Dataset):
    """Rows of ``avqa.py`` as prompts.

    All rows are checked when it is made: the audio files exist and have a readable header, the reference is there,
    the rendered prompt holds the question and one placeholder a clip, and is not longer than allowed. A row without
    audio (``audio_path`` empty, no audio part) is a text-only prompt.

    :param dataset: ``datasets.Dataset`` (or any sequence of mappings) with the columns of ``avqa.py``.
    :param tokenizer: Tokenizer.
    :param processor: Qwen2-Audio processor.
    :param max_length: Longest prompt in tokens, a clip's placeholder counted as one.
    :param strategy: Its ``args`` name the columns (``input_key``, ``images_key``, ``reference_key``, ``label_key``).
    :param sandbox: Where to decode, for files that are not trusted; None: in this process.
    :param audio_root: Folder that no audio may lie outside of, links resolved; None: anywhere.
    :param decode_all: Decode every file now, not only its header: what cannot be trained on stops the run before its
        first step. Takes some milliseconds a clip.
    :param cache_bytes: Most memory for decoded clips, which the next episode then finds.
    :param tagged: Rows and batches get a fifth member, their tags (:func:`tags_of`); LightRFT's trainer takes four.
    :raises DataError: if a row cannot be trained on; all such rows are counted, the first are named.
    """

    def __init__(
        self,
        dataset: Any,
        tokenizer: Any,
        processor: Any,
        max_length: int,
        strategy: Any,
        *,
        sandbox: Sandbox | None = None,
        audio_root: str | None = None,
        decode_all: bool = False,
        cache_bytes: int = 0,
        tagged: bool = False,
    ) -> None:
        self.tokenizer = tokenizer
        self.processor = processor
        self.max_length = max_length
        self.audio_root = audio_root
        load = load_audio if sandbox is None else sandbox.load
        self.clips = WaveformCache(load, cache_bytes)
        read_header = None if sandbox is None else sandbox.read_header
        self.reader = load if decode_all else read_header
        columns = read_columns(dataset, strategy.args)
        self.audio_paths: list[str | None] = [path or None for path in columns["images_key"]]
        self.references: list[str] = columns["reference_key"]
        self.labels: list[str] = columns["label_key"]
        self.tags = tags_of(dataset, self.labels) if tagged else None
        self.prompts: list[str] = []
        problems = check_types(columns)
        if not problems:
            self.prompts = [render_prompt(processor, messages) for messages in columns["input_key"]]
            problems = self._check_texts() + self._check_files(strategy)
        if problems:
            shown = "\n".join(f"  {p}" for p in problems[:20])
            more = f"\n  ... and {len(problems) - 20} more" if len(problems) > 20 else ""
            raise DataError(
                f"{len(problems)} problems in {len(self.audio_paths)} rows of training data:\n{shown}{more}\n"
                "Run data_preprocess/avqa.py again where the audio is; --skip_bad leaves such rows out."
            )

    def _check_texts(self) -> list[str]:
        problems = []
        if not self.prompts:
            return ["the data has no row"]
        token = self.processor.audio_token
        lengths = [len(ids) for ids in self.tokenizer(self.prompts, add_special_tokens=False)["input_ids"]]
        for i, (prompt, length) in enumerate(zip(self.prompts, lengths, strict=True)):
            placeholders, clips = prompt.count(token), int(self.audio_paths[i] is not None)
            if placeholders != clips:
                problems.append(f"row {i}: {placeholders} audio placeholders for {clips} clips in {prompt!r}")
            if prompt.find(RESPONSE_HEADER) + len(RESPONSE_HEADER) != len(prompt):
                problems.append(
                    f"row {i}: the rewards find the response behind the first {RESPONSE_HEADER!r}, which must be the "
                    f"prompt's end (a question cannot hold turn markers): {prompt!r}"
                )
            if length > self.max_length:
                problems.append(
                    f"row {i}: {length} prompt tokens, more than --prompt_max_len {self.max_length}; nothing is cut"
                )
            if not isinstance(self.references[i], str) or not self.references[i].strip():
                problems.append(f"row {i}: the reference answer is {self.references[i]!r}")
        return problems

    def _check_files(self, strategy: Any) -> list[str]:
        paths = [path for path in self.audio_paths if path is not None]
        relative = [
            f"{show(path)}: is relative; avqa.py writes absolute paths" for path in paths if not os.path.isabs(path)
        ]
        if self.audio_root is not None:
            relative += [problem for path in dict.fromkeys(paths) if (problem := self._confine(path))]
            if relative:
                return relative  # nothing is opened where something is not allowed to be
        probe = probe_all if self.reader is None else functools.partial(probe_all, reader=self.reader)
        if not (dist.is_initialized() and dist.get_world_size() > 1):
            return relative + probe(paths)
        world = dist.get_world_size()
        local = int(os.environ.get("LOCAL_WORLD_SIZE", world))
        # every host looks at every file: its disk may be its own
        found = [(socket.gethostname(), problem) for problem in probe(paths[dist.get_rank() % local :: local])]
        shares: list[list[tuple[str, str]]] = [[] for _ in range(world)]
        dist.all_gather_object(shares, found)
        hosts: dict[str, set[str]] = {}
        for host, problem in (entry for share in shares for entry in share):
            hosts.setdefault(problem, set()).add(host)
        where = {p: "" if len(on) == world // local else f" (on {', '.join(sorted(on))})" for p, on in hosts.items()}
        return relative + [problem + where[problem] for problem in hosts]

    def _confine(self, path: str) -> str | None:
        where = None if self.audio_root is None else escape_of(path, self.audio_root)
        return where and f"{show(path)}: leads to {show(where)}, outside {self.audio_root} (--confine_audio)"

    def __len__(self) -> int:
        return len(self.prompts)

    def __getitem__(self, index: int) -> tuple[Any, ...]:
        """One prompt.

        :param index: Row.
        :return: Prompt text, (waveform ``(samples,)`` float32, 16000) or None, reference, label, tags if ``tagged``.
        :raises AudioError: if the file does not decode.
        """
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[tuple[Any, ...]]:
        """A batch of prompts, its clips decoded in parallel; what a ``DataLoader`` asks for.

        :param indices: Rows.
        :return: As :meth:`__getitem__`, one entry a row. Rows of the same file share its waveform.
        :raises AudioError: if a file does not decode.
        """
        paths = dict.fromkeys(path for index in indices if (path := self.audio_paths[index]) is not None)
        with ThreadPoolExecutor(DECODE_THREADS, thread_name_prefix="decode") as pool:
            waves = dict(zip(paths, pool.map(self._decode, paths), strict=True))
        return [
            (
                self.prompts[index],
                None if path is None else NamedClip.of(waves[path], SAMPLING_RATE, path),
                self.references[index],
                self.labels[index],
                *([] if self.tags is None else [self.tags[index]]),
            )
            for index, path in ((index, self.audio_paths[index]) for index in indices)
        ]

    def _decode(self, path: str) -> np.ndarray:
        if problem := self._confine(path):  # a link may have changed since the check, and since it was decoded
            raise AudioError(problem)
        return self.clips(path)

    @staticmethod
    def collate_fn(rows: Sequence[tuple[Any, ...]]) -> tuple[list, ...]:
        """A batch: prompts, audio, references, labels, and tags where there are some, each a list.

        :param rows: From :meth:`__getitem__`.
        """
        return tuple(map(list, zip(*rows, strict=True)))


class AudioMultimodalProcessor:
    """Fills LightRFT's image slot with audio; takes the place of its ``MultimodalDataProcessor``.

    :param tokenizer: Tokenizer.
    :param processor: Qwen2-Audio processor.
    :param prompt_max_len: Longest prompt in tokens, a clip's placeholder counted as one. Nothing is ever cut.
    """

    def __init__(self, tokenizer: Any, processor: Any, prompt_max_len: int) -> None:
        self.tokenizer = tokenizer
        self.processor = processor
        self.prompt_max_len = prompt_max_len
        self.audio_token_id = tokenizer.convert_tokens_to_ids(processor.audio_token)
        extractor = processor.feature_extractor
        if (extractor.sampling_rate, extractor.hop_length) != (SAMPLING_RATE, HOP_LENGTH):
            raise ValueError(
                f"the feature extractor works at {extractor.sampling_rate} Hz with hop {extractor.hop_length}; "
                f"the slot encoding was made for {SAMPLING_RATE} Hz and {HOP_LENGTH}"
            )

    def extract(self, audio: Waveform) -> tuple[torch.Tensor, int]:
        """Mel rows and audio tokens of one clip.

        The extractor pads to 30 s before it transforms. Only the valid frames and the two guard rows are wanted, and
        they depend on the next few hundred samples alone, so that only these are padded: the same values, and a
        one-second clip costs a thirtieth.

        :param audio: Waveform ``(samples,)`` float32 and its rate, which must be 16,000 Hz.
        :return: Rows ``(frames + 2, n_mels)`` float32, and the number of audio tokens.
        :raises ValueError: if the rate is wrong or the waveform is no finite float vector.
        """
        wave, rate = audio
        if rate != SAMPLING_RATE:
            raise ValueError(f"audio at {rate} Hz; {SAMPLING_RATE} Hz are needed (load_audio resamples)")
        if wave.ndim != 1 or not np.isfinite(wave).all():
            raise ValueError(f"audio of shape {wave.shape} is no vector of finite samples")
        extractor = self.processor.feature_extractor
        wave = wave[: int(MAX_SECONDS * SAMPLING_RATE)]
        frames = -(-len(wave) // HOP_LENGTH)
        needed = (frames + GUARD_ROWS) * HOP_LENGTH + extractor.n_fft
        padded = np.pad(wave, (0, max(0, min(needed, MAX_FRAMES * HOP_LENGTH) - len(wave))))
        mel = extractor(padded, sampling_rate=rate, padding="do_not_pad", truncation=False, return_tensors="pt")
        return pack_clip(mel["input_features"][0], frames), audio_token_count(frames)

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
        """What LightRFT asks of its multimodal processor, for audio.

        Text-only prompts (None in ``all_images``) may be mixed in. The mel spectrogram of a clip is computed once,
        whatever ``n_samples_per_prompt``, and once for all prompts that share a waveform.

        :param all_prompts: Prompt texts with one placeholder a clip.
        :param all_images: One ``(waveform, rate)`` or None a prompt.
        :param all_references: Gold answers.
        :param images_num: Clips a prompt, as ``get_images_num`` counted them; None: count here.
        :param n_samples_per_prompt: Every output list holds each prompt's entry this many times, next to each other.
        :param all_videos: Must be None or hold None only.
        :param videos_num: Ignored.
        :return: LightRFT's mapping; ``all_images_pixel_values`` is ``(sum of rows, n_mels)`` or None,
            ``all_images_grid_thw`` is ``(clips, 3)`` with ``(1, 1, rows)``.
        :raises DataError: if a prompt is too long, or its placeholders do not match its clips.
        """
        if all_videos is not None and any(video is not None for video in all_videos):
            raise DataError("the audio pipeline carries no videos")
        n = n_samples_per_prompt
        audio = list(all_images) if all_images is not None else [None] * len(all_prompts)
        counts = [int(clip is not None) for clip in audio]
        if images_num is not None and list(images_num) != counts:
            raise DataError(f"images_num says {list(images_num)} clips a prompt, there are {counts}")
        prompt_ids, rows, grids = [], [], []
        extracted: dict[tuple[int, int], tuple[torch.Tensor, int]] = {}  # by waveform and rate
        token_ids = self.tokenizer(list(all_prompts), add_special_tokens=False)["input_ids"]
        for i, ids in enumerate(token_ids):
            if len(ids) > self.prompt_max_len:
                raise DataError(
                    f"prompt {i} has {len(ids)} tokens, more than {self.prompt_max_len}: {all_prompts[i]!r}"
                )
            if ids.count(self.audio_token_id) != counts[i]:
                raise DataError(
                    f"prompt {i} holds {ids.count(self.audio_token_id)} audio placeholders for {counts[i]} clips: "
                    f"{all_prompts[i]!r}"
                )
            if audio[i] is not None:
                key = id(audio[i][0]), audio[i][1]  # prompts about one file share its waveform
                if key not in extracted:
                    extracted[key] = self.extract(audio[i])
                clip, tokens = extracted[key]
                rows += [clip] * n
                grids += [grid_of(clip)] * n
                at = ids.index(self.audio_token_id)
                ids = ids[:at] + [self.audio_token_id] * tokens + ids[at + 1 :]
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
            "all_images_grid_thw": torch.cat(grids) if grids else no_grid,
            "all_videos_grid_thw": no_grid,
            "all_references": None if all_references is None else repeat(all_references),
        }
