"""Targeted patches that make LightRFT's image slots carry audio.

One public function a target, one private helper a symbol. Each checks that the symbol is there and takes the expected
arguments, does nothing when it has been applied already, and returns a :class:`Patch` that undoes it, by ``undo()`` or
at the end of a ``with`` block.
"""

from __future__ import annotations

import functools
import inspect
import sys
import types
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from aqa.hosts.find import on_runtime
from aqa.patches.slots import unpack_clips

_MARK = "_r1_aqa_audio_patch"
_MISSING = object()
BANNED = -100.0  # bias on the placeholder's logit: sampled, it would stand for audio that is not there


class Patch:
    """Replaced attributes, and how to put them back."""

    def __init__(self) -> None:
        self._undo: list[Callable[[], None]] = []

    def replace(self, owner: Any, name: str, value: Any) -> None:
        """Set an attribute and remember what was there.

        :param owner: Object, class or module.
        :param name: Attribute.
        :param value: New value.
        """
        old = vars(owner).get(name, _MISSING)
        if old is _MISSING:
            self.on_undo(lambda: delattr(owner, name))
        else:
            self.on_undo(lambda: setattr(owner, name, old))
        setattr(owner, name, value)

    def on_undo(self, action: Callable[[], None]) -> None:
        """Remember how to take something back.

        :param action: Takes it back.
        """
        self._undo.append(action)

    def undo(self) -> None:
        """Put everything back, last replacement first."""
        while self._undo:
            self._undo.pop()()

    def __enter__(self) -> Patch:
        return self

    def __exit__(self, *exception: object) -> None:
        self.undo()


@contextmanager
def _all_or_nothing() -> Iterator[Patch]:
    """A patch of several spots, undone if one of them refuses."""
    patch = Patch()
    try:
        yield patch
    except PatchError:
        patch.undo()
        raise


class PatchError(ImportError):
    """A spot to be patched is missing or takes other arguments than expected."""


def _require(owner: Any, name: str, parameters: Sequence[str] | None = None) -> Any:
    """The attribute, if it exists and takes the named parameters.

    :raises PatchError: otherwise, naming the spot, the host and the versions that were tested.
    """
    import lightrft

    where = f"{getattr(owner, '__module__', '')}.{getattr(owner, '__qualname__', type(owner).__qualname__)}.{name}"
    if inspect.ismodule(owner):
        where = f"{owner.__name__}.{name}"
    host = f"lightrft {getattr(lightrft, '__version__', '(no version)')} in {lightrft.__file__}"
    tested = "tested with LightRFT 0.1.1 and this project's runtime"
    target = getattr(owner, name, _MISSING)
    if target is _MISSING:
        raise PatchError(f"{where} does not exist in {host} ({tested}); the audio patch has no place to go")
    if parameters is not None:
        present = list(inspect.signature(target).parameters)
        missing = [p for p in parameters if p not in present]
        if missing:
            raise PatchError(f"{where} takes {present}, without {missing}, in {host} ({tested})")
    return target


def mark(function: Callable, original: Any) -> Callable:
    """Make a replacement known as one, so that it is put in place once.

    :param function: Replacement.
    :param original: What it replaces.
    """
    setattr(function, _MARK, True)
    function.__wrapped__ = original
    return function


def is_marked(owner: Any, name: str) -> bool:
    """Whether a spot is already replaced.

    :param owner: Object, class or module.
    :param name: Attribute.
    """
    return getattr(getattr(owner, name, None), _MARK, False)


# ------------------------------------------------------------------------------------------------------------- strategy
def patch_strategy_for_audio(strategy: Any, processor: Any = None, files: dict[str, str] | None = None) -> Patch:
    """Make a strategy send audio to the engine, and save the processor with the model.

    :param strategy: LightRFT strategy.
    :param processor: If given, every folder that ``save_model`` writes also gets its files, which transformers and
        vLLM need to load an audio model.
    :param files: Further files for these folders: name to text.
    :return: Undoes it.
    :raises PatchError: if ``_build_multimodal_inputs`` or ``save_model`` are not as expected.
    """
    with _all_or_nothing() as patch:
        _patch_build_multimodal_inputs(patch, strategy)
        if not on_runtime():
            from aqa.hosts.lightrft import audio

            audio.patch_strategy(patch, strategy, processor, files)
        elif processor is not None:
            _patch_save_model(patch, strategy, processor, files)
    return patch


