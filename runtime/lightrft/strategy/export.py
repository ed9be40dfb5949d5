"""A Hugging Face folder from a checkpoint for resuming, on one process without a GPU, however it was sharded.

DeepSpeed and peft are imported inside functions, because not every checkpoint needs them.
"""

import os
import re
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from lightrft.models.actor_al import load_model
from lightrft.strategy.checkpoint import ABOUT, read_state, write_hf_folder
from lightrft.utils.families import family_of
from lightrft.utils.processor import get_tokenizer_processor_vl
from lightrft.utils.weight_names import is_adapter, plain_name

WHOLE, SHARD_0 = "mp_rank_00_model_states.pt", "zero_pp_rank_0_mp_rank_00_model_states.pt"

Weights = dict[str, torch.Tensor]


class ExportError(Exception):
    """No model can be made of a checkpoint; the message says why."""


def layout_of(checkpoint: Path) -> tuple[int | None, int | None]:
    """ZeRO stage of a checkpoint, None if it is not DeepSpeed's; and its ranks, None where each of them has all."""
    ranks = len(list(checkpoint.glob("*zero_pp_rank_*_optim_states.pt")))
    if (checkpoint / WHOLE).is_file():
        return (2, ranks) if ranks else (0, None)
    return (3, ranks) if (checkpoint / SHARD_0).is_file() else (None, None)


def export_model(checkpoint: Path, pretrain: str, out: Path) -> tuple[Any, dict[str, str]]:
    """Write the model that the run would have saved when it wrote the checkpoint, adapters merged.

    :param pretrain: The run's start model, of which come configuration and tokenizer.
    :return: Processor, and further files of the folder, by name, which the caller writes.
    :raises ExportError: if the checkpoint is not of a kind that is known here, or not of this start model.
    """
    live, about = _read(checkpoint)
    weights = merged_weights(live, about["lora_alpha"])
    model = load_model(pretrain, dtype=getattr(torch, about["dtype"]), device_map="meta")
    expected = {name: parameter.shape for name, parameter in model.named_parameters()}
    given = {name: value.shape for name, value in weights.items()}
    wrong = sorted({name for name, _ in expected.items() ^ given.items()})
    if wrong:
        raise ExportError(
            f"--pretrain {pretrain}: {len(wrong)} weights of {checkpoint} do not fit it, such as {wrong[0]}"
        )
    tokenizer, processor = get_tokenizer_processor_vl(pretrain, model)
    names = family_of(model)
    named = ((names.checkpoint_name(name), weights[name]) for name in expected)
    write_hf_folder(model, named, tokenizer, str(out))
    return processor, about["files"]


def merged_weights(live: Weights, lora_alpha: int) -> Weights:
    """Weights by the names that they have in a model without adapters; those of adapters are merged.

    :param live: By the names in the model that was trained.
    """
    weights = {}
    for name, value in live.items():
        layer = name.removesuffix("base_layer.weight")
        if f"{layer}lora_A.default.weight" in live:
            from lightrft.models.lora import merge

            a, b = live[f"{layer}lora_A.default.weight"], live[f"{layer}lora_B.default.weight"]
            value = merge(value, a, b, lora_alpha / len(a))
        if not is_adapter(name):
            weights[plain_name(name)] = value
    return weights


def _read(checkpoint: Path) -> tuple[Weights, dict[str, Any]]:
    """The weights, by live name, in the run's dtype, and what is under :data:`~lightrft.strategy.checkpoint.ABOUT`.

    One rank's file is in memory at a time.
    """
    stage, _ = layout_of(checkpoint)
    if (checkpoint / "rank0.pt").is_file():
        read: Callable[[Path], tuple[Weights, dict[str, Any]]] = _read_fsdp
    elif stage is None:
        raise ExportError(f"{checkpoint}: holds neither DeepSpeed's files ({WHOLE}) nor FSDP2's (rank0.pt)")
    else:
        read = _read_zero3 if stage == 3 else _read_whole
    weights, about = read(checkpoint)
    if any(".weight." in name for name in weights):  # scales
        raise ExportError(f"{checkpoint}: its weights have 4 bits; only --load_checkpoint can go on from it")
    return weights, about


def _read_whole(checkpoint: Path) -> tuple[Weights, dict[str, Any]]:
    """ZeRO 0 and 2 keep whole weights in the model's dtype."""
    state = _load_deepspeed(checkpoint / WHOLE)
    weights = {name: value.clone() for name, value in state["module"].items()}  # they are views of one storage
    return weights, _about(state, checkpoint)


def _read_zero3(checkpoint: Path) -> tuple[Weights, dict[str, Any]]:
    """ZeRO-3 flattens each parameter and gives every rank an equal part, the last one padded.

    A rank's parts of trained parameters are float32, one after the other in the order of ``param_shapes``.
    """
    about: dict[str, Any] = {}
    parts: dict[str, list[torch.Tensor]] = defaultdict(list)
    files = _by_rank(checkpoint, "*_model_states.pt"), _by_rank(checkpoint, "*_optim_states.pt")
    for model_file, optimizer_file in zip(*files, strict=True):
        state = _load_deepspeed(model_file)
        about, tied = about or _about(state, checkpoint), state["shared_params"]  # rank 0 knows all of it
        shapes = {name: shape for group in state["param_shapes"] for name, shape in group.items()}
        flat = torch.cat(_load_deepspeed(optimizer_file)["optimizer_state_dict"]["fp32_flat_groups"])
        flat = flat.to(getattr(torch, about["dtype"]))
        sizes = [-(-shape.numel() // len(files[0])) for shape in shapes.values()]
        for name, part in zip(shapes, flat[: sum(sizes)].split(sizes), strict=True):
            parts[name].append(part)
        for name, part in (state["frozen_param_fragments"] or {}).items():
            parts[name].append(part)
        shapes |= state["frozen_param_shapes"] or {}
    weights = {name: torch.cat(parts[name])[: shape.numel()].view(shape) for name, shape in shapes.items()}
    return weights | {name: weights[other] for name, other in tied.items()}, about


def _read_fsdp(checkpoint: Path) -> tuple[Weights, dict[str, Any]]:
    """FSDP2 gives every rank some rows of each parameter."""
    about: dict[str, Any] = {}
    rows: dict[str, list[torch.Tensor]] = defaultdict(list)
    for path in _by_rank(checkpoint, "rank*.pt"):
        state = read_state(path)
        about = about or _about(state["client_state"], checkpoint)  # rank 0 knows all of it
        for name, value in state["model"].items():
            rows[name].append(value.to(getattr(torch, about["dtype"])))
    return {name: torch.cat(parts) for name, parts in rows.items()}, about


def _about(state: dict[str, Any], checkpoint: Path) -> dict[str, Any]:
    if ABOUT not in state:
        raise ExportError(f"{checkpoint}: an earlier version wrote it; only --load_checkpoint can go on from it")
    return state[ABOUT]


def _load_deepspeed(path: Path) -> dict[str, Any]:
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    from lightrft.strategy.deepspeed_hooks import load_safely

    return load_safely(path, "cpu")


def _by_rank(checkpoint: Path, pattern: str) -> list[Path]:
    return sorted(checkpoint.glob(pattern), key=lambda path: int(re.search(r"rank_?(\d+)", path.name)[1]))
