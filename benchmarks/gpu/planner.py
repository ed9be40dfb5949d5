"""The planner's memory against the GPU's: forward and backward of 7B's shape, with random weights.

Work: micro-batches of 8 responses of 256 tokens to one prompt with a clip of 10 s. What the planner says of weights,
gradients, optimizer, activations and work space is compared with the most that is allocated; neither DeepSpeed's
buffers nor an engine are here. Limit: 15 % off.
"""

from typing import Any

import torch
from random_model import SAMPLES

from gpu.model import AUDIO, DEVICE, DTYPE, TEXT, build_model, make_batch, most_allocated
from gpu.record import Figures, Section, judge

TOLERANCE = 0.15
FLAGS = f"--n_samples_per_prompt {SAMPLES} --prompt_max_len {TEXT + 1} --plan_clip_seconds 10".split()
CASES = {
    "all parameters": [],
    "checkpointing": ["--gradient_checkpointing"],
    "frozen tower": ["--freeze_prefix"],
    "LoRA": ["--lora_rank", "16"],
}


def run(section: Section) -> None:
    size, response = ("small", 32) if section.small else ("7B", 256)
    for name, flags in CASES.items():
        section.case(name, lambda f=flags: compare(size, response, f))


def compare(size: str, response: int, flags: list[str]) -> Figures:
    """Measure one case beside its plan.

    :param response: Tokens a response.
    :param flags: Of :data:`CASES`.
    """
    from aqa.training.flags import build_parser, finish
    from aqa.training.freezing import freeze
    from aqa.training.planner import GIB, Plan, sizes_of
    from lightrft.utils import add_arguments

    bf16 = torch.bfloat16 == DTYPE
    args = build_parser(add_arguments).parse_args(
        [*FLAGS, "--generate_max_len", str(response), *flags, *["--bf16"] * bf16]
    )
    finish(args)
    model = build_model(size)
    sizes = sizes_of({part: model.config.to_dict()[part] for part in ("audio_config", "text_config")})
    if args.freeze_prefix:
        freeze(model, args.freeze_prefix)
    if args.lora_rank:
        from lightrft.models.lora import add_adapters

        add_adapters(model, args.lora_rank, 16, args.target_modules, "random")
    if args.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    plan = Plan(args, sizes, 1, 80)
    train = [p for p in model.parameters() if p.requires_grad]
    batch = make_batch(response) | {"logit_bias": {AUDIO: -100.0}}  # as in training
    optimizer = torch.optim.AdamW(train, fused=True) if args.lora_rank else None  # of all parameters it would not fit

    def step() -> None:
        model(**batch).mean().backward()
        if optimizer is not None:
            optimizer.step()

    step()  # gradients and moments are there from now on, as in a second micro-batch
    held = bytes_held(model, train, optimizer)
    measured = held + most_allocated(step)
    b = DTYPE.itemsize
    kept = plan.model + b * plan.values * (1 if optimizer is None else 4)  # gradients; the adapters, their moments
    planned = kept + sum(plan.micro_batch(SAMPLES))
    figures = {"planned / measured": planned / measured, "planned, GiB": planned / GIB, "measured, GiB": measured / GIB}
    return judge(figures, **{"planned / measured": (1 - TOLERANCE, 1 + TOLERANCE)})


def bytes_held(model: Any, train: list[torch.nn.Parameter], optimizer: Any) -> int:
    """Bytes that stay between steps: on a GPU all that is allocated, else weights, gradients and moments."""
    if DEVICE.type == "cuda":
        return torch.cuda.memory_allocated()
    moments = 0 if optimizer is None else 2
    return sum(p.nbytes for p in model.parameters()) + sum((1 + moments) * p.nbytes for p in train)
