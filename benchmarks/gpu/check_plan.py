#!/usr/bin/env python3
"""The planner's memory against a GPU's: forward and backward of Qwen2-Audio-7B's shape, with random weights.

    python benchmarks/gpu/check_plan.py                # one GPU of 80 GB
    python benchmarks/gpu/check_plan.py --small        # the same code on a CPU, to see that it runs

Work: micro-batches of 8 responses of 256 tokens to one prompt with a clip of 10 s, in bfloat16 (float32 on a CPU): all
parameters trained, with and without gradient checkpointing; frozen tower; LoRA of rank 16 with AdamW's step. Printed
for each: bytes allocated at most, what the planner says (weights, gradients, optimizer, activations, work space;
neither DeepSpeed's buffers nor an engine, which are not here), and their ratio. Exit status 1 if one is off by more
than 15 %.

Not run on a GPU yet.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from bench_7b import AUDIO, BATCH, SIZES, TEXT, build_model, make_batch
from harness import allocated, make_parser

from aqa.training.flags import build_parser, finish
from aqa.training.freezing import freeze
from aqa.training.planner import GIB, Plan, sizes_of
from lightrft.models.lora import add_adapters
from lightrft.utils import add_arguments

RESPONSE, TOLERANCE = 256, 0.15
FLAGS = f"--n_samples_per_prompt {BATCH} --prompt_max_len {TEXT + 1} --plan_clip_seconds 10".split()
FLAGS += ["--generate_max_len", str(RESPONSE)]
CASES = {
    "all parameters": [],
    "checkpointing": ["--gradient_checkpointing"],
    "frozen tower": ["--freeze_prefix"],
    "LoRA": ["--lora_rank", "16"],
}


def most_allocated(work: Callable[[], Any], device: torch.device) -> int:
    """Most bytes that are allocated while something runs, beside those before."""
    if device.type != "cuda":
        return allocated(work)[0]
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    work()
    return torch.cuda.max_memory_allocated() - before


def compare(name: str, size: str, device: torch.device) -> float:
    """Measure one case beside its plan.

    :param name: Of :data:`CASES`.
    :param size: ``real`` or ``small``.
    :return: Planned bytes over measured ones.
    """
    bf16 = device.type == "cuda"
    args = build_parser(add_arguments).parse_args([*FLAGS, *CASES[name], *["--bf16"] * bf16])
    finish(args)
    model = build_model(size, device, torch.bfloat16 if bf16 else torch.float32)
    sizes = sizes_of({part: model.config.to_dict()[part] for part in ("audio_config", "text_config")})
    if args.freeze_prefix:
        freeze(model, args.freeze_prefix)
    if args.lora_rank:
        add_adapters(model, args.lora_rank, 16, args.target_modules, "random")
    if args.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    plan = Plan(args, sizes, 1, 80)
    train = [p for p in model.parameters() if p.requires_grad]
    batch = make_batch(RESPONSE, 1, device) | {"logit_bias": {AUDIO: -100.0}}  # as in training
    optimizer = torch.optim.AdamW(train) if args.lora_rank else None  # of all parameters it would not fit

    def step() -> None:
        model(**batch).mean().backward()
        if optimizer is not None:
            optimizer.step()

    step()  # gradients and moments are there from now on, as in a second micro-batch
    b = 2 if bf16 else 4
    kept = plan.model + b * plan.values * (1 if optimizer is None else 4)  # gradients; the adapters, their moments
    held = torch.cuda.memory_allocated() if bf16 else sum(p.numel() * b for p in [*model.parameters(), *train])
    held += 0 if bf16 or optimizer is None else sum(2 * p.numel() * b for p in train)
    measured = held + most_allocated(step, device)
    planned = kept + sum(plan.micro_batch(BATCH))
    print(
        f"{name:<16} measured {measured / GIB:8.3f}  planned {planned / GIB:8.3f} GiB  ratio {planned / measured:.3f}"
    )
    return planned / measured


def main() -> None:
    """Measure, print."""
    parser = make_parser(__doc__, demo=False)
    parser.add_argument("--small", action="store_true", help=f"a tiny model, also on a CPU: {SIZES['small']}")
    args = parser.parse_args()
    if not args.small and not torch.cuda.is_available():
        raise SystemExit("no GPU here: --small runs the same code with a tiny model")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    ratios = [compare(name, "small" if args.small else "real", device) for name in CASES]
    raise SystemExit(int(any(abs(ratio - 1) > TOLERANCE for ratio in ratios)))


if __name__ == "__main__":
    main()
