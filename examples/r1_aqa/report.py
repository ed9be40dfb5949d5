#!/usr/bin/env python3
"""A run as one page that opens anywhere: curves, clips to listen to with what was answered, evaluations, settings.

    python examples/r1_aqa/report.py results/demo/run
    python examples/r1_aqa/report.py RUN --compare OTHER_RUN result_before.json result_after.json

Writes report.html and metrics.csv into the run's folder. The page needs no network and no server.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import json
import os
import re
import statistics
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

PAGE = Path(__file__).resolve().parent / "aqa" / "report" / "assets"
SCRIPTS = ("vendor/uPlot.iife.min.js", "common.js", "curves.js", "listen.js")
STYLES = ("vendor/uPlot.min.css", "page.css")
PAGE_BYTES = 7_500_000  # most of the page
CLIP_BYTES = 5_000_000  # of it for clips and responses
# title, metrics that share the panel, logarithmic
PANELS = (
    ("Reward", ("rollout/reward", "eval/reward"), False),
    ("Accuracy", ("rollout/accuracy_reward", "eval/accuracy_reward"), False),
    ("Format", ("rollout/format_reward", "eval/format_reward"), False),
    ("KL", ("train/kl",), False),
    ("Groups without spread", ("rollout/groups_without_spread",), False),
    ("Response length", ("rollout/response_length", "eval/response_length"), False),
    ("Gradient norm", ("train/grad_norm",), False),
    ("Log-prob gap", ("rollout/logprob_gap_mean", "rollout/logprob_gap_max"), True),
    (
        "Time per phase",
        ("time/step", "time/rollout", "time/train", "time/logprobs", "time/sync", "time/data"),
        True,
    ),
)
LABELS = {"rollout/logprob_gap_mean": "mean", "rollout/logprob_gap_max": "largest"}
LAST = 10  # steps that "at the end" is the mean of
_INVISIBLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff\ud800-\udfff]")


def main() -> None:
    """Make the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="folder of a run: holds metrics.jsonl")
    parser.add_argument(
        "--compare",
        nargs="+",
        type=Path,
        default=[],
        metavar="PATH",
        help="folders of other runs, drawn over it, and result files of eval_mmau.py, of which each is compared with "
        "the first",
    )
    parser.add_argument("--out", type=Path, help="file to write; default: report.html in the run's folder")
    parser.add_argument("--groups", type=int, default=80, help="most groups to listen to (default: %(default)s)")
    args = parser.parse_args()
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    from aqa.evaluation.items import EvalError
    from aqa.report.run_data import ReportError

    try:
        out, size = write(args.run, args.compare, args.out or args.run / "report.html", args.groups)
    except (ReportError, EvalError) as error:
        raise SystemExit(f"report.py: error: {error}") from error
    except OSError as error:
        raise SystemExit(f"report.py: error: cannot write the report: {error}") from error
    print(f"{out} ({size / 1e6:.1f} MB)")


def write(folder: Path, compare: list[Path], out: Path, groups: int) -> tuple[Path, int]:
    """Write the page, and ``metrics.csv`` beside it.

    :param folder: The run's.
    :param compare: Other runs and result files.
    :param out: The page.
    :param groups: Most groups to listen to.
    :return: The page and its size in bytes.
    :raises ReportError: if a run cannot be read.
    :raises EvalError: if a result file cannot be read.
    """
    from aqa.report.run_data import read_run, write_csv

    runs = [read_run(path) for path in (folder, *(path for path in compare if path.is_dir()))]
    names = unique_names([run.folder.resolve() for run in runs])
    for run, name in zip(runs, names, strict=True):
        run.name = name
    results = [path for path in compare if not path.is_dir()]
    curves = {"runs": [page_run(run) for run in runs], "panels": panels(runs)}
    room = min(CLIP_BYTES, PAGE_BYTES - json_size(curves))
    listening = sample_rollouts(folder, runs[0].steps[-1], groups, room)
    page = render(runs, curves, evaluations(results), listening).encode("utf-8")
    out.parent.mkdir(parents=True, exist_ok=True)
    write_csv(runs[0], out.with_name("metrics.csv"))
    temporary = out.with_name(out.name + ".part")
    temporary.write_bytes(page)
    temporary.replace(out)
    return out, len(page)


def unique_names(paths: list[Path]) -> list[str]:
    """Short names that tell paths apart.

    :param paths: Absolute paths.
    """
    for parts in range(1, 6):
        names = ["/".join(path.parts[-parts:]) for path in paths]
        if len(set(names)) == len(names):
            return names
    return [f"{i}: {path}" for i, path in enumerate(paths, 1)]


