"""What a model answered to questions that it is not trained on: accuracy by question type, and what it confuses.

Three places have such answers: the run's ``eval/rows`` (``--eval_data``, judged by the reward), the run's result files
in ``eval`` (``--eval_benchmark``), and result files of ``eval_mmau.py`` that the report is told to compare. Questions
of the latter two are judged by the benchmark's rule.
"""

from __future__ import annotations

import json
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from aqa.common.constants import ASSISTANT_HEADER
from aqa.data.prompts import choices_in
from aqa.evaluation.items import EvalError, find_audio
from aqa.evaluation.scoring import Verdicts, judge_file, paired, wilson_interval
from aqa.report.run_data import (
    NO_ANSWER,
    ReportError,
    Run,
    read_records,
    saved_steps,
    shorten,
    split_prompt,
    what_was_said,
)
from aqa.rewards.r1_aqa import extract_response
from aqa.training.summary import row_key

OTHER = "another answer"  # every answer that a table has no room for
KINDS = ("question_type", "dataset", "source", "label")  # of tags; the first that the data has is its question type
MOST_ANSWERS = 12  # rows of a table of confusions
MOST_PAIRS = 12  # of the most frequent mistakes
MOST_WRONG = 5  # answers that are named in place of a table

Key = tuple[Any, ...]


class Answer(NamedTuple):
    """What a model answered to an item."""

    text: str  # the response
    said: str  # see what_was_said
    right: bool
    form: bool | None  # whether it has the form that was asked for, if that was judged
    reward: float | None = None


@dataclass(frozen=True)
class Item:
    """A question."""

    kind: str  # question type; empty if the data has none
    question: str
    choices: list[str] | None
    gold: str
    audio: Path | None


@dataclass(frozen=True)
class Round:
    """The answers of one model."""

    name: str
    silent: bool  # it heard silence in place of every clip
    answers: dict[Key, Answer]
    model: str = ""  # that a result file is of, where the file beside it says so
    other: bool = False  # of a run that the page's is compared with

    @property
    def title(self) -> str:
        """The name, with a note of silence."""
        return self.name + ", in silence" * self.silent


@dataclass
class HeldOut:
    """Questions, and rounds of answers to them in the order of time, at least one."""

    name: str
    items: dict[Key, Item]
    rounds: list[Round]

    @property
    def heard(self) -> list[Round]:
        """The rounds with sound of the page's run, or of result files; all where every one is silent."""
        return [each for each in self.rounds if not (each.silent or each.other)] or self.rounds

    @property
    def ends(self) -> list[Round]:
        """The first and the last of :attr:`heard`."""
        return [self.heard[0], *self.heard[1:][-1:]]

    @property
    def quiet(self) -> list[Round]:
        """The rounds in silence, beside those with sound."""
        return [each for each in self.rounds if each.silent and each not in self.heard]

    def kinds(self) -> dict[str, list[Key]]:
        """Items by question type, in the order of the names; empty where there is one type only."""
        found = defaultdict(list)
        for key, item in self.items.items():
            found[item.kind].append(key)
        return dict(sorted(found.items())) if len(found) > 1 else {}


# -------------------------------------------------------------------------------------------------------------- reading
def read_held_out(runs: Sequence[Run], results: dict[str, Path]) -> tuple[list[HeldOut], list[str]]:
    """All held-out questions of a run's folder and of further result files.

    :param runs: The run, then those it is compared with: the last answers of each are a further round of answers to the
        same questions.
    :param results: Result files of ``eval_mmau.py`` by name.
    :return: The questions, and a sentence for each file of a run that cannot be read.
    :raises EvalError: if one of ``results`` cannot be read.
    """
    problems: list[str] = []
    found, *others = (read_rows(run, problems) + read_benchmarks(run, problems) for run in runs)
    for run, sets in zip(runs[1:], others, strict=True):
        for held in sets:
            last = replace(held.heard[-1], name=f"{run.name}, {held.heard[-1].name}", other=True)
            same = next((each for each in found if each.items.keys() & held.items.keys()), None)
            if same is None:
                found.append(HeldOut(f"{held.name} of {run.name}", held.items, [replace(last, other=False)]))
            else:
                same.items |= {key: item for key, item in held.items.items() if key not in same.items}
                same.rounds.append(last)
    return found + read_results(results), problems


