"""What the benchmarks share: flags, rounds that take turns, median ratios, limits and the file of results.

Import it first: it puts the example, the runtime and the tests' literal reward rule on the import path.
"""

import argparse
import contextlib
import gc
import itertools
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import psutil

ROOT = Path(__file__).resolve().parents[1]
EXAMPLE = ROOT / "examples" / "r1_aqa"
RESULTS = ROOT / "benchmarks" / "results"
sys.path[1:1] = [str(EXAMPLE), str(ROOT / "runtime"), str(ROOT / "tests")]

from aqa.common.arguments import Parser  # noqa: E402
from aqa.families import FAMILIES  # noqa: E402
from lightrft.utils.families import register  # noqa: E402

register(FAMILIES)  # as the host does it


class Seconds(NamedTuple):
    """What a piece of work took.

    :param cpu: CPU seconds of this process, all threads; other work on the machine distorts these less.
    """

    wall: float
    cpu: float


def make_parser(description: str, rounds: int | None = None, demo: bool = True) -> argparse.ArgumentParser:
    """A parser with the flags that most benchmarks have.

    :param rounds: Default of ``--rounds``; None leaves the flag out.
    :param demo: Add ``--demo_dir``; :func:`parse` checks it.
    """
    parser = Parser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    if demo:
        parser.add_argument("--demo_dir", type=Path, default=Path("results/demo"), help="where make demo put its files")
    if rounds is not None:
        parser.add_argument("--rounds", type=int, default=rounds, help="interleaved rounds (default: %(default)s)")
    return parser


def make_step_parser(description: str) -> argparse.ArgumentParser:
    """A parser with the flags that ``bench_step.py`` gives to another trainer; they mean what they mean for
    ``train_colocate.py``."""
    parser = make_parser(description, demo=False)
    parser.add_argument("--pretrain", required=True, help="Qwen2-Audio folder")
    parser.add_argument("--prompt_data", type=Path, required=True, help="folder that avqa.py wrote")
    parser.add_argument("--save_path", type=Path, required=True, help="folder for metrics.jsonl")
    parser.add_argument("--rollout_batch_size", type=int, required=True, help="prompts a step")
    parser.add_argument("--n_samples_per_prompt", type=int, required=True, help="responses a prompt")
    parser.add_argument("--micro_train_batch_size", type=int, required=True, help="responses a forward and backward")
    parser.add_argument("--generate_max_len", type=int, required=True, help="longest response, tokens")
    parser.add_argument("--actor_learning_rate", type=float, required=True, help="constant")
    return parser


def parse(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """Parse the command line, and refuse a demo folder that has no model.

    :param parser: From :func:`make_parser`.
    """
    args = parser.parse_args()
    if "demo_dir" in args and not (args.demo_dir / "model").is_dir():
        parser.error(f"--demo_dir: {args.demo_dir}/model is no folder; run make demo first, or name its folder")
    for name in ("swift_python", "lightrft_home"):
        path = getattr(args, name, None)
        if path is not None and not path.exists():
            parser.error(f"--{name} {path}: does not exist")
    return args


def timed(work: Callable[[], Any]) -> tuple[Seconds, Any]:
    """Time some work in this process, and return what it returned as well."""
    wall, cpu = time.perf_counter(), time.process_time()
    value = work()
    return Seconds(time.perf_counter() - wall, time.process_time() - cpu), value


def take_turns(ways: Mapping[str, Callable[[], Any]], rounds: int) -> dict[str, list[Seconds]]:
    """Time several ways in turn, so that other load on the machine slows all of them down alike.

    :param rounds: Rounds that count; one more before them warms up.
    """
    found: dict[str, list[Seconds]] = {name: [] for name in ways}
    for round_ in range(rounds + 1):
        for name, way in ways.items():
            seconds, _ = timed(way)
            if round_:
                found[name].append(seconds)
    return found


def ratio(above: Sequence[float], below: Sequence[float]) -> float:
    """Median of the ratios ``above / below`` of each round."""
    return statistics.median(a / b for a, b in zip(above, below, strict=True))


def bytes_beyond(work: Callable[[], Any]) -> tuple[int, Any]:
    """Most resident bytes while something runs, beyond those before, and what it returns."""

    def peak() -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))

    Path("/proc/self/clear_refs").write_text("5")  # the kernel forgets the peak of this process so far
    before = peak()
    value = work()
    return peak() - before, value


