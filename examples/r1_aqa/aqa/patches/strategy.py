"""Patches of a strategy: the engine's requests carry audio, and a saved model's folder has its processor."""

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from aqa.common.files import write_atomically
from aqa.common.model_folder import complete
from aqa.common.patch import Patch
from aqa.patches.slots import windows_of


def send_audio(patch: Patch, strategy: Any) -> None:
    """Put clips into the engine's requests.

    LightRFT puts what stands in a prompt's image slot (``slots.py``) under "image"; here it goes under "audio".

    Patched on the instance, where ``gather_and_generate`` looks it up. Needed until LightRFT builds audio requests.
    """
    parameters = ("all_prompts", "all_images", "images_num", "all_videos", "videos_num")
    patch.put(strategy, "_build_multimodal_inputs", build_audio_inputs, parameters)


def build_audio_inputs(
    all_prompts: Sequence[str],
    all_images: Sequence[Any] | None,
    images_num: Sequence[int] | None = None,
    all_videos: Sequence[Any] | None = None,
    videos_num: Sequence[int] | None = None,
    **further: Any,
) -> list[dict[str, Any]]:
    """Engine requests of prompts with audio.

    :param all_prompts: Prompt texts, one unexpanded placeholder a clip.
    :param all_images: One ``(waveform, rate)`` or None a prompt.
    :param images_num: Windows of 30 s a prompt; checked against ``all_images``.
    :param further: What later versions of LightRFT pass, such as ``all_audios`` in its pull request 58; None, because
        the clips are in the image slot.
    :return: ``{"prompt": text}``, with ``"multi_modal_data": {"audio": [(waveform, rate)]}`` where there is a clip.
    :raises ValueError: if the counts do not fit, or something further is given.
    """
    if given := sorted(name for name, value in further.items() if value is not None):
        raise ValueError(f"LightRFT also passes {', '.join(given)}: clips are expected in the image slot alone")
    audio = list(all_images) if all_images is not None else [None] * len(all_prompts)
    if len(audio) != len(all_prompts):
        raise ValueError(f"{len(all_prompts)} prompts but {len(audio)} audio entries")
    requests = []
    for i, (prompt, clip) in enumerate(zip(all_prompts, audio, strict=True)):
        windows = 0 if clip is None else len(windows_of(len(clip[0])))
        if images_num is not None and not min(windows, 1) <= images_num[i] <= windows:  # less, of a clip that is cut
            raise ValueError(f"prompt {i} should have {images_num[i]} windows of audio and has {windows}: {prompt!r}")
        request: dict[str, Any] = {"prompt": prompt}
        if clip is not None:
            request["multi_modal_data"] = {"audio": [clip]}
        requests.append(request)
    return requests


def save_processor(patch: Patch, strategy: Any, processor: Any, files: dict[str, str] | None) -> None:
    """Let ``save_model`` write the processor's files, too: without them an audio model cannot be loaded again.

    They go through the runtime's extension point, so that a full disk is a save that failed, on all ranks.

    :param files: Further files for the folder: name to text.
    """
    write = functools.partial(write_processor, processor, files)
    patch.put(strategy, "add_model_files", write, ("folder",))
    patch.replace(strategy, "model_files", files or {})


def write_processor(processor: Any, files: dict[str, str] | None, output_dir: str | Path) -> None:
    """Write the processor's files, and further ones, into a model's folder."""
    processor.save_pretrained(output_dir)
    complete(Path(output_dir))
    for name, text in (files or {}).items():
        write_atomically(Path(output_dir) / name, text)
