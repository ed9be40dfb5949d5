"""``train_colocate.py --plan``: memory a GPU needs, the batch's arithmetic, and one set of flags that fits.

    python examples/r1_aqa/train_colocate.py --plan --pretrain Qwen/Qwen2-Audio-7B-Instruct --bf16 --zero_stage 3

Nothing is loaded, torch neither: it is arithmetic on ``config.json`` and the flags, for the longest prompts, clips and
responses that the flags allow. In the formulas ``s`` are the model's sizes and ``b`` is bytes per value.

Sources: DeepSpeed 0.19.8's and FSDP2's buffers as their code allocates them; what autograd keeps of each layer as
``torch.autograd.graph.saved_tensors_hooks`` shows it (``tests/unit/test_planner.py`` compares both with a CPU's
measured bytes); Rajbhandari et al., ZeRO (2020), for the states; Korthikanti et al., Reducing Activation Recomputation
(2022), for the way of counting activations. Never compared with a GPU.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import os
import re
import shutil
import subprocess
import sys
import textwrap
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from aqa.training.flag_rules import find_problems
from aqa.training.flags import DATA_SUFFIXES
from aqa.training.freezing import is_below

DOES_NOT_FIT = 3  # exit status
GIB = 2**30
PHASES = ("rollout", "log-probs", "backward", "optimizer", "sync")
STATES = ("weights", "gradients", "optimizer states", "reference model")
COMPONENTS = (*STATES, "activations", "work space", "sharding buffers", "engine", "reserve")
# What the configuration of these two, the same but for the weights, holds beside transformers' defaults.
KNOWN = {
    name: {"model_type": "qwen2_audio", "text_config": {"vocab_size": 156_032, "intermediate_size": 11_008}}
    for name in ("Qwen/Qwen2-Audio-7B-Instruct", "Qwen/Qwen2-Audio-7B")
}
PARTS = ("audio_tower", "multi_modal_projector", "language_model", "lm_head")
TOKENS_A_SECOND, MOST_SECONDS = 25, 30  # of audio; the tower takes 30 s at most
LOGITS = 2**25  # token_log_probs.LOGITS_AT_ONCE, whose module would load torch
BUCKET, LIVE, SUB_GROUP, PERSISTENT = 5e8, 1e9, 1e9, 1e5  # DeepSpeed's defaults, in values
NF4 = 0.5 + 1 / 64 + 4 / (64 * 256)  # bytes a value: blocks of 64 share an 8-bit scale, 256 scales share a float32
# Assumed, not derived: CUDA context, NCCL and fragmentation; vLLM's graphs and own activations; what it keeps asleep
RESERVE, ENGINE_WORK, ENGINE_ASLEEP = 2 * GIB, 2 * GIB, 1 * GIB
HF_ROWS = 64  # sequences that the hf engine generates at once


# --------------------------------------------------------------------------------------------------------- model sizes
class SizeError(Exception):
    """The model's sizes are unknown, or a flag names a module it lacks; the message says what to do."""


@dataclass(frozen=True)
class Sizes:
    """Dimensions of a Qwen2-Audio, from its ``config.json``."""

    mels: int
    positions: int  # states of the longest clip
    tower_layers: int
    tower_heads: int
    tower_width: int
    tower_inner: int  # inside a feed-forward layer
    layers: int  # of the language model, as all that follows
    heads: int
    kv_heads: int
    head_width: int
    width: int
    inner: int
    vocabulary: int


