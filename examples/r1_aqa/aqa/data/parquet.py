"""From checked rows to the columns of a parquet file, and back to questions.

pyarrow is imported inside the functions, so that avqa.py --help does without.
"""

from __future__ import annotations

import array
import itertools
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aqa.data.rows import Row

if TYPE_CHECKING:
    import pyarrow as pa

DATA_SOURCE = "r1-aqa-avqa"
EVEN_VALID, ODD_VALID = 0b01010101, 0b10101010  # Arrow's validity bits, eight rows a byte, lowest first
INT64_MIN, INT64_MAX = -(2**63), 2**63 - 1


def build_table(rows: list[Row], paths: list[str], label: str) -> pa.Table:
    """Turn rows into columns, without making a dict of each row.

    :param paths: The audio file of each row.
    :param label: Names the reward rule.
    :return: The table. ``extra_info.id`` is int64 where every id is such a number, text otherwise; ``question_type``
        is empty where the input has none.
    """
    import pyarrow as pa

    count = len(rows)
    ids: list = [row.id for row in rows]
    numbered = all(isinstance(identity, int) and INT64_MIN <= identity <= INT64_MAX for identity in ids)

    # One message a row, of two parts. Parquet gives both parts the same keys: the one that does not apply is null.
    audio_url, text = [""] * (2 * count), [""] * (2 * count)
    audio_url[0::2] = paths
    text[1::2] = [row.prompt for row in rows]
    part = {
        "type": strings(["audio", "text"] * count),
        "audio_url": strings(audio_url, valid=EVEN_VALID),
        "text": strings(text, valid=ODD_VALID),
    }
    message = {"role": strings(["user"] * count), "content": lists(range(0, 2 * count + 1, 2), struct(part))}

    choice_offsets = itertools.accumulate((len(row.choices) for row in rows), initial=0)
    gold, path = strings([row.gold for row in rows]), strings(paths)
    dataset_name = strings([row.dataset_name for row in rows])
    extra_info = {
        "id": integers(ids, "q") if numbered else strings(list(map(str, ids))),
        "index": integers([row.index for row in rows], "q"),
        "question_text": strings([row.question for row in rows]),
        "multi_choice": lists(choice_offsets, strings([choice for row in rows for choice in row.choices])),
        "answer_idx": integers([row.answer_idx for row in rows], "q"),
        "dataset_name": dataset_name,
        "audio_path": path,
        "solution": strings([f"<answer>{row.gold}</answer>" for row in rows]),
    }
    columns = {
        "data_source": strings([DATA_SOURCE] * count),
        "prompt": lists(range(count + 1), struct(message)),
        "reference": gold,
        "label": strings([label] * count),
        "audio_path": path,
        "dataset_name": dataset_name,
        "question_type": strings([row.question_type for row in rows]),
        "reward_model": struct({"ground_truth": gold}),
        "extra_info": struct(extra_info),
    }
    if any(row.thinking for row in rows):
        columns["thinking"] = strings([row.thinking for row in rows])
    return pa.Table.from_arrays(list(columns.values()), names=list(columns))


def read_questions(path: Path) -> list[dict[str, Any]] | None:
    """The rows of a file that ``avqa.py`` wrote, as MMAU's questions; None of any other parquet file.

    :raises OSError: if it cannot be read as parquet.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            if not {"data_source", "extra_info", "reference", "question_type"} <= set(file.schema_arrow.names):
                return None
            rows = file.read(columns=["extra_info", "reference", "question_type"]).to_pylist()
    except pa.ArrowInvalid as error:
        raise OSError(f"cannot be read as parquet: {error}") from error
    return [
        {
            "id": str(row["extra_info"]["id"]),
            "audio_id": row["extra_info"]["audio_path"],
            "question": row["extra_info"]["question_text"],
            "choices": row["extra_info"]["multi_choice"],
            "answer": row["reference"],
            "dataset": row["extra_info"]["dataset_name"],
            "task": row["question_type"] or row["extra_info"]["dataset_name"],
        }
        for row in rows
    ]


# pyarrow.array() and pyarrow.table() would import pandas wherever it is installed, to ask whether a list is a series;
# that import costs more than the whole conversion. Arrays made from buffers do without.


def strings(values: list[str], valid: int | None = None) -> pa.StringArray:
    """A column of text.

    :param values: Text that UTF-8 can hold.
    :param valid: Which of eight neighbours are not null, lowest bit first; none is null if not given.
    """
    import pyarrow as pa

    encoded = [value.encode("utf-8") for value in values]
    offsets = pa.py_buffer(array.array("i", itertools.accumulate(map(len, encoded), initial=0)))
    bitmap = None if valid is None else pa.py_buffer(bytes([valid]) * (len(values) // 8 + 1))
    return pa.StringArray.from_buffers(len(values), offsets, pa.py_buffer(b"".join(encoded)), bitmap)


def integers(values: Iterable[int], code: str) -> pa.Array:
    """A column of whole numbers.

    :param code: ``q`` for int64, ``i`` for int32.
    """
    import pyarrow as pa

    numbers = array.array(code, values)
    kind = {"q": pa.int64(), "i": pa.int32()}[code]
    return pa.Array.from_buffers(kind, len(numbers), [None, pa.py_buffer(numbers)])


def lists(offsets: Iterable[int], values: pa.Array) -> pa.ListArray:
    """A column of lists.

    :param offsets: Where each list begins, and the end of the last (lists + 1).
    :param values: The members of all lists, one after the other.
    """
    import pyarrow as pa

    return pa.ListArray.from_arrays(integers(offsets, "i"), values)


def struct(fields: dict[str, pa.Array]) -> pa.StructArray:
    """A column of structs, from columns of equal length by name."""
    import pyarrow as pa

    return pa.StructArray.from_arrays(list(fields.values()), names=list(fields))
