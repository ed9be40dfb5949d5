"""From the bytes of an AVQA file to checked rows, and from rows to a split. Nothing here touches a disk.

A file is JSON lines or one JSON array, told apart by its first character; how its rows name their fields is a matter
of :mod:`aqa.data.formats`. The rows of the raw AVQA file name a video and no audio file.
"""

import hashlib
import json
import math
import os
import re
import reprlib
import shlex
from collections import Counter
from typing import NamedTuple

from aqa.common.console import several
from aqa.data.formats import Format, format_of, make_question
from aqa.data.prompts import prompt_problem, render_prompt

_ABSENT = (None, "")
NOT_UTF8 = "not UTF-8; convert the file: iconv -f WINDOWS-1252 -t UTF-8 IN > OUT"
ROW = (
    '{"question_text": "Low or high?", "multi_choice": ["low", "high"], "answer": "low", "audio_path": "a.wav"}, or '
    "like a line of a table (CSV, TSV, parquet) with these columns"
)
_UTF8_BOM = b"\xef\xbb\xbf"
_UTF16_BOMS = (b"\xff\xfe", b"\xfe\xff")
_OTHER_FILES = {
    b"PAR1": "a parquet file. If MMAU's sound is in it, this writes the questions and the sound as files: "
    "python examples/r1_aqa/data_preprocess/get_data.py mmau --questions {} --out_dir data/mmau",
    b"PK\x03\x04": "a zip archive; unpack it",
    b"\x1f\x8b": "compressed by gzip; unpack it: gzip -d",
}
_JSON_SPACE = re.compile(r"[ \t\r\n]*")
# <youtube id>_<start second, zero padded>; the id itself may hold "_" and "-".
_VIDEO_NAME = re.compile(r"([^/\\\s\0]+)_([0-9]{1,9})")
_REPR = reprlib.Repr()
_REPR.maxstring = _REPR.maxother = 80  # enough to recognise a row by, little enough for one line on a screen


class AvqaError(ValueError):
    """The input or the settings cannot be used; the message names the place and the remedy."""


class RowError(ValueError):
    """One row cannot be used.

    :param kind: Short name of the reason, under which such rows are counted.
    :param reason: The offending value and what is wrong with it.
    """

    def __init__(self, kind: str, reason: str) -> None:
        super().__init__(reason)
        self.kind = kind
        self.reason = reason


class Record(NamedTuple):
    """One row as it stands in the file: ``line`` counts from 1, ``error`` is set where the JSON is malformed."""

    line: int
    value: object
    error: str | None = None


class _Ambiguous(dict):
    """A JSON object in which a key occurs twice; Python by itself would silently take the last value."""

    twice: str


def _object(pairs: list[tuple[str, object]]) -> dict:
    """Make a JSON object, marked if a key occurs twice."""
    value = dict(pairs)
    if len(value) == len(pairs):
        return value
    value = _Ambiguous(pairs)
    value.twice = Counter(key for key, _ in pairs).most_common(1)[0][0]
    return value


def _record(line: int, value: object) -> Record:
    """Make a record, malformed if a key occurs twice in it."""
    if isinstance(value, _Ambiguous):
        return Record(line, None, f"the key {show_value(value.twice)} occurs twice; which value is meant?")
    return Record(line, value)


class Row(NamedTuple):
    """One usable row. ``index`` counts the file's rows from 0; ``choices`` and ``gold`` are text, as R1-AQA prints.
    ``group`` is the value of the field that rows are split by, ``thinking`` that of ``--thinking_field``, or empty."""

    line: int
    index: int
    id: int | str
    question: str
    choices: list[str]
    answer_idx: int
    gold: str
    dataset_name: str
    question_type: str
    audio_name: str
    prompt: str
    group: str = ""
    thinking: str = ""


class Problem(NamedTuple):
    """What is wrong with one row of the input."""

    line: int
    index: int
    id: int | str | None
    kind: str
    reason: str


def read_records(data: bytes, source: str) -> list[Record]:
    """Cut a file into rows, each with its line number. Blank lines are no rows.

    :param data: The file, UTF-8 with or without a byte-order mark.
    :param source: Name of the file, for messages.
    :return: The rows in file order; a malformed line is a record with an ``error``.
    :raises AvqaError: for UTF-16, parquet, an archive or another file that is no text, and for a broken JSON array,
        because nobody knows where its further rows begin.
    """
    if data.startswith(_UTF16_BOMS):
        raise AvqaError(f"{source}: the file is UTF-16, expected UTF-8; convert it: iconv -f UTF-16 -t UTF-8 IN > OUT")
    for start, what in _OTHER_FILES.items():
        if data.startswith(start):
            raise AvqaError(f"{source}: is {what.format(shlex.quote(source))}")
    if b"\0" in data[:1024]:
        raise AvqaError(f"{source}: is no text, but perhaps a recording; expected is a file of rows such as {ROW}")
    data = data.removeprefix(_UTF8_BOM)
    if re.match(rb"\s*\[", data):
        records = _read_array(data, source)
        if records is not None:
            return records
    return _read_lines(data)


