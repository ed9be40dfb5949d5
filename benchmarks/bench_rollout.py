#!/usr/bin/env python3
"""Tokens a second of a rollout, against calling vLLM alone with the same requests.

    python benchmarks/bench_rollout.py --demo_dir results/demo

Work: the demo's model in float32, 16 prompts x 8 responses of up to 16 tokens, a clip of 1 to 10 s each. Ways:

- ``vLLM alone`` (baseline): ``LLM.generate`` with one request a prompt, ``n=8``, and the same sampling parameters;
- ``generation``: the runtime's ``gather_and_generate``. Limit: at least 0.95 of the baseline;
- ``whole rollout``: the experience maker's ``rollout``: also mel features for training, checks, experiences;
- ``a request a sample``: vLLM alone, 128 requests.

The first three must sample the same tokens. The engine's caches are emptied before each, as a weight sync does.
"""

import statistics
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from bench_step import MAX_NEW_TOKENS, PROMPTS, SAMPLES, make_questions
from harness import Report, make_parser, parse, ratio, timed

LIMIT = 0.95
BASELINE = "vLLM alone"


def make_ways(model: Path, rows: list[tuple]) -> tuple[Any, dict[str, Callable[[], list[list[int]]]]]:
    """Start the engine and what stands around it.

    :param rows: Of the dataset: prompt, ``(waveform, rate)``, reference, label.
    :return: The engine, and for each way a function that samples and returns the responses' tokens.
    """
    import torch
    from audio_dataset import patch_experience_maker_for_audio, patch_strategy_for_audio

    from aqa.data.prompts import end_tokens
    from aqa.patches.experience_maker import BANNED
    from aqa.rewards.r1_aqa import reward_fn
    from lightrft.engines.base import Sampling, stable_seed
    from lightrft.engines.vllm_engine import VLLMEngine
    from lightrft.strategy.deepspeed_strategy import DeepspeedStrategy
    from lightrft.trainer.advantages import KLController
    from lightrft.trainer.fast_exp_maker import FastExperienceMaker
    from lightrft.utils import get_tokenizer_processor_vl

    tokenizer, processor = get_tokenizer_processor_vl(str(model), None)
    args = SimpleNamespace(engine_tp_size=1, seed=0, zero_stage=0, enable_engine_sleep=False)
    strategy = DeepspeedStrategy(args)
    engine = strategy.inference_engine = VLLMEngine(str(model), torch.float32, max_model_len=1024)
    strategy.engine_mp_group = None
    patch_strategy_for_audio(strategy)
    bias = {tokenizer.convert_tokens_to_ids(processor.audio_token): BANNED}
    ends = end_tokens(tokenizer, str(model))
    sampling = Sampling(n=SAMPLES, max_tokens=MAX_NEW_TOKENS, end_ids=tuple(ends), logit_bias=bias)
    maker = FastExperienceMaker(None, None, tokenizer, strategy, KLController(0), reward_fn, {}, sampling, False)
    patch_experience_maker_for_audio(maker, processor, tokenizer, 512)
    prompts, clips, references, labels = zip(*rows, strict=True)
    seeds = [stable_seed(args.seed, 1, i) for i in range(PROMPTS)]
    alone, alone_by_sample = ways_alone(engine, prompts, clips, seeds, {"logit_bias": bias, "stop_token_ids": ends})

    def generation() -> list[list[int]]:
        outputs = strategy.gather_and_generate(
            sampling_params=[sampling.with_seed(seed) for seed in seeds],
            all_prompts=prompts,
            all_images=clips,
            images_num=[1] * PROMPTS,
        )
        return [output.output_token_ids for output in outputs]

    def whole() -> list[list[int]]:
        items = maker.rollout(prompts, clips, references, labels, sampling, step=1)
        return [item.response_ids.tolist() for item in items]

    ways = {BASELINE: alone, "generation": generation, "whole rollout": whole, "a request a sample": alone_by_sample}
    return engine, ways


