"""Scores of result files by the benchmark's rule, and paired comparisons of them. No model, no torch.

The rule of MMAU and MMAR (their ``evaluation.py``): lower-case prediction and answer and take the set of ``\\w+`` words
of each; right if the prediction has every word of the answer, and none that only other choices have. An item without a
prediction key is left out, an empty prediction is wrong. The other rules: :mod:`aqa.evaluation.benchmarks`.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from aqa.common.console import several
from aqa.evaluation.benchmarks import BENCHMARKS, Benchmark
from aqa.evaluation.items import EvalError, answer_texts, read_rows
from aqa.evaluation.variants import describe_orders

COLLAPSE_FROM, COLLAPSE_SHARE, COLLAPSE_RIGHT = 10, 0.95, 0.8  # answers; shares of them
Z95 = 1.959963984540054  # standard normal quantile at 97.5 %
SURE = 0.05  # a smaller p-value counts as a difference
WHAT_P_IS = f"p: how often chance alone does as much (McNemar's test); below {SURE} it counts"


# ------------------------------------------------------------------------------------------------------------- the rule
@dataclass(frozen=True)
class Verdicts:
    """A result file, judged."""

    benchmark: Benchmark
    key: str  # the field that the predictions were read from
    rows: list[dict[str, Any]]  # the rows that have a prediction
    right: list[bool]  # for each of them
    left_out: int  # rows without a prediction that the script reads

    @property
    def in_silence(self) -> list[bool] | None:
        """The verdicts on what was answered without sound; None unless all rows have that."""
        if not self.rows or any(row.get("in_silence") is None for row in self.rows):
            return None
        return [self._again(row, row["in_silence"]) for row in self.rows]

    @property
    def option_orders(self) -> list[list[bool]]:
        """The verdicts on the answers to each order of the options; empty unless all rows have equally many."""
        orders = [row.get("option_orders") or [] for row in self.rows]  # null in a column of parquet
        if len({len(each) for each in orders}) > 1:
            return []
        return [
            [self._again(row, said) for row, said in zip(self.rows, each, strict=True)]
            for each in zip(*orders, strict=True)
        ]

    def _again(self, row: dict[str, Any], said: dict[str, str]) -> bool:
        """The verdict with another answer; one that the script cannot read is wrong."""
        answered = self.benchmark.answered(row, said["prediction"], said["raw_output"])
        return bool(self.benchmark.verdict(answered, self.benchmark.prediction_keys[0]))


def judge(rows: Sequence[dict[str, Any]], benchmark: Benchmark, leave_out: bool = True) -> Verdicts:
    """Judge every row of a result file as the official script does.

    :param leave_out: Leave out what the script does; False: such a row is wrong.
    :raises EvalError: if no row has a prediction key, or a row lacks what the rule needs.
    """
    key = next((key for key in benchmark.prediction_keys if any(key in row for row in rows)), None)
    if key is None:
        raise EvalError(
            f"none of the {len(rows)} rows has a prediction under {' or '.join(benchmark.prediction_keys)}: this is "
            "no result file; eval_mmau.py --data_file asks a model such questions"
        )
    answered = [row for row in rows if key in row] if benchmark.leaves_out else list(rows)
    if all(answer is None for answer in answer_texts(answered)):
        raise EvalError(
            f"none of {len(answered)} rows has an answer, so they cannot be scored; the file can be submitted"
        )
    problems = []
    for row in answered:
        for field in (*(() if benchmark.skips_no_text else (key,)), "answer"):
            if not isinstance(row.get(field, "" if field == key else None), str):
                problems.append(f"id {row.get('id')}: {field} is {row.get(field)!r:.60}, expected a text")
        choices = row.get("choices")
        if not isinstance(choices, list) or not all(isinstance(choice, str) for choice in choices):
            problems.append(f"id {row.get('id')}: choices is {choices!r:.60}, expected a list of texts")
    if problems:
        raise EvalError(several(f"{len(problems)} fields of the result file cannot be scored", problems))
    verdicts = [(row, benchmark.verdict(row, key)) for row in answered]
    judged = [(row, bool(verdict)) for row, verdict in verdicts if verdict is not None or not leave_out]
    right = [verdict for _, verdict in judged]
    return Verdicts(benchmark, key, [row for row, _ in judged], right, len(rows) - len(judged))


# --------------------------------------------------------------------------------------------------------------- scores
def wilson_interval(correct: int, total: int) -> tuple[float, float]:
    """Lower and upper bound (fractions) of a proportion's 95 % interval (Wilson 1927).

    It also holds for few items, and never leaves 0 to 1; of no items it is 0 to 1.
    """
    if total == 0:
        return 0.0, 1.0
    share, z2 = correct / total, Z95**2 / total
    middle = share + z2 / 2
    half = Z95 * math.sqrt((share * (1 - share) + z2 / 4) / total)
    low, high = (middle - half) / (1 + z2), (middle + half) / (1 + z2)
    return (0.0 if correct == 0 else low), (1.0 if correct == total else high)  # otherwise rounding leaves 1e-17


def tally(right: Sequence[bool], in_silence: Sequence[bool] | None = None) -> dict[str, Any]:
    """Accuracy (fraction; 0 of none, as MMSU's script has it), correct, total, interval_95 (fractions).

    :param in_silence: The verdicts without sound, whose accuracy is added.
    """
    correct, total = sum(right), len(right)
    return {
        "accuracy": correct / max(total, 1),
        "correct": correct,
        "total": total,
        "interval_95": list(wilson_interval(correct, total)),
        **({} if in_silence is None else {"accuracy_in_silence": sum(in_silence) / max(total, 1)}),
    }


def score(verdicts: Verdicts) -> dict[str, Any]:
    """Accuracy overall and by the benchmark's breakdowns.

    :return: What :func:`tally` says of all rows; under ``by`` the same for each value of each breakdown.
    """
    benchmark, silent, orders = verdicts.benchmark, verdicts.in_silence, verdicts.option_orders

    def of(places: Sequence[int]) -> dict[str, Any]:
        return tally([verdicts.right[i] for i in places], None if silent is None else [silent[i] for i in places])

    by = {
        field: {value: of(places) for value, places in groups.items()}
        for field in benchmark.breakdowns
        if (groups := group(verdicts.rows, lambda row, field=field: benchmark.value(row, field)))
    }
    values = [[(field, benchmark.value(row, field)) for field in by] for row in verdicts.rows]
    types = [[f"{field} {value}" for field, value in each if value is not None] for each in values]
    quiet = [None if silent is None else row["in_silence"]["prediction"] for row in verdicts.rows]
    said = [
        Said(benchmark.said(row, verdicts.key), row["answer"], row["choices"], in_silence)
        for row, in_silence in zip(verdicts.rows, quiet, strict=True)
    ]
    predictions = [[row["option_orders"][k]["prediction"] for row in verdicts.rows] for k in range(len(orders))]
    correct, everything = sum(verdicts.right), len(verdicts.rows) + verdicts.left_out
    return {
        "benchmark": benchmark.name,
        **of(range(len(verdicts.rows))),
        "without_prediction": verdicts.left_out,
        "of_all": {"accuracy": correct / everything, "correct": correct, "total": everything},
        "silent_audio": any(row.get("silent_audio") for row in verdicts.rows),
        "option_orders": describe_orders(orders, predictions) if orders else None,
        "by": by,
        "collapsed": find_collapsed(said, types),
    }


class Said(NamedTuple):
    """What was said to a question."""

    prediction: str
    answer: str  # the right one
    choices: Sequence[str]
    in_silence: str | None = None  # the prediction without sound, if that was asked for


def find_collapsed(said: Sequence[Said], types: Sequence[Sequence[str]]) -> dict[str, str]:
    """Types of questions whose answers are nearly all alike though the right ones are not: the model does not listen.

    :param types: Of each question.
    :return: A sentence by type; of all types ("all questions") alone if all answers together are alike.
    """
    groups: dict[str, list[Said]] = {"all questions": list(said)}
    for entry, names in zip(said, types, strict=True):
        for name in names:
            groups.setdefault(name, []).append(entry)
    found = {name: sentence for name, members in groups.items() if (sentence := describe_collapse(members))}
    return {name: found[name] for name in found if name == "all questions"} or dict(sorted(found.items()))


def describe_collapse(said: Sequence[Said]) -> str | None:
    """A sentence about at least :data:`COLLAPSE_FROM` answers of which :data:`COLLAPSE_SHARE` are the same text, or the
    same place among the choices, while that is right for at most :data:`COLLAPSE_RIGHT` of them; else None."""
    if len(said) < COLLAPSE_FROM:
        return None
    texts = [(" ".join(s.prediction.casefold().split()), " ".join(s.answer.casefold().split())) for s in said]
    places = [
        tuple(s.choices.index(text) + 1 if text in s.choices else None for text in (s.prediction, s.answer))
        for s in said
    ]
    for what, pairs in (("", texts), ("choice ", places)):
        common, times = Counter(given for given, _ in pairs).most_common(1)[0]
        right = sum(given == wanted == common for given, wanted in pairs)
        if common and times >= COLLAPSE_SHARE * len(said) and right <= COLLAPSE_RIGHT * len(said):
            sentence = f"{times} of {len(said)} answers are {what}{common!r}, which is right for {right}"
            heard = [s for s in said if s.in_silence is not None]
            same = sum(s.prediction == s.in_silence for s in heard)
            return sentence + (f"; {same} are the same in silence" if heard else "")
    return None


def group(rows: Sequence[dict[str, Any]], key: Callable[[dict[str, Any]], Hashable | None]) -> dict[str, list[int]]:
    """Indices of the rows by the value of ``key``, in the order of the values; rows without a value are left out."""
    places: dict[str, list[int]] = {}
    for i, row in enumerate(rows):
        value = key(row)
        if value is not None:
            places.setdefault(str(value), []).append(i)
    return dict(sorted(places.items()))


def score_table(scores: dict[str, Any], title: str) -> str:
    """The output of :func:`score` as a table below a title."""
    groups = [("overall", scores)]
    for field, values in scores["by"].items():
        groups += [(field, None), *((f"  {value}", entry) for value, entry in values.items())]
    width = max(len(name) for name, _ in groups) + 2
    lines = [title]
    if scores["silent_audio"]:
        lines.append("ABLATION: silence of the same length in place of every clip; these are no benchmark scores")
    column, of_fractions = "accuracy_in_silence" in scores, BENCHMARKS[scores["benchmark"]].prints_fractions
    lines.append(f"{'':{width}}correct   total   accuracy   95 % interval" + "   in silence" * column)
    for name, entry in groups:
        if entry is None:
            lines.append(name)
            continue
        interval = "{:.1f} to {:.1f}".format(*(100 * bound for bound in entry["interval_95"]))
        lines.append(
            f"{name:{width}}{entry['correct']:7}{entry['total']:8}{percent(entry['accuracy'], of_fractions):>11}   "
            + (f"{interval:13}{percent(entry['accuracy_in_silence']):>13}" if column else interval)
        )
    if orders := scores["option_orders"]:
        lines.append(
            f"options in {len(orders['accuracies'])} orders: mean {percent(orders['mean'])}, "
            f"{percent(orders['least'])} to {percent(orders['greatest'])}, standard deviation "
            f"{orders['std'] * 100:.2f} points; the same answer in every order: {percent(orders['agreement'])}"
        )
    if scores["without_prediction"]:
        every = scores["of_all"]
        lines.append(
            f"left out, as the official script does: {scores['without_prediction']} items without a prediction "
            f"that it reads; of all {every['total']} items {percent(every['accuracy'])}"
        )
    lines += [f"WARNING: {name}: {sentence}" for name, sentence in scores["collapsed"].items()]
    return "\n".join(lines)


def percent(share: float, of_fraction: bool = False) -> str:
    """A fraction in per cent with two decimals.

    :param of_fraction: Round the fraction to four decimals: 43 of 160 are 26.87 % then, else 26.88 %.
    """
    return f"{round(share, 4) * 100:.2f} %" if of_fraction else f"{share * 100:.2f} %"


# ----------------------------------------------------------------------------------------------------------- comparison
def mcnemar_p(only_first: int, only_second: int) -> float:
    """Two-sided exact p-value of McNemar's test: is one model better on the items that only one of two got right?

    Under the null hypothesis each such item is a fair coin's toss. 1 if there are no such items.
    """
    n, fewer = only_first + only_second, min(only_first, only_second)
    tail = sum(math.comb(n, k) for k in range(fewer + 1))
    return min(1.0, 2 * tail / 2**n)


def guessing_p(right: int, chances: Sequence[float]) -> float:
    """The probability that guessing answers at least so many questions right (Poisson binomial, exact).

    :param chances: Of each question, the probability to guess it.
    """
    import numpy as np  # not needed for the flags, which a Python without it explains

    odds = np.ones(1)  # of 0, 1, ... right guesses
    for chance in chances:
        odds = np.convolve(odds, (1 - chance, chance))
    return float(odds[right:].sum())


def paired(first: Sequence[bool], second: Sequence[bool]) -> dict[str, Any]:
    """Two results of the same items against each other.

    :param first: At least one verdict.
    :param second: Verdicts of the same items, in the same order.
    :return: total, both accuracies, difference (second less first) with its 95 % interval (Wald, paired), the items
        that only one got right, and McNemar's exact p-value.
    """
    n = len(first)
    only_first = sum(a and not b for a, b in zip(first, second, strict=True))
    only_second = sum(b and not a for a, b in zip(first, second, strict=True))
    difference = (only_second - only_first) / n
    half = Z95 * math.sqrt(max(0.0, (only_first + only_second) / n - difference**2) / n)
    return {
        "total": n,
        "accuracy": [sum(first) / n, sum(second) / n],
        "difference": difference,
        "interval_95": [max(-1.0, difference - half), min(1.0, difference + half)],
        "only_first": only_first,
        "only_second": only_second,
        "mcnemar_p": mcnemar_p(only_first, only_second),
    }


def compare(first: Verdicts, second: Verdicts) -> dict[str, Any]:
    """Compare two result files on the items that both have.

    :return: What :func:`paired` says of all shared items, and under ``by`` of each group of the main breakdown.
    :raises EvalError: if an id occurs twice, no item is shared, or the files are of different benchmarks.
    """
    if first.benchmark != second.benchmark:
        raise EvalError(
            f"the first file has questions of {first.benchmark.title}, the second of {second.benchmark.title}, which "
            "are scored by another rule; evaluate both models on the same form of data file"
        )
    for which, verdicts in (("first", first), ("second", second)):
        if not verdicts.rows:
            raise EvalError(f"the {which} file has no prediction that {first.benchmark.title}'s script can read")
    places = [_places_by_id(verdicts) for verdicts in (first, second)]
    shared = [identity for identity in places[0] if identity in places[1]]
    if not shared:
        raise EvalError("the files share no item; both must be results of the same questions")
    pairs = [(places[0][identity], places[1][identity]) for identity in shared]
    changed = [
        f"id {identity}: {first.rows[i][field]!r:.60} and {second.rows[j][field]!r:.60}"
        for identity, (i, j) in zip(shared, pairs, strict=True)
        for field in ("answer", "choices")
        if first.rows[i][field] != second.rows[j][field]
    ]
    if changed:
        title = "the same ids have other questions (another release of a benchmark, or rows that were prepared anew)"
        raise EvalError(several(f"{title}; evaluate both models on one file", changed, 6))
    verdicts = [(first.right[i], second.right[j]) for i, j in pairs]
    main = first.benchmark.main_breakdown(first.rows)
    groups = group([first.rows[i] for i, _ in pairs], lambda row: first.benchmark.value(row, main))

    def of(chosen: Sequence[tuple[bool, bool]]) -> dict[str, Any]:
        return paired([a for a, _ in chosen], [b for _, b in chosen])

    return {
        **of(verdicts),
        "not_shared": [len(side) - len(shared) for side in places],
        "by": {main: {value: of([verdicts[k] for k in members]) for value, members in groups.items()}},
    }


def _places_by_id(verdicts: Verdicts) -> dict[str, int]:
    places: dict[str, int] = {}
    for i, row in enumerate(verdicts.rows):
        identity = str(row.get("id"))
        if row.get("id") is None or identity in places:
            raise EvalError(f"id {row.get('id')!r} is missing or occurs twice: the items cannot be paired")
        places[identity] = i
    return places


def comparison_table(comparison: dict[str, Any], names: tuple[str, str]) -> str:
    """The output of :func:`compare` as a table of 80 columns.

    :param names: Of the two files.
    """
    groups = [("overall", comparison)]
    for field, values in comparison["by"].items():
        groups += [(field, None), *((f"  {value}", entry) for value, entry in values.items())]
    width = 10
    lines = [
        f"first    {names[0]}",
        f"second   {names[1]}",
        " " * width + " total  first %  second %  difference   95 % interval only one       p",
    ]
    for name, entry in groups:
        if entry is None:
            lines.append(name)
            continue
        if len(name) > width:
            lines.append(name)
            name = ""
        low, high = (f"{bound * 100:+.1f}" for bound in entry["interval_95"])
        before, after = (100 * accuracy for accuracy in entry["accuracy"])
        only_one = f"{entry['only_first']}:{entry['only_second']}"
        lines.append(
            f"{name:{width}}{entry['total']:6}{before:9.2f}{after:10.2f}{entry['difference'] * 100:+12.2f}"
            f"{f'{low} to {high}':>16}{only_one:>9}{entry['mcnemar_p']:8.2g}"
        )
    lines += ["only one: right in the first alone, in the second alone", WHAT_P_IS]
    if any(comparison["not_shared"]):
        lines.append(
            "left out, in one file only: {} items of the first, {} of the second".format(*comparison["not_shared"])
        )
    return "\n".join(lines)


# ---------------------------------------------------------------------------------------------------------------- files
def judge_file(path: Path, benchmark: str = "auto", leave_out: bool = True) -> Verdicts:
    """Read and judge a result file of a benchmark, ours or another program's.

    :param benchmark: Its name, or ``auto``.
    :param leave_out: As for :func:`judge`.
    :raises EvalError: if it cannot be read or scored; the message names it.
    """
    found, rows = read_rows(path, benchmark)
    try:
        return judge(rows, found, leave_out)
    except EvalError as error:
        raise EvalError(f"{path}: {error}") from error


def to_json(value: dict[str, Any]) -> str:
    """Scores or comparisons as text of a JSON file."""
    return json.dumps(value, indent=2) + "\n"
