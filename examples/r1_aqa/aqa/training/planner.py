"""``train_colocate.py --plan``: the memory that a GPU needs, the batch's arithmetic, and one set of flags that fits.

It loads no model and no torch: all is computed from ``config.json`` and the flags, for the longest prompts, clips and
responses that the flags allow. In the formulas ``s`` are the model's sizes and ``b`` is the number of bytes per value.
``huggingface_hub`` and ``pyarrow`` are imported inside functions, because they are slow and seldom needed.

Sources: the buffers of DeepSpeed 0.19.8 and FSDP2 as their code allocates them; what autograd keeps of each layer as
``torch.autograd.graph.saved_tensors_hooks`` shows it (``tests/unit/test_planner.py`` compares it with bytes measured on
a CPU); Rajbhandari et al., ZeRO (2020), for weights, gradients and optimizer; Korthikanti et al., Reducing Activation
Recomputation (2022), for the way of counting activations. Never compared with a GPU.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import os
import shutil
import subprocess
import sys
import textwrap
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from aqa.training.flag_rules import find_problems
from aqa.training.flags import DATA_SUFFIXES
from aqa.training.freezing import is_below

DOES_NOT_FIT = 3  # exit status
GIB = 2**30
PHASES = ("rollout", "log-probs", "backward", "optimizer", "sync")
# The configuration of these two models, as far as it differs from transformers' defaults.
KNOWN = {
    name: {"model_type": "qwen2_audio", "text_config": {"vocab_size": 156_032, "intermediate_size": 11_008}}
    for name in ("Qwen/Qwen2-Audio-7B-Instruct", "Qwen/Qwen2-Audio-7B")
}
PARTS = ("audio_tower", "multi_modal_projector", "language_model", "lm_head")
TOWER, PROJECTOR, TEXT = "model.audio_tower", "model.multi_modal_projector.linear", "model.language_model"
TOKENS_A_SECOND, MOST_SECONDS = 25, 30  # of audio; the tower takes 30 s at most
LOGITS = 2**25  # token_log_probs.LOGITS_AT_ONCE, repeated because that module loads torch
BUCKET, LIVE, SUB_GROUP, PERSISTENT = 5e8, 1e9, 1e9, 1e5  # DeepSpeed's defaults, in values
NF4 = 0.5 + 1 / 64 + 4 / (64 * 256)  # bytes a value: blocks of 64 share an 8-bit scale, 256 scales share a float32
# Assumed, not derived: CUDA context, NCCL and fragmentation; vLLM's graphs and own activations; what it keeps asleep
RESERVE, ENGINE_WORK, ENGINE_ASLEEP = 2 * GIB, 2 * GIB, 1 * GIB
HF_ROWS = 64  # sequences that the hf engine generates at once


class SizeError(Exception):
    """The model's sizes are unknown, or a flag names a module that the model lacks; the message says what to do."""


class Sizes(NamedTuple):
    """Dimensions of a Qwen2-Audio, named as in its ``config.json``, with the defaults of transformers'
    Qwen2AudioEncoderConfig (down to ``encoder_ffn_dim``) and Qwen2Config."""

    num_mel_bins: int = 128
    max_source_positions: int = 1500  # states of the longest clip
    encoder_layers: int = 32
    encoder_attention_heads: int = 20
    d_model: int = 1280
    encoder_ffn_dim: int = 5120
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int = 32
    head_dim: int = 0  # in a configuration it may be left out, as the one before
    hidden_size: int = 4096
    intermediate_size: int = 22_016
    vocab_size: int = 151_936


class Parameter(NamedTuple):
    """A parameter, by its name in the live model (transformers 5); an adapter's name contains ``.lora_``."""

    name: str
    shape: tuple[int, ...]
    block: str  # the layer that it belongs to, or the module outside of layers
    linear: bool = False  # the weight of a linear layer
    fixed: bool = False  # never trains: the tower's sinusoids


def read_sizes(pretrain: str) -> Sizes:
    """Sizes of a model folder, of a model in Hugging Face's cache, or of one in :data:`KNOWN`.

    :raises SizeError: if there is no configuration, or it is not a Qwen2-Audio's.
    """
    path = Path(pretrain) / "config.json"
    if not path.is_file() and pretrain in KNOWN:
        return sizes_of(KNOWN[pretrain])
    if not path.is_file() and pretrain.count("/") == 1:
        from huggingface_hub import try_to_load_from_cache

        cached = try_to_load_from_cache(pretrain, "config.json")
        path = Path(cached) if isinstance(cached, str) else path
    if not path.is_file():
        raise SizeError(
            f"--pretrain {pretrain}: no config.json there or in Hugging Face's cache; without one --plan knows "
            f"the sizes of {' and '.join(KNOWN)} only"
        )
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise SizeError(f"{path}: not JSON ({error})") from None
    if config.get("model_type") != "qwen2_audio":
        raise SizeError(f"{path}: model_type {config.get('model_type')!r}; only qwen2_audio can be planned")
    return sizes_of(config)


