"""The file of results: all sections, their cases, and the figures of each; written after every case.

Needs psutil alone beside the standard library, so that a broken environment is reported like any other failure.
"""

import argparse
import gc
import json
import sys
import textwrap
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from harness import EXAMPLE  # noqa: F401  puts the example and the runtime on the import path

from aqa.common.files import write_atomically

GOOD = ("ok", "skipped")
Figures = dict[str, float | int | str]


class Skip(Exception):
    """A case that cannot run here; the message says why."""


class Missed(Exception):
    """A figure beyond its limit.

    :param figures: All figures of the case.
    """

    def __init__(self, message: str, figures: Figures) -> None:
        super().__init__(message)
        self.figures = figures


class Results:
    """The contents of ``results.json``.

    :param path: The file. What it holds stays, unless it is from the other setting of ``small``.
    :param small: Tiny sizes, which say nothing about speed.
    """

    def __init__(self, path: Path, small: bool) -> None:
        self.path = path
        self.all: dict[str, Any] = {"small": small, "sections": {}}
        if path.exists():
            found = json.loads(path.read_text(encoding="utf-8"))
            if found["small"] == small:
                self.all = found

    def section(self, name: str) -> dict[str, Any]:
        """Record of a section: ``status``, ``seconds`` and ``cases``."""
        return self.all["sections"].setdefault(name, {"status": "not run", "seconds": 0.0, "cases": {}})

    def write(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(self.path, json.dumps(self.all, indent=1) + "\n")

    def is_wrong(self, name: str) -> bool:
        """Whether a section has not run to its end, or a case of it failed."""
        section = self.section(name)
        ended = section["status"] in ("ok", "in part")
        return not ended or any(case["status"] not in GOOD for case in section["cases"].values())

    def is_whole(self, name: str) -> bool:
        """Whether nothing of a section is left to do."""
        section = self.section(name)
        return section["status"] == "ok" and all(case["status"] == "ok" for case in section["cases"].values())


class Section:
    """What a section's code is given.

    :param args: ``out`` is the folder of the results, ``demo_dir`` that of the demo.
    :param wanted: Names of the cases to run, in part; empty: all.
    """

    def __init__(self, results: Results, name: str, args: argparse.Namespace, wanted: list[str]) -> None:
        self.results, self.wanted = results, wanted
        self.small, self.out, self.demo = args.small, args.out, args.demo_dir.resolve()
        self.cases = results.section(name)["cases"]
        self.names: list[str] = []  # of all cases of the section, wanted or not

    def is_due(self, name: str) -> bool:
        """Whether a case is wanted and an earlier call has not done it."""
        wanted = not self.wanted or any(part.lower() in name.lower() for part in self.wanted)
        return wanted and self.cases.get(name, {}).get("status") != "ok"  # what was skipped may be possible now

    def case(self, name: str, work: Callable[[], Figures]) -> None:
        """Run a case if it is due, and record its figures, or what went wrong; the section goes on either way.

        :param work: Returns the figures, or raises :class:`Skip` or :class:`Missed`.
        """
        self.names.append(name)
        if not self.is_due(name):
            return
        started = time.monotonic()
        case = self.cases[name] = {"status": "running", "seconds": 0.0, "figures": {}}
        self.results.write()
        try:
            case |= {"figures": work(), "status": "ok"}
        except Skip as reason:
            case |= {"status": "skipped", "message": str(reason)}
        except Missed as miss:
            case |= {"figures": miss.figures, "status": "missed", "message": str(miss)}
        except Exception as error:  # whatever it is, it is recorded, and what comes next may still teach something
            print(traceback.format_exc(), file=sys.stderr)
            short = type(error).__name__ == "OutOfMemoryError"
            case |= {"status": "out of memory" if short else "failed", "message": f"{type(error).__name__}: {error}"}
        case["seconds"] = round(time.monotonic() - started, 1)
        self.results.write()
        free_memory()
        print(describe(name, case))


def free_memory() -> None:
    """Free what the case before has left: a patched model holds itself in a cycle."""
    gc.collect()
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def judge(figures: Figures, **limits: tuple[float | None, float | None]) -> Figures:
    """The figures, if they keep their limits.

    :param limits: By figure: the least and the most it may be.
    :raises Missed: if one does not, or is not a number.
    """
    wrong = []
    for name, (least, most) in limits.items():
        value = figures[name]
        if least is not None and not value >= least:
            wrong.append(f"{name} is {value:.4g}, at least {least:g} was wanted")
        if most is not None and not value <= most:
            wrong.append(f"{name} is {value:.4g}, at most {most:g} was wanted")
    if wrong:
        raise Missed("; ".join(wrong), figures)
    return figures


def describe(name: str, case: dict[str, Any]) -> str:
    """A case in the table."""
    rounded = {key: f"{value:.4g}" if isinstance(value, float) else value for key, value in case["figures"].items()}
    figures = [f"{key} {value}" for key, value in rounded.items()]
    message = " ".join(case.get("message", "").split())[:300]
    lines = textwrap.wrap("; ".join(filter(None, [*figures, message])), 110)
    return "\n      ".join([f"  {name:<34} {case['status']:<13} {case['seconds']:6.1f} s", *lines])
