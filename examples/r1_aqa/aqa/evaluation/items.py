"""Read and check a benchmark's questions, write its result files; nothing here needs a model."""

from __future__ import annotations

import hashlib
import io
import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from aqa.audio.sandbox import escape_of
from aqa.common.console import say, several
from aqa.common.files import naming_file, write_atomically
from aqa.data.formats import AUDIO_MCQ, DCASE, R1_AQA, format_of
from aqa.data.formats import MMAU as MMAU_FIELDS
from aqa.data.formats import MMSU as MMSU_FIELDS
from aqa.data.parquet import read_questions
from aqa.data.prompts import render_prompt
from aqa.data.rows import (
    AvqaError,
    Record,
    as_question,
    counts_from_one,
    is_whole,
    parse_records,
    show_value,
)
from aqa.data.tables import records_of
from aqa.evaluation.benchmarks import ADQA, BENCHMARKS, MMAR, MMAU, MMAU_PRO, MMSU, Benchmark
from aqa.rewards.choices import find_choice, is_right

MAX_DEPTH = 50  # of a row; Python's json reads deeper ones than it writes


class EvalError(ValueError):
    """A mistake that the user can correct; the message names the place, the value and the remedy."""


@dataclass(frozen=True)
class Item:
    index: int  # its place in the file, from 0; --option_orders and --silent_audio also add further numbers for repeats
    label: str  # its name in messages
    row: dict[str, Any]  # all its fields
    prompt: str  # the text of the user's turn, as in training
    audio: Path
    gold: str | None  # text of the right choice; None on all items where the file withholds the answers
    further: tuple[Path, ...] = ()  # recordings beyond the first
    silent: bool = False  # ask with silence in place of the recording


def read_rows(
    path: Path, wanted: str = "auto", audio_dir: Path | None = None
) -> tuple[Benchmark, list[dict[str, Any]]]:
    """Read a benchmark or result file: JSON, JSON lines or a table (:mod:`aqa.data.tables`), told apart by content.

    Rows of R1-AQA and AudioMCQ, which are no benchmark, become questions in MMAU's format, and so do rows of one's own
    and the parquet files of ``avqa.py``.

    :param wanted: Name of the benchmark, or ``auto``: by the fields of the rows.
    :param audio_dir: Where sound inside a table is written; None: refuse it.
    :return: The benchmark and the file's rows.
    :raises EvalError: if the file is missing, malformed, empty, or of no benchmark.
    """
    try:
        if path.suffix == ".parquet" and path.is_file() and (questions := read_questions(path)):
            return MMAU, questions
        records = records_of(path, audio_dir)
    except OSError as error:
        raise EvalError(f"{error.filename or path}: {error.strerror or error}") from error
    except AvqaError as error:
        raise EvalError(str(error)) from error
    if wanted in ("auto", "mmau") and is_own(records):
        return MMAU, own_questions(path, records)
    problems = [
        f"line {record.line}: {record.error or f'{show_value(record.value)} is no JSON object'}"
        for record in records
        if record.error is not None or not isinstance(record.value, dict)
    ]
    problems += [
        f"line {record.line}: nested deeper than {MAX_DEPTH} levels"
        for record in records
        if isinstance(record.value, dict) and is_deep(record.value)
    ]
    if problems:
        raise EvalError(several(f"{path}: {len(problems)} of {len(records)} rows cannot be read", problems))
    rows = [record.value for record in records]
    if not rows:
        raise EvalError(f"{path}: no rows")
    benchmark = find_benchmark(path, rows, wanted)
    if benchmark is not None:
        asked = [benchmark.as_question(row) for row in rows if benchmark.asked(row)]
        if not asked:
            raise EvalError(f"{path}: none of {len(rows)} rows is one of the {benchmark.title}")
        return benchmark, asked
    return MMAU, [format_of(rows).as_question(row) for row in rows]


