#!/usr/bin/env python3
"""Seconds of a weight sync, trainer to vLLM, and of gathering sharded weights for it.

    python benchmarks/bench_sync.py --demo_dir results/demo

1. Sync. Work: the trainer's float32 weights into the engine, caches emptied, what arrived compared; all weights, and
   those that train when the audio tower is frozen. Baseline: ``copy_`` of each tensor that is sent into memory of its
   own. ``reload_weights`` is vLLM's own way: all weights, nothing compared. Models: the demo's, and a random one of
   99 M parameters, where bytes count and not the number of tensors. Limit, on a GPU: twice the copy for the large
   model. On a CPU there is none, because vLLM repacks most weights there, which costs more than copying them.
2. Gathering. Work: the random model, sharded over two processes by ZeRO-3 and by FSDP2, all weights gathered and each
   copied into memory of its own, in buckets of several sizes. Baseline: one by one. Peak memory beside the ratios
   includes, on a CPU, gloo's own copy of what it gathers. Limits: buckets of 128 MiB take no longer than one by one,
   and less memory than all at once.
"""

import argparse
import functools
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from harness import Report, bytes_beyond, make_parser, parse, ratio, take_turns

LIMIT = 2.0  # times a copy, on a GPU
BUCKETS = (0, 8, 32, 128, 512)  # MiB a bucket; 0: one by one, the last: all at once


def strategy_flags(zero_stage: int, bf16: bool = False) -> argparse.Namespace:
    """The flags' defaults, with small batches."""
    from aqa.training.flags import build_parser, finish
    from lightrft.utils import add_arguments

    small = f"--zero_stage {zero_stage} --train_batch_size 2 --micro_train_batch_size 1"
    args = build_parser(add_arguments).parse_args([*small.split(), "--bf16" if bf16 else "--no-bf16"])
    finish(args)
    return args


def write_random_model(folder: Path) -> None:
    """Write a random Qwen2-Audio of 99 M parameters, 27 M of them in the tower, with the demo's tokenizer."""
    from random_model import build_model, make_config

    from demo.tiny_model import build_processor, save

    processor = build_processor()
    tokenizer = processor.tokenizer
    ends = {"bos_token_id": None, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    text = (10, 12, 768, 2048, len(tokenizer))
    config = make_config((8, 8, 512), text, tokenizer.convert_tokens_to_ids("<|AUDIO|>"), **ends)
    save(build_model(config), processor, folder)


def copying(weights: list[Any]) -> Callable[[], None]:
    """The baseline: a function that copies these tensors."""
    import torch

    room = [torch.empty_like(tensor) for tensor in weights]

    def copy() -> None:
        for own, tensor in zip(room, weights, strict=True):
            own.copy_(tensor)

    return copy


def measure_sync(path: Path, rounds: int) -> dict[str, Any]:
    """Way of syncing one model to MiB, median seconds and ratio to the copy."""
    import torch

    from lightrft.engines.vllm_engine import VLLMEngine
    from lightrft.models.actor_al import ActorAL
    from lightrft.strategy.deepspeed_strategy import DeepspeedStrategy

    strategy = DeepspeedStrategy(strategy_flags(0))
    actor = ActorAL(str(path), bf16=False)
    actor.model.to(strategy.device)
    for name, parameter in actor.model.named_parameters():
        if "audio_tower" in name.split("."):
            parameter.requires_grad_(False)
    engine = strategy.inference_engine = VLLMEngine(str(path), torch.float32, max_model_len=1024)

    def synchronise(whole: bool) -> None:
        engine.complete = not whole
        strategy.update_engine_weights(actor)

    def reload_weights() -> None:
        weights = strategy.named_weights(actor.model)
        engine.llm.collective_rpc("reload_weights", kwargs={"weights_iterator": weights})

    everything = [tensor for _, tensor in strategy.named_weights(actor.model)]
    trained = [tensor for _, tensor in strategy.named_weights(actor.model, trained_only=True)]
    sizes = {"all": sum(t.nbytes for t in everything), "trained": sum(t.nbytes for t in trained)}
    ways: dict[str, tuple[str, Callable[[], None]]] = {
        "copy of all": ("all", copying(everything)),
        "sync of all": ("all", lambda: synchronise(True)),
        "reload_weights": ("all", reload_weights),
        "copy of what trains": ("trained", copying(trained)),
        "sync of what trains": ("trained", lambda: synchronise(False)),
    }

    def done(way: Callable[[], None]) -> None:
        way()
        if strategy.device.type == "cuda":
            torch.cuda.synchronize()

    seconds = take_turns({name: functools.partial(done, way) for name, (_, way) in ways.items()}, rounds)
    table = {}
    for name, times in seconds.items():
        part = ways[name][0]
        copies = seconds["copy of all" if part == "all" else "copy of what trains"]
        table[name] = {
            "mebibytes": round(sizes[part] / 2**20, 1),
            "seconds": round(statistics.median(s.wall for s in times), 5),
            "ratio": round(ratio([s.wall for s in times], [s.wall for s in copies]), 2),
            "cpu_ratio": round(ratio([s.cpu for s in times], [s.cpu for s in copies]), 2),
        }
    return table


def measure_gathering(path: Path, rounds: int) -> dict[str, Any]:
    """Gather all weights in buckets of each size, with ZeRO-3 and FSDP2. All ranks of a process group call it.

    :return: Strategy to bucket size to median seconds, ratio to one by one, and peak MiB beyond what was in use before.
    """
    import torch

    from aqa.training import gloo_shutdown
    from lightrft.models.actor_al import load_model
    from lightrft.strategy.deepspeed_strategy import DeepspeedStrategy
    from lightrft.strategy.fsdp_strategy import FSDPStrategy

    table: dict[str, Any] = {}
    for label, kind in (("ZeRO-3", DeepspeedStrategy), ("FSDP2", FSDPStrategy)):
        strategy = kind(strategy_flags(3))
        engine, *_ = strategy.prepare_training(load_model(str(path), dtype=torch.float32), 1)
        room = {name: tensor.clone() for name, tensor in strategy.named_weights(engine)}

        def gather(size: int, strategy: Any = strategy, engine: Any = engine, room: Any = room) -> None:
            torch.distributed.barrier()
            strategy.args.sync_bucket_mb = size
            for name, tensor in strategy.named_weights(engine):
                room[name].copy_(tensor)

        ways = {str(size): functools.partial(gather, size) for size in BUCKETS}
        seconds = {size: [s.wall for s in times] for size, times in take_turns(ways, rounds).items()}
        table[label] = {
            size: {
                "seconds": round(statistics.median(times), 4),
                "ratio": round(ratio(times, seconds["0"]), 3),
                "mebibytes": round(bytes_beyond(ways[size])[0] / 2**20, 1),
            }
            for size, times in seconds.items()
        }
    gloo_shutdown.settle()
    return table


def gather_on_two(model: Path, rounds: int, log: Path) -> dict[str, Any]:
    """Start two processes of this script that call :func:`measure_gathering`, and return what it found."""
    result = model.parent / "gathering.json"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", __file__]
    command += ["--rounds", str(rounds), "--of_rank", str(model), str(result)]
    # glibc returns freed tensors to the system at once, so that resident memory is what is in use
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "262144", "OMP_NUM_THREADS": "1"}
    with log.open("a") as file:
        done = subprocess.run(command, stdout=file, stderr=file, env=environment)
    if done.returncode != 0:
        raise SystemExit(f"gathering on two processes ended with {done.returncode}; their output is in {log}")
    return json.loads(result.read_text(encoding="utf-8"))