# ------------------------------------------------------------------------------------------------------------- rollouts
def sample_rollouts(folder: Path, last: int, most: int, room: int = CLIP_BYTES) -> dict[str, Any]:
    """Groups of steps that are spread over the run, with their clips, as many as the page has room for.

    :param folder: The run's.
    :param last: Its last step.
    :param most: Most groups.
    :param room: Most bytes for them.
    :return: groups, clips, and note: what is shown of what there is.
    """
    from aqa.report.run_data import ReportError, read_groups, saved_steps, spread

    files = saved_steps(folder, last)
    steps = list(files)
    unreadable: list[int] = []

    def candidates() -> Iterator[Any]:
        for place in spread(len(steps)):
            try:
                yield from read_groups(files[steps[place]], steps[place])
            except ReportError:
                unreadable.append(steps[place])

    groups: list[dict[str, Any]] = []
    clips: dict[Path, dict[str, Any]] = {}
    for group in candidates():
        entry, clip = page_group(group, clips)
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


def page_group(group: Any, clips: dict[Path, dict[str, Any]]) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """A group as the page holds it, and its clip, if it can be played.

    :param group: From :mod:`aqa.report.run_data`.
    :param clips: Those that are encoded already, by file.
    """
    from aqa.audio.decode import AudioError
    from aqa.report.audio import encode_clip

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


def json_size(value: Any) -> int:
    """Bytes of a value in the page.

    :param value: Of JSON's types.
    """
    return len(embed(value))


# ---------------------------------------------------------------------------------------------------------- evaluations
def evaluations(paths: list[Path]) -> dict[str, Any] | None:
    """Accuracies of result files, and each against the first on the items that both have.

    :param paths: Result files of eval_mmau.py; none: None.
    :raises EvalError: if one cannot be read.
    """
    if not paths:
        return None
    from aqa.evaluation.items import EvalError
    from aqa.evaluation.scoring import compare, judge_file, score

    judged = [judge_file(path) for path in paths]
    names = unique_names([path.resolve().with_suffix("") for path in paths])
    comparisons = []
    for name, verdicts in zip(names[1:], judged[1:], strict=True):
        try:
            found = compare(judged[0], verdicts)
        except EvalError as error:
            comparisons.append({"name": name, "problem": str(error), "rows": []})
            continue
        main = [(value, entry) for values in found["by"].values() for value, entry in values.items()]
        rows = [("overall", found), *(main if len(main) > 1 else [])]
        comparisons.append({"name": name, "problem": None, "rows": rows, "not_shared": found["not_shared"]})
    scores = [{"name": name, **score(verdicts)} for name, verdicts in zip(names, judged, strict=True)]
    return {"scores": scores, "first": names[0], "comparisons": comparisons}


# ----------------------------------------------------------------------------------------------------------------- page
def render(
    runs: list[Any], curves: dict[str, Any], evaluation: dict[str, Any] | None, listening: dict[str, Any]
) -> str:
    """The page's HTML.

    :param runs: The run, and those drawn over it.
    :param curves: Their values, and the panels.
    :param evaluation: From :func:`evaluations`.
    :param listening: From :func:`sample_rollouts`.
    """
    import jinja2
    from markupsafe import Markup

    from aqa.report.metrics import METRICS

    script = "\n".join((PAGE / name).read_text(encoding="utf-8") for name in SCRIPTS)
    style = "\n".join((PAGE / name).read_text(encoding="utf-8") for name in STYLES)
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(PAGE),
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
        data=Markup(embed(curves | listening)),
        runs=runs,
        run=runs[0],
        tiles=tiles(runs[0]),
        tables=[(run, metric_rows(run, METRICS)) for run in runs],
        settings=settings(runs),
        evaluation=evaluation,
        listening=listening,
        made=datetime.now().strftime("%Y-%m-%d %H:%M"),
    )


def page_run(run: Any) -> dict[str, Any]:
    """A run's values as the page holds them: to six digits.

    :param run: The run.
    """
    metrics = {
        name: [None if value is None else float(f"{value:.6g}") for value in values]
        for name, values in run.metrics.items()
    }
    return {"name": run.name, "steps": run.steps, "metrics": metrics}


def panels(runs: list[Any]) -> list[dict[str, Any]]:
    """What is drawn where: the main panels, then one for each other metric.

    :param runs: All runs.
    """
    from aqa.report.metrics import METRICS

    present = {name for run in runs for name, values in run.metrics.items() if any(v is not None for v in values)}
    main = [(title, names, log, True) for title, names, log in PANELS]
    taken = {name for _, names, _, _ in main for name in names}
    # the table's order, then what a reward of one's own has brought
    order = [*METRICS, *sorted(present - METRICS.keys())]
    rest = [(METRICS[n].title if n in METRICS else n, (n,), False, False) for n in order if n not in taken]
    if len(runs) > 1:  # overlaid runs get one line each; the phases a panel each
        rest += [(METRICS[n].title, (n,), True, False) for n in PANELS[-1][1][1:]]
        main[-1] = ("Time of a step", ("time/step",), True, True)
    found = []
    for title, names, log, first in (*main, *rest):
        names = [name for name in names if name in present]
        if names:
            known = [METRICS[name] for name in names if name in METRICS]
            found.append(
                {
                    "title": title,
                    "unit": known[0].unit if known else "",
                    "names": names,
                    "labels": [label(name) for name in names],
                    "log": log,
                    "main": first,
                    "advice": [
                        [name, METRICS[name].meaning, METRICS[name].advice] for name in names if name in METRICS
                    ],
                }
            )
    return found


