"""The report's page: one HTML file with its data, scripts and styles, all inline."""

from __future__ import annotations

import base64
import hashlib
import re
import statistics
from collections.abc import Iterator, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from aqa.common.console import say
from aqa.common.files import write_atomically
from aqa.evaluation.scoring import WHAT_P_IS
from aqa.report.held_out import OTHER, HeldOut, accuracy_table, comparisons, confusions, read_held_out
from aqa.report.listening import embed, json_size, sample
from aqa.report.metrics import METRICS, PATTERNS, Metric
from aqa.report.run_data import NO_ANSWER, Run, read_run, write_csv
from aqa.training.summary import EVALUATION_FOLDER, lesson

ASSETS = Path(__file__).resolve().parent / "assets"
SCRIPTS = ("vendor/uPlot.iife.min.js", "common.js", "curves.js", "player.js", "listen.js")
STYLES = ("vendor/uPlot.min.css", "page.css")
PAGE_BYTES = 7_500_000  # limit of the page
CLIP_BYTES = 5_000_000  # of it for clips and responses
FULL = re.compile(r"(rollout|eval)/((accuracy|format)_reward(_silent)?|groups_without_spread)")  # scale 0 to 1
BY_KIND = re.compile(r"(?P<metric>(?:rollout|eval)/[^/]+)/(?P<kind>source|dataset|question_type|label)/(?P<value>.+)")
BENCHMARK = re.compile(r"(?P<metric>eval)/(?P<kind>[^/]+)/(?P<value>.+)")
MOST_LINES = 6  # of a panel; there are as many colours
TIMES = ("time/step", "time/rollout", "time/train", "time/logprobs", "time/sync", "time/data")
# title, metrics that share the panel, logarithmic
PANELS = (
    ("Reward", ("rollout/reward", "eval/reward"), False),
    ("Accuracy", ("rollout/accuracy_reward", "eval/accuracy_reward", "eval/accuracy_reward_silent"), False),
    ("Format", ("rollout/format_reward", "eval/format_reward"), False),
    ("Warm start's loss", ("train/sft_loss",), False),
    ("KL", ("train/kl",), False),
    ("Entropy", ("train/entropy",), False),
    ("Groups without spread", ("rollout/groups_without_spread",), False),
    ("Response length", ("rollout/response_length", "eval/response_length"), False),
    ("Gradient norm", ("train/grad_norm",), False),
    ("Log-prob gap", ("rollout/logprob_gap_mean", "rollout/logprob_gap_max"), True),
    ("Time per phase", TIMES, True),
)
LABELS = {
    "rollout/logprob_gap_mean": "mean",
    "rollout/logprob_gap_max": "largest",
    "rollout/accuracy_reward": "sampled in training",
    "rollout/format_reward": "sampled in training",
    "rollout/reward": "sampled in training",
    "rollout/response_length": "sampled in training",
    "eval/accuracy_reward_silent": "held-out, in silence",
}
ABOUT = ("started", "host", "code", "devices", "machine")  # of run_config.json
LAST = 10  # steps; the value "at the end" is their mean
_INVISIBLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff\ud800-\udfff]")


def write_report(folder: Path, compare_with: Sequence[Path], out: Path, groups: int) -> int:
    """Write the page, and ``metrics.csv`` beside it.

    :param compare_with: Folders of other runs, and result files of evaluations.
    :param out: File of the page.
    :param groups: Most groups to listen to.
    :return: Size of the page in bytes.
    :raises ReportError: if a run cannot be read.
    :raises EvalError: if a result file cannot be read.
    """
    runs = [read_run(path) for path in (folder, *(path for path in compare_with if path.is_dir()))]
    for run, name in zip(runs, unique_names([run.folder.resolve() for run in runs]), strict=True):
        run.name = name
    results = [path for path in compare_with if not path.is_dir()]
    names = unique_names([Path(re.sub(r"\.(jsonl?|parquet)$", "", str(path.resolve()))) for path in results], 1)
    sets, problems = read_held_out(runs, dict(zip(names, results, strict=True)))
    curves = {"runs": [run_values(run) for run in runs], "panels": panels(runs)}
    room = min(CLIP_BYTES, PAGE_BYTES - json_size(curves))
    listening = sample(folder, runs[0].steps[-1], sets, groups, room)
    if silent := [group["silent"] for group in listening["groups"] if group["silent"]]:
        problems.append(f"{len(silent)} of {len(listening['groups'])} sounds cannot be heard in the page: {silent[0]}")
    for problem in problems:
        say(f"WARNING: {problem}")
    page = render(runs, curves, sets, listening, problems).encode("utf-8")
    out.parent.mkdir(parents=True, exist_ok=True)
    write_csv(runs[0], out.with_name("metrics.csv"))
    write_atomically(out, page)
    return len(page)