def ways_alone(
    engine: Any, prompts: Sequence[str], clips: Sequence[Any], seeds: list[int], settings: dict[str, Any]
) -> tuple[Callable[[], list[list[int]]], Callable[[], list[list[int]]]]:
    """Calls of vLLM alone, with a request a prompt and with a request a sample.

    :param settings: Of its sampling.
    """
    import vllm

    from aqa.patches.strategy import build_audio_inputs

    requests = build_audio_inputs(prompts, clips)

    def params(n: int, seed: int) -> Any:
        fixed = {"max_tokens": MAX_NEW_TOKENS, "logprobs": 0, "detokenize": False}
        return vllm.SamplingParams(n=n, seed=seed, **fixed, **settings)

    def by_prompt() -> list[list[int]]:
        outputs = engine.llm.generate(requests, [params(SAMPLES, seed) for seed in seeds], use_tqdm=False)
        return [list(c.token_ids) for o in outputs for c in sorted(o.outputs, key=lambda c: c.index)]

    def by_sample() -> list[list[int]]:
        repeated = [request for request in requests for _ in range(SAMPLES)]
        each = [params(1, seed + i) for seed in seeds for i in range(SAMPLES)]
        return [list(o.outputs[0].token_ids) for o in engine.llm.generate(repeated, each, use_tqdm=False)]

    return by_prompt, by_sample


def measure(engine: Any, ways: dict[str, Callable], rounds: int) -> dict[str, dict[str, float]]:
    """Time the ways in turn.

    :param ways: From :func:`make_ways`.
    :param rounds: Interleaved rounds, after one that warms up.
    :return: Way to tokens a second and ratio to the baseline, also in tokens a CPU second.
    :raises SystemExit: if the ways sample different tokens.
    """
    speeds: dict[str, list[list[float]]] = {name: [] for name in ways}  # a second, and a CPU second
    for round_ in range(rounds + 1):
        sampled = {}
        for name, way in ways.items():
            engine.llm.reset_prefix_cache()
            engine.llm.llm_engine.engine_core.reset_encoder_cache()
            engine.llm.reset_mm_cache()
            took, sampled[name] = timed(way)
            if round_:
                speeds[name].append([sum(map(len, sampled[name])) / seconds for seconds in took])
        for name in ("generation", "whole rollout"):
            if sampled[name] != sampled[BASELINE]:
                raise SystemExit(f"{name!r} did not sample the tokens of {BASELINE!r}")
    table = {}
    for name, values in speeds.items():
        (wall, cpu), (base, base_cpu) = zip(*values, strict=True), zip(*speeds[BASELINE], strict=True)
        table[name] = {"tokens_per_second": round(statistics.median(wall)), "ratio": round(ratio(wall, base), 3)}
        table[name]["cpu_ratio"] = round(ratio(cpu, base_cpu), 3)
    return table


def main() -> None:
    args = parse(make_parser(__doc__, rounds=7))

    from audio_dataset import AudioPromptDataset
    from datasets import load_dataset

    import lightrft  # noqa: F401  sets vLLM's environment before it is imported
    from lightrft.utils import get_tokenizer_processor_vl
    from lightrft.utils.console import console
    from lightrft.utils.distributed import init_process_group, pick_device

    report = Report("rollout", args.rounds, console.print)
    console.redirect(report.log)
    model = (args.demo_dir / "model").resolve()
    init_process_group(pick_device())
    with tempfile.TemporaryDirectory() as folder:
        parquet = make_questions(Path(folder), PROMPTS, 1, 10)
        keys = {"input_key": "prompt", "images_key": "audio_path", "reference_key": "reference", "label_key": "label"}
        tokenizer, processor = get_tokenizer_processor_vl(str(model), None)
        data = load_dataset("parquet", data_files=str(parquet / "train.parquet"), split="train")
        strategy = SimpleNamespace(args=SimpleNamespace(**keys), print=console.print)
        rows = AudioPromptDataset(data, tokenizer, processor, 512, strategy).__getitems__(range(PROMPTS))
        engine, ways = make_ways(model, rows)
        table = measure(engine, ways, args.rounds)
    for name, row in table.items():
        console.print(
            f"{name:18}  {row['tokens_per_second']:7} tokens/s  {row['ratio']:5.2f} x   {row['cpu_ratio']:5.2f} x "
            "a CPU second"
        )
    report.judge("rollout: tokens a second, of vLLM alone", table["generation"]["ratio"], at_least=LIMIT)
    report.judge("rollout: the same, with features and checks", table["whole rollout"]["ratio"])
    report.judge("rollout: vLLM with a request a sample, of one a prompt", table["a request a sample"]["ratio"])
    report.finish(prompts=PROMPTS, samples=SAMPLES, ways=table)


if __name__ == "__main__":
    main()
