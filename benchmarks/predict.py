#!/usr/bin/env python3
"""What a GRPO step of Qwen2-Audio-7B should take on 8 GPUs of one machine, phase by phase. Computed, not measured.

    python benchmarks/predict.py                  # 8 A100: before, after each change, and the floor
    python benchmarks/predict.py --gpu H200 --json results/predict.json

Seconds are FLOPs over peak x utilisation, or bytes over bandwidth x utilisation, from the parameters that ``--plan``
counts. Within a micro-batch computing and gathering overlap, so that the longer one counts; phases do not overlap. Left
out are kernel launches, Python, decoding of audio, rewards, mapping the engine's memory anew, and waiting for the
slowest rank, so that a real step takes longer. ``benchmarks/gpu`` measures what is assumed here.

The floor is every token computed once, and every byte of weights and optimizer moved once, at the full peaks. Decoding
still reads the language model's weights once a token, since a token depends on the one before.
"""

import argparse
import json
import math
from pathlib import Path
from typing import NamedTuple

from harness import make_parser

from aqa.families import Qwen2Audio
from aqa.training.flags import build_parser, finish
from aqa.training.planner import Plan, count, parameters, read_sizes


class Gpu(NamedTuple):
    """Peaks from data sheets: bf16 FLOP/s without sparsity, bytes a second of memory, of NVLink in one direction, and
    of PCIe as pinned copies reach it."""

    flops: float
    memory: float
    link: float
    pcie: float


class Way(NamedTuple):
    """How a step is done; the defaults are today's.

    :param shared: The prompt is computed once a group in training and log-probs; else once a response in training, and
        once a micro-batch of :data:`CUT` responses in log-probs.
    :param copied: The engine's weights are copied to the machine's memory and back.
    :param fused: AdamW is one pass over its values.
    """

    shared: bool = True
    copied: bool = False
    fused: bool = True


GPUS = {
    "A100": Gpu(312e12, 2.04e12, 300e9, 25e9),
    "H100": Gpu(989e12, 3.35e12, 450e9, 50e9),
    "H200": Gpu(989e12, 4.8e12, 450e9, 50e9),
}
MFU_TRAIN, MFU_FORWARD, OF_MEMORY, OF_LINK = 0.4, 0.5, 0.7, 0.7  # assumed
MODEL, WORLD, PROMPTS, SAMPLES, CUT = "Qwen/Qwen2-Audio-7B-Instruct", 8, 16, 8, 4
CLIP_SECONDS, PROMPT, RESPONSE = 10, 340, 24  # 250 of the prompt's tokens are audio
SIZES = read_sizes(MODEL)
TOWER, TEXT, (PROJECTOR,) = Qwen2Audio.tower, Qwen2Audio.decoder, Qwen2Audio.projectors
# bytes a value: weight, both moments, gradient and bf16 copy once; or each of foreach's eight operations by itself
FUSED, FOREACH = 3 * 8 + 4 + 2, 80 + 4 + 2
BEFORE = Way(shared=False, copied=True, fused=False)
CHANGES = {
    "before": BEFORE,
    "prompt once a group": BEFORE._replace(shared=True),
    "no copies of the engine's weights": BEFORE._replace(shared=True, copied=False),
    "fused AdamW": Way(),
}


def values(below: str, linear: bool = True) -> int:
    """Values of the linear layers below a module."""
    return count(p for p in parameters(SIZES) if p.name.startswith(below) and (p.is_linear or not linear))


def decoder_flops(tokens: float, context: float, head: float = 0) -> float:
    """FLOPs of a forward pass of the language model.

    :param context: Tokens that each attends to, on average.
    :param head: Tokens whose logits are computed.
    """
    attention = 4 * tokens * context * SIZES.num_attention_heads * SIZES.head_dim * SIZES.num_hidden_layers
    return 2 * (values(f"{TEXT}.layers") * tokens + values("lm_head") * head) + attention


def tower_flops(seconds: float) -> float:
    """FLOPs of a forward pass of tower and projector over a clip's valid frames: 50 states a second."""
    states = 50 * seconds
    convolutions = [p for p in parameters(SIZES) if p.name in (f"{TOWER}.conv1.weight", f"{TOWER}.conv2.weight")]
    convolved = sum(math.prod(p.shape) * n for p, n in zip(convolutions, (2 * states, states), strict=True))
    attention = 4 * states**2 * SIZES.d_model * SIZES.encoder_layers
    return 2 * (convolved + values(f"{TOWER}.layers") * states + values(PROJECTOR) * states / 2) + attention


def make_plan(gib: float = 80) -> Plan:
    """R1-AQA's recipe as ``--plan`` counts it."""
    from lightrft.utils import add_arguments

    flags = f"--plan --pretrain {MODEL} --bf16 --zero_stage 3 --gradient_checkpointing --generate_max_len 256"
    flags += f" --rollout_batch_size {PROMPTS} --n_samples_per_prompt {SAMPLES} --micro_train_batch_size {SAMPLES}"
    args = build_parser(add_arguments).parse_args(flags.split())
    finish(args)
    return Plan(args, SIZES, WORLD, gib)


