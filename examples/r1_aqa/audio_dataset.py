"""Prompts with audio for LightRFT: the dataset.

Also exported from here: the processor that fills the image slot, and the three ``patch_*_for_audio`` functions, which
make LightRFT's image pipeline carry audio. They live in ``aqa/patches`` and ``aqa/hosts/targets.py``.
"""

import os
import socket
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch.distributed as dist
from torch.utils.data import Dataset

from aqa.audio.decode import AudioError, show
from aqa.audio.prefetch import DECODE_THREADS, WaveformCache
from aqa.audio.probe import probe_all
from aqa.audio.reader import AudioReader
from aqa.common.console import several
from aqa.common.constants import SAMPLING_RATE
from aqa.data.columns import DataError, check_types, read_columns, tags_of
from aqa.data.prompts import prompt_lengths, prompt_problem, render_chat
from aqa.hosts.targets import patch_actor_for_audio, patch_experience_maker_for_audio, patch_strategy_for_audio
from aqa.patches.experience_maker import NamedClip
from aqa.patches.multimodal_processor import AudioMultimodalProcessor

__all__ = [
    "AudioError",
    "AudioMultimodalProcessor",
    "AudioPromptDataset",
    "DataError",
    "patch_actor_for_audio",
    "patch_experience_maker_for_audio",
    "patch_strategy_for_audio",
]


class AudioPromptDataset(Dataset):
    """Rows of ``avqa.py`` as prompts.

    All rows are checked when it is made: the audio files exist and have a readable header, the reference is there,
    the rendered prompt holds the question and one placeholder a clip, and is not longer than allowed. A row without
    audio (``audio_path`` empty, no audio part) is a text-only prompt.

    :param dataset: ``datasets.Dataset`` (or any sequence of mappings) with the columns of ``avqa.py``.
    :param max_length: Longest prompt in tokens, a clip's placeholder counted as one.
    :param strategy: Its ``args`` name the columns (``input_key``, ``images_key``, ``reference_key``, ``label_key``).
    :param reader: Reads the audio files; None: in this process, from anywhere.
    :param decode_all: Decode every file now, and not its header alone: a clip that cannot be trained on then stops the
        run before its first step. Takes some milliseconds a clip.
    :param cache_bytes: Most memory for decoded clips, so that the next episode need not decode them again.
    :param tagged: Give rows and batches a fifth member, their tags (:func:`tags_of`); LightRFT's trainer takes four.
    :param thinking: A thinking process for each row, for the warm start; None: there is none.
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
        reader: AudioReader | None = None,
        decode_all: bool = False,
        cache_bytes: int = 0,
        tagged: bool = False,
        thinking: Sequence[str | None] | None = None,
    ) -> None:
        self.tokenizer = tokenizer
        self.processor = processor
        self.max_length = max_length
        self.thinking = thinking
        self.reader = reader or AudioReader()
        self.clips = WaveformCache(self.reader.load, cache_bytes)
        self._read = self.reader.load if decode_all else self.reader.read_header
        columns = read_columns(dataset, strategy.args)
        self.audio_paths: list[str | None] = [path or None for path in columns["images_key"]]
        self.references: list[str] = columns["reference_key"]
        self.labels: list[str] = columns["label_key"]
        self.tags = tags_of(dataset, self.labels) if tagged else None
        self.prompts: list[str] = []
        texts, files = check_types(columns), []
        if not texts:
            self.prompts = [render_chat(processor, messages) for messages in columns["input_key"]]
            texts, files = self._check_texts(), self._check_files(strategy)
        if texts or files:
            title = f"{len(texts + files)} problems in {len(self.audio_paths)} rows of training data"
            remedy = "Restore the recordings, or run data_preprocess/avqa.py again with --skip_bad to leave them out."
            if texts:
                remedy = (
                    "Run data_preprocess/avqa.py again where the audio is: it leaves out what cannot be used, with "
                    "--skip_bad also rows without audio, with --prompt_max_len and --pretrain those that are too long."
                )
            raise DataError(f"{several(title, texts + files)}\n{remedy}")

    def _check_texts(self) -> list[str]:
        problems = []
        if not self.prompts:
            return ["the data has no row"]
        token = self.processor.audio_token
        lengths = prompt_lengths(self.tokenizer, self.prompts)
        for i, (prompt, length) in enumerate(zip(self.prompts, lengths, strict=True)):
            clips = int(self.audio_paths[i] is not None)
            if problem := prompt_problem(prompt, rendered=True, clips=clips, audio_token=token):
                problems.append(f"row {i}: {problem}: {prompt!r}")
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
        if self.reader.folder is not None:
            relative += probe_all(paths, reader=self.reader.check_inside)
            if relative:
                return relative  # open no file as long as one of them lies where it must not
        if not (dist.is_initialized() and dist.get_world_size() > 1):
            return relative + probe_all(paths, reader=self._read)
        world = dist.get_world_size()
        local = int(os.environ.get("LOCAL_WORLD_SIZE", world))
        # every host looks at every file, because hosts may have different disks
        share = paths[dist.get_rank() % local :: local]
        found = [(socket.gethostname(), problem) for problem in probe_all(share, reader=self._read)]
        shares: list[list[tuple[str, str]]] = [[] for _ in range(world)]
        dist.all_gather_object(shares, found)
        hosts: dict[str, set[str]] = {}
        for host, problem in (entry for share in shares for entry in share):
            hosts.setdefault(problem, set()).add(host)
        where = {p: "" if len(on) == world // local else f" (on {', '.join(sorted(on))})" for p, on in hosts.items()}
        return relative + [problem + where[problem] for problem in hosts]

    def __len__(self) -> int:
        return len(self.prompts)

    def __getitem__(self, index: int) -> tuple[Any, ...]:
        """One prompt.

        :return: Prompt text, (waveform ``(samples,)`` float32, 16000) or None, reference, label, tags if ``tagged``.
        :raises AudioError: if the file does not decode.
        """
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[tuple[Any, ...]]:
        """A batch of prompts, its clips decoded in parallel; what a ``DataLoader`` asks for.

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
        self.reader.check_inside(path)  # also for a clip in memory: a link may have changed since it was decoded
        return self.clips(path)

    @staticmethod
    def collate_fn(rows: Sequence[tuple[Any, ...]]) -> tuple[list, ...]:
        """A batch: prompts, audio, references, labels, and tags where there are some, each a list.

        :param rows: From :meth:`__getitem__`.
        """
        return tuple(map(list, zip(*rows, strict=True)))
