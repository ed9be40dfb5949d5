"""An audio language model as a GRPO policy: log-probabilities of the response, each clip encoded once.

:func:`policy_forward` takes the place of a transformers model's ``forward`` (``patch_actor_for_audio`` puts it there),
on either host, with transformers 4.57 and 5. It differs from transformers' own forward as follows, in no value:

- a clip is encoded once, however many sequences of the micro-batch share it;
- the tower works on the valid frames and not on 30 s of padding (``policy.model_parts``);
- a prompt that several responses share goes through the language model once, and its keys and values are reused;
- audio goes to the placeholders of the *prompt*, so that a placeholder which the model samples cannot shift it;
- logits are computed for response positions only, and a chunk at a time (``policy.token_log_probs``).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from transformers import DynamicCache

from aqa.common.constants import MAX_FRAMES
from aqa.policy.model_parts import Parts, family_of
from aqa.policy.token_log_probs import token_log_probs


def parts_of(model: Any) -> Parts:
    """The parts of a model that ``policy.model_parts`` knows."""
    return family_of(model).parts(model)


def policy_forward(model_class: type) -> Callable[..., Any]:
    """Make the replacement of a model's ``forward``: with ``response_mask`` it returns log-probs, else it calls that.

    One entry serves both, because the hooks of DeepSpeed and FSDP2 surround ``forward`` alone.
    """

    @functools.wraps(model_class.forward)  # generate() reads the signature
    def forward(self: Any, *args: Any, response_mask: torch.Tensor | None = None, **kwargs: Any) -> Any:
        if response_mask is None:
            return type(self).forward(self, *args, **kwargs)
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
    states = _tower_states(tower, features, frames) if cache is None else _known_states(cache, tower, features, frames)
    return projector(states), tokens


def _known_states(cache: Any, tower: Any, features: torch.Tensor, frames: torch.Tensor) -> torch.Tensor:
    """The states of a frozen tower, as :func:`_tower_states`; computed only for clips that its cache lacks."""
    keys = [cache.key(clip, count) for clip, count in zip(features, frames.tolist(), strict=True)]
    kept = [cache.get(key) for key in keys]
    missing = [i for i, states in enumerate(kept) if states is None]
    if missing:
        with torch.no_grad():
            new = _tower_states(tower, features[missing], frames[missing])
        sizes = tower._get_feat_extract_output_lengths(frames[missing])[1].tolist()
        for i, states in zip(missing, new.split(sizes), strict=True):
            kept[i] = states
            cache.put(keys[i], states)
    return torch.cat([states.to(features.device, non_blocking=True) for states in kept])


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
        ``response_mask.shape[1]`` columns, two or more, are the response region.
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
    width = response_mask.shape[1]
    split = sequences.shape[1] - width
    _, _, decoder, head = parts_of(model)
    is_audio = sequences == model.config.audio_token_id
    is_audio[:, split:] = False  # placeholders of the prompt only
    packed, clip_rows, row_clips = _audio_of_rows(model, is_audio.sum(1).tolist(), features, frames, clip_index)
    # This does not depend on the data, because under ZeRO-3 all ranks must run the same modules. Gradient checkpointing
    # computes activations twice, and the second time the cache would already be filled.
    shared = len(sequences) > 1 and not (model.training and decoder.gradient_checkpointing)
    rows, group = list(range(len(sequences))), []
    if shared:
        tokens = sequences[:, :split].masked_fill(attention_mask[:, :split] == 0, -1)
        rows, group = group_prompts(tokens, row_clips)
    position_ids = (attention_mask.long().cumsum(-1) - 1).clamp(min=0)

    columns = slice(0, split if shared else None)
    embeds = model.get_input_embeddings()(sequences[rows, columns])
    if packed is not None:
        order = torch.cat([clip_rows[clip] for row in rows for clip in row_clips[row]] or [clip_rows[0][:0]])
        audio = packed.to(embeds.dtype)[order]
        embeds = embeds.masked_scatter(is_audio[rows, columns].unsqueeze(-1), audio)
        # keeps the tower in the graph on every rank; without it ZeRO-3 hangs when one rank has no audio
        embeds = embeds + 0.0 * packed.sum()
    output = decoder(
        inputs_embeds=embeds,
        attention_mask=attention_mask[rows, columns],
        position_ids=position_ids[rows, columns],
        past_key_values=DynamicCache(config=decoder.config) if shared else None,
        use_cache=shared,
    )
    hidden = output.last_hidden_state[:, split - 1 :]
    if shared:
        index = torch.tensor(group, device=sequences.device)
        hidden = hidden[index]
        cache = output.past_key_values
        cache.batch_select_indices(index)
        continued = decoder(  # the response without its last token, after the keys and values of its group's prompt
            inputs_embeds=model.get_input_embeddings()(sequences[:, split:-1]),
            attention_mask=attention_mask[:, :-1],
            position_ids=position_ids[:, split:-1],
            past_key_values=cache,
            use_cache=True,
        ).last_hidden_state
        hidden = torch.cat([hidden, continued], 1)
    else:
        hidden = hidden[:, :-1]
    chosen = response_mask.bool()
    log_probs = token_log_probs(head, hidden[chosen], sequences[:, split:][chosen], temperature, logit_bias)
    return log_probs.new_zeros(chosen.shape).masked_scatter(chosen, log_probs)


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


def group_prompts(prompts: torch.Tensor, row_clips: list[tuple[int, ...]]) -> tuple[list[int], list[int]]:
    """Find the sequences that share their prompt: the same tokens and the same clips.

    :param prompts: Prompt tokens, -1 at padding ``(batch, prompt width)``.
    :param row_clips: Clips of each sequence.
    :return: The first sequence of each group, and the group of each sequence.
    """
    known: dict[tuple, int] = {}
    rows, group = [], []
    for row, (tokens, clips) in enumerate(zip(prompts.tolist(), row_clips, strict=True)):
        key = (tuple(tokens), clips)
        if key not in known:
            known[key] = len(rows)
            rows.append(row)
        group.append(known[key])
    return rows, group
