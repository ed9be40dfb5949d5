"""What a person sees: our lines on the terminal, the engines' chatter in a file."""

from __future__ import annotations

import os
import sys
import traceback
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import TextIO


class Console:
    """Rank-aware output. Until :meth:`redirect` it writes to the ordinary standard output.

    :param rank: This process's rank; lines of :meth:`print` come from rank 0 alone.
    """

    def __init__(self, rank: int = 0) -> None:
        self.rank = rank
        self.stream: TextIO = sys.stdout
        self.log_file: Path | None = None

    def redirect(self, log_file: Path) -> None:
        """Send file descriptors 1 and 2 to a file and keep the terminal for our own lines.

        Done on descriptors and not on ``sys.stdout``, because native libraries write there too. An exception that
        ends the program is still shown on the terminal.

        :param log_file: Appended to.
        """
        log_file.parent.mkdir(parents=True, exist_ok=True)
        sys.stdout.flush()
        sys.stderr.flush()
        self.stream = os.fdopen(os.dup(1), "w", buffering=1, encoding="utf-8", errors="replace")
        with log_file.open("ab") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        self.log_file = log_file
        sys.excepthook = self._show_exception

    def print(self, *parts: object) -> None:
        """Print a line, on rank 0, on the terminal and in the log file.

        :param parts: As for :func:`print`.
        """
        if self.rank != 0:
            return
        self._write(self.stream, *parts)
        if self.log_file is not None:
            self._write(sys.stdout, *parts)

    def warn(self, message: str) -> None:
        """Print a warning, whatever the rank.

        :param message: One line.
        """
        self._write(self.stream, f"WARNING (rank {self.rank}): {message}")

    def fail(self, message: str) -> None:
        """Say why the run ends, whatever the rank, on the terminal and in the log file.

        :param message: Some lines.
        """
        self._write(self.stream, f"ERROR: {message}")
        if self.log_file is not None:
            self._write(sys.stdout, f"ERROR: {message}")

    @staticmethod
    def _write(stream: TextIO, *parts: object) -> None:
        with suppress(OSError):  # a full disk, or a reader that has gone, shall not end the run by way of its output
            print(*parts, file=stream, flush=True)

    def _show_exception(self, kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        lines = "".join(traceback.format_exception(kind, error, trace))
        print(lines, file=sys.stderr, flush=True)
        if issubclass(kind, KeyboardInterrupt):
            lines = "interrupted\n"
        print(f"rank {self.rank}: {lines}the engines' output is in {self.log_file}", file=self.stream, flush=True)


console = Console()
