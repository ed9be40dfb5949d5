"""``train_colocate.py --plan``: the memory that a GPU needs, the batch's arithmetic, and one set of flags that fits.

It loads no model and no torch: all is computed from ``config.json`` and the flags, for the longest prompts, clips and
responses that the flags allow.

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
import sys
import textwrap
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

from aqa.common.gpu import listed_gpus
from aqa.families import BY_TYPE, FAMILIES, Family
from aqa.training.flag_rules import find_problems
from aqa.training.freezing import is_below

DOES_NOT_FIT = 3  # exit status
GIB = 2**30
PHASES = ("rollout", "log-probs", "backward", "optimizer", "sync")
KNOWN = {  # configurations of published models
    name: {"model_type": family.model_types[0]} | config
    for family in FAMILIES
    for name, config in family.published.items()
}
TOKENS_A_SECOND, WINDOW = 25, 30  # of audio; seconds that the tower takes at a time
LOGITS = 2**25  # token_log_probs.LOGITS_AT_ONCE, repeated because that module loads torch
BUCKET, LIVE, SUB_GROUP, PERSISTENT = 5e8, 1e9, 1e9, 1e5  # DeepSpeed's defaults, in values
NF4 = 0.5 + 1 / 64 + 4 / (64 * 256)  # bytes a value: blocks of 64 share an 8-bit scale, 256 scales share a float32
# Assumed, not derived: CUDA context, NCCL and fragmentation; vLLM's graphs and own activations; what it keeps asleep
RESERVE, ENGINE_WORK, ENGINE_ASLEEP = 2 * GIB, 2 * GIB, 1 * GIB
ROOM = 0.9  # share of a GPU that training may take together with vLLM's weights, for these to stay there; assumed
HF_ROWS = 64  # sequences that the hf engine generates at once


class SizeError(Exception):
    """The model's sizes are unknown, or a flag names a module that the model lacks; the message says what to do."""


