"""Micro-batches: what is padded where, which positions count, and which clip belongs to which placeholder."""

import pytest
import torch
from support.experiences import make_experience

from lightrft.trainer.replay_buffer import make_micro_batch, pad_tokens

PAD = 99
CPU = torch.device("cpu")


def make_item(prompt, response, clips=()):
    return make_experience(prompt_ids=torch.tensor(prompt), response_ids=torch.tensor(response), clips=list(clips))


def test_padding_and_masks_by_hand():
    items = [make_item([1, 2, 3], [4]), make_item([5], [6, 7]), make_item([8, 9], [10, 11])]
    batch = make_micro_batch(items, PAD, CPU)
    # prompts end at column 3, responses begin there
    assert batch.sequences.tolist() == [[1, 2, 3, 4, PAD], [PAD, PAD, 5, 6, 7], [PAD, 8, 9, 10, 11]]
    assert batch.attention_mask.tolist() == [[1, 1, 1, 1, 0], [0, 0, 1, 1, 1], [0, 1, 1, 1, 1]]
    assert batch.response_mask.tolist() == [[True, False], [True, True], [True, True]]
    assert batch.response_mask.dtype == torch.bool
    assert batch.sequences.dtype == torch.long


def test_a_padding_token_that_was_sampled_counts():
    """Masks come from lengths, not from values: the end-of-text token may be sampled and pad as well."""
    batch = make_micro_batch([make_item([PAD, 1], [2, PAD]), make_item([3], [4, 5, 6])], PAD, CPU)
    assert batch.attention_mask.tolist() == [[1, 1, 1, 1, 0], [0, 1, 1, 1, 1]]
    assert batch.response_mask.tolist() == [[True, True, False], [True, True, True]]


def test_clips_follow_the_order_of_the_samples_and_stay_shared():
    a, b, c = torch.ones(7, 4), torch.ones(5, 4) * 2, torch.ones(6, 4) * 3
    items = [make_item([1], [2], [a]), make_item([1], [2]), make_item([1], [2], [b, c]), make_item([1], [2], [b])]
    batch = make_micro_batch(items, PAD, CPU)
    # the very tensors, not copies: that is how the repeats are found without comparing contents
    assert [id(clip) for clip in batch.audio_values] == [id(clip) for clip in (a, b, c, b)]
    assert batch.image_grid_thw.tolist() == [[1, 1, 7], [1, 1, 5], [1, 1, 6], [1, 1, 5]]


@pytest.mark.parametrize("width", [2, 4])
def test_token_values_are_padded_with_zeros_on_the_right(width):
    out = pad_tokens([torch.tensor([1.5, 2.5]), torch.tensor([3.5])], width, CPU)
    assert out.dtype == torch.float32
    assert out.tolist() == [[1.5, 2.5] + [0.0] * (width - 2), [3.5] + [0.0] * (width - 1)]
