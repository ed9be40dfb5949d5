"""Which folder a ``--model_path`` means: a Hugging Face folder, a training run, or something that must be converted."""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from aqa.common.arguments import shell_command
from aqa.common.model_type import cut_weights, has_weights, missing_tokenizer
from aqa.evaluation.items import EvalError

# this example's and its runtime's name, LightRFT's own, transformers'
_STEP_FOLDERS = re.compile(r"(?:hf_step_|global_step|checkpoint-)(\d+)(?:_hf)?")
_HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
_WEIGHTS = ("*.safetensors", "pytorch_model*.bin")
NOTES_FILE = "r1_aqa.json"  # written by train_colocate.py into every model's folder
_PROCESSOR = ("processor_config.json", "preprocessor_config.json")


@dataclass(frozen=True)
class Model:
    path: str  # folder or hub name of the weights; of an adapter, its base model
    processor: str  # folder or hub name of tokenizer and feature extractor
    adapter: str | None = None  # folder of a LoRA adapter on it
    note: str | None = None  # what the user should know about the choice
    lora_scale: float = 1.0  # what the adapter adds to the weights is multiplied by it

    def identity(self) -> list[str]:
        """Path, and size and time of every weight file: these differ between two models."""
        parts = []
        for place in filter(None, (self.path, self.adapter)):
            parts.append(place)
            files = sorted(file for pattern in _WEIGHTS for file in Path(place).glob(pattern))
            parts += [f"{file.name} {file.stat().st_size} {file.stat().st_mtime_ns}" for file in files]
        return parts if self.lora_scale == 1 else [*parts, f"lora_scale {self.lora_scale}"]


def asked_to_think(model: Model) -> float | None:
    """The share (0 to 1) of a model's training rows that asked for the thinking process.

    :return: None for start models and models of other programs, which do not say.
    """
    trained = Path(model.adapter or model.path)
    for folder in (trained, trained.parent) if model.adapter else (trained,):  # a run's adapter is in a subfolder
        if (folder / NOTES_FILE).is_file():
            return _read_json(folder / NOTES_FILE).get("asked_to_think")
    return None


def resolve_model(model_path: str, base_model: str | None = None, lora_scale: float = 1.0) -> Model:
    """Find what to load.

    :param model_path: A Hugging Face folder, a LoRA adapter's folder, a training run's folder (its final model, or
        the newest ``hf_step_NNNNNN`` if there is none or it is older), or a name on the Hugging Face hub.
    :param base_model: For an adapter: the model that it was trained on; None: the one that the adapter names.
    :param lora_scale: For an adapter: what it adds to the weights is multiplied by it.
    :raises EvalError: if there is nothing to load; a DeepSpeed checkpoint alone gets an explanation.
    """
    folder = Path(model_path)
    if not folder.exists():
        # a hub name has the form of a relative path: it is one only where not even the parent folder exists
        if _HUB_NAME.fullmatch(model_path) and not folder.parent.exists():
            _refuse_adapters_flags(base_model, lora_scale, model_path)
            return Model(model_path, model_path)
        raise EvalError(f"--model_path {model_path}: does not exist")
    if not folder.is_dir():
        raise EvalError(f"--model_path {model_path}: is a file; give the folder that holds it")
    folder = folder.resolve()
    if (folder / "adapter_config.json").is_file():
        return _adapter(folder, base_model, lora_scale)
    _refuse_adapters_flags(base_model, lora_scale, model_path)
    lacking = missing_files(folder)
    steps = sorted(
        (int(match[1]), child)
        for child in folder.iterdir()
        if child.is_dir() and (match := _STEP_FOLDERS.fullmatch(child.name))
    )
    ended = None if lacking else _last_step(folder)
    # a run that was extended since it ended has newer ones
    whole = [child for step, child in steps if (lacking or step > ended) and not missing_files(child)]
    if whole:
        torn = [child.name for _, child in steps if child > whole[-1] and missing_files(child)]
        note = f"a run's folder: its newest checkpoint is {whole[-1].name}"
        if ended is not None:
            note += f", newer than its final model of step {ended}"
        if torn:
            note += f" ({', '.join(torn)} left out as incomplete)"
        return Model(str(whole[-1]), str(whole[-1]), note=note)
    if not lacking:
        return Model(str(folder), str(folder))
    if steps:
        raise EvalError(
            f"--model_path {model_path}: no Hugging Face checkpoint in it is complete; {steps[-1][1].name} lacks "
            f"{', '.join(missing_files(steps[-1][1]))}"
        )
    for checkpoints in (folder / "_actor", folder):
        if any(checkpoints.glob("*/manifest.json")):
            config = _config_of(folder) or _config_of(folder.parent)
            start = (config.get("flags") or {}).get("pretrain") or "START_MODEL"
            where = ("--checkpoint", checkpoints, "--pretrain", start, "--out", f"{folder}_exported")
            command = shell_command("export_checkpoint.py", *where)
            raise EvalError(
                f"--model_path {model_path}: holds checkpoints for resuming and no Hugging Face folder. Make one of "
                f"the newest, then evaluate that:\n  {command}"
            )
        if (checkpoints / "latest").is_file():
            raise EvalError(
                f"--model_path {model_path}: holds a DeepSpeed checkpoint of LightRFT ({checkpoints / 'latest'}) and "
                "no Hugging Face folder. Run the training's command again with --load_checkpoint: it ends by writing "
                "one (--save_hf_ckpt writes one with every checkpoint)."
            )
    raise EvalError(f"--model_path {model_path}: no model there: {', '.join(lacking)} missing")


