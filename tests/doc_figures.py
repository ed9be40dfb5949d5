"""What a figure in a document may be compared with, and where a document has figures. For test_doc_figures.py.

A document's text is matched with templates, in which ``{}`` stands for a figure. Behind it is one of

- a number: a constant, a default, arithmetic, or a result in ``benchmarks/results`` (of ``run_all.py``,
  ``bench_host.py``, ``soak.py``, ``documented.py``), rounded as the text is;
- a function that says what is wrong with it: a bound, a duration ("about": a third more or less is fine);
- :class:`Whole`: a function that says what is wrong with several together;
- :class:`Stated`: somebody else's figure, written down once more with its source.

``test_doc_figures.py`` changes each figure in turn and sees that this is noticed.
"""

from __future__ import annotations

import functools
import json
import re
import subprocess
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

from conftest import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))

NUMBER = r"\d+(?:\.\d+){2,}(?:\.\w+)*|\d+(?:,\d{3})*(?:\.\d+)?(?:e-?\d+)?"
NAMES = (  # what has digits and is no figure
    r"\bA100 80 GB, \d+ prompts|\bH200, \d+ prompts",
    r"\]\([^)]*\)",
    r"ZeRO[\s-]\d(?:,?\s(?:and |or )?\d)*",
    r"\b(?:DP|TP|rank|Rank|node|Step)\s\d\b",
    r"(?m)^ *(?:#+ )?\d+\. ",
    r"(?m)^## \d+\.\d+\.\d+$",
    r"\b4[\s-]bits?\b",
    r"x86-64",
    r"\b127\.0\.\d\.1\b",
)


class ByTest(NamedTuple):
    """A test that compares a part of a page, or runs a command.

    :param name: ``file::beginning of the test's name``, without ``test_`` of the file.
    """

    name: str

    def exists(self) -> bool:
        """Whether there is such a test."""
        file, _, test = self.name.partition("::")
        return f"\ndef {test}" in (ROOT / "tests" / f"test_{file}.py").read_text(encoding="utf-8")


class Stated(NamedTuple):
    """Somebody else's figure.

    :param value: As read there.
    :param source: Where it is from.
    """

    value: float | str
    source: str


class Whole(NamedTuple):
    """Figures that must fit one another.

    :param wrong: What is wrong with them.
    """

    wrong: Callable[[list[str]], str | None]


# ------------------------------------------------------------------------------------------- what is behind the figures
@functools.cache
def kept(end: str) -> dict[str, Any]:
    """The newest results that are in the repository, not only on this machine.

    :param end: Of the file's name: ``""``, ``_host``, ``_soak``, ``_documented``.
    """
    folder = ROOT / "benchmarks" / "results"
    listed = subprocess.run(["git", "ls-files", "."], cwd=folder, capture_output=True, text=True).stdout.split()
    names = listed or [path.name for path in folder.iterdir()]  # the latter where there is no git
    newest = max(name for name in names if re.fullmatch(rf"[\d-]{{10}}{end}\.json", name))
    return json.loads((folder / newest).read_text(encoding="utf-8"))


def bound(holds: Callable[[float], bool], said: str) -> Callable[[str], str | None]:
    """What is wrong with a figure that is a bound, or about something."""
    return lambda text: None if holds(float(text.replace(",", ""))) else said


def about(seconds: float, unit: int = 1) -> Callable[[str], str | None]:
    """As long as was measured, a third more or less.

    :param seconds: Measured.
    :param unit: Seconds in one of the text's.
    """
    return bound(lambda v: abs(v * unit - seconds) <= max(seconds / 3, unit / 2), f"about {seconds / unit:.1f}")


def around(seconds: float, unit: int = 60) -> tuple[Callable[[str], str | None], ...]:
    """The two ends of a range in which what was measured lies, a quarter more or less."""
    return (
        bound(lambda v: v * unit <= seconds * 1.25, f"below {seconds / unit:.1f}"),
        bound(lambda v: v * unit >= seconds / 1.25, f"above {seconds / unit:.1f}"),
    )