def find_benchmark(path: Path, rows: Sequence[dict[str, Any]], wanted: str) -> Benchmark | None:
    """The benchmark whose fields a file has; None for rows that must be made questions of MMAU's first.

    :param wanted: As for :func:`read_rows`.
    :raises EvalError: if no benchmark has these fields, or not the wanted one.
    """
    fields, first = format_of(rows), rows[0]
    if wanted in ("auto", MMAU_PRO.name) and isinstance(first.get(MMAU_PRO.audio_key), list):
        return MMAU_PRO
    found = {MMSU_FIELDS: MMSU, DCASE: ADQA}.get(fields)
    if found is not None and wanted in ("auto", found.name):
        return found
    # MMAR's questions have the fields of AudioMCQ but for the name of the data set
    is_mmar = wanted == "mmar" or (fields is AUDIO_MCQ and fields.dataset not in first)
    if fields.question in first and not is_mmar and fields is not MMAU_FIELDS:
        if wanted in ("auto", "mmau"):
            return None
    elif wanted in ("mmau", "mmar"):
        return BENCHMARKS[wanted]
    if wanted != "auto":
        named = BENCHMARKS[wanted]
        lacking = [name for name in (named.fields.question, *named.fields.choices[:2]) if name not in first]
        raise EvalError(f"{path}: --benchmark {wanted}: no rows of {named.title}; the first lacks {', '.join(lacking)}")
    matching = [benchmark for benchmark in (MMAU, MMAR) if benchmark.audio_key in first]
    if len(matching) == 1:
        known = {
            matching[0].fields.question,
            *matching[0].prediction_keys,
        }  # answers to be scored may lack the question
        if any(known & set(row) for row in rows):
            return matching[0]
    keys = " or ".join(f"{b.audio_key} ({b.title})" for b in (MMAU, MMAR))
    raise EvalError(
        f"{path}: cannot tell the benchmark from the first row, whose fields are "
        f"{', '.join(key if key.isprintable() else ascii(key) for key in first)}; expected question, choices and "
        f"{keys}, which --benchmark tells apart, or as avqa.py reads them: question_text, multi_choice, audio_path"
    )


def is_own(records: Sequence[Record]) -> bool:
    """Whether rows are R1-AQA's or one's own. DCASE's have the same fields and the name of their data set, and results
    of older versions a prediction; answers that are letters or withheld are no rows that ``avqa.py`` takes."""
    rows = [record.value for record in records if isinstance(record.value, dict)]
    fields, further = format_of(rows), (DCASE.dataset, *ADQA.prediction_keys)
    if fields is not DCASE or any(row.get(name) is not None for row in rows for name in further):
        return fields is R1_AQA and any(R1_AQA.question in row for row in rows)
    return not parse_records(list(records), enable_think=False)[1]


def own_questions(path: Path, records: list[Record]) -> list[dict[str, Any]]:
    """The rows that ``avqa.py`` trains on, as questions in MMAU's format; the others are left out with a warning.

    :raises EvalError: if none is left, or they seem to count their choices from 1.
    """
    if doubt := counts_from_one(records):
        raise EvalError(f"{path}: {doubt}. Subtract 1, or evaluate what avqa.py --answers_from 1 writes")
    rows, problems = parse_records(records, enable_think=False)
    if problems:
        lines = [f"line {problem.line}: {problem.kind}: {problem.reason}" for problem in problems]
        message = several(f"{path}: {len(lines)} of {len(records)} rows cannot be used", lines)
        if not rows:
            raise EvalError(message)
        say(f"WARNING: {message}\nthey are not asked, as they are not trained on")
    return [as_question(row, row.audio_name) for row in rows]


def is_deep(value: Any) -> bool:
    """Whether a JSON value is nested deeper than :data:`MAX_DEPTH`."""
    level = [value]
    for _ in range(MAX_DEPTH):
        level = [
            inner
            for outer in level
            if isinstance(outer, (dict, list))
            for inner in (outer.values() if isinstance(outer, dict) else outer)
        ]
        if not level:
            return False
    return True


def make_items(
    rows: Sequence[dict[str, Any]],
    benchmark: Benchmark,
    audio_dir: Path,
    think: bool,
    confine: bool = False,
    limit: int | None = None,
) -> list[Item]:
    """Check every question and render its prompt. Where no row has an id, their numbers are their ids.

    :param audio_dir: Folder of the recordings.
    :param think: Ask for the thinking process.
    :param confine: Refuse recordings outside the folder, links and ``..`` resolved.
    :param limit: Make only the first questions; how answers are to be read is seen from all rows.
    :raises EvalError: naming all rows that cannot be asked, or not be scored.
    """
    if all(row.get("id") is None for row in rows):  # as avqa.py numbers them
        rows = [row | {"id": number} for number, row in enumerate(rows, 1)]
    answers = answer_texts(rows)
    has_answers = any(answer is not None for answer in answers)
    problems, items = [], []
    for index, (row, answer) in enumerate(list(zip(rows, answers, strict=True))[:limit]):
        label = f"item {index + 1} (id {name_of(row)})"
        choices, question, name = row.get("choices"), row.get("question"), row.get(benchmark.audio_key)
        names = name if isinstance(name, list) and name else [name]
        wrong = []
        if not isinstance(question, str) or not question.strip():
            wrong.append(f"question is {show_value(question)}")
        if not isinstance(choices, list) or not choices or not all(isinstance(choice, str) for choice in choices):
            wrong.append(f"choices is {show_value(choices)}, expected a list of texts")
        if not all(isinstance(name, str) and name.strip() and "\0" not in name for name in names):
            wrong.append(f"{benchmark.audio_key} is {show_value(name)}, expected the path of a file")
        if has_answers and (not isinstance(answer, str) or is_blank(answer)):
            hint = "though other items have one" if is_blank(answer) else "expected the text of a choice"
            wrong.append(f"answer is {show_value(row.get('answer'))}, {hint}")
        if not wrong and (torn := next((text for text in (question, *names, *choices) if not fits_utf8(text)), None)):
            wrong.append(f"half a surrogate pair in {show_value(torn)}, which no tokenizer takes")
        files = [] if wrong else [find_audio(name, audio_dir) for name in names]
        for name, file in zip(names, files, strict=False):
            if confine and (where := escape_of(file, audio_dir)):
                place = f"leads to {where}, outside --audio_dir {audio_dir}"
                wrong.append(f"{benchmark.audio_key} {show_value(name)} {place}")
        if wrong:
            problems.append(f"{label}: {'; '.join(wrong)}")
        else:
            row = row | {"answer": answer} if has_answers else row
            prompt = render_prompt(question, choices, think)
            items.append(Item(index, label, row, prompt, files[0], answer, tuple(files[1:])))
    if problems:
        raise EvalError(several(f"{len(problems)} of {len(rows[:limit])} questions cannot be used", problems))
    return items


