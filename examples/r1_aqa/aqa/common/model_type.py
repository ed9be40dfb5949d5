"""The kind of model in a folder, without importing transformers."""

from __future__ import annotations

import json
from pathlib import Path


def model_type_of(pretrain: str) -> str | None:
    """What kind of model a folder holds; None for a hub name, and where ``config.json`` does not say.

    :param pretrain: Folder or hub name.
    """
    try:
        config = json.loads((Path(pretrain) / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return config.get("model_type") if isinstance(config, dict) else None
