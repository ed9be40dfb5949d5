"""Flags that belong to the runtime rather than to one example."""

import argparse

SWITCH = {"action": argparse.BooleanOptionalAction, "default": False}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("engine and runtime")
    group.add_argument("--engine_tp_size", type=int, default=1, help="ranks that run one vLLM engine together")
    group.add_argument(
        "--engine_mem_util",
        type=float,
        default=0.5,
        help="share of the GPU's memory for vLLM's weights and KV cache, 0 to 1 (unused on a CPU)",
    )
    group.add_argument(
        "--enable_engine_sleep",
        **SWITCH | {"default": True},
        help="free vLLM's GPU memory while training (a CPU has no such mode)",
    )
    group.add_argument(
        "--disable_engine_sleep",
        action="store_false",
        dest="enable_engine_sleep",
        help="the same as --no-enable_engine_sleep, LightRFT's spelling",
    )
    group.add_argument(
        "--fsdp", **SWITCH, help="shard with PyTorch's FSDP2, not DeepSpeed; --zero_stage is then unused"
    )
    group.add_argument("--fsdp_cpu_offload", **SWITCH, help="with --fsdp: shards, gradients, optimizer in CPU memory")
    group.add_argument(
        "--param_offload",
        **SWITCH,
        help="with --zero_stage 3: parameters in CPU memory between their uses, the reference model's too",
    )
    group.add_argument(
        "--sync_bucket_mb",
        type=int,
        default=512,
        help="MiB of sharded weights (ZeRO-3, FSDP2) that are gathered at a time to hand them to the engine",
    )
    group.add_argument("--verbose", **SWITCH, help="also print the seconds of each step's phases")
    group.add_argument(
        "--quiet",
        **SWITCH,
        help="print warnings, errors and the final summary only; <save_path>/logs/ has everything, as always",
    )
