"""Rows out of tables: CSV and TSV with a header, parquet files, and folders of ``datasets.Dataset.save_to_disk``.

A table is told by its content. Its rows become what JSON lines would hold: a list of choices in a cell is read from its
JSON or Python notation, a row without an id gets its number. Sound inside parquet or a dataset (an ``Audio`` column:
bytes and path) is written below ``--audio_dir``, under the hash of its bytes, and decoded later as any other file is.
Nothing is unpickled, and no code of the table is run. pyarrow is imported when needed.
"""

import ast
import csv
import hashlib
import io
import itertools
import json
import os
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from aqa.common.files import draft_of
from aqa.data.formats import AUDIO_MCQ, DCASE
from aqa.data.rows import NOT_UTF8, AvqaError, Record, read_records, show_value

FOLDER = "embedded"  # below --audio_dir, of recordings that were inside a table
MAX_RECORDING = 256 * 2**20  # bytes
_MMAUS = {"context", "instruction", "other_attributes"}  # its parquet's columns, whose sound get_data.py takes out
_QUESTIONS = {DCASE.question, AUDIO_MCQ.question}
_LISTS = (DCASE.choices[0], AUDIO_MCQ.choices[0])
_AUDIO = AUDIO_MCQ.audio
_NAME = re.compile(r"\s*[^\W\d][\w.-]*\s*")  # of a column
_NUMBER = re.compile(r"[-_.]?\d+(-of-\d+.*)?$")  # of one file of several, such as train-00000-of-00002


def records_of(path: Path, audio_dir: Path | None = None) -> list[Record]:
    """The rows of a file or folder, whatever it is.

    :param audio_dir: Where sound inside a table is written; None: refuse such tables.
    :raises AvqaError: if it cannot be read.
    :raises OSError: likewise, or if a recording cannot be written.
    """
    parts = data_files(path)
    if parts:
        return [make_record(number, row, audio_dir) for number, row in enumerate(rows_of(parts), 1)]
    if path.is_dir():
        raise AvqaError(f"{path}: a folder; name the file in it, or a folder that datasets saved")
    data = path.read_bytes()
    separator = separator_of(data)
    return read_records(data, str(path)) if separator is None else read_cells(data, separator, str(path))


def data_files(path: Path) -> list[Path]:
    """The Arrow or parquet files of a dataset, in order; none for anything else.

    :raises AvqaError: if it has several splits, names no files, or an earlier version of datasets wrote it.
    """
    if not path.is_dir():
        with path.open("rb") as file:
            return [path] if file.read(4) == b"PAR1" else []
    if (path / "dataset_dict.json").is_file():
        splits = [str(child) for child in sorted(path.iterdir()) if (child / "state.json").is_file()]
        raise AvqaError(f"{path}: has splits; name the folder of one: {', '.join(splits) or 'none is there'}")
    if not (path / "state.json").is_file():
        files = sorted(path.glob("*.parquet"))
        splits = sorted({_NUMBER.sub("", file.stem) for file in files})
        if len(splits) > 1:
            raise AvqaError(f"{path}: has the parts {', '.join(splits)}; name one file, or a folder with one part")
        return files
    try:
        state = json.loads((path / "state.json").read_text(encoding="utf-8"))
        files = [path / PurePosixPath(part["filename"]).name for part in state["_data_files"]]
    except (ValueError, KeyError, TypeError) as error:
        raise AvqaError(f"{path / 'state.json'}: names no data files ({error!r}); save the dataset again") from error
    if state.get("_indices_data_files"):
        raise AvqaError(f"{path}: keeps a selection of rows beside the data; call flatten_indices() and save it again")
    return files