def _last_step(folder: Path) -> float:
    """The step of the final model in a run's folder; infinite where the run does not say."""
    sessions = _config_of(folder).get("sessions", [])
    return next((each["last_step"] for each in reversed(sessions) if each.get("how") == "finished"), math.inf)


def _config_of(folder: Path) -> dict[str, Any]:
    """A run's record of itself; empty where the folder has none."""
    config = folder / "run_config.json"
    return _read_json(config) if config.is_file() else {}


def missing_files(folder: Path) -> list[str]:
    """The files, shards of the weights included, without which a folder cannot be loaded."""
    lacking = [] if (folder / "config.json").is_file() else ["config.json"]
    if not has_weights(folder):
        lacking.append("*.safetensors")
    lacking += [f"the end of {name} (copy it again)" for name in cut_weights(folder)]
    for index in folder.glob("*.index.json"):
        shards = set(_read_json(index).get("weight_map", {}).values())
        lacking += sorted(shard for shard in shards if not (folder / shard).is_file())
    if not any((folder / name).is_file() for name in _PROCESSOR):
        lacking.append(f"{_PROCESSOR[0]} (copy it from the start model)")
    return lacking + missing_tokenizer(folder)


def _adapter(folder: Path, base_model: str | None, lora_scale: float) -> Model:
    config = _read_json(folder / "adapter_config.json")
    named = base_model or config.get("base_model_name_or_path")
    if not named:
        raise EvalError(f"--model_path {folder}: a LoRA adapter that names no base model; give --base_model")
    weights = [name for name in ("adapter_model.safetensors", "adapter_model.bin") if (folder / name).is_file()]
    if config.get("peft_type") != "LORA" or not weights or cut_weights(folder):
        raise EvalError(
            f"--model_path {folder}: no whole LoRA adapter: its peft_type is {config.get('peft_type')}, its weights "
            f"{'are cut off' if weights else 'are missing'}; copy it again"
        )
    try:
        base = resolve_model(named)
    except EvalError as error:
        where = "--base_model" if base_model else "the base model that it names"
        raise EvalError(f"--model_path {folder}: a LoRA adapter, {where}: {error}; give --base_model") from error
    note = f"a LoRA adapter on {base.path}" + (f", times {lora_scale}" if lora_scale != 1 else "")
    return Model(base.path, base.processor, str(folder), note, lora_scale)


def _refuse_adapters_flags(base_model: str | None, lora_scale: float, model_path: str) -> None:
    given = [f"--base_model {base_model}"] if base_model is not None else []
    given += [f"--lora_scale {lora_scale}"] if lora_scale != 1 else []
    if given:
        raise EvalError(f"{', '.join(given)}: {model_path} is a whole model, not a LoRA adapter; leave it out")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise EvalError(f"{path}: is no JSON ({error})") from error
