#!/usr/bin/env python3
"""A training micro-step of Qwen2-Audio-7B's shape, with random weights, on one GPU.

    python benchmarks/gpu/bench_7b.py                       # one GPU of 80 GB
    python benchmarks/gpu/bench_7b.py --small --rounds 2    # the same code on a CPU, to see that it runs

Work: forward and backward over 8 responses to one prompt with a clip of 10 s, 64, 128 and 256 tokens each, in bfloat16
(float32 on a CPU) with scaled dot product attention. Printed for each: seconds, tokens a second, peak memory, and the
floating-point operations that were done (as ``torch.utils.flop_counter`` counts them) as a share of what the device
reaches in a matrix product of that type, measured in the same run; the ``hf`` engine's tokens a second, and how far its
log-probs are from the training forward's; and what each measure saves, as a ratio of medians of interleaved pairs: the
tower once per clip, the prompt once per group, logits in chunks. With ``--profile FILE`` a trace of one step for
Perfetto (ui.perfetto.dev). Written to ``benchmarks/results/<date>_gpu_7b.json``.

Not run on a GPU yet.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import sys
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "examples" / "r1_aqa"), str(ROOT / "runtime")]

BATCH, AUDIO, CLIP_FRAMES, AUDIO_TOKENS, TEXT = 8, 3, 1000, 250, 94  # the placeholder of the demo's tokenizer
SIZES = {  # audio: layers, heads, width; text: layers, heads, width, intermediate, vocabulary
    "real": ((32, 20, 1280), (32, 32, 4096, 11_008, 156_032)),
    "small": ((1, 2, 64), (2, 2, 64, 128, 152_000)),
}


def build_model(size: str, device: torch.device, dtype: torch.dtype) -> Any:
    """A Qwen2-Audio with random weights.

    :param size: Of :data:`SIZES`.
    :param device: Where its weights are made.
    :param dtype: Of its weights.
    """
    from audio_patches import Patch, patch_policy
    from transformers import Qwen2AudioConfig, Qwen2AudioForConditionalGeneration

    (layers, heads, width), (text_layers, text_heads, text_width, intermediate, vocabulary) = SIZES[size]
    audio = {"model_type": "qwen2_audio_encoder", "num_mel_bins": 128, "max_source_positions": 1500}
    audio |= {"encoder_layers": layers, "encoder_attention_heads": heads}
    audio |= {"encoder_ffn_dim": 4 * width, "d_model": width}
    text = {"model_type": "qwen2", "vocab_size": vocabulary, "hidden_size": text_width}
    text |= {"num_hidden_layers": text_layers, "num_attention_heads": text_heads, "num_key_value_heads": text_heads}
    text |= {"intermediate_size": intermediate, "tie_word_embeddings": False}
    config = Qwen2AudioConfig(audio_config=audio, text_config=text, audio_token_index=AUDIO)
    config.use_cache = False
    torch.manual_seed(0)
    with device:
        model = Qwen2AudioForConditionalGeneration._from_config(config, dtype=dtype)
    patch_policy(Patch(), model)
    return model.train()


def make_batch(response: int, clips: int, device: torch.device) -> dict[str, torch.Tensor]:
    """8 responses to one prompt with a clip of 10 s.

    :param response: Tokens a response.
    :param clips: 1, or 8 for one encoding a response.
    :param device: Where it is put.
    :return: Arguments of ``response_log_probs``.
    """
    generator = torch.Generator().manual_seed(1)
    prompt = torch.randint(8, 500, (TEXT,), generator=generator)
    prompt = torch.cat([prompt[:4], torch.full((AUDIO_TOKENS,), AUDIO), prompt[4:]])
    sampled = torch.randint(8, 500, (BATCH, response), generator=generator)
    sequences = torch.cat([prompt.expand(BATCH, -1), sampled], 1)
    features = torch.randn(1, 128, 3000, generator=generator)
    features[:, :, CLIP_FRAMES + 2 :] = 0
    batch = {
        "sequences": sequences,
        "attention_mask": torch.ones_like(sequences),
        "response_mask": torch.ones_like(sampled),
        "features": features.expand(clips, -1, -1).contiguous(),
        "frames": torch.full((clips,), CLIP_FRAMES),
        "clip_index": torch.arange(BATCH) % clips,
    }
    return {name: tensor.to(device) for name, tensor in batch.items()}


def rollout(model: Any, response: int, device: torch.device) -> dict[str, float]:
    """Sample 8 responses to a prompt with the ``hf`` engine, and compare its log-probs with the training forward's.

    :param model: From :func:`build_model`.
    :param response: Tokens a response.
    :param device: Where it runs.
    :return: Tokens a second, mean and largest absolute difference.
    """
    from audio_dataset import AudioMultimodalProcessor
    from audio_slots import unpack_clips
    from demo.make_model import build_processor
    from demo.warm_start import render_prompt

    from lightrft.engines.base import Sampling
    from lightrft.engines.hf_engine import HFEngine

    processor = build_processor()
    rate = processor.feature_extractor.sampling_rate
    wave = 0.1 * torch.randn(10 * rate, generator=torch.Generator().manual_seed(2)).numpy()
    prompt = render_prompt(processor, "What do you hear in the audio?", ["bell", "rain", "horn", "hum"])
    bias = {AUDIO: -100.0}
    engine = HFEngine(processor, lambda: contextlib.nullcontext(model))
    request = {"prompt": prompt, "multi_modal_data": {"audio": [(wave, rate)]}}
    outputs: list[Any] = []

    def sample() -> None:
        outputs[:] = engine.generate([request], [Sampling(n=BATCH, max_tokens=response, logit_bias=bias, seed=0)])

    sample()
    seconds = seconds_of(sample, device)
    data = AudioMultimodalProcessor(processor.tokenizer, processor, 512).process_multimodal_batch(
        [prompt], [(wave, rate)], None, None, 1
    )
    clips = unpack_clips(data["all_images_pixel_values"], data["all_images_grid_thw"])
    rows = [torch.tensor(output.output_token_ids) for output in outputs]
    padded = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
    prompt_ids = torch.tensor(outputs[0].prompt_token_ids).expand(BATCH, -1)
    with torch.no_grad():
        values = model(
            sequences=torch.cat([prompt_ids, padded], 1).to(device),
            attention_mask=torch.cat([torch.ones_like(prompt_ids), mask], 1).to(device),
            response_mask=mask.to(device),
            features=clips.features.to(device),
            frames=clips.frames.to(device),
            clip_index=clips.index.expand(BATCH).to(device),
            logit_bias=bias,
        ).cpu()
    gaps = torch.cat([(values[i, : len(row)] - outputs[i].output_log_probs).abs() for i, row in enumerate(rows)])
    return {
        "tokens_per_second": float(mask.sum()) / seconds,
        "gap_mean": gaps.mean().item(),
        "gap_max": gaps.max().item(),
    }


def seconds_of(work: Callable[[], Any], device: torch.device) -> float:
    """Wall time, until the device is done.

    :param work: To run.
    :param device: Where it runs.
    """
    if device.type == "cuda":
        torch.cuda.synchronize()
    started = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


def matrix_peak(device: torch.device, dtype: torch.dtype, size: int, rounds: int) -> float:
    """Floating-point operations a second of a matrix product.

    :param device: Where.
    :param dtype: Of the matrices.
    :param size: Of the square matrices.
    :param rounds: The best of so many.
    """
    a = torch.randn(size, size, device=device).to(dtype)
    return 2 * size**3 / min(seconds_of(lambda: a @ a, device) for _ in range(rounds + 2))


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="a tiny model with the real vocabulary, also on a CPU")
    parser.add_argument("--rounds", type=int, default=5, help="runs of each measurement (default: %(default)s)")
    parser.add_argument("--profile", type=Path, help="write a trace of one step of 256 tokens to this file")
    args = parser.parse_args()
    if not args.small and not torch.cuda.is_available():
        raise SystemExit("no GPU here: --small runs the same code with a tiny model")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    import audio_policy
    import token_log_probs

    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32  # which CPUs without its instructions emulate
    model = build_model("small" if args.small else "real", device, dtype)
    peak = matrix_peak(device, dtype, 512 if args.small else 8192, args.rounds)
    name = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    print(f"{name}: {peak / 1e12:.3g} TFLOP/s in a matrix product of {dtype}, torch {torch.__version__}")

    def step(batch: dict[str, torch.Tensor]) -> None:
        model(**batch).mean().backward()
        model.zero_grad()

    result: dict[str, Any] = {"device": name, "torch": torch.__version__, "peak_tflops": peak / 1e12, "steps": {}}
    for response in (64, 128, 256):
        batch = make_batch(response, 1, device)
        with FlopCounterMode(display=False) as counter:
            step(batch)
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        seconds = statistics.median(seconds_of(lambda batch=batch: step(batch), device) for _ in range(args.rounds))
        memory = torch.cuda.max_memory_allocated() if device.type == "cuda" else 0
        used = counter.get_total_flops() / seconds / peak
        result["steps"][response] = {"seconds": seconds, "of_peak": used, "peak_gibibytes": memory / 2**30}
        print(
            f"{response:4} tokens: {seconds:.3f} s, {BATCH * response / seconds:,.0f} sampled tokens/s, "
            f"{used:.0%} of the matrix product, peak {memory / 2**30:.1f} GiB"
        )

    result["rollout"] = sampled = rollout(model, 256, device)
    print(
        f"hf engine, 256 tokens: {sampled['tokens_per_second']:,.0f} tokens/s; log-probs differ from the training "
        f"forward's by {sampled['gap_mean']:.1e} on average, {sampled['gap_max']:.1e} at most"
    )

    batch, clip_a_sample = make_batch(256, 1, device), make_batch(256, BATCH, device)
    decoder = audio_policy.parts_of(model).decoder

    def without_prefix() -> None:
        decoder.gradient_checkpointing = True  # only the policy's forward looks at it: no layer checkpoints
        step(batch)
        decoder.gradient_checkpointing = False

    def without_chunks() -> None:
        at_once, token_log_probs.LOGITS_AT_ONCE = token_log_probs.LOGITS_AT_ONCE, 2**62
        step(batch)
        token_log_probs.LOGITS_AT_ONCE = at_once

    ways = {"tower once per clip": lambda: step(clip_a_sample), "prompt once per group": without_prefix}
    ways["logits in chunks"] = without_chunks
    result["ratios"] = {}
    for way, without in ways.items():
        pairs = [(seconds_of(without, device), seconds_of(lambda: step(batch), device)) for _ in range(args.rounds + 1)]
        result["ratios"][way] = statistics.median(a / b for a, b in pairs[1:])
        print(f"{way:<22} {result['ratios'][way]:.2f} times faster")
    if args.profile:
        with torch.profiler.profile() as profiler:
            step(batch)
        profiler.export_chrome_trace(str(args.profile))
        print(f"trace: {args.profile}")
    path = ROOT / "benchmarks" / "results" / f"{date.today()}_gpu_7b.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(path.relative_to(ROOT))


if __name__ == "__main__":
    main()
