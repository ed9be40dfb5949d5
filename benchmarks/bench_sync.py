#!/usr/bin/env python3
"""Seconds of a weight sync, trainer to vLLM, against one plain copy of the same bytes.

    python benchmarks/bench_sync.py --demo_dir results/demo

Work: the trainer's float32 weights into the engine, caches emptied, what arrived compared; all of them, and what
trains when the audio tower is frozen. Baseline: ``copy_`` of each tensor that is sent into memory of its own.
``reload_weights`` is vLLM's own way: all weights, nothing compared. Models: the demo's, and a random one of about 100 M
parameters, where the bytes and not the number of tensors count. Rounds are interleaved; a ratio is the median over the
rounds. Limit, on a GPU: 2 times the copy for the large model; status 1 beyond it. On a CPU there is none, because vLLM
packs most weights anew there, which costs more than copying them. Written to ``benchmarks/results/<date>_sync.json``.
"""

from __future__ import annotations

import argparse
import functools
import statistics
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from harness import ROOT, Report, ratio, take_turns

sys.path[:0] = [str(ROOT / "runtime"), str(ROOT / "examples" / "r1_aqa"), str(ROOT / "examples" / "r1_aqa" / "demo")]

LIMIT = 2.0  # times a copy, on a GPU


def strategy_flags(**flags: Any) -> SimpleNamespace:
    """What a strategy wants to know.

    :param flags: Beside the usual values.
    """
    usual = {
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
    return SimpleNamespace(**usual | flags)


def random_config(tokenizer: Any) -> Any:
    """Of a Qwen2-Audio of 99 M parameters, 27 M of them in the tower.

    :param tokenizer: Of the demo's model.
    """
    from make_model import AUDIO, CLIP_SECONDS, N_MELS
    from transformers import Qwen2AudioConfig

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
    return Qwen2AudioConfig(audio_config=audio, text_config=text, audio_token_index=index)


def write_random_model(folder: Path) -> None:
    """Write a model of that size with random weights.

    :param folder: To write.
    """
    import torch
    from make_model import build_processor, save
    from transformers import Qwen2AudioForConditionalGeneration

    processor = build_processor()
    torch.manual_seed(0)
    save(Qwen2AudioForConditionalGeneration(random_config(processor.tokenizer)), processor, folder)


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

    strategy = DeepspeedStrategy(strategy_flags(zero_stage=0))
    actor = ActorAL(str(path), bf16=False)
    actor.model.to(strategy.device)
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


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--demo_dir", type=Path, default=Path("results/demo"), help="where make demo put its files")
    parser.add_argument("--rounds", type=int, default=7, help="interleaved rounds (default: %(default)s)")
    args = parser.parse_args()

    from lightrft.utils.console import console

    report = Report("sync", __doc__, args.rounds, console.print)
    console.redirect(report.log)
    models = {}
    with tempfile.TemporaryDirectory() as folder:
        write_random_model(Path(folder) / "model")
        for label, path in (("demo", args.demo_dir / "model"), ("random", Path(folder) / "model")):
            models[label] = table = measure(path.resolve(), args.rounds)
            for name, row in table.items():
                console.print(
                    f"{label:6}  {name:19}  {row['mebibytes']:6.1f} MiB  {1000 * row['seconds']:8.2f} ms  "
                    f"{row['ratio']:6.2f} x a copy ({row['cpu_ratio']:.2f} x in CPU time)"
                )
    large = models["random"]
    import torch

    limit = LIMIT if torch.cuda.is_available() else None
    report.judge("weight sync, 99 M parameters: times a plain copy", large["sync of all"]["ratio"], at_most=limit)
    report.judge("vLLM's own reload, unchecked: times a plain copy", large["reload_weights"]["ratio"])
    report.judge("weight sync of what trains: times a plain copy of it", large["sync of what trains"]["ratio"])
    report.judge("weight sync, demo's model: milliseconds", 1000 * models["demo"]["sync of all"]["seconds"])
    report.finish(models=models)


if __name__ == "__main__":
    main()
