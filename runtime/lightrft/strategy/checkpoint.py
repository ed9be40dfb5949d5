"""Folders on disk: Hugging Face checkpoints, and the writing and rotation of those for resuming."""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch
import xxhash
from safetensors.torch import save_file
from torch import nn
from transformers import PreTrainedTokenizerBase

from lightrft.utils.families import family_of
from lightrft.utils.files import PART, write_atomically

ABOUT = "about_weights"  # in a checkpoint's state: dtype, lora_alpha, and further files of the run's model folders
OLD = f".old{PART}"  # suffix of a folder while another takes its place
SHARD = 10**9  # bytes of weights in a file, if it holds more than one weight
MANIFEST = "manifest.json"  # of a whole checkpoint: its files with size and hash, and the prompts that were used


def write_hf_folder(
    model: nn.Module,
    weights: Iterable[tuple[str, torch.Tensor]],
    tokenizer: PreTrainedTokenizerBase,
    output_dir: str,
    add_files: Callable[[Path], None] = lambda folder: None,
) -> None:
    """Write configuration, weights (safetensors, canonical names) and tokenizer.

    :param weights: Checkpoint name and tensor, on any device; at most :data:`SHARD` bytes of them are copied to CPU
        memory at a time, or the largest.
    :param output_dir: Made if needed; its files are replaced once all new ones are written.
    :param add_files: Writes further files into the folder that it is given, which holds all others.
    """
    folder, aside = Path(output_dir), Path(output_dir) / f"model{PART}"
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    dtype = str(_write_weights(weights, aside)).removeprefix("torch.")
    config = family_of(model).checkpoint_config(model.config.to_dict() | {"use_cache": True, "dtype": dtype})
    config.pop("quantization_config", None)  # the saved weights are not quantised
    if model.generation_config is not None:
        model.generation_config.save_pretrained(aside)
    tokenizer.save_pretrained(aside)
    made = aside / "config.json"
    made.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    add_files(aside)
    files = {str(path.relative_to(aside)): path for path in aside.rglob("*") if path.is_file() and path != made}
    for path in files.values():
        target = folder / path.relative_to(aside)
        target.parent.mkdir(exist_ok=True)
        path.replace(target)
    for path in folder.iterdir():  # an earlier save's, in one file or more; transformers prefers one to several
        if re.fullmatch(r"model(-\d+-of-\d+)?\.safetensors(\.index\.json)?", path.name) and path.name not in files:
            path.unlink()
    made.replace(folder / "config.json")  # last: with it the folder is a model
    shutil.rmtree(aside)


def _write_weights(weights: Iterable[tuple[str, torch.Tensor]], folder: Path) -> torch.dtype:
    """Write ``model.safetensors`` or, if it would be larger than :data:`SHARD`, several files with an index.

    :return: The weights' dtype.
    """
    shards: list[list[str]] = []
    shard: dict[str, torch.Tensor] = {}
    used = total = 0

    def write() -> None:
        save_file(shard, folder / f"{len(shards)}{PART}", metadata={"format": "pt"})
        shards.append(list(shard))
        shard.clear()

    for name, tensor in weights:
        if shard and used + tensor.nbytes > SHARD:
            write()
            used = 0
        # a copy, because a sharded model's whole weights are views of a buffer that the next ones will fill
        shard[name] = tensor.detach().to("cpu", copy=True).contiguous()
        used, total, dtype = used + tensor.nbytes, total + tensor.nbytes, tensor.dtype
    write()
    if len(shards) == 1:
        (folder / f"0{PART}").rename(folder / "model.safetensors")
        return dtype
    index: dict[str, str] = {}
    for number, names in enumerate(shards):
        file = f"model-{number + 1:05}-of-{len(shards):05}.safetensors"
        (folder / f"{number}{PART}").rename(folder / file)
        index |= dict.fromkeys(names, file)
    content = json.dumps({"metadata": {"total_size": total}, "weight_map": index}, indent=2, sort_keys=True)
    (folder / "model.safetensors.index.json").write_text(content + "\n", encoding="utf-8")
    return dtype


class SaveError(Exception):
    """Something could not be written; the message is the operating system's."""


class _HashingFile:
    """A file to write to that hashes what is written, which costs less than reading it again."""

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.hash = file, xxhash.xxh3_128()

    def write(self, data: Any) -> int:
        rest = memoryview(data).cast("B")
        size = rest.nbytes
        self.hash.update(rest)
        while rest:
            rest = rest[self.file.write(rest) :]
        return size

    def flush(self) -> None:
        """Nothing is buffered."""


def write_state(state: dict[str, Any], path: str | Path) -> str:
    """Write a rank's state.

    :param state: Tensors and plain values.
    :return: Hash of the file.
    :raises OSError: if that fails.
    """
    with open(path, "wb", buffering=0) as file:
        hashing = _HashingFile(file)
        torch.save(state, hashing, _use_new_zipfile_serialization=False)  # the zip writer hides the system's message
    return hashing.hash.hexdigest()


def read_state(path: Path) -> dict[str, Any]:
    """Read what :func:`write_state` wrote, into CPU memory. Runs no code from the file."""
    return torch.load(path, map_location="cpu", weights_only=True)


def begin(save_dir: str, name: str) -> None:
    """Clear away what interrupted saves have left, and make the folder of a new checkpoint.

    :param save_dir: Folder of the checkpoints; made if needed.
    """
    clear(save_dir)
    (Path(save_dir) / name).mkdir(parents=True)