def _patch_build_multimodal_inputs(patch: Patch, strategy: Any) -> None:
    """The engine's requests: LightRFT puts the slot's content under "image"; it is audio here.

    Patched on the instance, where ``gather_and_generate`` looks it up. Needed until LightRFT builds audio requests.
    """
    name = "_build_multimodal_inputs"
    original = _require(strategy, name, ("all_prompts", "all_images", "images_num", "all_videos", "videos_num"))
    if not is_marked(strategy, name):
        patch.replace(strategy, name, mark(functools.partial(build_audio_inputs), original))


def build_audio_inputs(
    all_prompts: Sequence[str],
    all_images: Sequence[Any] | None,
    images_num: Sequence[int] | None = None,
    all_videos: Sequence[Any] | None = None,
    videos_num: Sequence[int] | None = None,
) -> list[dict[str, Any]]:
    """Engine requests of prompts with audio.

    :param all_prompts: Prompt texts, one unexpanded placeholder a clip.
    :param all_images: One ``(waveform, rate)`` or None a prompt.
    :param images_num: Clips a prompt; checked against ``all_images``.
    :param all_videos: Unused.
    :param videos_num: Unused.
    :return: ``{"prompt": text}``, with ``"multi_modal_data": {"audio": [(waveform, rate)]}`` where there is a clip.
    :raises ValueError: if the counts do not fit.
    """
    audio = list(all_images) if all_images is not None else [None] * len(all_prompts)
    if len(audio) != len(all_prompts):
        raise ValueError(f"{len(all_prompts)} prompts but {len(audio)} audio entries")
    requests = []
    for i, (prompt, clip) in enumerate(zip(all_prompts, audio, strict=True)):
        if images_num is not None and images_num[i] != int(clip is not None):
            raise ValueError(
                f"prompt {i} should have {images_num[i]} clips and has {int(clip is not None)}: {prompt!r}"
            )
        request: dict[str, Any] = {"prompt": prompt}
        if clip is not None:
            request["multi_modal_data"] = {"audio": [clip]}
        requests.append(request)
    return requests


def _patch_save_model(patch: Patch, strategy: Any, processor: Any, files: dict[str, str] | None) -> None:
    """LightRFT saves model and tokenizer; without the processor's files an audio model cannot be loaded again."""
    original = _require(strategy, "save_model", ("model", "tokenizer", "output_dir"))
    if is_marked(strategy, "save_model"):
        return

    @functools.wraps(original)
    def save_model(model: Any, tokenizer: Any, output_dir: str, **kwargs: Any) -> None:
        original(model, tokenizer, output_dir, **kwargs)
        if strategy.is_rank_0():
            write_processor(processor, files, output_dir)

    patch.replace(strategy, "save_model", mark(save_model, original))


def write_processor(processor: Any, files: dict[str, str] | None, output_dir: str) -> None:
    """Write what a model's folder lacks.

    :param processor: Qwen2-Audio processor.
    :param files: See :func:`patch_strategy_for_audio`.
    :param output_dir: The folder.
    """
    processor.save_pretrained(output_dir)
    for name, text in (files or {}).items():
        (Path(output_dir) / name).write_text(text, encoding="utf-8")


