"""From checked rows to what is written: the parquet columns, the report, and files that appear all at once."""

import array
import itertools
import os
from collections import Counter
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, BinaryIO

from aqa.audio.probe import Clip
from aqa.data.rows import Problem, Row

if TYPE_CHECKING:
    import pyarrow as pa

DATA_SOURCE = "r1-aqa-avqa"
EVEN_VALID, ODD_VALID = 0b01010101, 0b10101010  # Arrow's validity bits, eight rows a byte, lowest first
INT64_MIN, INT64_MAX = -(2**63), 2**63 - 1


def build_table(rows: list[Row], paths: list[str], label: str) -> "pa.Table":
    """
    Rows to columns, without the detour over one dict a row.

    :param rows: The usable rows (rows).
    :type rows: list[Row]
    :param paths: The audio file of each (rows).
    :type paths: list[str]
    :param label: Names the reward rule.
    :type label: str
    :return: The table. ``extra_info.id`` is int64 where every id is such a number, text otherwise; ``question_type``
        is empty where the input has none.
    :rtype: pa.Table
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
    return pa.Table.from_arrays(list(columns.values()), names=list(columns))


# pyarrow.array() and pyarrow.table() would import pandas wherever it is installed, to ask whether a list is a series;
# that import costs more than the whole conversion. Arrays made from buffers do without.


def strings(values: list[str], valid: int | None = None) -> "pa.StringArray":
    """
    :param values: Text that UTF-8 can hold.
    :type values: list[str]
    :param valid: Which of eight neighbours are not null, lowest bit first; none is null if not given.
    :type valid: int | None
    :return: The text column.
    :rtype: pa.StringArray
    """
    import pyarrow as pa

    encoded = [value.encode("utf-8") for value in values]
    offsets = pa.py_buffer(array.array("i", itertools.accumulate(map(len, encoded), initial=0)))
    bitmap = None if valid is None else pa.py_buffer(bytes([valid]) * (len(values) // 8 + 1))
    return pa.StringArray.from_buffers(len(values), offsets, pa.py_buffer(b"".join(encoded)), bitmap)


def integers(values: Iterable[int], code: str) -> "pa.Array":
    """
    :param values: Whole numbers.
    :type values: Iterable[int]
    :param code: ``q`` for int64, ``i`` for int32.
    :type code: str
    :return: The number column.
    :rtype: pa.Array
    """
    import pyarrow as pa

    numbers = array.array(code, values)
    kind = {"q": pa.int64(), "i": pa.int32()}[code]
    return pa.Array.from_buffers(kind, len(numbers), [None, pa.py_buffer(numbers)])


def lists(offsets: Iterable[int], values: "pa.Array") -> "pa.ListArray":
    """
    :param offsets: Where each list begins, and the end of the last (lists + 1).
    :type offsets: Iterable[int]
    :param values: The members of all lists, one after the other.
    :type values: pa.Array
    :return: The column of lists.
    :rtype: pa.ListArray
    """
    import pyarrow as pa

    return pa.ListArray.from_arrays(integers(offsets, "i"), values)


def struct(fields: "dict[str, pa.Array]") -> "pa.StructArray":
    """
    :param fields: Columns of equal length, by name.
    :type fields: dict[str, pa.Array]
    :return: The column of structs.
    :rtype: pa.StructArray
    """
    import pyarrow as pa

    return pa.StructArray.from_arrays(list(fields.values()), names=list(fields))


def build_report(
    settings: dict,
    read: int,
    bad: list[Problem],
    silent: list[Problem],
    parts: dict[str, list[str]],
    clips: dict[str, Clip],
) -> dict:
    """
    :param settings: The settings of the run, by flag.
    :type settings: dict
    :param read: Rows in the input, blank lines not counted.
    :type read: int
    :param bad: Rows left out because they cannot be used.
    :type bad: list[Problem]
    :param silent: Rows whose audio is missing or unreadable.
    :type silent: list[Problem]
    :param parts: The audio file of every row written, by part (``train``, ``validation``).
    :type parts: dict[str, list[str]]
    :param clips: What is known of the files, by path; empty where they were not looked at.
    :type clips: dict[str, Clip]
    :return: The report. Every row read is written, bad, or left out for its audio. Hours and durations (seconds) are
        those of the readable files that the rows written refer to, each file once; null where no file was looked at.
    :rtype: dict
    """
    checked = not settings["no_check_audio"]
    used = {path for paths in parts.values() for path in paths}
    kinds = Counter(clip.kind for clip in clips.values())
    heard = [clip for path, clip in clips.items() if path in used and clip.kind is None]
    seconds = sorted(clip.seconds for clip in heard)
    rates = Counter(clip.sampling_rate for clip in heard)
    silent_kinds = Counter(problem.kind for problem in silent)
    train, validation = ({os.path.normpath(path) for path in parts[part]} for part in ("train", "validation"))
    return {
        "settings": settings,
        "rows": {
            "read": read,
            "written": sum(map(len, parts.values())),
            **{part: len(paths) for part, paths in parts.items()},
            "bad": len(bad),
            "bad_by_reason": dict(Counter(problem.kind for problem in bad).most_common()),
            "left_out_for_audio": len(silent) if settings["skip_bad"] else 0,
            "audio_missing": silent_kinds["audio_missing"] if checked else None,
            "audio_unreadable": silent_kinds["audio_unreadable"] if checked else None,
        },
        "clips": {
            "checked": checked,
            "train": len(train),
            "validation": len(validation),
            "in_both_parts": len(train & validation),
            "missing": kinds["audio_missing"] if checked else None,
            "unreadable": kinds["audio_unreadable"] if checked else None,
            "readable": len(heard) if checked else None,
            "hours": round(sum(seconds) / 3600, 6) if checked else None,
            "seconds_min": seconds[0] if seconds else None,
            "seconds_median": (seconds[(len(seconds) - 1) // 2] + seconds[len(seconds) // 2]) / 2 if seconds else None,
            "seconds_max": seconds[-1] if seconds else None,
            "sampling_rates": {str(rate): number for rate, number in sorted(rates.items())},
        },
        "problems": [problem._asdict() for problem in sorted([*bad, *silent], key=lambda problem: problem.index)],
    }


def write_files(folder: str, writers: dict[str, Callable[[BinaryIO], None]], obsolete: list[str]) -> None:
    """
    Write several files so that either all are new or all are as they were.

    :param folder: Where; made if missing.
    :type folder: str
    :param writers: By file name, a function that writes the content to an open binary file.
    :type writers: dict[str, Callable[[BinaryIO], None]]
    :param obsolete: Names of files to remove as the new ones take their places.
    :type obsolete: list[str]
    :raises OSError: if a file cannot be written; the folder is then as before.
    """
    os.makedirs(folder, exist_ok=True)
    token = os.urandom(4).hex()  # two runs into one folder, perhaps from two machines, must not share these
    drafts = {name: os.path.join(folder, f".{name}.{token}.tmp") for name in writers}
    try:
        for name, write in writers.items():
            with open(drafts[name], "wb") as file:  # not tempfile, whose files only their owner may read
                write(file)
                file.flush()
                os.fsync(file.fileno())
        for name in obsolete:
            if os.path.lexists(os.path.join(folder, name)):
                os.remove(os.path.join(folder, name))
        for name, draft in drafts.items():
            os.replace(draft, os.path.join(folder, name))
    finally:
        for draft in drafts.values():
            if os.path.lexists(draft):
                os.remove(draft)
