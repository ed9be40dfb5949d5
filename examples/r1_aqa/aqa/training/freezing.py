"""Which parts of the model train."""

from collections.abc import Callable
from fnmatch import fnmatchcase
from typing import Any


def freeze(model: Any, parts: list[str], checkpoint_name: Callable[[str], str] = str) -> str:
    """Stop training some parts of the model.

    :param parts: Names of sub-modules, dotted or not; ``*``, ``?`` and ``[]`` as in file names.
    :param checkpoint_name: A parameter's name in a checkpoint, from its live name.
    :return: What was frozen, and what still trains.
    :raises SystemExit: if a part has no parameter, which would leave it training silently.
    """
    counts = []
    for part in parts:
        parameters = [p for name, p in model.named_parameters() if is_below(name, part, checkpoint_name)]
        if not parameters:
            raise SystemExit(f"--freeze_prefix {part}: the model has no parameter below a module of that name")
        for parameter in parameters:
            parameter.requires_grad_(False)
        counts.append(f"{part} ({len(parameters)} tensors, {in_millions(parameters)})")
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise SystemExit(f"--freeze_prefix {' '.join(parts)}: nothing is left that trains")
    return f"frozen: {', '.join(counts)}; {trainable(model)}"


def is_below(name: str, part: str, checkpoint_name: Callable[[str], str] = str) -> bool:
    """Whether a parameter belongs to a part of the model, by its live name or by that in a checkpoint.

    The two differ: transformers 5 keeps Qwen2-Audio's ``lm_head`` beside its ``language_model``, transformers 4 and all
    checkpoints keep it inside.

    :param part: Consecutive parts of its path; ``*``, ``?`` and ``[]`` stand for others.
    """
    wanted = part.split(".")
    for path in (name.split(".")[:-1], checkpoint_name(name).split(".")[:-1]):
        starts = range(len(path) - len(wanted) + 1)
        if any(all(map(fnmatchcase, path[i : i + len(wanted)], wanted)) for i in starts):
            return True
    return False


def trainable(model: Any) -> str:
    """How much of a model trains, as text."""
    parameters = list(model.parameters())
    trained = [p for p in parameters if p.requires_grad]
    share = sum(map(size_of, trained)) / sum(map(size_of, parameters))
    return f"{in_millions(trained)} of {in_millions(parameters)} parameters train ({share:.2%})"


def in_millions(parameters: list[Any]) -> str:
    """Number of values, as text."""
    return f"{sum(map(size_of, parameters)) / 1e6:,.3f} M"


def size_of(parameter: Any) -> int:
    """Number of values of a parameter, on all ranks together.

    :param parameter: Whole, partitioned by ZeRO-3, or at 4 bits (bitsandbytes').
    """
    state = getattr(parameter, "quant_state", None)
    if state is not None:
        return state.shape.numel()
    return getattr(parameter, "ds_numel", parameter.numel())