def clear(save_dir: str, names: str = "*") -> None:
    """Finish what a kill has interrupted in :func:`replace_folder`, and remove what is half written.

    :param save_dir: Parent of the folders; need not exist.
    :param names: Pattern of the folders' names.
    """
    parent = Path(save_dir)
    for old in parent.glob(f"{names}{OLD}"):
        final = old.with_name(old.name.removesuffix(OLD))
        new = final.with_name(final.name + PART)
        if not final.exists():  # killed between the two renames: both are whole
            (new if new.exists() else old).rename(final)
    for left_over in (*parent.glob(f"{names}{PART}"), *parent.glob(f"{names}{OLD}")):
        shutil.rmtree(left_over) if left_over.is_dir() else left_over.unlink(missing_ok=True)


def commit(save_dir: str, tag: str, prompts: int | None = None, hashes: Mapping[str, str] | None = None) -> None:
    """Make a written checkpoint the newest one: a list of its files, everything on disk, then its name.

    If the process is killed, the checkpoint either is complete under its name, or has no name and is ignored.

    :param prompts: Prompts that the run has used so far.
    :param hashes: By file name, those that are known already; the others are computed.
    """
    folder, known = Path(save_dir) / (tag + PART), hashes or {}
    files = {
        name: (path.stat().st_size, known.get(name) or _hash(path))
        for path in folder.rglob("*")
        if path.is_file() and (name := str(path.relative_to(folder)))
    }
    manifest = {"prompts": prompts, "files": files}
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=0, sort_keys=True), encoding="utf-8")
    replace_folder(folder, Path(save_dir) / tag)  # exists already if the run was resumed from an older checkpoint
    write_atomically(Path(save_dir) / "latest", tag)
    _flush(Path(save_dir))


def _hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, xxhash.xxh3_128).hexdigest()


def replace_folder(new: Path, final: Path) -> None:
    """Put a written folder in the place of another, everything on disk first.

    Killed between the two renames, it leaves both folders, as ``<final>.part`` and ``<final>.old.part``; :func:`clear`
    gives the name to the new one.

    :param new: The folder that is written: ``<final>.part``.
    :param final: Its name from now on; a folder of that name is deleted.
    """
    for path in (*new.rglob("*"), new):
        _flush(path)
    old = final.with_name(final.name + OLD)
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
    aside = folder.with_name(folder.name + PART)  # not OLD, which would be restored
    shutil.rmtree(aside, ignore_errors=True)
    folder.rename(aside)
    shutil.rmtree(aside)


def _read_manifest(folder: Path) -> tuple[int | None, dict[str, tuple[int, str | None]]]:
    """Prompts used, and size and hash by file name; None for what a checkpoint of an earlier version does not say.

    :raises OSError: if there is no manifest.
    :raises ValueError: if it is damaged.
    """
    manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    try:
        if "files" in manifest:
            return manifest["prompts"], {name: (size, digest) for name, (size, digest) in manifest["files"].items()}
        return None, {name: (int(size), None) for name, size in manifest.items()}
    except (AttributeError, KeyError, TypeError) as error:
        raise ValueError(f"not a list of files: {error}") from None


def damage(folder: Path, hashed: slice = slice(0)) -> str | None:
    """What is wrong with a checkpoint.

    :param hashed: The files, in the order of their names, whose content is read and compared with its hash; of the
        others only the size is. Default: none.
    :return: A few words, or None if it is whole.
    """
    try:
        _, files = _read_manifest(folder)
        for name, (size, _) in files.items():
            path = folder / name
            if not path.is_file():
                return f"{name} is missing"
            if path.stat().st_size != size:
                return f"{name} has {path.stat().st_size} bytes, not {size}"
        for name, (_, digest) in sorted(files.items())[hashed]:
            if digest not in (None, _hash(folder / name)):
                return f"{name} is not what was written: its hash differs"
    except (OSError, ValueError) as error:
        return f"it cannot be read ({error})"
    return None


def latest(save_dir: str) -> str | None:
    """The name in ``latest``, whatever it names; None without that file."""
    try:
        return (Path(save_dir) / "latest").read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError):
        return None


def newest_first(save_dir: str, named: str | None = None) -> list[Path]:
    """Checkpoints, whole or not, newest first.

    What counts is the prompts that were used, because a step has as many as ``--rollout_batch_size`` said then. It is
    the time where a checkpoint of an earlier version does not say it.

    :param named: Name of one that comes before all others.
    """
    prompts: dict[Path, int | None] = {}
    for folder in Path(save_dir).glob("step_*"):
        if folder.is_dir() and folder.name.removeprefix("step_").isdecimal():
            try:
                prompts[folder] = _read_manifest(folder)[0]
            except (OSError, ValueError):
                prompts[folder] = -1  # of no use
    counted = None not in prompts.values()

    def newness(folder: Path) -> tuple[bool, int, float, str]:
        manifest = folder / MANIFEST
        time = manifest.stat().st_mtime if manifest.is_file() else 0
        return folder.name == named, prompts[folder] if counted else 0, time, folder.name

    return sorted(prompts, key=newness, reverse=True)


def rotate(save_dir: str, keep: int) -> None:
    """Delete the oldest checkpoints, but never the one that ``latest`` names, nor the newest whole one."""
    first, newest = newest_first(save_dir, latest(save_dir)), newest_first(save_dir)
    kept = first[:keep] + [folder for folder in newest if damage(folder) is None][:1]
    for folder in first[keep:]:
        if folder not in kept:
            _remove(folder)
