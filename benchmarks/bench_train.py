#!/usr/bin/env python3
"""What the policy's forward and backward save, each measure against leaving it out.

    python benchmarks/bench_train.py

1. Memory and time with Qwen2-Audio's vocabulary of 156,032: a micro-batch of 8 responses, 600 tokens each (a prompt of
   344 with a clip of 10 s, 256 sampled), a random model of 2 layers of width 128. Baseline: plain transformers, a clip
   a sample padded to 30 s, logits of all positions. Each run is a process of its own; memory is its peak above what it
   held before the step.
2. Time with a random model of 4 layers of width 256 and a vocabulary of 8,192: 8 responses of 64 tokens to one prompt
   with a clip of 10 s. Baseline: the same forward with one measure left out: the tower once per clip, the prompt once
   per group, the outputs of a frozen tower kept.

Float32, the same threads on both sides. Limits: a third of the memory, and faster; tower and prompt faster than
without.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import torch
from harness import Report, forget_peak, make_parser, parse, peak_bytes, ratio, take_turns, timed

AUDIO, CLIP_FRAMES, AUDIO_TOKENS = 7, 1000, 250
VOCABULARY, BATCH = 156_032, 8
KEPT = "frozen tower kept"


def build_model(layers: int, width: int, vocabulary: int) -> Any:
    """A random Qwen2-Audio.

    :param layers: Of tower and language model.
    """
    from transformers import Qwen2AudioConfig, Qwen2AudioForConditionalGeneration

    audio = {"encoder_layers": layers, "encoder_attention_heads": 4, "encoder_ffn_dim": 4 * width, "d_model": width}
    audio |= {"model_type": "qwen2_audio_encoder", "num_mel_bins": 128, "max_source_positions": 1500}
    text = {"model_type": "qwen2", "vocab_size": vocabulary, "hidden_size": width, "intermediate_size": 4 * width}
    text |= {"num_hidden_layers": layers, "num_attention_heads": 4, "num_key_value_heads": 4}
    torch.manual_seed(0)
    model = Qwen2AudioForConditionalGeneration(
        Qwen2AudioConfig(audio_config=audio, text_config=text, audio_token_index=AUDIO)
    )
    model.config.use_cache = False
    return model


def make_batch(vocabulary: int, text: int, response: int) -> dict[str, torch.Tensor]:
    """8 responses to one prompt with a clip of 10 s.

    :param text: Text tokens of the prompt.
    :param response: Tokens a response.
    :return: Arguments of ``response_log_probs``.
    """
    generator = torch.Generator().manual_seed(1)
    prompt = torch.randint(8, vocabulary, (text,), generator=generator)
    prompt = torch.cat([prompt[:4], torch.full((AUDIO_TOKENS,), AUDIO), prompt[4:]])
    sampled = torch.randint(8, vocabulary, (BATCH, response), generator=generator)
    sequences = torch.cat([prompt.expand(BATCH, -1), sampled], 1)
    features = torch.randn(1, 128, 3000, generator=generator)
    features[:, :, CLIP_FRAMES + 2 :] = 0
    return {
        "sequences": sequences,
        "attention_mask": torch.ones_like(sequences),
        "response_mask": torch.ones_like(sampled),
        "features": features,
        "frames": torch.tensor([CLIP_FRAMES]),
        "clip_index": torch.zeros(BATCH, dtype=torch.long),
    }


def plain_log_probs(model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Transformers' forward with a clip a sample, and the log-softmax of all its logits.

    :param batch: From :func:`make_batch`.
    """
    width = batch["response_mask"].shape[1]
    mask = (torch.arange(3000) < CLIP_FRAMES).long()[None].expand(BATCH, -1)
    logits = model(
        input_ids=batch["sequences"],
        attention_mask=batch["attention_mask"],
        input_features=batch["features"].expand(BATCH, -1, -1),
        feature_attention_mask=mask,
    ).logits
    log_probs = logits[:, :-1].float().log_softmax(-1)
    return log_probs.gather(-1, batch["sequences"][:, 1:, None])[:, -width:, 0]


def make_policy(model: Any) -> Callable[[dict[str, torch.Tensor]], torch.Tensor]:
    """Our forward."""
    from aqa.common.patch import Patch
    from aqa.patches.actor import patch_policy

    patch_policy(Patch(), model)
    return lambda batch: model(**batch)


def forward_and_backward(forward: Callable[[], torch.Tensor]) -> torch.Tensor:
    """A micro-batch.

    :return: These.
    """
    values = forward()
    values.mean().backward()
    return values.detach()


def run_once(way: str) -> None:
    """One process of the first part: print seconds, peak bytes and the sum of the log-probs.

    :param way: ``plain`` or ``ours``.
    """
    model, batch = build_model(2, 128, VOCABULARY).train(), make_batch(VOCABULARY, 94, 256)
    policy = make_policy(model) if way == "ours" else lambda batch: plain_log_probs(model, batch)
    forget_peak()  # of building the model
    before = peak_bytes()
    took, values = timed(lambda: forward_and_backward(lambda: policy(batch)))
    peak = peak_bytes() - before
    grads = sum(float(p.grad.double().norm()) for p in model.parameters() if p.grad is not None)
    print(json.dumps([took.wall, peak, float(values.double().sum()), grads, took.cpu]))


