"""The report's page: one HTML file with its data, scripts and styles, all inline."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import statistics
from collections.abc import Iterator, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from aqa.audio.decode import AudioError
from aqa.common.files import write_atomically
from aqa.evaluation.items import EvalError
from aqa.evaluation.scoring import compare, judge_file, score
from aqa.report.audio import encode_clip
from aqa.report.metrics import METRICS
from aqa.report.run_data import Group, ReportError, Run, read_groups, read_run, saved_steps, spread, write_csv

ASSETS = Path(__file__).resolve().parent / "assets"
SCRIPTS = ("vendor/uPlot.iife.min.js", "common.js", "curves.js", "listen.js")
STYLES = ("vendor/uPlot.min.css", "page.css")
PAGE_BYTES = 7_500_000  # limit of the page
CLIP_BYTES = 5_000_000  # of it for clips and responses
TIMES = ("time/step", "time/rollout", "time/train", "time/logprobs", "time/sync", "time/data")
# title, metrics that share the panel, logarithmic
PANELS = (
    ("Reward", ("rollout/reward", "eval/reward"), False),
    ("Accuracy", ("rollout/accuracy_reward", "eval/accuracy_reward"), False),
    ("Format", ("rollout/format_reward", "eval/format_reward"), False),
    ("KL", ("train/kl",), False),
    ("Entropy", ("train/entropy",), False),
    ("Groups without spread", ("rollout/groups_without_spread",), False),
    ("Response length", ("rollout/response_length", "eval/response_length"), False),
    ("Gradient norm", ("train/grad_norm",), False),
    ("Log-prob gap", ("rollout/logprob_gap_mean", "rollout/logprob_gap_max"), True),
    ("Time per phase", TIMES, True),
)
LABELS = {"rollout/logprob_gap_mean": "mean", "rollout/logprob_gap_max": "largest"}
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
    curves = {"runs": [run_values(run) for run in runs], "panels": panels(runs)}
    room = min(CLIP_BYTES, PAGE_BYTES - json_size(curves))
    rollouts = sample_rollouts(folder, runs[0].steps[-1], groups, room)
    page = render(runs, curves, evaluations(results), rollouts).encode("utf-8")
    out.parent.mkdir(parents=True, exist_ok=True)
    write_csv(runs[0], out.with_name("metrics.csv"))
    write_atomically(out, page)
    return len(page)


def unique_names(paths: Sequence[Path]) -> list[str]:
    """The shortest ends of absolute paths that tell them apart."""
    for parts in range(1, 6):
        names = ["/".join(path.parts[-parts:]) for path in paths]
        if len(set(names)) == len(names):
            return names
    return [f"{i}: {path}" for i, path in enumerate(paths, 1)]


def render(
    runs: Sequence[Run], curves: dict[str, Any], evaluation: dict[str, Any] | None, rollouts: dict[str, Any]
) -> str:
    """The page's HTML.

    Its security policy admits only its own script and styles, known by their hashes, and no connection to anywhere.

    :param runs: The run, then those drawn over it.
    :param curves: Their values, and the panels.
    :param evaluation: From :func:`evaluations`.
    :param rollouts: From :func:`sample_rollouts`.
    """
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
    environment.filters["number"] = number
    return environment.get_template("page.html.j2").render(
        style=Markup(style),
        script=Markup(script),
        policy=f"default-src 'none'; img-src data:; media-src blob:; script-src '{source_hash(script)}'; "
        f"style-src '{source_hash(style)}'; base-uri 'none'; form-action 'none'",
        data=Markup(embed(curves | rollouts)),
        runs=runs,
        run=runs[0],
        tiles=tiles(runs[0]),
        tables=[(run, metric_rows(run)) for run in runs],
        sessions=session_rows(runs[0]),
        settings=settings(runs),
        evaluation=evaluation,
        listening=rollouts,
        made=datetime.now().strftime("%Y-%m-%d %H:%M"),
    )


def source_hash(text: str) -> str:
    """A script's or style's hash in the form of a content security policy."""
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode("utf-8")).digest()).decode()


def embed(value: Any) -> str:
    """A value as JSON that cannot end the script element it stands in, whatever texts it holds."""
    text = json.dumps(value, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def json_size(value: Any) -> int:
    """Bytes of a value in the page."""
    return len(embed(value))


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
    return {"name": run.name, "steps": run.steps, "metrics": metrics}


def panels(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """What is drawn where: the main panels, then one for each other metric."""
    present = {name for run in runs for name, values in run.metrics.items() if any(v is not None for v in values)}
    taken = {name for _, names, _ in PANELS for name in names}
    # first in the order of the table, then the metrics of a user's own reward
    others = [name for name in [*METRICS, *sorted(present - METRICS.keys())] if name not in taken]
    main = [(*panel, True) for panel in PANELS]
    rest = [(METRICS[name].title if name in METRICS else name, (name,), False, False) for name in others]
    if len(runs) > 1:  # several lines a run would be confusing, so each phase has a panel of its own
        main[-1] = ("Time of a step", TIMES[:1], True, True)
        rest += [(METRICS[name].title, (name,), True, False) for name in TIMES[1:]]
    found = []
    for title, wanted, log, is_main in (*main, *rest):
        names = [name for name in wanted if name in present]
        known = {name: METRICS[name] for name in names if name in METRICS}
        if names:
            found.append(
                {
                    "title": title,
                    "unit": next((metric.unit for metric in known.values()), ""),
                    "names": names,
                    "labels": [label(name) for name in names],
                    "log": log,
                    "main": is_main,
                    "advice": [[name, metric.meaning, metric.advice] for name, metric in known.items()],
                }
            )
    return found


def label(name: str) -> str:
    """What a metric is called beside the others of its panel."""
    if name.startswith("eval/"):
        return "evaluation"
    return LABELS.get(name, name.partition("/")[2].removesuffix("_reward"))


# -------------------------------------------------------------------------------------------------------------- figures
def tiles(run: Run) -> list[tuple[str, str, str]]:
    """The figures at the top: name, value, explanation."""
    found = [("Steps", f"{len(run.steps):,}", "trained")]
    for title, name in (("Reward", "rollout/reward"), ("Accuracy", "rollout/accuracy_reward")):
        if values := run.values(name):
            last = statistics.fmean(values[-LAST:])
            found.append((title, f"{values[0]:.2f} → {last:.2f}", f"first → mean of last {min(LAST, len(values))}"))
    if gaps := run.values("rollout/logprob_gap_max"):
        found.append(("Log-prob gap", number(max(gaps)), "largest, nats"))
    if times := run.values("time/step"):
        found.append(("A step", f"{statistics.median(times):.2f} s", f"median; {duration(sum(times))} in all"))
    return found


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

    about = [(key, [str(config.get(key, "")) for config in configs]) for key in ABOUT]
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


def session_rows(run: Run) -> list[tuple[str, ...]]:
    """Start, end, how it ended, steps, ranks and machine, and changed settings of each session of a run."""
    rows = []
    for session in (run.config or {}).get("sessions", ()):
        changes = (f"{name}: {old} → {new}" for name, (old, new) in session.get("changes", {}).items())
        rows.append(
            (
                session["started"],
                session.get("ended", ""),
                session.get("how", "killed, or still running"),
                f"{session['first_step']} to {session.get('last_step', '?')}" if "first_step" in session else "?",
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


# ------------------------------------------------------------------------------------------------------------- rollouts
def sample_rollouts(folder: Path, last: int, most: int, room: int = CLIP_BYTES) -> dict[str, Any]:
    """Groups of steps that are spread over the run, with their clips, as many as the page has room for.

    :param room: Bytes that they may take.
    :return: ``groups``, ``clips``, and ``note``: how much is shown of what there is.
    """
    files = saved_steps(folder, last)
    steps = list(files)
    unreadable: list[int] = []

    def candidates() -> Iterator[Group]:
        for place in spread(len(steps)):
            try:
                yield from read_groups(files[steps[place]], steps[place])
            except ReportError:
                unreadable.append(steps[place])

    groups: list[dict[str, Any]] = []
    clips: dict[Path, dict[str, Any]] = {}
    for group in candidates():
        entry, clip = group_entry(group, clips)
        new = clip is not None and group.audio not in clips
        room -= json_size(entry) + (json_size(clip) if new else 0)
        if room < 0:
            break
        if clip is not None:
            clips[group.audio] = clip
            entry["clip"] = list(clips).index(group.audio)
        groups.append(entry)
        if len(groups) == most:
            break
    groups.sort(key=lambda group: (group["step"], group["number"]))
    shown = len({group["step"] for group in groups})
    note = f"{len(groups)} groups of {shown} steps; the run saved {len(files)} steps"
    if unreadable:
        note += f", of which {len(unreadable)} cannot be read ({', '.join(map(str, sorted(unreadable)[:5]))})"
    return {"groups": groups, "clips": list(clips.values()), "note": note if files else ""}


def group_entry(group: Group, clips: dict[Path, dict[str, Any]]) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """A group as the page holds it, and its clip, if it can be played.

    :param clips: Those that are encoded already, by file.
    """
    clip, silent_because = clips.get(group.audio), None
    if group.audio is None:
        silent_because = "the trajectories do not name the clip"
    elif clip is None:
        try:
            clip = encode_clip(group.audio)
        except AudioError as error:
            silent_because = str(error)
    entry = {
        "step": group.step,
        "number": group.number,
        "question": group.question,
        "choices": group.choices,
        "gold": group.gold,
        "clip": None,
        "silent": silent_because,
        "responses": group.responses,
    }
    return entry, clip


# ---------------------------------------------------------------------------------------------------------- evaluations
def evaluations(paths: Sequence[Path]) -> dict[str, Any] | None:
    """Accuracies of result files, and each against the first on the items that both have; None without files.

    :raises EvalError: if a file cannot be read.
    """
    if not paths:
        return None
    judged = [judge_file(path) for path in paths]
    names = unique_names([path.resolve().with_suffix("") for path in paths])
    comparisons = []
    for name, verdicts in zip(names[1:], judged[1:], strict=True):
        try:
            found = compare(judged[0], verdicts)
        except EvalError as error:
            comparisons.append({"name": name, "problem": str(error), "rows": []})
            continue
        values = [row for by_value in found["by"].values() for row in by_value.items()]
        rows = [("overall", found), *(values if len(values) > 1 else [])]
        comparisons.append({"name": name, "problem": None, "rows": rows, "not_shared": found["not_shared"]})
    scores = [{"name": name, **score(verdicts)} for name, verdicts in zip(names, judged, strict=True)]
    return {"scores": scores, "first": names[0], "comparisons": comparisons}
