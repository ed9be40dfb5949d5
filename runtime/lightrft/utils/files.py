"""Writing files so that a kill at any moment leaves the old content or the whole new one."""

from pathlib import Path

PART = ".part"  # suffix of what is being written; the name without it appears only once all is there


def write_atomically(path: Path, text: str) -> None:
    """Write a text file beside its target, then rename it."""
    part = path.with_name(path.name + PART)
    part.write_text(text, encoding="utf-8")
    part.replace(path)
