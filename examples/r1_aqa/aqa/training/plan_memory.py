"""Memory of a GPU in each phase of a GRPO step, by component: arithmetic on sizes and flags, no torch.

Sources: DeepSpeed 0.19.8's and FSDP2's buffers as their code allocates them; what autograd keeps of each layer as
``torch.autograd.graph.saved_tensors_hooks`` shows it (``tests/test_plan_memory.py`` compares both with what is
measured on a CPU); Rajbhandari et al., ZeRO (2020), for the states; Korthikanti et al., Reducing Activation
Recomputation (2022), for the way of counting activations. Never compared with a GPU.
"""

from __future__ import annotations

import argparse
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from aqa.training.model_sizes import MOST_SECONDS, Parameter, Sizes, audio_tokens, count, parameters, trained

GIB = 2**30
PHASES = ("rollout", "log-probs", "backward", "optimizer", "sync")
COMPONENTS = (
    "weights",
    "gradients",
    "optimizer states",
    "reference model",
    "activations",
    "work space",
    "sharding buffers",
    "engine",
    "reserve",
)
LOGITS = 2**25  # token_log_probs.LOGITS_AT_ONCE
BUCKET, LIVE, SUB_GROUP, PERSISTENT = 5e8, 1e9, 1e9, 1e5  # DeepSpeed's defaults, in values
NF4 = 0.5 + 1 / 64 + 4 / (64 * 256)  # bytes a value: blocks of 64 with an 8-bit scale, those in blocks of 256
# Assumed, not derived: CUDA context, NCCL and fragmentation; vLLM's graphs and own activations; what it keeps asleep
RESERVE, ENGINE_WORK, ENGINE_ASLEEP = 2 * GIB, 2 * GIB, 1 * GIB
HF_ROWS = 64  # sequences that the hf engine generates at once


class Lengths(NamedTuple):
    """The longest sequences that the flags allow.

    :param clips: A prompt.
    :param seconds: A clip.
    :param prompt: Tokens, audio included.
    :param response: Tokens.
    """

    clips: int
    seconds: float
    prompt: int
    response: int


def lengths(args: argparse.Namespace) -> Lengths:
    """From the flags.

    :param args: Flags.
    """
    clips, seconds = args.limit_mm_image_per_prompt, args.plan_clip_seconds
    prompt = args.prompt_max_len + clips * (audio_tokens(seconds) - 1)  # a clip counts as one of --prompt_max_len
    return Lengths(clips, seconds, prompt, max(2, args.generate_max_len))


class Layers(NamedTuple):
    """Names of the modules that train or carry an adapter, layer by layer.

    :param tower: Of the audio tower.
    :param decoder: Of the language model.
    :param others: Outside layers (``conv1``, ``linear`` of the projector, ``embed_tokens``, ``lm_head``).
    """

    tower: list[set[str]]
    decoder: list[set[str]]
    others: set[str]


def modules_of(sizes: Sizes, some: Sequence[Parameter]) -> Layers:
    """Sort parameters by layer.

    :param sizes: Of the model.
    :param some: Parameters that train.
    """
    tower: list[set[str]] = [set() for _ in range(sizes.tower_layers)]
    decoder: list[set[str]] = [set() for _ in range(sizes.layers)]
    others = set()
    for parameter in some:
        path = parameter.name.split(".")
        module = path[-3] if path[-2] in ("lora_A", "lora_B") else path[-2]
        if "layers" in path:
            layers = tower if parameter.part == "audio_tower" else decoder
            layers[int(path[path.index("layers") + 1])].add(module)
        else:
            others.add(module)
    return Layers(tower, decoder, others)


