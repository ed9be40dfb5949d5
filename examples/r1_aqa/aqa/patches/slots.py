"""Carry audio clips in LightRFT's image slot, and get them back exactly. Pure functions, no I/O.

LightRFT moves image features as ``pixel_values`` of shape ``(patches, features)`` with ``image_grid_thw`` of shape
``(images, 3)``. Wherever it splits a batch, it splits ``pixel_values`` by ``t * h * w``. Here a mel frame is a patch:
each clip's valid frames and the :data:`GUARD_ROWS` rows after them are stacked below those of the clip before, and the
clip's grid is ``(1, 1, rows)``. So LightRFT always splits between clips.

The guard rows exist because the tower's two convolutions see two frames beyond the last valid one, where the
extractor's padding is not zero. With these two rows, a clip that is padded with zeros gives exactly the tower's output
of the original. There are always two, also after 3,000 frames, so that ``frames = rows - 2`` always holds; rows beyond
:data:`MAX_FRAMES` are dropped when clips are restored.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from aqa.common.constants import HOP_LENGTH, MAX_FRAMES, MIN_FRAMES

GUARD_ROWS = 2  # rows after the valid frames that the two convolutions still see


def audio_token_count(frames: int) -> int:
    """Number of audio tokens that the tower makes of a clip; of several windows it is the sum of theirs.

    :param frames: Valid mel frames.
    :return: Tokens, 25 per second; 0 below :data:`MIN_FRAMES` frames.

    Source: the stride-2 convolution followed by the stride-2 average pooling of the Qwen2-Audio encoder.
    """
    after_conv = (frames - 1) // 2 + 1
    return max(0, (after_conv - 2) // 2 + 1)


def windows_of(samples: int) -> list[tuple[int, int]]:
    """Where the windows of 30 s begin and end that the tower takes a clip in: one, of a clip that is not longer.

    A rest that is too short for an audio token is left out.

    :param samples: Length of the clip.
    """
    size = MAX_FRAMES * HOP_LENGTH
    starts = range(0, max(samples - (MIN_FRAMES - 1) * HOP_LENGTH, 1), size)
    return [(start, min(start + size, samples)) for start in starts]


def pack_clip(mel: torch.Tensor, frames: int) -> torch.Tensor:
    """Turn one clip's mel spectrogram into rows of the image slot.

    :param mel: Mel spectrogram ``(n_mels, width)``. Its first ``frames`` columns are valid; the next two, if there,
        are the extractor's padding.
    :param frames: Number of valid frames, at least :data:`MIN_FRAMES`, at most 3,000.
    :return: Contiguous rows ``(frames + 2, n_mels)``.
    :raises ValueError: if ``frames`` is out of range or wider than ``mel``.
    """
    if not MIN_FRAMES <= frames <= min(MAX_FRAMES, mel.shape[-1]):
        raise ValueError(
            f"a clip of {frames} valid mel frames (spectrogram {tuple(mel.shape)}) cannot be packed: "
            f"{MIN_FRAMES} to {MAX_FRAMES} are needed"
        )
    rows = frames + GUARD_ROWS
    if mel.shape[-1] < rows:
        mel = torch.nn.functional.pad(mel, (0, rows - mel.shape[-1]))
    return mel[:, :rows].T.contiguous()


def grid_of(rows: torch.Tensor) -> torch.Tensor:
    """Grid entry of a packed clip ``(rows, n_mels)``: an int64 tensor ``(1, 3)`` that holds ``(1, 1, rows)``."""
    return torch.tensor([[1, 1, rows.shape[0]]], dtype=torch.long)


@dataclass(frozen=True)
class Clips:
    """The clips of a micro-batch, without repeats.

    :param features: Mel spectrograms ``(clips, n_mels, 3000)``, zero beyond the guard rows.
    :param frames: Valid frames of each clip, ``(clips,)`` int64.
    :param index: For each grid entry, in order, the number of its clip: ``(entries,)`` int64.
    """

    features: torch.Tensor
    frames: torch.Tensor
    index: torch.Tensor


def split_rows(pixel_values: torch.Tensor, image_grid_thw: torch.Tensor) -> list[torch.Tensor]:
    """Split stacked rows into one view per clip.

    :param pixel_values: Stacked rows ``(sum of rows, n_mels)``.
    :param image_grid_thw: ``(entries, 3)``.
    :return: One ``(rows, n_mels)`` view per entry.
    :raises ValueError: if the grid does not add up to the rows, or an entry has a size that no packed clip has.
    """
    sizes = image_grid_thw.reshape(-1, 3).prod(-1).tolist()
    if sum(sizes) != pixel_values.shape[0]:
        raise ValueError(f"the audio grid says {sum(sizes)} rows ({sizes}), but there are {pixel_values.shape[0]}")
    for entry, size in enumerate(sizes):
        if not MIN_FRAMES + GUARD_ROWS <= size <= MAX_FRAMES + GUARD_ROWS:
            raise ValueError(f"grid entry {entry} has {size} rows; a packed clip has 5 to {MAX_FRAMES + GUARD_ROWS}")
    return list(pixel_values.split(sizes))


def unpack_clips(pixel_values: torch.Tensor | Sequence[torch.Tensor], image_grid_thw: torch.Tensor) -> Clips:
    """Restore the clips of a micro-batch from the image slot.

    The N responses of a GRPO group repeat the same clip N times. Clips of equal content are merged, so that the tower
    encodes each clip once.

    :param pixel_values: Stacked rows ``(sum of rows, n_mels)``; or a sequence of each clip's ``(rows, n_mels)``, which
        avoids stacking repeats that are views of one tensor.
    :param image_grid_thw: ``(entries, 3)`` with ``(1, 1, rows)`` each.
    :return: :class:`Clips` on the device of the rows.
    :raises ValueError: if grid and rows disagree.
    """
    if isinstance(pixel_values, torch.Tensor):
        parts = split_rows(pixel_values, image_grid_thw)
    else:
        parts = list(pixel_values)
        expected = image_grid_thw.reshape(-1, 3).prod(-1).tolist()
        if [part.shape[0] for part in parts] != expected:
            raise ValueError(f"the audio grid says {expected} rows, the clips have {[p.shape[0] for p in parts]}")
    unique: list[torch.Tensor] = []
    index: list[int] = []
    for part in parts:
        known = next((i for i, other in enumerate(unique) if _same_clip(part, other)), None)
        if known is None:
            known = len(unique)
            unique.append(part)
        index.append(known)
    features = unique[0].new_zeros(len(unique), unique[0].shape[1], MAX_FRAMES)
    for i, part in enumerate(unique):
        width = min(part.shape[0], MAX_FRAMES)
        features[i, :, :width] = part[:width].T
    device = features.device
    frames = torch.tensor([part.shape[0] - GUARD_ROWS for part in unique], dtype=torch.long, device=device)
    return Clips(features, frames, torch.tensor(index, dtype=torch.long, device=device))


def _same_clip(a: torch.Tensor, b: torch.Tensor) -> bool:
    if a.shape != b.shape:
        return False
    return a.data_ptr() == b.data_ptr() or torch.equal(a, b)