class Sizes(NamedTuple):
    """Dimensions of a model, named as in Qwen2-Audio's ``config.json``, with the defaults of transformers'
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
    family: str = "qwen2_audio"  # its model_type
    vision: tuple[int, ...] = ()  # depth, hidden_size, intermediate_size, out_hidden_size, patch_size of a vision tower

    @property
    def names(self) -> Family:
        """The family, which says what the parts are called."""
        return BY_TYPE[self.family]


ALIASES = {  # other families' names for the fields of Qwen2-Audio's audio_config
    "d_model": "hidden_size",
    "encoder_layers": "num_hidden_layers",
    "encoder_attention_heads": "num_attention_heads",
    "encoder_ffn_dim": "intermediate_size",
}
VISION = {"depth": 32, "hidden_size": 3584, "intermediate_size": 3420, "out_hidden_size": 3584, "patch_size": 14}


class Parameter(NamedTuple):
    """A parameter of the live model (transformers 5)."""

    name: str  # an adapter's contains ``.lora_``
    shape: tuple[int, ...]
    block: str  # the layer that it belongs to, or the module outside of layers

    @property
    def is_linear(self) -> bool:
        """Whether it is the weight of a linear layer."""
        return len(self.shape) == 2 and ".embed_" not in self.name and ".audio_bos_eos_token" not in self.name


def read_sizes(pretrain: str) -> Sizes:
    """Sizes of a model folder, or of a model in :data:`KNOWN`.

    :raises SizeError: if there is no configuration, or it is of no known family.
    """
    path = Path(pretrain) / "config.json"
    if not path.is_file() and pretrain in KNOWN:
        return sizes_of(KNOWN[pretrain])
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        known = " or ".join(KNOWN)
        raise SizeError(f"--pretrain {pretrain}: no config.json ({error}); name a folder, or {known}") from None
    if config.get("model_type") not in BY_TYPE:
        raise SizeError(f"{path}: model_type {config.get('model_type')!r} is of no family that is known here")
    return sizes_of(config)


def sizes_of(config: dict[str, Any]) -> Sizes:
    """Sizes from the contents of a ``config.json``."""
    family = config.get("model_type", Sizes().family)
    config = config.get("thinker_config", config)
    audio, text = config.get("audio_config") or {}, config.get("text_config") or {}
    audio = {name: audio[alias] for name, alias in ALIASES.items() if alias in audio} | audio
    last, end = Sizes._fields.index("encoder_ffn_dim") + 1, Sizes._fields.index("family")
    named = [(audio, name) for name in Sizes._fields[:last]] + [(text, name) for name in Sizes._fields[last:end]]
    s = Sizes(**{name: part[name] for part, name in named if name in part}, family=family)
    if "vision_config" in config:
        s = s._replace(vision=tuple((VISION | config["vision_config"])[name] for name in VISION))
    heads = s.num_attention_heads
    return s._replace(num_key_value_heads=s.num_key_value_heads or heads, head_dim=s.head_dim or s.hidden_size // heads)


@functools.cache
def parameters(s: Sizes) -> tuple[Parameter, ...]:
    out: list[Parameter] = []

    def add(parent: str, modules: str, *shape: int, bias: bool = False) -> None:
        for module in modules.split():
            name = f"{parent}.{module}".lstrip(".")
            block = parent if ".layers." in parent else name
            out.append(Parameter(f"{name}.weight", shape, block))
            out.extend([Parameter(f"{name}.bias", shape[:1], block)] * bias)

    d, f, h, inner = s.d_model, s.encoder_ffn_dim, s.hidden_size, s.intermediate_size
    query, keys = s.num_attention_heads * s.head_dim, s.num_key_value_heads * s.head_dim
    names = s.names
    tower, decoder = names.tower, names.decoder
    add(tower, "conv1", d, s.num_mel_bins, 3, bias=True)
    add(tower, "conv2", d, d, 3, bias=True)
    if names.fixed:
        add(tower, "embed_positions", s.max_source_positions, d)
    if s.vision:
        add(tower, "audio_bos_eos_token", 2, h)
        _add_vision(add, *s.vision)
    for i in range(s.encoder_layers):
        layer = f"{tower}.layers.{i}"
        add(layer, "self_attn.k_proj", d, d)
        add(layer, "self_attn.q_proj self_attn.v_proj self_attn.out_proj", d, d, bias=True)
        add(layer, "fc1", f, d, bias=True)
        add(layer, "fc2", d, f, bias=True)
        add(layer, "self_attn_layer_norm final_layer_norm", d, bias=True)
    add(tower, names.tower_norm, d, bias=True)
    for i, projector in enumerate(names.projectors):
        add("", projector, h, h if i else d, bias=True)
    add(decoder, "embed_tokens", s.vocab_size, h)
    for i in range(s.num_hidden_layers):
        layer = f"{decoder}.layers.{i}"
        add(layer, "self_attn.q_proj", query, h, bias=True)
        add(layer, "self_attn.k_proj self_attn.v_proj", keys, h, bias=True)
        add(layer, "self_attn.o_proj", h, query)
        add(layer, "mlp.gate_proj mlp.up_proj", inner, h)
        add(layer, "mlp.down_proj", h, inner)
        add(layer, "input_layernorm post_attention_layernorm", h)
    add(decoder, "norm", h)
    add("", "lm_head", s.vocab_size, h)
    return tuple(out)


def _add_vision(add: Callable[..., None], depth: int, d: int, inner: int, out: int, patch: int) -> None:
    """Parameters of Qwen2.5-Omni's vision tower, which no sound passes.

    :param out: Width of the decoder.
    """
    add("visual", "patch_embed.proj", d, 3, 2, patch, patch)
    for i in range(depth):
        block = f"visual.blocks.{i}"
        add(block, "norm1 norm2", d)
        add(block, "attn.q attn.k attn.v attn.proj", d, d, bias=True)
        add(block, "mlp.gate_proj mlp.up_proj", inner, d, bias=True)
        add(block, "mlp.down_proj", d, inner, bias=True)
    add("visual.merger", "ln_q", d)
    add("visual.merger", "mlp.0", 4 * d, 4 * d, bias=True)
    add("visual.merger", "mlp.2", out, 4 * d, bias=True)


def trained(s: Sizes, args: argparse.Namespace) -> list[Parameter]:
    """The parameters that train: as ``freezing.freeze`` and ``lightrft.models.lora.add_adapters`` leave them.

    :raises SizeError: if ``--freeze_prefix`` or ``--target_modules`` names what is not in the model.
    """
    frozen, rank, names = args.freeze_prefix or (), args.lora_rank, s.names
    targets = {names.language_model if target == "language_model" else target for target in args.target_modules}
    every = [p for p in parameters(s) if not p.name.startswith(names.unheard)]
    if rank == 0:
        for part in frozen:
            if not any(is_below(p.name, part, names.checkpoint_name) for p in parameters(s)):
                raise SizeError(f"--freeze_prefix {part}: the model has no parameter below a module of that name")
        learned = [p for p in every if not p.name.endswith("embed_positions.weight")]  # those are sinusoids
        return [p for p in learned if not any(is_below(p.name, part, names.checkpoint_name) for part in frozen)]
    linear = [p for p in every if p.is_linear and p.block != "lm_head"]
    for target in sorted(targets):
        if not any(target in p.name.split(".") for p in linear):
            raise SizeError(f"--target_modules {target}: no linear layer of the model has that name or is below it")
    return [
        Parameter(f"{p.name.removesuffix('weight')}lora_{side}.weight", shape, p.block)
        for p in linear
        if targets & set(p.name.split("."))
        for side, shape in (("A", (rank, p.shape[1])), ("B", (p.shape[0], rank)))
    ]


def count(some: Iterable[Parameter]) -> int:
    return sum(math.prod(p.shape) for p in some)


def pinned(sizes: Iterable[float]) -> float:
    """Bytes of some buffers in pinned memory: torch rounds each up to a power of two."""
    return sum(2.0 ** math.ceil(math.log2(size)) for size in sizes if size)


def prompts_in(size: int, samples: int) -> int:
    """Most prompts that a micro-batch of ``size`` neighbouring responses holds, at ``samples`` responses a prompt."""
    if size % samples == 0 or samples % size == 0:
        return max(1, size // samples)
    return min(size, (size - 2) // samples + 2)


class Plan:
    """What a configuration without problems takes. The table, the verdict and the suggestion all come from ``rows``.

    :param gpus: Ranks of the run.
    :param gib: Memory of a GPU.
    :raises SizeError: if a flag names a module that the model lacks.
    """

    def __init__(self, args: argparse.Namespace, sizes: Sizes, gpus: int, gib: float) -> None:
        self.args, self.sizes, self.gpus, self.limit = args, sizes, gpus, gib * GIB
        self.b = 2 if args.bf16 else 4  # bytes a value
        self.parameters, self.trained = parameters(sizes), trained(sizes, args)
        self.values, self.training = count(self.trained), {p.block for p in self.trained}
        self.model = self.b * count(self.parameters)  # bytes
        self.responses = args.rollout_batch_size * args.n_samples_per_prompt  # of a rollout

        # the longest sequence; the audio's tokens count as one in --prompt_max_len
        self.clips = args.limit_mm_image_per_prompt
        self.seconds = min(args.plan_clip_seconds or args.audio_seconds, args.audio_seconds)
        self.prompt = args.prompt_max_len + self.clips * (int(TOKENS_A_SECOND * self.seconds) - 1)
        self.response = args.generate_max_len
        self.token = 2 * sizes.num_hidden_layers * sizes.num_key_value_heads * sizes.head_dim * self.b  # keys, values
        sequence = (self.prompt + self.response) * self.token

        # the engine's bytes on a GPU: its own weights, what it takes awake, and without which it does not start
        self.vllm = args.engine_type != "hf"
        self.engine_weights = self.model / args.engine_tp_size * self.vllm
        self.engine = args.engine_mem_util * self.limit
        self.least = self.engine_weights + ENGINE_WORK + sequence / args.engine_tp_size
        self.at_once = (self.engine - self.engine_weights - ENGINE_WORK) * args.engine_tp_size / sequence  # sequences
        if not self.vllm:  # it generates with the weights that train
            self.at_once = min(HF_ROWS, max(1, self.engine // sequence), self.responses // gpus)
            self.engine, self.least = self.at_once * sequence, sequence

        self.sleeps = self.vllm and args.enable_engine_sleep
        self.rows = self._rows(ENGINE_ASLEEP)
        busy = max(sum(column) for column in [*zip(*self.rows.values(), strict=True)][1:4])
        # vLLM's weights are dropped while it sleeps; this runtime leaves them where they are if there is room
        self.engine_weights_stay = self.sleeps and self.ours and busy + self.engine_weights <= ROOM * self.limit
        if self.engine_weights_stay:
            self.rows = self._rows(ENGINE_ASLEEP + self.engine_weights)
        self.totals = [sum(column) for column in zip(*self.rows.values(), strict=True)]
        most = max(self.totals[:-1])
        self.headline = f"{most / GIB:.2f} of {gib:g} GiB, in {PHASES[self.totals.index(most)]}"
        if most <= self.limit and self.engine < self.least:
            has = f"--engine_mem_util {args.engine_mem_util:g} gives the engine {self.engine / GIB:.2f} GiB"
            self.headline = f"{has}, and to start it takes {self.least / GIB:.2f}"
        # bytes that are missing, of all phases and of the engine's share together; 0: it fits
        too_much = sum(max(0.0, total - self.limit) for total in self.totals[:-1])
        self.missing = too_much + max(0.0, self.least - self.engine)

    def changed(self, flags: dict[str, Any]) -> Plan:
        """The same with other flags."""
        return Plan(argparse.Namespace(**(vars(self.args) | flags)), self.sizes, self.gpus, self.limit / GIB)

    @property
    def ours(self) -> bool:
        """Whether the flags are this repository's runtime's, and not LightRFT's."""
        return hasattr(self.args, "sync_bucket_mb")

    @property
    def offloads(self) -> bool:
        """Whether ZeRO-3 keeps parameters in the machine's memory."""
        return self.ours and self.args.param_offload

    def _rows(self, asleep: float) -> dict[str, tuple[float, ...]]:
        """Bytes of each component on a GPU in each of :data:`PHASES`, and in the machine's memory for each GPU.

        :param asleep: Bytes that vLLM keeps on a GPU while it sleeps.
        """
        args, b, stage = self.args, self.b, None if self.args.fsdp else self.args.zero_stage
        sharded, largest = args.fsdp or stage == 3, max((math.prod(p.shape) for p in self.trained), default=0)
        (weights, gradients, optimizer), moved, whole = self._states()

        # over several rollouts an optimizer step, gradients stay; ZeRO-3's are a buffer that always does
        stays = gradients if stage == 3 or args.train_batch_size > self.responses else 0
        share = self.values / (1 if stage == 0 else self.gpus)
        at_once = min(share, SUB_GROUP if stage == 3 else share) * (optimizer > 0)  # values that are updated together
        step = gradients + 4 * at_once * (stage == 3)  # copied to float32

        # a whole reference model is on the GPU for its log-probs alone, and always in pinned memory
        with_reference = args.init_kl_coef > 0 and (args.lora_rank == 0 or args.sft_steps > 0)
        reference = self.model / (self.gpus if sharded else 1) * with_reference
        beside = reference * (not (args.fsdp_cpu_offload if args.fsdp else self.offloads))
        waits, parked = beside * sharded, reference - beside
        if args.fsdp_cpu_offload or not sharded:
            shares = (b * math.prod(p.shape) / (self.gpus if sharded else 1) for p in self.parameters)
            parked = pinned(shares) * with_reference

        scores = args.init_kl_coef > 0 or args.max_epochs > 1 or args.train_batch_size < self.responses
        scores |= args.audio_token_weights > 0 or "audio_gain_reward" in args.reward_parts
        log_probs = self._forward(args.micro_rollout_batch_size) * scores
        saved, work = self.micro_batch(args.micro_train_batch_size)
        buffers = [0.0] * 5
        if args.fsdp:
            buffers[1:3], unit = self._fsdp_units()
            work = max(work, unit)
        elif stage == 3:
            buffers = [b * (BUCKET + live) for live in (0, *[min(LIVE, whole / b)] * 2, 0, 0)]
        elif stage == 2:
            buffers = [b * largest * args.adam_offload] * 5
            buffers[2] += 2 * b * BUCKET  # ZeRO-2 fills one bucket while another is reduced
        else:
            buffers[2] = 4 * largest * (b == 2)  # a gradient on its way into the sum, which is in float32
            buffers[3] = 4 * min(BUCKET, self.values) * (self.gpus > 1)
        buffers[0] += whole * (sharded and not self.vllm)  # the hf engine generates with gathered weights

        # weights for vLLM: gathered in buckets, or merged with an adapter; LightRFT, without the flag, has no buckets
        bucket = args.sync_bucket_mb * 2**20 if (sharded or args.load_in_4bit) and self.ours else 0
        matrix = b * max(math.prod(p.shape) for p in self.parameters)
        sync = max(matrix, min(bucket, self.model)) if self.vllm and (sharded or args.lora_rank) else 0
        asleep = asleep if self.sleeps else self.engine * self.vllm
        return {
            "weights": (*[weights] * 5, moved[0]),
            "gradients": (stays, stays, gradients, step, stays, moved[1]),
            "optimizer states": (*[optimizer] * 5, moved[2]),
            "reference model": (waits, beside, waits, waits, waits, parked),
            "activations": (0, log_probs, saved, 0, 0, 0),
            "work space": (0, 0, work, 0, sync, 0),
            "buffers": (*buffers, 0),
            "engine": (self.engine, *[asleep] * 3, self.engine * self.vllm, 0),
            "reserve, assumed": (*[RESERVE] * 5, 0),
        }

    def _states(self) -> tuple[list[float], list[float], float]:
        """What training keeps.

        :return: Bytes of weights, gradients and optimizer on a GPU; the same in the machine's memory; the weights of
            the whole model, as one GPU would hold them.
        """
        args, b, gpus, values, moved = self.args, self.b, self.gpus, self.values, [0.0, 0.0, 0.0]
        if args.fsdp:  # all is sharded, and what trains is float32
            frozen = self.model - (0 if args.lora_rank else b * values)
            kept = [(frozen + 4 * values) / gpus, 4 * values / gpus, 8 * values / gpus]
            if args.fsdp_cpu_offload:
                shares = [4 * math.prod(p.shape) / gpus for p in self.trained]
                others = (b * math.prod(p.shape) / gpus for p in {*self.parameters} - {*self.trained})
                kept, moved = moved, [pinned([*shares, *others]), pinned(shares), kept[2]]
            return kept, moved, frozen + b * values
        linear = count(p for p in self.parameters if p.is_linear and p.block.startswith(f"{self.sizes.names.decoder}."))
        packed = linear * (b - NF4) * args.load_in_4bit  # bytes that 4 bits a value save
        whole = self.model - packed + (b * values if args.lora_rank else 0)
        stage, share = args.zero_stage, values / (gpus if args.zero_stage else 1)
        # master weights also where the weights are float32: only plain data parallelism has none of its own
        kept = [whole, 4 * share, (8 if stage == 0 and b == 4 else 12) * share]
        if stage == 3:
            small = b * count(p for p in self.parameters if math.prod(p.shape) < PERSISTENT)  # these stay whole
            kept[0] = small + (whole - small) / gpus
            if self.offloads:
                kept[0], moved[0] = small, pinned([kept[0] - small])
        if args.adam_offload and stage:
            stays = stage == 2 and b == 2  # gradients are added up in float32: here on the GPU, else in the machine
            # the step's gradients, in parts; added up ones; ZeRO-2's new weights and, also pinned, its master weights
            groups = [min(share - start, SUB_GROUP) for start in range(0, int(share), int(SUB_GROUP))]
            held = [4 * part for part in (groups if stage == 3 else [share])]
            held += [4 * share * (not stays), b * share * (stage == 2)]
            master = pinned([4 * share]) if stage == 2 else 4 * share
            kept[1:], moved[1:] = [4 * share * stays, 0], [pinned(held), master + 8 * share]
        return kept, moved, whole

    def _fsdp_units(self) -> tuple[list[float], float]:
        """Bytes that FSDP2 gathers and moves at a time. ``FSDPStrategy.shard``'s units are each layer, the embedding
        and the head; the rest stays whole while the model runs.

        :return: What is whole while a unit runs (it, the next one, the rest), in the forward and the backward pass; on
            top of it the buffer that a unit comes in, or a unit's gradients and their copy in float32.
        """
        every, training, trains = Counter[str](), Counter[str](), set(self.trained)
        for p in trains.union(self.parameters):
            is_unit = ".layers." in p.block or p.block.endswith(("embed_tokens", "lm_head"))
            every[p.block if is_unit else ""] += math.prod(p.shape)
            training[p.block if is_unit else ""] += math.prod(p.shape) * (p in trains)
        rest, first = every.pop(""), max(every.values())
        layer = max(values for block, values in every.items() if ".layers." in block)  # runs before or after an end
        return [self.b * (rest + first + layer)] * 2, max(self.b * first, (self.b + 4) * max(training.values()))

    def micro_batch(self, size: int) -> tuple[float, float]:
        """Bytes that ``policy.forward`` over some responses and its backward pass take beside weights and gradients.

        A layer in which anything trains counts as if all of it did: narrow ``--target_modules`` take less than this.

        :return: What autograd keeps until the backward pass; what comes on top of it while that is in a layer, with
            what checkpointing computes again, or in the head.
        """
        s, b, again = self.sizes, self.b, self.args.gradient_checkpointing
        rows, width = self._packed(size)
        scored = size * self.response
        # hidden states that predict; a row's tokens attend to each other through one mask, unless it is one sequence
        flows, layer = False, 0.0
        saved = scored * b * s.hidden_size + rows * width**2 * b * (size > rows)
        for block, passed, trains, checkpoint in self._stages(rows * self.clips, rows, width):
            flows |= block in self.training
            kept = trains if block in self.training else passed
            if flows and again and checkpoint:
                saved, layer = saved + checkpoint, max(layer, kept)
            elif flows:
                saved += kept
        # gradients of a layer's inner values, and of one of its matrices (or the matrix, unpacked)
        layer += rows * width * b * 2 * s.intermediate_size
        layers = f"{s.names.decoder}.layers"
        trains = self.args.lora_rank == 0 and any(block.startswith(layers) for block in self.training)
        layer += s.intermediate_size * s.hidden_size * b * (trains or self.args.load_in_4bit)
        return saved, max(layer, self._head(scored))

    def _packed(self, size: int) -> tuple[int, int]:
        """Rows of ``policy.packing`` for some responses, and their tokens: a prompt with all responses to it.

        Long responses are spread over more rows, which takes less than this.
        """
        if self.args.flash_attn:  # its kernels take no such mask: a row a response
            return size, self.prompt + self.response - 1
        prompts = prompts_in(size, self.args.n_samples_per_prompt)
        return prompts, self.prompt + -(-size // prompts) * (self.response - 1)

    def _stages(self, clips: int, rows: int, width: int) -> list[tuple[str, float, float, float]]:
        """What autograd keeps of each block of the model, in the forward pass's order.

        :param rows: Of the decoder; each has ``width`` tokens.
        :return: Block; bytes kept if a gradient passes through it, if it trains, and of a layer that is computed again.
        """
        s, b, rank, d = self.sizes, self.b, self.args.lora_rank, self.sizes.d_model
        # the tower computes the clip's frames and two more, rounded up to 4, not the padding up to 30 s
        clips *= math.ceil(self.seconds / WINDOW)
        states = min((int(100 * min(self.seconds, WINDOW)) + 2 + 3) // 4 * 4, 100 * WINDOW) // 2
        names, heard = s.names, clips * b * states // 2 * s.hidden_size
        audio, text = clips * b * states * d, rows * width * b * s.hidden_size
        tower = clips * states * (b * (6 * d + s.encoder_ffn_dim + states) + 4 * s.encoder_attention_heads + 16)
        inputs = clips * states * b * (3 * d + s.encoder_ffn_dim + 6 * rank)  # of linear layers
        decoder, norm = self._decoder_layer(rows * width), 4 * text / b
        return [
            (f"{names.tower}.conv1", 0, 2 * audio + clips * b * states * 2 * s.num_mel_bins, 0),  # frames, activation
            (f"{names.tower}.conv2", 3 * audio, 3 * audio, 0),  # input, activation
            *[(f"{names.tower}.layers.{i}", tower, tower + inputs, audio) for i in range(s.encoder_layers)],
            (f"{names.tower}.{names.tower_norm}", 1.5 * audio, 1.5 * audio, 0),  # pooling and norm
            (names.projectors[0], 0, audio / 2, 0),
            *[(name, heard, 2 * heard, 0) for name in names.projectors[1:]],  # the activation between them
            (f"{names.decoder}.embed_tokens", 0, 0, 0),
            *[(f"{names.decoder}.layers.{i}", *decoder, text) for i in range(s.num_hidden_layers)],
            (f"{names.decoder}.norm", norm, norm + text, 0),
        ]

    def _decoder_layer(self, tokens: int) -> tuple[float, float]:
        """Bytes that autograd keeps of a layer of the decoder: if a gradient only passes it, and if it trains."""
        s, b, rank = self.sizes, self.b, self.args.lora_rank
        h, inner, query = s.hidden_size, s.intermediate_size, s.num_attention_heads * s.head_dim
        passed = (
            2 * tokens * (4 * h + 4)  # both norms: input in float32, and the reciprocal of its size
            + tokens * (2 * b * query + 4 * s.num_attention_heads)  # queries, output, its log-sum-exp
            + 2 * tokens * b * query  # keys and values, repeated for grouped heads
            + tokens * b * inner * 3  # gate, its activation, up
        )
        # linear layers' inputs; scaled ones of the norms, or what adapters keep
        return passed, passed + tokens * b * (2 * h + inner + (7 * rank or 2 * h))

    def _head(self, tokens: int) -> float:
        """Largest work space of ``TokenLogProbs``: chunks of logits, the head's gradient."""
        s, b, half = self.sizes, self.b, 2 if self.b == 2 else 0
        weight, rows = s.vocab_size * s.hidden_size * ("lm_head" in self.training), max(1, LOGITS // s.vocab_size)
        chunk, hidden = min(tokens, rows) * s.vocab_size, tokens * b * s.hidden_size
        forward = chunk * (10 if half else 12)  # logits, with the bias of some tokens, and their log-softmax
        logits = hidden + chunk * (8 + half)  # in float32, their softmax, and this in the weights' type
        # over several chunks the gradient is summed in float32, with a chunk's own in both types on top
        summed, gradient = (4 * weight, weight * (8 + half)) if tokens > rows else (0, weight * b)
        return max(forward, logits + summed, hidden + chunk * (4 + half) + gradient)

    def _forward(self, size: int) -> float:
        """Bytes of a log-prob forward: one layer's inner values and the mask, or a chunk of logits."""
        s, (rows, width) = self.sizes, self._packed(size)
        inner = rows * width * (self.b * (3 * s.intermediate_size + 4 * s.hidden_size) + 8 * s.hidden_size)
        chunk = min(size * self.response, max(1, LOGITS // s.vocab_size)) * s.vocab_size
        return max(inner + rows * width**2 * self.b * (size > rows), 12 * chunk)


def suggest(plan: Plan) -> tuple[dict[str, Any], Plan]:
    """Flags that make a plan fit: the cheapest ones that help, less those that turn out not to be needed.

    :return: The flags, and the plan with them; if that one does not fit either, with all flags that help.
    """
    args, split = plan.args, plan.gpus > 1 and not plan.args.fsdp
    stage = 3 if split and not args.load_in_4bit else args.zero_stage or 2
    offload = {"adam_offload": True, "zero_stage": args.zero_stage or stage}  # not in plain data parallelism
    adapters = {"lora_rank": 16, "freeze_prefix": None, "adam_offload": False, "fsdp_cpu_offload": False}
    fitting = [size for size in range(plan.responses, 0, -1) if plan.responses // plan.gpus % size == 0]
    ladder: list[dict[str, Any]] = [  # the cheapest first
        {"bf16": True},
        *[{"micro_rollout_batch_size": size} for size in fitting if size < args.micro_rollout_batch_size],
        *[{"micro_train_batch_size": size} for size in fitting if size < args.micro_train_batch_size],
        {"gradient_checkpointing": True},
        *[{"bf16": True, "zero_stage": stage}] * split,  # whole on each GPU, bfloat16 with its float32 copies is larger
        *[{"fsdp_cpu_offload": True} if args.fsdp else offload, adapters] * (args.lora_rank == 0),
        *[{"load_in_4bit": True, "zero_stage": min(2, args.zero_stage)}] * (not args.fsdp),
        {"engine_type": "hf", "engine_tp_size": 1},
        {"engine_mem_util": 0.1},  # of the hf engine: it generates fewer responses at once
    ]

    def apply(some: list[dict[str, Any]]) -> Plan:
        return fit_engine(plan.changed({name: value for step in some for name, value in step.items()}))

    steps: list[dict[str, Any]] = []
    for step in ladder:
        if apply([*steps, step]).missing < apply(steps).missing:
            steps.append(step)
    for step in steps[::-1]:
        fewer = [other for other in steps if other is not step]
        after = apply(fewer)
        if after.missing <= apply(steps).missing and not find_problems(after.args, plan.gpus, paths=False):
            steps = fewer
    after = apply(steps)
    return {name: value for name, value in vars(after.args).items() if value != getattr(args, name)}, after


def fit_engine(plan: Plan) -> Plan:
    """Give vLLM the largest share, in steps of 0.05, beside what training keeps, but enough to start."""
    awake = [total for total, engine in zip(plan.totals, plan.rows["engine"], strict=True) if engine == plan.engine]
    room = plan.limit - max(awake) + plan.engine
    share = max(math.floor(room / plan.limit * 20), math.ceil(plan.least / plan.limit * 20)) / 20
    helps = plan.vllm and plan.missing and share < 1 and not plan.least <= plan.engine <= room
    return plan.changed({"engine_mem_util": share}) if helps else plan


def describe(plan: Plan, source: str) -> str:
    """The plan for a person; ``source`` says where number and memory of the GPUs are from."""
    args, share = plan.args, plan.responses // plan.gpus
    switches = ("load_in_4bit", "adam_offload", "param_offload", "fsdp_cpu_offload", "gradient_checkpointing")
    kind = ["FSDP2" if args.fsdp else f"ZeRO-{args.zero_stage}", "bf16" if args.bf16 else "fp32"]
    kind += [name for name in ("lora_rank", *switches) if getattr(args, name, False)]  # LightRFT lacks --param_offload
    above = [
        f"model      {args.pretrain}: {count(plan.parameters):,} parameters, {plan.values:,} train",
        f"GPUs       {plan.gpus} x {plan.limit / GIB:g} GiB ({source}); {', '.join(kind)}",
        f"longest    {plan.prompt} tokens of prompt ({plan.clips} x {plan.seconds:g} s of audio), "
        f"{plan.response} of response: the most that the flags allow; the data is not read",
        f"batch      {args.rollout_batch_size} prompts x {args.n_samples_per_prompt} = {plan.responses} responses a "
        f"rollout, {share} a GPU, in {share // args.micro_train_batch_size} micro-batches of "
        f"{args.micro_train_batch_size}; {args.train_batch_size} responses an optimizer step",
        f"engine     {args.engine_type}: {max(0, plan.at_once):.0f} sequences of full length at once, "
        f"{share * args.engine_tp_size} in a rollout",
    ]
    table = {"GiB a GPU": [*PHASES, "in RAM"]}
    for name, row in (plan.rows | {"total": plan.totals}).items():
        table |= {name: [f"{size / GIB:.2f}" if size else "-" for size in row]} if any(row) else {}
    table[""] = ["over" if total > plan.limit else "" for total in plan.totals[:-1]]
    lines = [(f"{name:<18}" + "".join(f"{cell:>10}" for cell in row)).rstrip() for name, row in table.items()]

    below = [f"It fits: {plan.headline}."]
    if plan.missing:
        flags, after = suggest(plan)
        words = {"True": "--{0}", "False": "--no-{0}", "None": "without --{0}"}
        typed = " ".join(words.get(str(value), "--{0} {1}").format(name, value) for name, value in flags.items())
        remedy = f"{'Even with' if after.missing else 'It fits with'} {typed}: {after.headline}."
        below = [f"It does not fit: {plan.headline}.", remedy if flags else "No flag helps."]
    wrapped = [textwrap.fill(text, 80, subsequent_indent=" " * 11) for text in above]
    return "\n".join([*wrapped, "", *filter(None, lines), "", *(textwrap.fill(text, 80) for text in below)])


def run(args: argparse.Namespace, problems: list[str]) -> int:
    """Print the plan, on rank 0, unless the host has found ``problems``; return the exit status (2: wrong use)."""
    if os.environ.get("RANK", "0") != "0":
        return 0
    listed: list[float] = []
    if None in (args.plan_gpus, args.plan_gpu_gib):
        totals = [gpu.total.split()[0] for gpu in listed_gpus()]
        listed = [float(mib) / 1024 for mib in totals if mib.isdecimal()]
    gpus = args.plan_gpus or int(os.environ.get("WORLD_SIZE", 0)) or len(listed) or 8  # as R1-AQA
    gib = args.plan_gpu_gib or min(listed, default=80.0)
    asked = "as asked" if args.plan_gpus and args.plan_gpu_gib else "assumed: --plan_gpus, --plan_gpu_gib"
    problems = [*find_problems(args, gpus, paths=False), *problems]
    if not args.pretrain:
        problems.append("--pretrain is missing: a model folder or hub name")
    if not problems:
        try:
            plan = Plan(args, read_sizes(args.pretrain), gpus, gib)
        except SizeError as error:
            problems.append(str(error))
    if problems:
        print("these settings cannot be used:", *problems, sep="\n  ", file=sys.stderr)
        return 2
    print(describe(plan, "as found" if listed else asked))
    return DOES_NOT_FIT if plan.missing else 0
