"""Patches of an actor or reference model: it reads the image slot as clips, and returns log-probs of responses."""

from typing import Any

from aqa.common.patch import Patch
from aqa.patches.slots import unpack_clips
from aqa.policy.forward import parts_of, policy_forward
from aqa.policy.token_log_probs import patch_head


def read_clips(patch: Patch, actor: Any) -> None:
    """Fill ``ActorAL.unpack_audio``, the extension point of this project's runtime, and patch the model below.

    Each different clip is encoded once, with the exact mask of its frames.

    :raises PatchError: if the actor has no such extension point.
    """

    def unpack_audio(audio_values: Any, image_grid_thw: Any) -> tuple[Any, Any, Any]:
        clips = unpack_clips(audio_values, image_grid_thw)
        return clips.features, clips.frames, clips.index

    if patch.wrap(actor, "unpack_audio", lambda original: unpack_audio):
        patch_policy(patch, getattr(actor.model, "module", actor.model))


def patch_policy(patch: Patch, model: Any) -> None:
    """Let a transformers model return the log-probs of responses.

    :param model: Of a known family.
    :raises ValueError: if it is of none.
    """
    head = parts_of(model).head
    patch.override(model, "forward", policy_forward(type(model)))
    patch_head(patch, head)
