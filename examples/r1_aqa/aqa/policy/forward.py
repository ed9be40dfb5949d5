"""An audio language model as a GRPO policy: log-probabilities of the response, each clip encoded once.

:func:`policy_forward` takes the place of a transformers model's ``forward`` (``patch_actor_for_audio`` puts it there),
on either host, with transformers 4.57 and 5. It differs from transformers' own forward as follows, in no value:

- a clip is encoded once, however many sequences of the micro-batch share it;
- the tower works on the valid frames and not on 30 s of padding (``aqa.families``);
- a prompt that several responses share goes through the language model once (``policy.packing``);
- audio goes to the placeholders of the *prompt*, so that a placeholder which the model samples cannot shift it;
- logits are computed for response positions only, and a chunk at a time (``policy.token_log_probs``).
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist

from aqa.common.constants import MAX_FRAMES
from aqa.families import family_of
from aqa.families.qwen2_audio import Parts
from aqa.policy.packing import Packing, divide_groups, pack
from aqa.policy.token_log_probs import token_log_probs


def parts_of(model: Any) -> Parts:
    """The parts of a model of a known family."""
    return family_of(model).parts(model)


def policy_forward(model_class: type) -> Callable[..., Any]:
    """Make the replacement of a model's ``forward``: with ``response_mask`` it returns log-probs, else it calls that.

    One entry serves both, because the hooks of DeepSpeed and FSDP2 surround ``forward`` alone.
    """

    @functools.wraps(model_class.forward)  # generate() reads the signature
    def forward(self: Any, *args: Any, response_mask: torch.Tensor | None = None, **kwargs: Any) -> Any:
        if response_mask is None:
            return model_class.forward(self, *args, **kwargs)
        return response_log_probs(self, *args, response_mask=response_mask, **kwargs)

    return forward


def encode_clips(model: Any, features: torch.Tensor, frames: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Audio tower and projector.

    :param features: Mel spectrograms ``(clips, n_mels, 3000)``, exact in the valid frames and the two after them.
    :param frames: Valid frames ``(clips,)``.
    :return: Audio embeddings ``(sum of tokens, hidden)``, clip after clip, and tokens a clip ``(clips,)``.
    """
    tower, projector, _, _ = parts_of(model)
    tokens = tower._get_feat_extract_output_lengths(frames)[1]
    cache = getattr(model, "tower_cache", None)  # of a frozen tower (``share_tower_outputs``)
    if cache is None:
        return projector(_tower_states(tower, features, frames)), tokens

    def encode(clips: list[int]) -> Sequence[torch.Tensor]:
        return _tower_states(tower, features[clips], frames[clips]).split(tokens[clips].tolist())

    return projector(torch.cat(cache.states(features, frames, encode))), tokens


def _tower_states(tower: Any, features: torch.Tensor, frames: torch.Tensor) -> torch.Tensor:
    """States of all clips' audio tokens ``(sum of tokens, width of the states)``."""
    return family_of(tower).tower_states(tower, features, frames)