def label(name: str) -> str:
    """What a metric is called among those of its panel.

    :param name: The metric.
    """
    return (
        "evaluation" if name.startswith("eval/") else LABELS.get(name, name.partition("/")[2].removesuffix("_reward"))
    )


def tiles(run: Any) -> list[tuple[str, str, str]]:
    """The figures at the top: name, value, explanation.

    :param run: The run.
    """
    found = [("Steps", f"{len(run.steps):,}", "trained")]
    for title, name in (("Reward", "rollout/reward"), ("Accuracy", "rollout/accuracy_reward")):
        values = numbers(run, name)
        if values:
            last = statistics.fmean(values[-LAST:])
            found.append((title, f"{values[0]:.2f} → {last:.2f}", f"first → mean of last {min(LAST, len(values))}"))
    if gaps := numbers(run, "rollout/logprob_gap_max"):
        found.append(("Log-prob gap", number(max(gaps)), "largest, nats"))
    if times := numbers(run, "time/step"):
        found.append(("A step", f"{statistics.median(times):.2f} s", f"median; {duration(sum(times))} in all"))
    return found


def duration(seconds: float) -> str:
    """A time for people.

    :param seconds: Seconds.
    """
    minutes = round(seconds / 60)
    return f"{seconds:.0f} s" if seconds < 90 else f"{minutes} min" if minutes < 90 else f"{seconds / 3600:.1f} h"


def numbers(run: Any, name: str) -> list[float]:
    """A metric's values, without the steps that have none.

    :param run: The run.
    :param name: The metric.
    """
    return [value for value in run.metrics.get(name, []) if value is not None]


def metric_rows(run: Any, known: dict[str, Any]) -> list[tuple[str, ...]]:
    """Name, unit, first, lowest, highest, and mean of the last steps of each metric.

    :param run: The run.
    :param known: Units by name.
    """
    rows = []
    for name in run.metrics:
        if values := numbers(run, name):
            figures = (values[0], min(values), max(values), statistics.fmean(values[-LAST:]))
            rows.append((name, known[name].unit if name in known else "", *map(number, figures)))
    return rows


def number(value: float) -> str:
    """A number with three or four digits.

    :param value: Any finite number.
    """
    if value == int(value) and abs(value) < 1e6:
        return f"{int(value):,}"
    return f"{value:.3g}" if abs(value) < 1 else f"{value:,.2f}" if abs(value) < 1e4 else f"{value:.3g}"


def settings(runs: list[Any]) -> dict[str, Any]:
    """Versions and flags of the runs, side by side.

    :param runs: All runs.
    :return: missing: runs without ``run_config.json``; about: rows of name and values; changed: flags that are not at
        their default, or not alike; all: every flag.
    """
    configs = [run.config for run in runs]
    there = [config for config in configs if config]

    def row(key: str) -> tuple[str, list[str]]:
        return key, [str(config.get(key, "")) if config else "" for config in configs]

    packages = list(dict.fromkeys(name for config in there for name in config["versions"]))
    about = [row(key) for key in ("started", "host", "code", "devices", "machine")]
    about += [(name, [config["versions"].get(name, "") if config else "" for config in configs]) for name in packages]
    flags = list(dict.fromkeys(name for config in there for name in config["flags"]))
    values = {
        name: [show_flag(config["flags"].get(name)) if config else "" for config in configs] for name in sorted(flags)
    }
    changed = {name for config in there for name in config["changed"]}
    chosen = {name: v for name, v in values.items() if name in changed or len({*v}) > 1}
    missing = [run.name for run in runs if not run.config]
    return {"missing": missing, "about": about if there else [], "changed": chosen, "all": values}


def show_flag(value: Any) -> str:
    """A flag's value.

    :param value: As in ``run_config.json``.
    """
    if isinstance(value, list):
        return " ".join(map(str, value))
    if value is None or isinstance(value, bool):
        return {None: "not set", True: "yes", False: "no"}[value]
    return str(value)


def embed(value: Any) -> str:
    """A value as JSON that is inert inside a script element, whatever texts it holds.

    :param value: Of JSON's types.
    """
    text = json.dumps(value, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def visible(text: str) -> str:
    """A text whose control, direction and zero-width characters are named instead of acting.

    :param text: Any text.
    """
    return _INVISIBLE.sub(lambda found: f"[U+{ord(found[0]):04X}]", text)


def source_hash(text: str) -> str:
    """What the page's security policy knows its own script and style by.

    :param text: The element's content.
    """
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode("utf-8")).digest()).decode()


if __name__ == "__main__":
    main()
