#!/usr/bin/env python3
"""Mel features for a rollout batch against extracting them once a sample, as a processor call for each response does.

    python benchmarks/bench_features.py --demo_dir results/demo

Work: 16 clips of 10 s x 8 samples. Baseline: the Hugging Face extractor for each of the 128 samples, padded to 30 s.
Limits: at least 10 times faster than it, at most 1.2 times the extractor's one pass over the 16 clips, at most an
eighth of its peak memory, which a process of its own measures. Ours is called as the runtime does (a clip's rows once,
shared by its samples) and as LightRFT does: rows once a sample, because LightRFT cuts a micro-batch's rows out of one
tensor. With clips of 10 s those rows alone are a third of what the baseline keeps, so the limits hold for the runtime.
"""

import multiprocessing
import statistics
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import numpy as np
from harness import Report, bytes_beyond, make_parser, parse, ratio, take_turns

CLIPS, SAMPLES, SECONDS = 16, 8, 10
BASE, ONE_PASS, OURS, LIGHTRFT = "once a sample", "one pass", "ours, runtime", "ours, LightRFT"


def make_ways(path: str, clips: int = CLIPS) -> dict[str, Callable[[], Any]]:
    """The ways to make the features of a batch; each returns what it keeps.

    :param path: Qwen2-Audio folder.
    """
    from audio_dataset import AudioMultimodalProcessor
    from transformers import AutoProcessor

    from aqa.audio.decode import SAMPLING_RATE
    from aqa.data.prompts import render_chat

    processor = AutoProcessor.from_pretrained(path)
    ours = AudioMultimodalProcessor(processor.tokenizer, processor, 512)
    waves = np.random.default_rng(0).uniform(-0.5, 0.5, (clips, SECONDS * SAMPLING_RATE)).astype(np.float32)
    content = [{"type": "audio", "audio_url": "a.wav"}, {"type": "text", "text": "What is it?"}]
    prompts = [render_chat(processor, [{"role": "user", "content": content}])] * clips
    audio = [(wave, SAMPLING_RATE) for wave in waves]

    def extract(times: int) -> list[Any]:
        one = processor.feature_extractor
        settings = {"sampling_rate": SAMPLING_RATE, "return_tensors": "pt"}
        return [one(wave, **settings)["input_features"] for wave in waves for _ in range(times)]

    def process(times: int) -> Any:
        return ours.process_multimodal_batch(prompts, audio, None, None, times)["all_images_pixel_values"]

    return {
        BASE: lambda: extract(SAMPLES),
        ONE_PASS: lambda: extract(1),
        OURS: lambda: process(1),
        LIGHTRFT: lambda: process(SAMPLES),
    }


def memory_of(path: str, name: str) -> int:
    """Bytes that a way needs on top of a process that is ready for it.

    :param path: Qwen2-Audio folder.
    """
    make_ways(path, 1)[name]()  # what is made once, in torch and transformers
    return bytes_beyond(make_ways(path)[name])[0]


def main() -> None:
    args = parse(make_parser(__doc__, rounds=5))
    import torch

    report = Report("features", args.rounds)
    model = str(args.demo_dir / "model")
    ways = make_ways(model)
    rows = ways[OURS]().unflatten(0, (CLIPS, -1))
    expected = torch.cat(ways[ONE_PASS]())[:, :, : rows.shape[1]].transpose(1, 2)
    difference = float((rows - expected).abs().max())
    del rows, expected
    seconds = take_turns(ways, args.rounds)
    wall = {name: [s.wall for s in times] for name, times in seconds.items()}
    cpu = {name: [s.cpu for s in times] for name, times in seconds.items()}
    bytes_ = {}
    for name in ways:
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            bytes_[name] = pool.submit(memory_of, model, name).result()
    table = {}
    for name in ways:
        table[name] = {
            "seconds": round(statistics.median(wall[name]), 4),
            "cpu_seconds": round(statistics.median(cpu[name]), 4),
            "times_faster": round(ratio(wall[BASE], wall[name]), 2),
            "cpu_times_faster": round(ratio(cpu[BASE], cpu[name]), 2),
            "passes": round(ratio(wall[name], wall[ONE_PASS]), 3),
            "mebibytes": round(bytes_[name] / 2**20, 1),
            "memory_share": round(bytes_[name] / bytes_[BASE], 3),
        }
        row = table[name]
        print(
            f"{name:15}  {row['seconds']:7.3f} s   {row['times_faster']:6.1f} x ({row['cpu_times_faster']:.1f} x in "
            f"CPU time)   {row['passes']:6.2f} passes   {row['mebibytes']:6.1f} MiB ({row['memory_share']:.3f})"
        )
    ours = table[OURS]
    report.judge("features: times as fast as once a sample", ours["times_faster"], at_least=10)
    report.judge("features: of one pass over the clips", ours["passes"], at_most=1.2)
    report.judge("features: share of the memory of once a sample", ours["memory_share"], at_most=1 / 8)
    report.judge("features: share of memory, inside LightRFT", table[LIGHTRFT]["memory_share"])
    report.judge("features: largest difference of a value", difference, at_most=1e-5)
    report.finish(clips=CLIPS, samples=SAMPLES, seconds_a_clip=SECONDS, ways=table)


if __name__ == "__main__":
    main()
