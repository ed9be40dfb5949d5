"""Outputs of a frozen audio tower, computed once a clip for all passes of actor and reference model, and for vLLM."""

import hashlib
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

import torch

LIMIT_BYTES = 2**30  # CPU memory a cache, of two a process: 1,500 clips of 10 s of Qwen2-Audio-7B in bfloat16


class TowerCache:
    """Keeps outputs in CPU memory up to a number of bytes, and drops those that were unused for longest.

    :param limit_bytes: Most memory for the outputs.
    """

    def __init__(self, limit_bytes: int = LIMIT_BYTES) -> None:
        self.limit_bytes = limit_bytes
        self.used_bytes = self.hits = self.misses = 0
        self._kept: OrderedDict[bytes, torch.Tensor] = OrderedDict()

    @staticmethod
    def key(features: torch.Tensor, frames: int) -> bytes:
        """The name of a clip: a hash of its contents.

        :param features: Mel spectrogram ``(n_mels, width)``.
        """
        columns = features[:, : frames + 2].detach().float().contiguous().cpu()
        return hashlib.blake2b(columns.numpy().tobytes(), digest_size=16, key=str(frames).encode()).digest()

    def states(
        self, features: torch.Tensor, frames: torch.Tensor, encode: Callable[[list[int]], Sequence[torch.Tensor]]
    ) -> list[torch.Tensor]:
        """The outputs of clips, each ``(audio tokens, d_model)``, on the device of their features.

        :param features: Mel spectrograms ``(clips, n_mels, width)``.
        :param frames: Valid frames ``(clips,)``.
        :param encode: Computes the outputs of the clips of these numbers, which are not kept yet.
        """
        keys = [self.key(clip, count) for clip, count in zip(features, frames.tolist(), strict=True)]
        kept = [self.get(key) for key in keys]
        missing = [i for i, states in enumerate(kept) if states is None]
        if missing:
            with torch.no_grad():
                for i, states in zip(missing, encode(missing), strict=True):
                    kept[i] = states
                    self.put(keys[i], states)
        return [states.to(features.device, non_blocking=True) for states in kept]

    def get(self, key: bytes) -> torch.Tensor | None:
        """The output of a clip, ``(audio tokens, d_model)``, if it is kept.

        :param key: From :meth:`key`.
        """
        value = self._kept.get(key)
        if value is None:
            self.misses += 1
            return None
        self.hits += 1
        self._kept.move_to_end(key)
        return value

    def put(self, key: bytes, value: torch.Tensor) -> None:
        """Keep the output of a clip.

        :param key: From :meth:`key`.
        :param value: ``(audio tokens, d_model)``.
        """
        value = value.detach().cpu().clone()
        size = value.numel() * value.element_size()
        if key in self._kept or size > self.limit_bytes:
            return
        self._kept[key] = value
        self.used_bytes += size
        while self.used_bytes > self.limit_bytes:
            _, oldest = self._kept.popitem(last=False)
            self.used_bytes -= oldest.numel() * oldest.element_size()


def share_tower_outputs(*models: Any) -> TowerCache:
    """Let models with the same, frozen tower encode each clip once between them.

    Not for ZeRO-3 or FSDP2: there all ranks must run the same modules, but one may know a clip that another does not.

    :param models: ``Qwen2AudioForConditionalGeneration``, patched (``patch_actor_for_audio``).
    :raises ValueError: if a tower trains, or differs from the first one's.
    """
    from aqa.policy.forward import parts_of

    first = dict(parts_of(models[0]).tower.named_parameters())
    for model in models:
        for name, parameter in parts_of(model).tower.named_parameters():
            if parameter.requires_grad:
                raise ValueError(f"the audio tower trains ({name}): its outputs cannot be kept")
            # a whole reference model waits in the machine's memory, and the policy is on the GPU
            if not torch.equal(parameter, first[name].to(parameter.device)):
                raise ValueError(f"the audio towers of actor and reference model differ ({name})")
    cache = TowerCache()
    for model in models:
        model.tower_cache = cache
    return cache