def sizes_of(config: dict[str, Any]) -> Sizes:
    """Sizes from the contents of a ``config.json``."""
    audio, text = config.get("audio_config") or {}, config.get("text_config") or {}
    last = Sizes._fields.index("encoder_ffn_dim") + 1
    named = [(audio, name) for name in Sizes._fields[:last]] + [(text, name) for name in Sizes._fields[last:]]
    s = Sizes(**{name: part[name] for part, name in named if name in part})
    heads = s.num_attention_heads
    return s._replace(num_key_value_heads=s.num_key_value_heads or heads, head_dim=s.head_dim or s.hidden_size // heads)


@functools.cache
def parameters(s: Sizes) -> tuple[Parameter, ...]:
    """All parameters of the model."""
    d, f, h, inner = s.d_model, s.encoder_ffn_dim, s.hidden_size, s.intermediate_size
    query, keys = s.num_attention_heads * s.head_dim, s.num_key_value_heads * s.head_dim
    # modules, shape of a weight, and its kind: "l" is a linear layer, "b" has a bias
    tower_layer = [
        (".self_attn.k_proj", (d, d), "l"),
        (".self_attn.q_proj .self_attn.v_proj .self_attn.out_proj", (d, d), "lb"),
        (".self_attn_layer_norm .final_layer_norm", (d,), "b"),
        *[(".fc1", (f, d), "lb"), (".fc2", (d, f), "lb")],
    ]
    layer = [
        *[(".self_attn.q_proj", (query, h), "lb"), (".self_attn.k_proj .self_attn.v_proj", (keys, h), "lb")],
        *[(".self_attn.o_proj", (h, query), "l"), (".mlp.gate_proj .mlp.up_proj", (inner, h), "l")],
        *[(".mlp.down_proj", (h, inner), "l"), (".input_layernorm .post_attention_layernorm", (h,), "")],
    ]
    table: list[tuple[str, str, tuple[int, ...], str]] = [  # the same with the block in front
        *[(f"{TOWER}.conv1", "", (d, s.num_mel_bins, 3), "b"), (f"{TOWER}.conv2", "", (d, d, 3), "b")],
        (f"{TOWER}.embed_positions", "", (s.max_source_positions, d), ""),
        *[(f"{TOWER}.layers.{i}", *rest) for i in range(s.encoder_layers) for rest in tower_layer],
        *[(f"{TOWER}.layer_norm", "", (d,), "b"), (PROJECTOR, "", (h, d), "lb")],
        (f"{TEXT}.embed_tokens", "", (s.vocab_size, h), ""),
        *[(f"{TEXT}.layers.{i}", *rest) for i in range(s.num_hidden_layers) for rest in layer],
        *[(f"{TEXT}.norm", "", (h,), ""), ("lm_head", "", (s.vocab_size, h), "l")],
    ]
    out = []
    for block, modules, shape, kind in table:
        for module in modules.split() or [""]:
            out.append(Parameter(f"{block}{module}.weight", shape, block, "l" in kind, "embed_positions" in block))
            if "b" in kind:
                out.append(Parameter(f"{block}{module}.bias", shape[:1], block))
    return tuple(out)


def trained(s: Sizes, args: argparse.Namespace) -> list[Parameter]:
    """The parameters that train: as ``freezing.freeze`` and ``lightrft.models.lora.add_adapters`` leave them.

    :raises SizeError: if ``--freeze_prefix`` or ``--target_modules`` names what is not in the model.
    """
    frozen, targets, rank, every = args.freeze_prefix or (), args.target_modules, args.lora_rank, parameters(s)
    if rank == 0:
        for part in frozen:
            if not any(is_below(p.name, part) for p in every):
                raise SizeError(f"--freeze_prefix {part}: the model has no parameter below a module of that name")
        return [p for p in every if not p.fixed and not any(is_below(p.name, part) for part in frozen)]
    linear = [p for p in every if p.linear and p.block != "lm_head"]
    for target in targets:
        if not any(target in p.name.split(".") for p in linear):
            raise SizeError(f"--target_modules {target}: no linear layer of the model has that name or is below it")
    return [
        Parameter(f"{p.name.removesuffix('weight')}lora_{side}.weight", shape, p.block)
        for p in linear
        if set(targets) & set(p.name.split("."))
        for side, shape in (("A", (rank, p.shape[1])), ("B", (p.shape[0], rank)))
    ]


def count(some: Iterable[Parameter], part: str = "") -> int:
    """Number of values in some parameters, or in those of one of :data:`PARTS`."""
    return sum(math.prod(p.shape) for p in some if part in p.block)


def cache_bytes(s: Sizes, b: int) -> int:
    """Bytes of one token's keys and values."""
    return 2 * s.num_hidden_layers * s.num_key_value_heads * s.head_dim * b


class Lengths(NamedTuple):
    """The longest sequence that the flags allow."""

    clips: int  # of a prompt
    seconds: float  # of a clip
    prompt: int  # tokens, audio included
    response: int  # tokens


def lengths(args: argparse.Namespace) -> Lengths:
    """From the flags."""
    clips, seconds = args.limit_mm_image_per_prompt, args.plan_clip_seconds
    tokens = int(TOKENS_A_SECOND * min(seconds, MOST_SECONDS))  # one of them is counted in --prompt_max_len
    return Lengths(clips, seconds, args.prompt_max_len + clips * (tokens - 1), max(2, args.generate_max_len))


def decoder_layer(s: Sizes, b: int, rows: int, new: int, keys: int, rank: int) -> tuple[float, float]:
    """Bytes that autograd keeps of a layer of the language model: if a gradient only passes it, and if it trains.

    :param new: Tokens computed of each of ``rows`` sequences.
    :param keys: Tokens that each attends to; from two rows on they are masked, in the weights' type.
    :param rank: Of the adapters; 0: none, and the norms train.
    """
    tokens, h, inner, query = rows * new, s.hidden_size, s.intermediate_size, s.num_attention_heads * s.head_dim
    passed = (
        2 * tokens * (4 * h + 4)  # both norms: input in float32, and the reciprocal of its size
        + tokens * (2 * b * query + 4 * s.num_attention_heads)  # queries, output, its log-sum-exp
        + 2 * rows * keys * b * query  # keys and values, repeated for grouped heads
        + tokens * b * inner * 3  # gate, its activation, up
        + rows * new * keys * b * (rows > 1)  # mask
    )
    return passed, passed + tokens * b * (2 * h + inner + (7 * rank or 2 * h))  # linear layers' inputs, scaled ones


def head_bytes(s: Sizes, b: int, tokens: int, trains: bool, cache: float) -> float:
    """Largest work space of ``TokenLogProbs``: chunks of logits, and the gradient of the head's weight.

    :param cache: Bytes that the forward pass holds and the backward pass does not.
    """
    weight, rows, half = s.vocab_size * s.hidden_size * trains, max(1, LOGITS // s.vocab_size), b if b == 2 else 0
    chunk, hidden = min(tokens, rows) * s.vocab_size, tokens * b * s.hidden_size
    forward = cache + chunk * (10 if half else 12)  # logits, with the bias of some tokens, and their log-softmax
    logits = chunk * (8 + half)  # in float32, their softmax, and this in the weights' type
    # over several chunks the gradient is summed in float32, with a chunk's own in both types on top
    summed, gradient = (4 * weight, weight * (8 + half)) if tokens > rows else (0, weight * b)
    return max(forward, hidden + logits + summed, hidden + chunk * (4 + half) + gradient)


def prompts_in(size: int, samples: int) -> int:
    """Most prompts that a micro-batch of ``size`` neighbouring responses holds, at ``samples`` responses a prompt."""
    if size % samples == 0 or samples % size == 0:
        return max(1, size // samples)
    return min(size, (size - 2) // samples + 2)


def micro_batch(
    s: Sizes, args: argparse.Namespace, size: int, trainable: Sequence[Parameter], width: Lengths
) -> tuple[float, float]:
    """Bytes that ``policy.forward`` over ``size`` responses and its backward pass take beside weights and gradients.

    A layer in which anything trains counts as if all of it did: narrow ``--target_modules`` take less than this.

    :return: What autograd keeps until the backward pass; what comes on top of it while that is in a layer, with what
        checkpointing computes again, or in the head.
    """
    b, again, groups = 2 if args.bf16 else 4, args.gradient_checkpointing, prompts_in(size, args.n_samples_per_prompt)
    frames = int(100 * min(width.seconds, MOST_SECONDS))
    states = min((frames + 2 + 3) // 4 * 4, 100 * MOST_SECONDS) // 2  # the policy leaves out what is behind the clip
    clips, whole, scored = groups * width.clips, width.prompt + width.response, size * width.response
    passes = [(size, whole, whole)]  # rows, tokens, keys
    if size > 1 and not again:  # the prompt once per group
        passes = [(groups, width.prompt, width.prompt), (size, width.response - 1, whole - 1)]
    tokens = sum(rows * new for rows, new, _ in passes)
    audio, text = clips * b * states * s.d_model, tokens * b * s.hidden_size  # bytes of all clips, of all tokens
    tower = clips * states * (b * (6 * s.d_model + s.encoder_ffn_dim + states) + 4 * s.encoder_attention_heads + 16)
    inputs = clips * states * b * (3 * s.d_model + s.encoder_ffn_dim + 6 * args.lora_rank)  # of linear layers
    decoder = [sum(kept) for kept in zip(*(decoder_layer(s, b, *one, args.lora_rank) for one in passes), strict=True)]
    norm = 4 * tokens * s.hidden_size
    # block, bytes kept if a gradient passes through it, if it trains, and of a layer that is computed again
    stages: list[tuple[str, float, float, float]] = [
        (f"{TOWER}.conv1", 0, 2 * audio + clips * b * states * 2 * s.num_mel_bins, 0),  # frames, activation
        (f"{TOWER}.conv2", 3 * audio, 3 * audio, 0),  # input, activation
        *[(f"{TOWER}.layers.{i}", tower, tower + inputs, audio) for i in range(s.encoder_layers)],
        (f"{TOWER}.layer_norm", 1.5 * audio, 1.5 * audio, 0),  # pooling and norm
        *[(PROJECTOR, 0, audio / 2, 0), (f"{TEXT}.embed_tokens", 0, 0, 0)],
        *[(f"{TEXT}.layers.{i}", *decoder, text) for i in range(s.num_hidden_layers)],
        (f"{TEXT}.norm", norm, norm + text, 0),
    ]
    training, flows, saved, layer, cache = {p.block for p in trainable}, False, scored * b * s.hidden_size, 0.0, 0.0
    for block, passed, trains, checkpoint in stages:
        flows |= block in training
        kept = trains if block in training else passed
        if flows and again and checkpoint:
            saved, layer = saved + checkpoint, max(layer, kept)
        elif flows:
            saved += kept
        elif block.startswith(f"{TEXT}.layers") and len(passes) > 1:  # without a gradient the cache alone is kept
            cache += size * (whole - 1) * cache_bytes(s, b) / s.num_hidden_layers
    # gradients of a layer's inner values, of the larger pass, and of one of its matrices (or the matrix, unpacked)
    layer += max(rows * new for rows, new, _ in passes) * b * 2 * s.intermediate_size
    if args.load_in_4bit or (args.lora_rank == 0 and any(block.startswith(f"{TEXT}.layers") for block in training)):
        layer += s.intermediate_size * s.hidden_size * b
    return saved, max(layer, head_bytes(s, b, scored, "lm_head" in training, cache))


def forward_only(s: Sizes, args: argparse.Namespace, size: int, width: Lengths) -> float:
    """Bytes of a log-prob forward: keys and values of all layers, one layer's inner values, a chunk of logits."""
    b = 2 if args.bf16 else 4
    tokens = max(prompts_in(size, args.n_samples_per_prompt) * width.prompt, size * width.response)
    inner = tokens * (b * (3 * s.intermediate_size + 4 * s.hidden_size) + 8 * s.hidden_size)
    chunk = min(size * width.response, max(1, LOGITS // s.vocab_size)) * s.vocab_size
    cache = size * (width.prompt + width.response) * cache_bytes(s, b) if size > 1 else 0
    return cache + max(inner, 12 * chunk)


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
    """What training keeps, in bytes per GPU."""

    weights: float
    whole: float  # weights of the whole model, as one GPU would hold them
    gradients: float  # between two micro-batches
    optimizer: float  # master weights and moments
    host: float = 0  # what is kept in the machine's memory instead


def states_of(s: Sizes, args: argparse.Namespace, gpus: int, trainable: Sequence[Parameter]) -> States:
    """Bytes that training keeps."""
    b, stage = 2 if args.bf16 else 4, args.zero_stage
    every, values = parameters(s), count(trainable)
    if args.fsdp:  # all is sharded, and what trains is float32
        frozen = b * (count(every) - (0 if args.lora_rank else values))
        weights, moments = (frozen + 4 * values) / gpus, 8 * values / gpus
        whole = frozen + b * values
        if args.fsdp_cpu_offload:
            return States(0, whole, 0, 0, weights + 4 * values / gpus + moments)
        return States(weights, whole, 4 * values / gpus, moments, 0)
    quantised = count([p for p in every if p.linear], "language_model") if args.load_in_4bit else 0
    whole = (count(every) - quantised) * b + quantised * NF4 + (values * b if args.lora_rank else 0)
    share = 1 if stage == 0 else gpus
    small = b * count(p for p in every if math.prod(p.shape) < PERSISTENT)  # ZeRO-3 leaves them whole
    weights = small + (whole - small) / gpus if stage == 3 else whole
    # master weights also where the weights are float32: only plain data parallelism has none of its own
    optimizer = values * (8 if stage == 0 and b == 4 else 12) / share
    moved = 0.0
    if stage == 3 and getattr(args, "param_offload", False):  # LightRFT has no such flag
        weights, moved = small, weights - small
    if args.adam_offload and stage:
        # gradients are there in float32 and in the weights' type; ZeRO-2 has the new weights there, too
        return States(weights, whole, 0, 0, moved + optimizer + (4 + b * (2 if stage == 2 else 1)) * values / share)
    return States(weights, whole, b * values / share, optimizer, moved)


def fsdp_units(s: Sizes, b: int, trainable: Sequence[Parameter]) -> tuple[float, float]:
    """Bytes that FSDP2 gathers and moves at a time, at ``b`` bytes a gathered value. ``FSDPStrategy.shard``'s units are
    each layer, the embedding and the head; the rest stays whole while the model runs.

    :return: What is whole while a unit runs (it, the next one, the rest); on top of it the buffer that a unit comes
        in, or a unit's gradients and their copy in float32.
    """
    every, training = Counter[str](), Counter[str]()
    for units, some in ((every, {*parameters(s), *trainable}), (training, trainable)):
        for p in some:
            is_unit = ".layers." in p.block or p.block.endswith(("embed_tokens", "lm_head"))
            units[p.block if is_unit else ""] += math.prod(p.shape)
    rest, first = every.pop(""), max(every.values())
    layer = max(values for block, values in every.items() if ".layers." in block)  # runs before or after an end
    return b * (rest + first + layer), max(b * first, (b + 4) * max(training.values()))


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
        self.args, self.sizes, self.gpus, self.limit = args, sizes, gpus, gpus.gib * GIB
        self.trained, self.width = trained(sizes, args), lengths(args)
        self.states = states_of(sizes, args, gpus.count, self.trained)
        self.engine = engine_of(sizes, args, gpus.count, gpus.gib)
        components = self._components()
        self.memory = {p: {name: row[i] for name, row in components.items()} for i, p in enumerate(PHASES)}
        self.totals = {phase: sum(row.values()) for phase, row in self.memory.items()}
        phase = max(PHASES, key=self.totals.__getitem__)
        self.fullest = f"{self.totals[phase] / GIB:.2f} of {gpus.gib:g} GiB, in {phase}"
        # bytes that are missing, of all phases and of the engine's share together; 0: it fits
        too_much = sum(max(0.0, total - self.limit) for total in self.totals.values())
        self.missing = too_much + max(0.0, self.engine.least - self.engine.share)

    def changed(self, **flags: Any) -> Plan:
        """The same with other flags."""
        return Plan(argparse.Namespace(**(vars(self.args) | flags)), self.sizes, self.gpus)

    def _components(self) -> dict[str, tuple[float, ...]]:
        """Bytes of each component in each of :data:`PHASES`."""
        args, s, states, gpus, b = self.args, self.sizes, self.states, self.gpus.count, 2 if self.args.bf16 else 4
        stage = None if args.fsdp else args.zero_stage
        sharded, vllm = args.fsdp or stage == 3, args.engine_type != "hf"
        offloaded = args.fsdp_cpu_offload if args.fsdp else args.adam_offload and stage > 0
        every, values = parameters(s), count(self.trained)
        largest, model = b * max(math.prod(p.shape) for p in every), b * count(every)

        # over several rollouts an optimizer step, gradients stay; ZeRO-3's are a buffer that always does
        stays = stage == 3 or args.train_batch_size > args.rollout_batch_size * args.n_samples_per_prompt
        kept = states.gradients if stays else 0
        share = values / (1 if stage == 0 else gpus)
        at_once = 0 if offloaded else min(share, SUB_GROUP) if stage == 3 else share
        step = states.gradients
        if at_once and (stage == 3 or (b == 2 and not args.fsdp)):  # copied to float32; ZeRO-2 lets go of the others
            step = 4 * at_once + (0 if stage == 2 else states.gradients)

        reference = model / (gpus if sharded else 1) if args.init_kl_coef > 0 and args.lora_rank == 0 else 0
        reference = 0 if args.fsdp and offloaded else reference
        waits = reference if sharded else 0  # else it is in the machine's memory from the backward pass on

        scores = args.init_kl_coef > 0 or args.max_epochs > 1
        log_probs = forward_only(s, args, args.micro_rollout_batch_size, self.width) if scores else 0
        saved, work = micro_batch(s, args, args.micro_train_batch_size, self.trained, self.width)
        gathered = min(b * LIVE, states.whole) if stage == 3 else 0
        if args.fsdp:
            gathered, moved = fsdp_units(s, b, self.trained)
            work = max(work, moved)
        # weights for vLLM: gathered in buckets, or merged with an adapter; LightRFT, without the flag, has no buckets
        bucket = getattr(args, "sync_bucket_mb", 0) * 2**20 if sharded else 0
        sync = max(largest, min(bucket, model)) if vllm and (sharded or args.lora_rank) else 0

        base = b * BUCKET if stage == 3 else 0
        if stage == 2 and offloaded:
            base = b * max(math.prod(p.shape) for p in self.trained)
        whole = states.whole if sharded and not vllm else 0  # the hf engine generates with gathered weights
        reduced = 2 * b * BUCKET if stage == 2 else 0  # one bucket is filled while the other is reduced
        averaged = b * min(BUCKET, values) if stage == 0 and gpus > 1 else 0
        asleep = (ENGINE_ASLEEP if args.enable_engine_sleep else self.engine.share) if vllm else 0
        return {
            "weights": (states.weights,) * 5,
            "gradients": (kept, kept, states.gradients, step, kept),
            "optimizer states": (states.optimizer,) * 5,
            "reference model": (reference, reference, waits, waits, waits),
            "activations": (0, log_probs, saved, 0, 0),
            "work space": (0, 0, work, 4 * at_once, sync),  # in the optimizer: AdamW over all parameters at once
            "sharding buffers": (base + whole, base + gathered, base + gathered + reduced, base + averaged, base),
            "engine": (self.engine.share, asleep, asleep, asleep, self.engine.share if vllm else 0),
            "reserve": (RESERVE,) * 5,
        }


def host_memory(plan: Plan) -> dict[str, float]:
    """Bytes of the machine's memory for each GPU."""
    args, whole = plan.args, (2 if plan.args.bf16 else 4) * count(parameters(plan.sizes))
    asleep = args.engine_type == "vllm" and args.enable_engine_sleep
    share = args.fsdp_cpu_offload / plan.gpus.count if args.fsdp else args.zero_stage != 3
    return {
        "sleeping engine": whole / args.engine_tp_size * asleep,
        "training": plan.states.host,
        "reference model": whole * share * (args.init_kl_coef > 0 and args.lora_rank == 0),
        "decoded clips": args.audio_cache_mib * 2**20 * (2 if args.eval_steps > 0 else 1),
    }


def count_rows(args: argparse.Namespace) -> int | None:
    """Rows of an episode, from the data's files; None without them."""
    found = 0
    for source in (args.prompt_data or "").split(","):
        path = Path(source.strip())
        files = [path] if path.is_file() else [path / f"{args.prompt_split}{suffix}" for suffix in DATA_SUFFIXES]
        file = next((file for file in files if source and file.is_file()), Path())
        if file.suffix == ".jsonl":
            with file.open("rb") as lines:
                found += sum(1 for _ in lines)
        elif file.suffix == ".parquet":
            import pyarrow.parquet

            found += pyarrow.parquet.read_metadata(file).num_rows
        else:
            return None
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


Change = tuple[dict[str, Any], str]  # flags that go together, and what they do


def changes(plan: Plan) -> list[Change]:
    """What saves memory, the cheapest first."""
    args, full = plan.args, plan.args.lora_rank == 0
    splits = plan.gpus.count > 1 and not args.fsdp
    share = args.rollout_batch_size * args.n_samples_per_prompt // plan.gpus.count  # responses of a GPU
    stage = 3 if plan.gpus.count > 1 and not args.load_in_4bit else args.zero_stage or 2
    offload = {"adam_offload": True, "zero_stage": args.zero_stage or stage}  # plain data parallelism cannot offload
    offload = {"fsdp_cpu_offload": True} if args.fsdp else offload
    adapters = {"lora_rank": 16, "freeze_prefix": None, "adam_offload": False, "fsdp_cpu_offload": False}
    packed = {"load_in_4bit": True, "zero_stage": min(2, args.zero_stage)}
    hf = {"engine_type": "hf", "engine_tp_size": 1}

    def smaller(name: str, effect: str) -> list[Change]:
        return [({name: size}, effect) for size in range(getattr(args, name) - 1, 0, -1) if share % size == 0]

    return [
        ({"bf16": True}, "weights, gradients and activations of half the size"),
        *smaller("micro_rollout_batch_size", "fewer activations in the log-prob forward"),
        *smaller("micro_train_batch_size", "fewer activations, more micro-batches"),
        ({"gradient_checkpointing": True}, "activations of a layer are computed again (slower)"),
        *[({"zero_stage": stage}, "weights, gradients and optimizer split among the GPUs")] * splits,
        *[(offload, "optimizer and gradients in the machine's memory (slower steps)")] * full,
        *[(adapters, "adapters alone train: no reference model, hardly an optimizer")] * full,
        *[(packed, "the frozen language model at 4 bits a weight")] * (not args.fsdp),
        (hf, "generates with the weights that train, without a copy of its own (slower)"),
        ({"engine_mem_util": 0.1}, "the hf engine generates fewer responses at once"),
    ]


def new_flags(plan: Plan, taken: Sequence[Change]) -> dict[str, Any]:
    """Flags of some changes, without those that a plan has already."""
    flags = {name: value for some, _ in taken for name, value in some.items()}
    return {name: value for name, value in flags.items() if value != getattr(plan.args, name)}


def suggest(plan: Plan) -> tuple[list[Change], Plan]:
    """The first of :func:`changes` that together make a plan fit, less those that are not needed.

    :return: The changes, and the plan with them; if that one does not fit either, with all that help.
    """

    def apply(some: list[Change]) -> Plan:
        return fit_engine(plan.changed(**new_flags(plan, some)))

    taken: list[Change] = []
    now = apply(taken)
    for change in changes(plan) if now.missing else ():
        after = apply([*taken, change])
        if after.missing < now.missing:
            taken, now = [*taken, change], after
    for change in taken[::-1]:
        rest = [other for other in taken if other is not change]
        after = apply(rest)
        if after.missing <= now.missing and not find_problems(after.args, plan.gpus.count, paths=False):
            taken, now = rest, after
    if now.args.engine_type == "vllm" and now.args.engine_mem_util != plan.args.engine_mem_util:
        share = {"engine_mem_util": now.args.engine_mem_util}
        taken.append((share, "the share with which the engine starts and leaves training its room"))
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


def _configuration(plan: Plan) -> dict[str, str]:
    """Lines above the table, by the word in front of them."""
    args, gpus, width, n = plan.args, plan.gpus, plan.width, batch(plan)
    every, some = parameters(plan.sizes), count(plan.trained)
    counts = ", ".join(f"{part} {count(every, part) / 1e6:,.1f} M" for part in PARTS)
    what = f"adapters of rank {args.lora_rank}" if args.lora_rank else "trained"
    kind = [
        "FSDP2" if args.fsdp else f"ZeRO-{args.zero_stage}",
        "bf16" if args.bf16 else "fp32",
        *["4-bit base"] * args.load_in_4bit,
        *["optimizer offloaded"] * args.adam_offload,
        *["parameters offloaded"] * getattr(args, "param_offload", False),
        *["offloaded"] * args.fsdp_cpu_offload,
        *["checkpointing"] * args.gradient_checkpointing,
    ]
    steps = "unknown: no rows of --prompt_data to count"
    if n["rows"] is not None:
        steps = f"{n['rows']:,} rows: {n['steps_an_episode']:,} optimizer steps an episode, {n['steps']:,} in all"
    return {
        "model": f"{args.pretrain}: {count(every):,} parameters: {counts}",
        "": f"{what} {some:,} ({some / (count(every) + (some if args.lora_rank else 0)):.2%})",
        "GPUs": f"{gpus.count} x {gpus.gib:g} GiB ({gpus.source}); {', '.join(kind)}",
        "longest": f"{width.prompt} tokens of prompt ({width.clips} clip{'s' * (width.clips > 1)} of "
        f"{width.seconds:g} s), {width.response} of response",
        "batch": f"{args.rollout_batch_size} prompts x {args.n_samples_per_prompt} = {n['responses_a_rollout']} "
        f"responses a rollout, {n['responses_a_gpu']} a GPU, in {n['micro_batches_a_gpu']} micro-batches of "
        f"{args.micro_train_batch_size}; {args.train_batch_size} an optimizer step, {n['micro_batches_a_step']} "
        f"micro-batches; at most {n['most_tokens_a_rollout']:,} tokens a rollout",
        "steps": steps,
    }


def _table(plan: Plan) -> list[str]:
    rows = {"GiB a GPU": list(PHASES)}
    for name in plan.memory["rollout"]:
        values = [plan.memory[phase][name] / GIB for phase in PHASES]
        if any(values):
            rows[name] = [f"{value:.2f}" if value else "-" for value in values]
    rows["total"] = [f"{total / GIB:.2f}" for total in plan.totals.values()]
    rows[""] = ["over" if total > plan.limit else "" for total in plan.totals.values()]
    lines = [(f"{name:<18}" + "".join(f"{cell:>12}" for cell in cells)).rstrip() for name, cells in rows.items()]
    return [line for line in lines if line]


def _as_typed(flags: dict[str, Any]) -> str:
    """Flags as on a command line."""
    words = {"True": "--{0}", "False": "--no-{0}", "None": "without --{0}"}
    return " ".join(words.get(str(value), "--{0} {1}").format(name, value) for name, value in flags.items())


def _verdict(plan: Plan) -> list[str]:
    if not plan.missing:
        return [f"It fits: at most {plan.fullest}."]
    engine, gpus = plan.engine, plan.gpus
    why = [plan.fullest] if max(plan.totals.values()) > plan.limit else []
    if engine.least > engine.share:
        has = f"--engine_mem_util {plan.args.engine_mem_util:g} gives the engine {engine.share / GIB:.2f} GiB"
        why.append(f"{has}, and to start it takes {engine.least / GIB:.2f}")
    lines = [*textwrap.wrap(f"It does not fit: {'; '.join(why)}.", 80), ""]
    taken, after = suggest(plan)
    if after.missing:
        gib = math.ceil(gpus.gib)  # of the smallest GPU on which it fits
        while fit_engine(Plan(after.args, after.sizes, gpus._replace(gib=gib))).missing:
            gib += 1
        flags = f"Even with {_as_typed(new_flags(plan, taken))} it" if taken else "No flag helps: it"
        return [*lines, *textwrap.wrap(f"{flags} takes {gpus.count} x {gib} GiB.", 80)]
    lines.append(f"With these flags it fits: {after.fullest}.")
    for change in taken:
        text = f"  {_as_typed(new_flags(plan, [change]))}: {change[1]}"
        lines += textwrap.wrap(text, 80, subsequent_indent="      ")
    return lines


def describe(plan: Plan) -> str:
    """The plan for a person."""
    args, engine = plan.args, plan.engine
    in_rollout = args.rollout_batch_size * args.n_samples_per_prompt // plan.gpus.count * args.engine_tp_size
    engines = {
        "hf": f"hf: keys and values of {engine.sequences:.0f} sequences at once",
        "vllm": f"vllm: weights {engine.weights / GIB:.2f}, keys and values {max(0.0, engine.cache) / GIB:.2f} GiB: "
        f"{max(0.0, engine.sequences):.0f} sequences of full length at once, {in_rollout} in a rollout",
    }
    host = {name: size / GIB for name, size in host_memory(plan).items() if size}
    parts = ", ".join(f"{name} {size:.1f}" for name, size in host.items()) or "nothing"
    below = {
        "engine": engines["hf" if args.engine_type == "hf" else "vllm"],
        "machine": f"{sum(host.values()):.1f} GiB of its memory for each GPU: {parts}",
        "assumed": f"reserve (CUDA, NCCL, fragmentation) {RESERVE / GIB:g} GiB; never compared with a GPU",
    }
    return "\n".join([*_wrap(_configuration(plan)), "", *_table(plan), "", *_wrap(below), "", *_verdict(plan)])


def _wrap(texts: dict[str, str]) -> list[str]:
    wrapped = [textwrap.wrap(f"{name:<11}{text}", 80, subsequent_indent=" " * 11) for name, text in texts.items()]
    return [line for lines in wrapped for line in lines]


def as_json(plan: Plan) -> str:
    """The plan for the next tool."""
    every = parameters(plan.sizes)
    taken, after = suggest(plan)
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
    """Print the plan, on rank 0, unless the host has found ``problems``; return the exit status (2: wrong use)."""
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
