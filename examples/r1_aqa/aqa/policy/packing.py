"""Rows for the language model in which a prompt stands once, followed by all responses to it.

A row is ``prompt, response 1, ..., response n``. Each response continues the positions of the prompt, and attends to
the prompt and to itself, so its values are those of ``prompt, response`` alone. One call of the decoder computes them
all, which gradient checkpointing, ZeRO-3 and FSDP2 treat like any other.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence

PADDING = -1


@dataclass(frozen=True)
class Packing:
    """How the sequences of a micro-batch are laid out. All tensors are on the CPU.

    :param first: For each row, the sequence whose prompt it holds.
    :param source: Where each token of a row comes from: flat index into the sequences ``(rows, width)``.
    :param positions: Position ids ``(rows, width)``.
    :param segments: 0 at the prompt, from 1 at the responses, :data:`PADDING` at the end ``(rows, width)``.
    :param predictors: For each response token, the flat index of the token in the rows whose hidden state predicts it
        ``(sequences, response width)``; 0 at padding.
    """

    first: list[int]
    source: torch.Tensor
    positions: torch.Tensor
    segments: torch.Tensor
    predictors: torch.Tensor

    def attention_mask(self, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
        """The mask that the decoder takes.

        :param dtype: Of the decoder's inputs.
        :return: ``(rows, width)``, 1 at tokens, if every row holds one response. Otherwise ``(rows, 1, width, width)``:
            0 where a token attends to another, the lowest number of ``dtype`` elsewhere. (``sdpa`` would make such a
            mask of bools in every layer, and keep each.)
        """
        segments = self.segments.to(device)
        if int(self.segments.max()) <= 1:
            return (segments != PADDING).long()
        queries, keys = segments[:, :, None], segments[:, None, :]
        # padding attends to the prompt, too, because a row of the mask without any key would give NaN
        allowed = ((keys == 0) | (keys == queries)).tril()[:, None]
        return torch.zeros(allowed.shape, dtype=dtype, device=device).masked_fill(~allowed, torch.finfo(dtype).min)


def pack(valid: torch.Tensor, split: int, groups: list[list[int]]) -> Packing:
    """Lay out sequences.

    :param valid: ``(sequences, length)`` bool: padding, prompt, response, padding.
    :param split: First column of the response region.
    :param groups: For each row, the sequences whose responses it holds; they have the same prompt.
    """
    length = valid.shape[1]
    places = [[row.nonzero()[:, 0] for row in half] for half in (valid[:, :split], valid[:, split:])]
    rows, predictors = [], torch.zeros(len(valid), length - split, dtype=torch.long)
    width = max(len(places[0][group[0]]) + sum(max(0, len(places[1][i]) - 1) for i in group) for group in groups)
    for number, group in enumerate(groups):
        prompt = places[0][group[0]]
        source, positions, segments = [group[0] * length + prompt], [torch.arange(len(prompt))], [prompt * 0]
        end = len(prompt)
        for segment, sequence in enumerate(group, 1):
            columns = places[1][sequence]
            inner = columns[:-1]  # the last token predicts nothing that is trained
            source.append(sequence * length + split + inner)
            positions.append(len(prompt) + torch.arange(len(inner)))
            segments.append(torch.full_like(inner, segment))
            before = torch.cat([torch.tensor([len(prompt) - 1]), end + torch.arange(len(inner))])
            predictors[sequence, columns] = number * width + before[: len(columns)]
            end += len(inner)
        rows.append([torch.cat(parts) for parts in (source, positions, segments)])
    source, positions, segments = zip(*rows, strict=True)
    return Packing(
        first=[group[0] for group in groups],
        source=pad_sequence(list(source), batch_first=True),
        positions=pad_sequence(list(positions), batch_first=True),
        segments=pad_sequence(list(segments), batch_first=True, padding_value=PADDING),
        predictors=predictors,
    )


def divide_groups(groups: list[list[int]], valid: torch.Tensor, split: int, config: Any) -> list[list[int]]:
    """Divide groups among rows so that the decoder has least to compute.

    Short responses share one prompt. Attention costs the square of a row's width, though, and computes the pairs that
    the mask excludes, too: with long responses several rows with a prompt each are cheaper.

    :param groups: Sequences of equal prompts.
    :param valid: As for :func:`pack`.
    :param config: The decoder's.
    """
    prompts, responses = valid[:, :split].sum(1).tolist(), (valid[:, split:].sum(1) - 1).clamp(min=0).tolist()
    heads = config.hidden_size // config.num_attention_heads
    # multiplications of a layer: a token's by weights, and a pair's of tokens (scores and sums of values)
    a_token = config.hidden_size * (2 * config.hidden_size + 2 * config.num_key_value_heads * heads)
    a_token += 3 * config.hidden_size * config.intermediate_size
    a_pair = 2 * config.hidden_size

    def divided(most: int) -> list[list[int]]:
        return [group[i : i + most] for group in groups for i in range(0, len(group), most)]

    def cost(rows: list[list[int]]) -> float:
        width = max(prompts[row[0]] + sum(responses[i] for i in row) for row in rows)
        return len(rows) * width * (a_token + a_pair * width)

    largest = max(map(len, groups))
    sizes = {-(-largest // parts) for parts in range(1, largest + 1)}
    return min((divided(size) for size in sorted(sizes, reverse=True)), key=cost)
