#!/usr/bin/env python3
"""A training micro-step of Qwen2-Audio-7B's shape, with random weights, on one GPU.

    python benchmarks/gpu/bench_7b.py                       # one GPU of 80 GB
    python benchmarks/gpu/bench_7b.py --small --rounds 2    # the same code on a CPU, to see that it runs

Work: forward and backward over 8 responses to one prompt with a clip of 10 s, 64, 128 and 256 tokens each, in bfloat16
(float32 on a CPU) with scaled dot product attention. For each: seconds, tokens a second, peak memory, and model FLOP
utilisation: three times the floating-point operations of the forward pass (``torch.utils.flop_counter``; what is
computed again in the backward pass does not count) a second, as a share of what the device reaches in a matrix product
of that type, measured in the same run. Limit on a GPU: 45 % with 256 tokens. Then

- the ``hf`` engine's tokens a second, and how far its log-probs are from the training forward's, in bfloat16;
- what each measure saves, the step without it against the step with it, as ratios of interleaved pairs: the tower once
  per clip, the prompt once per group, logits in chunks, the outputs of a frozen tower kept;
- with ``--profile FOLDER`` a picture of one step (``step.png``: time by kind of work beside the time that the model's
  operations need at the measured peak; the rest is what is left on the table) and a trace for ui.perfetto.dev.

Not run on a GPU yet.
"""

from __future__ import annotations

import contextlib
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(1, str(Path(__file__).resolve().parents[1]))
from harness import Report, forget_peak, make_parser, parse, peak_bytes, ratio

BATCH, AUDIO, CLIP_FRAMES, AUDIO_TOKENS, TEXT = 8, 3, 1000, 250, 94  # the placeholder of the demo's tokenizer
MFU = 0.45  # limit
KINDS = {  # of kernels and operators, by parts of their names; the first that fits
    "attention": ("attention", "flash", "fmha"),
    "matrix products": ("gemm", "mm", "matmul", "cutlass", "xmma", "linear"),
    "convolution": ("conv",),
    "softmax, cross entropy": ("softmax", "nll_loss"),
    "copies": ("copy", "memcpy", "memset", "cat", "index", "fill", "zero"),
}
SIZES = {  # audio: layers, heads, width; text: layers, heads, width, intermediate, vocabulary
    "real": ((32, 20, 1280), (32, 32, 4096, 11_008, 156_032)),
    "small": ((1, 2, 64), (2, 2, 64, 128, 152_000)),
}


def build_model(size: str, device: torch.device, dtype: torch.dtype) -> Any:
    """A Qwen2-Audio with random weights.

    :param size: Of :data:`SIZES`.
    :param device: Where its weights are made.
    """
    from transformers import Qwen2AudioConfig, Qwen2AudioForConditionalGeneration

    from aqa.common.patch import Patch
    from aqa.patches.actor import patch_policy

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
    :return: Tokens a second, mean and largest absolute difference.
    """
    from audio_dataset import AudioMultimodalProcessor

    from aqa.patches.slots import unpack_clips
    from demo.tiny_model import build_processor
    from demo.warm_start import render_question
    from lightrft.engines.base import Sampling
    from lightrft.engines.hf_engine import HFEngine

    processor = build_processor()
    rate = processor.feature_extractor.sampling_rate
    wave = 0.1 * torch.randn(10 * rate, generator=torch.Generator().manual_seed(2)).numpy()
    prompt = render_question(processor, "What do you hear in the audio?", ["bell", "rain", "horn", "hum"])
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
    """Wall time, until the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    started = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


def matrix_peak(device: torch.device, dtype: torch.dtype, size: int, rounds: int) -> float:
    """Floating-point operations a second of a matrix product.

    :param rounds: The best of so many.
    """
    a = torch.randn(size, size, device=device).to(dtype)
    return 2 * size**3 / min(seconds_of(lambda: a @ a, device) for _ in range(rounds + 2))


def peak_memory(device: torch.device, work: Callable[[], Any]) -> int:
    """Most bytes in use during some work: of the GPU's memory or, on a CPU, of this process."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        work()
        return torch.cuda.max_memory_allocated()
    forget_peak()
    work()
    return peak_bytes()


def by_kind(events: list[tuple[str, float]]) -> dict[str, float]:
    """Seconds of each of :data:`KINDS`, and of the rest.

    :param events: Name and seconds of kernels (on a GPU) or operators.
    """
    found = dict.fromkeys((*KINDS, "element by element"), 0.0)
    for name, seconds in events:
        fits = (kind for kind, parts in KINDS.items() if any(part in name.lower() for part in parts))
        found[next(fits, "element by element")] += seconds
    return found


def profile(step: Callable[[], Any], ideal: float, device: torch.device, folder: Path) -> dict[str, float]:
    """Where the time of one step goes.

    :param ideal: Seconds that its operations need at the measured peak.
    :param folder: Gets ``step.png`` and ``trace.json``.
    :return: Seconds by kind; ``idle`` is when nothing ran on the GPU.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    folder.mkdir(parents=True, exist_ok=True)
    step()
    with torch.profiler.profile() as profiler:
        seconds = seconds_of(step, device)
    profiler.export_chrome_trace(str(folder / "trace.json"))
    on_gpu = device.type == "cuda"
    kernels = [e for e in profiler.events() if not on_gpu or e.device_type == torch.profiler.DeviceType.CUDA]
    times = [(e.name, (e.self_device_time_total if on_gpu else e.self_cpu_time_total) / 1e6) for e in kernels]
    kinds = by_kind(times)
    if on_gpu:
        kinds["idle"] = max(0.0, seconds - sum(kinds.values()))
    figure, ax = plt.subplots(figsize=(8, 3), layout="constrained")
    names = list(reversed(kinds))
    ax.barh(names, [1000 * kinds[name] for name in names], color="#1f5fa8")
    ax.axvline(1000 * ideal, color="#c0392b", linestyle="--", label="all operations at the measured matrix peak")
    ax.set(xlabel="milliseconds", title=f"One training step, {1000 * seconds:.0f} ms, by kind of work")
    ax.legend(frameon=False)
    for side in ("top", "right"):
        ax.spines[side].set_visible(False)
    figure.savefig(folder / "step.png", dpi=120)
    return kinds | {"step": seconds, "ideal": ideal}


