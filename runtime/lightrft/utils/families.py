"""The audio language models that can be trained; whoever uses the runtime says what they are like (``register``)."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

# a class as those of the example's ``aqa.families``; ``Qwen2Audio`` there says what each member means
Family = Any
FAMILIES: dict[str, Family] = {}  # by config.model_type


def register(families: Iterable[Family]) -> None:
    """Make families known."""
    FAMILIES.update({kind: family for family in families for kind in family.model_types})


def family_of(model: Any) -> Family:
    """The family of a model, by ``model_type``.

    :param model: Folder, hub name, or a live transformers model.
    :raises ValueError: if it is of none.
    """
    if isinstance(model, str):
        config = Path(model) / "config.json"
        if config.is_file():
            kind = json.loads(config.read_text(encoding="utf-8")).get("model_type")
        else:
            from transformers import AutoConfig

            kind = AutoConfig.from_pretrained(model).model_type
    else:
        kind = model.config.model_type
    if kind not in FAMILIES:
        shown = model if isinstance(model, str) else type(model).__name__
        known = ", ".join(FAMILIES)
        raise ValueError(f"{shown}: model_type {kind!r} is none of {known}; see CONTRIBUTING.md")
    return FAMILIES[kind]
