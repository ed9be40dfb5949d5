"""The columns of the training data: found by the flags that name them, checked, and turned into tags of metrics."""

from collections.abc import Mapping, Sequence
from typing import Any

from aqa.data.mixing import SOURCE_COLUMN

TAG_COLUMNS = {SOURCE_COLUMN: "source", "dataset_name": "dataset", "question_type": "question_type"}
THINKING_COLUMN = "thinking"  # the thinking process that the warm start teaches; written by avqa.py --thinking_field
MOST_TAGS = 32  # different values of a column; each makes several metrics


class DataError(ValueError):
    """Rows that cannot be trained on; the message names them."""


def read_columns(dataset: Any, args: Any) -> dict[str, list]:
    """The four columns that training reads, by the flag that names each.

    :param dataset: ``datasets.Dataset`` or any mapping of columns.
    :param args: ``input_key``, ``images_key``, ``reference_key``, ``label_key``.
    :raises DataError: naming flag and column if one is missing.
    """
    columns = {}
    there = getattr(dataset, "column_names", None) or list(dataset)
    names = {
        "input_key": args.input_key,
        "images_key": args.images_key,
        "reference_key": args.reference_key,
        "label_key": args.label_key,
    }
    for flag, name in names.items():
        if name not in there:
            raise DataError(
                f"the training data has no column {name!r}, which --{flag} names; its columns are "
                f"{', '.join(map(str, there))}. Name the right one, or make the data with data_preprocess/avqa.py"
            )
        columns[flag] = list(dataset[name])
    return columns


def tags_of(dataset: Any, labels: Sequence[str]) -> list[tuple[str, ...]]:
    """The tags that each row's metrics are averaged under: its source, data set, question type and label.

    A column with a single value tells nothing and is left out, and so is one with more than :data:`MOST_TAGS` values.

    :param dataset: ``datasets.Dataset`` or any mapping of columns.
    :param labels: Reward rule of each row.
    :return: For each row any number of ``kind/value``.
    """
    there = getattr(dataset, "column_names", None) or list(dataset)
    columns = {kind: list(dataset[name]) for name, kind in TAG_COLUMNS.items() if name in there} | {"label": labels}
    tags: list[tuple[str, ...]] = [()] * len(labels)
    for kind, values in columns.items():
        if 2 <= len(set(filter(None, values))) <= MOST_TAGS:
            tags = [(*row, f"{kind}/{value}") if value else row for row, value in zip(tags, values, strict=True)]
    return tags


def check_types(columns: dict[str, list]) -> list[str]:
    """Find values of a wrong type.

    :param columns: From :func:`read_columns`.
    :return: A line for each bad value, with row, flag and value.
    """
    problems = []
    for i, (messages, path, reference, label) in enumerate(zip(*columns.values(), strict=True)):
        if wrong := _wrong_messages(messages):
            problems.append(f"row {i}: --input_key: {wrong}")
        if path is not None and not _is_text(path):
            problems.append(f"row {i}: --images_key: {path!r:.80} is no path of an audio file")
        if isinstance(reference, str) and not _is_text(reference):
            problems.append(f"row {i}: --reference_key: {reference!r:.80} cannot be stored as UTF-8")
        if label is not None and not _is_text(label):
            problems.append(f"row {i}: --label_key: {label!r:.80} is no text")
    return problems


def _is_text(value: Any) -> bool:
    # str.isascii is quick; half a surrogate pair, which tokenizers refuse, is the only text that UTF-8 does not hold
    return isinstance(value, str) and (value.isascii() or value == value.encode("utf-8", "ignore").decode("utf-8"))


def _wrong_messages(messages: Any) -> str | None:
    if not isinstance(messages, (list, tuple)) or not messages:
        return f"{messages!r:.80} is no list of chat messages"
    for message in messages:
        if not isinstance(message, Mapping) or not {"role", "content"} <= set(message) or not _is_text(message["role"]):
            return f"{message!r:.80} is no chat message with role and content"
        content = message["content"]
        if _is_text(content):
            continue
        if not isinstance(content, (list, tuple)) or not content:
            return f"content is {content!r:.80}, expected text or a list of parts"
        for part in content:
            kind = part.get("type") if isinstance(part, Mapping) else None
            key = {"text": "text", "audio": "audio_url"}.get(kind) if isinstance(kind, str) else None
            if key is None or not _is_text(part.get(key)):
                return f"{part!r:.80} is no part of type text, with text, or audio, with audio_url"
    return None
