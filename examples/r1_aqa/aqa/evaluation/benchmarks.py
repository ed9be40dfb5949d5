"""The benchmarks, one description each: how rows name their fields, what result file the script reads, how it scores.

Each rule gives the verdict that the benchmark's own script gives. ADQA has no published script. MMAU-Pro's script finds
by embeddings which choice a free text means; we write choices, whose own text is always the nearest.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from aqa.data.formats import DCASE as DCASE_FIELDS
from aqa.data.formats import MMAR as MMAR_FIELDS
from aqa.data.formats import MMAU as MMAU_FIELDS
from aqa.data.formats import MMAU_PRO as MMAU_PRO_FIELDS
from aqa.data.formats import MMSU as MMSU_FIELDS
from aqa.data.formats import Format
from aqa.rewards.choices import is_right

Row = dict[str, Any]
LETTERS = "ABCD"
_THINKING = re.compile(r"<\s*think\s*>(.*?)(?:<\s*/\s*think\s*>|$)", re.IGNORECASE | re.DOTALL)
_ANSWER = re.compile(r"<\s*answer\s*>.*", re.IGNORECASE | re.DOTALL)


def _verdict_by_words(row: Row, key: str) -> bool | None:
    """MMAU's and MMAR's: the words of prediction and choices decide."""
    return is_right(row[key], row["answer"], row["choices"])


def _verdict_by_text(row: Row, key: str) -> bool | None:
    """Top-1: the prediction is the text of the right choice, up to case and spaces."""
    return row.get(key, "").casefold().split() == row["answer"].casefold().split()


def _verdict_by_choice(row: Row, key: str) -> bool | None:
    """MMAU-Pro's on a choice's own text, which no other choice's embedding is nearer to; another text is wrong here."""
    return row.get(key, "") in row["choices"] and row[key] == row["answer"]


def _is_closed(row: Row) -> bool:
    """Whether MMAU-Pro's script scores a row by its choices."""
    choices = row.get("choices")
    return (
        row.get("category") not in ("open", "instruction following") and isinstance(choices, list) and len(choices) > 1
    )


def _verdict_by_letter(row: Row, key: str) -> bool | None:
    """MMSU's: the letter's choice has the text of ``answer_gt``. Without a letter, an empty text and "None" are wrong
    (its script takes the letter of the row before), and all else is left out."""
    said = row.get(key, "")
    if not isinstance(said, str):  # its script prints "Error prediction!" and goes on
        return None
    letter = mmsu_letter(said)
    if letter is None:
        return False if said.strip().replace("\n", "") in ("", "None") else None
    return row.get(f"choice_{letter.lower()}", "") == row.get("answer_gt", "")


def mmsu_letter(response: str) -> str | None:
    """The letter that MMSU's script reads: the first character, else the last but one ("The answer is A.")."""
    text = response.strip().replace("\n", "")
    if text == "None":
        return None
    return next((letter for letter in (text[:1], text[-2:-1]) if letter and letter in LETTERS), None)


def _thinking(row: Row, prediction: str, raw: str) -> Row:
    """What MMAR-Rubrics judges beside the answer: the text in think tags, else what stands before the answer."""
    found = _THINKING.search(raw)
    return {"thinking_prediction": (found[1] if found else _ANSWER.sub("", raw)).strip()}


def _letter(row: Row, prediction: str, raw: str) -> Row:
    choices = row["choices"]
    return {"response": LETTERS[choices.index(prediction)] if prediction in choices[: len(LETTERS)] else prediction}


def _text_of_letter(row: Row, key: str) -> str:
    said = row.get(key, "")
    if not isinstance(said, str):
        return ""
    letter = mmsu_letter(said)
    place = None if letter is None else LETTERS.index(letter)
    return said if place is None or place >= len(row["choices"]) else row["choices"][place]