def judge(report: Report, models: dict[str, Any], gathering: dict[str, Any]) -> None:
    """Print and judge the figures of both parts."""
    import torch

    for label, table in models.items():
        for name, row in table.items():
            report.say(
                f"{label:6}  {name:19}  {row['mebibytes']:6.1f} MiB  {1000 * row['seconds']:8.2f} ms  "
                f"{row['ratio']:6.2f} x a copy ({row['cpu_ratio']:.2f} x in CPU time)"
            )
    for label, rows in gathering.items():
        for size, row in rows.items():
            report.say(
                f"{label:6}  {size:>3} MiB a bucket  {1000 * row['seconds']:8.2f} ms  {row['ratio']:6.3f} x one by one"
                f"  {row['mebibytes']:6.1f} MiB at most"
            )
    large = models["random"]
    limit = LIMIT if torch.cuda.is_available() else None
    report.judge("weight sync, 99 M parameters: times a plain copy", large["sync of all"]["ratio"], at_most=limit)
    report.judge("vLLM's own reload, unchecked: times a plain copy", large["reload_weights"]["ratio"])
    report.judge("weight sync of what trains: times a plain copy of it", large["sync of what trains"]["ratio"])
    report.judge("weight sync, demo's model: milliseconds", 1000 * models["demo"]["sync of all"]["seconds"])
    for label, rows in gathering.items():
        report.judge(f"{label}: buckets of 128 MiB, times one by one", rows["128"]["ratio"], at_most=1.0)
        memory = rows["128"]["mebibytes"] / rows["512"]["mebibytes"]
        report.judge(f"{label}: memory of 128 MiB buckets, of all at once", memory, at_most=0.99)


def main() -> None:
    parser = make_parser(__doc__, rounds=7)
    parser.add_argument("--of_rank", nargs=2, type=Path, help=argparse.SUPPRESS)  # in the processes that gather
    if "--of_rank" in sys.argv:
        args = parser.parse_args()
        table = measure_gathering(args.of_rank[0], args.rounds)
        if os.environ["RANK"] == "0":
            args.of_rank[1].write_text(json.dumps(table), encoding="utf-8")
        return
    args = parse(parser)

    from lightrft.utils.console import console

    report = Report("sync", args.rounds, console.print)
    console.redirect(report.log)
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder) / "model"
        write_random_model(model)
        gathering = gather_on_two(model, args.rounds, report.log)
        paths = {"demo": (args.demo_dir / "model").resolve(), "random": model}
        models = {label: measure_sync(path, args.rounds) for label, path in paths.items()}
    judge(report, models, gathering)
    report.finish(models=models, gathering=gathering)


if __name__ == "__main__":
    main()
