"""Folders on disk: Hugging Face checkpoints, and the rotation of DeepSpeed's."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import save_torch_state_dict
from torch import nn
from transformers import Qwen2AudioForConditionalGeneration


def write_hf_folder(model: nn.Module, weights: dict[str, torch.Tensor], tokenizer: Any, output_dir: str) -> None:
    """Write configuration, weights (safetensors, canonical names) and tokenizer.

    :param model: The transformers model, for its configurations.
    :param weights: Checkpoint name to tensor in CPU memory.
    :param tokenizer: Tokenizer to save.
    :param output_dir: Made if needed.
    """
    folder = Path(output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    save_torch_state_dict(weights, folder, max_shard_size="5GB")
    config = model.config.to_dict()
    # our class is the same model with another forward; others shall load it under its own name
    config["architectures"] = [Qwen2AudioForConditionalGeneration.__name__]
    config["use_cache"] = True
    config["dtype"] = str(next(iter(weights.values())).dtype).removeprefix("torch.")
    temporary = folder / "config.json.part"
    temporary.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    temporary.replace(folder / "config.json")
    if model.generation_config is not None:
        model.generation_config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def rotate(save_dir: str, keep: int) -> None:
    """Delete the oldest checkpoints, never the one that ``latest`` names.

    :param save_dir: Folder with one sub-folder a checkpoint.
    :param keep: How many stay.
    """
    folder = Path(save_dir)
    latest = (folder / "latest").read_text(encoding="utf-8").strip()
    tags = sorted((d for d in folder.iterdir() if d.is_dir()), key=lambda d: d.stat().st_mtime)
    for old in tags[:-keep]:
        if old.name != latest:
            shutil.rmtree(old)