def _read_lines(data: bytes) -> list[Record]:
    """Read JSON lines: one record for each line that is not blank."""
    records = []
    # bytes.splitlines cuts at \n, \r\n and \r only; str.splitlines would also cut at U+2028 inside a question.
    for number, raw in enumerate(data.splitlines(), start=1):
        if not raw or raw.isspace():
            continue
        try:
            records.append(_record(number, json.loads(raw.decode("utf-8"), object_pairs_hook=_object)))
        except UnicodeDecodeError as error:
            records.append(Record(number, None, f"byte {raw[error.start]:#04x} at {error.start}: {NOT_UTF8}"))
        except RecursionError:
            records.append(Record(number, None, "nested too deeply"))
        except ValueError as error:  # JSONDecodeError, and an integer of more digits than Python converts
            records.append(Record(number, None, f"{error}: {_REPR.repr(raw.decode('utf-8'))}"))
    return records


def _read_array(data: bytes, source: str) -> list[Record] | None:
    """Read a JSON array row by row, so that every row knows its line.

    :return: The rows, or None where the array ends on the first line and more follows: these are JSON lines.
    :raises AvqaError: where the array is not well-formed.
    """
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise AvqaError(f"{source}, line {line}: {NOT_UTF8}") from error

    records: list[Record] = []
    decoder = json.JSONDecoder(object_pairs_hook=_object)
    skip = _JSON_SPACE.match
    opening = text.index("[")
    position = skip(text, opening + 1).end()
    line, counted = 1, 0
    closed = text.startswith("]", position)
    while not closed:
        line, counted = line + text.count("\n", counted, position), position
        try:
            value, position = decoder.raw_decode(text, position)
        except (ValueError, RecursionError) as error:
            found = _REPR.repr(text[position : position + 60])
            raise AvqaError(_broken_array(source, line, len(records), f"{found} is no JSON value ({error})")) from error
        records.append(_record(line, value))
        position = skip(text, position).end()
        closed = text.startswith("]", position)
        if not closed and not text.startswith(",", position):
            what = "the array is not closed" if position >= len(text) else f"',' or ']' expected at {text[position]!r}"
            line += text.count("\n", counted, position)
            raise AvqaError(_broken_array(source, line, len(records), what))
        if not closed:
            position = skip(text, position + 1).end()

    end = skip(text, position + 1).end()
    if end == len(text):
        return records
    if "\n" not in text[opening:position]:
        return None
    line += text.count("\n", counted, end)
    raise AvqaError(_broken_array(source, line, len(records), f"{text[end : end + 20]!r} follows the array's end"))


def _broken_array(source: str, line: int, rows: int, what: str) -> str:
    """The message about an array that breaks in a line, after so many whole rows, with the remedy."""
    return (
        f"{source}, line {line}: {what}, after {rows} whole rows. The file begins with '[', so it is read as one JSON "
        f"array. Download it again or repair it there; JSON lines must hold one object a line and no '[' line."
    )


def counts_from_one(records: list[Record]) -> str | None:
    """A sentence about a file whose answers count the choices from 1, not from 0; None about any other.

    They do where no answer is 0, and at least two, and a tenth of all, equal the number of their choices.
    """
    rows = [record.value for record in records if isinstance(record.value, dict)]
    answers = [
        (answer, len(row["multi_choice"]))
        for row in rows
        if isinstance(row.get("multi_choice"), list) and is_whole(answer := row.get("answer"))
    ]
    last = sum(answer == choices for answer, choices in answers)
    if last < max(2, len(answers) / 10) or any(answer == 0 for answer, _ in answers):
        return None
    return (
        f"no answer of {len(answers)} is 0, and {last} equal the number of their choices: they seem to count the "
        "choices from 1, though the number of a choice, from 0, is expected"
    )