def at_least(value: float) -> Callable[[str], str | None]:
    """A figure that what was measured is not above, nor far below."""
    return bound(lambda v: value <= v <= 20 * value, f"at least {value:g}, at most {20 * value:g}")


def among(*values: float) -> Callable[[str], str | None]:
    """One of some figures."""
    return bound(lambda v: v in values, f"one of {values}")


def in_file(path: str, pattern: str) -> str:
    """A figure in a file, where it has no name to import."""
    return re.search(pattern, (ROOT / path).read_text(encoding="utf-8")).group(1)


def pinned(package: str, parts: int = 3) -> str:
    """The version in ``requirements/``, or its beginning."""
    for name in ("cpu", "torch", "dev", "lightrft"):
        found = re.search(rf"(?m)^{package}==([\w.]+)", (ROOT / "requirements" / f"{name}.txt").read_text())
        if found:
            return ".".join(found.group(1).split(".")[:parts])
    raise KeyError(package)


# ------------------------------------------------------------------------------------------------------- the documents
class Page:
    """A document as one line, and where its figures are.

    :param name: Path from the repository's root.
    :param written: Regular expression of what is left out, because a script or a test writes it.
    """

    def __init__(self, name: str, written: str | None = None) -> None:
        text = (ROOT / name).read_text(encoding="utf-8")
        if written is not None:
            text = re.sub(written, "", text, flags=re.S)
        # of blocks the remarks behind their commands; what they print is compared in test_docs.py
        remarks = lambda block: " ".join(re.findall(r"(?m)(?:^| )#( .*)$", block.group(0)))  # noqa: E731
        text = re.sub(r"(?ms)^ *```.*?^ *```", remarks, text)
        names = [match.span() for name in NAMES for match in re.finditer(name, text)]
        code = re.finditer(r"`[^`]*`", text)  # flags, names, messages; shapes are figures
        names += [match.span() for match in code if not match.group(0).startswith(("`(", "`arange("))]
        figures = [m.span() for m in re.finditer(rf"(?<![\w.@-])(?:{NUMBER})(?!\w)", text)]
        figures = [f for f in figures if not any(start <= f[0] and f[1] <= end for start, end in names)]
        self.text, self.places = one_line(text)
        self.figures = [(self.places[start], self.places[end - 1] + 1) for start, end in figures]

    def unaccounted(self, known: list[tuple[int, int]]) -> list[str]:
        """Figures that no template has found, with what is around them.

        :param known: Where templates have found some.
        """
        return [self.text[max(0, a - 40) : b + 25] for a, b in self.figures if (a, b) not in known]


def one_line(text: str) -> tuple[str, list[int]]:
    """Each run of white space as one space, and where each character went."""
    line, places = "", []
    for character in text:
        character = " " if character.isspace() else character
        if character == " " and line.endswith(" "):
            places.append(len(line) - 1)
            continue
        places.append(len(line))
        line += character
    return line, places


def pattern_of(template: str) -> re.Pattern[str]:
    """The regular expression of a template."""
    literal = [re.escape(part) for part in template.split("{}")]
    return re.compile(rf"(?<![\d.,])({NUMBER})".join(literal))


def shown(text: str, value: float | str) -> bool:
    """Whether a value, rounded as the text is, is the text."""
    if isinstance(value, str):
        return text == value
    if "e" in text:
        digits = len(text.partition("e")[0].partition(".")[2])
        return float(text) == float(f"{value:.{digits}e}")
    digits = len(text.partition(".")[2])
    return text.replace(",", "") == f"{value:.{digits}f}"


def what_is_wrong(figures: list[str], values: tuple[Any, ...]) -> list[str]:
    """Of the figures that a template has found."""
    if len(values) == 1 and isinstance(values[0], Whole):
        return [f"{', '.join(figures)}: not {said}" for said in [values[0].wrong(figures)] if said]
    assert len(figures) == len(values), (figures, values)
    wrong = []
    for figure, value in zip(figures, values, strict=True):
        if callable(value):
            wrong += [f"{figure}: not {said}" for said in [value(figure)] if said]
        elif not shown(figure, value.value if isinstance(value, Stated) else value):
            wrong.append(f"{figure}: it is {value}")
    return wrong
