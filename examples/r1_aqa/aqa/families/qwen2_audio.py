"""Qwen2-Audio, and by its members the description of a family: another one overrides those in which it differs."""

from __future__ import annotations

import functools
import importlib
import inspect
from typing import Any, ClassVar, NamedTuple

QWEN2_5_7B = {  # the language model of several families
    "hidden_size": 3584,
    "intermediate_size": 18_944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
}


class Parts(NamedTuple):
    """The parts of a model.

    :param tower: Audio encoder.
    :param projector: From the tower's states to the decoder's.
    :param decoder: Language model without its head.
    :param head: From hidden states to the vocabulary.
    """

    tower: Any
    projector: Any
    decoder: Any
    head: Any


class Qwen2Audio:
    """Qwen2-Audio: a tower on 30 s, which sees two frames beyond the last valid one."""

    name = "Qwen2-Audio"
    model_types: tuple[str, ...] = ("qwen2_audio",)  # in a folder's config.json; further ones: of the live model
    tower_type = "qwen2_audio_encoder"
    model_class_name = "Qwen2AudioForConditionalGeneration"
    processor_class_name = "Qwen2AudioProcessor"
    audio_token = "<|AUDIO|>"  # stands for a clip in a rendered prompt
    clip_text = "'Audio ' ~ clips.seen ~ ': <|audio_bos|><|AUDIO|><|audio_eos|>\\n'"  # Jinja, in the demo's template
    longest_seconds = 30  # the most that --audio_seconds may be
    foreign: tuple[str, ...] = ()  # prefixes of checkpoint weights that the model does not have
    unheard: tuple[str, ...] = ()  # modules that neither audio nor text uses; frozen
    # sinusoids, which do not train; transformers 5 forgets that while it loads, except under ZeRO-3
    fixed: tuple[str, ...] = ("model.audio_tower.embed_positions",)
    language_model = "language_model"  # the module that --target_modules calls so
    # live names of the tower, of the decoder, and of the linear layers between them, in order; the tower's last norm
    tower, decoder = "model.audio_tower", "model.language_model"
    projectors: tuple[str, ...] = ("model.multi_modal_projector.linear",)
    tower_norm = "layer_norm"
    # published models, and what their configuration has beside the defaults of Qwen2AudioEncoderConfig and Qwen2Config
    published: ClassVar[dict[str, dict[str, Any]]] = {
        name: {"text_config": {"vocab_size": 156_032, "intermediate_size": 11_008}}
        for name in ("Qwen/Qwen2-Audio-7B-Instruct", "Qwen/Qwen2-Audio-7B")
    }
    # --load_in_4bit does not pack these: the log-probs read the head's weight, and tower and projector are small
    unpacked: tuple[str, ...] = ("lm_head", "model.audio_tower", "model.multi_modal_projector")
    deaf: tuple[str, ...] = ("language_model.",)  # prefixes of checkpoint weights that no clip's embedding depends on

    one_clip_in_vllm = False  # vLLM 0.32 takes one recording a prompt
    ours_in_vllm = False  # vLLM's own class is replaced by one that this process alone knows

    @classmethod
    def model_class(cls) -> Any:
        return getattr(importlib.import_module("transformers"), cls.model_class_name)

    @classmethod
    def processor_class(cls) -> Any:
        """The class of tokenizer, feature extractor and chat template."""
        return getattr(importlib.import_module("transformers"), cls.processor_class_name)

    # ---- checkpoints
    @staticmethod
    def checkpoint_name(name: str) -> str:
        """Name of a parameter in a checkpoint, which is also what the engines load.

        :param name: Name in the live module. transformers 5 has ``model.language_model.*``, ``lm_head.*``,
            ``model.audio_tower.*`` and ``model.multi_modal_projector.*``; a checkpoint's name stays.
        :return: ``language_model.model.*``, ``language_model.lm_head.*``, ``audio_tower.*`` or
            ``multi_modal_projector.*``.
        """
        if name.startswith("model.language_model."):
            return "language_model.model." + name.removeprefix("model.language_model.")
        if name.startswith("lm_head."):
            return "language_model." + name
        return name.removeprefix("model.")

    @classmethod
    def checkpoint_config(cls, config: dict[str, Any]) -> dict[str, Any]:
        """Content of a checkpoint's ``config.json``, from that of the live model."""
        # our class is the same model with another forward; others shall load it under its own name
        return config | {"architectures": [cls.model_class_name]}

    # ---- engines
    @staticmethod
    def vllm_options(seconds: float) -> dict[str, Any]:
        """Arguments of ``vllm.LLM`` that the family needs.

        :param seconds: Longest clip.
        """
        return {}

    @classmethod
    def tune_vllm(cls, model: Any, cache: Any = None) -> None:
        """Change vLLM's model in a way that changes no value: here, encode the valid frames alone.

        :param model: As vLLM's worker has it.
        :param cache: Keeps the outputs of a tower that does not train (``aqa.policy.tower_cache``).
        """
        from transformers.modeling_outputs import BaseModelOutput

        encode = functools.partial(encode_valid_frames, model.audio_tower, cache)
        model.audio_tower.forward = lambda *args, **kwargs: BaseModelOutput(encode(*args, **kwargs))

    @staticmethod
    def prefill(model: Any, inputs: dict[str, Any], positions: Any, cache: Any) -> None:
        """Pass prompts through the live model, so that ``generate`` goes on behind them.

        :param inputs: From the processor.
        :param positions: Of the tokens ``(prompts, length)``.
        """
        model.model(**inputs, position_ids=positions, past_key_values=cache, use_cache=True)

    # ---- the policy's forward
    @staticmethod
    def parts(model: Any) -> Parts:
        """Find the parts; transformers 5 keeps them in other places than 4.57."""
        if hasattr(model, "lm_head"):
            inner = model.model
            return Parts(inner.audio_tower, inner.multi_modal_projector, inner.language_model, model.lm_head)
        causal = model.language_model
        return Parts(model.audio_tower, model.multi_modal_projector, causal.model, causal.lm_head)

    @staticmethod
    def tower_states(tower: Any, features: Any, frames: Any) -> Any:
        """States of all clips' audio tokens ``(sum of tokens, d_model)``.

        :param features: Mel spectrograms ``(clips, n_mels, 3000)``, exact in the valid frames and the two after them.
        :param frames: Valid frames ``(clips,)``.
        """
        import torch
        from torch.nn.functional import gelu

        after_conv, tokens = tower._get_feat_extract_output_lengths(frames)
        # two frames of context; masked keys weigh exactly 0, so that leaving out the padding changes no value
        width = min(int(frames.max()) + 2, features.shape[-1])
        dtype = tower.conv1.weight.dtype
        hidden = gelu(tower.conv1(features[:, :, :width].to(dtype)))
        hidden = gelu(tower.conv2(hidden)).transpose(1, 2)
        states = torch.arange(hidden.shape[1], device=hidden.device)
        hidden = hidden + tower.embed_positions(states)
        mask = _padding_mask(tower, hidden, states[None, :] < after_conv[:, None])
        old = "layer_head_mask" in inspect.signature(tower.layers[0].forward).parameters  # transformers 4
        for layer in tower.layers:
            hidden = layer(hidden, mask, None)[0] if old else layer(hidden, mask)
        hidden = tower.layer_norm(tower.avg_pooler(hidden.transpose(1, 2)).transpose(1, 2))
        valid = torch.arange(hidden.shape[1], device=tokens.device)[None, :] < tokens[:, None]
        return hidden[valid]