# ------------------------------------------------------------------------------------------------------- activations
def decoder_layer(sizes: Sizes, b: int, rows: int, new: int, keys: int, modules: set[str], rank: int = 0) -> float:
    """Bytes that autograd keeps of a layer of the language model.

    :param sizes: Of the model.
    :param b: Bytes a value.
    :param rows: Sequences.
    :param new: Tokens computed of each.
    :param keys: Tokens that each attends to; beyond one row they are masked, in the weights' type.
    :param modules: Names of those that train or carry an adapter: of others the input is not kept.
    :param rank: Of the adapters; 0: none.
    """
    tokens, h, query = rows * new, sizes.width, sizes.heads * sizes.head_width
    adapted = bool(rank)
    total = 2 * tokens * (4 * h + 4)  # both norms: input in float32, and the reciprocal of its size
    for norm, users in (
        ("input_layernorm", {"q_proj", "k_proj", "v_proj"}),
        ("post_attention_layernorm", {"gate_proj", "up_proj"}),
    ):
        total += tokens * b * h * ((norm in modules) + bool(users & modules))  # scaled input; the layers' input
    total += tokens * (2 * b * query + 4 * sizes.heads)  # queries, output, its log-sum-exp
    total += 2 * rows * keys * b * query  # keys and values, repeated for grouped heads
    total += tokens * b * sizes.inner * (3 + ("down_proj" in modules))  # gate, its activation, up; their product
    total += adapted * tokens * b * rank * len(modules)
    return total + (rows * new * keys * b if rows > 1 else 0)


def tower_layer(sizes: Sizes, b: int, states: int, modules: set[str], rank: int = 0) -> float:
    """Bytes that autograd keeps of a layer of the audio tower, a clip.

    :param sizes: Of the model.
    :param b: Bytes a value.
    :param states: Of the clip.
    :param modules: See :func:`decoder_layer`.
    :param rank: Of the adapters.
    """
    d, f = sizes.tower_width, sizes.tower_inner
    kept = 2 + 4 + bool({"q_proj", "k_proj", "v_proj"} & modules) + ("out_proj" in modules) + ("fc1" in modules)
    values = states * (kept * d + f * (1 + ("fc2" in modules)) + rank * len(modules)) + states**2  # the mask
    return b * values + states * (4 * sizes.tower_heads + 16)


