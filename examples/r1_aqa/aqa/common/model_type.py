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


def has_weights(folder: Path) -> bool:
    """Whether a folder holds weights, whole or not."""
    return any(next(folder.glob(pattern), None) for pattern in ("*.safetensors", "pytorch_model*.bin"))


def cut_weights(folder: Path) -> list[str]:
    """Names of the ``*.safetensors`` in a folder that are shorter or longer than their header says: half a copy."""
    return [path.name for path in sorted(folder.glob("*.safetensors")) if not _is_whole(path)]


def _is_whole(weights: Path) -> bool:
    size = weights.stat().st_size
    with weights.open("rb") as file:
        start = 8 + int.from_bytes(file.read(8), "little")  # of the tensors, behind the header
        if start > size:
            return False
        try:
            header = json.loads(file.read(start - 8))
            ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
        except (ValueError, TypeError, KeyError, AttributeError):
            return False
    return size == start + max(ends, default=0)