def answer_texts(rows: Sequence[dict[str, Any]]) -> list[Any]:
    """The answer of each row as the text of the right choice, which the official scripts compare.

    Answers that all are numbers of choices, from 0, become the choices' texts, and so does a text that only names a
    choice, such as "B". Answers that are withheld become None: blank ones, and a value such as "?" or -1 that all rows
    have and that is no choice.

    :raises EvalError: if the answers are numbers that count from 1.
    """
    lists = [choices if isinstance(choices := row.get("choices"), list) else [] for row in rows]
    answers = [
        None if is_blank(answer := row.get("answer")) and answer not in choices else answer
        for row, choices in zip(rows, lists, strict=True)
    ]
    given = [answer for answer in answers if answer is not None]
    pairs = list(zip(answers, lists, strict=True))
    if len(set(map(str, given))) == 1 and not any(a is not None and names_choice(a, choices) for a, choices in pairs):
        return [None] * len(rows)
    if doubt := counts_from_one([Record(0, {"multi_choice": choices, "answer": a}) for a, choices in pairs]):
        raise EvalError(f"item answers: {doubt}. Subtract 1, or write the texts of the choices")
    if all(is_whole(answer) and 0 <= answer < len(choices) for answer, choices in pairs):
        return [choices[int(answer)] for answer, choices in pairs]
    return [choice_of(a, choices) or a if isinstance(a, str) else a for a, choices in pairs]


def choice_of(answer: str, choices: list[Any]) -> str | None:
    """The answer itself where some choice is right by it, else the choice that it names."""
    texts = [choice for choice in choices if isinstance(choice, str)]
    if answer in texts or any(is_right(choice, answer, texts) for choice in texts):
        return answer
    return find_choice(answer.strip(), texts)


def names_choice(answer: Any, choices: list[Any]) -> bool:
    """Whether an answer is the number of a choice, from 0, or a text that names one."""
    if isinstance(answer, str):
        return choice_of(answer, choices) is not None
    return is_whole(answer) and 0 <= answer < len(choices)


def is_blank(answer: Any) -> bool:
    """Whether an answer says nothing."""
    return answer is None or (isinstance(answer, str) and not answer.strip())


def name_of(row: dict[str, Any]) -> str:
    """A row's id, for messages."""
    identity = row.get("id", "none")
    return identity if isinstance(identity, str) and identity.isprintable() and identity else show_value(identity)


def fits_utf8(text: str) -> bool:
    """Whether a text can be encoded in UTF-8, which halves of surrogate pairs (from JSON escapes) cannot."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def find_audio(name: str, audio_dir: Path) -> Path:
    """The path of a recording: what the question names, else the longest end of that path that the folder holds.

    :param name: As the question names it, such as ``./test-mini-audios/ID.wav``, or where the recording was once.
    :return: If no such file exists, the path that the question names.
    """
    parts = Path(name).parts
    paths = [audio_dir / name, *(audio_dir.joinpath(*parts[i:]) for i in range(1, len(parts)))]
    # not Path.exists, which raises for a name that is too long
    return next((path for path in paths if os.path.exists(path)), paths[0])


def result_rows(
    items: Iterable[Item], answers: Iterable[tuple[str, str]], benchmark: Benchmark, silent_audio: bool
) -> list[dict[str, Any]]:
    """Rows of the result file: all fields of the question, the prediction under every key in use, the raw response.

    :param answers: Prediction and raw response of each item.
    :param silent_audio: Mark the rows, because the model heard silence.
    """
    mark = {"silent_audio": True} if silent_audio else {}
    return [
        benchmark.answered(item.row, prediction, raw) | {"raw_output": raw} | mark
        for item, (prediction, raw) in zip(items, answers, strict=True)
    ]


def write_rows(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Write a result file in one piece: parquet or JSON lines by the path's suffix, else a JSON array.

    JSON is pure ASCII, because the official scripts open it in the encoding of the machine's locale.
    """
    if path.suffix == ".parquet":
        import pyarrow as pa
        import pyarrow.parquet as pq

        file = io.BytesIO()
        names = list(dict.fromkeys(name for row in rows for name in row))  # pyarrow would take the first row's alone
        whole = [{name: None if row.get(name) == {} else row.get(name) for name in names} for row in rows]
        table = pa.Table.from_pylist(whole)
        pq.write_table(table, file)
        return write_atomically(path, file.getvalue())
    if path.suffix == ".jsonl":
        text = "".join(json.dumps(row) + "\n" for row in rows)
    else:
        text = json.dumps(rows, indent=2) + "\n"
    write_atomically(path, text)