def use_of(process: psutil.Process) -> tuple[int, float]:
    """Resident bytes and CPU seconds of a process and its children."""
    memory, seconds = 0, 0.0
    for each in (process, *process.children(recursive=True)):
        with contextlib.suppress(psutil.NoSuchProcess):
            memory += each.memory_info().rss
            seconds += sum(each.cpu_times()[:2])
    return memory, seconds


def allocated(work: Callable[[], Any]) -> tuple[int, int]:
    """Most bytes that torch allocates on the CPU while something runs, and bytes that stay."""
    from torch.profiler import ProfilerActivity, profile  # it loads slowly, and few benchmarks need it

    gc.collect()  # else memory of an earlier model that is freed meanwhile counts as negative
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        work()
    events = [(e.start_ns(), e.nbytes()) for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    sizes = list(itertools.accumulate(size for _, size in sorted(events, key=lambda event: event[0])))
    return max(sizes, default=0), sizes[-1] if sizes else 0


class Report:
    """Collects a benchmark's figures, judges their limits and adds them to ``benchmarks/results/<date>.json``.

    :param name: Key in the file of results.
    :param rounds: Interleaved rounds behind each median.
    :param say: Prints a line.
    """

    def __init__(self, name: str, rounds: int, say: Callable[[str], Any] = print) -> None:
        self.name, self.rounds, self.say = name, rounds, say
        self.figures: list[dict[str, Any]] = []
        self._started, self._before, self._own = time.time(), psutil.cpu_times(), sum(os.times()[:4])
        RESULTS.mkdir(exist_ok=True)

    @property
    def log(self) -> Path:
        """File for the output of libraries."""
        return RESULTS / f"bench_{self.name}.log"

    def judge(self, what: str, value: float, *, at_least: float | None = None, at_most: float | None = None) -> None:
        """Print and record a figure, and compare it with its limit if it has one.

        :param what: The figure, with its unit.
        :param value: As measured; NaN misses any limit.
        """
        limit, met = None, None
        if at_least is not None:
            limit, met = f"at least {at_least:.4g}", value >= at_least
        elif at_most is not None:
            limit, met = f"at most {at_most:.4g}", value <= at_most
        self.figures.append({"what": what, "value": float(f"{value:.4g}"), "limit": limit, "met": met})
        verdict = "" if limit is None else f"   limit: {limit}   {'met' if met else 'MISSED'}"
        self.say(f"{what:<56} {value:9.4g}{verdict}")

    def finish(self, **details: Any) -> NoReturn:
        """Add everything to the day's file; other benchmarks in it stay.

        :param details: Settings and further figures of this benchmark.
        :raises SystemExit: with status 1 if a limit is missed, else 0.
        """
        import torch

        used = sum(os.times()[:4]) - self._own  # by this process and by the children that it has waited for
        after, before, cores = psutil.cpu_times(), self._before, os.cpu_count() or 1
        busy = (sum(after) - after.idle - after.iowait) - (sum(before) - before.idle - before.iowait)
        seconds = time.time() - self._started
        others = round(min(max(0.0, busy - used) / (cores * seconds), 1.0), 2)
        machine = {"cores": cores, "threads": torch.get_num_threads(), "torch": torch.__version__, "others": others}
        path = RESULTS / f"{date.today()}.json"
        record = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        record[self.name] = {"date": str(date.today()), "rounds": self.rounds, "seconds": round(seconds)}
        record[self.name] |= {"machine": machine, "figures": self.figures, "details": details}
        path.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
        self.say(
            f"medians of {self.rounds} rounds, {machine['threads']} threads of {cores} cores, of which other processes "
            f"used {others:.0%}; {seconds:.0f} s; {path.name}"
        )
        raise SystemExit(int(any(figure["met"] is False for figure in self.figures)))
