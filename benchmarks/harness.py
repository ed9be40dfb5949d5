"""What the benchmarks share: rounds that take turns, ratios, limits that are judged, and one form of results."""

from __future__ import annotations

import json
import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import psutil

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"


class Seconds(NamedTuple):
    """What a piece of work took.

    :param wall: Seconds on the clock.
    :param cpu: CPU seconds of this process, all threads: other work on the machine lengthens these less.
    """

    wall: float
    cpu: float


def timed(work: Callable[[], Any]) -> tuple[Seconds, Any]:
    """Do some work.

    :param work: To do, in this process.
    :return: What it took, and what it returned.
    """
    wall, cpu = time.perf_counter(), time.process_time()
    value = work()
    return Seconds(time.perf_counter() - wall, time.process_time() - cpu), value


def take_turns(ways: Mapping[str, Callable[[], Any]], rounds: int) -> dict[str, list[Seconds]]:
    """Time some ways in turn, so that other load on the machine strikes all alike.

    :param ways: Name to work.
    :param rounds: Rounds that count, after one that warms up.
    """
    found: dict[str, list[Seconds]] = {name: [] for name in ways}
    for round_ in range(rounds + 1):
        for name, way in ways.items():
            seconds, _ = timed(way)
            if round_:
                found[name].append(seconds)
    return found


def ratio(above: Sequence[float], below: Sequence[float]) -> float:
    """Median of the ratios of pairs.

    :param above: Figures of one way.
    :param below: Of another, in the same rounds.
    """
    return statistics.median(a / b for a, b in zip(above, below, strict=True))


def forget_peak() -> None:
    """From now on :func:`peak_bytes` is about what comes."""
    Path("/proc/self/clear_refs").write_text("5")


def peak_bytes() -> int:
    """The most resident bytes that this process has had."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


class Report:
    """Collects a benchmark's figures, judges its limits and writes ``benchmarks/results/<date>_<name>.json``.

    :param name: Of the benchmark.
    :param description: Its docstring: work, baseline, limits.
    :param rounds: Interleaved rounds behind each median.
    :param say: Prints a line.
    """

    def __init__(self, name: str, description: str, rounds: int, say: Callable[[str], Any] = print) -> None:
        self.name, self.rounds, self.say = name, rounds, say
        self.description = description
        self.limits: list[dict[str, Any]] = []
        self._started, self._before, self._own = time.time(), psutil.cpu_times(), sum(os.times()[:4])
        RESULTS.mkdir(exist_ok=True)

    @property
    def log(self) -> Path:
        """Where output that nobody reads may go."""
        return RESULTS / f"bench_{self.name}.log"

    def judge(self, what: str, value: float, *, at_least: float | None = None, at_most: float | None = None) -> None:
        """Compare a figure with its limit, and print both.

        :param what: The figure, with its unit.
        :param value: As measured.
        :param at_least: Limit, or
        :param at_most: limit; without either the figure is only recorded.
        """
        limit = at_least if at_least is not None else at_most
        word = "at least" if at_least is not None else "at most"
        met = limit is not None and (value >= limit if at_least is not None else value <= limit)  # NaN misses
        shown = None if limit is None else f"{word} {limit:.4g}"
        met = None if limit is None else met
        self.limits.append({"what": what, "value": float(f"{value:.4g}"), "limit": shown, "met": met})
        verdict = "" if shown is None else f"   limit: {shown}   {'met' if met else 'MISSED'}"
        self.say(f"{what:<56} {value:9.4g}{verdict}")

    def finish(self, **details: Any) -> NoReturn:
        """Write everything.

        :param details: Settings and figures of this benchmark.
        :raises SystemExit: with status 1 if a limit is missed, else 0.
        """
        import torch

        used = sum(os.times()[:4]) - self._own  # by this process and by those that it has waited for
        after = psutil.cpu_times()
        busy = (sum(after) - after.idle - after.iowait) - (sum(self._before) - self._before.idle - self._before.iowait)
        seconds = time.time() - self._started
        cores = os.cpu_count() or 1
        machine = {"cores": cores, "threads": torch.get_num_threads(), "torch": torch.__version__}
        machine["others"] = round(min(max(0.0, busy - used) / (cores * seconds), 1.0), 2)
        record = {"name": self.name, "date": str(date.today()), "rounds": self.rounds, "seconds": round(seconds)}
        record |= {"machine": machine, "limits": self.limits, "description": self.description, "details": details}
        path = RESULTS / f"{date.today()}_{self.name}.json"
        path.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
        self.say(
            f"medians of {self.rounds} rounds, {machine['threads']} threads of {cores} cores, other processes used "
            f"{machine['others']:.0%} of them; {seconds:.0f} s; {path.relative_to(ROOT)}"
        )
        raise SystemExit(int(any(limit["met"] is False for limit in self.limits)))