def main() -> None:
    """Measure, print, write."""
    parser = make_parser(__doc__, rounds=5, demo=False)
    parser.add_argument("--small", action="store_true", help="a tiny model, short responses, also on a CPU")
    parser.add_argument("--profile", type=Path, metavar="FOLDER", help="write a picture and a trace of one step there")
    args = parse(parser)
    if not args.small and not torch.cuda.is_available():
        raise SystemExit("no GPU here: --small runs the same code with a tiny model")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    report = Report("gpu_7b", args.rounds)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32  # which CPUs without its instructions emulate
    model = build_model("small" if args.small else "real", device, dtype)
    peak = matrix_peak(device, dtype, 512 if args.small else 8192, args.rounds)
    name = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    print(f"{name}: {peak / 1e12:.3g} TFLOP/s in a matrix product of {dtype}, torch {torch.__version__}")
    if device.type == "cpu":
        print("a CPU: this shows that the code runs; nothing here is a figure of a GPU")

    def step(batch: dict[str, torch.Tensor]) -> None:
        model(**batch).mean().backward()
        model.zero_grad()

    lengths = (8, 16, 32) if args.small else (64, 128, 256)
    steps = {}
    for response in lengths:
        batch = make_batch(response, 1, device)
        with FlopCounterMode(display=False) as counter:
            model(**batch)
        flops = 3 * counter.get_total_flops()
        memory = peak_memory(device, lambda batch=batch: step(batch)) / 2**30
        seconds = statistics.median(seconds_of(lambda batch=batch: step(batch), device) for _ in range(args.rounds))
        steps[response] = {"seconds": seconds, "mfu": flops / seconds / peak, "peak_gibibytes": memory}
        print(f"{response:4} tokens: {seconds:.3f} s, peak memory {memory:.2f} GiB")
        report.judge(f"7B step, {response} tokens: sampled tokens a second", BATCH * response / seconds)
        limit = MFU if response == max(lengths) and not args.small else None
        report.judge(f"7B step, {response} tokens: model FLOP utilisation", flops / seconds / peak, at_least=limit)

    sampled = rollout(model.to(torch.bfloat16), max(lengths), device)
    model.to(dtype)
    report.judge("hf engine: tokens a second, bfloat16", sampled["tokens_per_second"])
    report.judge("hf engine: mean difference of log-probs, bfloat16", sampled["gap_mean"])
    report.judge("hf engine: largest difference of log-probs, bfloat16", sampled["gap_max"])

    ratios = {}
    for way, (without, with_it) in measures(model, step, max(lengths), device).items():
        pairs = [(seconds_of(without, device), seconds_of(with_it, device)) for _ in range(args.rounds + 1)]
        ratios[way] = ratio(*zip(*pairs[1:], strict=True))
        report.judge(f"7B step: {way}, times faster", ratios[way])
    shares = {}
    if args.profile:
        shares = profile(lambda: step(batch), flops / peak, device, args.profile)
        print(f"{args.profile / 'step.png'}, {args.profile / 'trace.json'}")
    report.finish(device=name, peak_tflops=peak / 1e12, steps=steps, rollout=sampled, ratios=ratios, profile=shares)


def measures(
    model: Any, step: Callable[[dict[str, torch.Tensor]], None], response: int, device: torch.device
) -> dict[str, tuple[Callable[[], None], Callable[[], None]]]:
    """A step without each measure, and with all.

    :param model: From :func:`build_model`.
    :param step: Forward and backward of a batch.
    :param response: Tokens a response.
    """
    from aqa.policy import forward, token_log_probs
    from aqa.policy.tower_cache import share_tower_outputs

    batch, clip_a_sample = make_batch(response, 1, device), make_batch(response, BATCH, device)
    decoder, tower = forward.parts_of(model).decoder, forward.parts_of(model).tower

    def without_prefix() -> None:
        decoder.gradient_checkpointing = True  # only the policy's forward looks at it: no layer checkpoints
        step(batch)
        decoder.gradient_checkpointing = False

    def without_chunks() -> None:
        at_once, token_log_probs.LOGITS_AT_ONCE = token_log_probs.LOGITS_AT_ONCE, 2**62
        step(batch)
        token_log_probs.LOGITS_AT_ONCE = at_once

    def frozen(cache: Any) -> None:
        tower.requires_grad_(False)
        model.tower_cache = cache
        step(batch)
        model.tower_cache = None
        tower.requires_grad_(True)

    tower.requires_grad_(False)
    cache = share_tower_outputs(model)
    tower.requires_grad_(True)
    model.tower_cache = None
    return {
        "tower once per clip": (lambda: step(clip_a_sample), lambda: step(batch)),
        "prompt once per group": (without_prefix, lambda: step(batch)),
        "logits in chunks": (without_chunks, lambda: step(batch)),
        "frozen tower's outputs kept": (lambda: frozen(None), lambda: frozen(cache)),
    }


if __name__ == "__main__":
    main()