def rows_of(files: list[Path]) -> Iterator[dict[str, Any]]:
    """The rows of Arrow or parquet files, a few at a time, because they may hold gigabytes of sound.

    :raises AvqaError: if a file is damaged, or is MMAU's.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    for path in files:
        try:
            with path.open("rb") as file:
                is_parquet = file.read(4) == b"PAR1"
                file.seek(0)
                opened = pq.ParquetFile(file) if is_parquet else pa.ipc.open_stream(file)
                if is_parquet and set(opened.schema_arrow.names) >= _MMAUS:
                    read_records(b"PAR1", str(path))  # raises, with the command that takes the sound out
                batches = opened.iter_batches(8, use_threads=False) if is_parquet else opened
                for batch in batches:
                    for start in range(0, len(batch), 8):
                        yield from batch.slice(start, 8).to_pylist()
        except (pa.ArrowException, UnicodeDecodeError) as error:
            raise AvqaError(f"{path}: cannot be read ({error}); copy or download it again") from error


def make_record(number: int, row: dict[str, Any], audio_dir: Path | None) -> Record:
    """A row as JSON would hold it; its sound becomes a file.

    :param number: From 1; of the row in messages, and its id where the table has none.
    """
    sounds = [name for name, value in row.items() if isinstance(value, dict) and {"bytes", "path"} <= value.keys()]
    if len(sounds) > 1:
        return Record(number, None, f"has several recordings ({', '.join(sounds)}); keep the column of one")
    plain = {name: _plain(value) for name, value in row.items() if name not in sounds}
    for name in sounds:
        data, called = row[name]["bytes"], row[name]["path"]
        if data is not None and audio_dir is None:
            raise AvqaError(f"row {number} has sound inside ({name}), which only avqa.py and eval_mmau.py take out")
        if data is not None and len(data) > MAX_RECORDING:
            return Record(number, None, f"{name} has {len(data)} bytes, at most {MAX_RECORDING} are taken")
        plain[_AUDIO] = called if data is None else write_sound(data, called, audio_dir)
    return Record(number, plain if "id" in plain else {"id": number} | plain)


def write_sound(data: bytes, name: str | None, audio_dir: Path) -> str:
    """Write a recording under its hash, unless it is there.

    :param name: What it was called, for its suffix.
    :return: Its path below the folder.
    """
    suffix = PurePosixPath(name or "").suffix.lower()
    suffix = suffix if suffix[1:].isalnum() and suffix.isascii() and len(suffix) <= 5 else ""
    target = audio_dir / FOLDER / (hashlib.sha256(data).hexdigest()[:32] + suffix)
    if not (target.is_file() and target.stat().st_size == len(data)):
        target.parent.mkdir(parents=True, exist_ok=True)
        draft = draft_of(target)
        try:
            draft.write_bytes(data)
            os.replace(draft, target)
        finally:
            draft.unlink(missing_ok=True)
    return f"{FOLDER}/{target.name}"


def _plain(value: Any) -> Any:
    """A value as JSON holds it: dates and the like as their text."""
    if isinstance(value, dict):
        return {str(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_plain(inner) for inner in value]
    return value if value is None or isinstance(value, (str, int, float, bool)) else str(value)


# ----------------------------------------------------------------------------------------------------------------- text
def separator_of(data: bytes) -> str | None:
    """What separates the cells of a table with a header; None for what is no table."""
    line = re.split(rb"[\r\n]", data.removeprefix(b"\xef\xbb\xbf").lstrip(), maxsplit=1)[0].decode("utf-8", "replace")
    if line.startswith(("{", "[")):
        return None
    try:
        headers = {separator: next(csv.reader([line], delimiter=separator), []) for separator in "\t,;"}
    except csv.Error:  # of a line that is too long for a header
        return None
    for separator, names in headers.items():
        if _QUESTIONS & {name.strip() for name in names}:
            return separator
    # none of the names is known, which the rows' messages will say
    return next((each for each, names in headers.items() if len(names) > 2 and all(map(_NAME.fullmatch, names))), None)


def read_cells(data: bytes, separator: str, source: str) -> list[Record]:
    """The rows of a CSV or TSV file; empty cells are absent.

    :raises AvqaError: if it is not UTF-8, or a column occurs twice.
    """
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise AvqaError(f"{source}, line {line}: {NOT_UTF8}") from error
    start = re.match(r"(\s*[\r\n])?", text).end()  # blank lines; a tab before the header is an unnamed column
    skipped = text.count("\n", 0, start)
    reader = csv.reader(io.StringIO(text[start:], newline=""), delimiter=separator, strict=True)
    names: list[str] = []
    records: list[Record] = []
    while True:
        line = skipped + reader.line_num + 1
        try:
            cells = next(reader)
        except StopIteration:
            return records
        except csv.Error as error:  # nobody knows where the next row begins
            raise AvqaError(f"{source}, line {line}: {error}, after {len(records)} whole rows") from error
        if not names:
            names = [name.strip() for name in cells]
            if twice := [name for name in names if names.count(name) > 1]:
                raise AvqaError(f"{source}: the column {show_value(twice[0])} occurs twice; which one is meant?")
        elif len(cells) == len(names):
            row = {name: read_cell(name, cell) for name, cell in zip(names, cells, strict=True)}
            records.append(Record(line, with_number(row if "id" in row else {"id": len(records) + 1} | row)))
        elif cells:
            records.append(Record(line, None, f"{len(cells)} cells, but the header has {len(names)}"))


def read_cell(name: str, cell: str) -> Any:
    """A cell's text, or the list that it holds where choices are expected; None if it is empty."""
    if name not in _LISTS:
        return cell or None
    for read in (json.loads, ast.literal_eval):
        try:
            value = read(cell)
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            continue
        if isinstance(value, list) and not _lacks_comma(cell):
            return value
    return cell or None


def _lacks_comma(cell: str) -> bool:
    """Whether a list has texts without a comma between them, as NumPy prints it; Python would make them one text."""
    kinds = [token.type for token in tokenize.generate_tokens(io.StringIO(cell).readline)]
    return (tokenize.STRING,) * 2 in itertools.pairwise(kind for kind in kinds if kind != tokenize.NL)


def with_number(row: dict[str, Any]) -> dict[str, Any]:
    """A row of R1-AQA's fields, whose answer is a number in JSON, with that number; not where it is a choice's text."""
    answer, choices = row.get(DCASE.answer), row.get(DCASE.choices[0])
    if not (DCASE.question in row and isinstance(choices, list) and isinstance(answer, str)):
        return row
    is_number = answer.strip().isdecimal() and answer.strip() not in map(str, choices)
    return row | {DCASE.answer: int(answer)} if is_number else row
