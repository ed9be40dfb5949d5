"""What a model's folder needs beyond what transformers 5 and safetensors write."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from aqa.common.files import write_atomically


def complete(folder: Path) -> None:
    """Let transformers 4.57 read a folder of transformers 5, too, and let those read it whom the umask lets.

    Version 5 has new names for the tokenizer's class, its special tokens and the rotary embedding's settings, and
    reads the earlier ones as well; 4.57 fails on the first two and takes the default for the third. safetensors makes
    files that their owner alone may read.

    :param folder: With the tokenizer's files; changed in place.
    """
    path = folder / "tokenizer_config.json"
    settings = json.loads(path.read_text(encoding="utf-8"))
    if settings.get("tokenizer_class") == "TokenizersBackend":
        settings["tokenizer_class"] = "PreTrainedTokenizerFast"
        settings["model_input_names"] = ["input_ids", "attention_mask"]  # its default has token_type_ids in 4.57
    if isinstance(settings.get("extra_special_tokens"), list):
        settings["additional_special_tokens"] = settings.pop("extra_special_tokens")
    _write(path, settings)
    if (folder / "config.json").is_file():
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        _name_rotary_settings(config)
        _write(folder / "config.json", config)
    for weights in folder.rglob("*.safetensors"):
        weights.chmod(path.stat().st_mode)  # what the umask, or the folder's access list, gives to a new file


def _name_rotary_settings(config: dict[str, Any]) -> None:
    for part in [value for value in config.values() if isinstance(value, dict)]:
        _name_rotary_settings(part)
    rope = config.get("rope_parameters")
    if rope and "rope_theta" in rope:
        config["rope_theta"] = rope["rope_theta"]
        scaling = {name: value for name, value in rope.items() if name != "rope_theta"}
        config["rope_scaling"] = scaling if scaling != {"rope_type": "default"} else None


def _write(path: Path, content: dict[str, Any]) -> None:
    write_atomically(path, json.dumps(content, indent=2, sort_keys=True) + "\n")