def response_log_probs(
    model: Any,
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
    split = sequences.shape[1] - response_mask.shape[1]
    _, _, decoder, head = parts_of(model)
    is_audio = sequences == model.config.audio_token_id
    is_audio[:, split:] = False  # placeholders of the prompt only
    audio, clip_rows, row_clips = _audio_of_rows(model, is_audio.sum(1).tolist(), features, frames, clip_index)
    packing = _pack(decoder.config, sequences, attention_mask, split, row_clips)
    source = packing.source.to(sequences.device)
    embeds = model.get_input_embeddings()(sequences.flatten()[source])
    if audio is not None:
        order = torch.cat([clip_rows[clip] for row in packing.first for clip in row_clips[row]] or [clip_rows[0][:0]])
        here = is_audio.flatten()[source] & (packing.segments == 0).to(source.device)
        embeds = embeds.masked_scatter(here.unsqueeze(-1), audio.to(embeds.dtype)[order])
        # keeps the tower in the graph on every rank; without it ZeRO-3 hangs when one rank has no audio
        embeds = embeds + 0.0 * audio.sum()
    hidden = decoder(
        inputs_embeds=embeds,
        attention_mask=packing.attention_mask(embeds.device, embeds.dtype),
        position_ids=packing.positions.to(embeds.device),
        use_cache=False,
    ).last_hidden_state
    chosen = response_mask.bool()
    hidden = hidden.flatten(0, 1)[packing.predictors.to(chosen.device)[chosen]]
    log_probs = token_log_probs(head, hidden, sequences[:, split:][chosen], temperature, logit_bias)
    return log_probs.new_zeros(chosen.shape).masked_scatter(chosen, log_probs)


def _pack(
    config: Any, sequences: torch.Tensor, attention_mask: torch.Tensor, split: int, row_clips: list[tuple[int, ...]]
) -> Packing:
    """Rows in which sequences with the same prompt share it, where the decoder's attention takes such a mask."""
    valid = attention_mask.bool().cpu()
    sliding = "sliding_attention" in (getattr(config, "layer_types", None) or ())  # transformers 4.57 may have no types
    if config._attn_implementation not in ("sdpa", "eager") or sliding:
        return pack(valid, split, [[row] for row in range(len(valid))])
    groups = group_prompts(sequences[:, :split].cpu().masked_fill(~valid[:, :split], -1), row_clips)
    return pack(valid, split, divide_groups(groups, valid, split, config))


def _audio_of_rows(
    model: Any,
    placeholders: list[int],
    features: torch.Tensor | None,
    frames: torch.Tensor | None,
    clip_index: torch.Tensor | None,
) -> tuple[torch.Tensor | None, list[torch.Tensor], list[tuple[int, ...]]]:
    """Encode the clips, and find out which sequence has which.

    :param placeholders: Audio placeholders of each sequence's prompt.
    :return: Embeddings of all clips, one below the other (None without audio); the rows of each clip in them; and
        the clips of each sequence.
    :raises ValueError: if placeholders and clips do not fit.
    """
    if features is None:
        if any(placeholders):
            raise ValueError(f"the prompts hold {placeholders} audio placeholders, but there is no clip")
        packed = None
        if dist.is_initialized() and dist.get_world_size() > 1:
            # Another rank may have audio, and under ZeRO-3 all ranks must run the same modules: encode silence.
            device = parts_of(model).head.weight.device
            silence = torch.zeros(1, model.config.audio_config.num_mel_bins, MAX_FRAMES, device=device)
            packed, tokens = encode_clips(model, silence, torch.tensor([8], device=device))
            return packed, [torch.arange(int(tokens[0]), device=device)], [() for _ in placeholders]
        return packed, [], [() for _ in placeholders]
    packed, tokens = encode_clips(model, features, frames)
    sizes = tokens.tolist()
    clip_rows = list(torch.arange(len(packed), device=packed.device).split(sizes))
    clips = iter(clip_index.tolist())
    row_clips = []
    for row, count in enumerate(placeholders):
        mine: list[int] = []
        while sum(sizes[clip] for clip in mine) < count:
            clip = next(clips, None)
            if clip is None:
                break
            mine.append(clip)
        if sum(sizes[clip] for clip in mine) != count:
            raise ValueError(
                f"sequence {row} of the micro-batch holds {count} audio placeholders, its clips make "
                f"{[sizes[clip] for clip in mine]} audio tokens"
            )
        row_clips.append(tuple(mine))
    if next(clips, None) is not None:
        raise ValueError(f"{len(clip_index)} clips, but the prompts' placeholders {placeholders} take fewer")
    return packed, clip_rows, row_clips


def group_prompts(prompts: torch.Tensor, row_clips: list[tuple[int, ...]]) -> list[list[int]]:
    """Find the sequences that share their prompt: the same tokens and the same clips.

    :param prompts: Prompt tokens, -1 at padding ``(batch, prompt width)``.
    :param row_clips: Clips of each sequence.
    :return: The sequences of each group.
    """
    groups: dict[tuple, list[int]] = {}
    for row, (tokens, clips) in enumerate(zip(prompts.tolist(), row_clips, strict=True)):
        groups.setdefault((tuple(tokens), clips), []).append(row)
    return list(groups.values())
