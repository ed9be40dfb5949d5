"""What LightRFT at commit 49e62cb needs to run beside the libraries of today. Nothing here is about audio.

:data:`FIXES` lists what each fix mends, when it is needed and when it can be deleted. A fix that is not needed is not
applied: beside transformers 4.57 and vLLM 0.13, LightRFT's own pins, only LightRFT's own faults are mended.
"""

from __future__ import annotations

import functools
import importlib
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from aqa.common.patch import Patch


@dataclass(frozen=True)
class Fix:
    """One incompatibility.

    :param name: Short name, shown in the banner.
    :param mends: What fails without it.
    :param until: When it can be deleted.
    :param needed: Whether this machine's versions need it.
    :param apply: Puts it into a :class:`~aqa.common.patch.Patch`.
    :param before_import: It must be in place before LightRFT is imported.
    """

    name: str
    mends: str
    until: str
    needed: Callable[[], bool]
    apply: Callable[[Patch], None]
    before_import: bool = False


def at_least(package: str, *wanted: int) -> bool:
    """Whether a package is installed in this version or a newer one.

    :param package: Distribution; ``vllm`` also means its CPU build.
    :param wanted: Leading numbers of the version.
    """
    for name in (package, f"{package}-cpu"):
        try:
            found = version(name)
        except PackageNotFoundError:
            continue
        if tuple(int(part) for part in found.split("+")[0].split(".")[: len(wanted)] if part.isdigit()) >= wanted:
            return True
    return False


def patch_for_import() -> tuple[Patch, list[str]]:
    """What has to be in place before ``import lightrft``.

    :return: The patch, and the names of the fixes in it.
    """
    return _apply(before_import=True)


def patch_for_versions() -> tuple[Patch, list[str]]:
    """The other fixes. Imports LightRFT.

    :return: The patch, and the names of the fixes in it.
    """
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
    # processing_utils runs the package's __init__ again, which would throw the alias away: import it first
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
            inner = self.model.model  # the tower moved one level down, where LightRFT does not look for it
            if not hasattr(inner, "audio_tower"):
                return
            tower = inner.audio_tower
            if not isinstance(tower.embed_positions, module._AudioEmbedPositions):
                # FSDP2 would shard the table, and the tower adds it to whole tensors
                tower.embed_positions = module._AudioEmbedPositions(tower.embed_positions)
            for part in (self.model, inner, tower):
                part._no_split_modules = sorted(part._no_split_modules)  # was a list, and LightRFT appends to it

        return __init__

    patch.wrap(module.ActorAL, "__init__", make)


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
                arguments.pop("truncate_prompt_tokens", None)  # prompts were checked when the data was loaded
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
        """DeepSpeed places its models itself."""

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
    patch.replace(trainer, "DistributedSampler", (known, used))  # only ever the second argument of isinstance()


FIXES = (
    Fix(
        name="AutoModelForVision2Seq",
        mends="transformers 5 dropped the class that LightRFT's vision models import: import lightrft.models fails",
        until="LightRFT imports AutoModelForImageTextToText",
        needed=lambda: at_least("transformers", 5),
        apply=_alias_vision2seq,
        before_import=True,
    ),
    Fix(
        name="ActorAL parts",
        mends="transformers 5 moved the tower to model.model and made _no_split_modules a set: FSDP2 fails",
        until="LightRFT's ActorAL looks below model.model",
        needed=lambda: at_least("transformers", 5),
        apply=_find_parts_of_the_model,
    ),
    Fix(
        name="truncate_prompt_tokens",
        mends="LightRFT sets a sampling parameter that vLLM 0.17 dropped: rollouts fail; before, vLLM handed it "
        "to the feature extractor too, which cut each clip to that many samples",
        until="LightRFT does not set it",
        needed=lambda: at_least("vllm", 0),
        apply=_drop_truncate_prompt_tokens,
    ),
    Fix(
        name="reload_model",
        mends="FastExperienceMaker moves the reference model by two methods that only FSDP has: DeepSpeed fails",
        until="DeepspeedStrategy has reload_model and offload_model",
        needed=lambda: _is_missing("reload_model"),
        apply=_leave_models_where_they_are,
    ),
    Fix(
        name="sampler",
        mends="the trainer looks for another sampler class than the strategy makes: episodes are not reshuffled, and a "
        "resumed run starts again at the first prompt",
        until="both use the same class",
        needed=_is_another_sampler,
        apply=_know_the_sampler,
    ),
)
