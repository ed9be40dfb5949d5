"""Folders on disk: Hugging Face checkpoints, and the writing and rotation of those for resuming."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import save_torch_state_dict
from torch import nn

from lightrft.utils.files import PART, write_atomically
from lightrft.utils.model_specs import family_of
from lightrft.utils.protocols import Tokenizer

MANIFEST = "manifest.json"  # of a whole checkpoint: file name to size in bytes


def write_hf_folder(model: nn.Module, weights: dict[str, torch.Tensor], tokenizer: Tokenizer, output_dir: str) -> None:
    """Write configuration, weights (safetensors, canonical names) and tokenizer.

    :param weights: Checkpoint name to tensor in CPU memory.
    :param output_dir: Made if needed.
    """
    folder, aside = Path(output_dir), Path(output_dir) / f"model{PART}"
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    save_torch_state_dict(weights, aside, max_shard_size="5GB")
    dtype = str(next(iter(weights.values())).dtype).removeprefix("torch.")
    config = family_of(model).checkpoint_config(model.config.to_dict() | {"use_cache": True, "dtype": dtype})
    config.pop("quantization_config", None)  # the saved weights are not quantised
    if model.generation_config is not None:
        model.generation_config.save_pretrained(aside)
    tokenizer.save_pretrained(aside)
    for path in aside.iterdir():
        path.replace(folder / path.name)
    # last: with it the folder is a model
    write_atomically(folder / "config.json", json.dumps(config, indent=2, sort_keys=True) + "\n")
    aside.rmdir()


class SaveError(Exception):
    """Something could not be written; the message is the operating system's."""


def write_state(state: dict[str, Any], path: Path) -> None:
    """Write a rank's state.

    :param state: Tensors and plain values.
    :raises OSError: if that fails.
    """
    try:
        torch.save(state, path, _use_new_zipfile_serialization=False)  # the zip writer hides the system's error message
    except RuntimeError as error:  # torch's own writer raises this
        raise OSError(str(error).splitlines()[0]) from None


def read_state(path: Path) -> dict[str, Any]:
    """Read what :func:`write_state` wrote, into CPU memory. Runs no code from the file."""
    return torch.load(path, map_location="cpu", weights_only=True)


def begin(save_dir: str, name: str) -> None:
    """Clear away what interrupted saves have left, and make the folder of a new checkpoint.

    :param save_dir: Folder of the checkpoints; made if needed.
    """
    clear(save_dir)
    (Path(save_dir) / name).mkdir(parents=True)


def clear(save_dir: str) -> None:
    """Remove what is half written.

    :param save_dir: Folder of the checkpoints; need not exist.
    """
    for left_over in Path(save_dir).glob(f"*{PART}"):
        shutil.rmtree(left_over) if left_over.is_dir() else left_over.unlink()


def commit(save_dir: str, tag: str) -> None:
    """Make a written checkpoint the newest one: a list of its files, everything on disk, then its name.

    If the process is killed, the checkpoint either is complete under its name, or has no name and is ignored.
    """
    folder = Path(save_dir) / (tag + PART)
    files = {str(path.relative_to(folder)): path.stat().st_size for path in folder.rglob("*") if path.is_file()}
    (folder / MANIFEST).write_text(json.dumps(files, indent=0, sort_keys=True), encoding="utf-8")
    replace_folder(folder, Path(save_dir) / tag)  # exists already if the run was resumed from an older checkpoint
    write_atomically(Path(save_dir) / "latest", tag)
    _flush(Path(save_dir))


def replace_folder(new: Path, final: Path) -> None:
    """Put a written folder in the place of another, everything on disk first.

    Killed between the two renames, it leaves the new one under its name and the old one as ``<final>.old.part``.

    :param new: The folder that is written.
    :param final: Its name from now on; a folder of that name is deleted.
    """
    for path in (*new.rglob("*"), new):
        _flush(path)
    old = final.with_name(f"{final.name}.old{PART}")
    if final.exists():
        shutil.rmtree(old, ignore_errors=True)
        final.rename(old)
    new.rename(final)
    shutil.rmtree(old, ignore_errors=True)
    _flush(final.parent)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove(folder: Path) -> None:
    """Delete a checkpoint; a kill half-way leaves nothing that looks like one."""
    aside = folder.with_name(f"{folder.name}.old{PART}")
    shutil.rmtree(aside, ignore_errors=True)
    folder.rename(aside)
    shutil.rmtree(aside)


def damage(folder: Path) -> str | None:
    """What is wrong with a checkpoint.

    :return: A few words, or None if it is whole.
    """
    try:
        files = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        return f"its {MANIFEST} cannot be read ({error})"
    for name, size in files.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size} bytes, not {size}"
    return None


def newest(save_dir: str) -> tuple[str | None, list[str]]:
    """The newest whole checkpoint.

    :return: Its name, None if there is none; and a line for each newer one that is damaged.
    """
    damaged = []
    for folder in reversed(_checkpoints(save_dir)):
        wrong = damage(folder)
        if wrong is None:
            return folder.name, damaged
        damaged.append(f"{folder}: {wrong}")
    return None, damaged


def _checkpoints(save_dir: str) -> list[Path]:
    """Checkpoints, oldest step first."""
    return sorted(path for path in Path(save_dir).glob("step_*") if path.is_dir() and path.suffix != PART)


def rotate(save_dir: str, keep: int) -> None:
    """Delete the oldest checkpoints. The newest whole one stays, whatever came after it."""
    safe, _ = newest(save_dir)
    for folder in _checkpoints(save_dir)[:-keep]:
        if folder.name != safe:
            _remove(folder)
