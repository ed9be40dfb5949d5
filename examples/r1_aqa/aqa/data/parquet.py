"""From checked rows to the columns of a parquet file, and back to questions.

pyarrow is imported inside the functions, so that avqa.py --help does without.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from aqa.data.formats import make_question
from aqa.data.rows import Row

if TYPE_CHECKING:
    import pyarrow as pa

DATA_SOURCE = "r1-aqa-avqa"
INT64_MIN, INT64_MAX = -(2**63), 2**63 - 1


def build_table(rows: list[Row], paths: list[str], label: str) -> pa.Table:
    """Turn rows into columns.

    :param paths: The audio file of each row.
    :param label: Names the reward rule.
    :return: The table. ``extra_info.id`` is int64 where every id is such a number, text otherwise; ``question_type``
        is empty where the input has none.
    """
    import pyarrow as pa

    numbered = all(isinstance(row.id, int) and INT64_MIN <= row.id <= INT64_MAX for row in rows)
    text, texts, whole = pa.string(), pa.list_(pa.string()), pa.int64()

    def texts_of(*names: str) -> dict[str, pa.DataType]:
        return dict.fromkeys(names, text)

    # Parquet gives both parts of a message the same keys: the one that does not apply is null.
    content = pa.list_(pa.struct(texts_of("type", "audio_url", "text")))
    prompt = pa.list_(pa.struct({"role": text, "content": content}))
    extra = {"id": whole if numbered else text, "index": whole, "question_text": text, "multi_choice": texts}
    extra |= {"answer_idx": whole} | texts_of("dataset_name", "audio_path", "solution")
    schema = {"data_source": text, "prompt": prompt}
    schema |= texts_of("reference", "label", "audio_path", "dataset_name", "question_type")
    schema |= {"reward_model": pa.struct(texts_of("ground_truth")), "extra_info": pa.struct(extra)}
    schema |= texts_of("thinking") if any(row.thinking for row in rows) else {}
    records = []
    for row, path in zip(rows, paths, strict=True):
        parts = [{"type": "audio", "audio_url": path}, {"type": "text", "text": row.prompt}]
        own = row._asdict() | {"audio_path": path}
        extra_info = own | {
            "id": row.id if numbered else str(row.id),
            "question_text": row.question,
            "multi_choice": row.choices,
            "solution": f"<answer>{row.gold}</answer>",
        }
        records.append(
            own
            | {
                "data_source": DATA_SOURCE,
                "prompt": [{"role": "user", "content": parts}],
                "reference": row.gold,
                "label": label,
                "reward_model": {"ground_truth": row.gold},
                "extra_info": extra_info,
            }
        )
    return pa.Table.from_pylist(records, pa.schema(schema))


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
    questions = []
    for row in rows:
        own = row["extra_info"]
        given = (str(own["id"]), own["audio_path"], own["question_text"], row["reference"], row["question_type"])
        questions.append(make_question(*given, own["multi_choice"], own["dataset_name"]))
    return questions
