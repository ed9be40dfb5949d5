"""Read audio files as ``--sandbox_audio`` and ``--confine_audio`` ask for; nothing else knows what these flags do."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from aqa.audio.decode import MAX_SECONDS, AudioError, load_audio, read_header, show
from aqa.audio.sandbox import Sandbox, escape_of

if TYPE_CHECKING:
    import numpy as np


class AudioReader:
    """Decodes files in this process, or in a worker process with limits of memory and time.

    :param sandboxed: Decode in the worker (``--sandbox_audio``). It starts with the first file and, in a copy of this
        object or after a fork, again.
    :param folder: Refuse files outside this folder, links resolved (``--confine_audio``); None: read from anywhere.
    :param seconds: What is longer is cut (``--audio_seconds``).
    """

    def __init__(self, sandboxed: bool = False, folder: str | None = None, seconds: float = MAX_SECONDS) -> None:
        self.folder, self.seconds = folder, seconds
        self._sandbox = Sandbox(audio_seconds=seconds) if sandboxed else None

    def load(self, path: str | Path, silence_ok: bool = False) -> np.ndarray:
        """As :func:`aqa.audio.decode.load_audio`.

        :param silence_ok: Accept a clip of digital silence.
        :return: Waveform ``(samples,)`` float32, 16 kHz mono.
        :raises AudioError: as there, if the file is outside the folder, and if the worker crashes or passes a limit.
        """
        self.check_inside(path)
        if self._sandbox:
            return self._sandbox.load(path, silence_ok=silence_ok)
        return load_audio(path, silence_ok=silence_ok, seconds=self.seconds)

    def read_header(self, path: str | Path) -> tuple[int, int]:
        """As :func:`aqa.audio.decode.read_header`: frames and rate (Hz); raises as :meth:`load` does."""
        self.check_inside(path)
        return self._sandbox.read_header(path) if self._sandbox else read_header(path, self.seconds)

    def check_inside(self, path: str | Path) -> None:
        """Compare a file's real place with the folder, without opening the file.

        :raises AudioError: if the file lies outside.
        """
        if self.folder is not None and (where := escape_of(path, self.folder)):
            raise AudioError(f"{show(path)}: leads to {show(where)}, outside {self.folder} (--confine_audio)")

    def close(self) -> None:
        """End the worker process, if there is one."""
        if self._sandbox is not None:
            self._sandbox.close()
