"""Sizes of a Qwen2-Audio from its ``config.json``: every parameter by name and shape, and what a forward pass costs.

No weights, no torch. What is left out of a ``config.json`` has transformers' default value.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from aqa.training.freezing import is_below

# What the configuration of these two, the same but for the weights, holds beside defaults.
KNOWN = {
    name: {"model_type": "qwen2_audio", "text_config": {"vocab_size": 156_032, "intermediate_size": 11_008}}
    for name in ("Qwen/Qwen2-Audio-7B-Instruct", "Qwen/Qwen2-Audio-7B")
}
PARTS = ("audio_tower", "multi_modal_projector", "language_model", "lm_head")
TOKENS_A_SECOND, MOST_SECONDS = 25, 30  # of audio; the tower takes 30 s at most


class SizeError(Exception):
    """A model whose sizes are not known; the message says what to do."""


@dataclass(frozen=True)
class Sizes:
    """A Qwen2-Audio.

    :param mels: Mel bands.
    :param positions: States of the longest clip.
    :param tower_layers: Layers of the audio tower.
    :param tower_heads: Its attention heads.
    :param tower_width: Its width.
    :param tower_inner: Width inside its feed-forward layers.
    :param layers: Layers of the language model.
    :param heads: Its query heads.
    :param kv_heads: Its key and value heads.
    :param head_width: Width of a head.
    :param width: Width of the language model.
    :param inner: Width inside its feed-forward layers.
    :param vocabulary: Tokens.
    """

    mels: int
    positions: int
    tower_layers: int
    tower_heads: int
    tower_width: int
    tower_inner: int
    layers: int
    heads: int
    kv_heads: int
    head_width: int
    width: int
    inner: int
    vocabulary: int


class Parameter(NamedTuple):
    """A parameter.

    :param name: In the live model (transformers 5), or with ``.lora_`` in it: an adapter's.
    :param shape: Its shape.
    :param linear: It is the weight of a linear layer.
    :param fixed: It never trains: the tower's sinusoids.
    """

    name: str
    shape: tuple[int, ...]
    linear: bool = False
    fixed: bool = False

    @property
    def count(self) -> int:
        """Number of values."""
        return math.prod(self.shape)

    @property
    def part(self) -> str:
        """One of :data:`PARTS`."""
        return next(part for part in PARTS if part in self.name.split("."))


def read_sizes(pretrain: str) -> Sizes:
    """Sizes of a model folder, of a model in Hugging Face's cache, or of one in :data:`KNOWN`.

    :param pretrain: Folder or hub name.
    :raises SizeError: if there is no configuration, or it is not a Qwen2-Audio's.
    """
    path = Path(pretrain) / "config.json"
    if not path.is_file() and pretrain in KNOWN:
        return sizes_of(KNOWN[pretrain])
    if not path.is_file():
        from huggingface_hub import try_to_load_from_cache

        cached = try_to_load_from_cache(pretrain, "config.json") if pretrain.count("/") == 1 else None
        if not isinstance(cached, str):
            raise SizeError(
                f"--pretrain {pretrain}: no config.json there or in Hugging Face's cache; sizes are known without of "
                f"{' and '.join(KNOWN)}"
            )
        path = Path(cached)
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise SizeError(f"{path}: not JSON ({error})") from None
    if config.get("model_type") != "qwen2_audio":
        raise SizeError(f"{path}: model_type {config.get('model_type')!r}; only qwen2_audio can be planned")
    return sizes_of(config)


def sizes_of(config: dict[str, Any]) -> Sizes:
    """Sizes from a configuration.

    :param config: Contents of ``config.json``. Defaults are transformers' of Qwen2AudioEncoderConfig and Qwen2Config.
    """
    audio, text = config.get("audio_config") or {}, config.get("text_config") or {}
    heads, width = text.get("num_attention_heads", 32), text.get("hidden_size", 4096)
    return Sizes(
        mels=audio.get("num_mel_bins", 128),
        positions=audio.get("max_source_positions", 1500),
        tower_layers=audio.get("encoder_layers", 32),
        tower_heads=audio.get("encoder_attention_heads", 20),
        tower_width=audio.get("d_model", 1280),
        tower_inner=audio.get("encoder_ffn_dim", 5120),
        layers=text.get("num_hidden_layers", 32),
        heads=heads,
        kv_heads=text.get("num_key_value_heads", 32) or heads,
        head_width=text.get("head_dim") or width // heads,
        width=width,
        inner=text.get("intermediate_size", 22_016),
        vocabulary=text.get("vocab_size", 151_936),
    )


@functools.cache
def parameters(sizes: Sizes) -> tuple[Parameter, ...]:
    """All parameters.

    :param sizes: Of the model.
    """
    s, d, h = sizes, sizes.tower_width, sizes.width
    query, keys = s.heads * s.head_width, s.kv_heads * s.head_width
    tower, text = "model.audio_tower", "model.language_model"
    out = [
        *_layer(f"{tower}.conv1", (d, s.mels, 3), linear=False),
        *_layer(f"{tower}.conv2", (d, d, 3), linear=False),
        Parameter(f"{tower}.embed_positions.weight", (s.positions, d), fixed=True),
    ]
    for i in range(s.tower_layers):
        layer = f"{tower}.layers.{i}"
        out += _layer(f"{layer}.self_attn.k_proj", (d, d), bias=False)
        out += [p for name in ("v_proj", "q_proj", "out_proj") for p in _layer(f"{layer}.self_attn.{name}", (d, d))]
        out += _layer(f"{layer}.self_attn_layer_norm", (d,), linear=False)
        out += _layer(f"{layer}.fc1", (s.tower_inner, d)) + _layer(f"{layer}.fc2", (d, s.tower_inner))
        out += _layer(f"{layer}.final_layer_norm", (d,), linear=False)
    out += _layer(f"{tower}.layer_norm", (d,), linear=False) + _layer("model.multi_modal_projector.linear", (h, d))
    out.append(Parameter(f"{text}.embed_tokens.weight", (s.vocabulary, h)))
    for i in range(s.layers):
        layer = f"{text}.layers.{i}"
        for name, rows in (("q_proj", query), ("k_proj", keys), ("v_proj", keys)):
            out += _layer(f"{layer}.self_attn.{name}", (rows, h))
        out += _layer(f"{layer}.self_attn.o_proj", (h, query), bias=False)
        for name, shape in (("gate_proj", (s.inner, h)), ("up_proj", (s.inner, h)), ("down_proj", (h, s.inner))):
            out += _layer(f"{layer}.mlp.{name}", shape, bias=False)
        out += [Parameter(f"{layer}.{name}.weight", (h,)) for name in ("input_layernorm", "post_attention_layernorm")]
    out.append(Parameter(f"{text}.norm.weight", (h,)))
    out.append(Parameter("lm_head.weight", (s.vocabulary, h), linear=True))
    return tuple(out)


def _layer(name: str, shape: tuple[int, ...], bias: bool = True, linear: bool = True) -> list[Parameter]:
    weight = Parameter(f"{name}.weight", shape, linear=linear)
    return [weight, Parameter(f"{name}.bias", shape[:1])] if bias else [weight]


def trained(sizes: Sizes, frozen: Sequence[str], rank: int, targets: Sequence[str]) -> tuple[Parameter, ...]:
    """The parameters that train: as ``aqa.training.freezing.freeze`` and ``lightrft.models.lora.add_adapters`` leave them.

    :param sizes: Of the model.
    :param frozen: ``--freeze_prefix``.
    :param rank: ``--lora_rank``; above 0 adapters alone train.
    :param targets: ``--target_modules``.
    :raises SizeError: if a name is not in the model.
    """
    return _trained(sizes, tuple(frozen), rank, tuple(targets))


@functools.cache
def _trained(sizes: Sizes, frozen: tuple[str, ...], rank: int, targets: tuple[str, ...]) -> tuple[Parameter, ...]:
    every = parameters(sizes)
    if rank == 0:
        for part in frozen:
            if not any(is_below(p.name, part) for p in every):
                raise SizeError(f"--freeze_prefix {part}: the model has no parameter below a module of that name")
        return tuple(p for p in every if not p.fixed and not any(is_below(p.name, part) for part in frozen))
    linear = [p for p in every if p.linear and p.name != "lm_head.weight"]
    for target in targets:
        if not any(target in p.name.split(".") for p in linear):
            raise SizeError(f"--target_modules {target}: no linear layer of the model has that name or is below it")
    adapters = []
    for p in linear:
        if set(targets) & set(p.name.split(".")):
            name = p.name.removesuffix(".weight")
            adapters.append(Parameter(f"{name}.lora_A.weight", (rank, p.shape[1])))
            adapters.append(Parameter(f"{name}.lora_B.weight", (p.shape[0], rank)))
    return tuple(adapters)


def count(some: Sequence[Parameter], part: str | None = None) -> int:
    """Number of values.

    :param some: Parameters.
    :param part: Of this part alone.
    """
    return sum(p.count for p in some if part is None or p.part == part)


def audio_tokens(seconds: float) -> int:
    """Tokens of a clip, at most 750.

    :param seconds: Its length.
    """
    return int(TOKENS_A_SECOND * min(seconds, MOST_SECONDS))


def tower_flops(sizes: Sizes, seconds: float) -> float:
    """Floating-point operations of the tower and the projector over a clip's valid frames, forward.

    :param sizes: Of the model.
    :param seconds: Clip length; 50 states a second.
    """
    s, states = sizes, 2 * audio_tokens(seconds)
    d = s.tower_width
    matrices = s.tower_layers * (4 * d * d + 2 * d * s.tower_inner) + 3 * d * (2 * s.mels + d)
    return 2 * matrices * states + 4 * states**2 * d * s.tower_layers + d * s.width * states


def decoder_flops(sizes: Sizes, tokens: float, context: float) -> float:
    """Floating-point operations of the language model without its head, forward.

    :param sizes: Of the model.
    :param tokens: Tokens computed.
    :param context: Tokens that each attends to, on average.
    """
    s = sizes
    query, keys = s.heads * s.head_width, s.kv_heads * s.head_width
    matrices = s.layers * (2 * s.width * (query + keys) + 3 * s.width * s.inner)
    return 2 * matrices * tokens + 4 * tokens * context * query * s.layers


def head_flops(sizes: Sizes, tokens: float) -> float:
    """Floating-point operations of the head, forward.

    :param sizes: Of the model.
    :param tokens: Tokens scored.
    """
    return 2 * sizes.width * sizes.vocabulary * tokens
