"""Decode clips in parallel, before a step needs them, and keep them for the next episode.

Threads do the work. Forked workers would copy the state of vLLM, torch and DeepSpeed; and threads run in parallel here,
because libsndfile and soxr release Python's lock while they decode and resample.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np

DECODE_THREADS = 4  # per rank; more would only take cores from the other ranks of the machine


class WaveformCache:
    """Decodes clips and keeps them in bounded memory. Any number of threads may use it.

    A clip whose file has changed is decoded again. A full cache keeps the clips that it has: each episode uses every
    clip once, in a new order, so replacing the least recently used clip by a new one would gain nothing.

    :param load: Decodes a file: ``load_audio``, or a sandbox's ``load``.
    :param limit: Most bytes of samples to keep; 0 keeps none.
    """

    def __init__(self, load: Callable[[str], np.ndarray], limit: int) -> None:
        self.load = load
        self.limit = limit
        self.size = 0  # bytes kept
        self._clips: dict[str, tuple[tuple[int, ...], np.ndarray]] = {}
        self._lock = threading.Lock()

    def __call__(self, path: str) -> np.ndarray:
        """The waveform of a file as it is now.

        :return: Samples as ``load`` returns them, but read-only, because all callers share them.
        :raises AudioError: if the file does not decode.
        """
        state = _state_of(path)  # taken before decoding, so that the next call sees a change in between
        with self._lock:
            if path in self._clips:
                known, wave = self._clips[path]
                if known == state:
                    return wave
                del self._clips[path]
                self.size -= wave.nbytes
        wave = self.load(path)
        wave.flags.writeable = False
        with self._lock:
            if state is not None and path not in self._clips and self.size + wave.nbytes <= self.limit:
                self._clips[path] = state, wave
                self.size += wave.nbytes
        return wave


def _state_of(path: str) -> tuple[int, ...] | None:
    """Device, inode, size and modification time, which change when a file's content does; None if it cannot be read."""
    try:
        found = os.stat(path)
    except (OSError, ValueError):
        return None  # decoding will raise an error that says why
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns


class PrefetchLoader:
    """A dataloader that prepares the next batch while the current one is trained on.

    Batches, their order and ``sampler`` are the wrapped loader's. One batch is prepared ahead, and a resumed run
    prepares it again. An error in a batch is raised when that batch is asked for.

    Creating the loader starts to decode a new run's first batch into the dataset's cache, while the models and the
    engine are still to be loaded.

    :param loader: A ``DataLoader`` without workers whose dataset has ``__getitems__``.
    """

    def __init__(self, loader: Any) -> None:
        self.loader = loader
        self.dataset, self.sampler, self.batch_size = loader.dataset, loader.sampler, loader.batch_size
        self.seconds_waited = 0.0  # for the last batch
        self.remaining: int | None = None  # batches still to be given, over all episodes; None: no limit
        pool = ThreadPoolExecutor(1, thread_name_prefix="prefetch")
        pool.submit(self.dataset.__getitems__, next(iter(loader.batch_sampler), []))
        pool.shutdown(wait=False)  # the thread ends when it is done

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[Any]:
        batches = iter(self.loader)
        with ThreadPoolExecutor(1, thread_name_prefix="prefetch") as pool:  # also shut down if the iterator is closed
            ahead = None if self.remaining == 0 else pool.submit(next, batches, None)
            while ahead is not None:
                started = time.perf_counter()
                batch = ahead.result()
                self.seconds_waited = time.perf_counter() - started
                if batch is None:
                    return
                if self.remaining is not None:
                    self.remaining -= 1
                # read no batch that will not be trained on: an unreadable clip in it would end a finished run
                ahead = None if self.remaining == 0 else pool.submit(next, batches, None)
                yield batch
