"""What is in a model's folder, without importing transformers."""

from __future__ import annotations

import json
from pathlib import Path

# either of the two holds the vocabulary
VOCABULARIES = (("tokenizer.json",), ("vocab.json", "merges.txt"))


def missing_tokenizer(folder: Path) -> list[str]:
    """The files of the tokenizer that a model's folder lacks; transformers answers with a page about sentencepiece."""
    lacking = [] if (folder / "tokenizer_config.json").is_file() else ["tokenizer_config.json"]
    if not any(all((folder / name).is_file() for name in names) for names in VOCABULARIES):
        lacking.append("tokenizer.json")
    return [f"{' and '.join(lacking)} (copy the tokenizer's files from the start model)"] if lacking else []


def model_type_of(pretrain: str) -> str | None:
    """What kind of model a folder holds; None for a hub name, and where ``config.json`` does not say.

    :param pretrain: Folder or hub name.
    """
    try:
        config = json.loads((Path(pretrain) / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return config.get("model_type") if isinstance(config, dict) else None