def first_and_last(steps: Sequence[int]) -> list[int]:
    """The ends of rising steps, of which there may be one or none."""
    return sorted({*steps[:1], *steps[-1:]})


def read_rows(run: Run, problems: list[str]) -> list[HeldOut]:
    """The first and the last evaluation of ``--eval_data``, and the last one's answers in silence."""
    files = saved_steps(run.folder / "eval" / "rows", run.steps[-1])
    items: dict[Key, Item] = {}
    rounds: list[Round] = []
    for step in first_and_last(list(files)):
        try:
            records = read_records(files[step])
            kind = main_kind(tag.partition("/")[0] for record in records for tag in record["tags"])
            heard, silent = ([r for r in records if r["silent"] == quiet] for quiet in (False, True))
            new = [Round(f"step {step}", bool(part is silent), {row_key(r): answer_of(r) for r in part})
                   for part in (heard, silent) if part]  # fmt: skip
            items = {row_key(r): item_of(r, kind) for r in heard}
            rounds = [each for each in rounds if not each.silent] + new  # the table shows the last silent round only
        except (ReportError, KeyError, TypeError, AttributeError) as error:
            problems.append(f"{files[step]}: cannot be read ({type(error).__name__}: {error})")
    return [HeldOut("evaluation data", items, rounds)] if items else []


def main_kind(kinds: Iterable[str]) -> str | None:
    """The kind of tag that tells question types apart; None if there is none."""
    there = set(kinds)
    return next((kind for kind in KINDS if kind in there), None)


def item_of(record: dict[str, Any], kind: str | None) -> Item:
    """The question of a record of ``eval/rows``."""
    question, choices = split_prompt(record["prompt"])
    values = (tag.partition("/") for tag in record["tags"])
    name = next((value for tag_kind, _, value in values if tag_kind == kind), "")
    audio = record.get("audio_path")
    return Item(name, question, choices, record["reference"], Path(audio) if audio else None)


def answer_of(record: dict[str, Any]) -> Answer:
    """The answer of a record of ``eval/rows``."""
    choices = choices_in(record["prompt"])
    response = extract_response(ASSISTANT_HEADER + record["response"])
    form, right = record.get("format_reward"), record.get("accuracy_reward", record["reward"])
    said = what_was_said(response, choices or [record["reference"]])
    return Answer(shorten(response), said, right > 0, None if form is None else form > 0, record["reward"])


def read_benchmarks(run: Run, problems: list[str]) -> list[HeldOut]:
    """The first and the last result file of each benchmark that was asked while training, and the last in silence."""
    files: dict[str, dict[int, Path]] = defaultdict(dict)
    for path in (run.folder / "eval").glob("*_step_*.json*"):
        name = re.fullmatch(r"(.+)_step_(\d+)\.jsonl?", path.name)
        if name and int(name[2]) <= run.steps[-1]:
            files[name[1]][int(name[2])] = path
    found = []
    for name, steps in sorted(files.items()):
        if name.endswith("_silent") and name.removesuffix("_silent") in files:
            continue
        silent = files.get(f"{name}_silent", {})
        chosen = [(step, steps[step]) for step in first_and_last(sorted(steps))]
        chosen += [(step, silent[step]) for step in sorted(silent)[-1:]]
        held = HeldOut(f"benchmark {name}", {}, [])
        for step, path in chosen:
            try:
                verdicts = judge_file(path, leave_out=False)  # as the run's metrics count
                add_round(held, f"step {step}", verdicts, benchmark_folder(run, name))
            except EvalError as error:
                problems.append(str(error))
        found += [held] if held.rounds else []
    return found


def benchmark_folder(run: Run, name: str) -> Path | None:
    """The recordings of a benchmark of ``--eval_benchmark``, as the run's settings have it."""
    flags = (run.config or {}).get("flags", {})
    files, folders = ((flags.get(flag) or "").split(",") for flag in ("eval_benchmark", "eval_audio_dir"))
    folders = folders * len(files) if len(folders) == 1 else folders
    return next((Path(b) for a, b in zip(files, folders, strict=False) if b and Path(a).stem == name), None)


