"""Clips that are ready when a step asks for them: decoded ahead of it, in parallel, and kept for the next episode.

Threads do the work, no forked workers: vLLM, torch and DeepSpeed live in this process, and libsndfile and soxr let go
of Python's lock while they decode and resample.
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

DECODE_THREADS = 4  # a rank; more would only take cores from the other ranks of the machine


class WaveformCache:
    """Decodes clips and keeps them in bounded memory. Any number of threads may ask.

    A clip whose file has changed is decoded again. A full cache takes nothing more and drops nothing: each episode asks
    for every clip once, in a new order, so that replacing the clip asked for longest ago would drop just those that the
    next episode begins with.

    :param load: Decodes a file: ``load_audio``, or a sandbox's ``load``.
    :param limit: Most bytes of samples to keep; 0: none.
    """

    def __init__(self, load: Callable[[str], np.ndarray], limit: int) -> None:
        self.load = load
        self.limit = limit
        self.size = 0  # bytes kept
        self._clips: dict[str, tuple[tuple[int, ...], np.ndarray]] = {}
        self._lock = threading.Lock()

    def __call__(self, path: str) -> np.ndarray:
        """The waveform of a file as it is now.

        :param path: The file.
        :return: Samples as ``load`` gives them; read-only, since all who ask for the file share them.
        :raises AudioError: if it does not decode.
        """
        state = _state_of(path)  # before decoding: a change meanwhile is seen the next time
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
    """What changes with a file's content: which file it is, links resolved, its size and time of modification."""
    try:
        found = os.stat(path)
    except (OSError, ValueError):
        return None  # decoding says why
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns


class PrefetchLoader:
    """A dataloader whose next batch is prepared while the present one is trained on.

    Batches, their order and ``sampler`` are the loader's own. One batch is ahead; it is prepared again where a run is
    resumed. What goes wrong with a batch is raised when that batch is asked for.

    The rows that a new run begins with are asked for at once, while models and engine are still to be started: the
    dataset's cache has them when the run begins.

    :param loader: A ``DataLoader`` without workers whose dataset has ``__getitems__``.
    """

    def __init__(self, loader: Any) -> None:
        self.loader = loader
        self.dataset, self.sampler, self.batch_size = loader.dataset, loader.sampler, loader.batch_size
        self.seconds_waited = 0.0  # for the last batch
        pool = ThreadPoolExecutor(1, thread_name_prefix="prefetch")
        pool.submit(self.dataset.__getitems__, next(iter(loader.batch_sampler), []))
        pool.shutdown(wait=False)  # its thread ends with the work

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[Any]:
        batches = iter(self.loader)
        with ThreadPoolExecutor(1, thread_name_prefix="prefetch") as pool:  # left when the iterator is closed, too
            ahead = pool.submit(next, batches, None)
            while True:
                started = time.perf_counter()
                batch = ahead.result()
                self.seconds_waited = time.perf_counter() - started
                if batch is None:
                    return
                ahead = pool.submit(next, batches, None)
                yield batch
