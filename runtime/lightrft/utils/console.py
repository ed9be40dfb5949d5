"""Our lines go to the terminal; the output of libraries is redirected to a log file."""

import os
import re
import sys
import traceback
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

STYLES = {"bold": "1", "dim": "2", "red": "31", "yellow": "33"}
_ESCAPE = re.compile(r"\x1b\[[0-9]*m")


def paint(text: str, style: str) -> str:
    """Text in one of :data:`STYLES`; :class:`Console` removes the style where it does not write to a terminal."""
    return f"\x1b[{STYLES[style]}m{text}\x1b[0m"


class Console:
    """Rank-aware output. Until :meth:`redirect` it writes to the ordinary standard output.

    Colours are for terminals, unless the environment variable ``NO_COLOR`` is set (no-color.org).
    """

    def __init__(self) -> None:
        self.rank = 0  # of this process; lines of print() come from rank 0 alone
        self.stream: TextIO = sys.stdout
        self.log_file: Path | None = None
        self.quiet = False  # the terminal shows only warnings, errors and lines marked as needed; the log file has all
        self.verbose = False
        self.bar: Any = None  # a tqdm bar on the terminal's last line
        self._status = False

    def redirect(self, log_file: Path) -> None:
        """Send file descriptors 1 and 2 to a file and keep the terminal for our own lines.

        Done on descriptors and not on ``sys.stdout``, because native libraries write there too. An exception that
        ends the program is still shown on the terminal.
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

    def print(self, *parts: object, needed: bool = False) -> None:
        """Print a line, on rank 0, on the terminal and in the log file.

        :param needed: Show it with ``--quiet``, too.
        """
        if self.rank != 0:
            return
        if needed or not self.quiet:
            self._write(self.stream, *parts)
        if self.log_file is not None:
            self._write(sys.stdout, *parts)

    def warn(self, message: str) -> None:
        """Print a warning of one line, on every rank that calls it."""
        self._write(self.stream, paint(f"WARNING (rank {self.rank}):", "yellow"), message)

    def fail(self, message: str) -> None:
        """Print why the run ends, on every rank that calls it, on the terminal and in the log file."""
        self._write(self.stream, paint("ERROR:", "red"), message)
        if self.log_file is not None:
            self._write(sys.stdout, f"ERROR: {message}")

    def status(self, text: str) -> None:
        """Show on the terminal's last line what is going on, until the next line is printed; in a file as a line.

        :param text: At most 79 columns; empty: nothing is going on any more.
        """
        if self.rank != 0 or self.quiet:
            return
        if not self.stream.isatty():
            if text:
                self._write(self.stream, text)
            return
        with suppress(OSError):
            print(f"\r\x1b[K{text}", end="", file=self.stream, flush=True)
            self._status = True

    def _write(self, stream: TextIO, *parts: object) -> None:
        on_screen = stream is self.stream and stream.isatty()
        text = " ".join(map(str, parts))
        if not on_screen or os.environ.get("NO_COLOR"):
            text = _ESCAPE.sub("", text)
        with suppress(OSError):  # a full disk or a closed pipe must not end the run
            if on_screen and self.bar is not None:
                self.bar.clear()
            elif on_screen and self._status:
                text, self._status = f"\r\x1b[K{text}", False
            print(text, file=stream, flush=True)
            if on_screen and self.bar is not None:
                self.bar.refresh()

    def _show_exception(self, kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        lines = "".join(traceback.format_exception(kind, error, trace))
        print(lines, file=sys.stderr, flush=True)
        if issubclass(kind, KeyboardInterrupt):
            lines = "interrupted\n"
        self._write(
            self.stream, paint(f"rank {self.rank}: ", "red") + f"{lines}the engines' output is in {self.log_file}"
        )


console = Console()