def unique_names(paths: Sequence[Path], least: int = 2) -> list[str]:
    """The shortest ends of absolute paths that tell them apart.

    :param least: Parts that a name has; two for runs, many of which are called "run".
    """
    for parts in range(least, 6):
        names = ["/".join(path.parts[-parts:]) for path in paths]
        if len(set(names)) == len(names):
            return names
    return [f"{i}: {path}" for i, path in enumerate(paths, 1)]


def render(
    runs: Sequence[Run],
    curves: dict[str, Any],
    sets: Sequence[HeldOut],
    listening: dict[str, Any],
    problems: Sequence[str],
) -> str:
    """The page's HTML.

    Its security policy admits only its own script and styles, known by their hashes, and no connection to anywhere.

    :param runs: The run, then those drawn over it.
    :param curves: Their values, and the panels.
    :param sets: Held-out questions with answers, of the first run.
    :param listening: From :func:`aqa.report.listening.sample`.
    :param problems: What could not be read.
    """
    held_out = [(held, confusions(held), comparisons(held)) for held in sets]
    pairs = [mistakes["pairs"] for _, mistakes, _ in held_out]
    script = "\n".join((ASSETS / name).read_text(encoding="utf-8") for name in SCRIPTS)
    style = "\n".join((ASSETS / name).read_text(encoding="utf-8") for name in STYLES)
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(ASSETS),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
        finalize=lambda value: value if isinstance(value, Markup) else visible(str(value)),
    )
    environment.filters["breakable"] = lambda text: Markup("_<wbr>").join(visible(text).split("_"))
    return environment.get_template("page.html.j2").render(
        style=Markup(style),
        script=Markup(script),
        policy=f"default-src 'none'; img-src data:; media-src blob:; script-src '{source_hash(script)}'; "
        f"style-src '{source_hash(style)}'; base-uri 'none'; form-action 'none'",
        data=Markup(embed(curves | listening | {"pairs": pairs})),
        runs=runs,
        run=runs[0],
        tiles=tiles(runs[0], sets),
        lessons=lessons(runs, sets),
        curves=curves,
        accuracy=accuracy_table(runs, sets, LAST),
        held_out=held_out,
        problems=problems,
        other=OTHER,
        no_answer=NO_ANSWER,
        tables=[(run, metric_rows(run)) for run in runs],
        sessions=session_rows(runs[0]),
        settings=settings(runs),
        listening=listening,
        made=datetime.now().strftime("%Y-%m-%d %H:%M"),
    )


def source_hash(text: str) -> str:
    """A script's or style's hash in the form of a content security policy."""
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode("utf-8")).digest()).decode()


def visible(text: str) -> str:
    """A text in which control, direction and zero-width characters are named instead of having their effect."""
    return _INVISIBLE.sub(lambda found: f"[U+{ord(found[0]):04X}]", text)


# --------------------------------------------------------------------------------------------------------------- curves
def run_values(run: Run) -> dict[str, Any]:
    """A run's values as the page holds them, rounded to six digits."""
    metrics = {
        name: [None if value is None else float(f"{value:.6g}") for value in values]
        for name, values in run.metrics.items()
    }
    return {"name": run.name, "steps": run.steps, "metrics": metrics, "resumed": resumed_at(run)}


def resumed_at(run: Run) -> list[int]:
    """First steps of the sessions that went on where an earlier one had ended."""
    firsts = [session.get("first_step") for session in (run.config or {}).get("sessions", ())]
    return sorted({step for step in firsts[1:] if step is not None and run.steps[0] < step <= run.steps[-1]})