def tower_states(seconds: float) -> int:
    """States of a clip: ``policy.forward`` leaves out what lies behind its valid frames.

    :param seconds: Its length.
    """
    frames = int(100 * min(seconds, MOST_SECONDS))
    return min((frames + 2 + 3) // 4 * 4, 100 * MOST_SECONDS) // 2


@dataclass(frozen=True)
class Activations:
    """Bytes of one micro-batch.

    :param saved: What autograd keeps until the backward pass.
    :param layer: On top of it while the pass is in a layer, with what checkpointing computes again.
    :param head: On top of it while the pass is in the head.
    """

    saved: float
    layer: float
    head: float


def head_bytes(sizes: Sizes, b: int, tokens: int, trains: bool, cache: float = 0) -> float:
    """Largest work space of ``TokenLogProbs``: chunks of logits, and the gradient of the head's weight.

    :param sizes: Of the model.
    :param b: Bytes a value.
    :param tokens: Scored.
    :param trains: Whether the head does.
    :param cache: Bytes that the forward pass holds and the backward pass does not.
    """
    vocabulary, weight = sizes.vocabulary, sizes.vocabulary * sizes.width
    rows = max(1, LOGITS // vocabulary)
    chunk, several = min(tokens, rows) * vocabulary, tokens > rows
    half = b if b == 2 else 0
    hidden = tokens * b * sizes.width
    forward = cache + chunk * (10 if half else 12)  # logits, with the bias of some tokens, and their log-softmax
    logits = chunk * (8 + half)  # in float32, their softmax, and this in the weights' type
    if not trains:
        return max(forward, hidden + logits)
    # over several chunks the gradient is summed in float32, with a chunk's own in both types on top
    gradient = weight * (8 + half) if several else weight * b
    return max(forward, hidden + max(logits + (4 * weight if several else 0), chunk * (4 + half) + gradient))


def micro_batch(
    sizes: Sizes, args: argparse.Namespace, size: int, some: Sequence[Parameter], width: Lengths
) -> Activations:
    """What a forward and backward of ``policy.forward`` needs beside weights and gradients.

    :param sizes: Of the model.
    :param args: Flags.
    :param size: Responses in it.
    :param some: Parameters that train.
    :param width: Lengths of its sequences.
    """
    s, b, rank = sizes, 2 if args.bf16 else 4, args.lora_rank
    modules, checkpointing = modules_of(sizes, some), args.gradient_checkpointing
    groups = prompts_in(size, args.n_samples_per_prompt)
    flows = "conv1" in modules.others or "conv2" in modules.others  # whether a gradient goes on below
    states, clips, saved, layer = tower_states(width.seconds), groups * width.clips, 0.0, 0.0
    if flows:
        saved += clips * b * states * (2 * s.mels + 5 * s.tower_width)  # frames, two convolutions with activations
    for names in modules.tower:
        flows |= bool(names)
        if flows:
            whole = clips * tower_layer(s, b, states, names, rank)
            saved += clips * states * b * s.tower_width if checkpointing else whole
            layer = max(layer, whole if checkpointing else 0)
    flows |= "layer_norm" in modules.others
    saved += flows * clips * b * states * s.tower_width * 3 // 2  # pooling and the last norm
    if "linear" in modules.others:
        saved += clips * b * states // 2 * s.tower_width
    flows |= bool({"linear", "embed_tokens"} & modules.others)

    passes = [(size, width.prompt + width.response, width.prompt + width.response)]  # rows, tokens, keys
    if size > 1 and not checkpointing:  # the prompt once per group
        passes = [(groups, width.prompt, width.prompt)]
        passes.append((size, width.response - 1, width.prompt + width.response - 1))
    tokens, cache = sum(rows * new for rows, new, _ in passes), 0.0
    for names in modules.decoder:
        flows |= bool(names)
        if flows:
            whole = sum(decoder_layer(s, b, *one, names, rank) for one in passes)
            saved += tokens * b * s.width if checkpointing else whole
            # in float32 the first norm's input is the one that is kept anyway
            layer = max(layer, whole - (tokens * b * s.width if b == 4 else 0) if checkpointing else 0)
        elif len(passes) > 1:
            cache += 2 * passes[1][0] * passes[1][2] * b * s.kv_heads * s.head_width
    saved += flows * tokens * s.width * (4 + b * ("norm" in modules.others))
    scored = size * width.response
    saved += scored * b * s.width
    # gradients of a layer's inner values, of the pass that is larger, and of one of its matrices (or it, unpacked)
    most = max(rows * new for rows, new, _ in passes)
    matrix = s.inner * s.width * b * any({"gate_proj", "up_proj", "down_proj"} & names for names in modules.decoder)
    layer += most * b * 2 * s.inner + matrix * (rank == 0 or args.load_in_4bit)
    return Activations(saved, layer, head_bytes(s, b, scored, "lm_head" in modules.others, cache))


def prompts_in(size: int, samples: int) -> int:
    """Most prompts that a micro-batch of neighbouring responses holds.

    :param size: Responses in it.
    :param samples: Responses a prompt.
    """
    if size % samples == 0 or samples % size == 0:
        return max(1, size // samples)
    return min(size, (size - 2) // samples + 2)


def forward_only(sizes: Sizes, args: argparse.Namespace, size: int, width: Lengths) -> float:
    """Bytes of a log-prob forward: keys and values of all layers, one layer's inner values, a chunk of logits.

    :param sizes: Of the model.
    :param args: Flags.
    :param size: Responses in it.
    :param width: Lengths of its sequences.
    """
    s, b = sizes, 2 if args.bf16 else 4
    tokens = max(prompts_in(size, args.n_samples_per_prompt) * width.prompt, size * width.response)
    inner = tokens * (b * (3 * s.inner + 4 * s.width) + 8 * s.width)
    chunk = min(size * width.response, max(1, LOGITS // s.vocabulary)) * s.vocabulary
    cache = size * (width.prompt + width.response) * cache_bytes(s, b) if size > 1 else 0
    return cache + max(inner, 12 * chunk)


def cache_bytes(sizes: Sizes, b: int) -> int:
    """Bytes that a token's keys and values take.

    :param sizes: Of the model.
    :param b: Bytes a value.
    """
    return 2 * sizes.layers * sizes.kv_heads * sizes.head_width * b


# ------------------------------------------------------------------------------------------------------------ states
class Engine(NamedTuple):
    """A rollout engine on one GPU, in bytes.

    :param share: What it may take.
    :param weights: Its weights.
    :param cache: What is left for keys and values.
    :param sequences: Longest sequences that the cache holds, of all GPUs of the engine.
    """

    share: float
    weights: float
    cache: float
    sequences: float


def engine_of(sizes: Sizes, args: argparse.Namespace, gpus: int, gib: float) -> Engine:
    """How an engine divides its memory.

    :param sizes: Of the model.
    :param args: Flags.
    :param gpus: Ranks.
    :param gib: Memory of a GPU.
    """
    b, width = 2 if args.bf16 else 4, lengths(args)
    one = (width.prompt + width.response) * cache_bytes(sizes, b)
    if args.engine_type == "hf":
        share = args.engine_mem_util * gib * GIB
        rows = min(HF_ROWS, max(1, share // one), args.rollout_batch_size * args.n_samples_per_prompt // gpus)
        return Engine(rows * one, 0, rows * one, rows)
    weights = b * count(parameters(sizes)) / args.engine_tp_size
    share = args.engine_mem_util * gib * GIB
    cache = share - weights - ENGINE_WORK
    return Engine(share, weights, cache, cache * args.engine_tp_size / one)


class States(NamedTuple):
    """What training keeps on a GPU and, of it, in the machine's memory, in bytes.

    :param weights: Of the model.
    :param whole: Weights of the whole model, as one GPU would hold them.
    :param gradients: Between two micro-batches.
    :param optimizer: Master weights and moments.
    :param host: What :param:`gradients` and optimizer take of the machine's memory instead, a GPU.
    """

    weights: float
    whole: float
    gradients: float
    optimizer: float
    host: float


def states_of(sizes: Sizes, args: argparse.Namespace, gpus: int, some: Sequence[Parameter]) -> States:
    """Weights, gradients and optimizer.

    :param sizes: Of the model.
    :param args: Flags.
    :param gpus: Ranks.
    :param some: Parameters that train.
    """
    b, stage = 2 if args.bf16 else 4, args.zero_stage
    every, values = parameters(sizes), count(some)
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


class Units(NamedTuple):
    """What FSDP2 gathers and reduces at a time, in bytes.

    :param gathered: Most that is whole while a unit runs: it, the next one, and what is outside units.
    :param moved: On top of it before or after a unit runs: the buffer that it comes in, or the gradients of one that
        trains and their copy in float32.
    """

    gathered: float
    moved: float


def fsdp_units(sizes: Sizes, b: int, some: Sequence[Parameter]) -> Units:
    """Sizes of ``FSDPStrategy.shard``'s units: each layer, embedding, head, and what is left, which stays whole while
    the model runs.

    :param sizes: Of the model.
    :param b: Bytes a gathered value.
    :param some: Parameters that train.
    """

    def by_unit(them: Sequence[Parameter]) -> Counter[str]:
        values: Counter[str] = Counter()
        for parameter in them:
            layer = re.search(r"^.*\.layers\.\d+|embed_tokens|lm_head", parameter.name)
            values[layer.group() if layer else ""] += parameter.count
        return values

    adapters = [parameter for parameter in some if ".lora_" in parameter.name]
    every, training = by_unit([*parameters(sizes), *adapters]), by_unit(some)
    rest = every.pop("")
    first = max(every.values())
    layer = max(values for name, values in every.items() if "layers" in name)  # what runs before or after an end
    return Units(b * (rest + first + layer), max(b * first, (b + 4) * max(training.values())))


def memory(
    sizes: Sizes, args: argparse.Namespace, gpus: int, gib: float, accelerator: bool = True
) -> dict[str, dict[str, float]]:
    """Bytes of each component in each phase.

    :param sizes: Of the model.
    :param args: Flags.
    :param gpus: Ranks.
    :param gib: Memory of a GPU.
    :param accelerator: What a GPU adds (double buffers, AdamW over all parameters at once); False: as on a CPU.
    :return: Phase, component, bytes.
    """
    some = trained(sizes, args.freeze_prefix or (), args.lora_rank, args.target_modules)
    b, stage, values, width = 2 if args.bf16 else 4, args.zero_stage, count(some), lengths(args)
    states, engine = states_of(sizes, args, gpus, some), engine_of(sizes, args, gpus, gib)
    if args.fsdp:
        stage = -1  # none of DeepSpeed's
    sharded, share = stage == 3 or args.fsdp, 1 if stage == 0 else gpus
    offloaded = args.fsdp_cpu_offload if args.fsdp else args.adam_offload and stage > 0
    out = {phase: dict.fromkeys(COMPONENTS, 0.0) for phase in PHASES}
    train = micro_batch(sizes, args, args.micro_train_batch_size, some, width)
    # over several rollouts an optimizer step, gradients stay; ZeRO-3's are a buffer that always does
    stays = stage == 3 or args.train_batch_size > args.rollout_batch_size * args.n_samples_per_prompt
    largest = b * max(p.count for p in parameters(sizes))
    for phase, row in out.items():
        row["weights"], row["optimizer states"] = states.weights, states.optimizer
        row["gradients"] = states.gradients if stays or phase in ("backward", "optimizer") else 0
        row["reserve"] = RESERVE
        if stage == 3:
            row["sharding buffers"] = b * BUCKET
        elif stage == 2 and offloaded:
            row["sharding buffers"] = b * max(p.count for p in some)
        if args.engine_type == "vllm":
            awake = phase in ("rollout", "sync") or not args.enable_engine_sleep
            row["engine"] = engine.share if awake else ENGINE_ASLEEP
    if args.engine_type == "hf":
        out["rollout"]["engine"] = engine.share
        if sharded:
            out["rollout"]["sharding buffers"] += states.whole  # gathered while it generates
    if args.init_kl_coef > 0 and args.lora_rank == 0:
        whole = b * count(parameters(sizes))
        for phase in PHASES if sharded else ("rollout", "log-probs"):  # else it waits in the machine's memory
            out[phase]["reference model"] = (whole / gpus if sharded else whole) * (not (args.fsdp and offloaded))
    units = fsdp_units(sizes, b, some)
    if sharded:
        for phase in ("log-probs", "backward"):
            gathered = units.gathered if args.fsdp else min(b * LIVE, states.whole)
            out[phase]["sharding buffers"] += gathered
    if args.init_kl_coef > 0 or args.max_epochs > 1:
        out["log-probs"]["activations"] = forward_only(sizes, args, args.micro_rollout_batch_size, width)
    backward, step = out["backward"], out["optimizer"]
    backward["activations"], backward["work space"] = train.saved, max(train.layer, train.head)
    if args.fsdp:
        backward["work space"] = max(backward["work space"], units.moved)
    if stage == 2:
        backward["sharding buffers"] += b * BUCKET * (2 if accelerator else 1)
    elif stage == 0 and gpus > 1:
        step["sharding buffers"] = b * min(BUCKET, values)
    if not offloaded:
        at_once = min(values / share, SUB_GROUP) if stage == 3 else values / share
        if stage == 3 or (b == 2 and not args.fsdp):  # copied to float32; ZeRO-2 lets go of the others
            step["gradients"] = 4 * at_once + (0 if stage == 2 else states.gradients)
        step["work space"] = 4 * at_once if accelerator else 0
    if args.engine_type == "vllm" and (sharded or args.lora_rank):
        # gathered in buckets, or merged with its adapter; LightRFT gathers one by one
        bucket = getattr(args, "sync_bucket_mb", 0) * 2**20 if sharded else 0
        out["sync"]["work space"] = max(largest, min(bucket, b * sum(p.count for p in parameters(sizes))))
    return out


def host_memory(sizes: Sizes, args: argparse.Namespace, gpus: int) -> dict[str, float]:
    """Bytes of the machine's memory for each GPU.

    :param sizes: Of the model.
    :param args: Flags.
    :param gpus: Ranks.
    """
    some = trained(sizes, args.freeze_prefix or (), args.lora_rank, args.target_modules)
    whole = (2 if args.bf16 else 4) * count(parameters(sizes))
    asleep = args.engine_type == "vllm" and args.enable_engine_sleep
    reference = whole if args.init_kl_coef > 0 and args.lora_rank == 0 else 0
    if args.fsdp:
        reference *= args.fsdp_cpu_offload / gpus
    elif args.zero_stage == 3:
        reference = 0
    return {
        "sleeping engine": whole / args.engine_tp_size * asleep,
        "training": states_of(sizes, args, gpus, some).host,
        "reference model": reference,
        "decoded clips": args.audio_cache_mib * 2**20 * (2 if args.eval_steps > 0 else 1),
    }
