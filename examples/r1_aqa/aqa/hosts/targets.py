"""The three patches that make LightRFT's image slots carry audio, one for each object.

Each checks that what it replaces is there and takes the expected arguments, does nothing where it has been applied
already, and returns a :class:`~aqa.common.patch.Patch` that undoes it, by ``undo()`` or at the end of a ``with`` block.
One that fails leaves nothing behind. The strategy must be patched before it starts the engine.
"""

from typing import Any

from aqa.audio.decode import MAX_SECONDS
from aqa.common.patch import Patch, all_or_nothing
from aqa.hosts.current import current_host
from aqa.patches.experience_maker import take_audio
from aqa.patches.strategy import send_audio


def patch_strategy_for_audio(strategy: Any, processor: Any = None, files: dict[str, str] | None = None) -> Patch:
    """Make a strategy send audio to the engine, and save the processor with the model.

    :param processor: If given, every folder that ``save_model`` writes also gets its files, which transformers and
        vLLM need to load an audio model.
    :param files: Further files for these folders: name to text.
    :raises PatchError: if ``_build_multimodal_inputs`` or the method that saves a model are not as expected.
    """
    with all_or_nothing() as patch:
        send_audio(patch, strategy)
        current_host().patch_strategy(patch, strategy, processor, files)
    return patch


def patch_experience_maker_for_audio(
    exp_maker: Any, processor: Any, tokenizer: Any, prompt_max_len: int, audio_seconds: float = MAX_SECONDS
) -> Patch:
    """Make an experience maker take ``(waveform, rate)`` where it expects images.

    :param prompt_max_len: Longest prompt in tokens, a clip's placeholder counted as one.
    :param audio_seconds: Longest clip; what is longer is cut.
    :raises PatchError: if a symbol is not as expected.
    """
    with all_or_nothing() as patch:
        take_audio(patch, exp_maker, processor, tokenizer, prompt_max_len, audio_seconds)
        audio_token_id = tokenizer.convert_tokens_to_ids(processor.audio_token)
        current_host().patch_experience_maker(patch, exp_maker, audio_token_id)
    return patch


def patch_actor_for_audio(actor: Any) -> Patch:
    """Make an actor read the image slot as packed clips, with the exact mask, each different clip encoded once.

    The runtime's actor has an extension point for it. LightRFT's has none; there the whole forward is replaced
    (``aqa.hosts.lightrft.audio.audio_forward``).

    :param actor: Actor or reference model, as prepared by the strategy.
    :raises PatchError: if the actor is not as expected.
    """
    with all_or_nothing() as patch:
        current_host().patch_actor(patch, actor)
    return patch
