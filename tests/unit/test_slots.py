"""The slot encoding: what goes into LightRFT's image slot comes out of it, whatever was cut and joined in between."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.models.qwen2_audio.modeling_qwen2_audio import Qwen2AudioEncoder

from aqa.patches.slots import (
    GUARD_ROWS,
    MAX_FRAMES,
    MIN_FRAMES,
    audio_token_count,
    grid_of,
    pack_clip,
    split_rows,
    unpack_clips,
)

N_MELS = 4


def make_mel(frames: int, seed: int, width: int | None = None) -> torch.Tensor:
    """A spectrogram without a zero in it, as wide as the extractor's or narrower."""
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(N_MELS, width or min(frames + 7, MAX_FRAMES), generator=generator) + 0.5


def pack(mel: torch.Tensor, frames: int) -> tuple[torch.Tensor, torch.Tensor]:
    rows = pack_clip(mel, frames)
    return rows, grid_of(rows)


def cut_like_lightrft(pixel_values: torch.Tensor, grid: torch.Tensor, images_num: list[int]) -> list[tuple]:
    """Cut a batch into samples as LightRFT does: by t * h * w, knowing nothing of clips."""
    samples, first_row, first_image = [], 0, 0
    for count in images_num:
        mine = grid[first_image : first_image + count]
        rows = int((mine[:, 0] * mine[:, 1] * mine[:, 2]).sum())
        samples.append((pixel_values[first_row : first_row + rows], mine))
        first_row, first_image = first_row + rows, first_image + count
    return samples


clip_strategy = st.tuples(
    st.integers(MIN_FRAMES, 40) | st.sampled_from([2997, 2998, 2999, MAX_FRAMES]),
    st.integers(0, 2),  # few seeds, so that the same clip often comes twice
)
samples_strategy = st.lists(st.lists(clip_strategy, max_size=3), min_size=1, max_size=4).filter(any)


# no deadline: the machine is shared, and one example's time says nothing
@settings(max_examples=60, deadline=None)
@given(samples=samples_strategy, data=st.data(), stacked=st.booleans())
def test_every_clip_survives_pack_split_join_unpack(samples, data, stacked):
    mels = {clip: make_mel(*clip) for sample in samples for clip in sample}
    packed = [pack(mels[clip], clip[0]) for sample in samples for clip in sample]
    pixel_values, grid = (torch.cat(parts) for parts in zip(*packed, strict=True))
    cut = cut_like_lightrft(pixel_values, grid, [len(sample) for sample in samples])
    order = data.draw(st.permutations(range(len(samples))))
    joined_values = torch.cat([cut[i][0] for i in order])
    joined_grid = torch.cat([cut[i][1] for i in order])
    expected = [clip for i in order for clip in samples[i]]

    slot = joined_values if stacked else split_rows(joined_values, joined_grid)
    out = unpack_clips(slot, joined_grid)

    assert out.index.shape == (len(expected),)
    assert out.features.shape[1:] == (N_MELS, MAX_FRAMES)
    assert out.features.shape[0] == len(set(expected))
    for at, clip in zip(out.index.tolist(), expected, strict=True):
        frames, mel = clip[0], mels[clip]
        kept = min(frames + GUARD_ROWS, mel.shape[1])
        assert torch.equal(out.features[at, :, :kept], mel[:, :kept])
        assert not out.features[at, :, kept:].any()
        assert out.frames[at] == frames


def test_clips_that_differ_a_little_are_not_merged():
    mel = make_mel(10, 0)
    last_value, guard = mel.clone(), mel.clone()
    last_value[-1, 9] += 1e-6
    guard[0, 11] += 1.0  # the last guard row: the tower sees it
    # the fourth begins like the first and is one frame shorter
    parts = [pack_clip(mel, 10), pack_clip(last_value, 10), pack_clip(guard, 10), pack_clip(mel, 9)]
    out = unpack_clips(parts, torch.cat([grid_of(part) for part in parts]))
    assert out.index.tolist() == [0, 1, 2, 3]
    assert out.frames.tolist() == [10, 10, 10, 9]


@pytest.mark.parametrize(
    ("frames", "width"), [(0, 100), (2, 100), (3001, 3001), (101, 100)], ids=["none", "short", "long", "wider"]
)
def test_pack_refuses(frames, width):
    with pytest.raises(ValueError, match=f"a clip of {frames} valid mel frames"):
        pack_clip(torch.zeros(N_MELS, width), frames)


@pytest.mark.parametrize(
    ("grid", "message"),
    [
        ([[1, 1, 7]], "says 7 rows.*but there are 12"),
        ([[1, 1, 7], [1, 1, 6]], "says 13 rows.*but there are 12"),
        ([[1, 1, 4], [1, 1, 8]], "grid entry 0 has 4 rows"),
    ],
)
def test_unpack_refuses_a_grid_that_does_not_fit(grid, message):
    with pytest.raises(ValueError, match=message):
        unpack_clips(torch.ones(12, N_MELS), torch.tensor(grid))


def test_unpack_refuses_more_rows_than_a_clip_can_have():
    with pytest.raises(ValueError, match="grid entry 0 has 3003 rows; a packed clip has 5 to 3002"):
        unpack_clips(torch.ones(3003, N_MELS), torch.tensor([[1, 1, 3003]]))


def test_unpack_refuses_a_list_in_another_order_than_the_grid():
    parts = [torch.ones(5, N_MELS), torch.ones(7, N_MELS)]
    with pytest.raises(ValueError, match=r"says \[7, 5\] rows, the clips have \[5, 7\]"):
        unpack_clips(parts, torch.tensor([[1, 1, 7], [1, 1, 5]]))


def test_audio_token_count_is_the_towers_for_every_length():
    frames = torch.arange(MIN_FRAMES, MAX_FRAMES + 1)
    _, tokens = Qwen2AudioEncoder._get_feat_extract_output_lengths(None, frames)
    assert [audio_token_count(f) for f in frames.tolist()] == tokens.tolist()
    assert audio_token_count(MAX_FRAMES) == 750
    assert audio_token_count(MIN_FRAMES) == 1
    assert [audio_token_count(f) for f in range(MIN_FRAMES)] == [0] * MIN_FRAMES