def panels(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """What is drawn where: the main panels, then one for each other metric, or group of metrics that belong together.

    :return: Of each panel: title, unit, names and labels of its metrics, whether it is logarithmic, whether its scale
        is 0 to 1, whether it is a main one, and advice: name, meaning and advice of its metrics.
    """
    present = {name for run in runs for name, values in run.metrics.items() if any(v is not None for v in values)}
    groups = list(grouped(present, len(runs) > 1))
    taken = {name for _, names, _ in PANELS for name in names} | {name for group in groups for name in group[1]}
    # first in the order of the table, then the metrics of a user's own reward
    others = [name for name in [*METRICS, *sorted(present - METRICS.keys())] if name not in taken]
    main = [(*panel, True) for panel in PANELS]
    rest = [(METRICS[name].title if name in METRICS else name, (name,), False, False) for name in others]
    if len(runs) > 1:  # several lines a run would be confusing, so each phase has a panel of its own
        main[-1] = ("Time of a step", TIMES[:1], True, True)
        rest += [(METRICS[name].title, (name,), True, False) for name in TIMES[1:]]
    found = []
    for title, wanted, log, is_main in (*main, *groups, *rest):
        names = [name for name in wanted if name in present]
        known = {name: about for name in names if (about := meaning(name))}
        if names == ["rollout/accuracy_reward"]:
            title = METRICS[names[0]].title  # "Accuracy" alone would be taken for that of an evaluation
        if names:
            found.append(
                {
                    "title": title,
                    "unit": next((metric.unit for metric in known.values()), ""),
                    "names": names,
                    "labels": [label(name) for name in names],
                    "log": log,
                    "full": all(FULL.match(name) or is_benchmark(name) for name in names),
                    "main": is_main,
                    "advice": list(
                        {(m.meaning, m.advice): [n, m.meaning, m.advice] for n, m in known.items()}.values()
                    ),
                }
            )
    return found


def grouped(present: set[str], apart: bool) -> Iterator[tuple[str, tuple[str, ...], bool, bool]]:
    """Panels of the metrics that are recorded by question type or another kind, or by the tasks of a benchmark.

    :param present: Names of metrics.
    :param apart: Give each metric its own panel, because each has a line of every run.
    :return: Title, names, whether it is logarithmic, and whether it is a main panel.
    """
    groups: dict[str, list[tuple[str, str]]] = {}
    for name in sorted(present):
        if found := BY_KIND.fullmatch(name):
            title = f"{metric_title(found['metric'])} by {found['kind'].replace('_', ' ')}"
        elif (found := BENCHMARK.fullmatch(name)) and is_benchmark(name):
            heard = found["kind"].removesuffix("_silent")  # or the name of a file that ends so
            is_silent = heard != found["kind"] and f"eval/{heard}/accuracy" in present
            title = f"Benchmark {heard}, in silence" if is_silent else f"Benchmark {found['kind']}"
        else:
            continue
        groups.setdefault(title, []).append((name, found["value"]))
    for title, members in groups.items():
        main = title == "Evaluation accuracy by question type"
        size = 1 if apart else MOST_LINES
        for start in range(0, len(members), size):
            part = members[start : start + size]
            number = f" ({start // size + 1} of {-(-len(members) // size)})" if len(members) > size else ""
            yield f"{title}{f': {part[0][1]}' if apart else number}", tuple(name for name, _ in part), False, main


def is_benchmark(name: str) -> bool:
    """Whether a metric is an accuracy of ``--eval_benchmark``."""
    found = BENCHMARK.fullmatch(name)
    return bool(found) and not BY_KIND.fullmatch(name) and found["value"] != "collapsed"


def metric_title(name: str) -> str:
    """Title of a metric of which there is one for every kind of row."""
    if name == "rollout/share":
        return "Share of responses"
    return METRICS[name].title if name in METRICS else name


def meaning(name: str) -> Metric | None:
    """What the table says of a metric, or of the one that it is a part of."""
    by_kind = BY_KIND.fullmatch(name)
    if by_kind and by_kind["metric"] == "rollout/share":
        return PATTERNS["rollout/share/<kind>/<value>"]
    found = METRICS.get(by_kind["metric"] if by_kind else name)
    return PATTERNS["eval/<file>/<task>"] if found is None and BENCHMARK.fullmatch(name) else found


def label(name: str) -> str:
    """What a metric is called beside the others of its panel."""
    found = BY_KIND.fullmatch(name) or (BENCHMARK.fullmatch(name) if is_benchmark(name) else None)
    if found:
        return found["value"]
    if name.startswith("eval/") and name not in LABELS:
        return "held-out, greedy"
    return LABELS.get(name, name.partition("/")[2].removesuffix("_reward"))


# -------------------------------------------------------------------------------------------------------------- figures
def tiles(run: Run, sets: Sequence[HeldOut]) -> list[tuple[str, str, str]]:
    """The figures at the top: name, value, explanation."""
    found = [("Steps", f"{sum(step > 0 for step in run.steps):,}", "trained")]
    for held in sets[:1]:
        shares = [
            [f"{statistics.fmean(a.right for a in each.answers.values()):.2f}" for each in part if each.answers]
            for part in (held.ends, held.quiet[-1:])
        ]
        if shares[0]:
            note = f"{held.name}, {' → '.join(each.name for each in held.ends)}"
            note += "".join(f"; in silence {share}" for share in shares[1])
            found.append(("Held-out accuracy", " → ".join(shares[0]), note))
    for title, name in (("Sampled training accuracy", "rollout/accuracy_reward"), ("Reward", "rollout/reward")):
        if values := run.values(name):
            last_mean = statistics.fmean(values[-LAST:])
            found.append(
                (title, f"{values[0]:.2f} → {last_mean:.2f}", f"first → mean of last {min(LAST, len(values))}")
            )
    if gaps := run.values("rollout/logprob_gap_max"):
        found.append(("Log-prob gap", number(max(gaps)), "largest, nats"))
    if times := run.values("time/step"):
        found.append(("A step", f"{statistics.median(times):.2f} s", f"median; {duration(sum(times))} in all"))
    return found


def lessons(runs: Sequence[Run], sets: Sequence[HeldOut]) -> list[str]:
    """What each run's terminal ended with: a sentence about its answers to the evaluation data, or that it has none,
    which is left out where other held-out answers are shown."""
    found = []
    for run in runs:
        if not (run.folder / EVALUATION_FOLDER).is_dir() and (sets or run is not runs[0]):
            continue
        try:
            said = lesson(run.folder, (run.config or {}).get("flags", {}))
        except (OSError, ValueError, KeyError, TypeError):
            continue  # a damaged file, which read_held_out names
        found.append(f"{run.name}: {said}" if len(runs) > 1 else said[0].upper() + said[1:])
    short = [said.removesuffix(f". {WHAT_P_IS}") for said in found]
    return short if short == found else [*short, WHAT_P_IS]  # once for all runs


def metric_rows(run: Run) -> list[tuple[str, ...]]:
    """Name, unit, first, lowest, highest, and mean of the last steps of each metric."""
    rows = []
    for name in run.metrics:
        if values := run.values(name):
            figures = (values[0], min(values), max(values), statistics.fmean(values[-LAST:]))
            rows.append((name, METRICS[name].unit if name in METRICS else "", *map(number, figures)))
    return rows


def number(value: float) -> str:
    """A finite number with three or four digits."""
    if value == int(value) and abs(value) < 1e6:
        return f"{int(value):,}"
    return f"{value:,.2f}" if 1 <= abs(value) < 1e4 else f"{value:.3g}"


def duration(seconds: float) -> str:
    """Seconds in the unit that suits them."""
    minutes = round(seconds / 60)
    return f"{seconds:.0f} s" if seconds < 90 else f"{minutes} min" if minutes < 90 else f"{seconds / 3600:.1f} h"


def settings(runs: Sequence[Run]) -> dict[str, Any]:
    """Versions and flags of the runs, side by side.

    :return: ``missing``: runs without ``run_config.json``; ``about``: rows of name and values; ``changed``: flags that
        are not at their default, or differ between the runs; ``all``: every flag.
    """
    configs = [run.config or {} for run in runs]

    def collect(part: str) -> list[str]:
        return list(dict.fromkeys(name for config in configs for name in config.get(part, ())))

    about = [(key, [when(str(config.get(key, ""))) for config in configs]) for key in ABOUT]
    about += [(name, [config.get("versions", {}).get(name, "") for config in configs]) for name in collect("versions")]
    flags = {
        name: [show_flag(config["flags"].get(name)) if config else "" for config in configs]
        for name in sorted(collect("flags"))
    }
    changed = collect("changed")
    return {
        "missing": [run.name for run in runs if not run.config],
        "about": about if any(configs) else [],
        "changed": {name: values for name, values in flags.items() if name in changed or len(set(values)) > 1},
        "all": flags,
    }


def when(text: str) -> str:
    """A time of ``run_config.json`` for a reader, to the minute."""
    return re.sub(r"T(\d\d:\d\d):\d\d\+00:00", r" \1 UTC", text)


def session_rows(run: Run) -> list[tuple[str, ...]]:
    """Start, end, how it ended, steps, ranks and machine, and changed settings of each session of a run."""
    rows = []
    for session in (run.config or {}).get("sessions", ()):
        first, last = session.get("first_step"), session.get("last_step", "?")
        none = "none" if last != "?" and first is not None and last < first else None  # it ended in the warm start
        changes = (f"{name}: {old} → {new}" for name, (old, new) in session.get("changes", {}).items())
        rows.append(
            (
                *(when(session.get(end, "")) for end in ("started", "ended")),
                session.get("how", "killed, or still running"),
                none or ("?" if first is None else f"{first} to {last}"),
                f"{session['ranks']} on {session['machine']}" if "ranks" in session else "?",
                "; ".join(changes),
            )
        )
    return rows


def show_flag(value: Any) -> str:
    """A flag's value, as ``run_config.json`` has it, for a reader."""
    if isinstance(value, list):
        return " ".join(map(str, value))
    if value is None or isinstance(value, bool):
        return {None: "not set", True: "yes", False: "no"}[value]
    return str(value)
