"""The model families that can be trained, one file each; whatever differs between them is asked of these classes.

A family is chosen by ``config.model_type``. Nothing heavy is imported with it, so that flags can be checked first.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from aqa.families.audio_flamingo3 import AudioFlamingo3
from aqa.families.qwen2_5_omni import Qwen2_5Omni
from aqa.families.qwen2_audio import Qwen2Audio

Family = type[Qwen2Audio]
FAMILIES: tuple[Family, ...] = (Qwen2Audio, Qwen2_5Omni, AudioFlamingo3)
BY_TYPE: dict[str, Family] = {kind: family for family in FAMILIES for kind in family.model_types}
KNOWN = ", ".join(family.model_types[0] for family in FAMILIES)


def family_of(model: Any) -> Family:
    """The family of a live model, or of its audio tower.

    :raises ValueError: if it is of none.
    """
    kind = model.config.model_type
    found = BY_TYPE.get(kind) or next((family for family in FAMILIES if family.tower_type == kind), None)
    if found is None:
        raise ValueError(f"a {type(model).__name__}: model_type {kind!r} is none of {KNOWN}; aqa/families adds others")
    return found


def family_named(pretrain: str) -> Family:
    """The family of a model folder, or of a model on the hub.

    :raises ValueError: if it is of none.
    :raises OSError: if there is no configuration.
    """
    path = Path(pretrain) / "config.json"
    if path.is_file():
        kind = json.loads(path.read_text(encoding="utf-8")).get("model_type")
    else:
        from transformers import AutoConfig

        kind = AutoConfig.from_pretrained(pretrain).model_type
    if kind not in BY_TYPE:
        raise ValueError(f"{pretrain}: model_type {kind!r} is none of {KNOWN}; aqa/families adds others")
    return BY_TYPE[kind]


def write_checkpoint(model: Any, folder: Path) -> None:
    """Write weights and configuration as the family's checkpoints have them, in one file; the folder is made.

    transformers' ``save_pretrained`` gives other names to a model that was not loaded from a checkpoint, and knows
    nothing of a part of a model that is saved as the whole.
    """
    from safetensors.torch import save_file

    family = family_of(model)
    folder.mkdir(parents=True, exist_ok=True)
    named = {family.checkpoint_name(name): value.detach().contiguous() for name, value in model.named_parameters()}
    save_file(named, folder / "model.safetensors", metadata={"format": "pt"})
    write_configuration(model, folder)


def write_configuration(model: Any, folder: Path) -> None:
    """Write ``config.json`` and ``generation_config.json`` as a family's checkpoints have them."""
    dtype = str(model.config.dtype or model.dtype).removeprefix("torch.")
    # the cache is off for training, but whoever loads the model generates with it
    config = family_of(model).checkpoint_config(model.config.to_dict() | {"use_cache": True, "dtype": dtype})
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    model.generation_config.save_pretrained(folder)
