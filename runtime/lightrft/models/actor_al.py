"""The audio-language actor, with LightRFT's call signature.

Adapters need peft, which is optional and imported only for them.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.integrations import HfDeepSpeedConfig

from lightrft.models.actor_modality import ActorModality
from lightrft.models.four_bit import four_bit_config, prepare
from lightrft.utils.families import family_of


def load_model(pretrain: str, **kwargs: Any) -> PreTrainedModel:
    """Load a checkpoint of one of the families; parts that text and sound do not pass are frozen.

    :raises ValueError: if it is of no family, if the checkpoint lacks a parameter of the model, or holds one that the
        model has not: such a model would train, from random weights.
    """
    family = family_of(pretrain)
    model, info = family.model_class().from_pretrained(pretrain, output_loading_info=True, **kwargs)
    wrong = {kind: sorted(info[f"{kind}_keys"]) for kind in ("missing", "unexpected", "mismatched")}
    wrong["unexpected"] = [name for name in wrong["unexpected"] if not name.startswith(family.foreign)]
    if any(wrong.values()):
        raise ValueError(f"{pretrain} is not a whole {family.name} checkpoint: {wrong}")
    for part in (*family.unheard, *family.fixed):
        model.get_submodule(part).requires_grad_(False)
    return model


class ActorAL(nn.Module):
    """Policy or reference model with audio input, and what is needed to score its responses.

    :param pretrain_or_model: Folder (or hub name) of a checkpoint, or a loaded model.
    :param use_flash_attention_2: Use flash-attn kernels; otherwise PyTorch's scaled dot product attention.
    :param ds_config: DeepSpeed configuration; with ZeRO-3 the weights are partitioned while loading.
    :param lora_rank: Rank of LoRA adapters, which then train alone; 0: none.
    :param load_in_4bit: Keep the language model's linear layers at 4 bits a weight; adapters alone can then train.
    :raises ValueError: if that is asked for without adapters, or with ZeRO-3; if the model is of a family that gets no
        adapters, or :func:`load_model` refuses it.
    """

    modality = ActorModality.AUDIO_LANGUAGE

    def __init__(
        self,
        pretrain_or_model: str | PreTrainedModel,
        use_flash_attention_2: bool = False,
        bf16: bool = True,
        ds_config: dict[str, Any] | None = None,
        lora_rank: int = 0,
        lora_alpha: int = 16,
        target_modules: Sequence[str] = ("language_model",),
        load_in_4bit: bool = False,
    ) -> None:
        super().__init__()
        zero3 = ds_config is not None and ds_config["zero_optimization"]["stage"] == 3
        if load_in_4bit and (lora_rank == 0 or zero3):
            raise ValueError("load_in_4bit needs adapters (lora_rank) and ZeRO 0 or 2")
        if isinstance(pretrain_or_model, str):
            if zero3:
                self._ds_config = HfDeepSpeedConfig(
                    ds_config
                )  # from_pretrained finds this object through a weak reference
            dtype = torch.bfloat16 if bf16 else torch.float32
            kwargs: dict[str, Any] = {}
            if load_in_4bit:
                kwargs["quantization_config"] = four_bit_config(dtype, family_of(pretrain_or_model).unpacked)
            self.model = load_model(
                pretrain_or_model,
                dtype=dtype,
                attn_implementation="flash_attention_2" if use_flash_attention_2 else "sdpa",
                **kwargs,
            )
            if load_in_4bit:
                prepare(self.model)
        else:
            self.model = pretrain_or_model
        self.lora_config: Any = None
        if lora_rank > 0:
            from lightrft.models.lora import add_adapters

            name = pretrain_or_model if isinstance(pretrain_or_model, str) else self.model.name_or_path
            self.lora_config = add_adapters(self.model, lora_rank, lora_alpha, target_modules, name)
        self.model.config.use_cache = False
        # set by the trainer to the sampling's values, so that log-probs are those of the sampling distribution
        self.temperature = 1.0
        self.logit_bias: dict[int, float] = {}
        # extension point: (audio_values, image_grid_thw) -> (features, frames, clip index); see forward
        self.unpack_audio: Callable[..., tuple[torch.Tensor, torch.Tensor, torch.Tensor]] | None = None

    def forward(
        self,
        sequences: torch.Tensor,
        num_actions: int,
        attention_mask: torch.Tensor,
        image_grid_thw: torch.Tensor | None = None,
        audio_values: torch.Tensor | list[torch.Tensor] | None = None,
    ) -> torch.Tensor:
        """Log-probabilities of the responses.

        :param sequences: ``(batch, length)``; the last ``num_actions`` columns are the response region.
        :param num_actions: Width of the response region.
        :param attention_mask: ``(batch, length)``, 1 at tokens.
        :param image_grid_thw: ``(clips, 3)``: the grid of the clips in the image slot.
        :param audio_values: What the image slot carries; turned into features by :attr:`unpack_audio`.
        :return: ``(batch, num_actions)`` float32, 0 at padding.
        :raises RuntimeError: if nothing set :attr:`unpack_audio`.
        """
        if self.unpack_audio is None:
            raise RuntimeError("the actor cannot unpack audio yet: call patch_actor_for_audio(actor) first")
        audio = {}
        if audio_values is not None:
            features, frames, index = self.unpack_audio(audio_values, image_grid_thw)
            device = sequences.device
            audio = {"features": features.to(device), "frames": frames.to(device), "clip_index": index.to(device)}
        return self.model(
            sequences=sequences,
            attention_mask=attention_mask,
            response_mask=attention_mask[:, -num_actions:],
            temperature=self.temperature,
            logit_bias=self.logit_bias,
            **audio,
        )

    def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs: dict[str, Any] | None = None) -> None:
        """Recompute activations in the backward pass instead of keeping them.

        :param gradient_checkpointing_kwargs: Handed to transformers, e.g. ``{"use_reentrant": False}``.
        """
        self.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=gradient_checkpointing_kwargs)
