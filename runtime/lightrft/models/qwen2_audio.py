"""Qwen2-Audio as a GRPO policy: log-probabilities of the response, each clip encoded once."""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.nn.functional as F
from transformers import Qwen2AudioForConditionalGeneration
from transformers.masking_utils import create_bidirectional_mask


class Qwen2AudioPolicy(Qwen2AudioForConditionalGeneration):
    """Qwen2-Audio whose forward can return response log-probs. Weights and names are those of the parent class.

    What differs from the parent's forward, none of it in value:

    - a clip is encoded once, however many sequences of the micro-batch share it;
    - the tower works on the valid frames (rounded up to the longest clip) and not on 30 s of padding;
    - audio goes to the placeholders of the *prompt*, so a sampled placeholder cannot shift it;
    - logits are made for response positions only.
    """

    def forward(self, *args, response_mask: torch.Tensor | None = None, **kwargs):
        """The parent's forward or, with ``response_mask``, :meth:`response_log_probs`.

        One entry for both, because DeepSpeed's hooks wrap ``forward`` alone.
        """
        if response_mask is None:
            return super().forward(*args, **kwargs)
        return self.response_log_probs(*args, response_mask=response_mask, **kwargs)

    def encode_clips(self, features: torch.Tensor, frames: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Audio tower and projector.

        :param features: Mel spectrograms ``(clips, n_mels, 3000)``, exact in the valid frames and the two after them.
        :param frames: Valid frames ``(clips,)``.
        :return: Audio embeddings ``(sum of tokens, hidden)``, clip after clip, and tokens a clip ``(clips,)``.
        """
        tower = self.model.audio_tower
        after_conv, tokens = tower._get_feat_extract_output_lengths(frames)
        # two frames of context, and an even number of states for the pooling; masked keys weigh exactly 0, so that
        # leaving out the padding changes no value
        width = min(int(frames.max()) + 2, features.shape[-1])
        width = min((width + 3) // 4 * 4, features.shape[-1])
        dtype = tower.conv1.weight.dtype
        hidden = F.gelu(tower.conv1(features[:, :, :width].to(dtype)))
        hidden = F.gelu(tower.conv2(hidden)).transpose(1, 2)
        states = torch.arange(hidden.shape[1], device=hidden.device)
        hidden = hidden + tower.embed_positions(states)
        mask = create_bidirectional_mask(
            config=tower.config,
            inputs_embeds=hidden,
            attention_mask=(states[None, :] < after_conv[:, None]).long(),
        )
        for layer in tower.layers:
            hidden = layer(hidden, mask)
        hidden = tower.layer_norm(tower.avg_pooler(hidden.transpose(1, 2)).transpose(1, 2))
        embeddings = self.model.multi_modal_projector(hidden)
        valid = torch.arange(embeddings.shape[1], device=tokens.device)[None, :] < tokens[:, None]
        return embeddings[valid], tokens

    def response_log_probs(
        self,
        sequences: torch.Tensor,
        attention_mask: torch.Tensor,
        response_mask: torch.Tensor,
        features: torch.Tensor | None = None,
        frames: torch.Tensor | None = None,
        clip_index: torch.Tensor | None = None,
        temperature: float = 1.0,
        logit_bias: dict[int, float] | None = None,
    ) -> torch.Tensor:
        """Log-probabilities of the response tokens under the distribution they were sampled from.

        :param sequences: Token ids ``(batch, length)``: padding, prompt, response, padding; the last
            ``response_mask.shape[1]`` columns are the response region.
        :param attention_mask: ``(batch, length)``, 1 at tokens.
        :param response_mask: ``(batch, response length)``, 1 at response tokens.
        :param features: Different clips ``(clips, n_mels, 3000)``; None for text alone.
        :param frames: Valid frames ``(clips,)``.
        :param clip_index: For each audio of the batch, in order, its row in ``features``.
        :param temperature: Sampling temperature; logits are divided by it.
        :param logit_bias: Added to the logits of these token ids, as at sampling.
        :return: ``(batch, response length)`` float32, 0 where ``response_mask`` is 0.
        :raises ValueError: if the prompt's placeholders do not match the clips.
        """
        embeds = self.get_input_embeddings()(sequences)
        width = response_mask.shape[1]
        if features is not None:
            is_audio = sequences == self.config.audio_token_id
            is_audio[:, sequences.shape[1] - width :] = False  # placeholders of the prompt only
            packed, tokens = self.encode_clips(features, frames)
            starts = tokens.cumsum(0) - tokens
            order = torch.cat(
                [torch.arange(int(starts[i]), int(starts[i] + tokens[i]), device=packed.device) for i in clip_index]
            )
            if int(is_audio.sum()) != len(order):
                raise ValueError(
                    f"the prompts hold {int(is_audio.sum())} audio placeholders (a sequence: "
                    f"{is_audio.sum(1).tolist()}), the clips make {len(order)} audio tokens "
                    f"(a clip: {[int(tokens[i]) for i in clip_index]})"
                )
            embeds = embeds.masked_scatter(is_audio.unsqueeze(-1), packed.to(embeds.dtype)[order])
        elif dist.is_initialized() and dist.get_world_size() > 1:
            # this rank's micro-batch has no audio, another's may: ZeRO needs all ranks to run the same modules
            silence = embeds.new_zeros(1, self.config.audio_config.num_mel_bins, 3000)
            packed, _ = self.encode_clips(silence, torch.tensor([8], device=embeds.device))
            embeds = embeds + 0.0 * packed.sum()
        position_ids = (attention_mask.long().cumsum(-1) - 1).clamp(min=0)
        hidden = self.model.language_model(
            inputs_embeds=embeds, attention_mask=attention_mask, position_ids=position_ids, use_cache=False
        ).last_hidden_state
        chosen = response_mask.bool()
        logits = self.lm_head(hidden[:, -width - 1 : -1][chosen]).float()  # (response tokens, vocabulary)
        for token, bias in (logit_bias or {}).items():
            logits[:, token] = logits[:, token] + bias
        if temperature != 1.0:
            logits = logits / temperature
        log_probs = -F.cross_entropy(logits, sequences[:, -width:][chosen], reduction="none")
        return log_probs.new_zeros(chosen.shape).masked_scatter(chosen, log_probs)