@dataclass(frozen=True)
class Benchmark:
    name: str  # as in --benchmark
    title: str  # as printed
    fields: Format  # how its rows name a question's fields
    prediction_keys: tuple[str, ...]  # fields with the prediction; the official script reads the first
    breakdowns: tuple[str, ...]  # accuracies are broken down by them, the main one first; "a / b": by both together
    suffixes: tuple[str, ...] = (".json", ".jsonl")  # of the result files that its script reads
    verdict: Callable[[Row, str], bool | None] = _verdict_by_words  # None: its script leaves the row out
    written: Callable[[Row, str, str], Row] = lambda row, prediction, raw: {}  # fields beside the predictions
    said: Callable[[Row, str], str] = lambda row, key: row.get(key, "")  # the prediction as a choice's text
    asked: Callable[[Row], bool] = lambda row: True  # which of its rows are asked and scored
    is_whole: bool = False  # questions are about all of a recording, also of one that is longer than what models hear
    leaves_out: bool = True  # its script leaves out a row without a prediction key; else such a row is wrong
    skips_no_text: bool = False  # its script leaves out a row whose prediction is null or another value but a text
    prints_fractions: bool = False  # its script prints 0.2687 and not 26.87 %, which rounds halves otherwise
    rule: str = "official rule"

    @property
    def audio_key(self) -> str:
        """Field with the path of a question's recording."""
        return self.fields.audio

    def as_question(self, row: Row) -> Row:
        """A row with its question, choices and answer under these names, too."""
        fields = self.fields
        if (fields.question, fields.choices, fields.answer) == ("question", ("choices",), "answer"):
            return row
        own = {"question": row.get(fields.question), "choices": fields.choices_of(row)}
        return row | own | ({"answer": row[fields.answer]} if fields.answer in row else {})

    def without_copies(self, row: Row) -> Row:
        """A row without the fields that :meth:`as_question` has added, and will add when the row is read again."""
        own = (self.fields.question, *self.fields.choices, self.fields.answer)
        return {name: row[name] for name in row if name in own or name not in ("question", "choices", "answer")}

    def answered(self, row: Row, prediction: str, raw: str) -> Row:
        """A question with a prediction, under every key in use, as its script reads it."""
        keys = dict.fromkeys(reversed(self.prediction_keys), prediction)
        return row | keys | self.written(row, prediction, raw)

    def value(self, row: Row, field: str) -> str | None:
        """A row's value of a breakdown; None where it has none."""
        parts = [row.get(name) for name in field.split(" / ")]
        return None if None in parts else " / ".join(map(str, parts))

    def main_breakdown(self, rows: Sequence[Row]) -> str:
        """The first breakdown that the rows have."""
        there = (field for field in self.breakdowns if any(self.value(row, field) is not None for row in rows))
        return next(there, self.breakdowns[0])


MMAU = Benchmark(
    "mmau",
    "MMAU",
    MMAU_FIELDS,
    ("model_output", "model_prediction"),
    ("task", "question_type", "difficulty", "sub-category"),  # question_type: of one's own questions in this format
    suffixes=(".json",),
)
MMAR = Benchmark(
    "mmar", "MMAR", MMAR_FIELDS, ("answer_prediction",), ("modality", "category", "sub-category"), written=_thinking
)
MMSU = Benchmark(
    "mmsu",
    "MMSU",
    MMSU_FIELDS,
    ("response",),
    ("category", "category / sub-category"),
    suffixes=(".jsonl",),
    verdict=_verdict_by_letter,
    written=_letter,
    said=_text_of_letter,
    leaves_out=False,
    skips_no_text=True,
    prints_fractions=True,
)
ADQA = Benchmark(
    "adqa",
    "ADQA (DCASE 2026)",
    DCASE_FIELDS,
    ("model_output",),
    ("question_type", "source_dataset"),
    verdict=_verdict_by_text,
    leaves_out=False,
    rule="top-1 accuracy; no official script is published",
)
MMAU_PRO = Benchmark(
    "mmau-pro",
    "MMAU-Pro, closed questions",
    MMAU_PRO_FIELDS,
    ("model_output",),
    ("category",),
    suffixes=(".parquet",),
    verdict=_verdict_by_choice,
    asked=_is_closed,
    is_whole=True,
    leaves_out=False,
    prints_fractions=True,
    rule="official rule, but an answer that is no choice, which its script would match by NV-Embed-v2, is wrong",
)
BENCHMARKS = {benchmark.name: benchmark for benchmark in (MMAU, MMAR, MMSU, ADQA, MMAU_PRO)}