# ----------------------------------------------------------------------------------------------------- experience maker
def patch_experience_maker_for_audio(exp_maker: Any, processor: Any, tokenizer: Any, prompt_max_len: int) -> Patch:
    """Make an experience maker take ``(waveform, rate)`` where it expects images.

    :param exp_maker: LightRFT's ``FastExperienceMaker``.
    :param processor: Qwen2-Audio processor.
    :param tokenizer: Tokenizer.
    :param prompt_max_len: Longest prompt in tokens, a clip's placeholder counted as one.
    :return: Undoes it.
    :raises PatchError: if a spot is not as expected.
    """
    from aqa.patches.multimodal_processor import AudioMultimodalProcessor

    # the experience maker looks these two up in its own module's namespace, whoever defined them
    module = sys.modules[type(exp_maker).__module__]
    with _all_or_nothing() as patch:
        _require(exp_maker, "multimodal_processor")
        if not isinstance(exp_maker.multimodal_processor, AudioMultimodalProcessor):
            audio_processor = AudioMultimodalProcessor(tokenizer, processor, prompt_max_len)
            patch.replace(exp_maker, "multimodal_processor", audio_processor)
        for name, function in (("normalize_images", check_audio), ("get_images_num", count_audio)):
            original = _require(module, name)
            if not is_marked(module, name):
                patch.replace(module, name, mark(functools.partial(function), original))
        if on_runtime():
            patch.replace(exp_maker, "describe_image", describe_audio)
        else:
            from aqa.hosts.lightrft import audio

            audio_token_id = tokenizer.convert_tokens_to_ids(processor.audio_token)
            audio.patch_experience_maker(patch, exp_maker, {audio_token_id: BANNED})
    return patch


class NamedClip(tuple):
    """``(waveform, rate)``, a pair to all who take pairs, that knows its file."""

    path: str | None = None

    @classmethod
    def of(cls, wave: np.ndarray, rate: int, path: str) -> NamedClip:
        """A decoded file.

        :param wave: Samples ``(samples,)``.
        :param rate: In Hz.
        :param path: The file.
        """
        clip = cls((wave, rate))
        clip.path = path
        return clip


def check_audio(raw_images: Sequence[Any]) -> list[Any]:
    """What takes the place of ``normalize_images``: audio is decoded already, and only checked.

    :param raw_images: One ``(waveform, rate)`` or None a prompt.
    :return: The same entries.
    :raises TypeError: if an entry is anything else.
    """
    for i, clip in enumerate(raw_images):
        fits = clip is None or (isinstance(clip, tuple) and len(clip) == 2 and isinstance(clip[0], np.ndarray))
        if not fits:
            raise TypeError(f"prompt {i}: expected (waveform, sampling rate) or None, got {type(clip).__name__}")
    return list(raw_images)


def count_audio(all_images: Sequence[Any] | None) -> list[int] | None:
    """What takes the place of ``get_images_num``.

    :param all_images: One ``(waveform, rate)`` or None a prompt.
    :return: 1 or 0 a prompt.
    """
    return None if all_images is None else [int(clip is not None) for clip in all_images]


def describe_audio(clip: Any) -> dict[str, Any]:
    """What trajectories record of a clip: its file, if it is known.

    :param clip: ``(waveform, rate)`` or None.
    """
    return {"audio_path": clip.path if isinstance(clip, NamedClip) else None}


# ---------------------------------------------------------------------------------------------------------------- actor
def patch_actor_for_audio(actor: Any) -> Patch:
    """Make an actor read the image slot as packed clips, with the exact mask, each different clip encoded once.

    This project's runtime has an extension point for it, ``ActorAL.unpack_audio``. LightRFT's own ``ActorAL`` has
    none: there the whole forward is replaced (``audio.audio_forward``).

    :param actor: Actor or reference model, as prepared by the strategy.
    :return: Undoes it.
    :raises PatchError: if the runtime's actor has no such extension point.
    """
    patch = Patch()
    if not on_runtime():
        from aqa.hosts.lightrft import audio

        audio.patch_actor(patch, actor)
        return patch
    _require(actor, "unpack_audio")
    if not is_marked(actor, "unpack_audio"):

        def unpack_audio(audio_values: Any, image_grid_thw: Any) -> tuple[Any, Any, Any]:
            clips = unpack_clips(audio_values, image_grid_thw)
            return clips.features, clips.frames, clips.index

        patch.replace(actor, "unpack_audio", mark(unpack_audio, actor.unpack_audio))
        patch_policy(patch, getattr(actor.model, "module", actor.model))
    return patch


def patch_policy(patch: Patch, model: Any) -> None:
    """Let the transformers model return the log-probs of responses.

    :param patch: Takes the replacement.
    :param model: A transformers model that ``policy.model_parts`` knows.
    """
    from aqa.policy.forward import parts_of, policy_forward
    from aqa.policy.token_log_probs import patch_head

    patch.replace(model, "forward", types.MethodType(policy_forward(type(model)), model))
    patch_head(patch, parts_of(model).head)