def compare_processes(rounds: int) -> dict[str, Any]:
    """The first part."""
    results: dict[str, list[list[float]]] = {"plain": [], "ours": []}
    for _ in range(rounds):
        for way, found in results.items():
            command = [sys.executable, __file__, "--way", way]
            done = subprocess.run(command, capture_output=True, text=True, env=os.environ)
            if done.returncode != 0:
                raise SystemExit(f"{way} ended with {done.returncode}: {done.stderr[-2000:]}")
            found.append(json.loads(done.stdout.splitlines()[-1]))
    plain, ours = results["plain"], results["ours"]
    for a, b in zip(plain, ours, strict=True):
        if abs(a[2] - b[2]) > 1e-6 * abs(a[2]) or abs(a[3] - b[3]) > 1e-4 * a[3]:
            raise SystemExit(f"the two ways differ: log-probs {a[2]} and {b[2]}, gradients {a[3]} and {b[3]}")
    median = statistics.median
    return {
        "plain_seconds": round(median(a[0] for a in plain), 2),
        "our_seconds": round(median(b[0] for b in ours), 2),
        "plain_peak_mebibytes": round(median(a[1] for a in plain) / 2**20),
        "our_peak_mebibytes": round(median(b[1] for b in ours) / 2**20),
        "times_faster": round(ratio([a[0] for a in plain], [b[0] for b in ours]), 2),
        "cpu_times_faster": round(ratio([a[4] for a in plain], [b[4] for b in ours]), 2),
        "share_of_memory": round(ratio([b[1] for b in ours], [a[1] for a in plain]), 3),
    }


def compare_measures(rounds: int) -> dict[str, dict[str, float]]:
    """The second part.

    :return: Seconds, and CPU seconds, without a measure divided by those with all, for each.
    """
    from aqa.policy import forward
    from aqa.policy.tower_cache import share_tower_outputs

    batch = make_batch(8192, 40, 64)
    model, frozen = build_model(4, 256, 8192).train(), build_model(4, 256, 8192).train()
    plain = build_model(4, 256, 8192).train()
    ours, cached = make_policy(model), make_policy(frozen)
    forward.parts_of(frozen).tower.requires_grad_(False)
    cache = share_tower_outputs(frozen)
    decoder = forward.parts_of(model).decoder
    clip_a_sample = batch | {
        "features": batch["features"].expand(BATCH, -1, -1),
        "frames": batch["frames"].expand(BATCH),
        "clip_index": torch.arange(BATCH),
    }

    def without_prefix(batch: dict[str, torch.Tensor]) -> torch.Tensor:
        decoder.gradient_checkpointing = True  # only looked at by the policy's forward: no layer checkpoints
        try:
            return ours(batch)
        finally:
            decoder.gradient_checkpointing = False

    def without_cache(batch: dict[str, torch.Tensor]) -> torch.Tensor:
        del frozen.tower_cache
        try:
            return cached(batch)
        finally:
            frozen.tower_cache = cache

    pairs = {
        "tower once per clip": (lambda: ours(clip_a_sample), lambda: ours(batch)),
        "prompt once per group": (lambda: without_prefix(batch), lambda: ours(batch)),
        KEPT: (lambda: without_cache(batch), lambda: cached(batch)),
        "all, against plain transformers": (lambda: plain_log_probs(plain, batch), lambda: ours(batch)),
    }
    table = {}
    for name, (without, with_it) in pairs.items():
        turns = take_turns(
            {"without": lambda f=without: forward_and_backward(f), "with": lambda f=with_it: forward_and_backward(f)},
            rounds,
        )
        table[name] = {
            "times_faster": round(ratio([s.wall for s in turns["without"]], [s.wall for s in turns["with"]]), 2),
            "cpu_times_faster": round(ratio([s.cpu for s in turns["without"]], [s.cpu for s in turns["with"]]), 2),
        }
    return table


def main() -> None:
    """Measure, print, write."""
    parser = make_parser(__doc__, rounds=5, demo=False)
    parser.add_argument("--way", choices=("plain", "ours"), help=argparse.SUPPRESS)
    args = parse(parser)
    if args.way:
        run_once(args.way)
        return
    report = Report("train", args.rounds)
    measures = compare_measures(args.rounds)
    for name, row in measures.items():
        limit = None if name == KEPT else 1.0  # one clip's forward of many operations: too near to 1 to be judged
        report.judge(f"forward and backward: {name}, times faster", row["times_faster"], at_least=limit)
    big = compare_processes(args.rounds)
    print(
        f"vocabulary of {VOCABULARY:,}, 8 x 600 tokens: {big['plain_seconds']} -> {big['our_seconds']} s, peak "
        f"{big['plain_peak_mebibytes']} -> {big['our_peak_mebibytes']} MiB"
    )
    report.judge("vocabulary of 156,032: share of plain's peak memory", big["share_of_memory"], at_most=1 / 3)
    report.judge("vocabulary of 156,032: times faster than plain", big["times_faster"], at_least=1)
    report.finish(measures=measures, vocabulary=big)


if __name__ == "__main__":
    main()