def parse_records(records: list[Record], enable_think: bool, answers_from: int = 0) -> tuple[list[Row], list[Problem]]:
    """Check every row; each record ends up in exactly one of the two lists.

    :param enable_think: Ask for ``<think>`` in the prompt.
    :param answers_from: The number of the first choice, 0 or 1.
    :return: The usable rows and the problems of the others, both in file order.
    """
    rows: list[Row] = []
    problems: list[Problem] = []
    first_line: dict[str, int] = {}
    fields = format_of(record.value for record in records)
    numbered = not any(isinstance(record.value, dict) and record.value.get("id") is not None for record in records)
    for index, record in enumerate(records):
        try:
            row = parse_record(record, index, enable_think, answers_from, fields, numbered)
            key = str(row.id)  # 7 and "7" are one id: where both occur, the column is text and they would be equal
            if key in first_line:
                raise RowError("duplicate_id", f"id {show_value(row.id)} was used before, on line {first_line[key]}")
            first_line[key] = row.line
        except RowError as error:
            problems.append(Problem(record.line, index, _id_of(record.value), error.kind, error.reason))
        else:
            rows.append(row)
    return rows, problems


def parse_record(
    record: Record, index: int, enable_think: bool, answers_from: int, fields: Format, numbered: bool
) -> Row:
    """Check one row and word its prompt.

    :param index: Its number in the file, from 0.
    :param enable_think: Ask for ``<think>`` in the prompt.
    :param answers_from: The number of the first choice, 0 or 1.
    :param fields: The format of the file.
    :param numbered: No row of the file has an id, and they have their numbers instead.
    :raises RowError: where a field is missing or has a value that cannot be used.
    """
    value = record.value
    if record.error is not None:
        raise RowError("malformed_json", record.error)
    if not isinstance(value, dict):
        raise RowError("not_an_object", f"the row is {show_value(value)}, expected a JSON object")
    identity = index + 1 if numbered else value.get("id")
    question, answer = value.get(fields.question), value.get(fields.answer)
    audio_path, video_name, choices = value.get(fields.audio), value.get("video_name"), fields.choices_of(value)
    no_audio = audio_path in _ABSENT and video_name in _ABSENT
    if no_audio or identity is None or question is None or choices is None or answer is None:
        missing = ["id"] if identity is None else []
        missing += [n for n in (fields.question, *fields.choices, fields.answer) if value.get(n) is None]
        missing += [f"{fields.audio} (or video_name)"] if no_audio else []
        held = ", ".join(show_value(name) for name in value if name != "id")  # tables without ids get some
        remedy = "" if fields.question in value else "; rename its fields, or the columns of the table"
        raise RowError("missing_field", f"no {', '.join(missing)}; the row has {held}{remedy}")

    if not isinstance(question, str) or not question.strip():
        raise RowError("bad_question", f"{fields.question} is {show_value(question)}, expected text")
    choices = _check_choices(choices, fields.choices[0])
    # str() and the list's repr are what R1-AQA's format strings do: null reads as None, 3 as 3, in prompt and gold.
    texts = list(map(str, choices))
    find = _find_text if fields.by_text else _check_answer
    answer_idx = find(answer, texts, answers_from)
    gold = texts[answer_idx]
    if not gold.strip():
        raise RowError("bad_choice", f"the answer, choice {answer_idx}, is blank: {show_value(gold)}")
    row = Row(
        line=record.line,
        index=index,
        id=_check_id(identity),
        question=question,
        choices=texts,
        answer_idx=answer_idx,
        gold=gold,
        dataset_name=_check_name(fields.dataset, value) or ("AVQA" if video_name else fields.title),
        question_type=_check_name(fields.kind, value),
        audio_name=wav_name_of_video(video_name)
        if audio_path in _ABSENT
        else _check_audio_path(audio_path, fields.audio),
        prompt=render_prompt(question, choices, enable_think),
    )
    try:
        "".join((question, *texts, row.dataset_name, row.question_type, row.audio_name, str(row.id))).encode("utf-8")
    except UnicodeEncodeError as error:
        raise RowError("bad_text", f"half a surrogate pair, {error.object[error.start]!a}, cannot be stored") from error
    if problem := prompt_problem(row.prompt):
        raise RowError("control_token", f"{problem}: {show_value(row.prompt)}")
    return row


def as_question(row: Row, audio: str) -> dict:
    """A row as one of MMAU's questions, which ``eval_mmau.py`` reads.

    :param audio: Path of its recording.
    """
    return make_question(str(row.id), audio, row.question, row.gold, row.question_type, row.choices, row.dataset_name)


def wav_name_of_video(video_name: str) -> str:
    """Name of the audio file of a raw AVQA row: ``-HG3Omg_89c_000030`` becomes ``-HG3Omg_89c_30.wav``.

    :param video_name: YouTube id, ``_``, start in seconds (zero padded).
    :raises RowError: for any other form.
    """
    match = _VIDEO_NAME.fullmatch(video_name) if isinstance(video_name, str) else None
    if match is None:
        raise RowError(
            "bad_video_name", f"video_name is {show_value(video_name)}, expected <id>_<second>; or give an audio_path"
        )
    return f"{match[1]}_{int(match[2])}.wav"