def _padding_mask(tower: Any, hidden: Any, valid: Any) -> Any:
    """The attention mask that the tower's layers take, from the valid states ``(clips, states)``."""
    import torch

    try:
        from transformers.masking_utils import create_bidirectional_mask
    except ImportError:  # transformers 4: the tower's eager attention adds the mask to the scores
        lowest = torch.finfo(hidden.dtype).min
        return torch.zeros_like(valid, dtype=hidden.dtype).masked_fill(~valid, lowest)[:, None, None, :]
    return create_bidirectional_mask(config=tower.config, inputs_embeds=hidden, attention_mask=valid.long())


def encode_valid_frames(tower: Any, cache: Any, input_features: Any, attention_mask: Any) -> Any:
    """vLLM's tower without the padding behind the longest clip: 2 s cost a fifteenth of 30 s, or less.

    Masked keys weigh exactly 0, so that leaving them out changes no value. transformers' own forward insists on 30 s.

    :param cache: Of earlier clips' outputs; None: every clip is encoded.
    :param input_features: Mel spectrograms ``(clips, n_mels, 3000)``.
    :param attention_mask: 0 at valid states and -inf at padding, ``(clips, 1, 1500, 1500)``.
    :return: States of the longest clip's audio tokens, ``(clips, tokens, d_model)``.
    """
    from torch.nn.functional import gelu
    from torch.nn.utils.rnn import pad_sequence

    valid = (attention_mask[:, 0, 0] == 0).sum(-1)

    def encode(clips: list[int]) -> list[Any]:
        states = int(valid[clips].max())
        # two frames a state, and one of context behind the last: the second convolution leaves one out
        hidden = input_features[clips, :, : 2 * states + 1].to(tower.conv1.weight.dtype)
        hidden = gelu(tower.conv2(gelu(tower.conv1(hidden))))[..., :states].transpose(1, 2)
        hidden = hidden + tower.embed_positions.weight[:states]
        for layer in tower.layers:
            hidden = layer(hidden, attention_mask[clips, :, :states, :states])
        hidden = tower.avg_pooler(hidden.transpose(1, 2)).transpose(1, 2)
        hidden = tower.layer_norm(hidden)
        return [clip[: count // 2] for clip, count in zip(hidden, valid[clips].tolist(), strict=True)]

    outputs = cache.states(input_features, 2 * valid, encode) if cache else encode(list(range(len(valid))))
    return pad_sequence(outputs, batch_first=True)