def read_results(results: dict[str, Path]) -> list[HeldOut]:
    """Result files by name; those that share a question are rounds of answers to the same questions.

    :raises EvalError: if one cannot be read.
    """
    found: list[HeldOut] = []
    for name, path in results.items():
        verdicts = judge_file(path)
        keys = {result_key(row) for row in verdicts.rows}
        held = next((each for each in found if keys & each.items.keys()), None)
        if held is None:
            held = HeldOut("result files" if not found else f"result files {len(found) + 1}", {}, [])
            found.append(held)
        add_round(held, name, verdicts, *result_settings(path))
    return found


def result_settings(path: Path) -> tuple[Path | None, str]:
    """The recordings of a result file and the model that it is of, as the score file beside it has them."""
    try:
        settings = json.loads(path.with_suffix(".score.json").read_text(encoding="utf-8"))["run"]
        return Path(settings["audio_dir"]), "/".join(Path(settings["model_path"]).parts[-2:])
    except (OSError, ValueError, KeyError, TypeError):
        return None, ""  # another program's result file has none


def result_key(row: dict[str, Any]) -> Key:
    """What tells a question of a result file apart: its id, and all of it, since benchmarks have had releases."""
    return (str(row.get("id")), row.get("question"), tuple(row["choices"]), row["answer"])


def add_round(held: HeldOut, name: str, verdicts: Verdicts, folder: Path | None, model: str = "") -> None:
    """Add the answers of a result file, and those in silence where its rows have some (``--silent_audio also``).

    :param folder: Of the recordings, if it is known.
    :param model: Likewise.
    """
    benchmark, silent = verdicts.benchmark, verdicts.in_silence
    answers, quiet, main = {}, {}, benchmark.main_breakdown(verdicts.rows)
    for number, (row, right) in enumerate(zip(verdicts.rows, verdicts.right, strict=True)):
        key, said = result_key(row), benchmark.said(row, verdicts.key)
        answers[key] = result_answer(row, said, row.get("raw_output", said), right)
        if silent is not None:
            again = row["in_silence"]
            quiet[key] = result_answer(row, again["prediction"], again["raw_output"], silent[number])
        clip = row.get(benchmark.audio_key)
        audio = find_audio(clip, folder) if folder and isinstance(clip, str) else None
        kind = benchmark.value(row, main) or ""
        item = Item(kind, shorten(str(row.get("question"))), row["choices"], row["answer"], audio)
        held.items.setdefault(key, item)
    held.rounds.append(Round(name, any(row.get("silent_audio") for row in verdicts.rows), answers, model))
    if quiet:
        held.rounds.append(Round(name, True, quiet, model))


def result_answer(row: dict[str, Any], prediction: str, raw: str, right: bool) -> Answer:
    """An answer of a result file's row."""
    said = prediction if prediction in row["choices"] else what_was_said(raw, row["choices"])
    return Answer(shorten(raw), said, right, None)


# ------------------------------------------------------------------------------------------------------------- accuracy
class Cell(NamedTuple):
    """A share of right answers."""

    accuracy: float
    interval: tuple[float, float] | None  # 95 %, Wilson; None where the number of answers is not known
    right: int
    total: int
    chance: float | None = None  # accuracy of guessing


def make_cell(verdicts: Sequence[bool], chance: float | None = None) -> Cell | None:
    """The share of right answers among verdicts; None of none."""
    right, total = sum(verdicts), len(verdicts)
    return Cell(right / total, wilson_interval(right, total), right, total, chance) if total else None


