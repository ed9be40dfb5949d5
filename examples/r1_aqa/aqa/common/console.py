"""What a command tells the person who watches it."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager

SHOWN_PROBLEMS = 3  # of each kind, on the screen; the report holds all


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


@contextmanager
def progress(what: str, total: int) -> Iterator[Callable[[], object]]:
    """Show a bar on stderr, redrawn often on a terminal and every half minute in a file.

    :return: A function that advances it by one.
    """
    from tqdm import tqdm

    often = 0.1 if sys.stderr.isatty() else 30.0
    with tqdm(desc=what, total=total, unit="file", mininterval=often, maxinterval=2 * often) as bar:
        yield bar.update