def read_field(rows: list[Row], records: list[Record], field: str, flag: str, into: str) -> list[Row]:
    """Rows with the value of a further field of the file.

    :param records: The file that the rows are from.
    :param field: Name of the field; its values are text, numbers or booleans.
    :param flag: That names the field, for the message.
    :param into: Field of :class:`Row`.
    :raises AvqaError: naming the rows that lack it.
    """
    values = [records[row.index].value.get(field) for row in rows]
    texts = list(map(_text_of, values))
    lines = [
        f"line {row.line}: {field} is {show_value(value)}"
        for row, value, text in zip(rows, values, texts, strict=True)
        if not text
    ]
    if lines:
        fields = f"the fields of line {rows[0].line} are {', '.join(map(show_value, records[rows[0].index].value))}"
        title = f"{flag} {field}: {len(lines)} of {len(rows)} rows have no text or number there ({fields})"
        raise AvqaError(several(title, lines, 3))
    return [row._replace(**{into: text}) for row, text in zip(rows, texts, strict=True)]


def _text_of(value: object) -> str:
    """A value as text, the same however a file writes it (1, 1.0, "1 "); empty if it is none."""
    if not isinstance(value, (str, int, float)) or (isinstance(value, float) and not math.isfinite(value)):
        return ""
    text = str(int(value) if is_whole(value) else value).strip()
    return text.encode("utf-8", "replace").decode("utf-8")  # half a surrogate pair cannot be stored


def join_groups(groups: list[str], clips: list[str]) -> list[str]:
    """Make groups that have a clip in common one group, so that a split between groups never divides a clip's rows.

    :param groups: The group of every row.
    :param clips: The clip of every row.
    :return: A name for the joined group of every row: the least of its groups' names.
    """
    joined = {group: group for group in groups}

    def root(group: str) -> str:
        while joined[group] != group:
            group = joined[group]
        return group

    first: dict[str, str] = {}
    for group, clip in zip(groups, clips, strict=True):
        kept, other = sorted((root(group), root(first.setdefault(clip, group))))
        joined[other] = kept
    return [root(group) for group in groups]


def split_by_clip(
    clips: list[str], val_ratio: float, seed: int, field: str | None = None
) -> tuple[list[int], list[int]]:
    """Choose the validation rows clip by clip, so that no clip is heard in both parts, or group by group.

    Clips are ranked by a hash of seed and file name, which depends neither on the order of the rows nor on where the
    audio lies, and taken while they fit. The validation part does not exceed ``round(rows * val_ratio)`` rows; groups,
    which may be large, exceed it where that comes closer to it or leaves the part not empty.

    :param clips: The audio file of every row, or its group.
    :param val_ratio: Wanted share of validation rows, 0 <= val_ratio < 1; 0 leaves them all in training.
    :param field: What the groups are of (``--split_by``); None: clips are not grouped.
    :return: Row numbers of the training and of the validation part, both ascending.
    :raises AvqaError: if either part would be empty.
    """
    if val_ratio == 0:
        return list(range(len(clips))), []
    keys = [os.path.normpath(clip) for clip in clips] if field is None else clips
    sizes = Counter(keys)
    target = round(len(keys) * val_ratio)

    def rank(clip: str) -> tuple[bytes, str]:
        return hashlib.sha256(f"{seed}:{os.path.basename(clip)}".encode()).digest(), clip

    chosen: set[str] = set()
    room = target
    ranked = sorted(sizes, key=rank)
    for clip in ranked:
        if sizes[clip] <= room:
            chosen.add(clip)
            room -= sizes[clip]
        if room == 0:
            break
    left = [clip for clip in ranked if clip not in chosen]
    if field and len(left) > 1 and (not chosen or min(map(sizes.get, left)) < 2 * room):
        chosen.add(min(left, key=sizes.__getitem__))
    if field and len(sizes) == 1:
        raise AvqaError(
            f"--split_by {field}: all {len(keys)} rows are one group, by the same {field} or by shared clips, so none "
            "can be held out; name another field"
        )
    if not chosen or len(chosen) == len(sizes):
        part = "validation" if not chosen else "training"
        raise AvqaError(
            f"--val_ratio {val_ratio}: of {len(keys)} rows on {len(sizes)} clips, {target} would be for validation, "
            f"which leaves the {part} part empty (a clip is never cut in two). Choose another ratio, or 0 for no split"
        )
    validation = [number for number, key in enumerate(keys) if key in chosen]
    return [number for number, key in enumerate(keys) if key not in chosen], validation