def accuracy_table(runs: Sequence[Run], sets: Sequence[HeldOut], last: int) -> dict[str, Any]:
    """Accuracies by question type, in training and of every round of held-out answers.

    :param runs: The run, then those it is compared with.
    :param last: Training steps that are counted.
    :return: ``columns``: title, note, and whether the model heard silence; ``rows``: name, the chance level in percent,
        and cells, each with its own level of chance.
    """
    columns, found = [], []
    for run in runs:
        training, note = training_accuracy(run, last)
        if training:
            note = note if run is runs[0] else f"{run.name}, {note}"
            columns.append(("sampled training accuracy", note, False))
            found.append(training)
    for held in sets:
        groups = {"all": list(held.items)} | held.kinds()
        chances = {
            kind: [1 / len(c) for key in keys if (c := held.items[key].choices)] for kind, keys in groups.items()
        }
        for each in held.rounds:
            note = f"{each.name}, model {each.model}" if each.model else each.name
            columns.append((f"held-out, {held.name}", note, each.silent))
            verdicts = {
                kind: [each.answers[k].right for k in keys if k in each.answers] for kind, keys in groups.items()
            }
            levels = {kind: sum(shares) / len(shares) for kind, shares in chances.items() if shares}
            found.append({kind: make_cell(right, levels.get(kind)) for kind, right in verdicts.items()})
    rows = []
    for kind in dict.fromkeys(["all", *sorted({kind for column in found for kind in column})]):
        cells = [column.get(kind) for column in found]
        levels = sorted(round(100 * cell.chance) for cell in cells if cell and cell.chance)
        rows.append((kind, " to ".join(map(str, dict.fromkeys(levels[:1] + levels[-1:]))), cells))
    return {"columns": columns, "rows": rows if columns else []}


def training_accuracy(run: Run, last: int) -> tuple[dict[str, Cell | None], str]:
    """Accuracy of the responses of the last training steps, which are sampled, by question type.

    The interval counts prompts and not responses, since the responses to a prompt are alike; this makes it rather too
    wide than too narrow.

    :return: Nothing where the run records no accuracy; and a note for the reader.
    """
    name = "rollout/accuracy_reward"
    flags, chances = ((run.config or {}).get(part, {}) for part in ("flags", "chance"))
    prompts, samples = flags.get("rollout_batch_size"), flags.get("n_samples_per_prompt")
    kind = main_kind(found[1] for metric in run.metrics if (found := re.match(f"{name}/([^/]+)/", metric)))
    tags = [metric.removeprefix(f"{name}/") for metric in run.metrics if metric.startswith(f"{name}/{kind}/")]
    found: dict[str, Cell | None] = {}
    for tag in ("all", *tags):
        metric, share = (name, None) if tag == "all" else (f"{name}/{tag}", f"rollout/share/{tag}")
        value = tag.removeprefix(f"{kind}/")
        accuracies = run.metrics.get(metric, [])[-last:]
        shares = run.metrics.get(share, [])[-last:] if share else [1.0] * len(accuracies)
        pairs = [(a, s) for a, s in zip(accuracies, shares, strict=False) if a is not None and s]
        weight = sum(s for _, s in pairs)
        if not weight:
            continue
        accuracy, chance = min(1.0, sum(a * s for a, s in pairs) / weight), chances.get(tag)
        if prompts and samples:
            asked, total = weight * prompts, round(weight * prompts * samples)
            interval = wilson_interval(accuracy * asked, asked)
            found[value] = Cell(accuracy, interval, round(accuracy * total), total, chance)
        else:
            found[value] = Cell(accuracy, None, 0, 0, chance)
    steps = [step for step in run.steps if step > 0][-last:]  # 0: the evaluation before training
    warmth = f", temperature {flags['temperature']}" if "temperature" in flags else ""
    return found, f"steps {steps[0]} to {steps[-1]}{warmth}" if steps else ""


def comparisons(held: HeldOut) -> list[dict[str, Any]]:
    """Rounds against each other on the questions that both have, over all and by question type.

    Later rounds are compared with the first; those in silence, or of another run, with the last that heard the sound.
    """
    heard = held.heard
    pairs = [(heard[0], each) for each in heard[1:]] + [(heard[-1], r) for r in held.rounds if r not in heard]
    groups = {"all": list(held.items)} | held.kinds()
    found = []
    for first, second in pairs:
        rows = []
        for kind, keys in groups.items():
            shared = [key for key in keys if key in first.answers and key in second.answers]
            if shared:
                verdicts = ([each.answers[key].right for key in shared] for each in (first, second))
                rows.append((kind, paired(*verdicts)))
        left_out = [
            len(each.answers.keys() - other.answers.keys()) for each, other in ((first, second), (second, first))
        ]
        found.append({"first": first, "second": second, "rows": rows, "left_out": left_out})
    return [each for each in found if each["rows"]]