class PartialFile:
    """Finished responses of a run that has not ended: JSON lines, appended and flushed as they come.

    The first line holds what the responses depend on (model, data, prompt, engine), and every other line a hash of it,
    so that a run with other settings does not continue them. A last line that a kill has cut is dropped, and its item
    is asked again.

    :param identity: What the responses depend on; its values are texts, numbers or lists of texts.
    """

    def __init__(self, path: Path, identity: dict[str, Any]) -> None:
        self.path = path
        self.identity = json.loads(json.dumps(identity))  # as load() will read it
        self.key = hashlib.sha256(json.dumps(self.identity).encode()).hexdigest()[:12]

    def load(self) -> dict[int, Any]:
        """Read what an earlier run finished, and cut off a torn last line.

        :return: Raw response, or a list of several, by item index.
        :raises EvalError: if the file belongs to a run with other settings.
        """
        if not self.path.exists():
            return {}
        whole, _, torn = self.path.read_bytes().rpartition(b"\n")
        if torn:
            os.truncate(self.path, len(whole) + 1 if whole else 0)
        try:
            lines = [json.loads(line) for line in whole.splitlines()]
        except ValueError as error:
            raise EvalError(f"{self.path}: damaged ({error}); give --overwrite to drop it") from error
        if not lines:
            return {}
        torn = [line for line in lines[1:] if not self._is_response(line)]
        if torn or not isinstance(lines[0], dict):
            raise EvalError(f"{self.path}: damaged ({show_value((torn or lines)[0])}); give --overwrite to drop it")
        differing = [key for key in self.identity if lines[0].get(key) != self.identity[key]]
        if differing:
            details = [f"{key}: {lines[0].get(key)!r} then, {self.identity[key]!r} now" for key in differing]
            raise EvalError(
                several(f"{self.path}: {len(lines) - 1} responses of an unfinished run with other settings", details)
                + "\nRepeat that run's flags to finish it, or give --overwrite to drop it."
            )
        foreign = [line["index"] for line in lines[1:] if line.get("of") != self.key]
        if foreign and not any("of" in line for line in lines[1:]):
            raise EvalError(
                f"{self.path}: an earlier version wrote it, which did not note whose the responses are; give "
                "--overwrite to ask all anew"
            )
        if foreign:
            raise EvalError(
                f"{self.path}: damaged: {len(foreign)} of {len(lines) - 1} responses are of another model or of "
                f"other settings (index {foreign[0]}); give --overwrite to ask all anew"
            )
        return {line["index"]: line["raw_output"] for line in lines[1:]}

    @staticmethod
    def _is_response(line: Any) -> bool:
        if not isinstance(line, dict) or not isinstance(line.get("index"), int):
            return False
        said = line.get("raw_output")
        return isinstance(said, str) or (isinstance(said, list) and all(isinstance(text, str) for text in said))

    def append(self, responses: Iterable[tuple[int, Any]]) -> None:
        """Add finished responses: item index and raw response, or a list of several."""
        new = not self.path.exists() or self.path.stat().st_size == 0
        lines = [{"index": index, "raw_output": raw, "of": self.key} for index, raw in responses]
        with naming_file(self.path), self.path.open("ab") as file:
            file.write("".join(json.dumps(line) + "\n" for line in ([self.identity] if new else []) + lines).encode())

    def remove(self) -> None:
        """Delete the file, if it is there."""
        self.path.unlink(missing_ok=True)


def digest(path: Path) -> str:
    """SHA-256 of a file, or of those of a folder."""
    if path.is_dir():
        inner = [f"{file.relative_to(path)} {digest(file)}\n" for file in sorted(path.rglob("*")) if file.is_file()]
        return hashlib.sha256("".join(inner).encode()).hexdigest()
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