@dataclass
class Parameter:
    """A parameter, by its name in the live model (transformers 5); an adapter's has ``.lora_`` in it."""

    name: str
    shape: tuple[int, ...]
    linear: bool = False  # the weight of a linear layer
    fixed: bool = False  # never trains: the tower's sinusoids

    @functools.cached_property
    def count(self) -> int:
        """Number of values."""
        return math.prod(self.shape)

    @functools.cached_property
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
        from huggingface_hub import try_to_load_from_cache  # here, because it is slow and seldom needed

        cached = try_to_load_from_cache(pretrain, "config.json") if pretrain.count("/") == 1 else None
        if not isinstance(cached, str):
            raise SizeError(
                f"--pretrain {pretrain}: no config.json there or in Hugging Face's cache; without one --plan knows "
                f"the sizes of {' and '.join(KNOWN)} only"
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
    """Sizes from the contents of a ``config.json``; what it leaves out has the default of transformers'
    Qwen2AudioEncoderConfig or Qwen2Config."""
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
def parameters(s: Sizes) -> tuple[Parameter, ...]:
    """All parameters of the model."""
    d, f, h, query, keys = s.tower_width, s.tower_inner, s.width, s.heads * s.head_width, s.kv_heads * s.head_width
    # name, shape of the weight, then "l" for a linear layer and "b" for a bias
    tower_layer = [
        *[(f"self_attn.{name}", (d, d), "l" if name == "k_proj" else "lb") for name in ("k_proj", "v_proj", "q_proj")],
        *[("self_attn.out_proj", (d, d), "lb"), ("self_attn_layer_norm", (d,), "b")],
        *[("fc1", (f, d), "lb"), ("fc2", (d, f), "lb"), ("final_layer_norm", (d,), "b")],
    ]
    layer = [
        *[("self_attn.q_proj", (query, h), "lb"), ("self_attn.k_proj", (keys, h), "lb")],
        *[("self_attn.v_proj", (keys, h), "lb"), ("self_attn.o_proj", (h, query), "l")],
        *[("mlp.gate_proj", (s.inner, h), "l"), ("mlp.up_proj", (s.inner, h), "l")],
        ("mlp.down_proj", (h, s.inner), "l"),
        *[("input_layernorm", (h,), ""), ("post_attention_layernorm", (h,), "")],
    ]
    tower, text = "model.audio_tower", "model.language_model"
    table = [
        *[(f"{tower}.conv1", (d, s.mels, 3), "b"), (f"{tower}.conv2", (d, d, 3), "b")],
        (f"{tower}.embed_positions", (s.positions, d), ""),
        *[(f"{tower}.layers.{i}.{name}", *rest) for i in range(s.tower_layers) for name, *rest in tower_layer],
        *[(f"{tower}.layer_norm", (d,), "b"), ("model.multi_modal_projector.linear", (h, d), "lb")],
        (f"{text}.embed_tokens", (s.vocabulary, h), ""),
        *[(f"{text}.layers.{i}.{name}", *rest) for i in range(s.layers) for name, *rest in layer],
        *[(f"{text}.norm", (h,), ""), ("lm_head", (s.vocabulary, h), "l")],
    ]
    out = []
    for name, shape, kind in table:
        out.append(Parameter(f"{name}.weight", shape, "l" in kind, "embed_positions" in name))
        if "b" in kind:
            out.append(Parameter(f"{name}.bias", shape[:1]))
    return tuple(out)


def trained(s: Sizes, args: argparse.Namespace) -> list[Parameter]:
    """The parameters that train: as ``freezing.freeze`` and ``lightrft.models.lora.add_adapters`` leave them.

    :raises SizeError: if ``--freeze_prefix`` or ``--target_modules`` names what is not in the model.
    """
    frozen, targets, rank = args.freeze_prefix or (), args.target_modules, args.lora_rank
    every = parameters(s)
    if rank == 0:
        for part in frozen:
            if not any(is_below(p.name, part) for p in every):
                raise SizeError(f"--freeze_prefix {part}: the model has no parameter below a module of that name")
        return [p for p in every if not p.fixed and not any(is_below(p.name, part) for part in frozen)]
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
    return adapters


def count(some: Sequence[Parameter], part: str | None = None) -> int:
    """Number of values in some parameters, or in those of one part."""
    return sum(p.count for p in some if part is None or p.part == part)


def audio_tokens(seconds: float) -> int:
    """Tokens of a clip: at most 750."""
    return int(TOKENS_A_SECOND * min(seconds, MOST_SECONDS))


def cache_bytes(s: Sizes, b: int) -> int:
    """Bytes of one token's keys and values."""
    return 2 * s.layers * s.kv_heads * s.head_width * b


# --------------------------------------------------------------------------------------------------------- activations
class Lengths(NamedTuple):
    """The longest sequence that the flags allow."""

    clips: int  # of a prompt
    seconds: float  # of a clip
    prompt: int  # tokens, audio included
    response: int  # tokens


def lengths(args: argparse.Namespace) -> Lengths:
    """From the flags."""
    clips, seconds = args.limit_mm_image_per_prompt, args.plan_clip_seconds
    prompt = args.prompt_max_len + clips * (audio_tokens(seconds) - 1)  # a clip counts as one of --prompt_max_len
    return Lengths(clips, seconds, prompt, max(2, args.generate_max_len))


class Activations(NamedTuple):
    """Bytes of one micro-batch beside weights and gradients."""

    saved: float  # what autograd keeps until the backward pass
    layer: float  # on top of it while the pass is in a layer, with what checkpointing computes again
    head: float  # on top of it while the pass is in the head


def modules_of(s: Sizes, trainable: Sequence[Parameter]) -> tuple[list[set[str]], list[set[str]], set[str]]:
    """Names of the modules that train or carry an adapter: by layer of the tower, by layer of the language model, and
    outside layers (conv1, linear for the projector's, embed_tokens, lm_head ...)."""
    tower: list[set[str]] = [set() for _ in range(s.tower_layers)]
    decoder: list[set[str]] = [set() for _ in range(s.layers)]
    others: set[str] = set()
    for parameter in trainable:
        path = parameter.name.split(".")
        module = path[-3] if ".lora_" in parameter.name else path[-2]
        if "layers" in path:
            layers = tower if "audio_tower" in path else decoder
            layers[int(path[path.index("layers") + 1])].add(module)
        else:
            others.add(module)
    return tower, decoder, others


def decoder_layer(s: Sizes, b: int, rows: int, new: int, keys: int, modules: set[str], rank: int) -> float:
    """Bytes that autograd keeps of a layer of the language model.

    :param rows: Sequences.
    :param new: Tokens computed of each.
    :param keys: Tokens that each attends to; from two rows on they are masked, in the weights' type.
    :param modules: Those that train or carry an adapter; the input of others is not kept.
    :param rank: Of the adapters; 0: none.
    """
    tokens, h, query = rows * new, s.width, s.heads * s.head_width
    total = 2 * tokens * (4 * h + 4)  # both norms: input in float32, and the reciprocal of its size
    for norm, users in (
        ("input_layernorm", {"q_proj", "k_proj", "v_proj"}),
        ("post_attention_layernorm", {"gate_proj", "up_proj"}),
    ):
        total += tokens * b * h * ((norm in modules) + bool(users & modules))  # scaled input; the layers' input
    total += tokens * (2 * b * query + 4 * s.heads)  # queries, output, its log-sum-exp
    total += 2 * rows * keys * b * query  # keys and values, repeated for grouped heads
    total += tokens * b * s.inner * (3 + ("down_proj" in modules))  # gate, its activation, up; their product
    total += tokens * b * rank * len(modules)
    return total + (rows * new * keys * b if rows > 1 else 0)


def tower_layer(s: Sizes, b: int, states: int, modules: set[str], rank: int) -> float:
    """Bytes that autograd keeps of a layer of the audio tower, per clip; see :func:`decoder_layer`."""
    kept = 2 + 4 + bool({"q_proj", "k_proj", "v_proj"} & modules) + ("out_proj" in modules) + ("fc1" in modules)
    inner = s.tower_inner * (1 + ("fc2" in modules))
    mask = states**2
    values = states * (kept * s.tower_width + inner + rank * len(modules)) + mask
    return b * values + states * (4 * s.tower_heads + 16)


def head_bytes(s: Sizes, b: int, tokens: int, trains: bool, cache: float = 0) -> float:
    """Largest work space of ``TokenLogProbs``: chunks of logits, and the gradient of the head's weight.

    :param tokens: Scored.
    :param trains: Whether the head does.
    :param cache: Bytes that the forward pass holds and the backward pass does not.
    """
    weight, rows = s.vocabulary * s.width, max(1, LOGITS // s.vocabulary)
    chunk, several = min(tokens, rows) * s.vocabulary, tokens > rows
    half = b if b == 2 else 0
    hidden = tokens * b * s.width
    forward = cache + chunk * (10 if half else 12)  # logits, with the bias of some tokens, and their log-softmax
    logits = chunk * (8 + half)  # in float32, their softmax, and this in the weights' type
    if not trains:
        return max(forward, hidden + logits)
    # over several chunks the gradient is summed in float32, with a chunk's own in both types on top
    gradient = weight * (8 + half) if several else weight * b
    return max(forward, hidden + max(logits + (4 * weight if several else 0), chunk * (4 + half) + gradient))


def prompts_in(size: int, samples: int) -> int:
    """Most prompts that a micro-batch of ``size`` neighbouring responses holds, at ``samples`` responses a prompt."""
    if size % samples == 0 or samples % size == 0:
        return max(1, size // samples)
    return min(size, (size - 2) // samples + 2)


def _tower_pass(
    s: Sizes, args: argparse.Namespace, clips: int, seconds: float, layers: list[set[str]], others: set[str]
) -> tuple[float, float, bool]:
    """Bytes kept, bytes of a layer that is computed again, and whether a gradient reaches the tower's output."""
    b, again, saved, layer = 2 if args.bf16 else 4, args.gradient_checkpointing, 0.0, 0.0
    frames = int(100 * min(seconds, MOST_SECONDS))
    states = min((frames + 2 + 3) // 4 * 4, 100 * MOST_SECONDS) // 2  # the policy leaves out what is behind the clip
    flows = bool({"conv1", "conv2"} & others)
    if flows:
        saved += clips * b * states * (2 * s.mels + 5 * s.tower_width)  # frames, two convolutions with activations
    for names in layers:
        flows |= bool(names)
        if flows:
            whole = clips * tower_layer(s, b, states, names, args.lora_rank)
            saved += clips * states * b * s.tower_width if again else whole
            layer = max(layer, whole if again else 0)
    flows |= "layer_norm" in others
    saved += flows * clips * b * states * s.tower_width * 3 // 2  # pooling and the last norm
    if "linear" in others:
        saved += clips * b * states // 2 * s.tower_width
    return saved, layer, flows or bool({"linear", "embed_tokens"} & others)


def micro_batch(
    s: Sizes, args: argparse.Namespace, size: int, trainable: Sequence[Parameter], width: Lengths
) -> Activations:
    """What a forward and backward pass of ``policy.forward`` over ``size`` responses takes."""
    b, rank, again = 2 if args.bf16 else 4, args.lora_rank, args.gradient_checkpointing
    tower, decoder, others = modules_of(s, trainable)
    groups, whole_length = prompts_in(size, args.n_samples_per_prompt), width.prompt + width.response
    saved, layer, flows = _tower_pass(s, args, groups * width.clips, width.seconds, tower, others)

    passes = [(size, whole_length, whole_length)]  # rows, tokens, keys
    if size > 1 and not again:  # the prompt once per group
        passes = [(groups, width.prompt, width.prompt), (size, width.response - 1, whole_length - 1)]
    tokens, cache = sum(rows * new for rows, new, _ in passes), 0.0
    for names in decoder:
        flows |= bool(names)
        if flows:
            whole = sum(decoder_layer(s, b, *one, names, rank) for one in passes)
            saved += tokens * b * s.width if again else whole
            # in float32 the first norm's input is the one that is kept anyway
            layer = max(layer, whole - (tokens * b * s.width if b == 4 else 0) if again else 0)
        elif len(passes) > 1:
            cache += 2 * passes[1][0] * passes[1][2] * b * s.kv_heads * s.head_width
    saved += flows * tokens * s.width * (4 + b * ("norm" in others))
    scored = size * width.response
    saved += scored * b * s.width
    # gradients of a layer's inner values, of the pass that is larger, and of one of its matrices (or it, unpacked)
    most = max(rows * new for rows, new, _ in passes)
    matrix = s.inner * s.width * b * any({"gate_proj", "up_proj", "down_proj"} & names for names in decoder)
    layer += most * b * 2 * s.inner + matrix * (rank == 0 or args.load_in_4bit)
    return Activations(saved, layer, head_bytes(s, b, scored, "lm_head" in others, cache))


def forward_only(s: Sizes, args: argparse.Namespace, size: int, width: Lengths) -> float:
    """Bytes of a log-prob forward: keys and values of all layers, one layer's inner values, a chunk of logits."""
    b = 2 if args.bf16 else 4
    tokens = max(prompts_in(size, args.n_samples_per_prompt) * width.prompt, size * width.response)
    inner = tokens * (b * (3 * s.inner + 4 * s.width) + 8 * s.width)
    chunk = min(size * width.response, max(1, LOGITS // s.vocabulary)) * s.vocabulary
    cache = size * (width.prompt + width.response) * cache_bytes(s, b) if size > 1 else 0
    return cache + max(inner, 12 * chunk)


# -------------------------------------------------------------------------------------------------- states and engines
class Engine(NamedTuple):
    """A rollout engine on one GPU, in bytes."""

    share: float  # what it takes while it is awake
    weights: float  # its own
    cache: float  # left for keys and values; below 0: not even the weights have room
    sequences: float  # longest ones that the cache holds, of all GPUs of the engine
    least: float  # the share without which it does not start: with the cache of one longest sequence


def engine_of(s: Sizes, args: argparse.Namespace, gpus: int, gib: float) -> Engine:
    """How an engine divides its share of a GPU of ``gib`` GiB."""
    b, width, share = 2 if args.bf16 else 4, lengths(args), args.engine_mem_util * gib * GIB
    one = (width.prompt + width.response) * cache_bytes(s, b)
    if args.engine_type == "hf":  # generates with the weights that train
        rows = min(HF_ROWS, max(1, share // one), args.rollout_batch_size * args.n_samples_per_prompt // gpus)
        return Engine(rows * one, 0, rows * one, rows, one)
    tp = args.engine_tp_size
    weights = b * count(parameters(s)) / tp
    cache = share - weights - ENGINE_WORK
    return Engine(share, weights, cache, cache * tp / one, weights + ENGINE_WORK + one / tp)


class States(NamedTuple):
    """What training keeps, a GPU, in bytes."""

    weights: float
    whole: float  # weights of the whole model, as one GPU would hold them
    gradients: float  # between two micro-batches
    optimizer: float  # master weights and moments
    host: float  # what is kept in the machine's memory instead


def states_of(s: Sizes, args: argparse.Namespace, gpus: int, trainable: Sequence[Parameter]) -> States:
    """Weights, gradients and optimizer."""
    b, stage = 2 if args.bf16 else 4, args.zero_stage
    every, values = parameters(s), count(trainable)
    if args.fsdp:  # what trains is float32, all of it sharded
        frozen = b * (count(every) - (0 if args.lora_rank else values))
        weights, moments = (frozen + 4 * values) / gpus, 8 * values / gpus
        whole = frozen + b * values
        if args.fsdp_cpu_offload:
            return States(0, whole, 0, 0, weights + 4 * values / gpus + moments)
        return States(weights, whole, 4 * values / gpus, moments, 0)
    quantised = count([p for p in every if p.linear and p.part == "language_model"]) if args.load_in_4bit else 0
    whole = (count(every) - quantised) * b + quantised * NF4 + (values * b if args.lora_rank else 0)
    share = 1 if stage == 0 else gpus
    small = b * count([p for p in every if p.count < PERSISTENT])  # ZeRO-3 leaves them whole
    weights = small + (whole - small) / gpus if stage == 3 else whole
    # master weights also where the weights are float32: only plain data parallelism has none of its own
    optimizer = values * (8 if stage == 0 and b == 4 else 12) / share
    moved = 0.0
    if stage == 3 and getattr(args, "param_offload", False):  # LightRFT has no such flag
        weights, moved = small, weights - small
    if args.adam_offload and stage:
        # gradients there in float32 and in the weights' type; ZeRO-2 has new weights there, too, before they are moved
        return States(weights, whole, 0, 0, moved + optimizer + (4 + b * (2 if stage == 2 else 1)) * values / share)
    return States(weights, whole, b * values / share, optimizer, moved)


def fsdp_units(s: Sizes, b: int, trainable: Sequence[Parameter]) -> tuple[float, float]:
    """Bytes that FSDP2 gathers and moves at a time, at ``b`` bytes a gathered value. ``FSDPStrategy.shard``'s units are
    each layer, the embedding and the head; the rest stays whole while the model runs.

    :return: What is whole while a unit runs (it, the next one, the rest); on top of it the buffer that a unit comes
        in, or a unit's gradients and their copy in float32.
    """

    def by_unit(some: Sequence[Parameter]) -> Counter[str]:
        values: Counter[str] = Counter()
        for parameter in some:
            unit = re.search(r"^.*\.layers\.\d+|embed_tokens|lm_head", parameter.name)
            values[unit.group() if unit else ""] += parameter.count
        return values

    adapters = [parameter for parameter in trainable if ".lora_" in parameter.name]
    every, training = by_unit([*parameters(s), *adapters]), by_unit(trainable)
    rest = every.pop("")
    first = max(every.values())
    layer = max(values for name, values in every.items() if "layers" in name)  # what runs before or after an end
    return b * (rest + first + layer), max(b * first, (b + 4) * max(training.values()))


# -------------------------------------------------------------------------------------------------------------- a plan
class GPUs(NamedTuple):
    """What is trained on."""

    count: int  # ranks
    gib: float  # memory of each
    source: str  # where the two are from


class Plan:
    """What a configuration takes. Table, headline and suggestion all come from :attr:`memory` and :attr:`engine`.

    :raises SizeError: if a flag names a module that the model lacks.
    """

    def __init__(self, args: argparse.Namespace, sizes: Sizes, gpus: GPUs) -> None:
        self.args, self.sizes, self.gpus = args, sizes, gpus
        self.b = 2 if args.bf16 else 4
        self.limit = gpus.gib * GIB
        self.trained = trained(sizes, args)
        self.width = lengths(args)
        self.states = states_of(sizes, args, gpus.count, self.trained)
        self.engine = engine_of(sizes, args, gpus.count, gpus.gib)
        self.sharded = args.fsdp or args.zero_stage == 3
        self.stage = None if args.fsdp else args.zero_stage  # of ZeRO
        self.offloaded = args.fsdp_cpu_offload if args.fsdp else args.adam_offload and args.zero_stage > 0
        self.memory = {phase: dict.fromkeys(COMPONENTS, 0.0) for phase in PHASES}  # bytes
        self._add_states()
        self._add_engine()
        self._add_passes()
        self._add_step()
        self.totals = {phase: sum(row.values()) for phase, row in self.memory.items()}

    @property
    def missing(self) -> float:
        """Bytes that are missing, of all phases and of the engine's share together; 0: it fits."""
        too_much = sum(max(0.0, total - self.limit) for total in self.totals.values())
        return too_much + max(0.0, self.engine.least - self.engine.share)

    @property
    def fullest(self) -> str:
        """The phase that takes most, in words."""
        phase = max(PHASES, key=self.totals.__getitem__)
        return f"{self.totals[phase] / GIB:.2f} of {self.gpus.gib:g} GiB, in {phase}"

    def changed(self, **flags: Any) -> Plan:
        """The same with other flags."""
        return Plan(argparse.Namespace(**(vars(self.args) | flags)), self.sizes, self.gpus)

    def _add_states(self) -> None:
        """What is there in all phases or in most."""
        args, b = self.args, self.b
        # over several rollouts an optimizer step, gradients stay; ZeRO-3's are a buffer that always does
        stays = self.stage == 3 or args.train_batch_size > args.rollout_batch_size * args.n_samples_per_prompt
        for phase, row in self.memory.items():
            row["weights"], row["optimizer states"] = self.states.weights, self.states.optimizer
            row["gradients"] = self.states.gradients if stays or phase in ("backward", "optimizer") else 0
            row["reserve"] = RESERVE
            if self.stage == 3:
                row["sharding buffers"] = b * BUCKET
            elif self.stage == 2 and self.offloaded:
                row["sharding buffers"] = b * max(p.count for p in self.trained)
        if args.init_kl_coef > 0 and args.lora_rank == 0 and not (args.fsdp and self.offloaded):
            reference = b * count(parameters(self.sizes)) / (self.gpus.count if self.sharded else 1)
            for phase in PHASES if self.sharded else ("rollout", "log-probs"):  # else it waits in the machine's memory
                self.memory[phase]["reference model"] = reference

    def _add_engine(self) -> None:
        args = self.args
        if args.engine_type == "hf":
            self.memory["rollout"]["engine"] = self.engine.share
            if self.sharded:
                self.memory["rollout"]["sharding buffers"] += self.states.whole  # gathered while it generates
            return
        for phase, row in self.memory.items():
            awake = phase in ("rollout", "sync") or not args.enable_engine_sleep
            row["engine"] = self.engine.share if awake else ENGINE_ASLEEP
        if self.sharded or args.lora_rank:
            # gathered in buckets, or merged with its adapter; LightRFT, without the flag, gathers one by one
            bucket = getattr(args, "sync_bucket_mb", 0) * 2**20 if self.sharded else 0
            every = parameters(self.sizes)
            largest, whole = self.b * max(p.count for p in every), self.b * count(every)
            self.memory["sync"]["work space"] = max(largest, min(bucket, whole))

    def _add_passes(self) -> None:
        """Forward and backward passes of training."""
        args, b, backward = self.args, self.b, self.memory["backward"]
        if args.init_kl_coef > 0 or args.max_epochs > 1:
            size = args.micro_rollout_batch_size
            self.memory["log-probs"]["activations"] = forward_only(self.sizes, args, size, self.width)
        train = micro_batch(self.sizes, args, args.micro_train_batch_size, self.trained, self.width)
        backward["activations"], backward["work space"] = train.saved, max(train.layer, train.head)
        gathered = 0.0
        if args.fsdp:
            gathered, moved = fsdp_units(self.sizes, b, self.trained)
            backward["work space"] = max(backward["work space"], moved)
        elif self.stage == 3:
            gathered = min(b * LIVE, self.states.whole)
        for phase in ("log-probs", "backward"):
            self.memory[phase]["sharding buffers"] += gathered
        if self.stage == 2:
            backward["sharding buffers"] += b * BUCKET * 2  # one is filled while the other is reduced

    def _add_step(self) -> None:
        """The optimizer's step."""
        values, stage, step = count(self.trained), self.stage, self.memory["optimizer"]
        share = values / (1 if stage == 0 else self.gpus.count)
        if stage == 0 and self.gpus.count > 1:
            step["sharding buffers"] = self.b * min(BUCKET, values)
        if self.offloaded:
            return
        at_once = min(share, SUB_GROUP) if stage == 3 else share
        if stage == 3 or (self.b == 2 and not self.args.fsdp):  # copied to float32; ZeRO-2 lets go of the others
            step["gradients"] = 4 * at_once + (0 if stage == 2 else self.states.gradients)
        step["work space"] = 4 * at_once  # AdamW over all parameters at once


def host_memory(plan: Plan) -> dict[str, float]:
    """Bytes of the machine's memory for each GPU."""
    args, whole = plan.args, plan.b * count(parameters(plan.sizes))
    asleep = args.engine_type == "vllm" and args.enable_engine_sleep
    reference = whole if args.init_kl_coef > 0 and args.lora_rank == 0 else 0
    if args.fsdp:
        reference *= args.fsdp_cpu_offload / plan.gpus.count
    elif args.zero_stage == 3:
        reference = 0
    return {
        "sleeping engine": whole / args.engine_tp_size * asleep,
        "training": plan.states.host,
        "reference model": reference,
        "decoded clips": args.audio_cache_mib * 2**20 * (2 if args.eval_steps > 0 else 1),
    }


def count_rows(args: argparse.Namespace) -> int | None:
    """Rows of an episode, from the data's files; None without them."""
    found = 0
    for source in (args.prompt_data or "").split(","):
        path = Path(source.strip())
        files = [path] if path.is_file() else [path / f"{args.prompt_split}{suffix}" for suffix in DATA_SUFFIXES]
        file = next((file for file in files if source and file.is_file()), None)
        if file is None or file.suffix not in (".parquet", ".jsonl"):
            return None
        if file.suffix == ".jsonl":
            with file.open("rb") as lines:
                found += sum(1 for _ in lines)
        else:
            import pyarrow.parquet  # here, because it is slow

            found += pyarrow.parquet.read_metadata(file).num_rows
    return min(found, args.max_samples)


def batch(plan: Plan) -> dict[str, Any]:
    """The batch's arithmetic, as ``train`` does it; the configuration must have no problems."""
    args, world, width, rows = plan.args, plan.gpus.count, plan.width, count_rows(plan.args)
    responses, micro = args.rollout_batch_size * args.n_samples_per_prompt, args.micro_train_batch_size
    out: dict[str, Any] = {
        "responses_a_rollout": responses,
        "responses_a_gpu": responses // world,
        "micro_batches_a_gpu": responses // world // micro,
        "micro_batches_a_step": args.train_batch_size // micro // world,
        "prompts_a_micro_batch": prompts_in(micro, args.n_samples_per_prompt),
        "most_tokens_a_rollout": args.rollout_batch_size * width.prompt + responses * width.response,
        "rows": rows,
    }
    if rows is not None:
        # a rank's share is rounded down, as the loader does, before it is cut into batches
        rollouts = rows // world // (args.rollout_batch_size // world)
        out["steps_an_episode"] = rollouts * responses * args.max_epochs // args.train_batch_size
        out["steps"] = rollouts * args.num_episodes * responses * args.max_epochs // args.train_batch_size
    return out


# ---------------------------------------------------------------------------------------------------------- suggestion
class Change(NamedTuple):
    """Flags that go together, and what they do."""

    flags: dict[str, Any]
    effect: str


def changes(plan: Plan) -> list[Change]:
    """What can be changed in this situation to save memory, the cheapest first."""
    args, several = plan.args, plan.gpus.count > 1
    share = args.rollout_batch_size * args.n_samples_per_prompt // plan.gpus.count  # responses of a GPU
    out = [] if args.bf16 else [Change({"bf16": True}, "weights, gradients and activations of half the size")]
    for name, effect in (
        ("micro_rollout_batch_size", "fewer activations in the log-prob forward"),
        ("micro_train_batch_size", "fewer activations, more micro-batches"),
    ):
        smaller = [size for size in range(getattr(args, name) - 1, 0, -1) if share % size == 0]
        out += [Change({name: size}, effect) for size in smaller]
    if not args.gradient_checkpointing:
        out.append(Change({"gradient_checkpointing": True}, "activations of a layer are computed again (slower)"))
    stage = 3 if several and not args.load_in_4bit else args.zero_stage or 2
    if stage > args.zero_stage and several and not args.fsdp:
        out.append(Change({"zero_stage": stage}, "weights, gradients and optimizer split among the GPUs"))
    if args.lora_rank == 0:
        offload = {"fsdp_cpu_offload" if args.fsdp else "adam_offload": True}
        if not args.fsdp and args.zero_stage == 0:
            offload["zero_stage"] = stage  # plain data parallelism does not offload
        out.append(Change(offload, "optimizer and gradients in the machine's memory (slower steps)"))
        adapters = {"lora_rank": 16, "freeze_prefix": None, "adam_offload": False, "fsdp_cpu_offload": False}
        out.append(Change(adapters, "adapters alone train: no reference model, hardly an optimizer"))
    if not args.load_in_4bit and not args.fsdp:
        packed = {"load_in_4bit": True, "zero_stage": min(2, args.zero_stage)}
        out.append(Change(packed, "the frozen language model at 4 bits a weight"))
    if args.engine_type == "vllm":
        engine = {"engine_type": "hf", "engine_tp_size": 1}
        out.append(Change(engine, "generates with the weights that train, without a copy of its own (slower)"))
    out.append(Change({"engine_mem_util": 0.1}, "the hf engine generates fewer responses at once"))
    return out


def suggest(plan: Plan) -> tuple[list[Change], Plan]:
    """The first of :func:`changes` that together make a plan fit, less those that are not needed.

    :return: The changes, and the plan with them; if that one does not fit either, with all that help.
    """

    def apply(taken: list[Change]) -> Plan:
        flags = {name: value for change in taken for name, value in change.flags.items()}
        return fit_engine(plan.changed(**flags))

    taken: list[Change] = []
    now = apply(taken)
    for change in changes(plan):
        if not now.missing:
            break
        after = apply([*taken, change])
        if after.missing < now.missing:
            taken.append(change)
            now = after
    for change in taken[::-1]:
        rest = [other for other in taken if other is not change]
        after = apply(rest)
        if after.missing <= now.missing and not find_problems(after.args, plan.gpus.count, paths=False):
            taken, now = rest, after
    if now.args.engine_type == "vllm" and now.args.engine_mem_util != plan.args.engine_mem_util:
        share = {"engine_mem_util": now.args.engine_mem_util}
        taken.append(Change(share, "the share with which the engine starts and leaves training its room"))
    return taken, now


def fit_engine(plan: Plan) -> Plan:
    """Give vLLM the largest share, in steps of 0.05, beside what training keeps, but enough to start."""
    engine = plan.engine
    if plan.args.engine_type != "vllm" or not plan.missing:
        return plan
    beside = max(plan.totals[phase] for phase in PHASES if plan.memory[phase]["engine"] == engine.share) - engine.share
    if engine.least <= engine.share <= plan.limit - beside:
        return plan
    share = max(math.floor((plan.limit - beside) / plan.limit * 20), math.ceil(engine.least / plan.limit * 20)) / 20
    return plan.changed(engine_mem_util=share) if share < 1 else plan


def smallest_gpu(plan: Plan) -> int:
    """GiB of the smallest GPU, in whole GiB, on which a plan that does not fit would."""
    gib = math.ceil(plan.gpus.gib)
    while fit_engine(Plan(plan.args, plan.sizes, plan.gpus._replace(gib=gib))).missing:
        gib += 1
    return gib


# -------------------------------------------------------------------------------------------------------------- output
def _entry(name: str, text: str) -> list[str]:
    return textwrap.wrap(text, 80, initial_indent=f"{name:<11}", subsequent_indent=" " * 11)


def _model_lines(plan: Plan) -> list[str]:
    args, gpus, every, some = plan.args, plan.gpus, parameters(plan.sizes), count(plan.trained)
    counts = ", ".join(f"{part} {count(every, part) / 1e6:,.1f} M" for part in PARTS)
    what = f"adapters of rank {args.lora_rank}" if args.lora_rank else "trained"
    base = count(every) + (some if args.lora_rank else 0)
    kind = [
        "FSDP2" if args.fsdp else f"ZeRO-{args.zero_stage}",
        "bf16" if args.bf16 else "fp32",
        *["4-bit base"] * args.load_in_4bit,
        *["optimizer offloaded"] * args.adam_offload,
        *["parameters offloaded"] * getattr(args, "param_offload", False),
        *["offloaded"] * args.fsdp_cpu_offload,
        *["checkpointing"] * args.gradient_checkpointing,
    ]
    return [
        *_entry("model", f"{args.pretrain}: {count(every):,} parameters: {counts}"),
        *_entry("", f"{what} {some:,} ({some / base:.2%})"),
        *_entry("GPUs", f"{gpus.count} x {gpus.gib:g} GiB ({gpus.source}); {', '.join(kind)}"),
    ]


def _batch_lines(plan: Plan) -> list[str]:
    args, width, n = plan.args, plan.width, batch(plan)
    text = (
        f"{args.rollout_batch_size} prompts x {args.n_samples_per_prompt} = {n['responses_a_rollout']} responses a "
        f"rollout, {n['responses_a_gpu']} a GPU, in {n['micro_batches_a_gpu']} micro-batches of "
        f"{args.micro_train_batch_size}; {args.train_batch_size} an optimizer step, {n['micro_batches_a_step']} "
        f"micro-batches; at most {n['most_tokens_a_rollout']:,} tokens a rollout"
    )
    clips = f"{width.clips} clip{'s' * (width.clips > 1)} of {width.seconds:g} s"
    steps = "unknown: no rows of --prompt_data to count"
    if n["rows"] is not None:
        steps = f"{n['rows']:,} rows: {n['steps_an_episode']:,} optimizer steps an episode, {n['steps']:,} in all"
    return [
        *_entry("longest", f"{width.prompt} tokens of prompt ({clips}), {width.response} of response"),
        *_entry("batch", text),
        *_entry("steps", steps),
    ]


def _table(plan: Plan) -> list[str]:
    def row(name: str, cells: list[str]) -> str:
        return (f"{name:<18}" + "".join(f"{cell:>12}" for cell in cells)).rstrip()

    rows = [row("GiB a GPU", list(PHASES))]
    for name in COMPONENTS:
        values = [plan.memory[phase][name] / GIB for phase in PHASES]
        if any(values):
            rows.append(row(name, [f"{value:.2f}" if value else "-" for value in values]))
    rows.append(row("total", [f"{total / GIB:.2f}" for total in plan.totals.values()]))
    over = ["over" if total > plan.limit else "" for total in plan.totals.values()]
    return [*rows, row("", over)] if any(over) else rows


def _engine_line(plan: Plan) -> str:
    args, engine = plan.args, plan.engine
    if args.engine_type == "hf":
        return f"hf: keys and values of {engine.sequences:.0f} sequences at once"
    in_rollout = args.rollout_batch_size * args.n_samples_per_prompt // plan.gpus.count * args.engine_tp_size
    return (
        f"vllm: weights {engine.weights / GIB:.2f}, keys and values {max(0.0, engine.cache) / GIB:.2f} GiB: "
        f"{max(0.0, engine.sequences):.0f} sequences of full length at once, {in_rollout} in a rollout"
    )


def new_flags(plan: Plan, taken: list[Change]) -> dict[str, Any]:
    """Flags of some changes, those left out that a plan has already."""
    flags = {name: value for change in taken for name, value in change.flags.items()}
    return {name: value for name, value in flags.items() if value != getattr(plan.args, name)}


def _flags(plan: Plan, taken: list[Change]) -> str:
    words = []
    for name, value in new_flags(plan, taken).items():
        if isinstance(value, bool):
            words.append(f"--{name}" if value else f"--no-{name}")
        else:
            words.append(f"without --{name}" if value is None else f"--{name} {value}")
    return " ".join(words)


def _verdict(plan: Plan) -> list[str]:
    if not plan.missing:
        return [f"It fits: at most {plan.fullest}."]
    engine, gpus, why = plan.engine, plan.gpus, []
    if max(plan.totals.values()) > plan.limit:
        why.append(plan.fullest)
    if engine.least > engine.share:
        has = f"--engine_mem_util {plan.args.engine_mem_util:g} gives the engine {engine.share / GIB:.2f} GiB"
        why.append(f"{has}, and to start it takes {engine.least / GIB:.2f}")
    lines = textwrap.wrap(f"It does not fit: {'; '.join(why)}.", 80)
    taken, after = suggest(plan)
    if after.missing:
        flags = f"Even with {_flags(plan, taken)} it" if taken else "No flag helps: it"
        return [*lines, "", *textwrap.wrap(f"{flags} takes {gpus.count} x {smallest_gpu(after)} GiB.", 80)]
    lines += ["", f"With these flags it fits: {after.fullest}."]
    for change in taken:
        lines += textwrap.wrap(f"  {_flags(plan, [change])}: {change.effect}", 80, subsequent_indent="      ")
    return lines


def as_json(plan: Plan) -> str:
    """The plan for the next tool."""
    every = parameters(plan.sizes)
    taken, after = suggest(plan) if plan.missing else ([], plan)
    document = {
        "fits": not plan.missing,
        "gpus": plan.gpus._asdict(),
        "parameters": {part: count(every, part) for part in PARTS} | {"trained": count(plan.trained)},
        "longest": plan.width._asdict(),
        "batch": batch(plan),
        "bytes_a_gpu": plan.memory,
        "totals": plan.totals,
        "engine": plan.engine._asdict(),
        "machine_bytes_a_gpu": host_memory(plan),
        "change": new_flags(plan, taken),
        "fits_changed": not after.missing,
    }
    return json.dumps(document, indent=2)


def describe(plan: Plan) -> str:
    """The plan for a person."""
    host = {name: size / GIB for name, size in host_memory(plan).items() if size}
    parts = ", ".join(f"{name} {size:.1f}" for name, size in host.items()) or "nothing"
    lines = [
        *_model_lines(plan),
        *_batch_lines(plan),
        "",
        *_table(plan),
        "",
        *_entry("engine", _engine_line(plan)),
        *_entry("machine", f"{sum(host.values()):.1f} GiB of its memory for each GPU: {parts}"),
        *_entry("assumed", f"reserve (CUDA, NCCL, fragmentation) {RESERVE / GIB:g} GiB; never compared with a GPU"),
        "",
        *_verdict(plan),
    ]
    return "\n".join(lines)


def find_gpus(args: argparse.Namespace) -> GPUs:
    """From ``--plan_gpus`` and ``--plan_gpu_gib``, WORLD_SIZE, or what nvidia-smi lists; else R1-AQA's 8 x 80 GiB."""
    listed: list[float] = []
    if shutil.which("nvidia-smi") and None in (args.plan_gpus, args.plan_gpu_gib):
        query = ["nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits"]
        done = subprocess.run(query, capture_output=True, text=True)
        listed = [float(line) / 1024 for line in done.stdout.split() if line.isdecimal()] if not done.returncode else []
    number = args.plan_gpus or int(os.environ.get("WORLD_SIZE", 0)) or len(listed) or 8
    gib = args.plan_gpu_gib or (min(listed) if listed else 80.0)
    given = args.plan_gpus and args.plan_gpu_gib
    source = "as asked" if given else "as found" if listed else "assumed: --plan_gpus, --plan_gpu_gib"
    return GPUs(number, gib, source)


def run(args: argparse.Namespace, problems: list[str]) -> int:
    """Print the plan, on rank 0.

    :param args: Finished flags.
    :param problems: Of the host's flags.
    :return: Exit status: 0 it fits, :data:`DOES_NOT_FIT`, 2 wrong use.
    """
    if os.environ.get("RANK", "0") != "0":
        return 0
    gpus = find_gpus(args)
    problems = [*find_problems(args, gpus.count, paths=False), *problems]
    if not args.pretrain:
        problems.append("--pretrain is missing: a model folder or hub name")
    if not problems:
        try:
            plan = Plan(args, read_sizes(args.pretrain), gpus)
        except SizeError as error:
            problems.append(str(error))
    if problems:
        print(f"{len(problems)} problems with this configuration:", *problems, sep="\n  - ", file=sys.stderr)
        return 2
    print(as_json(plan) if args.plan == "json" else describe(plan))
    return DOES_NOT_FIT if plan.missing else 0