def predict(gpu: Gpu, way: Way) -> dict[str, float]:
    """Seconds of a step's phases on each of :data:`WORLD` GPUs, with ZeRO-3 and gradient checkpointing."""
    forward, update, memory = gpu.flops * MFU_FORWARD, gpu.flops * MFU_TRAIN, gpu.memory * OF_MEMORY
    plan, prompts = make_plan(), PROMPTS // WORLD
    weights, responses, tower = plan.model, prompts * SAMPLES, tower_flops(CLIP_SECONDS)
    gather = weights * (WORLD - 1) / WORLD / (gpu.link * OF_LINK)  # a reduce-scatter takes as long
    whole, size = PROMPT + RESPONSE, SAMPLES if way.shared else CUT
    row = PROMPT + size * RESPONSE
    micros = responses / size
    prefill = tower + decoder_flops(PROMPT, PROMPT / 2)
    # attention under a mask computes all pairs of tokens, also those that the mask hides
    scored = tower + decoder_flops(row, row, size * RESPONSE)
    if not way.shared:
        scored = prefill + decoder_flops(size * RESPONSE, whole, size * RESPONSE)
    trained = scored if way.shared else tower + decoder_flops(size * whole, whole / 2, size * RESPONSE)
    decoded = plan.b * (values(f"{TEXT}.layers", linear=False) + values("lm_head")) + responses * whole * plan.token
    return {
        "prefill": prompts * prefill / forward,
        "decode": RESPONSE * decoded / memory,
        "reference": micros * max(scored / forward, gather),
        # forward, the same again for checkpointing, backward; two gathers and a reduce-scatter
        "train": micros * max(4 * trained / update, 3 * gather),
        "optimizer": plan.values / WORLD * (FUSED if way.fused else FOREACH) / memory,
        "sync": gather + 4 * weights / memory,  # read, write, and both sides' checksums
        "sleep": 2 * weights / gpu.pcie * way.copied,
    }


def floor(gpu: Gpu) -> dict[str, float]:
    """The least seconds, as the module's text defines them."""
    plan, prompts = make_plan(), PROMPTS // WORLD
    tokens = SAMPLES * RESPONSE
    group = tower_flops(CLIP_SECONDS) + decoder_flops(PROMPT, PROMPT / 2) + decoder_flops(tokens, PROMPT, tokens)
    decoded = plan.b * (values(f"{TEXT}.layers", linear=False) + values("lm_head"))
    return {
        "prefill": prompts * (tower_flops(CLIP_SECONDS) + decoder_flops(PROMPT, PROMPT / 2)) / gpu.flops,
        "decode": RESPONSE * decoded / gpu.memory,
        "reference": prompts * group / gpu.flops,
        "train": prompts * 3 * group / gpu.flops,
        "optimizer": plan.values / WORLD * FUSED / gpu.memory,
        # the floor gathers the weights once and writes them once; the transfer over the link overlaps with this
        "sync": plan.model * (WORLD - 1) / WORLD / gpu.link,
        "sleep": 0.0,
    }


def main() -> None:
    parser = make_parser(__doc__, demo=False)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--gpu", choices=GPUS, default="A100", help="kind of the GPUs (default: %(default)s)")
    parser.add_argument("--json", type=Path, help="file to write the seconds to")
    args = parser.parse_args()
    gpu = GPUS[args.gpu]
    table = {name: predict(gpu, way) for name, way in CHANGES.items()} | {"floor": floor(gpu)}
    print(f"COMPUTED, NOT MEASURED: seconds a step on {WORLD} {args.gpu}, {PROMPTS} prompts x {SAMPLES} responses of")
    print(f"{RESPONSE} tokens, prompts of {PROMPT}, clips of {CLIP_SECONDS} s; {MODEL}, ZeRO-3, checkpointing")
    print(f"\n{'':34}" + "".join(f"{name:>10}" for name in [*table["floor"], "step", "saves"]))
    last = math.nan
    for name, phases in table.items():
        step = sum(phases.values())
        saves = "" if name in ("before", "floor") else f"{last - step:.2f}"
        cells = [*(f"{seconds:.2f}" for seconds in phases.values()), f"{step:.2f}", saves]
        print(f"{name:34}" + "".join(f"{cell:>10}" for cell in cells))
        last = step
    stays = "stay on the GPU" if make_plan().engine_weights_stay else "are dropped while it sleeps"
    print(f"\nthe engine's weights {stays} at 80 GB, by --plan; --help says what is left out")
    if args.json:
        assumed = {"train": MFU_TRAIN, "forward": MFU_FORWARD, "memory": OF_MEMORY, "link": OF_LINK}
        content = {"gpu": args.gpu, "peaks": gpu._asdict(), "utilisation": assumed, "seconds": table}
        args.json.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