def _check_choices(choices: object, field: str) -> list:
    """The choices, if they are a list of text, finite numbers, booleans or null with at least two members.

    :raises RowError: otherwise.
    """
    if not isinstance(choices, list):
        raise RowError("bad_choice", f'{field} is {show_value(choices)}, expected a list such as ["low", "high"]')
    if len(choices) < 2:
        raise RowError("too_few_choices", f"{field} is {show_value(choices)}, expected at least two choices")
    for number, choice in enumerate(choices):
        if isinstance(choice, str):
            continue
        if isinstance(choice, float) and not math.isfinite(choice):
            raise RowError("bad_choice", f"choice {number} is {choice}, which is no number")
        if isinstance(choice, (list, dict)):
            raise RowError("bad_choice", f"choice {number} is {show_value(choice)}, expected text, a number or null")
    return choices


def is_whole(value: object) -> bool:
    """Whether a value is a whole number; a table that once held a gap gives 1.0 for 1."""
    # bool is an int to Python, but no number to anybody
    return value.is_integer() if isinstance(value, float) else isinstance(value, int) and not isinstance(value, bool)


def _check_answer(answer: object, choices: list[str], first: int) -> int:
    """The number of the right choice, from 0.

    :param first: What the answer counts from.
    :raises RowError: unless it is a whole number within the choices. Text is refused even if it looks like a number:
        where the choices are numbers, it could as well be the answer itself.
    """
    if not is_whole(answer):
        hint = "; answers may be texts if all are, and some are not of digits alone: '2' may be a choice or its number"
        hint = hint if isinstance(answer, str) else ""
        expected = f"expected the number of a choice, from {first}{hint}"
        raise RowError("bad_answer", f"answer is {show_value(answer)}, {expected}")
    if not 0 <= answer - first < len(choices):
        last = len(choices) - 1 + first
        raise RowError("answer_out_of_range", f"answer is {show_value(answer)}, but the choices are {first} to {last}")
    return int(answer) - first


def _find_text(answer: object, choices: list[str], first: int) -> int:
    """The number of the choice, from 0, that has the answer's text; case and spaces count only where several have it.

    :param first: What the numbers in messages count from.
    :raises RowError: unless it is the text of one choice.
    """
    if not isinstance(answer, str):
        expected = f"expected the text of a choice, one of {show_value(choices)}"
        raise RowError("bad_answer", f"answer is {show_value(answer)}, {expected}")
    found = [number for number, choice in enumerate(choices) if choice == answer]
    folded = answer.casefold().split()
    found = found or [number for number, choice in enumerate(choices) if choice.casefold().split() == folded]
    if len(found) == 1:
        return found[0]
    what = f"the text of choices {' and '.join(str(number + first) for number in found)}" if found else "no choice"
    raise RowError("bad_answer", f"answer is {show_value(answer)}, which is {what} of {show_value(choices)}")


def _check_id(identity: object) -> int | str:
    """The id, whole numbers as int.

    :raises RowError: unless it is a whole number or text.
    """
    if isinstance(identity, float) and identity.is_integer():
        return int(identity)
    if isinstance(identity, bool) or not isinstance(identity, (int, str)) or identity == "":
        raise RowError("bad_id", f"id is {show_value(identity)}, expected a whole number or text")
    return identity


def _check_name(field: str, row: dict) -> str:
    """The name of the data set, or the kind of question, which a row may lack; empty if there is none.

    :raises RowError: if it is not text.
    """
    name = row.get(field)
    if name is not None and not isinstance(name, str):
        raise RowError(f"bad_{field}", f"{field} is {show_value(name)}, expected text")
    return name or ""


def _check_audio_path(path: object, field: str) -> str:
    """The path as it is.

    :raises RowError: if it cannot be the path of a file.
    """
    if not isinstance(path, str) or "\0" in path or path.rpartition("/")[2] in ("", ".", ".."):
        raise RowError(f"bad_{field}", f"{field} is {show_value(path)}, expected the path of a file")
    return path


def _id_of(value: object) -> int | str | None:
    """The id of a row, good or bad, if it has one that can be printed."""
    identity = value.get("id") if isinstance(value, dict) else None
    return identity if isinstance(identity, (int, str)) else None


def show_value(value: object) -> str:
    """A shortened repr of a JSON value, in which nothing unprintable is left as it is."""
    return _REPR.repr(value)
