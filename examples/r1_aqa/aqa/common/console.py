"""What a command tells the person who watches it."""

from __future__ import annotations

import os
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TextIO

SHOWN_PROBLEMS = 10  # of each kind, on the screen; the report holds all


def say(text: str) -> None:
    """Print a line to stderr, whose error handler prints any file name in any locale."""
    print(text, file=sys.stderr, flush=True)


def say_problems(headline: str, kinds: Iterable[str], lines: Sequence[str]) -> None:
    """Warn of problems, and show the first of each kind.

    :param kinds: The kind of each.
    """
    seen: Counter[str] = Counter()
    shown = []
    for kind, line in zip(kinds, lines, strict=True):
        seen[kind] += 1
        shown += [line] if seen[kind] <= SHOWN_PROBLEMS else []
    more = [f"... and {len(lines) - len(shown)} more"] if len(lines) > len(shown) else []
    counts = ", ".join(f"{kind} {n}" for kind, n in seen.most_common())
    say("\n  ".join([f"WARNING: {headline}: {counts}", *shown, *more]))


def several(title: str, lines: Sequence[str], most: int = 20) -> str:
    """A message with a title and the first of many lines."""
    more = [f"... and {len(lines) - most} more"] if len(lines) > most else []
    return "\n  ".join([f"{title}:", *lines[:most], *more])


@contextmanager
def output_to_log(log: Path) -> Iterator[TextIO]:
    """Redirect stdout and stderr, also those of C++ libraries, to the end of a file.

    :return: The terminal, for what a person should see meanwhile.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    saved = [os.dup(1), os.dup(2)]
    with log.open("ab") as file, os.fdopen(os.dup(2), "w", buffering=1, encoding="utf-8") as screen:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
        try:
            yield screen
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            for number, copy in zip((1, 2), saved, strict=True):
                os.dup2(copy, number)
                os.close(copy)


@contextmanager
def progress(
    what: str, total: int, unit: str = "file", done: int = 0, screen: TextIO | None = None, quiet: bool = False
) -> Iterator[Callable[..., object]]:
    """Show a bar with rate and remaining time, redrawn often on a terminal and every half minute in a file.

    :param screen: Where; stderr by default.
    :param quiet: Drop all other output meanwhile: of a damaged MP3 mpg123 prints lines that do not name it.
    :return: A function that advances it, by one or by its argument.
    """
    from tqdm import tqdm

    with ExitStack() as stack:
        screen = stack.enter_context(output_to_log(Path(os.devnull))) if quiet else screen or sys.stderr
        often = 0.1 if screen.isatty() else 30.0
        kind = {"unit": unit, "initial": done, "file": screen}
        bar = stack.enter_context(tqdm(desc=what, total=total, mininterval=often, maxinterval=2 * often, **kind))
        yield bar.update