# ----------------------------------------------------------------------------------------------------------- confusions
def confusions(held: HeldOut) -> dict[str, Any]:
    """What the last round with sound answered in place of what was right.

    :return: ``round``; ``right`` and ``total``; ``pairs``: the most frequent mistakes, each with kind, gold, said, how
        often, and of how many questions; ``tables``: one for each question type, see :func:`confusion_table`, or, where
        no type can have one, one of all types together; ``without``: question types that have none, why, and their most
        frequent wrong answers.
    """
    last = held.heard[-1]
    counts: dict[str, Counter[tuple[str, str]]] = defaultdict(Counter)
    wrong: Counter[tuple[str, str, str]] = Counter()
    for key, item in held.items.items():
        if (answer := last.answers.get(key)) is not None:
            counts[item.kind][item.gold, answer.said] += 1
            if not answer.right:
                wrong[item.kind, item.gold, answer.said] += 1
    pairs = [
        {"kind": kind, "gold": gold, "said": said, "times": times, "of": asked(counts[kind])[gold]}
        for (kind, gold, said), times in sorted(wrong.items(), key=lambda entry: (-entry[1], entry[0]))[:MOST_PAIRS]
    ]
    tables, without = [], []
    for kind, found in sorted(counts.items()):
        if table := confusion_table(found):
            tables.append({"kind": kind, **table})
        else:
            without.append((kind, *why_no_table(found)))
    together = confusion_table(sum(counts.values(), Counter()))
    if not tables and len(counts) > 1 and together:
        tables = [{"kind": "all question types together", **together}]
    total = len(last.answers)
    return {
        "round": last,
        "right": total - sum(wrong.values()),
        "total": total,
        "kinds_of_mistakes": len(wrong),
        "pairs": pairs,
        "tables": tables,
        "without": without,
    }


def asked(counts: Counter[tuple[str, str]]) -> Counter[str]:
    """How often each answer was the right one."""
    found: Counter[str] = Counter()
    for (gold, _), times in counts.items():
        found[gold] += times
    return found


def why_no_table(counts: Counter[tuple[str, str]]) -> tuple[str, list[tuple[str, int]]]:
    """Why :func:`confusion_table` gives none, and the most frequent wrong answers, each with how often."""
    golds = asked(counts)
    why = f"{len(golds)} different right answers are too many"
    if len(golds) == 1:
        why = f"the right answer is always “{next(iter(golds))}”"
    wrong: Counter[str] = Counter()
    for (gold, said), times in counts.items():
        wrong[said] += times if said != gold else 0
    return why, [(said, times) for said, times in wrong.most_common(MOST_WRONG) if times]


def confusion_table(counts: Counter[tuple[str, str]]) -> dict[str, Any] | None:
    """Right answers against what was answered.

    :param counts: Of right answer and answer.
    :return: ``columns``: what was answered; ``rows``: right answer, number of questions, and for each column how often,
        the shade from 0 to 5, and whether it is right; ``left_out``: right answers that :data:`MOST_ANSWERS` leaves no
        room for. None where there is a single right answer, or the table would leave out most of the questions.
    """
    golds = asked(counts)
    shown = [gold for gold, _ in sorted(golds.items(), key=lambda entry: (-entry[1], entry[0]))[:MOST_ANSWERS]]
    if len(shown) < 2 or sum(golds[gold] for gold in shown) < sum(golds.values()) / 2:
        return None
    others: Counter[str] = Counter()  # answers that are right for no question
    for (_, said), times in counts.items():
        others[said] += times if said not in golds and said not in (OTHER, NO_ANSWER) else 0
    columns = [*shown, *(said for said, times in others.most_common(MOST_ANSWERS - len(shown)) if times)]
    rows = []
    for gold in shown:
        cells = dict.fromkeys([*columns, OTHER, NO_ANSWER], 0)
        for (right, said), times in counts.items():
            if right == gold:
                cells[said if said in cells else OTHER] += times
        rows.append((gold, golds[gold], cells))
    columns += [said for said in (OTHER, NO_ANSWER) if any(cells[said] for _, _, cells in rows)]
    shaded = [
        (gold, total, [(cells[said], -(-5 * cells[said] // total), said == gold) for said in columns])
        for gold, total, cells in rows
    ]
    return {"columns": columns, "rows": shaded, "left_out": len(golds) - len(shown)}
