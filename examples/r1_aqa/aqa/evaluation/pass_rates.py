"""How often a model answers each row of prepared training data right, with its sound and in silence.

The prompts are rendered, and the responses sampled and scored, as in training.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aqa.common.console import several
from aqa.data.selection import NOTE, PASS_RATE, SILENT_PASS_RATE
from aqa.evaluation.items import EvalError, Item

if TYPE_CHECKING:
    import pyarrow as pa

    from aqa.audio.reader import AudioReader
    from aqa.evaluation.engines import Job

COLUMNS = ("prompt", "audio_path", "reference", "label")  # that training reads


def read_table(path: Path) -> pa.Table:
    """The rows of a parquet file that ``avqa.py`` wrote.

    :raises EvalError: if it is none.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table = pq.read_table(path)
    except (pa.ArrowInvalid, OSError) as error:
        raise EvalError(f"{path}: cannot be read as parquet ({error})") from error
    lacking = [name for name in COLUMNS if name not in table.column_names]
    if lacking or table.num_rows == 0:
        what = f"has no column {', '.join(lacking)}" if lacking else "has no rows"
        raise EvalError(f"{path}: {what}; give a file that data_preprocess/avqa.py has written")
    return table


def make_items(table: pa.Table, path: Path) -> list[Item]:
    """One item for each row.

    :raises EvalError: naming the rows that training would refuse.
    """
    from aqa.data.columns import check_types

    columns = {name: table[name].to_pylist() for name in COLUMNS}
    problems = check_types(columns)
    problems += [f"row {i}: has no sound" for i, audio in enumerate(columns["audio_path"]) if not audio]
    problems += [
        f"row {i}: the reference answer is {reference!r}"
        for i, reference in enumerate(columns["reference"])
        if not isinstance(reference, str) or not reference.strip()
    ]
    if problems:
        raise EvalError(several(f"{path}: {len(problems)} rows cannot be asked", problems))
    rows = (dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True))
    return [
        Item(i, f"row {i}", row, row["prompt"], Path(row["audio_path"]), row["reference"]) for i, row in enumerate(rows)
    ]


def make_jobs(
    processor: Any, items: Sequence[Item], lengths: Mapping[int, list[int]], in_silence: bool, reader: AudioReader
) -> list[Job]:
    """What to ask: each row with its sound and, numbered -1, -2, ..., in silence.

    :param lengths: Samples at 16 kHz of each row's recording.
    :raises EvalError: naming the rows whose prompts training would refuse.
    """
    from aqa.data.prompts import prompt_problem, render_chat
    from aqa.evaluation.engines import Job

    texts = [render_chat(processor, item.prompt) for item in items]
    found = [prompt_problem(text, rendered=True, audio_token=processor.audio_token) for text in texts]
    if any(found):
        problems = [f"{item.label}: {problem}" for item, problem in zip(items, found, strict=True) if problem]
        raise EvalError(several(f"{len(problems)} rows cannot be asked", problems))
    jobs = []
    for item, text in zip(items, texts, strict=True):
        jobs.append(Job(item.index, text, [item.audio], lengths[item.index], False, reader))
        if in_silence:
            jobs.append(Job(-1 - item.index, text, [item.audio], lengths[item.index], True, reader))
    return jobs


def score(items: Sequence[Item], responses: Sequence[str | Sequence[str]], reward: str) -> list[float]:
    """The share of each row's responses that are right, by the accuracy that training pays for.

    :param responses: Of each row, a text or several.
    :param reward: As for ``--reward``.
    """
    from aqa.common.constants import ASSISTANT_HEADER
    from aqa.rewards.named import find_reward

    measure, rates = find_reward(reward), []
    for item, said in zip(items, responses, strict=True):
        # the rewards read the options from the prompt, and the response behind the prompt's end
        content = item.prompt[-1]["content"]
        asked = content if isinstance(content, str) else "".join(part.get("text") or "" for part in content)
        queries = [f"{asked}{ASSISTANT_HEADER}{text}" for text in ([said] if isinstance(said, str) else said)]
        count = len(queries)
        _, metrics = measure([], [item.row["label"]] * count, queries, [item.gold] * count, None)
        rates.append(sum(metrics["accuracy_reward"].tolist()) / count)
    return rates


def with_rates(table: pa.Table, rates: Mapping[str, Sequence[float]], about: dict[str, Any]) -> pa.Table:
    """The same rows, in the same order, with a column for each kind of rate.

    :param about: The model and how it was asked, kept in the file's metadata.
    """
    import pyarrow as pa

    for name in (PASS_RATE, SILENT_PASS_RATE):
        if name in table.column_names:
            table = table.drop_columns([name])
    for name, values in rates.items():
        table = table.append_column(name, pa.array(values, pa.float64()))
    return table.replace_schema_metadata((table.schema.metadata or {}) | {NOTE: json.dumps(about, default=str)})


def describe(rates: Mapping[str, Sequence[float]], samples: int) -> str:
    """A table: the number of rows for each rate, rounded where there are more than 10 samples."""
    parts = min(samples, 10)
    lines = [f"{'rows of a rate of':<18}" + "".join(f"{k / parts:>7.2f}" for k in range(parts + 1)) + f"{'mean':>8}"]
    for name, values in rates.items():
        counts = [sum(round(rate * parts) == k for rate in values) for k in range(parts + 1)]
        mean = sum(values) / len(values)
        lines.append(f"{name:<18}" + "".join(f"{count:>7,}" for count in counts) + f"{mean:>8.3f}")
    return "\n".join(lines)


def refuse_audio(bad: Mapping[int, str], silent: Sequence[int], items: Sequence[Item]) -> None:
    """Refuse recordings that training would refuse.

    :param bad: Error messages of unusable ones, by row.
    :param silent: Rows whose recording is digital silence.
    :raises EvalError: if there is any.
    """
    problems = [*bad.values(), *(f"row {i}: {items[i].audio}: is digital silence" for i in silent)]
    if problems:
        raise EvalError(
            several(f"the sound of {len(problems)} of {len(items)} rows cannot be trained on", problems)
            + "\navqa.py --skip_bad leaves such rows out."
        )
