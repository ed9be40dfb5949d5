"""Questions and recordings out of MMAU's parquet files, which hold the sound; the files are not trusted.

A recording gets its name from its question's id, and only ids that are plain file names are taken. A parquet file is
read a row group at a time, because it holds gigabytes of sound. pyarrow and the decoder are imported when needed.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from aqa.common.files import draft_of, remove_drafts
from aqa.data.rows import show_value
from aqa.data.unpack_audio import MAX_FILE, UnpackError
from aqa.families import BY_TYPE

if TYPE_CHECKING:
    from pyarrow.parquet import ParquetFile

COLUMNS = ("context", "instruction", "choices", "answer", "other_attributes")
FOLDER = "audios"
ROWS = 8  # at a time


class TakenOut(NamedTuple):
    """What the files gave.

    :param questions: In MMAU's format, those with broken sound among them.
    :param written: How many recordings were not there before.
    :param unusable: A line for each row that gives no question.
    :param broken: Why a recording cannot be used, by the path in its question.
    """

    questions: list[dict[str, Any]]
    written: int
    unusable: list[str]
    broken: dict[str, str]


def parquet_files(path: Path) -> list[Path]:
    """The parquet files that a path names, a file or a folder of shards, in the order of their names."""
    if path.is_dir():
        return sorted(path.glob("*.parquet"))
    with path.open("rb") as file:
        return [path] if file.read(4) == b"PAR1" else []


def take_out(files: Sequence[Path], folder: Path, advance: Callable[[], object] = lambda: None) -> TakenOut:
    """Write the recordings that are not there yet.

    :param folder: Recordings go to its subfolder :data:`FOLDER`.
    :param advance: Called for each row.
    :raises UnpackError: if a file is damaged, or lacks a column.
    :raises OSError: if a recording cannot be written.
    """
    from aqa.audio.decode import AudioError

    (folder / FOLDER).mkdir(parents=True, exist_ok=True)
    remove_drafts((folder / FOLDER).glob(".*"))
    questions: dict[str, dict[str, Any]] = {}
    written, unusable, broken = 0, [], {}
    for place, row in rows_of(files):
        advance()
        try:
            question = question_of(row)
            if (name := question["audio_id"]) in questions:
                raise ValueError(f"the id {show_value(question['id'])} occurs twice")
            questions[name] = question
            written += write_recording(row["context"]["bytes"], folder / name)
        except AudioError as error:
            broken[name] = str(error)
        except ValueError as error:
            unusable.append(f"{place}: {error}")
    return TakenOut(list(questions.values()), written, unusable, broken)


@contextmanager
def opened(path: Path) -> Iterator[ParquetFile]:
    """A parquet file of MMAU's.

    :raises UnpackError: if it is damaged, also while it is read, or lacks a column.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path, pre_buffer=False, buffer_size=2**20) as file:  # at most a row group is in memory
            columns = file.schema_arrow.names
            if missing := [name for name in COLUMNS if name not in columns]:
                raise UnpackError(f"{path}: its columns {show_value(columns)} lack MMAU's {', '.join(missing)}")
            yield file
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise UnpackError(f"{path}: cannot be read ({error}). Download it again; what is written stays") from error


def embedded_rows(files: Sequence[Path]) -> int:
    """The rows of all files, which are opened and closed.

    :raises UnpackError: if a file is damaged, or lacks a column.
    """
    total = 0
    for path in files:
        with opened(path) as file:
            total += file.metadata.num_rows
    return total


def rows_of(files: Sequence[Path]) -> Iterator[tuple[str, dict[str, Any]]]:
    """The rows of all files, each with its place for messages; raises as :func:`opened` does."""
    for path in files:
        with opened(path) as file:
            batches = file.iter_batches(ROWS, columns=list(COLUMNS), use_threads=False)
            rows = (row for batch in batches for row in batch.to_pylist())
            yield from ((f"{path}, row {number}", row) for number, row in enumerate(rows))


def question_of(row: dict[str, Any]) -> dict[str, Any]:
    """The question of a row, in MMAU's format; of its attributes, those that are texts or numbers.

    :raises ValueError: if a field has no usable value.
    """
    attributes = row["other_attributes"]
    try:
        attributes = json.loads(attributes) if isinstance(attributes, str) else attributes
    except (ValueError, RecursionError) as error:
        raise ValueError(f"other_attributes is {show_value(attributes)}, no JSON ({error})") from error
    if not isinstance(attributes, dict):
        raise ValueError(f"other_attributes is {show_value(attributes)}, expected a JSON object")
    identity = attributes.get("id")
    name = str(identity) if isinstance(identity, (str, int)) else ""
    if not name.isprintable() or set(name) & set("/\\") or name.startswith(".") or not 0 < len(name.encode()) <= 200:
        raise ValueError(f"other_attributes has the id {show_value(identity)}, which cannot be the name of a file")
    if not isinstance(row["context"], dict) or not isinstance(row["context"].get("bytes"), bytes):
        raise ValueError(f"context is {show_value(row['context'])}, expected a recording's bytes")
    question, choices = row["instruction"], row["choices"]
    if not isinstance(question, str) or not question.strip():
        raise ValueError(f"instruction is {show_value(question)}, expected text")
    if not isinstance(choices, list) or not choices or not all(isinstance(choice, str) for choice in choices):
        raise ValueError(f"choices is {show_value(choices)}, expected a list of texts")
    fields = {"question": question, "choices": choices, "answer": row["answer"]}
    plain = {key: value for key, value in attributes.items() if not isinstance(value, (list, dict))}
    return plain | {"id": name, "audio_id": f"{FOLDER}/{name}.wav"} | fields


def write_recording(data: bytes, target: Path) -> bool:
    """Write a recording to a draft, decode it, and rename it. WAV stays as it is; all else becomes 16 kHz mono WAV.

    :return: Whether it was not there.
    :raises AudioError: if it gives no sound.
    """
    import soundfile

    from aqa.audio.decode import SAMPLING_RATE, AudioError, load_audio

    is_wav = data[:4] == b"RIFF" and data[8:12] == b"WAVE"
    if target.is_file() and (not is_wav or target.stat().st_size == len(data)):
        return False
    if len(data) > MAX_FILE:
        raise AudioError(f"{target.name}: {len(data)} bytes, at most {MAX_FILE} are taken")
    draft = draft_of(target)
    try:
        draft.write_bytes(data)
        try:
            # as much as any model hears: --audio_seconds of a later command decides
            longest = max(family.longest_seconds for family in BY_TYPE.values())
            wave = load_audio(draft, silence_ok=True, seconds=longest)
        except AudioError as error:
            raise AudioError(str(error).replace(str(draft), target.name)) from error
        if not is_wav:  # of floats: 16 bits would round what the decoder gives
            soundfile.write(draft, wave, SAMPLING_RATE, format="WAV", subtype="FLOAT")
        os.replace(draft, target)
    finally:
        draft.unlink(missing_ok=True)
    return True
