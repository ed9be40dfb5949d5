#!/usr/bin/env python3
"""Seconds of a weight sync, trainer to vLLM, against one plain copy of the same bytes.

    python benchmarks/bench_sync.py --model_path results/demo/model

Work: the trainer's float32 weights into the engine, caches emptied, what arrived compared; all of them, and what
trains when the audio tower is frozen. Baseline: ``copy_`` of each tensor that is sent into memory of its own.
``reload_weights`` is vLLM's own way: all weights, nothing compared. Models: the demo's, and a random one of about 100 M
parameters. Rounds are interleaved; a ratio is the median over the rounds. Written to
``benchmarks/results/<date>_sync.json``.

Then the random model, sharded over two processes by ZeRO-3 and by FSDP2: seconds of gathering all weights and copying
each into memory of its own, one by one, in buckets of several sizes, and all at once; and the most memory that the
process had meanwhile, beyond what it has before and after. On a CPU that includes gloo's own copy of what it gathers.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from types import SimpleNamespace
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "runtime"), str(ROOT / "examples" / "r1_aqa"), str(ROOT / "examples" / "r1_aqa" / "demo")]


FLAGS = {
    "engine_tp_size": 1,
    "seed": 0,
    "bf16": False,
    "lora_rank": 0,
    "l2": 0.0,
    "actor_learning_rate": 1e-6,
    "lr_warmup_ratio": 0.0,
    "adam_betas": (0.9, 0.95),
    "max_norm": 1.0,
    "train_batch_size": 2,
    "micro_train_batch_size": 1,
    "adam_offload": False,
    "param_offload": False,
    "fsdp_cpu_offload": False,
    "sync_bucket_mb": 512,
}
SIZES = (0, 8, 32, 128, 512)  # MiB a bucket; 0: one by one, the last: all at once


def write_random_model(folder: Path) -> None:
    """Write a Qwen2-Audio of 99 M parameters, 27 M of them in the tower.

    :param folder: To write.
    """
    import torch
    from make_model import AUDIO, CLIP_SECONDS, N_MELS, build_processor, save
    from transformers import Qwen2AudioConfig, Qwen2AudioForConditionalGeneration

    processor = build_processor()
    tokenizer = processor.tokenizer
    audio = {
        "model_type": "qwen2_audio_encoder",
        "num_mel_bins": N_MELS,
        "encoder_layers": 8,
        "encoder_attention_heads": 8,
        "encoder_ffn_dim": 2048,
        "d_model": 512,
        "max_source_positions": CLIP_SECONDS * 50,
    }
    text = {
        "model_type": "qwen2",
        "vocab_size": len(tokenizer),
        "hidden_size": 768,
        "intermediate_size": 2048,
        "num_hidden_layers": 10,
        "num_attention_heads": 12,
        "num_key_value_heads": 12,
        "max_position_embeddings": 2048,
        "tie_word_embeddings": False,
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    index = tokenizer.convert_tokens_to_ids(AUDIO)
    torch.manual_seed(0)
    model = Qwen2AudioForConditionalGeneration(
        Qwen2AudioConfig(audio_config=audio, text_config=text, audio_token_index=index)
    )
    save(model, processor, folder)


def copying(weights: list[Any]) -> Callable[[], None]:
    """The baseline.

    :param weights: Tensors to copy.
    :return: Copies them all.
    """
    import torch

    room = [torch.empty_like(tensor) for tensor in weights]

    def copy() -> None:
        for own, tensor in zip(room, weights, strict=True):
            own.copy_(tensor)

    return copy


def measure(path: Path, rounds: int) -> dict[str, Any]:
    """Seconds of each way for one model.

    :param path: Model folder.
    :param rounds: Interleaved rounds.
    :return: Way to MiB, median seconds and ratio.
    """
    import torch

    from lightrft.engines.vllm_engine import VLLMEngine
    from lightrft.models.actor_al import ActorAL
    from lightrft.strategy.deepspeed_strategy import DeepspeedStrategy

    strategy = DeepspeedStrategy(SimpleNamespace(**FLAGS, zero_stage=0))
    actor = ActorAL(str(path), bf16=False)
    for name, parameter in actor.model.named_parameters():
        if "audio_tower" in name.split("."):
            parameter.requires_grad_(False)
    engine = strategy.inference_engine = VLLMEngine(str(path), torch.float32, max_model_len=1024)

    def synchronise(whole: bool) -> None:
        strategy.engine_has_all = not whole
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
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for round_ in range(rounds + 1):
        for name, (_, way) in ways.items():
            started = time.perf_counter()
            way()
            if round_:  # the first warms up
                seconds[name].append(time.perf_counter() - started)
    table = {}
    for name, times in seconds.items():
        part = ways[name][0]
        copies = seconds["copy of all" if part == "all" else "copy of what trains"]
        ratios = [own / copy for own, copy in zip(times, copies, strict=True)]
        table[name] = {
            "mebibytes": round(sizes[part] / 2**20, 1),
            "seconds": round(statistics.median(times), 5),
            "ratio": round(statistics.median(ratios), 2),
        }
    return table


def peak_memory(work: Callable[[], None]) -> int:
    """Bytes of memory that the process had at most, beyond those at the start.

    :param work: To do.
    """

    def status(name: str) -> int:
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))

    before = status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the peak is what is there now
    work()
    return status("VmHWM") - before


def measure_sharded(path: Path, rounds: int) -> dict[str, Any]:
    """Seconds and memory of each bucket size, of ZeRO-3 and FSDP2. All ranks of a process group call it.

    :param path: Model folder.
    :param rounds: Interleaved rounds.
    :return: Strategy to bucket size to median seconds, ratio to one by one, and MiB in use at most.
    """
    import torch

    from lightrft.models.actor_al import load_model
    from lightrft.strategy.deepspeed_strategy import DeepspeedStrategy
    from lightrft.strategy.fsdp_strategy import FSDPStrategy

    table: dict[str, Any] = {}
    for kind in (DeepspeedStrategy, FSDPStrategy):
        strategy = kind(SimpleNamespace(**FLAGS, zero_stage=3))
        engine, *_ = strategy.prepare_training(load_model(str(path), dtype=torch.float32), 1)
        room = {name: tensor.clone() for name, tensor in strategy.named_weights(engine)}

        def gather(size: int, strategy: Any = strategy, engine: Any = engine, room: Any = room) -> None:
            strategy.args.sync_bucket_mb = size
            for name, tensor in strategy.named_weights(engine):
                room[name].copy_(tensor)

        seconds: dict[int, list[float]] = {size: [] for size in SIZES}
        for round_ in range(rounds + 1):
            for size in SIZES:
                torch.distributed.barrier()
                started = time.perf_counter()
                gather(size)
                if round_:  # the first warms up
                    seconds[size].append(time.perf_counter() - started)
        table[kind.__name__] = {
            size: {
                "seconds": round(statistics.median(times), 4),
                "ratio": round(statistics.median(o / t for o, t in zip(times, seconds[0], strict=True)), 3),
                "mebibytes": round(peak_memory(lambda size=size, gather=gather: gather(size)) / 2**20, 1),
            }
            for size, times in seconds.items()
        }
    return table


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_path", type=Path, default=Path("results/demo/model"), help="the demo's model")
    parser.add_argument("--rounds", type=int, default=7, help="interleaved rounds")
    parser.add_argument("--sharded", type=Path, help=argparse.SUPPRESS)  # what each of the two processes does
    args = parser.parse_args()
    if args.sharded:
        table = measure_sharded(args.model_path, args.rounds)
        if os.environ["RANK"] == "0":
            args.sharded.write_text(json.dumps(table), encoding="utf-8")
        return

    from lightrft.utils.console import console

    out = ROOT / "benchmarks" / "results" / f"{date.today()}_sync.json"
    console.redirect(out.with_name("bench_sync.log"))
    record: dict[str, Any] = {"rounds": args.rounds, "cores": os.cpu_count(), "models": {}}
    with tempfile.TemporaryDirectory() as folder:
        write_random_model(Path(folder) / "model")
        for label, path in (("demo", args.model_path), ("random", Path(folder) / "model")):
            record["models"][label] = table = measure(path.resolve(), args.rounds)
            for name, row in table.items():
                console.print(
                    f"{label:6}  {name:19}  {row['mebibytes']:6.1f} MiB  {1000 * row['seconds']:8.2f} ms  "
                    f"{row['ratio']:6.2f} x a copy"
                )
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", __file__]
        command += ["--rounds", str(args.rounds), "--model_path", f"{folder}/model", "--sharded", f"{folder}/table"]
        # freed tensors go back to the system at once, so that memory is what is in use
        environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "262144"}
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment)
        record["sharded"] = json.loads((Path(folder) / "table").read_text(encoding="utf-8"))
        for strategy, rows in record["sharded"].items():
            for size, row in rows.items():
                console.print(
                    f"{strategy:17}  {size:>3} MiB a bucket  {1000 * row['seconds']:8.2f} ms  "
                    f"{row['ratio']:6.3f} x one by one  {row['mebibytes']:6.1f} MiB at most"
                )
    out.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    console.print(f"written to {out.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
